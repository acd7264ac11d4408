"""F32, F16 and BF16 weights, in float32 arithmetic.

A tile is 16 rows, column after column: ``[n_in][16]``. For each output the products are added one by one in
ascending order of columns, whatever the number of tokens, so the bits do not depend on it. Activations of
more than one token are packed ``[n_in][TOKENS]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    Emit,
    V,
    arg,
    emitter,
    f32,
    float_arg,
    get_f32,
    get_i32,
    i64,
    lanes,
    load,
    set_f32,
    store,
    types,
)

TOKENS = 6  # multiplied at once: 6 x 64 accumulators just fit 32 registers of 16 lanes
GROUP = 4  # tiles multiplied at once
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def widen(e: Emit, p, kind: str, offset: int, n: int):
    """n weights of a type as float32."""
    if kind == "F32":
        return e.load(p, V(F32, n), offset)
    raw = e.load(p, V(I16, n), offset)
    if kind == "F16":
        return e.half(raw)
    return e.b.bitcast(e.shl(e.b.zext(raw, V(I32, n)), 16), V(F32, n))


def accumulate(
    e: Emit, kind: str, bases: list, column_bytes, x, x_step: int, x_tokens: list[int], n_in, n: int
) -> list:
    """For each token, then each base: the sum over columns i of n weights times x, in order of i.

    Column i of a base stands i * column_bytes on; the value of a token i * x_step + x_tokens[t] on in x.
    """

    def column(i, acc):
        at, xi = e.b.mul(i, column_bytes), e.at(x, e.b.mul(i, I64(x_step)))
        w = [widen(e, e.at(base, at), kind, 0, n) for base in bases]
        values = [e.broadcast(xi, F32, n, offset) for offset in x_tokens]
        products = [(v, x) for x in values for v in w]
        return [e.fma(v, x, a) for a, (v, x) in zip(acc, products, strict=True)]

    return e.loop(n_in, [e.const(0.0, V(F32, n))] * (len(x_tokens) * len(bases)), column)


@lru_cache
def rows_multiplier(kind: str, n_tokens: int, tiles: int, x_step: int, x_token: int) -> Callable:
    """multiply(w, tile_bytes, column_bytes, x, n_in, y): y [tiles][n_tokens][16].

    Tiles stand tile_bytes apart, their columns column_bytes; x steps x_step bytes a column and x_token
    bytes a token.
    """
    n, size = lanes(), BYTES[kind]
    at_once = tiles if n == LANES else min(tiles, 2)  # smaller registers come in sixteens

    @emitter(types.void, i64, i64, i64, i64, i64, i64)
    def multiply(e, w, tile_bytes, column_bytes, x, n_in, y):
        """See ``rows_multiplier``."""
        w, x, y = e.ptr(w), e.ptr(x), e.ptr(y)
        cells = [(r, first) for first in range(0, LANES, n) for r in range(tiles)]
        tokens = [x_token * t for t in range(n_tokens)]
        for i in range(0, len(cells), at_once):
            some = cells[i : i + at_once]
            bases = [e.at(e.at(w, e.b.mul(tile_bytes, I64(r))), first * size) for r, first in some]
            acc = iter(accumulate(e, kind, bases, column_bytes, x, x_step, tokens, n_in, n))
            for t in range(n_tokens):
                for r, first in some:
                    e.store(next(acc), y, 4 * (LANES * (r * n_tokens + t) + first))

    return multiply


@lru_cache
def multiplier(kind: str, n_tokens: int, tiles: int, slots: int) -> Callable:
    """multiply(w, x, slot, n_in, y): neighbouring tiles times tokens [slot, slot + n_tokens).

    x: [n_in][slots] floats; y: [tiles][n_tokens][16] floats.
    """
    size = BYTES[kind]
    n, tokens = lanes(), [4 * t for t in range(n_tokens)]
    at_once = tiles if n == LANES else min(tiles, 2)

    @emitter(types.void, i64, i64, i64, i64, i64)
    def multiply(e, w, x, slot, n_in, y):
        """See ``multiplier``."""
        tile_bytes = e.b.mul(n_in, I64(LANES * size))
        w, x, y = e.ptr(w), e.at(e.ptr(x), e.b.mul(slot, I64(4))), e.ptr(y)
        cells = [(r, first) for first in range(0, LANES, n) for r in range(tiles)]
        for i in range(0, len(cells), at_once):
            some = cells[i : i + at_once]
            bases = [e.at(e.at(w, e.b.mul(tile_bytes, I64(r))), first * size) for r, first in some]
            step = I64(LANES * size)
            acc = iter(accumulate(e, kind, bases, step, x, 4 * slots, tokens, n_in, n))
            for t in range(n_tokens):
                for r, first in some:
                    e.store(next(acc), y, 4 * (LANES * (r * n_tokens + t) + first))

    return multiply


@lru_cache
def widener(kind: str) -> Callable:
    """weight(p, i): the i-th weight at p as a float."""
    size = BYTES[kind]

    @emitter(types.float32, i64, i64)
    def weight(e, p, i):
        """See ``widener``."""
        at = e.at(e.ptr(p), e.b.mul(i, I64(size)))
        return e.b.extract_element(widen(e, at, kind, 0, 1), I32(0))

    return weight


# ---- kernels; the micro-kernels that they name are given by ``jit.kernel``

multiply = multiply_group = weight = None


def pack(args, first, last, worker):
    """x [T, n] -> [T / TOKENS][n][TOKENS]; spare slots repeat the last row. A piece is TOKENS rows."""
    x, out, n_rows, n = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    for piece in range(first, last):
        for slot in range(TOKENS):
            row = x + 4 * n * min(piece * TOKENS + slot, n_rows - 1)
            to = out + 4 * (piece * n * TOKENS + slot)
            for i in range(n):
                set_f32(to + 4 * TOKENS * i, get_f32(row + 4 * i))


def matvec_float(args, first, last, worker):
    """y [n_out] of one token; a piece is GROUP tiles. y has room for whole tiles."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_in, tiles = arg(args, 4), arg(args, 5), arg(args, 6)
    for piece in range(first, last):
        tile, stop = piece * GROUP, min(piece * GROUP + GROUP, tiles)
        if stop - tile == GROUP:
            multiply_group(w + tile * tile_bytes, x, 0, n_in, y + 64 * tile)
        else:
            for t in range(tile, stop):
                multiply(w + t * tile_bytes, x, 0, n_in, y + 64 * t)
        if bias != 0:
            for t in range(tile, stop):
                store(y + 64 * t, load(y + 64 * t) + load(bias + 64 * t))


def matmul_float(args, first, last, worker):
    """y [T, n_out] of many tokens; a piece is GROUP tiles."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_in, tiles, n_out = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    n_tokens, out = arg(args, 8), arg(args, 9) + worker * arg(args, 10)
    for piece in range(first, last):
        tile, stop = piece * GROUP, min(piece * GROUP + GROUP, tiles)
        for token in range(0, n_tokens, TOKENS):
            packed = x + 4 * token * n_in
            n = min(TOKENS, n_tokens - token)
            if stop - tile == GROUP:
                multiply_group(w + tile * tile_bytes, packed, 0, n_in, out)
            else:
                for t in range(tile, stop):
                    to = out + (t - tile) * TOKENS * 64
                    multiply(w + t * tile_bytes, packed, 0, n_in, to)
            for t in range(tile, stop):
                source = out + (t - tile) * TOKENS * 64
                store_tile(source, y + 4 * (token * n_out + 16 * t), n, n_out, 16 * t, bias)


def embed_float(args, first, last, worker):
    """Rows ids of w, scaled."""
    w, ids, y, scale = arg(args, 0), arg(args, 1), arg(args, 2), float_arg(args, 3)
    tile_bytes, n = arg(args, 4), arg(args, 5)
    for t in range(first, last):
        row = get_i32(ids + 4 * t)
        base = w + (row // 16) * tile_bytes
        for j in range(n):
            set_f32(y + 4 * (t * n + j), weight(base, 16 * j + row % 16) * scale)


# ---- shared with the quantised formats


def store_tile(out, corner, n, n_out, column, bias):
    """out [n][16] -> rows of y, without the columns beyond its end, plus bias."""
    width = min(16, n_out - column)
    for t in range(n):
        source, to = out + 64 * t, corner + 4 * t * n_out
        if width == 16:
            v = load(source)
            if bias != 0:
                v = v + load(bias + 4 * column)
            store(to, v)
        else:
            for i in range(width):
                x = get_f32(source + 4 * i)
                if bias != 0:
                    x += get_f32(bias + 4 * (column + i))
                set_f32(to + 4 * i, x)


@emitter(f32, i64)
def as_float(e, v):
    """An integer as float32."""
    return e.b.sitofp(v, F32)
