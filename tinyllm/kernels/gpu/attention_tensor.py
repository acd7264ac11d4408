"""Attention on tensor cores, by ``attention_tensor.c``: the shape of a group, and the parts of the past."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import batch as batches
from . import sources
from .arrays import GPUArray, i32, u64
from .attention import Query
from .batch import DeviceBatch
from .kvcache import KV_CODE, PAGE, Side, Store
from .operands import new_int8, wants_int8
from .sources import Program

if TYPE_CHECKING:
    from .backend import GPUBackend

LOCAL_BYTES = 46 << 10  # for a group's tiles; multiprocessors have 48 KB for a group
MOST_DIM = 256
WHOLE_DIM = {
    "f16": 192,
    "q8_0": 96,
}  # with wider values registers hold the scores of half a page only

INT8_ROWS = 16  # with more, the products that follow read halves

# The times of an H200 in microseconds, reckoned from its latencies and rates: only their ratios decide.
BEGIN = 0.8  # until a group's first keys have arrived
TILE = 1.4  # the least from one tile to the next: latencies
JOIN, PART = 0.8, 0.025  # for the last group to join the parts, and more for each part
CORE_BYTES = 32_000  # bytes of memory that a core reads in a microsecond
CORE_PRODUCTS = 750_000  # products, of two terms each, that a core makes in a microsecond
MOST_SPLITS = 64


def takes(query: Query) -> bool:
    """Whether the kernels read what is stored like this; they know no bias for each distance."""
    fits = all(side.dim % 16 == 0 and side.dim <= MOST_DIM for side in (query.k, query.v))
    return fits and query.k.kv_type != "f32" and query.bias is None


@dataclass(frozen=True)
class GroupShape:
    """How the warps of a group share its work: ``rows`` times 16 pairs, ``keys`` parts of each tile."""

    rows: int
    keys: int
    tile: int  # keys that are read at a time

    @property
    def pairs(self) -> int:
        return 16 * self.rows

    @property
    def threads(self) -> int:
        return 32 * self.rows * self.keys


def group_shape(pairs: int, k: Side, v: Side, even: bool = True) -> GroupShape:
    """The shape of groups for sequences with up to ``pairs`` (row, head) pairs a key head.

    Large groups read keys less often, small ones are dealt out better where they take very uneven times.
    """
    whole = PAGE * (_stride(k) + _stride(v)) <= LOCAL_BYTES
    if pairs > 16:
        narrow = v.dim <= WHOLE_DIM[k.kv_type]
        few_registers = k.kv_type == "q8_0" and v.dim > 192
        rows = 8 if pairs > 64 and even and not few_registers else 4
        return GroupShape(rows, 1, PAGE if whole and narrow else PAGE // 2)
    shared = PAGE * (_stride(k) + _stride(v)) + 64 * (
        k.dim + 8
    )  # tiles of keys and values, and the queries
    whole = (
        shared <= LOCAL_BYTES and 4 * 64 * (v.dim + 8) <= LOCAL_BYTES
    )  # warps join their results in as much
    return GroupShape(1, 4, PAGE) if whole else GroupShape(1, 2, PAGE // 2)


def _row_bytes(side: Side) -> int:
    return side.width * (1 if side.kv_type == "q8_0" else 2)


def _stride(side: Side) -> int:
    """Bytes of a row in local memory: an odd number of 16, for which rows lie in different banks."""
    return (_row_bytes(side) // 16 | 1) * 16


@lru_cache(1024)
def choose_splits(
    n_groups: int, n_pages: int, shape: GroupShape, row_bytes: int, dims: int, n_cores: int
) -> int:
    """Parts of the past for which a launch is expected to take the least time.

    All groups run at once, some on one core, each over its tiles one by one: a tile takes TILE at least, and
    no less than its share of the core's memory bandwidth and products. Then the parts have to be joined.
    The past fills more than half of ``n_pages``, which is a power of two. ``row_bytes`` and ``dims`` are of a
    key and a value together.
    """
    pages = [max(1, n_pages * i // 16) for i in (9, 11, 13, 15)]
    n_tiles = [-(-n * PAGE // shape.tile) for n in pages]
    resident = 3 if shape.keys == 4 else max(1, 256 // shape.threads)
    products = shape.pairs * shape.tile * dims / CORE_PRODUCTS
    work = max(shape.tile * row_bytes / CORE_BYTES, products)

    def time(splits: int) -> float:
        at_once = -(-n_groups * splits // n_cores)
        tiles = sum(-(-n // splits) for n in n_tiles) / len(n_tiles)
        join = JOIN + splits * PART if splits > 1 else 0.0
        return BEGIN + tiles * max(TILE, at_once * work) + join

    most = min(n_tiles[-1], MOST_SPLITS, resident * n_cores // n_groups)
    return min(range(1, most + 1), key=time, default=1)


class TensorAttention:
    """Attention over pages of halves or of q8_0, on CUDA devices with tensor cores."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be

    def attend(self, b: DeviceBatch, query: Query, store: Store) -> GPUArray:
        """Causal attention over the stored past -> [T, n_head * v.dim].

        One launch over tiles of rows, and over parts of the past that the last group joins.
        """
        be, k, v, n_head = self.be, query.k, query.v, query.n_head
        per_key, lengths = n_head // k.n_head, np.diff(b.host.starts)
        # in one round of large groups at a short past, the first would be idle while the last work
        even = b.n_rows * n_head > 256 * be.n_cores or (b.host.n_past > 2 * lengths).any()
        shape = group_shape(int(lengths.max()) * per_key, k, v, bool(even))
        heads = min(per_key, shape.pairs)
        tiles, n_tiles = None, b.n_seq
        if (lengths != 1).any():
            tiles, n_tiles = batches.row_tiles(be, b, shape.pairs // heads)
        chunks = -(-per_key // heads)
        n_columns = k.n_head * chunks
        splits = self._splits(n_columns * n_tiles, b.n_pages, shape, k, v)
        out = be.empty((b.n_rows, n_head * v.dim))
        parts = be.empty((b.n_rows, n_head, splits, v.dim + 4)) if splits > 1 else None
        joined = (shape.keys > 1 or splits > 1) and v.dim % 32 == 0 and b.n_rows <= INT8_ROWS
        if joined and wants_int8(be, out):
            out.int8 = new_int8(be, out.size)
        shelf = store.pages[k.group]
        places = u64(shelf.nbytes), u64(k.offset), u64(v.offset), i32(b.n_pages)
        results = out, *(out.int8 or (None, None, None)), parts, be.counters()
        sizes = (i32(x) for x in (n_tiles, k.n_head, per_key, chunks, heads, splits))
        be.launch(
            program(k, v, shape),
            "attention_tensor",
            (n_columns, n_tiles, splits),
            (shape.threads, 1, 1),
            *(query.q, shelf.buffer, b.pages[k.group], *places, *results),
            *(query.slopes, query.sinks, tiles, b.starts, b.n_past, *sizes, *query.numbers),
        )
        return out

    def _splits(self, n_groups: int, n_pages: int, shape: GroupShape, k: Side, v: Side) -> int:
        """Parts of the past; one where there are more groups than counters."""
        if n_groups > self.be.n_counters:
            return 1
        row = _row_bytes(k) + _row_bytes(v), k.dim + v.dim
        return choose_splits(n_groups, n_pages, shape, *row, self.be.n_cores)


def program(k: Side, v: Side, shape: GroupShape) -> Program:
    """The program for heads of these sizes and a shape of group."""
    warps = shape.rows, shape.keys, shape.tile
    return sources.attention_tensor(KV_CODE[k.kv_type], k.dim, v.dim, *warps)
