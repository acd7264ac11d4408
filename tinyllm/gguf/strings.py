"""Arrays of strings as the file stores them, decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

Bytes = bytes  # the class below has a method of that name


class StringArray(Sequence[str]):
    """The strings of one metadata array: one block of bytes and where each string begins.

    Text is UTF-8 decoded with ``surrogateescape``, so that tokens which are no valid UTF-8 stay distinct and
    encode back to the same bytes.

    Examples
    --------
    >>> StringArray.of(["a", b"\\xff"]).tobytes_list()
    [b'a', b'\\xff']
    """

    __slots__ = ("_blob", "_ends", "_starts")

    def __init__(
        self, blob: Bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
    ) -> None:
        self._blob, self._starts, self._ends = blob, starts, ends

    @classmethod
    def of(cls, strings: Sequence[str | Bytes]) -> StringArray:
        """The same type, from Python strings."""
        parts = [encode(s) for s in strings]
        ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
        return cls(b"".join(parts), np.concatenate(([0], ends))[:-1].astype(np.int64), ends)

    def __len__(self) -> int:
        return len(self._starts)

    def bytes(self, i: int) -> Bytes:
        """String `i` as stored."""
        return self._blob[self._starts[i] : self._ends[i]]

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> StringArray: ...
    def __getitem__(self, i: int | slice) -> str | StringArray:
        if isinstance(i, slice):
            return StringArray(self._blob, self._starts[i], self._ends[i])
        return decode(self.bytes(i))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each string, int64 [n]."""
        return self._ends - self._starts

    def tobytes_list(self) -> list[Bytes]:
        """All strings as stored."""
        blob = self._blob
        return [blob[a:b] for a, b in zip(self._starts.tolist(), self._ends.tolist(), strict=True)]

    def tolist(self) -> list[str]:
        """All strings as text."""
        return [str(s, "utf-8", "surrogateescape") for s in self.tobytes_list()]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return self.tobytes_list() == other.tobytes_list()
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
