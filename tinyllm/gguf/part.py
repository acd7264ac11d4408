"""One GGUF file, from its first byte to where its last tensor ends."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import GGUFError
from ._file import RandomAccessFile
from .header import Header
from .tensor import Tensor
from .types import (
    ARCHITECTURE,
    BY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_KEY,
    MAX_TENSOR_NAME,
    REMOVED,
    VALUE_NAMES,
    VERSIONS,
    GGMLType,
)

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
_MIN_KEY = 8 + 1 + 4 + 1  # bytes of the shortest key with its value
_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOOKALIKES = {
    b"lmgg": "a file of the legacy GGML format, which GGUF replaced in 2023; convert it",
    b"tjgg": "a file of the legacy GGJT format, which GGUF replaced in 2023; convert it",
    b"fmgg": "a file of the legacy GGMF format, which GGUF replaced in 2023; convert it",
    b"algg": "a LoRA adapter of the legacy GGLA format; convert it to GGUF",
    b"FUGG": "GGUF reversed; in a big-endian file the numbers are reversed, the magic is not",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF",
    b"vers": "text, perhaps a Git LFS pointer; fetch the file it points to",
    b"<!DO": "a web page; the download went wrong",
    b"<!do": "a web page; the download went wrong",
    b"<htm": "a web page; the download went wrong",
    b"\x1f\x8b\x08\x00": "compressed with gzip; unpack it first",
    b"\x1f\x8b\x08\x08": "compressed with gzip; unpack it first",
}


@dataclass(slots=True)
class Part:
    """What one file says; a split model has several."""

    file: RandomAccessFile
    version: int
    byteorder: str
    alignment: int = DEFAULT_ALIGNMENT
    metadata: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # key -> type of its value
    offsets: dict[str, int] = field(default_factory=dict)  # key -> where it begins
    tensors: dict[str, Tensor] = field(default_factory=dict)


class _Info(NamedTuple):
    """A tensor info as the file states it."""

    at: int
    name: str
    shape: tuple[int, ...]
    kind: GGMLType
    nbytes: int
    offset: int


def read_part(path: str) -> Part:
    """Open and check one file; the caller closes ``part.file``."""
    file = RandomAccessFile(path)
    try:
        return _parse(Header(file))
    except BaseException:
        file.close()
        raise


def _parse(header: Header) -> Part:
    part = _preamble(header)
    n_tensors = _count(header, "tensors", _MIN_TENSOR, MAX_TENSORS)
    n_keys = _count(header, "keys", _MIN_KEY, MAX_KEYS)
    if n_tensors * _MIN_TENSOR + n_keys * _MIN_KEY > header.remaining:
        raise header.error(f"{n_tensors} tensors and {n_keys} keys do not fit into the file", 8)
    for _ in range(n_keys):
        _read_key(header, part)
    _check_general(header, part)
    infos = [_read_info(header) for _ in range(n_tensors)]
    _place_tensors(header, part, infos)
    return part


def _preamble(header: Header) -> Part:
    """Magic, version and byte order."""
    magic = header.raw(min(4, header.file.size), "the magic")
    if magic != MAGIC:
        what = _LOOKALIKES.get(magic, "not a GGUF file")
        raise header.error(f"{what} (the first bytes are {magic!r}, expected {MAGIC!r})", 0)
    version, byteorder = header.uint("U32", "the version"), "little"
    if version & 0xFFFF == 0 and version:
        version, byteorder = int.from_bytes(version.to_bytes(4, "little"), "big"), "big"
        header.use_byteorder("big")
    if version not in VERSIONS:
        hint = "convert the model again" if version < 2 else "a newer tinyllm may read it"
        raise header.error(f"GGUF version {version}; versions 2 and 3 can be read: {hint}", 4)
    return Part(header.file, version, byteorder)


def _count(header: Header, what: str, size: int, limit: int) -> int:
    n = header.uint("U64", f"the number of {what}")
    if n > limit:
        raise header.error(f"{n} {what}; at most {limit} are allowed", header.pos - 8)
    if n * size > header.remaining:
        raise header.error(
            f"{n} {what} take at least {n * size} bytes, but only {header.remaining} are left",
            header.pos - 8,
        )
    return n


def _name(header: Header, what: str, limit: int) -> str:
    """A key or tensor name: UTF-8, neither empty nor with control characters."""
    start = header.pos
    raw = header.string(what, limit)
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise header.error(f"{what} {raw[:64]!r} is not UTF-8", start) from error
    if not name or _CONTROL.search(name):
        raise header.error(f"{what} {name[:64]!r} is empty or has control characters", start)
    return name


def _read_key(header: Header, part: Part) -> None:
    start, header.name = header.pos, None
    key = header.name = _name(header, "a key", MAX_KEY)
    if key in part.metadata:
        raise header.error(f"the key stands twice, first at byte {part.offsets[key]}", start)
    type_id = header.uint("U32", "the value's type")
    part.metadata[key] = header.value(type_id)
    part.kinds[key], part.offsets[key] = VALUE_NAMES[type_id], start
    header.name = None


def _check_general(header: Header, part: Part) -> None:
    """The two keys that every reader must understand."""
    _check_key(
        header,
        part,
        "general.architecture",
        "a name of at most 64 letters, digits and ._-",
        lambda v: isinstance(v, str) and ARCHITECTURE.match(v) is not None,
    )
    _check_key(
        header,
        part,
        "general.alignment",
        f"a U32 that is a power of two up to {MAX_ALIGNMENT}",
        lambda v: (
            part.kinds["general.alignment"] == "U32" and 0 < v <= MAX_ALIGNMENT and v & (v - 1) == 0
        ),
    )
    part.alignment = part.metadata.get("general.alignment", DEFAULT_ALIGNMENT)


def _check_key(header: Header, part: Part, key: str, expected: str, good: Any) -> None:
    if key in part.metadata and not good(part.metadata[key]):
        found = f"{part.kinds[key]} {str(part.metadata[key])[:64]!r}"
        raise GGUFError(
            f"found {found}, expected {expected}",
            path=part.file.path,
            offset=part.offsets[key],
            name=key,
        )


def _read_info(header: Header) -> _Info:
    """One tensor info; its size is checked against the file, its place later."""
    start, header.name = header.pos, None
    name = header.name = _name(header, "a tensor name", MAX_TENSOR_NAME)
    n_dims = header.uint("U32", "the number of dimensions")
    if not 1 <= n_dims <= MAX_DIMS:
        raise header.error(f"{n_dims} dimensions; expected 1 to {MAX_DIMS}", header.pos - 4)
    at = header.pos
    shape = tuple(header.uint("U64", "a dimension") for _ in range(n_dims))[::-1]
    kind = _tensor_type(header)
    n_elements = math.prod(shape)
    if n_elements == 0:
        raise header.error(f"shape {shape} holds nothing; every dimension must be at least 1", at)
    if shape[-1] % kind.block_size:
        raise header.error(
            f"rows of {shape[-1]} elements are no whole number of {kind.name} blocks "
            f"of {kind.block_size}",
            at,
        )
    nbytes = kind.row_nbytes(n_elements)
    if nbytes > header.file.size:
        raise header.error(
            f"{kind.name} of shape {shape} takes {nbytes} bytes; the file has {header.file.size}",
            at,
        )
    return _Info(start, name, shape, kind, nbytes, header.uint("U64", "the tensor's offset"))


def _tensor_type(header: Header) -> GGMLType:
    type_id = header.uint("U32", "the tensor's type")
    if type_id in BY_ID:
        return BY_ID[type_id]
    if type_id in REMOVED:
        why = f"({REMOVED[type_id]}) was removed from the format; quantise the model again"
    else:
        why = f"is unknown; known are 0 to {max(BY_ID)}"
    raise header.error(f"tensor type {type_id} {why}", header.pos - 4)


def _place_tensors(header: Header, part: Part, infos: list[_Info]) -> None:
    """Tensors lie one after the other, each at the next multiple of the alignment, and fill the file."""
    file, alignment = header.file, part.alignment
    base, end = _aligned(header.pos, alignment), header.pos
    for info in infos:
        header.name = info.name
        if info.name in part.tensors:
            raise header.error("the tensor stands twice", info.at)
        start = _aligned(end, alignment)
        _check_place(header, info, start - base, start, alignment)
        _check_padding(header, end, start)
        tensor = Tensor(info.name, info.shape, info.kind, file, start, part.byteorder)
        part.tensors[info.name] = tensor
        end = start + info.nbytes
    header.name = None
    if file.size > _aligned(end, alignment):
        raise header.error(f"{file.size - end} bytes follow the last tensor", end)
    _check_padding(header, end, file.size)


def _check_place(header: Header, info: _Info, expected: int, start: int, alignment: int) -> None:
    """The offset is where the tensor must lie, and the file holds all of it."""
    if info.offset != expected:
        raise header.error(
            f"the offset is {info.offset}, expected {expected}: tensors follow each other "
            f"at multiples of {alignment}",
            info.at,
        )
    if start + info.nbytes > header.file.size:
        raise header.error(
            f"the data are bytes {start} to {start + info.nbytes}, but the file ends at "
            f"{header.file.size}: it is incomplete; download it again",
            info.at,
        )


def _check_padding(header: Header, start: int, stop: int) -> None:
    padding = header.file.read(start, stop - start) if stop > start else b""
    if any(padding):
        raise header.error("bytes between tensors must be zero", start)


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
