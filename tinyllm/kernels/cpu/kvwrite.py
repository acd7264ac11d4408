"""Writing keys and values to their places in blocks, which ``attention`` describes."""

from __future__ import annotations

from . import jit
from .attention import BLOCK, LAYER
from .emit import LANES
from .floats import spreader
from .jit import GIVEN
from .kvblocks import BLOCK_BYTES, TILE_BYTES, write_keys, write_values
from .simd import copy, get_f32, get_i32, get_i64, i64, load_n, set_f32, set_half, store_n

write = spread = GIVEN  # names that ``jit.kernel`` gives


def write_f32(k, v, keys, values, position, dim, dim_v):
    """Write a key and a value to their places in a block, as floats."""
    keys += 4 * (position // 16 * 16 * dim + position % 16)
    for i in range(dim):
        set_f32(keys + 64 * i, get_f32(k + 4 * i))
    copy(values + 4 * position * ((dim_v + 15) // 16 * 16), v, 4 * dim_v)


def write_f16(k, v, keys, values, position, dim, dim_v):
    """Write a key and a value to their places in a block, as halves."""
    keys += 2 * (position // 16 * 16 * dim + position % 16)
    for i in range(dim):
        set_half(keys + 32 * i, get_f32(k + 4 * i))
    values += 2 * position * ((dim_v + 15) // 16 * 16)
    for i in range(dim_v):
        set_half(values + 2 * i, get_f32(v + 4 * i))


def write_blocks(k, v, keys, values, position, dim, dim_v):
    """Write a key and a value to their places in a block, as rows of q8_0 blocks."""
    write_keys(k, keys + position // 16 * ((dim + 31) // 32 * TILE_BYTES), dim, position % 16)
    write_values(v, values + position * ((dim_v + 31) // 32 * BLOCK_BYTES), dim_v)


def cache_write(k, v, caches, starts, n_past, layer, n_head, dim, dim_v, first, last, worker):
    """Keys and values of new rows to their sequences' caches; a piece is a row."""
    for t in range(first, last):
        seq = 0
        while get_i32(starts + 4 * seq + 4) <= t:
            seq += 1
        position = get_i32(n_past + 4 * seq) + t - get_i32(starts + 4 * seq)
        table, block = get_i64(caches + 8 * seq) + layer * LAYER, 8 * (position // BLOCK)
        for head in range(n_head):
            row = t * n_head + head
            keys = get_i64(get_i64(table) + block) + head * get_i64(table + 16)
            values = get_i64(get_i64(table + 8) + block) + head * get_i64(table + 24)
            write(
                k + 4 * dim * row, v + 4 * dim_v * row, keys, values, position % BLOCK, dim, dim_v
            )


def write_whole(k, v, caches, starts, n_head, dim, dim_v, first, last, worker):
    """Keys and values of sequences without a past to their places, as floats; a piece is 16 positions."""
    seq, before, wide = i64(0), i64(0), dim // 16 * 16
    for piece in range(first, last):
        while True:
            row_first, row_end = get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)
            tiles = (row_end - row_first + 15) // 16
            if piece - before < tiles:
                break
            before += tiles
            seq += 1
        position = 16 * (piece - before)
        row, n = row_first + position, min(row_end - row_first - position, 16)
        table, block, at = get_i64(caches + 8 * seq), 8 * (position // BLOCK), position % BLOCK
        for head in range(n_head):
            keys = get_i64(get_i64(table) + block) + head * get_i64(table + 16) + 4 * at * dim
            source = k + 4 * dim * (row * n_head + head)
            for i in range(0, wide, 16):
                spread(source + 4 * i, 4 * dim * n_head, n, keys + 64 * i)
            values = get_i64(get_i64(table + 8) + block) + head * get_i64(table + 24)
            for t in range(n):
                for i in range(wide, dim):
                    set_f32(keys + 64 * i + 4 * t, get_f32(source + 4 * (dim * n_head * t + i)))
                taken = v + 4 * dim_v * ((row + t) * n_head + head)
                to = values + 4 * (at + t) * ((dim_v + 15) // 16 * 16)
                for i in range(0, dim_v, 16):
                    store_n(to + 4 * i, load_n(taken + 4 * i, dim_v - i), dim_v - i)


WRITERS = {"f32": write_f32, "f16": write_f16, "q8_0": write_blocks}


def write_kernel(kv: str) -> jit.Kernel:
    """``cache_write`` for a kind of cache."""
    return jit.kernel(cache_write, f"cache_write_{kv}", write=WRITERS[kv])


def write_whole_kernel() -> jit.Kernel:
    """``write_whole``, which turns 16 positions by 16 values at once."""
    return jit.kernel(write_whole, spread=spreader(LANES))
