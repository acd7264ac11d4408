"""Attention over stored keys and values, in blocks of 256 positions merged in ascending order.

In a block, keys lie as weights do, 16 positions to a tile: ``[K][16][D][16]``; values by position:
``[K][256][Dv]``, Dv rounded up to 16. Each block has an address of its own. A q8_0 cache keeps both as
``kvblocks`` says, and they are expanded where they are read.

A piece treats M *rows*, the query heads of one key head for one or more tokens, and one block, or all
of them. A block leaves its largest score, the sum of exponentials and the weighted values (``part``); merging
two parts is the same arithmetic wherever it happens, so splitting a long past over threads changes no bit.

A part: largest [16], sums [16], then values [Dv / 16][M][16], all float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from . import jit
from .emit import F32, I64, LANES, V
from .floats import as_float, rows_multiplier
from .jit import GIVEN
from .kvblocks import (
    BLOCK_BYTES,
    TILE_BYTES,
    expand_keys,
    expand_values,
    write_keys,
    write_values,
)
from .simd import (
    clear,
    copy,
    emitter,
    exp,
    f32,
    get_f32,
    get_i32,
    get_i64,
    hmax,
    hsum,
    i64,
    load,
    load_n,
    ramp,
    set_f32,
    set_half,
    splat,
    store,
    store_n,
    tanh,
    types,
    vabs,
    vmax,
    where_within,
)

BLOCK = 256
MAX_DIM = 640
Q_STEP = 4 * MAX_DIM + 64  # bytes between query rows
P_STEP = 4 * BLOCK + 64  # bytes between rows of probabilities
# Bytes of a layer in a cache's table: where the addresses of each block's keys stand, and of its values; bytes
# per head of each; addresses of recurrent arrays
LAYER = 128
HIDDEN = np.float32(-1e30)
FAR = np.float32(3e38)


def scratch_bytes(m: int, dim: int, dim_v: int, kv: str) -> int:
    """Bytes that a worker needs: queries, scores, probabilities, two parts, a block expanded."""
    expanded = BLOCK * 4 * (dim + padded(dim_v)) if kv == "q8_0" else 0
    return m * (Q_STEP + P_STEP + 4 * BLOCK) + 2 * part_bytes(m, dim_v) + expanded


def padded(n: Any) -> Any:
    """A number of values, or an array of such numbers, rounded up to whole vectors of 16."""
    return -(-n // 16) * 16


def part_bytes(m: int, dim_v: int) -> int:
    """Bytes of a part."""
    return 128 + 4 * m * padded(dim_v)


# ---- names that ``jit.kernel`` gives

score_group = score_one = weigh_group = weigh_one = maxima = GIVEN
M = 1  # rows of a piece
TILES = 4  # tiles multiplied at once
SIZE = 2  # bytes of a stored value as the multipliers read it
KV = 1  # 0 f32, 1 f16, 2 q8_0


def merge(into, part, rows, tiles):
    """Add a part to another."""
    ma, mb = load(into), load(part)
    most = vmax(ma, mb)
    a, b = exp(ma - most), exp(mb - most)
    store(into, most)
    store(into + 64, load(into + 64) * a + load(part + 64) * b)
    store(part, a)  # the part is used up: its head holds the factors
    store(part + 64, b)
    for t in range(tiles):
        for m in range(rows):
            at = 128 + 64 * (t * rows + m)
            fa, fb = splat(get_f32(part + 4 * m)), splat(get_f32(part + 64 + 4 * m))
            store(into + at, load(into + at) * fa + load(part + at) * fb)


def begin(part, n_bytes):
    """An empty part."""
    clear(part, n_bytes)
    store(part, splat(HIDDEN))


def finish(part, rows, m, sink, has_sink, out, dim_v):
    """Row m of a part, divided by its sum -> dim_v floats."""
    most, total = get_f32(part + 4 * m), get_f32(part + 64 + 4 * m)
    scale = np.float32(1)
    if has_sink:
        new = max(most, sink)
        scale = hmax(exp(splat(most - new)))
        total = total * scale + hmax(exp(splat(sink - new)))
    factor = splat(scale / total)
    for i in range(0, dim_v, 16):
        v = load(part + 128 + 4 * i * rows + 64 * m) * factor
        store_n(out + 4 * i, v, dim_v - i)


def scaled_copy(to, source, n, scale):
    """n floats times scale."""
    for i in range(0, n, 16):
        store_n(to + 4 * i, load_n(source + 4 * i, n - i) * scale, n - i)


def locate(piece, starts, n_past, n_seq, group, n_head_kv, split):
    """A piece's sequence, its number there, blocks if ``split`` (else 1), stored positions and tokens."""
    seq, p = 0, piece
    while True:
        n_tokens = get_i32(starts + 4 * seq + 4) - get_i32(starts + 4 * seq)
        past = get_i32(n_past + 4 * seq)
        blocks = (past + n_tokens + BLOCK - 1) // BLOCK if split else 1
        n = (n_tokens * group + M - 1) // M * n_head_kv * blocks
        if p < n or seq + 1 == n_seq:
            break
        p -= n
        seq += 1
    return seq, p, blocks, past, n_tokens


def reach(i, window):
    """How many positions back from i a query there sees, itself included; below 0 windows are chunks."""
    if window < 0:
        return i % (0 - window) + 1
    return window


def visible(here, there, end, window, causal):
    """The positions [low, high) that some query from ``here`` to ``there`` sees, of ``end`` positions."""
    low, high = i64(0), there + 1
    if causal == 0:
        high = end
        if window > 0:
            low, high = max(low, here - window // 2), min(high, there + window // 2 + 1)
    elif window != 0:
        low = max(low, here - reach(here, window) + 1)
    return low, high


def score(keys, tiles, dim, queries, scores, expanded):
    """Keys of a block times the queries -> scores [tiles][M][16]; q8_0 keys by way of ``expanded``."""
    t, tile_bytes = i64(0), 16 * dim * SIZE
    while t < tiles:
        to, at_once = scores + 64 * M * t, TILES if t + TILES <= tiles else 1
        source = keys + t * tile_bytes
        if KV == 2:  # a few tiles at a time stay in the first-level cache
            expand_keys(keys + t * ((dim + 31) // 32 * TILE_BYTES), expanded, at_once, dim)
            source = expanded
        if at_once == TILES:
            score_group(source, tile_bytes, 16 * SIZE, queries, dim, to)
        else:
            score_one(source, tile_bytes, 16 * SIZE, queries, dim, to)
        t += at_once


def mask(scores, first, n, i, cap, slope, biased, bias, most, window, causal):
    """The scores of one row from tile ``first`` on: capped, biased by distance, hidden where it sees nothing.

    n positions are stored; the query's place i is counted from the first of them. ``bias`` is 0, or the
    address of a value for each distance j - i from -most to most.
    """
    nearest, farthest = np.float32(0), FAR  # bounds of the distance i - j
    if causal == 0:
        nearest = -FAR
        if window > 0:
            nearest, farthest = as_float(-(window // 2)), as_float(window // 2)
    elif window > 0:
        farthest = as_float(window - 1)
    for t in range(first, (n + 15) // 16):
        at = scores + 64 * M * t
        v, distance = load(at), splat(as_float(i)) - ramp(16 * t)
        if cap != np.float32(0):
            v = splat(cap) * tanh(v / splat(cap))
        if biased:
            d = vabs(distance) if causal == 0 else distance
            v = v - splat(slope) * d
        if bias != 0:  # the outermost 16 values are alike, so that all lanes may lie beyond
            v = v + load(bias + 4 * (most + max(min(16 * t - i, most - 15), -most)))
        v = where_within(v, distance, nearest, farthest, splat(HIDDEN))
        if 16 * t + 16 > n:  # positions behind the last one
            v = where_within(v, ramp(16 * t), np.float32(0), as_float(n - 1), splat(HIDDEN))
        store(at, v)


def exponentiate(scores, tiles, chances, part):
    """exp(score - largest) -> chances; the largest of each row and its sum -> the head of ``part``."""
    maxima(scores, tiles, part)
    for m in range(M):
        # a row of which all is hidden: zeros, not ones
        top = splat(max(get_f32(part + 4 * m), HIDDEN / np.float32(2)))
        total = splat(np.float32(0))
        for t in range(tiles):
            e = exp(load(scores + 64 * (M * t + m)) - top)
            store(chances + m * P_STEP + 64 * t, e)
            total = total + e
        set_f32(part + 64 + 4 * m, hsum(total))


def weigh(values, n, dim_vp, chances, part):
    """n values times the chances -> the values of ``part``."""
    t, tiles = i64(0), dim_vp // 16
    while t + TILES <= tiles:
        to = part + 128 + 64 * M * t
        weigh_group(values + 16 * SIZE * t, 16 * SIZE, dim_vp * SIZE, chances, n, to)
        t += TILES
    while t < tiles:
        to = part + 128 + 64 * M * t
        weigh_one(values + 16 * SIZE * t, 16 * SIZE, dim_vp * SIZE, chances, n, to)
        t += 1


def emit_rows(part, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks):
    """The rows of a part that is complete -> y."""
    for m in range(min(M, n_rows - row0)):
        r = row0 + m
        h = head * group + r % group
        sink = get_f32(sinks + 4 * h) if sinks != 0 else np.float32(0)
        out = y + 4 * ((row_first + r // group) * n_head + h) * dim_v
        finish(part, M, m, sink, sinks != 0, out, dim_v)


def attend(
    q, y, caches, starts, n_past, n_seq, layer, n_head, n_head_kv, dim, dim_v, scale: f32,
    window, cap: f32, slopes, bias, n_bias, sinks, causal, parts, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """Rows of queries over one block each, which leaves ``parts``, or, without these, over all blocks."""
    group, dim_vp = n_head // n_head_kv, (dim_v + 15) // 16 * 16
    n_part = 128 + 4 * M * dim_vp
    queries = scratch + worker * scratch_bytes
    scores = queries + M * Q_STEP
    chances = scores + M * 4 * BLOCK
    fresh = chances + M * P_STEP  # the part of one block
    sum_part = fresh + n_part
    keys_out = sum_part + n_part
    values_out = keys_out + 4 * BLOCK * dim
    for piece in range(first, last):
        seq, p, blocks, past, n_tokens = locate(
            piece, starts, n_past, n_seq, group, n_head_kv, parts != 0
        )
        head, row0 = p // blocks % n_head_kv, p // (blocks * n_head_kv) * M
        row_first, n_rows = get_i32(starts + 4 * seq), n_tokens * group
        for m in range(M):
            r = min(row0 + m, n_rows - 1)
            at = ((row_first + r // group) * n_head + head * group + r % group) * dim
            scaled_copy(queries + m * Q_STEP, q + 4 * at, dim, splat(scale))
        here, there = past + row0 // group, past + min(row0 + M - 1, n_rows - 1) // group
        low, high = visible(here, there, past + n_tokens, window, causal)
        block_first, block_last = low // BLOCK, (high + BLOCK - 1) // BLOCK
        if parts != 0:
            sum_part = parts + piece * n_part
            b = p % blocks
            block_first, block_last = max(block_first, b), min(block_last, b + 1)
        begin(sum_part, n_part)
        table = get_i64(caches + 8 * seq) + layer * LAYER
        k_blocks, k_head = get_i64(table), head * get_i64(table + 16)
        v_blocks, v_head = get_i64(table + 8), head * get_i64(table + 24)
        for block in range(block_first, block_last):
            n = min(high - block * BLOCK, BLOCK)
            tiles = (n + 15) // 16
            keys = get_i64(k_blocks + 8 * block) + k_head
            values = get_i64(v_blocks + 8 * block) + v_head
            if KV == 2:
                expand_values(values, values_out, n, dim_v, 4 * dim_vp)
                values = values_out
            score(keys, tiles, dim, queries, scores, keys_out)
            plain = n // 16 if causal == 0 else max(min(here + 1 - block * BLOCK, n), 0) // 16
            if (cap != np.float32(0)) or (slopes != 0) or (window != 0) or (bias != 0):
                plain = i64(0)  # tiles whose scores stand as they are
            for m in range(M):
                r = min(row0 + m, n_rows - 1)
                slope = np.float32(0)
                if slopes != 0:
                    slope = get_f32(slopes + 4 * (head * group + r % group))
                more = bias
                if bias != 0:
                    more = bias + 4 * n_bias * (head * group + r % group)
                i = past + r // group
                seen, i = reach(i, window), i - block * BLOCK
                mask(
                    scores + 64 * m,
                    plain,
                    n,
                    i,
                    cap,
                    slope,
                    slopes != 0,
                    more,
                    n_bias // 2,
                    seen,
                    causal,
                )
            exponentiate(scores, tiles, chances, fresh)
            weigh(values, n, dim_vp, chances, fresh)
            merge(sum_part, fresh, M, dim_vp // 16)
        if parts == 0:
            emit_rows(sum_part, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks)


def merge_parts(
    y, starts, n_past, n_seq, n_head, n_head_kv, dim_v, sinks, parts, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """The parts of the blocks of one (row tile, key head) -> rows of y; a piece is one of these."""
    scratch = scratch + worker * scratch_bytes
    group, tiles = n_head // n_head_kv, (dim_v + 15) // 16
    n_part = 128 + 64 * M * tiles
    for piece in range(first, last):
        seq, p, before, blocks, n_rows = 0, piece, 0, 1, 0
        while True:
            n_tokens = get_i32(starts + 4 * seq + 4) - get_i32(starts + 4 * seq)
            past, n_rows = get_i32(n_past + 4 * seq), n_tokens * group
            blocks = (past + n_tokens + BLOCK - 1) // BLOCK
            n = (n_rows + M - 1) // M * n_head_kv
            if p < n or seq + 1 == n_seq:
                break
            p -= n
            before += n * blocks
            seq += 1
        head, row0 = p % n_head_kv, p // n_head_kv * M
        source = parts + (before + p * blocks) * n_part
        begin(scratch, n_part)
        for b in range(blocks):
            merge(scratch, source + b * n_part, M, tiles)
        row_first = get_i32(starts + 4 * seq)
        emit_rows(scratch, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks)


# ---- writing


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


write = write_f16


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


WRITERS = {"f32": write_f32, "f16": write_f16, "q8_0": write_blocks}


def write_kernel(kv: str) -> jit.Kernel:
    """``cache_write`` for a kind of cache."""
    return jit.kernel(cache_write, f"cache_write_{kv}", write=WRITERS[kv])


# ---- compiled for a kind of cache and a number of rows

KINDS = {"f32": (0, "F32", 4), "f16": (1, "F16", 2), "q8_0": (2, "F32", 4)}


@lru_cache
def maxima_of(m: int) -> Callable:
    """Make maxima(scores, tiles, out): write the largest score of each of m rows to out [m]."""

    @emitter(types.void, i64, i64, i64)
    def maxima(e, scores, tiles, out):
        """Write the largest score of each row to out."""
        ty, scores = V(F32, LANES), e.ptr(scores)

        def tile(i, most):
            at = e.at(scores, e.b.mul(i, I64(64 * m)))
            values = [e.load(at, ty, 64 * row) for row in range(m)]
            return [e.select("<", v, x, x, v) for v, x in zip(values, most, strict=True)]

        for row, v in enumerate(e.loop(tiles, [e.const(HIDDEN, ty)] * m, tile)):
            e.store(e.fold(v, lambda x, y: e.select("<", x, y, y, x)), e.ptr(out), 4 * row)

    return maxima


def rows_of(n: int) -> int:
    """Rows of a piece, given how many query heads a sequence has for one key head."""
    return 8 if n > 4 else 4 if n > 2 else n


def attend_kernel(kv: str, m: int) -> jit.Kernel:
    """``attend`` for a kind of cache and m rows."""
    number, kind, size = KINDS[kv]
    tiles = 2 if m == 8 else 4
    score = {n: rows_multiplier(kind, m, n, 4, Q_STEP) for n in (1, tiles)}
    weigh = {n: rows_multiplier(kind, m, n, 4, P_STEP) for n in (1, tiles)}
    return jit.kernel(
        attend,
        f"attend_{kv}_{m}",
        score_group=score[tiles],
        score_one=score[1],
        weigh_group=weigh[tiles],
        weigh_one=weigh[1],
        maxima=maxima_of(m),
        M=m,
        TILES=tiles,
        SIZE=size,
        KV=number,
    )


def merge_kernel(m: int) -> jit.Kernel:
    """``merge_parts`` for m rows."""
    return jit.kernel(merge_parts, f"merge_parts_{m}", M=m)
