"""The stored past of one sequence: memory for all layers, and a table of its addresses for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import DeviceError, StateError
from ..backend import Cache, KVType, LayerCache, RopeSpec
from .attention import LAYER, MAX_DIM, padded

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


class CPUCache(Cache):
    """Keys and values as ``attention`` describes; ``table`` [layers, 16] int64 holds their addresses.

    ``settle`` runs what was recorded but not run yet; it is called before the host reads or writes.
    """

    def __init__(
        self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType, settle: Callable[[], None]
    ) -> None:
        self.n_ctx, self.layers, self.kv_type, self._settle = n_ctx, tuple(layers), kv_type, settle
        if kv_type not in TYPES:
            raise DeviceError(f"unknown kv_type {kv_type!r}; expected one of {sorted(TYPES)}")
        self.table = np.zeros((len(self.layers), LAYER // 8), np.int64)
        self.address = self.table.ctypes.data
        self.k, self.v = [self._keys(c) for c in layers], [self._values(c) for c in layers]
        self.arrays = [
            {name: zeros(shape, np.dtype(np.float32)) for name, shape in c.arrays} for c in layers
        ]
        for i in range(len(self.layers)):
            pair = (self.k[i], self.v[i])
            self.table[i, :2] = [a.ctypes.data for a in pair]
            self.table[i, 2:4] = [a.nbytes // max(len(a), 1) for a in pair]
            places = [a.ctypes.data for a in self.arrays[i].values()]
            self.table[i, 4 : 4 + len(places)] = places

    def _keys(self, c: LayerCache) -> np.ndarray:
        if c.head_dim > MAX_DIM or c.head_dim_v > MAX_DIM:
            raise DeviceError(f"heads of {c.head_dim} values; the cpu backend goes to {MAX_DIM}")
        blocks = self.kv_type == "q8_0"
        tile = (16 * blocks_bytes(c.head_dim),) if blocks else (c.head_dim, 16)
        return zeros((c.n_head_kv, -(-self.n_ctx // 16), *tile), TYPES[self.kv_type])

    def _values(self, c: LayerCache) -> np.ndarray:
        width = blocks_bytes(c.head_dim_v) if self.kv_type == "q8_0" else padded(c.head_dim_v)
        return zeros((c.n_head_kv, self.n_ctx, width), TYPES[self.kv_type])

    def index(self, layer: int, name: str) -> int:
        """The column of the table that has the address of a layer's recurrent array."""
        return 4 + list(self.arrays[layer]).index(name)

    @property
    def nbytes(self) -> int:
        recurrent = [a for layer in self.arrays for a in layer.values()]
        return sum(a.nbytes for a in [*self.k, *self.v, *recurrent])

    # ---- reading and writing from the host, as [positions, heads, values]

    def _read(self, layer: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        k, v, c = self.k[layer], self.v[layer], self.layers[layer]
        tiles = -(-n // 16)
        if self.kv_type == "q8_0":
            k = keys_to_rows(k[:, :tiles])
        else:
            k = k[:, :tiles].transpose(0, 1, 3, 2).reshape(c.n_head_kv, tiles * 16, c.head_dim)
            v = v[..., : c.head_dim_v]
        return k[:, :n].transpose(1, 0, 2).copy(), v[:, :n].transpose(1, 0, 2).copy()

    def _write(self, layer: int, first: int, k: np.ndarray, v: np.ndarray) -> None:
        n, to = len(k), first + np.arange(len(k))
        if self.kv_type == "q8_0":
            first_tile, last_tile = first // 16, -(-(first + n) // 16)
            some = self.k[layer][:, first_tile:last_tile]
            rows = keys_to_rows(some)
            rows[:, to - 16 * first_tile] = k.transpose(1, 0, 2)
            some[...] = rows_to_keys(rows)
            self.v[layer][:, to] = v.transpose(1, 0, 2)
            return
        self.k[layer][:, to // 16, :, to % 16] = k
        self.v[layer][:, first : first + n, : v.shape[2]] = v.transpose(1, 0, 2)

    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        self._settle()
        k, v = (a[keep + discard :] for a in self._read(layer, n_past))
        if rope is not None and len(k):
            k = self._turned(k, discard, rope, self.layers[layer].head_dim)
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
        expected = self.export(0)
        if set(expected) != set(arrays):
            found = sorted(arrays)
            raise StateError(f"saved state has arrays {found}; expected {sorted(expected)}")
        for name, want in expected.items():
            here, stored = arrays[name], name.split(".", 1)[1] in ("k", "v")
            shape = (len(here), *want.shape[1:]) if stored else want.shape
            fits = not stored or len(here) <= self.n_ctx
            if here.shape != shape or here.dtype != want.dtype or not fits:
                raise StateError(
                    f"saved array {name} is {here.dtype} {here.shape}; "
                    f"expected {want.dtype} {shape}, at most {self.n_ctx} positions"
                )
        for i, layer in enumerate(self.layers):
            if layer.n_head_kv:
                self._write(i, 0, arrays[f"{i}.k"], arrays[f"{i}.v"])
            for name, a in self.arrays[i].items():
                a[...] = arrays[f"{i}.{name}"]


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
