"""Keys and values stored as q8_0: int8 codes with one scale, a half, for each 32 of them.

A value is a row of blocks, as in a file: half, 32 codes. Keys lie as f16 ones do, 16 positions to a tile; a
block of a tile is 16 halves, then 32 vectors of 16 codes, so that whole vectors are expanded at once.
"""

from __future__ import annotations

from collections.abc import Callable

from .emit import I8, I32, LANES, V16F, V16I, V
from .simd import (
    emitter,
    f32,
    f32x16,
    get_half,
    hmax,
    i64,
    load_half,
    load_n,
    set_half,
    splat,
    store,
    types,
    vabs,
    vmax,
)

BLOCK_BYTES = 34
TILE_BYTES = LANES * BLOCK_BYTES  # 32 columns of 16 keys


@emitter(f32x16, i64)
def load_codes(e, p):
    """16 signed bytes at an address, as floats."""
    return e.to_float(e.b.sext(e.load(e.ptr(p), V(I8, LANES)), V16I))


def _code_storer(step: int) -> Callable:
    """Make store_codes(p, v): store the lanes of v, rounded to even, as bytes ``step`` apart."""

    @emitter(types.void, i64, f32x16)
    def store_codes(e, p, v):
        """Store the lanes of v, rounded to even, as bytes."""
        b, to = e.b, e.ptr(p)
        codes = b.fptosi(e.call("llvm.rint.v16f32", V16F, v), V16I)
        small = b.trunc(codes, V(I8, LANES))
        if step == 1:
            e.store(small, to)
            return
        for i in range(LANES):
            e.store(b.extract_element(small, I32(i)), to, i * step)

    return store_codes


store_row, store_column = _code_storer(1), _code_storer(LANES)


def inverse(scale):
    """1 / scale, and 0 where the scale is 0."""
    return f32(1) / scale if scale > f32(0) else f32(0)


def write_values(source, out, n):
    """Write a row of n floats as blocks of a half and 32 codes."""
    for i in range(0, n, 32):
        a, b = load_n(source + 4 * i, n - i), load_n(source + 4 * i + 64, n - i - 16)
        scale = hmax(vmax(vabs(a), vabs(b))) / f32(127)
        factor = splat(inverse(scale))
        block = out + i // 32 * BLOCK_BYTES
        set_half(block, scale)
        store_row(block + 2, a * factor)
        store_row(block + 18, b * factor)


def write_keys(source, out, n, lane):
    """Write a row of n floats as blocks into one lane of a tile of 16 keys."""
    for i in range(0, n, 32):
        a, b = load_n(source + 4 * i, n - i), load_n(source + 4 * i + 64, n - i - 16)
        scale = hmax(vmax(vabs(a), vabs(b))) / f32(127)
        factor = splat(inverse(scale))
        block = out + i // 32 * TILE_BYTES
        set_half(block + 2 * lane, scale)
        store_column(block + 32 + lane, a * factor)
        store_column(block + 288 + lane, b * factor)


def expand_keys(source, out, n_tiles, tile_bytes, column, n):
    """Decode n columns of tiles of keys, from a block's first on, to floats [n_tiles][n][16]."""
    for t in range(n_tiles):
        block = source + t * tile_bytes + column // 32 * TILE_BYTES
        for i in range(0, n, 32):
            scale = load_half(block)
            for j in range(min(n - i, 32)):
                store(out, load_codes(block + 32 + 16 * j) * scale)
                out += 64
            block += TILE_BYTES


def expand_values(source, out, n_rows, row_bytes, column, n):
    """Decode n columns, whole vectors, of rows of blocks to floats [n_rows][n]."""
    for row in range(n_rows):
        for i in range(column, column + n, 16):
            block = source + row * row_bytes + i // 32 * BLOCK_BYTES
            store(out, load_codes(block + 2 + i % 32) * splat(get_half(block)))
            out += 64
