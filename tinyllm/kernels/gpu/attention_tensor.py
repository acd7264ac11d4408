"""Attention on tensor cores: which shape of group, and how many parts of the past."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import batch as batches
from . import sources
from .arrays import GPUArray
from .batch import DeviceBatch
from .device import COUNTERS, i32, u64
from .kvcache import KV_CODE, PAGE, Side, Store
from .matmul import MATVEC_ROWS, Matrices
from .sources import Program

LOCAL_BYTES = 46 << 10  # of a group's tiles; 48 KB are there
MOST_DIM = 256
WHOLE_DIM = {"f16": 192, "q8_0": 96}  # wider values leave registers for scores of half a page

# What an H200 is expected to take, in microseconds, from its latencies and rates: only their ratios decide.
BEGIN = 0.8  # until a group's first keys are there
TILE = 1.4  # from tile to tile, were memory and products infinitely fast
JOIN, PART = 0.8, 0.025  # to be the last group, and for each part that it reads
CORE_BYTES = 32_000  # of memory, a core, a microsecond
CORE_PRODUCTS = 750_000  # of two terms each, a core, a microsecond
MOST_SPLITS = 64


@dataclass(frozen=True)
class GroupShape:
    """How the warps of a group share its work: ``rows`` times 16 pairs, ``keys`` parts of each tile."""

    rows: int
    keys: int
    tile: int  # keys

    @property
    def pairs(self) -> int:
        return 16 * self.rows

    @property
    def threads(self) -> int:
        return 32 * self.rows * self.keys


def group_shape(pairs: int, k: Side, v: Side, even: bool = True) -> GroupShape:
    """The shape for sequences with up to so many (row, head) pairs a key head.

    Large groups read keys less often, small ones are dealt out better where they take very uneven times.
    """
    whole = PAGE * (_stride(k) + _stride(v)) <= LOCAL_BYTES
    if pairs > 16:
        narrow = v.dim <= WHOLE_DIM[k.kv_type]
        few_registers = k.kv_type == "q8_0" and v.dim > 192
        rows = 8 if pairs > 64 and even and not few_registers else 4
        return GroupShape(rows, 1, PAGE if whole and narrow else PAGE // 2)
    shared = PAGE * (_stride(k) + _stride(v)) + 64 * (k.dim + 8)  # with the queries
    whole = shared <= LOCAL_BYTES and 4 * 64 * (v.dim + 8) <= LOCAL_BYTES  # where warps meet
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


class TensorAttention(Matrices):
    """The part of a GPU backend that multiplies queries, keys and values on tensor cores."""

    tensor_cores = False  # whether src/tensor.h is for this device

    def suits_tensor_cores(self, k: Side, v: Side) -> bool:
        """Whether ``tensor_attention`` takes these."""
        fits = all(side.dim % 16 == 0 and side.dim <= MOST_DIM for side in (k, v))
        return self.tensor_cores and k.kv_type != "f32" and fits

    def tensor_attention(
        self,
        b: DeviceBatch,
        store: Store,
        q: GPUArray,
        k: Side,
        v: Side,
        n_head: int,
        slopes: GPUArray | None,
        sinks: GPUArray | None,
        how: tuple[object, ...],
    ) -> GPUArray:
        """One launch over tiles of rows, and over parts of the past that the last group joins."""
        per_key, lengths = n_head // k.n_head, np.diff(b.host.starts)
        # in one round of large groups at a short past, the first would be idle while the last work
        even = b.n_rows * n_head > 256 * self.n_cores or (b.host.n_past > 2 * lengths).any()
        shape = group_shape(int(lengths.max()) * per_key, k, v, bool(even))
        heads = min(per_key, shape.pairs)
        tiles, n_tiles = None, b.n_seq
        if (lengths != 1).any():
            tiles, n_tiles = batches.row_tiles(self, b, shape.pairs // heads)  # type: ignore[arg-type]
        chunks = -(-per_key // heads)
        n_columns = k.n_head * chunks
        n_groups = n_columns * n_tiles
        row = _row_bytes(k) + _row_bytes(v), k.dim + v.dim
        splits = choose_splits(n_groups, b.n_pages, shape, *row, self.n_cores)
        splits = splits if n_groups <= COUNTERS else 1
        out = self.empty((b.n_rows, n_head * v.dim))
        parts = self.empty((b.n_rows, n_head, splits, v.dim + 4)) if splits > 1 else None
        joined = (shape.keys > 1 or splits > 1) and v.dim % 32 == 0 and b.n_rows <= MATVEC_ROWS
        if joined and self.wants_int8(out):
            out.int8 = self.new_int8(out.size)
        places = u64(store.pages.nbytes), u64(k.offset), u64(v.offset), i32(b.n_pages)
        results = out, *(out.int8 or (None, None, None)), parts, self.counters()
        sizes = (i32(x) for x in (n_tiles, k.n_head, per_key, chunks, heads, splits))
        self.launch(
            program(k, v, shape),
            "attention_tensor",
            (n_columns, n_tiles, splits),
            (shape.threads, 1, 1),
            *(q, store.pages.buffer, b.pages, *places, *results),
            *(slopes, sinks, tiles, b.starts, b.n_past, *sizes, *how),
        )
        return out


def program(k: Side, v: Side, shape: GroupShape) -> Program:
    """The program for these heads and this shape of group."""
    warps = shape.rows, shape.keys, shape.tile
    return sources.attention_tensor(KV_CODE[k.kv_type], k.dim, v.dim, *warps)
