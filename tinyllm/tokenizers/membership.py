"""Tell whether many strings are all in a collection, and whether they differ, without Python strings.

Half a million strings are checked at once, by NumPy. A string of up to 16 bytes, which most tokens are, is
read as two 64-bit numbers; as no string holds a zero byte, different strings have different numbers. Longer
strings are looked up in a set.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

SHORT = 16  # bytes
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # n: keeps the first n bytes
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # multipliers of the hash
_TABLE = 1 << 20  # entries of a hash table
_SHIFTS = (44, 24)  # the bits of a hash from here on are the place in the first, and second, table
_PART = 1 << 13  # strings checked together: few enough for the processor's cache


class Numbers(NamedTuple):
    """Strings of up to 16 bytes as numbers: the first 8 bytes, the other 8, and a hash of both."""

    first: Words
    second: Words
    hashes: Words


class Strings:
    """Strings without zero bytes that lie in one piece of memory: where each begins and ends."""

    def __init__(self, memory: bytes, starts: Ints, ends: Ints) -> None:
        self.memory, self.starts, self.ends = memory, starts, ends
        self.lengths = ends - starts
        self._eights = np.ndarray(len(memory) + 9, "<u8", memory + bytes(SHORT), strides=(1,))

    def others(self, starts: Ints, ends: Ints) -> Strings:
        """Strings that lie elsewhere in this memory, by where they begin and end."""
        out = copy(self)
        out.starts, out.ends, out.lengths = starts, ends, ends - starts
        return out

    def parts(self) -> Iterator[slice]:
        """Slices that go through all strings, some at a time."""
        n = len(self.starts)
        return (slice(i, min(i + _PART, n)) for i in range(0, n, _PART))

    def numbers(self, which: Any) -> Numbers:
        """Numbers of the selected strings; arbitrary for those longer than SHORT bytes."""
        starts, lengths = self.starts[which], self.lengths[which]
        head = np.minimum(lengths, 8)
        first = self._eights[starts] & _MASKS[head]
        second = self._eights[starts + head] & _MASKS[np.clip(lengths - 8, 0, 8)]
        return Numbers(first, second, (first * _ODD[0] ^ second) * _ODD[1])

    def bytes(self, which: Ints) -> Iterator[bytes]:
        """The selected strings as Python bytes."""
        starts, ends = self.starts[which].tolist(), self.ends[which].tolist()
        return (self.memory[a:b] for a, b in zip(starts, ends, strict=True))


class Known:
    """A collection of at least one string, in which others are looked up.

    Two hash tables have one string in each place; a string whose place is taken in both is kept in a set, as
    are long ones.
    """

    def __init__(self, strings: Strings) -> None:
        self._numbers, self._tables = strings.numbers(slice(None)), []
        left, long = (
            np.flatnonzero(c) for c in (strings.lengths <= SHORT, strings.lengths > SHORT)
        )
        # an empty place names string 0: if that one is long, its numbers must equal no other's
        self._numbers.first[long] = 0
        for shift in _SHIFTS:  # a string whose place is taken goes to the next table
            places = _places(self._numbers.hashes[left], shift)
            table = np.zeros(_TABLE, np.int32)
            table[places] = left
            left = left[table[places] != left]
            self._tables.append(table)
        self._others = set(strings.bytes(np.concatenate([left, long])))

    def has_all(self, strings: Strings) -> bool:
        """Whether all of these strings, none of which may be empty, are in the collection."""
        return all(self._has(strings, part) for part in strings.parts())

    def _has(self, strings: Strings, part: slice) -> bool:
        left = part.start + np.flatnonzero(self._lacks(0, strings, part))
        left = left[self._lacks(1, strings, left)]
        return self._others.issuperset(strings.bytes(left))

    def _lacks(self, n: int, strings: Strings, which: Any) -> npt.NDArray[np.bool_]:
        """Which of the selected strings are not in table n, bool [selected]."""
        first, second, hashes = strings.numbers(which)
        found = self._tables[n][_places(hashes, _SHIFTS[n])]
        lacks: npt.NDArray[np.bool_] = self._numbers.first[found] != first
        lacks |= self._numbers.second[found] != second
        lacks |= strings.lengths[which] > SHORT
        return lacks


def all_differ(strings: Strings) -> bool:
    """Whether no two of the strings are equal."""
    long = np.flatnonzero(strings.lengths > SHORT)
    hashes = [strings.numbers(part).hashes for part in strings.parts()]
    short = np.sort(np.concatenate(hashes or [np.empty(0, np.uint64)])[strings.lengths <= SHORT])
    if (short[1:] == short[:-1]).any():  # equal hashes, perhaps by chance: compare the strings
        long = np.arange(len(strings.starts))
    return len(set(strings.bytes(long))) == len(long)


def _places(hashes: Words, shift: int) -> Ints:
    places: Ints = (hashes >> np.uint64(shift)).astype(np.int64) & (_TABLE - 1)
    return places
