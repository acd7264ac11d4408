"""Attention in floats, by ``attention.c``: any size of heads, any type of cache, any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import batch as batches
from . import sources
from .arrays import GPUArray, f32, i32, u64
from .batch import DeviceBatch
from .kvcache import KV_CODE, Side, Store

if TYPE_CHECKING:
    from .backend import GPUBackend

THREADS = 128  # the value in src/attention.c
TILE_QUERIES = 16  # queries that a group looks after, when there are many rows
DECODE_QUERIES = 8  # the value in src/attention.c when each sequence has one row
WIDE_HEAD = 256  # from here on half as many queries fit into local memory


@dataclass(frozen=True)
class Query:
    """One layer's queries [T, n_head * k.dim], how its keys and values lie, and how scores become weights."""

    q: GPUArray
    n_head: int
    k: Side
    v: Side
    scale: float
    window: int = 0
    softcap: float = 0.0
    slopes: GPUArray | None = None
    sinks: GPUArray | None = None
    bias: GPUArray | None = None

    @property
    def numbers(self) -> tuple[object, ...]:
        """The last arguments of both kernels."""
        return f32(self.scale), i32(self.window), f32(self.softcap)

    @property
    def n_bias(self) -> int:
        """How many distances have a bias."""
        return 0 if self.bias is None else self.bias.shape[1]


class PlainAttention:
    """Attention of float32 queries, over pages or over the rows of the batch itself."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be

    def attend(self, b: DeviceBatch, query: Query, store: Store) -> GPUArray:
        """Causal attention over the stored past -> [T, n_head * v.dim]."""
        group = query.k.group
        shelf, pages = store.pages[group], b.pages[group]
        places = u64(shelf.nbytes), u64(query.k.offset), u64(query.v.offset), i32(b.n_pages)
        return self._launch(b, query, (shelf.buffer, pages, *places), b.n_pages)

    def attend_rows(self, b: DeviceBatch, query: Query, k: GPUArray, v: GPUArray) -> GPUArray:
        """Attention within each sequence's rows, in both directions -> [T, n_head * v.dim]."""
        return self._launch(b, query, (k, v), 0)

    def _launch(
        self, b: DeviceBatch, query: Query, past: tuple[object, ...], n_pages: int
    ) -> GPUArray:
        """One launch over tiles of rows; if few, over parts of the past too, which a second launch joins."""
        be, k, v, n_head = self.be, query.k, query.v, query.n_head
        per_key = n_head // k.n_head
        queries = self._queries(b.n_rows == b.n_seq, per_key, max(k.dim, v.dim))
        heads = min(per_key, queries)
        tiles, n_tiles = batches.row_tiles(be, b, queries // heads)
        n_groups = k.n_head * -(-per_key // heads) * n_tiles
        splits = self._splits(n_groups, n_pages)
        out = be.empty((b.n_rows, n_head * v.dim))
        parts = out if splits == 1 else be.empty((b.n_rows, n_head, splits, v.dim))
        stats = None if splits == 1 else be.empty((b.n_rows, n_head, splits, 2))
        program = sources.attention(KV_CODE[k.kv_type], k.dim, v.dim, queries, dense=not n_pages)
        be.launch(
            program,
            "attention",
            (n_groups // n_tiles, n_tiles, splits),
            (THREADS, 1, 1),
            *(query.q, *past, parts, stats, query.slopes, query.sinks, query.bias, tiles),
            *(
                b.starts,
                b.n_past,
                *(i32(x) for x in (query.n_bias, n_head, k.n_head, heads, splits)),
            ),
            *query.numbers,
        )
        if splits > 1:
            groups = (b.n_rows * n_head, 1, 1)
            merge = parts, stats, query.sinks, out, i32(n_head), i32(splits)
            be.launch(program, "attention_merge", groups, (64, 1, 1), *merge)
        return out

    def _queries(self, decode: bool, per_key: int, dim: int) -> int:
        """How many (row, head) pairs one group looks after."""
        if decode:
            return min(DECODE_QUERIES, 1 << (per_key - 1).bit_length())
        return TILE_QUERIES if dim < WIDE_HEAD else TILE_QUERIES // 2

    def _splits(self, n_groups: int, n_pages: int) -> int:
        """Parts of the past, so that two groups are there for each core; a page at least for each."""
        return max(1, min(n_pages, 2 * self.be.n_cores // n_groups))
