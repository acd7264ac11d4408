"""What of a recorded step follows from the sequences' lengths and pasts, and is counted anew at each replay."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .attention import BLOCK, LAYER, padded
from .program import CPUArray, Tape, wrapped

Of = Literal["tile", "block", "merge"]


class Pieces:
    """How many pieces instructions of attention have whose heads and tiles are alike.

    A tile is ``rows`` of a sequence's, the ``group`` query heads of a key head for each token. A piece is a
    tile and key head, or a block of the past of these, or, to merge blocks, a tile and key head of several.
    """

    def __init__(
        self,
        group: int,
        rows: int,
        n_head_kv: int,
        of: Of,
        lengths: Sequence[int],
        blocks: Sequence[int],
    ) -> None:
        self._sizes, self._of = (group, rows, n_head_kv), of
        self.rows: list[int] = []  # where they stand on the tape
        self.n = self._count(lengths, blocks)
        # parts of blocks wait in memory; a step is recorded again only when its past has doubled
        doubled = self.n + self._count(lengths, blocks, fewest=7)
        self.room = doubled if of == "block" else sys.maxsize

    def _count(self, lengths: Sequence[int], blocks: Sequence[int], fewest: int = 1) -> int:
        group, rows, n_head_kv = self._sizes
        tiles = [-(-n * group // rows) for n in lengths]
        if self._of == "block":
            tiles = [n * max(b, fewest) for n, b in zip(tiles, blocks, strict=True)]
        elif self._of == "merge":
            tiles = [n for n, b in zip(tiles, blocks, strict=True) if b > 1]
        return n_head_kv * sum(tiles)

    def fit(self, tape: Tape, lengths: Sequence[int], blocks: Sequence[int]) -> bool:
        """Have the instructions do the pieces of other sequences; False if there is no room for their parts."""
        n = self._count(lengths, blocks)
        if n > self.room:
            return False
        if n != self.n:
            tape.set_pieces(self.rows, n)
            self.n = n
        return True


class Stored:
    """An encoder's keys and values, laid out as in caches, for one layer after the other.

    They lie in two ``places`` of ``rows_of_heads`` rows, which are the tape's; the tables here say where.
    """

    def __init__(self, places: Sequence[CPUArray], n_rows: int, n_seq: int, n_head_kv: int) -> None:
        self._places = [(place.address, 4 * place.shape[1]) for place in places]
        self._n_head_kv = n_head_kv
        self._tables = np.zeros((n_seq, LAYER // 8), np.int64)
        # [2, n_seq, blocks]: where the blocks of a sequence's first head begin
        self._blocks = np.zeros((2, n_seq, -(-longest(n_rows, n_seq) // BLOCK)), np.int64)
        first, (per_side, per_seq, _) = self._blocks.ctypes.data, self._blocks.strides
        for side in range(2):
            self._tables[:, side] = first + side * per_side + per_seq * np.arange(n_seq)
        tables = self._tables.ctypes.data + LAYER * np.arange(n_seq, dtype=np.int64)
        self.caches: CPUArray = wrapped(tables)

    def keep(self, tape: Tape) -> None:
        """Have a tape keep the tables, which its instructions reach by address."""
        tape.keep(self._tables, self._blocks)

    def fit(self, tape: Tape, lengths: Sequence[int], blocks: Sequence[int]) -> bool:
        """Divide the places among sequences of other lengths, as many rows in all."""
        rows = padded(np.array(lengths, np.int64))
        first = self._n_head_kv * (rows.cumsum() - rows)  # behind all heads of the sequences before
        steps = BLOCK * np.arange(self._blocks.shape[2])  # a head's blocks lie one behind the other
        for side, (address, row_bytes) in enumerate(self._places):
            self._blocks[side] = address + row_bytes * (first[:, None] + steps)
            self._tables[:, side + 2] = row_bytes * rows
        return True


def rows_of_heads(n_rows: int, n_seq: int, n_head_kv: int) -> int:
    """Rows of a place for the keys of any n_seq sequences of n_rows in all, each head in whole tiles."""
    return n_head_kv * (padded(1) * (n_seq - 1) + int(padded(longest(n_rows, n_seq))))


def longest(n_rows: int, n_seq: int) -> int:
    """How long the longest of n_seq sequences is at most, of n_rows in all."""
    return n_rows - n_seq + 1
