"""The stored past of one sequence: pages of 256 positions, and a table of their addresses for the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..backend import KVType, LayerCache, RopeSpec
from ..pages import Page, PagedCache, check_saved
from .attention import BLOCK, LAYER, MAX_DIM, padded

TYPES: dict[KVType, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "q8_0": np.dtype(np.uint8),
}


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros on a cache line's boundary; the system gives the memory when it is first written."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


def blocks_bytes(n: int) -> int:
    """Bytes of n values in q8_0."""
    return -(-n // 32) * 34


class CPUCache(PagedCache):
    """Keys and values as ``attention`` describes; ``table`` [layers, 16] int64 holds their addresses.

    ``settle`` runs what was recorded but not run yet; it is called before the host reads or writes.
    """

    page_size = BLOCK

    def __init__(
        self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType, settle: Callable[[], None]
    ) -> None:
        super().__init__(layers, n_ctx)
        self.kv_type, self._settle = kv_type, settle
        if kv_type not in TYPES:
            raise DeviceError(f"unknown kv_type {kv_type!r}; expected one of {sorted(TYPES)}")
        self.layout = layout_of(self.layers, kv_type)
        self.table = self.layout.table.copy()
        self.address = self.table.ctypes.data
        # [layers, 2, blocks]: where the keys and the values of a block begin
        self.blocks = np.zeros((len(layers), 2, -(-n_ctx // BLOCK)), np.int64)
        first, (per_layer, per_side, _) = self.blocks.ctypes.data, self.blocks.strides
        self.table[:, 0] = first + per_layer * np.arange(len(layers))
        self.table[:, 1] = self.table[:, 0] + per_side
        self.arrays = [
            {name: zeros(shape, np.dtype(np.float32)) for name, shape in c.arrays} for c in layers
        ]
        for i, arrays in enumerate(self.arrays):
            self.table[i, 4 : 4 + len(arrays)] = [a.ctypes.data for a in arrays.values()]

    def index(self, layer: int, name: str) -> int:
        """The column of the table that has the address of a layer's recurrent array."""
        return 4 + list(self.arrays[layer]).index(name)

    # ---- pages

    def empty(self, n_ctx: int) -> CPUCache:
        return CPUCache(self.layers, n_ctx, self.kv_type, self._settle)

    def fork(self, n_ctx: int) -> CPUCache:
        self._settle()
        return super().fork(n_ctx)

    def page_bytes(self, group: int) -> int:
        return self.layout.page_bytes[group]

    def take(self, group: int) -> Page:
        try:
            return Page(zeros((self.page_bytes(group),), np.dtype(np.uint8)))
        except MemoryError as e:
            raise DeviceError(
                f"the system gave no memory for {BLOCK} more positions. "
                "Use a smaller n_ctx, or kv_type='q8_0'"
            ) from e

    def copy(self, group: int, to: Page, source: Page) -> None:
        to.memory[...] = source.memory

    def copy_arrays(self, source: CPUCache) -> None:
        for mine, theirs in zip(self.arrays, source.arrays, strict=True):
            for name, a in mine.items():
                a[...] = theirs[name]

    def place(self, group: int, block: int, page: Page) -> None:
        self.blocks[self.groups[group], :, block] = (
            page.memory.ctypes.data + self.layout.offsets[group]
        )

    # ---- reading and writing from the host, as [positions, heads, values]

    def _sides(self, layer: int, page: Page) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys [heads, 16, tile..] and values [heads, BLOCK, width] in a page."""
        return self.layout.keys(layer, page.memory), self.layout.values(layer, page.memory)

    def _parts(self, layer: int, first: int, n: int) -> Iterator[tuple[Page | None, slice, slice]]:
        """The pages of a run of positions, and for each the positions in the page and in the run."""
        pages = next(
            p for p, layers in zip(self.pages, self.groups, strict=True) if layer in layers
        )
        for block in range(first // BLOCK, -(-(first + n) // BLOCK)):
            start, stop = max(first, block * BLOCK), min(first + n, (block + 1) * BLOCK)
            here = slice(start - block * BLOCK, stop - block * BLOCK)
            page = pages[block] if block < len(pages) else None
            yield page, here, slice(start - first, stop - first)

    def _read(self, layer: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        c, blocks = self.layers[layer], self.kv_type == "q8_0"
        kv = [(c.head_dim, blocks), (c.head_dim_v, blocks)]
        out = [
            np.zeros((n, c.n_head_kv, blocks_bytes(d) if q else d), TYPES[self.kv_type])
            for d, q in kv
        ]
        for page, here, there in self._parts(layer, 0, n):
            if page is None:  # behind the layer's window
                continue
            k, v = self._sides(layer, page)
            rows = keys_to_rows(k) if blocks else k.swapaxes(-1, -2).reshape(len(k), BLOCK, -1)
            for to, stored in zip(out, (rows, v), strict=True):
                to[there] = stored[:, here, : to.shape[2]].swapaxes(0, 1)
        return out[0], out[1]

    def _write(self, layer: int, first: int, keys: np.ndarray, values: np.ndarray) -> None:
        for page, here, there in self._parts(layer, first, len(keys)):
            if page is None:
                continue
            k, v = self._sides(layer, page)
            if self.kv_type == "q8_0":
                rows = keys_to_rows(k)
                rows[:, here] = keys[there].swapaxes(0, 1)
                k[...] = rows_to_keys(rows)
            else:
                to = np.arange(here.start, here.stop)
                k[:, to // 16, :, to % 16] = keys[there]
            v[:, here, : values.shape[2]] = values[there].swapaxes(0, 1)

    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        self._settle()
        k, v = (a[keep + discard :] for a in self._read(layer, n_past))
        if rope is not None and len(k):
            k = self._turned(k, discard, rope, self.layers[layer].head_dim)
        self.reserve(keep, n_past - discard)
        self._write(layer, keep, k, v)

    def _turned(self, k: np.ndarray, discard: int, rope: RopeSpec, dim: int) -> np.ndarray:
        from ..reference import rotate

        freqs = rope.freqs.view() if hasattr(rope.freqs, "address") else rope.freqs
        spec = RopeSpec(freqs, rope.pairing, rope.first)
        back = np.full(len(k), -discard, np.int32)
        if self.kv_type != "q8_0":
            return rotate(k.astype(np.float32), back, spec).astype(k.dtype)
        return encode_q8_0(rotate(decode_q8_0(k, dim), back, spec))

    def export(self, n_past: int) -> dict[str, np.ndarray]:
        self._settle()
        out = {}
        for i, layer in enumerate(self.layers):
            if layer.n_head_kv:
                out[f"{i}.k"], out[f"{i}.v"] = self._read(i, n_past)
            out |= {f"{i}.{name}": a.copy() for name, a in self.arrays[i].items()}
        return out

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._settle()
        n_past = check_saved(self.export(0), arrays, self.n_ctx)
        self.begin_anew(n_past)
        for i, layer in enumerate(self.layers):
            if layer.n_head_kv:
                self._write(i, 0, arrays[f"{i}.k"], arrays[f"{i}.v"])
            for name, a in self.arrays[i].items():
                a[...] = arrays[f"{i}.{name}"]


class Layout:
    """Where the keys and the values of each layer lie in a page of its group.

    ``table`` [layers, 16] is what all caches' tables have in common: bytes per head of keys and of values.
    """

    def __init__(self, layers: Sequence[LayerCache], kv_type: KVType) -> None:
        self.type = TYPES[kv_type]
        self.shapes = [(key_shape(c, kv_type), value_shape(c, kv_type)) for c in layers]
        self.table = np.zeros((len(layers), LAYER // 8), np.int64)
        self.at = np.zeros((len(layers), 2), np.int64)
        self.offsets: list[np.ndarray] = []  # bytes, for each group [its layers, 2]
        self.page_bytes: list[int] = []
        for group in PagedCache.groups_of(layers):
            size = 0
            for i in group:
                for side, shape in enumerate(self.shapes[i]):
                    nbytes = math.prod(shape) * self.type.itemsize
                    self.at[i, side], size = size, size + -(-nbytes // 64) * 64
                    self.table[i, 2 + side] = nbytes // shape[0]
            self.offsets.append(self.at[group])
            self.page_bytes.append(size)

    def keys(self, layer: int, memory: np.ndarray) -> np.ndarray:
        """A layer's keys in the bytes of a page."""
        return self._part(layer, 0, memory)

    def values(self, layer: int, memory: np.ndarray) -> np.ndarray:
        """A layer's values in the bytes of a page."""
        return self._part(layer, 1, memory)

    def _part(self, layer: int, side: int, memory: np.ndarray) -> np.ndarray:
        shape, first = self.shapes[layer][side], self.at[layer, side]
        n_bytes = math.prod(shape) * self.type.itemsize
        return memory[first : first + n_bytes].view(self.type).reshape(shape)


@lru_cache(16)
def layout_of(layers: tuple[LayerCache, ...], kv_type: KVType) -> Layout:
    """The layout that all caches of the same layers share."""
    return Layout(layers, kv_type)


def key_shape(c: LayerCache, kv_type: KVType) -> tuple[int, ...]:
    """The shape of a layer's keys in a page: tiles of 16."""
    if c.head_dim > MAX_DIM or c.head_dim_v > MAX_DIM:
        raise DeviceError(f"heads of {c.head_dim} values; the cpu backend goes to {MAX_DIM}")
    tile = (16 * blocks_bytes(c.head_dim),) if kv_type == "q8_0" else (c.head_dim, 16)
    return c.n_head_kv, BLOCK // 16, *tile


def value_shape(c: LayerCache, kv_type: KVType) -> tuple[int, ...]:
    """The shape of a layer's values in a page."""
    width = blocks_bytes(c.head_dim_v) if kv_type == "q8_0" else padded(c.head_dim_v)
    return c.n_head_kv, BLOCK, width


def keys_to_rows(tiles: np.ndarray) -> np.ndarray:
    """Keys in tiles, [K, tiles, bytes] -> a row of q8_0 blocks for each key, [K, 16 * tiles, bytes]."""
    heads, n_tiles, n_bytes = tiles.shape
    blocks = tiles.reshape(heads, n_tiles, n_bytes // 544, 544)
    scales = blocks[..., :32].reshape(*blocks.shape[:3], 16, 2)
    codes = blocks[..., 32:].reshape(*blocks.shape[:3], 32, 16).swapaxes(-1, -2)
    rows = np.concatenate([scales, codes], -1).swapaxes(2, 3)
    return rows.reshape(heads, 16 * n_tiles, n_bytes // 16)


def rows_to_keys(rows: np.ndarray) -> np.ndarray:
    """Rows of q8_0 blocks [K, 16 * tiles, bytes] -> keys in tiles [K, tiles, bytes]."""
    heads, n, n_bytes = rows.shape
    blocks = rows.reshape(heads, n // 16, 16, n_bytes // 34, 34).swapaxes(2, 3)
    scales = blocks[..., :2].reshape(*blocks.shape[:3], 32)
    codes = blocks[..., 2:].swapaxes(-1, -2).reshape(*blocks.shape[:3], 512)
    return np.concatenate([scales, codes], -1).reshape(heads, n // 16, 16 * n_bytes)


def decode_q8_0(blocks: np.ndarray, n: int) -> np.ndarray:
    """Rows of q8_0 blocks [.., bytes] -> their first n values, float32 [.., n]."""
    b = np.ascontiguousarray(blocks).reshape(*blocks.shape[:-1], -1, 34)
    scale = np.ascontiguousarray(b[..., :2]).view(np.float16).astype(np.float32)
    x: np.ndarray = np.ascontiguousarray(b[..., 2:]).view(np.int8) * scale
    return x.reshape(*blocks.shape[:-1], -1)[..., :n]


def encode_q8_0(x: np.ndarray) -> np.ndarray:
    """Values float32 [.., n] -> rows of q8_0 blocks, uint8 [.., bytes]."""
    n = x.shape[-1]
    whole = np.zeros((*x.shape[:-1], -(-n // 32) * 32), np.float32)
    whole[..., :n] = x
    groups = whole.reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    out = np.empty((*groups.shape[:-1], 34), np.uint8)
    out[..., :2] = scale.astype(np.float16).view(np.uint8)
    out[..., 2:] = np.rint(groups * inverse).astype(np.int8).view(np.uint8)
    return out.reshape(*x.shape[:-1], -1)
