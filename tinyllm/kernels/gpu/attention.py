"""Attention over the caches, and what writes and reads them."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ArgumentError
from ..backend import Batch, KVType, LayerCache
from . import batch as batches
from . import sources
from .arrays import GPUArray
from .attention_tensor import TensorAttention
from .batch import DeviceBatch
from .device import f32, i32, u64
from .kvcache import KV_CODE, GPUCache, Side, Store
from .sources import Program

THREADS = 128  # as in src/attention.c
TILE_QUERIES = 16  # queries of a group when there are many rows
DECODE_QUERIES = 8  # and when each sequence has one row
WIDE_HEAD = 256  # from here on half as many queries fit into local memory


class Attention(TensorAttention):
    """The part of a GPU backend that knows about the past."""

    def store(self, layers: Sequence[LayerCache], kv_type: KVType) -> Store:
        """The pages of all sequences with these layers."""
        key = tuple(layers), kv_type
        if key not in self._stores:
            self._stores[key] = Store(self, layers, kv_type)  # type: ignore[arg-type]
        return self._stores[key]

    def on_device(self, batch: Batch) -> DeviceBatch:
        """The batch as ``step`` gives it to operations."""
        if isinstance(batch, DeviceBatch):
            return batch
        return batches.upload(self, batch)  # type: ignore[arg-type]

    def shared_store(self, batch: DeviceBatch) -> Store:
        """The one store of all sequences of a batch."""
        stores = {id(c.store): c.store for c in batch.caches if isinstance(c, GPUCache)}
        if len(stores) != 1:
            raise ArgumentError("the sequences of a batch need caches of one model and one kv_type")
        return next(iter(stores.values()))

    def cache_write(self, batch: Batch, layer: int, k: GPUArray, v: GPUArray) -> None:
        b = self.on_device(batch)
        store = self.shared_store(b)
        sides = store.layout.sides[layer]["k"], store.layout.sides[layer]["v"]
        self.write_cache(store, sides, (k, v), b.pages, b.n_pages, b.seqs, b.positions)

    def write_cache(
        self,
        store: Store,
        sides: Sequence[Side],
        xs: Sequence[GPUArray],
        pages: GPUArray,
        n_pages: int,
        seqs: GPUArray,
        positions: GPUArray,
    ) -> None:
        """Rows [T, n_head * dim] of keys, values or both to positions [T] of the sequences seqs [T]."""
        first, last = sides[0], sides[-1]
        piece = 32 if first.kv_type == "q8_0" else 4
        widest = max(side.width for side in sides)
        groups = -(-positions.size * first.n_head * (widest // piece) // 128), len(sides), 1
        where = store.pages.buffer, pages, seqs, positions, u64(store.pages.nbytes)
        offsets = u64(first.offset), u64(last.offset)
        dims = first.dim, last.dim, first.width, last.width
        shape = (i32(v) for v in (n_pages, first.n_head, *dims, positions.size))
        args = xs[0], xs[-1], *where, *offsets, *shape
        self.launch(cache_program(first), "cache_write", groups, (128, 1, 1), *args)

    def read_cache(self, store: Store, side: Side, pages: GPUArray, first: int, n: int) -> GPUArray:
        """Positions first .. first + n of one sequence, float32 [n, n_head * dim]."""
        x = self.empty((n, side.n_head * side.dim))
        where = store.pages.buffer, pages, x, u64(store.pages.nbytes), u64(side.offset)
        shape = (i32(v) for v in (first, side.n_head, side.dim, side.width))
        self.each(cache_program(side), "cache_read", x.size, *where, *shape)
        return x

    def attention(
        self,
        batch: Batch,
        layer: int,
        q: GPUArray,
        n_head: int,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: GPUArray | None = None,
        sinks: GPUArray | None = None,
    ) -> GPUArray:
        b = self.on_device(batch)
        store = self.shared_store(b)
        k, v = (store.layout.sides[layer][name] for name in ("k", "v"))
        how = f32(scale), i32(window), f32(softcap)
        if self.suits_tensor_cores(k, v):
            return self.tensor_attention(b, store, q, k, v, n_head, slopes, sinks, how)
        places = u64(store.pages.nbytes), u64(k.offset), u64(v.offset), i32(b.n_pages)
        past = store.pages.buffer, b.pages, *places
        return self._attend(b, q, past, k, v, n_head, slopes, sinks, how, b.n_pages)

    def attention_full(
        self,
        batch: Batch,
        q: GPUArray,
        k: GPUArray,
        v: GPUArray,
        n_head: int,
        n_head_kv: int,
        *,
        scale: float,
        window: int = 0,
        slopes: GPUArray | None = None,
    ) -> GPUArray:
        b = self.on_device(batch)
        k_side, v_side = (Side(0, n_head_kv, x.shape[-1] // n_head_kv, 0, "f32") for x in (k, v))
        how = f32(scale), i32(window), f32(0.0)
        return self._attend(b, q, (k, v), k_side, v_side, n_head, slopes, None, how, 0)

    def _attend(
        self,
        b: DeviceBatch,
        q: GPUArray,
        past: tuple[object, ...],
        k: Side,
        v: Side,
        n_head: int,
        slopes: GPUArray | None,
        sinks: GPUArray | None,
        how: tuple[object, ...],
        n_pages: int,
    ) -> GPUArray:
        """One launch over tiles of rows; with few of them also over parts of the past, then joined."""
        per_key = n_head // k.n_head
        queries = self._queries(b.n_rows == b.n_seq, per_key, max(k.dim, v.dim))
        heads = min(per_key, queries)
        tiles, n_tiles = batches.row_tiles(self, b, queries // heads)  # type: ignore[arg-type]
        n_groups = k.n_head * -(-per_key // heads) * n_tiles
        splits = self._splits(n_groups, n_pages)
        out = self.empty((b.n_rows, n_head * v.dim))
        parts = out if splits == 1 else self.empty((b.n_rows, n_head, splits, v.dim))
        stats = None if splits == 1 else self.empty((b.n_rows, n_head, splits, 2))
        program = sources.attention(KV_CODE[k.kv_type], k.dim, v.dim, queries, dense=not n_pages)
        self.launch(
            program,
            "attention",
            (n_groups // n_tiles, n_tiles, splits),
            (THREADS, 1, 1),
            *(q, *past, parts, stats, slopes, sinks, tiles, b.starts, b.n_past),
            *(i32(x) for x in (n_head, k.n_head, heads, splits)),
            *how,
        )
        if splits > 1:
            groups = (b.n_rows * n_head, 1, 1)
            sizes = i32(n_head), i32(splits)
            merge = parts, stats, sinks, out, *sizes
            self.launch(program, "attention_merge", groups, (64, 1, 1), *merge)
        return out

    def _queries(self, decode: bool, per_key: int, dim: int) -> int:
        """(row, head) pairs that one group looks after."""
        if decode:
            return min(DECODE_QUERIES, 1 << (per_key - 1).bit_length())
        return TILE_QUERIES if dim < WIDE_HEAD else TILE_QUERIES // 2

    def _splits(self, n_groups: int, n_pages: int) -> int:
        """Parts of the past, so that two groups are there for each core; a page at least for each."""
        return max(1, min(n_pages, 2 * self.n_cores // n_groups))


def cache_program(side: Side) -> Program:
    """What writes and reads a cache."""
    return sources.plain("kv.h", "reduce.h", "cache.c", KV=KV_CODE[side.kv_type])
