"""Arrays of strings as the file stores them, decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import overload

import numpy as np
import numpy.typing as npt

Bytes = bytes  # the class below has a method of that name
GAP = bytes(8)  # stands before each string in memory


class StringArray(Sequence[str]):
    """The strings of one metadata array, kept as one piece of memory.

    Text is UTF-8 decoded with ``surrogateescape``, so that tokens which are no valid UTF-8 stay distinct and
    encode back to the same bytes.

    Parameters
    ----------
    memory : bytes
        The strings, with 8 zero bytes before each: where the file has its length.
    ends : int64 [n]
        Where each ends in `memory`.

    Examples
    --------
    >>> StringArray.of(["a", b"\\xff"]).tobytes_list()
    [b'a', b'\\xff']
    """

    __slots__ = ("ends", "memory")

    def __init__(self, memory: Bytes, ends: npt.NDArray[np.int64]) -> None:
        self.memory, self.ends = memory, ends

    @classmethod
    def of(cls, strings: Sequence[str | Bytes]) -> StringArray:
        """Make an array from Python strings, or from bytes."""
        parts = [encode(s) for s in strings]
        ends = np.cumsum(np.array([8 + len(p) for p in parts], np.int64))
        return cls(b"".join(GAP + p for p in parts), ends)

    @classmethod
    def from_file(
        cls, stored: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]
    ) -> StringArray:
        """Make an array from a file's bytes: each string after its length, a number of 8 bytes.

        stored uint8 [sum(lengths + 8)], lengths int64 [n].
        """
        ends = np.cumsum(lengths + 8)
        cleared = np.concatenate([stored, np.zeros(8, np.uint8)])
        np.ndarray(len(stored) + 1, np.uint64, cleared, strides=(1,))[ends - lengths - 8] = 0
        return cls(cleared[: len(stored)].tobytes(), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def starts(self) -> npt.NDArray[np.int64]:
        """Where each begins in `memory`, int64 [n]."""
        return np.concatenate([[0], self.ends])[: len(self)] + 8

    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each string, int64 [n]."""
        return self.ends - self.starts()

    def bytes(self, i: int) -> Bytes:
        """String `i` as stored."""
        i = range(len(self))[i]
        return self.memory[(self.ends[i - 1] if i else 0) + 8 : self.ends[i]]

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
    def holds_zeros(self) -> bool:
        """Whether a zero byte is part of a string."""
        n_others = np.count_nonzero(np.frombuffer(self.memory, np.uint8))
        return len(self.memory) - int(n_others) != 8 * len(self)

    def tobytes_list(self) -> list[Bytes]:
        """All strings as stored."""
        if not self.holds_zeros:
            return self.memory.split(GAP)[1:]
        starts, ends = self.starts().tolist(), self.ends.tolist()
        return [self.memory[a:b] for a, b in zip(starts, ends, strict=True)]

    def tolist(self) -> list[str]:
        """All strings as text."""
        if not self.holds_zeros:
            with suppress(UnicodeDecodeError):
                return self.memory.decode().split("\0" * 8)[1:]
        return [decode(s) for s in self.tobytes_list()]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self.memory == other.memory and np.array_equal(self.ends, other.ends)
        if isinstance(other, Sequence) and not isinstance(other, (str, bytes)):
            return self.tolist() == list(other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        head = ", ".join(repr(s) for s in self[:4].tolist())
        return f"StringArray([{head}{', ...' if len(self) > 4 else ''}], n={len(self)})"


def decode(raw: bytes) -> str:
    """UTF-8 to text; stray bytes become lone surrogates, which `encode` turns back."""
    return raw.decode("utf-8", "surrogateescape")


def encode(text: str | bytes) -> bytes:
    """Text to UTF-8, the inverse of `decode`; bytes pass through."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
