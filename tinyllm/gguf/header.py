"""A walk through the header of a file: every read is bounded, every count limited before memory is taken."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import GGUFError
from ._file import RandomAccessFile
from .strings import StringArray, decode
from .types import FILE_ORDER, VALUE_DTYPES, VALUE_NAMES

MAX_HEADER = 128 << 20  # bytes before the tensor data; the largest vocabularies known need 30 MB
MAX_STRINGS = 1 << 21  # strings in the arrays of a file; the largest known has 0.8 million
MAX_NESTED = 1 << 16  # arrays inside arrays
MAX_DEPTH = 4
_FIRST_READ = 1 << 20
# A leap over fewer strings than this costs more than it saves: so many are then walked before the next leap.
_WALK = 4096
_LEAP = 1 << 18  # bytes that one leap searches for strings
_FORMATS = {"U32": "I", "U64": "Q"}


def shown(name: str | None) -> str | None:
    """A key or tensor name as messages give it: keys may have 65535 bytes."""
    return name if name is None or len(name) <= 200 else f"{name[:200]}..."


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
        return GGUFError(message, path=self.file.path, offset=at, name=shown(self.name))

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
        self._prefetch(end - self.pos)

    def _prefetch(self, n: int) -> None:
        """Fetch the next `n` bytes or more, as far as there are any."""
        have, limit = len(self._buf), min(self.file.size, MAX_HEADER)
        if self.pos + n > have < limit:
            want = min(max(self.pos + n, 2 * have, _FIRST_READ), limit)
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
        return self.raw(self._length(what, limit), what)

    def _length(self, what: str, limit: int = MAX_HEADER) -> int:
        start, n = self.pos, self.uint("U64", f"the length of {what}")
        if n > min(limit, self.remaining):
            bound = (
                f"at most {limit} are allowed" if n > limit else f"only {self.remaining} are left"
            )
            raise self.error(f"{what} is said to have {n} bytes, but {bound}", start)
        return n

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
        self._count(n, VALUE_DTYPES[kind].itemsize, f"{kind} values")
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
        """Read an array of n strings."""
        self._count(n, 8, "strings")
        self._n_strings += n
        if self._n_strings > MAX_STRINGS:
            raise self.error(f"more than {MAX_STRINGS} strings in arrays", self.pos - 8)
        begin, done = self.pos, 0
        pieces = [np.empty(0, np.int64)]
        while done < n:
            leapt = self._leap(n - done)
            done += len(leapt)
            walked = self._walk(done, min(n - done, _WALK) if len(leapt) < _WALK else 0)
            done += len(walked)
            pieces += leapt, walked
        self.take(0, "the last string")  # a walk does not fetch what it steps over
        stored = np.frombuffer(self._buf, np.uint8, self.pos - begin, begin)
        return StringArray.from_file(stored, np.concatenate(pieces))

    def _walk(self, first: int, n: int) -> npt.NDArray[np.int64]:
        """Step over n strings one by one, from number `first`; returns their lengths, int64 [n]."""
        lengths: list[int] = []
        unpack, pos, fetched = self._structs["U64"].unpack_from, self.pos, len(self._buf) - 8
        for i in range(first, first + n):
            if pos > fetched:
                self.pos = pos
                self.take(8, f"the length of string {i}")
                fetched = len(self._buf) - 8
            (length,) = unpack(self._buf, pos)
            if length > min(self.file.size - 8 - pos, MAX_HEADER):
                self.pos = pos
                self._length(f"string {i}")
            lengths.append(length)
            pos += 8 + length
        self.pos = pos
        return np.array(lengths, np.int64)

    def _leap(self, n: int) -> npt.NDArray[np.int64]:
        """Step over up to n strings at once; returns their lengths, int64 [some].

        A walk over half a million lengths takes longer than all else in opening a file. Short strings are found
        together: six zero bytes and then another one are where a length below 65536 ends. That is a guess
        (text may hold such bytes), so only a chain in which every string begins where the one before it
        ends is accepted.
        """
        if self.order == ">":
            return np.empty(0, np.int64)
        self._prefetch(_LEAP)
        seen = np.frombuffer(self._buf, np.uint8, min(_LEAP, len(self._buf) - self.pos), self.pos)
        zero = seen == 0
        pairs = zero[:-1] & zero[1:]
        six = pairs[:-4] & pairs[2:-2] & pairs[4:]
        starts = np.flatnonzero(six[2:-1] & ~zero[8:]) + 8
        lengths = seen[starts - 8] | seen[starts - 7].astype(np.int64) << 8
        ends = starts + lengths
        chained = np.concatenate(([8], ends[:-1] + 8)) == starts
        good = chained & (ends <= len(seen))
        n_good = min(n, int(np.argmin(np.append(good, False))))
        self.pos += int(ends[n_good - 1]) if n_good else 0
        return lengths[:n_good]
