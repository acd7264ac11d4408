"""The stored past of sequences: pages of 64 positions in buffers that grow.

Kernels reach the caches of many sequences through a table of page numbers, which works in OpenCL,
where a buffer is no address, as well as in CUDA. There is a buffer for the layers of each window. Recurrent
arrays lie in slots of another such buffer, one slot a sequence.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StateError
from ..backend import HeadNorms, KVType, LayerCache, RopeSpec
from ..pages import Page, PagedCache
from .arrays import Buffer, GPUArray, f32, i32, u64
from .sources import kv_cache

if TYPE_CHECKING:
    from .backend import GPUBackend
    from .batch import DeviceBatch

PAGE = 64  # positions in a page, as in src/kv.h
MOST_DIM = 1024  # values of a head that ``rope_write`` turns, as in src/cache.c
FIRST_BYTES = 64 << 20  # in a first buffer, which has 4 to 64 places
MARKS = itertools.count()
KV_CODE = {"f32": 0, "f16": 1, "q8_0": 2}
_PIECE = {"f32": 4, "f16": 4, "q8_0": 32}
_DTYPE: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Side:
    """Where the keys, or the values, of one layer lie within a page."""

    offset: int
    n_head: int
    dim: int
    width: int  # dim rounded up to whole pieces
    kv_type: KVType
    group: int = 0  # layers of one window, whose pages share a buffer

    @property
    def nbytes(self) -> int:
        rows = self.n_head * PAGE
        per_row = (
            self.width + self.width // 16 if self.kv_type == "q8_0" else self.item * self.width
        )
        return -(-rows * per_row // 16) * 16

    @property
    def item(self) -> int:
        return _DTYPE[self.kv_type].itemsize

    def decode(self, pages: np.ndarray) -> np.ndarray:
        """Raw pages uint8 [n, page bytes] -> what is stored [n * PAGE, n_head, dim or block bytes]."""
        rows, n = self.n_head * PAGE, len(pages)
        raw = pages[:, self.offset : self.offset + self.nbytes]
        if self.kv_type == "q8_0":
            blocks = self.width // 32
            codes = raw[:, : rows * self.width].reshape(n, rows, blocks, 32)
            scales = raw[:, rows * self.width :][:, : rows * self.width // 16]
            both = [scales.reshape(n, rows, blocks, 2), codes]
            x = np.concatenate(both, -1).reshape(n, rows, 34 * blocks)
        else:
            used = np.ascontiguousarray(raw[:, : rows * self.width * self.item])
            x = used.view(_DTYPE[self.kv_type]).reshape(n, rows, self.width)[..., : self.dim]
        by_position = x.reshape(n, self.n_head, PAGE, x.shape[-1]).swapaxes(1, 2)
        return by_position.reshape(n * PAGE, self.n_head, x.shape[-1])

    def encode(self, pages: np.ndarray, x: np.ndarray) -> None:
        """Write x [n * PAGE, n_head, ...], as ``decode`` gives it, into the raw pages."""
        rows, n = self.n_head * PAGE, len(pages)
        by_head = x.reshape(n, PAGE, self.n_head, -1).swapaxes(1, 2).reshape(n, rows, -1)
        raw = pages[:, self.offset : self.offset + self.nbytes]
        if self.kv_type == "q8_0":
            blocks = by_head.reshape(n, rows, -1, 34)
            raw[:, : rows * self.width] = blocks[..., 2:].reshape(n, -1)
            scales = np.ascontiguousarray(blocks[..., :2]).reshape(n, -1)
            raw[:, rows * self.width : rows * self.width + scales.shape[1]] = scales
        else:
            padded = np.zeros((n, rows, self.width), _DTYPE[self.kv_type])
            padded[..., : self.dim] = by_head
            raw[:, : rows * self.width * self.item] = padded.view(np.uint8).reshape(n, -1)

    @property
    def stored(self) -> tuple[np.dtype[Any], int]:
        """The type and the length of an exported row."""
        if self.kv_type == "q8_0":
            return np.dtype(np.uint8), self.width // 32 * 34
        return _DTYPE[self.kv_type], self.dim


class Layout:
    """Where each layer's keys, values and recurrent arrays lie in a page and in a slot."""

    def __init__(self, layers: Sequence[LayerCache], kv_type: KVType) -> None:
        self.layers, self.kv_type = tuple(layers), kv_type
        self.sides: list[dict[str, Side]] = []
        self.arrays: list[dict[str, tuple[int, tuple[int, ...]]]] = []
        self.slot_floats = 0
        groups = PagedCache.groups_of(layers)
        self.page_bytes = [0] * len(groups)
        for i, layer in enumerate(layers):
            dims = {"k": layer.head_dim, "v": layer.head_dim_v} if layer.n_head_kv else {}
            group = next((g for g, numbers in enumerate(groups) if i in numbers), 0)
            self.sides.append(
                {name: self._side(group, layer.n_head_kv, dim) for name, dim in dims.items()}
            )
            self.arrays.append({name: (self._room(shape), shape) for name, shape in layer.arrays})

    def _side(self, group: int, n_head: int, dim: int) -> Side:
        piece, first = _PIECE[self.kv_type], self.page_bytes[group]
        side = Side(first, n_head, dim, -(-dim // piece) * piece, self.kv_type, group)
        self.page_bytes[group] += side.nbytes
        return side

    def _room(self, shape: tuple[int, ...]) -> int:
        first = self.slot_floats
        self.slot_floats += -(-prod(shape) // 4) * 4
        return first


class Shelf:
    """Numbered places of equal size in one buffer, which doubles when it is full.

    Places come back when a cache is collected: in any thread, and even in the midst of ``take``. The empty
    buffer stays until memory is scarce, because recorded steps hold its address.
    """

    def __init__(self, be: GPUBackend, nbytes: int) -> None:
        self.be, self.nbytes = be, nbytes
        self.buffer: Buffer = None
        self.room = self.used = 0
        self.version = 0  # counts the buffers so far: recorded steps hold addresses
        self._spare: list[int] = []
        self._lock, self._taking = threading.RLock(), False

    def take(self) -> int:
        """The number of a free place."""
        with self._lock:
            self._taking = True
            try:
                if not self._spare and self.used == self.room:
                    self._grow()
                if self._spare:
                    return self._spare.pop()
                self.used += 1
                return self.used - 1
            finally:
                self._taking = False

    def give(self, places: Sequence[int]) -> None:
        """Take places back."""
        with self._lock:
            self._spare.extend(places)

    @property
    def idle(self) -> int:
        """Bytes of the buffer if no place is taken, else 0."""
        unused = len(self._spare) == self.used and not self._taking
        return self.room * self.nbytes if unused else 0

    def trim(self) -> None:
        """Free the buffer if no place is taken."""
        with self._lock:
            if self.idle:
                self._spare.clear()
                self.be.free(self.buffer)
                self.buffer, self.room, self.used = None, 0, 0
                self.version += 1

    def _grow(self) -> None:
        few = min(max(FIRST_BYTES // max(self.nbytes, 1), 4), 64)
        room = max(2 * self.room, few)
        new = self.be.allocate(room * self.nbytes)
        if self.buffer is not None:
            self.be.copy(new, self.buffer, self.room * self.nbytes)
            self.be.finish()
            self.be.free(self.buffer)
        self.buffer, self.room = new, room
        self.version += 1


class Store:
    """The pages and slots of all sequences with the same layers."""

    def __init__(self, be: GPUBackend, layers: Sequence[LayerCache], kv_type: KVType) -> None:
        self.layout = Layout(layers, kv_type)
        self.pages = [Shelf(be, n) for n in self.layout.page_bytes]  # for each group of layers
        self.slots = Shelf(be, 4 * self.layout.slot_floats)

    @property
    def shelves(self) -> list[Shelf]:
        return [*self.pages, self.slots]

    @property
    def version(self) -> tuple[int, ...]:
        return tuple([shelf.version for shelf in self.shelves])

    @property
    def idle(self) -> int:
        """Bytes that ``trim`` would free."""
        return sum(shelf.idle for shelf in self.shelves)

    def trim(self) -> None:
        """Free the buffers in which no place is taken."""
        for shelf in self.shelves:
            shelf.trim()

    def close(self) -> None:
        """Free all buffers, whoever still holds places in them."""
        for shelf in self.shelves:
            if shelf.buffer is not None:
                shelf.be.free(shelf.buffer)
                shelf.buffer = None


class GPUPage(Page):
    """A page on a shelf: ``memory`` is its number there, free again when no cache has the page."""

    __slots__ = ("shelf",)

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(shelf.take())
        self.shelf = shelf

    def __del__(self) -> None:
        if hasattr(self, "shelf") and not self.shelf.be.closed:
            self.shelf.give([self.memory])


def _release(slots: Shelf, slot: int) -> None:
    if not slots.be.closed:
        slots.give([slot])


class GPUCache(PagedCache):
    """The pages and the slot of one sequence; ``numbers`` are those of each group's pages."""

    page_size = PAGE

    def __init__(self, be: GPUBackend, store: Store, n_ctx: int) -> None:
        super().__init__(store.layout.layers, n_ctx)
        self.be, self.store = be, store
        self.layout = store.layout
        self.numbers: list[list[int]] = [[] for _ in self.groups]
        self.mark = next(MARKS)  # changes whenever pages are added
        slot = store.slots.take() if self.layout.slot_floats else None
        self.slot = slot or 0
        if slot is not None:
            zeros = np.zeros(self.layout.slot_floats, np.float32)
            be.put(store.slots.buffer, slot * store.slots.nbytes, zeros)
            weakref.finalize(self, _release, store.slots, slot).atexit = False

    # ---- pages

    def empty(self, n_ctx: int) -> GPUCache:
        return GPUCache(self.be, self.store, n_ctx)

    def page_bytes(self, group: int) -> int:
        return self.layout.page_bytes[group]

    def take(self, group: int) -> GPUPage:
        return GPUPage(self.store.pages[group])

    def copy(self, group: int, to: Page, source: Page) -> None:
        self._copy(self.store.pages[group], to.memory, source.memory)

    def copy_arrays(self, source: GPUCache) -> None:
        if self.layout.slot_floats:
            self._copy(self.store.slots, self.slot, source.slot)

    def _copy(self, shelf: Shelf, to: int, source: int) -> None:
        n = shelf.nbytes
        self.be.copy(shelf.buffer, shelf.buffer, n, source * n, to * n)

    def place(self, group: int, block: int, page: Page) -> None:
        numbers = self.numbers[group]
        numbers += [0] * (block + 1 - len(numbers))
        numbers[block] = page.memory
        self.mark = next(MARKS)

    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        n = n_past - keep - discard
        if n <= 0:
            return
        self.reserve(keep, n_past - discard)
        places = self.be.array(np.arange(keep, keep + n, dtype=np.int32))
        seqs = self.be.array(np.zeros(n, np.int32))
        for name, side in self.layout.sides[layer].items():
            pages = self.be.array(np.array(self.numbers[side.group], np.int32))
            x = read_rows(self.be, self.store, side, pages, keep + discard, n)
            if name == "k" and rope is not None:
                back = self.be.array(np.full(n, -discard, np.int32))
                turn = RopeSpec(rope.freqs, rope.pairing, rope.first)
                x = self.be.rope(x, back, turn, side.dim)
            write_rows(self.be, self.store, (side,), (x,), pages, 0, seqs, places)

    def export(self, n_past: int) -> dict[str, np.ndarray]:
        raw = [self._fetch(group, -(-n_past // PAGE)) for group in range(len(self.groups))]
        out = {}
        for i, (sides, arrays) in enumerate(
            zip(self.layout.sides, self.layout.arrays, strict=True)
        ):
            for name, side in sides.items():
                out[f"{i}.{name}"] = np.ascontiguousarray(side.decode(raw[side.group])[:n_past])
            for name, (first, shape) in arrays.items():
                at = self.slot * self.store.slots.nbytes + 4 * first
                data = self.be.get(self.store.slots.buffer, at, 4 * prod(shape))
                out[f"{i}.{name}"] = data.view(np.float32).reshape(shape)
        return out

    def _fetch(self, group: int, n: int) -> np.ndarray:
        """The first n pages of a group of layers, uint8 [n, page bytes]; zeros where there is none."""
        shelf, size = self.store.pages[group], self.layout.page_bytes[group]
        raw = np.zeros((n, size), np.uint8)
        for row, page in zip(raw, self.pages[group], strict=False):
            if page is not None:
                row[:] = self.be.get(shelf.buffer, page.memory * size, size)
        return raw

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        n_past = self._check(arrays)
        self.begin_anew(n_past)
        n_pages = -(-n_past // PAGE)
        raw = [np.zeros((n_pages, size), np.uint8) for size in self.layout.page_bytes]
        for i, (sides, slots) in enumerate(zip(self.layout.sides, self.layout.arrays, strict=True)):
            for name, side in sides.items():
                x = arrays[f"{i}.{name}"]
                padded = np.zeros((n_pages * PAGE, *x.shape[1:]), x.dtype)
                padded[:n_past] = x
                side.encode(raw[side.group], padded)
            for name, (first, _) in slots.items():
                at = self.slot * self.store.slots.nbytes + 4 * first
                self.be.put(self.store.slots.buffer, at, arrays[f"{i}.{name}"])
        for shelf, rows, pages in zip(self.store.pages, raw, self.pages, strict=True):
            for row, page in zip(rows, pages, strict=True):
                if page is not None:
                    self.be.put(shelf.buffer, page.memory * shelf.nbytes, row)

    def _check(self, arrays: dict[str, np.ndarray]) -> int:
        """The number of positions in saved arrays; StateError if they do not fit these layers."""
        expected: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for i, (sides, slots) in enumerate(zip(self.layout.sides, self.layout.arrays, strict=True)):
            for name, side in sides.items():
                dtype, length = side.stored
                expected[f"{i}.{name}"] = dtype, (side.n_head, length)
            for name, (_, shape) in slots.items():
                expected[f"{i}.{name}"] = np.dtype(np.float32), shape
        if set(arrays) != set(expected):
            raise StateError(
                f"saved state has arrays {sorted(arrays)}; expected {sorted(expected)}"
            )
        lengths = set()
        for key, (dtype, shape) in expected.items():
            x = arrays[key]
            stored = key.split(".", 1)[1] in ("k", "v")
            if x.dtype != dtype or (x.shape[1:] if stored else x.shape) != shape:
                raise StateError(
                    f"saved array {key} is {x.dtype} {x.shape}; expected {dtype} {shape}"
                )
            lengths |= {len(x)} if stored else set()
        if len(lengths) > 1:
            raise StateError(f"saved arrays hold different numbers of positions: {sorted(lengths)}")
        return max(lengths, default=0)


# ---- kernels that write and read the pages


def write_rows(
    be: GPUBackend,
    store: Store,
    sides: Sequence[Side],
    xs: Sequence[GPUArray],
    pages: GPUArray,
    n_pages: int,
    seqs: GPUArray,
    positions: GPUArray,
) -> None:
    """Write rows [T, n_head * dim] of keys, values or both to positions [T] of the sequences seqs [T]."""
    first, last = sides[0], sides[-1]
    shelf = store.pages[first.group]
    piece = _PIECE[first.kv_type]
    widest = max(side.width for side in sides)
    groups = -(-positions.size * first.n_head * (widest // piece) // 128), len(sides), 1
    where = shelf.buffer, pages, seqs, positions, u64(shelf.nbytes)
    offsets = u64(first.offset), u64(last.offset)
    dims = first.dim, last.dim, first.width, last.width
    shape = (i32(v) for v in (n_pages, first.n_head, *dims, positions.size))
    args = xs[0], xs[-1], *where, *offsets, *shape
    be.launch(kv_cache(KV_CODE[first.kv_type]), "cache_write", groups, (128, 1, 1), *args)


def write_batch(
    be: GPUBackend, b: DeviceBatch, store: Store, layer: int, k: GPUArray, v: GPUArray
) -> None:
    """Write the batch's keys [T, n_head * dim] and values to their sequences' pages."""
    sides = store.layout.sides[layer]["k"], store.layout.sides[layer]["v"]
    pages = b.pages[sides[0].group]
    write_rows(be, store, sides, (k, v), pages, b.n_pages, b.seqs, b.positions)


def read_rows(
    be: GPUBackend, store: Store, side: Side, pages: GPUArray, first: int, n: int
) -> GPUArray:
    """Positions first .. first + n of one sequence, float32 [n, n_head * dim]."""
    x, shelf = be.empty((n, side.n_head * side.dim)), store.pages[side.group]
    where = shelf.buffer, pages, x, u64(shelf.nbytes), u64(side.offset)
    shape = (i32(v) for v in (first, side.n_head, side.dim, side.width))
    be.each(kv_cache(KV_CODE[side.kv_type]), "cache_read", x.size, *where, *shape)
    return x


def rope_write(
    be: GPUBackend,
    b: DeviceBatch,
    store: Store,
    layer: int,
    q: GPUArray,
    k: GPUArray,
    v: GPUArray,
    spec: RopeSpec,
    head_dim: int,
    norms: HeadNorms | None,
) -> GPUArray:
    """Turn q, and write v and the turned k, in one launch; ``norms`` are applied to heads of q and k first."""
    ks, vs = (store.layout.sides[layer][name] for name in ("k", "v"))
    y, n_head = be.empty(q.shape), q.shape[-1] // head_dim
    shelf = store.pages[ks.group]
    where = y, shelf.buffer, b.pages[ks.group], b.seqs, b.positions, spec.freqs
    weights = (None, None) if norms is None else (norms.q, norms.k)
    offsets = (u64(n) for n in (shelf.nbytes, ks.offset, vs.offset))
    dims = b.n_pages, n_head, ks.n_head, ks.dim, vs.dim, ks.width, vs.width
    turn = spec.first, spec.freqs.size, spec.pairing == "adjacent"
    numbers = f32(spec.scale), f32(0.0 if norms is None else norms.eps)
    args = q, k, v, *where, *weights, *offsets, *(i32(n) for n in (*dims, *turn)), *numbers
    kernel = "rope_write" if norms is None else "norm_rope_write"
    groups = n_head + 2 * ks.n_head, b.n_rows, 1
    be.launch(kv_cache(KV_CODE[ks.kv_type]), kernel, groups, (128, 1, 1), *args)
    return y
