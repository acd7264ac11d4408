"""Are all of these strings among those, and do they differ? Of half a million, without making Python strings.

Strings of up to 16 bytes, which most tokens are, are seen as two 64-bit numbers. As none holds a zero byte,
the numbers tell them apart. The others are looked up in a set.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Parts of one piece of memory, without zero bytes: where each begins, and how many bytes it has."""

    def __init__(self, joined: bytes, starts: Ints, lengths: Ints) -> None:
        self.joined, self.starts, self.lengths = joined, starts, lengths
        self._eights = np.ndarray(len(joined) + 9, "<u8", joined + bytes(SHORT), strides=(1,))

    def numbers(self, which: Any) -> Numbers:
        """Of some, all of which should be short."""
        starts, lengths = self.starts[which], self.lengths[which]
        head = np.minimum(lengths, 8)
        first = self._eights[starts] & _MASKS[head]
        second = self._eights[starts + head] & _MASKS[np.clip(lengths - 8, 0, 8)]
        return Numbers(first, second, (first * _ODD[0] ^ second) * _ODD[1])

    def bytes(self, which: Ints) -> Iterator[bytes]:
        """Some of the strings themselves."""
        starts = self.starts[which]
        ends = starts + self.lengths[which]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield self.joined[start:end]


class Known:
    """A collection, of one string or more, to look others up in."""

    def __init__(self, strings: Strings) -> None:
        self._numbers = strings.numbers(slice(None))
        self._tables = []
        left = np.flatnonzero(strings.lengths <= SHORT)
        for shift in _SHIFTS:  # one whose place another takes gets its place in the next table
            places = _places(self._numbers.hashes[left], shift)
            table = np.zeros(_TABLE, np.int32)
            table[places] = left
            left = left[table[places] != left]
            self._tables.append(table)
        others = np.concatenate([left, np.flatnonzero(strings.lengths > SHORT)])
        self._others = set(strings.bytes(others))

    def has_all(self, strings: Strings) -> bool:
        """Whether all of these are in the collection."""
        n = len(strings.starts)
        return all(self._has(strings, np.arange(i, min(i + _PART, n))) for i in range(0, n, _PART))

    def _has(self, strings: Strings, left: Ints) -> bool:
        for table, shift in zip(self._tables, _SHIFTS, strict=True):
            these = strings.numbers(left)
            found = table[_places(these.hashes, shift)]
            different = self._numbers.first[found] != these.first
            different |= self._numbers.second[found] != these.second
            left = left[different | (strings.lengths[left] > SHORT)]
        return self._others.issuperset(strings.bytes(left))


def all_differ(strings: Strings) -> bool:
    """Whether no two are equal."""
    short, long = (np.flatnonzero(c) for c in (strings.lengths <= SHORT, strings.lengths > SHORT))
    hashes = np.sort(strings.numbers(short).hashes)
    if (hashes[1:] == hashes[:-1]).any():  # perhaps by chance
        long = np.arange(len(strings.starts))
    return len(set(strings.bytes(long))) == len(long)


def _places(hashes: Words, shift: int) -> Ints:
    places: Ints = (hashes >> np.uint64(shift)).astype(np.int64) & (_TABLE - 1)
    return places
