"""Rows as a file has them -> tiles of 16 rows (see ``formats``): the kernel, the memory and the threads.

Each thread reads some rows into a buffer that stays in its cache and writes their tiles from there: the main
memory sees every byte twice, once read and once written.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, cast

import numpy as np

from ... import system
from . import jit
from .emit import I16, I32, I64, V
from .program import ALIGN, huge
from .simd import (
    clear,
    emitter,
    get_i8,
    get_i16,
    get_i32,
    get_i64,
    i64,
    set_i8,
    set_i16,
    set_i32,
    types,
)

ROWS = 16  # rows of a tile
RUN = 16  # bytes of neighbouring fields that are moved together
CHUNK = 64 << 20  # bytes of memory taken from the system at a time


# ---- the kernel


def emit_move(e, to, source, row_bytes, word):
    """16 bytes of each of 16 rows, as words of a type, those of one place side by side."""
    n = RUN * 8 // word.width
    for first in range(0, ROWS, n):
        rows = [
            e.load(e.ptr(e.b.add(source, e.b.mul(row_bytes, I64(first + r)))), V(word, n))
            for r in range(n)
        ]
        for i, v in enumerate(transposed(e, rows)):
            e.store(v, e.ptr(to), (ROWS * i + first) * word.width // 8)


def transposed(e, rows: list[Any]) -> list[Any]:
    """n vectors of n lanes: lane i of vector j becomes lane j of vector i.

    Each round deals two halves of the vectors into one another, as one shuffles cards; log2(n) rounds turn
    the numbers of vector and lane round.
    """
    n = len(rows)
    for _ in range(n.bit_length() - 1):
        dealt = [(x, y) for x, y in zip(rows[: n // 2], rows[n // 2 :], strict=True)]
        rows = [zipped(e, *pair, half) for pair in dealt for half in (0, 1)]
    return rows


def zipped(e, x, y, half: int):
    """The lanes of the lower or upper half of x and y, in turn."""
    n = x.type.count
    lanes = [i + n * odd for i in range(half * n // 2, (half + 1) * n // 2) for odd in (0, 1)]
    return e.b.shuffle_vector(x, y, V(I32, n)(lanes))


@emitter(types.void, i64, i64, i64)
def move_words(e, to, source, row_bytes):
    """16 bytes of each of 16 rows, as 4 words: the first word of all rows, then the second, ..."""
    emit_move(e, to, source, row_bytes, I32)


@emitter(types.void, i64, i64, i64)
def move_shorts(e, to, source, row_bytes):
    """16 bytes of each of 16 rows, as 8 shorts: the first short of all rows, then the second, ..."""
    emit_move(e, to, source, row_bytes, I16)


def emit_word(e, to, source, row_bytes, word):
    """One word of each of 16 rows."""
    for r in range(ROWS):
        v = e.load(e.ptr(e.b.add(source, e.b.mul(row_bytes, I64(r)))), word)
        e.store(v, e.ptr(to), r * word.width // 8)


@emitter(types.void, i64, i64, i64)
def move_word(e, to, source, row_bytes):
    """4 bytes of each of 16 rows."""
    emit_word(e, to, source, row_bytes, I32)


@emitter(types.void, i64, i64, i64)
def move_short(e, to, source, row_bytes):
    """2 bytes of each of 16 rows."""
    emit_word(e, to, source, row_bytes, I16)


def move_some(to, source, row_bytes, rows, size, word):
    """Words of any size of so many rows, and zeros for those that 16 rows lack."""
    for at in range(0, size, word):
        p, q = source + at, to + 16 * at
        if word == 4:
            for r in range(rows):
                set_i32(q + 4 * r, get_i32(p + r * row_bytes))
        elif word == 2:
            for r in range(rows):
                set_i16(q + 2 * r, get_i16(p + r * row_bytes))
        else:
            for r in range(rows):
                set_i8(q + r, get_i8(p + r * row_bytes))
        clear(q + rows * word, (16 - rows) * word)


def interleave(
    source, out, row_bytes, n_rows, n_blocks, block_bytes, fields, n_fields, first, last, worker
):
    """Rows of blocks -> tiles, field by field; a piece is a tile. Missing rows become zeros."""
    for tile in range(first, last):
        to = out + tile * 16 * n_blocks * block_bytes
        rows = min(16, n_rows - 16 * tile)
        for block in range(n_blocks):
            base = source + 16 * tile * row_bytes + block * block_bytes
            for f in range(n_fields):
                field = fields + 24 * f
                p, size, word = base + get_i64(field), get_i64(field + 8), get_i64(field + 16)
                if rows == 16 and size == 16 and word == 4:
                    move_words(to, p, row_bytes)
                elif rows == 16 and size == 16 and word == 2:
                    move_shorts(to, p, row_bytes)
                elif rows == 16 and size == 4:
                    move_word(to, p, row_bytes)
                elif rows == 16 and size == 2:
                    move_short(to, p, row_bytes)
                else:
                    move_some(to, p, row_bytes, rows, size, word)
                to += 16 * size


def runs(fields: Sequence[tuple[int, int]]) -> np.ndarray:
    """Fields (byte in the block, size), in the order of a tile -> [n, 3] int64: byte, size, size of its words.

    Neighbours that make 16 bytes together are one.
    """
    out, i = [], 0
    while i < len(fields):
        start, word = fields[i]
        n = RUN // word
        whole = tuple(fields[i : i + n]) == tuple((start + word * j, word) for j in range(n))
        out.append((start, RUN if whole else word, word))
        i += n if whole else 1
    return np.array(out, np.int64)


def interleave_rows(raw: np.ndarray, to: int, n_blocks: int, fields: np.ndarray) -> None:
    """Write the tiles of raw, uint8 [n, row_bytes], to an address; n_blocks and fields (``runs``) of a row."""
    n, row_bytes = raw.shape
    jit.kernel(interleave)(
        0,
        -(-n // ROWS),
        source=raw.ctypes.data,
        out=to,
        row_bytes=row_bytes,
        n_rows=n,
        n_blocks=n_blocks,
        block_bytes=row_bytes // n_blocks,
        fields=fields.ctypes.data,
        n_fields=len(fields),
    )


# ---- memory


class Room(threading.local):
    """Memory for weights, on large pages: a 4 KB page costs a fault to fill and a walk to find.

    Matrices lie side by side in chunks, each of which lives as long as anything in it.
    """

    chunk: Callable[[], np.ndarray | None] = staticmethod(lambda: None)
    used = 0

    def take(self, n_bytes: int) -> np.ndarray:
        """Uninitialised bytes that begin on a cache line; a vector behind them may be read."""
        chunk = self.chunk()
        if chunk is None or self.used + n_bytes + ALIGN > chunk.nbytes:
            first = huge(max(n_bytes, CHUNK))
            chunk = cast("np.ndarray", first.base)
            self.chunk, self.used = weakref.ref(chunk), first.ctypes.data - chunk.ctypes.data
        start = self.used
        self.used += -(-n_bytes // ALIGN) * ALIGN
        return chunk[start : start + n_bytes]


room = Room()


# ---- threads


class Helpers:
    """Threads that wait for something to do beside their caller; to start one takes as long as a matrix."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def begin(self, job: Callable[[], None], n: int) -> None:
        """Let n threads call it."""
        with self._lock:
            while self._started < n:
                threading.Thread(target=self._serve, name="tinyllm-load", daemon=True).start()
                self._started += 1  # now: nobody may wait for one that could not be started
        for _ in range(n):
            self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get()()


helpers = Helpers()


def _forget() -> None:
    """In a forked child there are no threads."""
    global helpers
    helpers = Helpers()


system.after_fork(_forget)


def share(pieces: Iterable[Any], work: Callable[[Any], None], n_threads: int) -> None:
    """Work on all pieces, on up to n_threads threads; the first error ends it, and is raised."""
    left, errors, over = deque(pieces), deque[BaseException](), SimpleQueue[None]()

    def run() -> None:
        try:
            while left:
                with suppress(IndexError):  # another thread was faster
                    work(left.popleft())
        except BaseException as e:
            left.clear()
            errors.append(e)

    def help_out() -> None:
        run()
        over.put(None)

    n_helpers = min(n_threads, len(left)) - 1
    try:
        helpers.begin(help_out, n_helpers)
        run()
        for _ in range(n_helpers):
            over.get()
    finally:
        left.clear()
    if errors:
        raise errors[0]
