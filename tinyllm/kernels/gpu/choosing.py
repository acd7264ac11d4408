"""The largest logits of each row, found on the device: few numbers cross to the host instead of all."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .. import choose
from ..choose import Best
from .arrays import GPUArray, i32
from .sources import CHOOSE

if TYPE_CHECKING:
    from .backend import GPUBackend

PICKS = (1, 64, 256)
COLUMNS = 4096  # the value in src/choose.c
ROOM = {1: 4, 64: 128}  # ids that may be found: also equals of the k-th and ids that share a column
MOST_ROOM = 512


def pick(be: GPUBackend, logits: GPUArray, k: int) -> tuple[GPUArray, GPUArray]:
    """Launch the search for the k largest: the logits, and what ``read`` reads, int32 [2 + 2 * room, rows]."""
    rows, n = logits.shape
    maxima, bounds = be.empty((rows, COLUMNS), np.uint32), be.empty((rows,), np.uint32)
    room = ROOM.get(k, MOST_ROOM)
    found = be.empty((2 + 2 * room, rows), np.int32)
    columns, width = (COLUMNS // 256, rows, 1), (256, 1, 1)
    be.launch(CHOOSE, "column_maxima", columns, width, logits, maxima, i32(n))
    bound = maxima, bounds, found, i32(k), i32(rows)
    be.launch(CHOOSE, "kth_maximum", (rows, 1, 1), width, *bound)
    values = logits, bounds, found, i32(n), i32(room), i32(rows)
    be.launch(CHOOSE, "collect", (-(-n // 256), rows, 1), width, *values)
    return logits, found


def read(be: GPUBackend, logits: GPUArray, table: np.ndarray) -> list[Best]:
    """The ids and values that ``pick`` found, row by row; none where equals were more than there is room."""
    room = len(table) // 2 - 1
    counts, broken = table[:2].tolist()
    end = 2 + 2 * min(max(counts), room)
    ids, values = choose.in_order(table[2:end:2].T, table[3:end:2].T, counts)
    there = [n if n <= room else 0 for n in counts]
    return [
        Best(not bad, ids[i, :n], values[i, :n], partial(_row, be, logits, i))
        for i, (n, bad) in enumerate(zip(there, broken, strict=True))
    ]


def _row(be: GPUBackend, x: GPUArray, i: int) -> np.ndarray:
    n = 4 * x.shape[-1]
    return be.get(x.buffer, n * i, n).view(np.float32)


def top_k(be: GPUBackend, logits: GPUArray | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest, found where the logits are."""
    if isinstance(logits, GPUArray) and k <= PICKS[-1]:
        best = be.picked(pick(be, logits.reshape(1, logits.size), k))[0]
        if best.finite and len(best.ids):
            return best.ids[:k], best.values[:k]
    host = be.numpy(logits)  # choosing costs less than bringing them to the device
    return choose.top_k(host.astype(np.float32, copy=False).reshape(-1), k)
