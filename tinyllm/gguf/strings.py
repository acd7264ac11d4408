"""Arrays of strings as the file stores them, decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

Bytes = bytes  # the class below has a method of that name


class StringArray(Sequence[str]):
    """The strings of one metadata array, kept as one piece of memory.

    Text is UTF-8 decoded with ``surrogateescape``, so that tokens which are no valid UTF-8 stay distinct and
    encode back to the same bytes.

    Parameters
    ----------
    joined : bytes
        The strings with one zero byte between them.
    ends : int64 [n]
        Where each ends in `joined`.

    Examples
    --------
    >>> StringArray.of(["a", b"\\xff"]).tobytes_list()
    [b'a', b'\\xff']
    """

    __slots__ = ("_ends", "_joined")

    def __init__(self, joined: Bytes, ends: npt.NDArray[np.int64]) -> None:
        self._joined, self._ends = joined, ends

    @classmethod
    def of(cls, strings: Sequence[str | Bytes]) -> StringArray:
        """The same type, from Python strings."""
        parts = [encode(s) for s in strings]
        return cls(b"\0".join(parts), _ends(np.array([len(p) for p in parts], np.int64)))

    @classmethod
    def from_file(
        cls, stored: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]
    ) -> StringArray:
        """From strings that each have a length of 8 bytes before them: stored uint8 [sum(lengths + 8)]."""
        starts = np.cumsum(lengths + 8) - lengths
        keep = np.ones(len(stored), np.bool_)
        for i in range(8):
            keep[starts - 1 - i] = False
        separated = stored.copy()
        separated[starts[1:] - 1], keep[starts[1:] - 1] = 0, True
        return cls(separated[keep].tobytes(), _ends(lengths))

    def __len__(self) -> int:
        return len(self._ends)

    def bytes(self, i: int) -> Bytes:
        """String `i` as stored."""
        i = range(len(self))[i]
        return self._joined[self._ends[i - 1] + 1 if i else 0 : self._ends[i]]

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> StringArray: ...
    def __getitem__(self, i: int | slice) -> str | StringArray:
        if isinstance(i, slice):
            return StringArray.of([self.bytes(j) for j in range(len(self))[i]])
        return decode(self.bytes(i))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    @property
    def joined(self) -> Bytes:
        """All strings, with one zero byte between them."""
        return self._joined

    @property
    def ends(self) -> npt.NDArray[np.int64]:
        """Where each ends in `joined`, int64 [n]."""
        return self._ends

    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each string, int64 [n]."""
        return np.diff(self._ends, prepend=-1) - 1

    def tobytes_list(self) -> list[Bytes]:
        """All strings as stored."""
        parts = self._joined.split(b"\0")
        if len(parts) == len(self):  # no string holds a zero byte
            return parts
        ends = self._ends.tolist()
        return [self._joined[a + 1 : b] for a, b in zip([-1, *ends], ends, strict=False)]

    def tolist(self) -> list[str]:
        """All strings as text."""
        try:
            texts = self._joined.decode().split("\0")
        except UnicodeDecodeError:
            texts = []
        if len(texts) == len(self):
            return texts
        return [decode(s) for s in self.tobytes_list()]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self._joined == other._joined and np.array_equal(self._ends, other._ends)
        if isinstance(other, Sequence) and not isinstance(other, (str, bytes)):
            return self.tolist() == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        head = ", ".join(repr(s) for s in self[:4].tolist())
        return f"StringArray([{head}{', ...' if len(self) > 4 else ''}], n={len(self)})"


def _ends(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where strings of these lengths end when one byte stands between them."""
    return np.cumsum(lengths + 1) - 1


def decode(raw: bytes) -> str:
    """UTF-8 to text; stray bytes become lone surrogates, which `encode` turns back."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str | bytes) -> bytes:
    """Text to UTF-8, the inverse of `decode`; bytes pass through."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
