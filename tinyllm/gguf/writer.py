"""Writing GGUF files: the inverse of the reader, and as strict."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..files import check_apart, checked, replacing
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

MAX_PARTS = 999  # three of the five digits; as many as the reader opens
_PIECE = 1 << 24  # bytes of a file's tensor that are copied at a time
_IN_ALL_PARTS = ("general.alignment",)
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


@dataclass(frozen=True)
class Deferred:
    """A tensor whose blocks are made when its turn to be written comes, piece by piece.

    Parameters
    ----------
    type : str
        ggml's name of the type, such as ``"Q4_0"``.
    shape : tuple of int
        NumPy order, rows first.
    pieces : callable
        Returns the blocks in little-endian form: uint8 arrays, one after the other, of whole blocks each.
    """

    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[npt.NDArray[np.uint8]]]


Source = npt.NDArray[Any] | RawTensor | Deferred | Tensor


def write(
    path_or_file: str | os.PathLike[str] | BinaryIO,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Source],
    *,
    version: int = 3,
    byteorder: str = "little",
    alignment: int | None = None,
    part_bytes: int | None = None,
    sources: Collection[str | os.PathLike[str]] = (),
) -> list[str]:
    """Write a GGUF file, or several that hold a model together.

    Parameters
    ----------
    path_or_file : path-like or binary file
        A path appears only when the whole file is written.
    metadata : Mapping
        Values: bool, int (stored as the first of U32, I32, U64, I64 that fits), float (F32), str, bytes, NumPy
        scalars and one-dimensional arrays (stored as they are), lists of these, `StringArray`.
    tensors : Mapping
        NumPy arrays of float32, float16, float64 or signed integers, `RawTensor`, `Deferred`, or tensors of an
        open file; the last two are never whole in memory.
    version : int
        2 or 3.
    byteorder : str
        ``"little"`` or ``"big"``.
    alignment : int, optional
        Bytes; by default what ``general.alignment`` says, or 32.
    part_bytes : int, optional
        Split into parts with about so many bytes of tensors each, and at least one tensor. ``model.gguf``
        becomes ``model-00001-of-00003.gguf`` and so on; without it, and where all fits into one part, one
        file is written under the name given.
    sources : collection of path-like
        What the file is made of, files and folders: none of them is overwritten.

    Returns
    -------
    list of str
        The names of the files; empty if a file object was given.

    Raises
    ------
    ArgumentError
        If something cannot be stored, or a file to write is one of the sources.
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
    form = _Form(version, byteorder, alignment)
    if hasattr(path_or_file, "write"):
        if part_bytes is not None:
            raise ArgumentError("parts need names; give a path instead of a file object")
        _write_to(cast("BinaryIO", path_or_file), metadata, stored, form)
        return []
    return _write_parts(path_or_file, metadata, _parts(stored, part_bytes), form, sources)


@dataclass(frozen=True)
class _Form:
    version: int
    byteorder: str
    alignment: int


def _parts(stored: dict[str, _Stored], part_bytes: int | None) -> list[dict[str, _Stored]]:
    """The tensors of each file, in their order."""
    if part_bytes is None:
        return [stored]
    if not isinstance(part_bytes, int) or part_bytes < 1:
        raise ArgumentError(f"part_bytes={part_bytes!r:.40}; expected a number of bytes, or None")
    parts: list[dict[str, _Stored]] = [{}]
    filled = 0
    for name, tensor in stored.items():
        if parts[-1] and filled + tensor.nbytes > part_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    if len(parts) > MAX_PARTS:
        raise ArgumentError(
            f"part_bytes={part_bytes} gives {len(parts)} parts; at most {MAX_PARTS}"
        )
    return parts


def _write_parts(
    path: Any, metadata: dict[str, Any], parts: list[dict[str, _Stored]], form: _Form,
    sources: Collection[Any],
) -> list[str]:  # fmt: skip
    """Write each part; those of a split model have the keys that say so, all other keys are in the first."""
    names = part_names(checked(path), len(parts))
    for name in names:
        check_apart(name, sources)
    total = sum(map(len, parts))
    with ExitStack() as files:  # all of them appear together, when the last one is complete
        for i, (name, tensors) in enumerate(zip(names, parts, strict=True)):
            keys = metadata if i == 0 else {k: metadata[k] for k in _IN_ALL_PARTS if k in metadata}
            if len(parts) > 1:
                keys = {**keys, "split.no": np.uint16(i), "split.count": np.uint16(len(parts)),
                        "split.tensors.count": np.int32(total)}  # fmt: skip
            _write_to(files.enter_context(replacing(name)), keys, tensors, form)
    return names


def part_names(path: str, n: int) -> list[str]:
    """The names of a model's parts: ``path`` itself, if it is in one piece."""
    if n == 1:
        return [path]
    stem = path.removesuffix(".gguf")
    return [f"{stem}-{i + 1:05}-of-{n:05}.gguf" for i in range(n)]


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
    source: npt.NDArray[Any] | Tensor | Deferred

    @property
    def nbytes(self) -> int:
        return self.kind.row_nbytes(math.prod(self.shape))

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The little-endian bytes, one uint8 array after the other."""
        if isinstance(self.source, Deferred):
            yield from self.source.pieces()
        elif isinstance(self.source, Tensor):
            step = max(1, _PIECE // self.source.row_nbytes)
            n_rows = math.prod(self.shape[:-1])
            for i in range(0, n_rows, step):
                yield self.source.read_rows(i, min(i + step, n_rows)).reshape(-1)
        else:
            array = np.ascontiguousarray(self.source)
            yield array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)


def _stored(name: str, value: Source) -> _Stored:
    _check_name(name, MAX_TENSOR_NAME)
    if isinstance(value, np.ndarray):
        if value.dtype.name not in NUMPY_TYPES:
            raise ArgumentError(
                f"{name}: {value.dtype} is no tensor type of its own; give float32, float16, float64, "
                "int8 to int64, or a RawTensor"
            )
        stored = _Stored(TYPES[NUMPY_TYPES[value.dtype.name]], value.shape, value)
    elif not isinstance(value, (RawTensor, Tensor, Deferred)):
        raise ArgumentError(
            f"{name}: {type(value).__name__} {value!r:.40}; expected an array, "
            "a RawTensor, a Deferred or a Tensor"
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
    if not isinstance(stored.source, Deferred):
        _check_nbytes(name, stored, stored.source.nbytes)


def _check_nbytes(name: str, stored: _Stored, given: int) -> None:
    if given != stored.nbytes:
        raise ArgumentError(
            f"{name}: {given} bytes given, but {stored.kind.name} of shape {stored.shape} "
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
    file: BinaryIO, metadata: Mapping[str, Any], tensors: Mapping[str, _Stored], form: _Form
) -> None:
    header = _header(metadata, tensors, form.version, FILE_ORDER[form.byteorder], form.alignment)
    file.write(header)
    if tensors:
        file.write(bytes(-len(header) % form.alignment))
    for name, tensor in tensors.items():
        written = 0
        for blocks in tensor.pieces():
            if form.byteorder == "big" and tensor.kind.words:
                blocks = swap_words(tensor.kind, blocks)
            file.write(blocks.data)
            written += blocks.nbytes
        _check_nbytes(name, tensor, written)
        file.write(bytes(-tensor.nbytes % form.alignment))


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
