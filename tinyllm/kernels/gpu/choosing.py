"""The largest logits of each row, found on the device: few numbers cross to the host instead of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .. import choose
from ..choose import Best
from . import sources
from .arrays import GPUArray
from .device import Device, i32

CHOOSE = sources.plain("choose.c")
COLUMNS = 4096  # as in src/choose.c
ROOM = {1: 4, 64: 128}  # for equals of the k-th; of several, also for those that share a column
MOST_ROOM = 512


class Picking(Device):
    """``pick`` and ``top_k``."""

    picks = (1, 64, 256)

    def pick(self, logits: GPUArray, k: int) -> tuple[GPUArray, GPUArray]:
        rows, n = logits.shape
        maxima, bounds = self.empty((rows, COLUMNS), np.uint32), self.empty((rows,), np.uint32)
        room = ROOM.get(k, MOST_ROOM)
        found = self.empty((2 + 2 * room, rows), np.int32)
        columns, width = (COLUMNS // 256, rows, 1), (256, 1, 1)
        self.launch(CHOOSE, "column_maxima", columns, width, logits, maxima, i32(n))
        bound = maxima, bounds, found, i32(k), i32(rows)
        self.launch(CHOOSE, "kth_maximum", (rows, 1, 1), width, *bound)
        values = logits, bounds, found, i32(n), i32(room), i32(rows)
        self.launch(CHOOSE, "collect", (-(-n // 256), rows, 1), width, *values)
        return logits, found

    def picked(self, result: tuple[GPUArray, GPUArray]) -> list[Best]:
        return self._read(result[0], self.numpy(result[1]))

    def picked_later(self, result: tuple[GPUArray, GPUArray]) -> Callable[[], list[Best]]:
        logits, found = result
        fetched = self.fetch(found.buffer, found.nbytes)
        return lambda: self._read(logits, fetched().view(np.int32).reshape(found.shape))

    def _read(self, logits: GPUArray, table: np.ndarray) -> list[Best]:
        """What collect found: table [2 + 2 * room, rows]."""
        room = len(table) // 2 - 1
        counts, broken = table[:2].tolist()
        end = 2 + 2 * min(max(counts), room)
        ids, values = choose.in_order(table[2:end:2].T, table[3:end:2].T, counts)
        there = [n if n <= room else 0 for n in counts]
        return [
            Best(not bad, ids[i, :n], values[i, :n], partial(self._row, logits, i))
            for i, (n, bad) in enumerate(zip(there, broken, strict=True))
        ]

    def _row(self, x: GPUArray, i: int) -> np.ndarray:
        n = 4 * x.shape[-1]
        return self.get(x.buffer, n * i, n).view(np.float32)

    def top_k(self, logits: GPUArray | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(logits, GPUArray) and k <= self.picks[-1]:
            best = self.picked(self.pick(logits.reshape(1, logits.size), k))[0]
            if best.finite and len(best.ids):
                return best.ids[:k], best.values[:k]
        host = self.numpy(logits)  # choosing costs less than bringing them to the device
        return choose.top_k(host.astype(np.float32, copy=False).reshape(-1), k)
