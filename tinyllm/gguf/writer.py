"""Writing GGUF files: the inverse of the reader, and as strict."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..files import replacing
from .strings import StringArray, encode
from .tensor import Tensor
from .types import (
    ARCHITECTURE,
    DEFAULT_ALIGNMENT,
    DTYPE_VALUES,
    FILE_ORDER,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_KEY,
    MAX_TENSOR_NAME,
    NUMPY_TYPES,
    TYPES,
    VALUE_DTYPES,
    VALUE_IDS,
    VERSIONS,
    GGMLType,
    Order,
    swap_words,
)

_INT_KINDS = ("U32", "I32", "U64", "I64")  # the first that fits is taken


@dataclass(frozen=True)
class RawTensor:
    """Blocks that are already in a tensor type's form.

    Parameters
    ----------
    type : str
        ggml's name of the type, such as ``"Q4_0"``.
    shape : tuple of int
        NumPy order, rows first.
    raw : uint8 array
        The blocks in little-endian form, any shape of the right number of bytes.
    """

    type: str
    shape: tuple[int, ...]
    raw: npt.NDArray[np.uint8]


def write(
    path_or_file: str | os.PathLike[str] | BinaryIO,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, npt.NDArray[Any] | RawTensor | Tensor],
    *,
    version: int = 3,
    byteorder: str = "little",
    alignment: int | None = None,
) -> None:
    """Write a GGUF file.

    Parameters
    ----------
    path_or_file : path-like or binary file
        A path appears only when the whole file is written.
    metadata : Mapping
        Values: bool, int (stored as the first of U32, I32, U64, I64 that fits), float (F32), str, bytes, NumPy
        scalars and one-dimensional arrays (stored as they are), lists of these, `StringArray`.
    tensors : Mapping
        NumPy arrays of float32, float16, float64 or signed integers, `RawTensor`, or tensors of an open file.
    version : int
        2 or 3.
    byteorder : str
        ``"little"`` or ``"big"``.
    alignment : int, optional
        Bytes; by default what ``general.alignment`` says, or 32.

    Raises
    ------
    ArgumentError
        If something cannot be stored.
    """
    if version not in VERSIONS or byteorder not in FILE_ORDER:
        raise ArgumentError(f"version {version} {byteorder!r}; versions are 2 and 3, little or big")
    for name, given in (("metadata", metadata), ("tensors", tensors)):
        if not isinstance(given, Mapping):
            raise ArgumentError(
                f"{name} is {type(given).__name__} {given!r:.40}; expected a mapping"
            )
    metadata, alignment = _with_alignment(dict(metadata), alignment)
    architecture = metadata.get("general.architecture", "llama")
    if not isinstance(architecture, str) or not ARCHITECTURE.match(architecture):
        raise ArgumentError(f"general.architecture is {architecture!r}; expected a plain name")
    stored = {name: _stored(name, value) for name, value in tensors.items()}
    header = _header(metadata, stored, version, FILE_ORDER[byteorder], alignment)
    if hasattr(path_or_file, "write"):
        _write_to(cast("BinaryIO", path_or_file), header, stored, byteorder, alignment)
        return
    with replacing(path_or_file) as file:
        _write_to(file, header, stored, byteorder, alignment)


def _with_alignment(metadata: dict[str, Any], wanted: int | None) -> tuple[dict[str, Any], int]:
    """The metadata saying the alignment if it is not the usual one."""
    stated = metadata.get("general.alignment")
    given = wanted if stated is None else stated
    alignment = DEFAULT_ALIGNMENT if given is None else int(given)
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ArgumentError(f"alignment {alignment}; expected a power of two up to {MAX_ALIGNMENT}")
    if wanted is not None and wanted != alignment:
        raise ArgumentError(f"alignment={wanted}, but general.alignment is {alignment}")
    if stated is not None or alignment != DEFAULT_ALIGNMENT:
        metadata["general.alignment"] = np.uint32(alignment)
    return metadata, alignment


@dataclass(frozen=True)
class _Stored:
    """A tensor ready to be written: `source` gives its bytes when its turn comes."""

    kind: GGMLType
    shape: tuple[int, ...]
    source: npt.NDArray[Any] | Tensor

    @property
    def nbytes(self) -> int:
        return self.kind.row_nbytes(math.prod(self.shape))

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The little-endian bytes, uint8 [nbytes]."""
        if isinstance(self.source, Tensor):
            return self.source.read()
        array = np.ascontiguousarray(self.source)
        return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)


def _stored(name: str, value: npt.NDArray[Any] | RawTensor | Tensor) -> _Stored:
    _check_name(name, MAX_TENSOR_NAME)
    if isinstance(value, np.ndarray):
        if value.dtype.name not in NUMPY_TYPES:
            raise ArgumentError(
                f"{name}: {value.dtype} is no tensor type of its own; give float32, float16, float64, "
                "int8 to int64, or a RawTensor"
            )
        stored = _Stored(TYPES[NUMPY_TYPES[value.dtype.name]], value.shape, value)
    elif not isinstance(value, (RawTensor, Tensor)):
        raise ArgumentError(
            f"{name}: {type(value).__name__} {value!r:.40}; expected an array, a RawTensor or a Tensor"
        )
    elif value.type not in TYPES:
        raise ArgumentError(f"{name}: no tensor type {value.type!r}; there are {', '.join(TYPES)}")
    else:
        source = value.raw if isinstance(value, RawTensor) else value
        stored = _Stored(TYPES[value.type], tuple(value.shape), source)
    _check_shape(name, stored)
    return stored


def _check_shape(name: str, stored: _Stored) -> None:
    shape, kind = stored.shape, stored.kind
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
        raise ArgumentError(f"{name}: shape {shape}; expected 1 to {MAX_DIMS} positive dimensions")
    if shape[-1] % kind.block_size:
        raise ArgumentError(
            f"{name}: rows of {shape[-1]} elements are no whole {kind.name} blocks of {kind.block_size}"
        )
    if stored.source.nbytes != stored.nbytes:
        raise ArgumentError(
            f"{name}: {stored.source.nbytes} bytes given, but {kind.name} of shape {shape} "
            f"takes {stored.nbytes}"
        )


def _check_name(name: str, limit: int) -> None:
    if not isinstance(name, str):
        raise ArgumentError(f"name {name!r:.80}: expected a text")
    if not name or len(_bytes(name)) > limit or any(c < " " or c == "\x7f" for c in name):
        raise ArgumentError(
            f"name {name[:80]!r}: expected 1 to {limit} bytes without control characters"
        )


def _header(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, _Stored],
    version: int,
    order: Order,
    alignment: int,
) -> bytes:
    """Everything before the tensor data, without padding."""
    out = [MAGIC, struct.pack(f"{order}IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        _check_name(key, MAX_KEY)
        out.append(_string(_bytes(key), order))
        out.extend(_typed(key, value, order))
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        out.append(_string(_bytes(name), order))
        out.append(struct.pack(f"{order}I{len(shape)}Q", len(shape), *shape))
        out.append(struct.pack(f"{order}IQ", tensor.kind.id, offset))
        offset += tensor.nbytes + -tensor.nbytes % alignment
    return b"".join(out)


def _write_to(
    file: BinaryIO, header: bytes, tensors: Mapping[str, _Stored], byteorder: str, alignment: int
) -> None:
    file.write(header)
    if tensors:
        file.write(bytes(-len(header) % alignment))
    for tensor in tensors.values():
        blocks = tensor.blocks()
        if byteorder == "big" and tensor.kind.words:
            blocks = swap_words(tensor.kind, blocks)
        file.write(blocks.data)
        file.write(bytes(-tensor.nbytes % alignment))


def _typed(key: str, value: Any, order: Order) -> Iterator[bytes]:
    """A metadata value: the id of its type, then itself."""
    kind, payload = _value(key, value, order)
    yield struct.pack(f"{order}I", VALUE_IDS[kind])
    yield payload


def _value(key: str, value: Any, order: Order) -> tuple[str, bytes]:
    """A metadata value -> (name of its type, its bytes)."""
    if isinstance(value, (str, bytes)):
        return "STRING", _string(_bytes(value), order)
    if isinstance(value, (StringArray, np.ndarray, Sequence)):
        kind, n, payload = _array(key, value, order)
        return "ARRAY", struct.pack(f"{order}IQ", VALUE_IDS[kind], n) + payload
    kind = _scalar_kind(key, value)
    if isinstance(value, (float, np.floating)) and not np.isfinite(_number(kind, value)):
        raise ArgumentError(f"{key}: {value} is not a finite {kind}")
    return kind, _number(kind, value).astype(_order(kind, order)).tobytes()


def _array(key: str, value: Any, order: Order) -> tuple[str, int, bytes]:
    """An array -> (type of its elements, how many, their bytes)."""
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.name not in DTYPE_VALUES:
            raise ArgumentError(f"{key}: cannot store {value.dtype} of shape {value.shape}")
        kind = DTYPE_VALUES[value.dtype.name]
        return kind, len(value), value.astype(_order(kind, order)).tobytes()
    if isinstance(value, StringArray):
        value = value.tobytes_list()
    elif not value:
        raise ArgumentError(f"{key}: an empty list has no type; give a NumPy array or StringArray")
    if all(isinstance(v, (str, bytes)) for v in value):
        return "STRING", len(value), b"".join(_string(_bytes(v), order) for v in value)
    if all(isinstance(v, (list, tuple, np.ndarray, StringArray)) for v in value):
        return "ARRAY", len(value), b"".join(_value(key, v, order)[1] for v in value)
    kind = _common_kind(key, value)
    return kind, len(value), np.array(value).astype(_order(kind, order)).tobytes()


def _scalar_kind(key: str, value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "BOOL"
    if isinstance(value, np.generic) and value.dtype.name in DTYPE_VALUES:
        return DTYPE_VALUES[value.dtype.name]
    if isinstance(value, float):
        return "F32"
    if isinstance(value, int):
        return _int_kind(key, value, value)
    raise ArgumentError(f"{key}: a {type(value).__name__} cannot be stored as metadata")


def _common_kind(key: str, values: Sequence[Any]) -> str:
    """The type that stores every element of a list of scalars."""
    if all(type(v) is int for v in values):
        return _int_kind(key, min(values), max(values))
    kinds = {_scalar_kind(key, v) for v in values}
    if len(kinds) > 1:
        raise ArgumentError(f"{key}: the list mixes {' and '.join(sorted(kinds))}")
    return kinds.pop()


def _int_kind(key: str, low: int, high: int) -> str:
    for kind in _INT_KINDS:
        info = np.iinfo(VALUE_DTYPES[kind].name)
        if info.min <= low and high <= info.max:
            return kind
    raise ArgumentError(f"{key}: {high if high > 0 else low} does not fit into 64 bits")


def _number(kind: str, value: Any) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):  # the caller refuses infinity
        return np.asarray(value, VALUE_DTYPES[kind])


def _order(kind: str, order: Order) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = VALUE_DTYPES[kind].newbyteorder(order)
    return dtype


def _string(raw: bytes, order: Order) -> bytes:
    return struct.pack(f"{order}Q", len(raw)) + raw


def _bytes(text: str | bytes) -> bytes:
    try:
        return encode(text)
    except UnicodeEncodeError as error:
        raise ArgumentError(f"text with a lone surrogate cannot be stored: {error}") from error
