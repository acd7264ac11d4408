"""Walking through the header of a file: every read is bounded, every count limited before memory is taken."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from ..errors import GGUFError
from ._file import RandomAccessFile
from .strings import StringArray, decode
from .types import FILE_ORDER, VALUE_DTYPES, VALUE_NAMES

MAX_HEADER = 128 << 20  # bytes before the tensor data; the largest vocabularies known need 30 MB
MAX_STRINGS = 1 << 22  # strings in the arrays of a file; the largest known has 0.8 million
MAX_NESTED = 1 << 16  # arrays inside arrays
MAX_DEPTH = 4
_FIRST_READ = 1 << 20
_FORMATS = {"U32": "I", "U64": "Q"}


class Header:
    """A position in the part of a file before the tensor data.

    Bytes are fetched as they are needed. `name` is the key or tensor being read, for the messages.
    """

    def __init__(self, file: RandomAccessFile) -> None:
        self.file = file
        self.pos = 0
        self.name: str | None = None
        self._buf = bytearray()
        self._n_strings = self._n_nested = 0
        self.use_byteorder("little")

    def use_byteorder(self, byteorder: str) -> None:
        """Read numbers in this order, ``"little"`` or ``"big"``, from here on."""
        self.order = FILE_ORDER[byteorder]
        self._structs = {k: struct.Struct(self.order + f) for k, f in _FORMATS.items()}

    def error(self, message: str, offset: int | None = None) -> GGUFError:
        """A GGUFError about the byte at `offset`, by default the current position."""
        at = self.pos if offset is None else offset
        return GGUFError(message, path=self.file.path, offset=at, name=self.name)

    @property
    def remaining(self) -> int:
        return self.file.size - self.pos

    def take(self, n: int, what: str) -> int:
        """Make the next `n` bytes available and step over them; returns where they begin."""
        start, end = self.pos, self.pos + n
        if end > len(self._buf):
            self._fetch(end, what)
        self.pos = end
        return start

    def _fetch(self, end: int, what: str) -> None:
        if end > self.file.size:
            n = end - self.pos
            raise self.error(f"{what} takes {n} bytes, but only {self.remaining} are left")
        if end > MAX_HEADER:
            raise self.error(f"{what} ends beyond {MAX_HEADER} bytes, the limit of a header")
        have = len(self._buf)
        want = min(max(end, 2 * have, _FIRST_READ), self.file.size, MAX_HEADER)
        self._buf += self.file.read(have, want - have)

    def raw(self, n: int, what: str) -> bytes:
        start = self.take(n, what)
        return bytes(self._buf[start : self.pos])

    def uint(self, kind: str, what: str) -> int:
        """An unsigned integer, `kind` ``"U32"`` or ``"U64"``."""
        form = self._structs[kind]
        value: int = form.unpack_from(self._buf, self.take(form.size, what))[0]
        return value

    def string(self, what: str, limit: int = MAX_HEADER) -> bytes:
        """A length and so many bytes."""
        start, n = self.pos, self.uint("U64", f"the length of {what}")
        if n > min(limit, self.remaining):
            bound = (
                f"at most {limit} are allowed" if n > limit else f"only {self.remaining} are left"
            )
            raise self.error(f"{what} is said to have {n} bytes, but {bound}", start)
        return self.raw(n, what)

    def value(self, type_id: int) -> Any:
        """A metadata value of the type with this id."""
        if type_id >= len(VALUE_NAMES):
            raise self.error(
                f"value type {type_id} does not exist; types are 0 to {len(VALUE_NAMES) - 1}",
                self.pos - 4,
            )
        kind = VALUE_NAMES[type_id]
        if kind == "STRING":
            return decode(self.string("the string"))
        if kind == "ARRAY":
            return self._array(1)
        return self._scalar(kind)

    def _scalar(self, kind: str) -> bool | int | float:
        start = self.pos
        value: bool | int | float = self._numbers(kind, 1)[0].item()
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{value} where a finite number must stand", start)
        return value

    def _array(self, depth: int) -> Any:
        start = self.pos
        type_id = self.uint("U32", "the array's element type")
        if type_id >= len(VALUE_NAMES):
            raise self.error(f"array of value type {type_id}, which does not exist", start)
        kind, n = VALUE_NAMES[type_id], self.uint("U64", "the array's length")
        if kind == "STRING":
            return self._strings(n)
        if kind == "ARRAY":
            return self._nested(n, depth)
        return self._numbers(kind, n)

    def _count(self, n: int, size: int, what: str) -> None:
        """Refuse a count of `n` things of at least `size` bytes that cannot fit into what is left."""
        if n * size > self.remaining:
            raise self.error(
                f"an array of {n} {what} takes at least {n * size} bytes, "
                f"but only {self.remaining} are left",
                self.pos - 8,
            )

    def _nested(self, n: int, depth: int) -> list[Any]:
        self._count(n, 12, "arrays")
        self._n_nested += n
        if depth >= MAX_DEPTH or self._n_nested > MAX_NESTED:
            raise self.error(
                f"arrays inside arrays go deeper than {MAX_DEPTH} or are more than {MAX_NESTED}",
                self.pos - 8,
            )
        return [self._array(depth + 1) for _ in range(n)]

    def _numbers(self, kind: str, n: int) -> np.ndarray[Any, Any]:
        dtype = VALUE_DTYPES[kind]
        self._count(n, dtype.itemsize, f"{kind} values")
        start = self.take(n * dtype.itemsize, f"{n} {kind}")
        stored = np.dtype("u1") if kind == "BOOL" else dtype.newbyteorder(self.order)
        values = np.frombuffer(self._buf, stored, n, start).astype(stored.newbyteorder("="))
        if kind != "BOOL":
            return values
        if (values > 1).any():
            at = int(np.argmax(values > 1))
            raise self.error(f"a bool is 0 or 1, not {values[at]}", start + at)
        return values.astype(dtype)

    def _strings(self, n: int) -> StringArray:
        """n strings -> StringArray: one walk over the lengths, one copy of the bytes."""
        self._count(n, 8, "strings")
        self._n_strings += n
        if self._n_strings > MAX_STRINGS:
            raise self.error(f"more than {MAX_STRINGS} strings in arrays", self.pos - 8)
        begin = self.pos
        lengths = np.array(self._walk(n), np.int64)
        ends = np.cumsum(lengths + 8)
        return StringArray(bytes(self._buf[begin : self.pos]), ends - lengths, ends)

    def _walk(self, n: int) -> list[int]:
        """Step over n strings; returns their lengths."""
        lengths: list[int] = []
        unpack, buf, pos = self._structs["U64"].unpack_from, self._buf, self.pos
        safe = len(buf) - 8
        for i in range(n):
            if pos > safe:  # not fetched yet, or beyond the end
                self.take(pos + 8 - self.pos, f"string {i} of {n}")
                self.pos, safe = self.pos - 8, len(buf) - 8
            (length,) = unpack(buf, pos)
            lengths.append(length)
            pos += 8 + length
        self.take(pos - self.pos, f"the last of {n} strings")
        return lengths
