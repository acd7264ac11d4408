"""Attention over stored keys and values, in blocks of 256 positions merged in ascending order.

In a block, keys lie as weights do, 16 positions to a tile: ``[K][16][D][16]``; values by position:
``[K][256][Dv]``, Dv rounded up to 16. Each block has an address of its own. A q8_0 cache keeps both as
``kvblocks`` says, and they are expanded where they are read.

A piece treats *rows*, the query heads of one key head for one or more tokens, in up to RUNS runs of M, and
one block, or all of them. A block leaves for each run its largest score, the sum of exponentials and the
weighted values (``part``); merging two parts is the same arithmetic wherever it happens, so splitting a long
past over threads changes no bit.

A part: largest [16], sums [16], then values [Dv / 16][M][16], all float32.

Keys are read TILES tiles at a time, values PORTION positions. While a portion is multiplied by all runs, in
the first-level cache, the processor is asked for the next one. Several runs multiply it as floats, 64 columns
at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from . import jit
from .emit import F32, I64, LANES, V, lanes
from .floats import as_float, rows_multiplier
from .jit import GIVEN
from .kvblocks import (
    BLOCK_BYTES,
    TILE_BYTES,
    expand_keys,
    expand_values,
)
from .simd import (
    below_constants,
    emit_exp_below,
    emitter,
    exp_below,
    f32,
    f32x16,
    get_f32,
    get_i32,
    get_i64,
    hmax,
    hsum,
    i64,
    load,
    load_half,
    load_n,
    ramp,
    set_f32,
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
# rows of a piece: so many of a run, so many runs
SHAPES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (4, 1), 6: (6, 1), 8: (8, 1), 24: (6, 4)}
MOST_TILES = 4  # multiplied at once
FIRST_LINES = 32  # asked for before the rest of keys, or of values, comes
Q_STEP = 4 * MAX_DIM + 64  # bytes between query rows
P_STEP = 4 * BLOCK + 64  # bytes between rows of scores, which become probabilities
# Bytes of a layer in a cache's table: where the addresses of each block's keys stand, and of its values; bytes
# per head of each; addresses of recurrent arrays
LAYER = 128
HIDDEN = np.float32(-1e30)
FAR = np.float32(3e38)


def scratch_bytes(rows: int, dim_v: int) -> int:
    """Bytes that a worker needs for a piece: queries, scores, parts twice, an open portion."""
    portion = 4 * (16 * MOST_TILES) ** 2
    return rows * (Q_STEP + P_STEP) + 2 * part_bytes(rows, dim_v) + portion


def padded(n: Any) -> Any:
    """A number of values, or an array of such numbers, rounded up to whole vectors of 16."""
    return -(-n // 16) * 16


def shape_of(rows: int) -> tuple[int, int]:
    """Rows of a run and runs of a piece: registers of 16 lanes hold the sums of 12 rows by two tiles."""
    return (12, 2) if rows == 24 and lanes() == LANES else SHAPES[rows]


def part_bytes(rows: int, dim_v: int) -> int:
    """Bytes of the parts of a piece."""
    return 128 * shape_of(rows)[1] + 4 * rows * padded(dim_v)


# ---- names that ``jit.kernel`` gives

score_group = score_one = weigh_group = weigh_one = maxima = open_keys = open_values = GIVEN
M = 1  # rows of a run
RUNS = 1  # runs of a piece
TILES = 4  # tiles multiplied at once
SIZE = 2  # bytes of a stored value as the multipliers read it
BYTES = 2  # a stored value has so many; 1: q8_0, with a little more for scales
COLUMNS = 64  # multiplied at once, of keys
PORTION = 64  # positions whose values all runs read, one after another
OPEN = 0  # 1 if what is stored is turned into floats before it is multiplied


def merge(into, part, rows, tiles):
    """Add a part to another."""
    ma, mb = load(into), load(part)
    most = vmax(ma, mb)
    a, b = exp_below(ma - most), exp_below(mb - most)
    store(into, most)
    store(into + 64, load(into + 64) * a + load(part + 64) * b)
    store(part, a)  # the part is used up: its head holds the factors
    store(part + 64, b)
    for t in range(tiles):
        for m in range(rows):
            at = 128 + 64 * (t * rows + m)
            fa, fb = splat(get_f32(part + 4 * m)), splat(get_f32(part + 64 + 4 * m))
            store(into + at, load(into + at) * fa + load(part + at) * fb)


def finish(part, rows, m, sink, has_sink, out, dim_v):
    """Row m of a part, divided by its sum -> dim_v floats."""
    most, total = get_f32(part + 4 * m), get_f32(part + 64 + 4 * m)
    scale = np.float32(1)
    if has_sink:
        new = max(most, sink)
        scale = hmax(exp_below(splat(most - new)))
        total = total * scale + hmax(exp_below(splat(sink - new)))
    factor = splat(scale / total)
    for i in range(0, dim_v, 16):
        v = load(part + 128 + 4 * i * rows + 64 * m) * factor
        store_n(out + 4 * i, v, dim_v - i)


def scaled_copy(to, source, n, scale):
    """n floats times scale."""
    for i in range(0, n, 16):
        store_n(to + 4 * i, load_n(source + 4 * i, n - i) * scale, n - i)


def rows_and_past(seq, starts, n_past, group):
    """Query rows of a key head in a sequence, positions stored before, blocks with the new ones."""
    n_tokens = get_i32(starts + 4 * seq + 4) - get_i32(starts + 4 * seq)
    past = get_i32(n_past + 4 * seq)
    return n_tokens * group, past, (past + n_tokens + BLOCK - 1) // BLOCK


def row_after(token, member, group):
    """The row of queries behind one: its token, and which of the key head's query heads it is."""
    member += 1
    if member == group:
        token, member = token + 1, i64(0)
    return token, member


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


def score(keys, tiles, dim, queries, runs, scores, room, ask):
    """Keys of a block times the queries of some runs -> rows of scores; ``ask``: read next."""
    stored, t = (dim + 31) // 32 * TILE_BYTES if BYTES == 1 else 16 * dim * BYTES, i64(0)
    while t < tiles:
        at_once = TILES if t + TILES <= tiles else 1
        following = t + at_once
        asked = keys + following * stored if following < tiles else ask
        for column in range(0, dim, COLUMNS):
            source, tile_bytes, n = keys + t * stored, stored, min(dim - column, COLUMNS)
            if OPEN:
                open_keys(source, room, at_once, stored, column, n)
                source, tile_bytes = room, 64 * n
            else:
                source += 16 * SIZE * column
            for run in range(runs):
                x = queries + run * M * Q_STEP + 4 * column
                to = scores + run * M * P_STEP + 64 * t
                if at_once == TILES:
                    more = asked + 16 * TILES * BYTES * column
                    score_group(source, tile_bytes, 16 * SIZE, x, n, to, column, more)
                else:
                    score_one(source, tile_bytes, 16 * SIZE, x, n, to, column, 0)
        t = following


def seen_whole(here, there, first, n, window, causal):
    """Tiles [from, to) of the block at position ``first`` that queries from ``here`` to ``there`` see whole."""
    low, high = i64(0), here + 1
    if causal == 0:
        high = first + n
        if window > 0:
            low, high = there - window // 2, min(high, here + window // 2 + 1)
    elif window != 0:
        low = there - reach(there, window) + 1
    return (max(low - first, 0) + 15) // 16, max(min(high - first, n), 0) // 16


def mask(
    scores, plain_from, plain_to, n, i, cap, slope, biased, bias, most, window, causal
):  # fmt: skip
    """The scores of one row, capped, biased by distance, hidden where it sees nothing, but for plain tiles.

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
    for t in range((n + 15) // 16):
        if plain_from <= t and t < plain_to:
            continue
        at = scores + 64 * t
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


@emitter(f32x16, i64, i64, f32x16)
def exponentiate_row(e, row, tiles, top):
    """exp(x - top) in the place of x, so many vectors of a row; the sum, lane by lane."""
    ty, row = top.type, e.ptr(row)
    constants = below_constants(e, ty)
    if lanes() == LANES:  # registers hold all of them: LLVM would load each time
        constants = e.finish(constants)

    def tile(i, total):
        at = e.at(row, e.b.mul(i, I64(64)))
        v = emit_exp_below(e, e.b.fsub(e.load(at, ty), top), constants)
        e.store(v, at)
        return [e.b.fadd(total[0], v)]

    return e.loop(tiles, [e.const(0.0, ty)], tile)[0]


def exponentiate(scores, tiles, part):
    """exp(score - largest) in the scores' place; each row's largest and sum -> the head of ``part``."""
    maxima(scores, tiles, part)
    for m in range(M):
        # a row of which all is hidden: zeros, not ones
        top = splat(max(get_f32(part + 4 * m), HIDDEN / np.float32(2)))
        set_f32(part + 64 + 4 * m, hsum(exponentiate_row(scores + m * P_STEP, tiles, top)))


@emitter(types.void, i64)
def fetch(e, p):
    """Ask for the first lines of what lies at an address."""
    for line in range(FIRST_LINES):
        e.prefetch(e.ptr(p), 64 * line)


def widen_keys(source, out, n_tiles, tile_bytes, column, n):
    """n columns of tiles of keys, halves, to floats [n_tiles][n][16]."""
    for t in range(n_tiles):
        for i in range(n):
            store(out + 64 * i, load_half(source + t * tile_bytes + 32 * (column + i)))
        out += 64 * n


def widen_values(source, out, n_rows, row_bytes, column, n):
    """n columns, whole vectors, of rows of values, halves, to floats [n_rows][n]."""
    for row in range(n_rows):
        for i in range(0, n, 16):
            store(out + 4 * i, load_half(source + row * row_bytes + 2 * (column + i)))
        out += 4 * n


def weigh(values, n, dim_v, dim_vp, chances, runs, parts, n_part, room, ask):
    """n values times the chances of some runs -> the values of their parts; ``ask``: read next."""
    stored = (dim_v + 31) // 32 * BLOCK_BYTES if BYTES == 1 else dim_vp * BYTES
    for first in range(0, n, PORTION):
        some, following, t = min(n - first, PORTION), first + PORTION, i64(0)
        asked = values + following * stored if following < n else ask
        while t < dim_vp // 16:
            source, row_bytes = values + first * stored, stored
            at_once = TILES if t + TILES <= dim_vp // 16 else 1
            if OPEN:
                open_values(source, room, some, stored, 16 * t, 16 * at_once)
                source, row_bytes = room, 64 * at_once
            else:
                source += 16 * SIZE * t
            for run in range(runs):
                x, to = (
                    chances + run * M * P_STEP + 4 * first,
                    parts + run * n_part + 128 + 64 * M * t,
                )
                if at_once == TILES:
                    more = asked + 16 * t * BYTES * some
                    weigh_group(source, 16 * SIZE, row_bytes, x, some, to, first, more)
                else:
                    weigh_one(source, 16 * SIZE, row_bytes, x, some, to, first, 0)
            t += at_once


def emit_rows(parts, n_part, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks):
    """The rows from row0 on of parts that are complete -> y."""
    token, member = row_first + row0 // group, row0 % group
    for m in range(min(RUNS * M, n_rows - row0)):
        h = head * group + member
        sink = get_f32(sinks + 4 * h) if sinks != 0 else np.float32(0)
        out = y + 4 * (token * n_head + h) * dim_v
        finish(parts + m // M * n_part, M, m % M, sink, sinks != 0, out, dim_v)
        token, member = row_after(token, member, group)


def attend(
    q, y, caches, starts, n_past, n_seq, layer, n_head, n_head_kv, dim, dim_v, scale: f32,
    window, cap: f32, slopes, bias, n_bias, sinks, causal, parts, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """Rows of queries over one block each, which leaves ``parts``, or, without these, over all blocks."""
    group, dim_vp = n_head // n_head_kv, (dim_v + 15) // 16 * 16
    n_part = 128 + 4 * M * dim_vp
    queries = scratch + worker * scratch_bytes
    scores = queries + RUNS * M * Q_STEP
    fresh = scores + RUNS * M * P_STEP  # parts of one block
    own = fresh + RUNS * n_part
    room = own + RUNS * n_part  # for a portion as floats
    seq, before = i64(0), i64(0)
    for piece in range(first, last):
        while True:
            n_rows, past, blocks = rows_and_past(seq, starts, n_past, group)
            if parts == 0:
                blocks = i64(1)
            tiles_of_rows = (n_rows + RUNS * M - 1) // (RUNS * M)
            pieces = tiles_of_rows * n_head_kv * blocks
            if piece - before < pieces or seq + 1 == n_seq:
                break
            before += pieces
            seq += 1
        p = piece - before
        head, row0 = p // blocks // tiles_of_rows, p // blocks % tiles_of_rows * (RUNS * M)
        row_first = get_i32(starts + 4 * seq)
        row1 = min(row0 + RUNS * M, n_rows)
        runs = (row1 - row0 + M - 1) // M
        here, there = past + row0 // group, past + (row1 - 1) // group
        low, high = visible(here, there, past + n_rows // group, window, causal)
        block_first, block_last = low // BLOCK, (high + BLOCK - 1) // BLOCK
        sum_parts = own
        if blocks > 1:
            sum_parts = parts + piece * RUNS * n_part
            b = p % blocks
            block_first, block_last = max(block_first, b), min(block_last, b + 1)
        table = get_i64(caches + 8 * seq) + layer * LAYER
        k_blocks, k_head = get_i64(table), head * get_i64(table + 16)
        v_blocks, v_head = get_i64(table + 8), head * get_i64(table + 24)
        fetch(get_i64(k_blocks + 8 * block_first) + k_head)
        token, member = row_first + row0 // group, row0 % group
        for m in range(runs * M):
            at = (token * n_head + head * group + member) * dim
            scaled_copy(queries + m * Q_STEP, q + 4 * at, dim, splat(scale))
            if row0 + m + 1 < n_rows:
                token, member = row_after(token, member, group)
        for block in range(block_first, block_last):
            n = min(high - block * BLOCK, BLOCK)
            tiles = (n + 15) // 16
            keys = get_i64(k_blocks + 8 * block) + k_head
            values = get_i64(v_blocks + 8 * block) + v_head
            ask = scores  # in a cache already; or else the keys that this thread reads next
            if block + 1 < block_last:
                ask = get_i64(k_blocks + 8 * block + 8) + k_head
            elif piece + 1 < last and p + 1 < pieces:
                after = (p + 1) // blocks // tiles_of_rows
                ask = get_i64(k_blocks + 8 * ((p + 1) % blocks)) + after * get_i64(table + 16)
            score(keys, tiles, dim, queries, runs, scores, room, values)
            fetch(values)  # its last tiles may have asked for nothing
            to = sum_parts if block == block_first else fresh
            for run in range(runs):
                run0 = row0 + run * M
                here, there = past + run0 // group, past + (min(run0 + M, row1) - 1) // group
                plain_from, plain_to = seen_whole(here, there, block * BLOCK, n, window, causal)
                if (cap != np.float32(0)) or (slopes != 0) or (bias != 0):
                    plain_from, plain_to = i64(0), i64(0)
                mine = scores + run * M * P_STEP
                if plain_to - plain_from < tiles:
                    token, member = here, run0 % group
                    for m in range(M):
                        slope = np.float32(0)
                        if slopes != 0:
                            slope = get_f32(slopes + 4 * (head * group + member))
                        more = bias
                        if bias != 0:
                            more = bias + 4 * n_bias * (head * group + member)
                        seen, i = reach(token, window), token - block * BLOCK
                        mask(
                            mine + m * P_STEP,
                            plain_from,
                            plain_to,
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
                        if run0 + m + 1 < n_rows:
                            token, member = row_after(token, member, group)
                exponentiate(mine, tiles, to + run * n_part)
            weigh(values, n, dim_v, dim_vp, scores, runs, to, n_part, room, ask)
            if block > block_first:
                for run in range(runs):
                    merge(sum_parts + run * n_part, fresh + run * n_part, M, dim_vp // 16)
        if blocks == 1:
            emit_rows(
                sum_parts, n_part, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks
            )


def merge_parts(
    y, starts, n_past, n_seq, n_head, n_head_kv, dim_v, window, sinks, parts,
    first, last, worker,
):  # fmt: skip
    """The parts of several blocks -> rows of y; a piece is the rows of a key head that they have in common."""
    group, tiles = n_head // n_head_kv, (dim_v + 15) // 16
    n_part = 128 + 64 * M * tiles
    seq, before, parts_before = i64(0), i64(0), i64(0)
    for piece in range(first, last):
        while True:
            n_rows, past, blocks = rows_and_past(seq, starts, n_past, group)
            tiles_of_rows = (n_rows + RUNS * M - 1) // (RUNS * M)
            n = tiles_of_rows * n_head_kv
            if (blocks > 1 and piece - before < n) or seq + 1 == n_seq:
                break
            if blocks > 1:
                before += n
            parts_before += n * blocks
            seq += 1
        p = piece - before
        head, row0 = p // tiles_of_rows, p % tiles_of_rows * (RUNS * M)
        row1 = min(row0 + RUNS * M, n_rows)
        here, there = past + row0 // group, past + (row1 - 1) // group
        low, high = visible(here, there, past + n_rows // group, window, 1)
        source = parts + (parts_before + p * blocks + low // BLOCK) * RUNS * n_part
        for run in range((row1 - row0 + M - 1) // M):
            into = source + run * n_part
            for b in range(1, (high + BLOCK - 1) // BLOCK - low // BLOCK):
                merge(into, into + b * RUNS * n_part, M, tiles)
        row_first = get_i32(starts + 4 * seq)
        emit_rows(source, n_part, y, row_first, row0, n_rows, head, group, n_head, dim_v, sinks)


# ---- compiled for a kind of cache and a number of rows

KINDS = {"f32": ("F32", 4), "f16": ("F16", 2), "q8_0": ("", 1)}  # as ``readers`` names them; bytes


@lru_cache
def maxima_of(m: int) -> Callable:
    """Make maxima(scores, tiles, out): write the largest score of each of m rows to out [m]."""

    @emitter(types.void, i64, i64, i64)
    def maxima(e, scores, tiles, out):
        """Write the largest score of each row to out."""
        ty, scores = V(F32, LANES), e.ptr(scores)

        def tile(i, most):
            at = e.at(scores, e.b.mul(i, I64(64)))
            values = [e.load(at, ty, P_STEP * row) for row in range(m)]
            return [e.select("<", v, x, x, v) for v, x in zip(values, most, strict=True)]

        for row, v in enumerate(e.loop(tiles, [e.const(HIDDEN, ty)] * m, tile)):
            e.store(e.fold(v, lambda x, y: e.select("<", x, y, y, x)), e.ptr(out), 4 * row)

    return maxima


@lru_cache
def tokens_of(n: int) -> int:
    """The tokens of a sequence for which its kernel is chosen: few numbers, as a recorded step serves one."""
    return n if n <= 2 else 4 if n <= 4 else max(SHAPES)


def rows_of(group: int, n: int) -> int:
    """Rows of a piece, for ``group`` query heads to a key head and sequences of up to n tokens."""
    n = group * tokens_of(n)
    return next((rows for rows in SHAPES if rows >= n), max(SHAPES))


def attend_kernel(kv: str, rows: int) -> jit.Kernel:
    """``attend`` for a kind of cache and so many rows of a piece."""
    kind, size = KINDS[kv]
    m, runs = shape_of(rows)
    opened = kv == "q8_0" or (kv == "f16" and runs > 1)
    read_as, read_size = KINDS["f32"] if opened else (kind, size)
    tiles = 2 if m >= 8 else MOST_TILES
    lines = {1: 0, tiles: max(tiles * 16 * size // 64, 1)}
    score = {n: rows_multiplier(read_as, m, n, Q_STEP, 64, P_STEP, lines[n]) for n in lines}
    weigh = {n: rows_multiplier(read_as, m, n, P_STEP, 64 * m, 64, lines[n]) for n in lines}
    return jit.kernel(
        attend,
        f"attend_{kv}_{rows}",
        score_group=score[tiles],
        score_one=score[1],
        weigh_group=weigh[tiles],
        weigh_one=weigh[1],
        open_keys=expand_keys if kv == "q8_0" else widen_keys,
        open_values=expand_values if kv == "q8_0" else widen_values,
        maxima=maxima_of(m),
        M=m,
        RUNS=runs,
        TILES=tiles,
        SIZE=read_size,
        BYTES=size,
        COLUMNS=16 * MOST_TILES if runs > 1 or opened else MAX_DIM,
        OPEN=opened,
    )


def merge_kernel(rows: int) -> jit.Kernel:
    """``merge_parts`` for so many rows of a piece."""
    m, runs = shape_of(rows)
    return jit.kernel(merge_parts, f"merge_parts_{rows}", M=m, RUNS=runs)
