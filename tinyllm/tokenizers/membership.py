"""Are all of these strings among those, and do they differ? Of half a million, without making Python strings.

Strings of up to 16 bytes, which most tokens are, are seen as two 64-bit numbers. As none holds a zero byte,
the numbers tell them apart. The others are looked up in a set.
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
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # of the first n bytes
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_TABLE = 1 << 20  # places
_SHIFTS = (44, 24)  # what of a hash is the place in the first table, and in the second
_PART = 1 << 13  # strings looked at together: what is computed of them stays in the cache


class Numbers(NamedTuple):
    """What strings of up to 16 bytes are as numbers: their first 8 bytes, the others, and a hash of both."""

    first: Words
    second: Words
    hashes: Words


class Strings:
    """Parts of one piece of memory, without zero bytes: where each begins and ends."""

    def __init__(self, memory: bytes, starts: Ints, ends: Ints) -> None:
        self.memory, self.starts, self.ends = memory, starts, ends
        self.lengths = ends - starts
        self._eights = np.ndarray(len(memory) + 9, "<u8", memory + bytes(SHORT), strides=(1,))

    def others(self, starts: Ints, ends: Ints) -> Strings:
        """Other parts of the same memory."""
        out = copy(self)
        out.starts, out.ends, out.lengths = starts, ends, ends - starts
        return out

    def parts(self) -> Iterator[slice]:
        """All, some at a time."""
        n = len(self.starts)
        return (slice(i, min(i + _PART, n)) for i in range(0, n, _PART))

    def numbers(self, which: Any) -> Numbers:
        """Of some; of those that are not short, any."""
        starts, lengths = self.starts[which], self.lengths[which]
        head = np.minimum(lengths, 8)
        first = self._eights[starts] & _MASKS[head]
        second = self._eights[starts + head] & _MASKS[np.clip(lengths - 8, 0, 8)]
        return Numbers(first, second, (first * _ODD[0] ^ second) * _ODD[1])

    def bytes(self, which: Ints) -> Iterator[bytes]:
        """Some of the strings themselves."""
        starts, ends = self.starts[which].tolist(), self.ends[which].tolist()
        return (self.memory[a:b] for a, b in zip(starts, ends, strict=True))


class Known:
    """A collection, of one string or more, to look others up in."""

    def __init__(self, strings: Strings) -> None:
        self._numbers, self._tables = strings.numbers(slice(None)), []
        left, long = (
            np.flatnonzero(c) for c in (strings.lengths <= SHORT, strings.lengths > SHORT)
        )
        self._numbers.first[long] = 0  # an empty place of a table says string 0, which may be long
        for shift in _SHIFTS:  # one whose place another takes gets its place in the next table
            places = _places(self._numbers.hashes[left], shift)
            table = np.zeros(_TABLE, np.int32)
            table[places] = left
            left = left[table[places] != left]
            self._tables.append(table)
        self._others = set(strings.bytes(np.concatenate([left, long])))

    def has_all(self, strings: Strings) -> bool:
        """Whether all of these, none of them empty, are in the collection."""
        return all(self._has(strings, part) for part in strings.parts())

    def _has(self, strings: Strings, part: slice) -> bool:
        left = part.start + np.flatnonzero(self._lacks(0, strings, part))
        left = left[self._lacks(1, strings, left)]
        return self._others.issuperset(strings.bytes(left))

    def _lacks(self, n: int, strings: Strings, which: Any) -> npt.NDArray[np.bool_]:
        """Those of some strings that are not in table n."""
        first, second, hashes = strings.numbers(which)
        found = self._tables[n][_places(hashes, _SHIFTS[n])]
        lacks: npt.NDArray[np.bool_] = self._numbers.first[found] != first
        lacks |= self._numbers.second[found] != second
        lacks |= strings.lengths[which] > SHORT
        return lacks


def all_differ(strings: Strings) -> bool:
    """Whether no two are equal."""
    long = np.flatnonzero(strings.lengths > SHORT)
    hashes = [strings.numbers(part).hashes for part in strings.parts()]
    short = np.sort(np.concatenate(hashes or [np.empty(0, np.uint64)])[strings.lengths <= SHORT])
    if (short[1:] == short[:-1]).any():  # perhaps by chance
        long = np.arange(len(strings.starts))
    return len(set(strings.bytes(long))) == len(long)


def _places(hashes: Words, shift: int) -> Ints:
    places: Ints = (hashes >> np.uint64(shift)).astype(np.int64) & (_TABLE - 1)
    return places
