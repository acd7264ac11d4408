"""Products in float32 arithmetic, of weights that ``readers`` brings as floats.

A tile is 16 rows, column after column. For each output the products are added one by
one in ascending order of columns, whatever the number of tokens, so the bits do not depend on it.

One token: straight from the tiles. A few: likewise, some at a time, whose values of a column stand side by side
(``spread_rows``). More: some columns of a few tiles are widened to float32 side by side (a *panel*, which stays
in the first-level cache) while all tokens pass them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from .emit import F32, I32, I64, LANES, V16F, Emit, V, lanes
from .jit import GIVEN
from .readers import BYTES, Reader, widen
from .simd import (
    emitter,
    f32,
    f32x16,
    get_f32,
    get_i32,
    i64,
    load,
    load_n,
    set_f32,
    store,
    store_n,
    types,
)

TOKENS = 6  # multiplied at once: 6 x 64 accumulators just fit 32 registers of 16 lanes
GROUP = 4  # tiles multiplied at once
COLUMNS = 96  # columns that pass all tokens at once
FEW_COLUMNS = 256  # columns whose weights wait in a cache for the other tokens, when these are few
LINE = 16  # columns of a cache line of float32
PANEL_ROW = 4 * GROUP * LANES  # bytes
TOKEN_BLOCK = 86 * TOKENS  # tokens whose sums wait while the columns pass
UNROLLED = 4  # columns of one round
SPREAD = 256  # columns of a piece of ``spread_rows``


def accumulate(
    e: Emit, kind: str, bases: list, column_bytes, x, x_tokens: list[int], n_in, n: int, acc: list,
    ask, lines: int,
) -> list:  # fmt: skip
    """For each token, then each base: acc plus the products of n weights and x over columns i, in order of i.

    Column i of a base stands i * column_bytes on; the value of a token 4 * i + x_tokens[t] on in x.
    For each column so many lines are asked for, from ``ask`` on.
    """

    def columns(first, n_columns, acc):
        at, xi = e.b.mul(first, column_bytes), e.alone(e.at(x, e.b.mul(first, I64(4))))
        heads = [e.at(base, at) for base in bases]
        if lines:
            here = e.at(ask, e.b.mul(first, I64(64 * lines)))
            for line in range(n_columns * lines):
                e.prefetch(here, 64 * line)
        for c in range(n_columns):
            w = [widen(e, head, kind, 0, n) for head in heads]
            values = [e.broadcast(xi, F32, n, offset + 4 * c) for offset in x_tokens]
            products = [(v, x) for x in values for v in w]
            acc = [e.fma(v, x, a) for a, (v, x) in zip(acc, products, strict=True)]
            heads = [e.at(head, column_bytes) for head in heads]
        return acc

    def some(i, acc):
        return columns(e.b.mul(i, I64(UNROLLED)), UNROLLED, acc)

    rounds = e.b.sdiv(n_in, I64(UNROLLED))
    done = e.b.mul(rounds, I64(UNROLLED))
    acc = e.loop_maybe(rounds, acc, some)
    return e.loop_maybe(e.b.sub(n_in, done), acc, lambda i, acc: columns(e.b.add(done, i), 1, acc))


def sums_at(e: Emit, p, places: list[int], n: int, begins) -> list:
    """The sums of n lanes at some places, zeros if ``begins`` is 0: by one branch, not one for each."""
    zero, fresh = e.const(0.0, V(F32, n)), e.b.icmp_signed("==", begins, I64(0))
    start = e.b.block
    with e.b.if_then(e.b.not_(fresh)):
        found, end = [e.load(p, zero.type, place) for place in places], e.b.block
    sums = [e.b.phi(zero.type) for _ in places]
    for phi, v in zip(sums, found, strict=True):
        phi.add_incoming(zero, start)
        phi.add_incoming(v, end)
    return sums


@lru_cache
def rows_multiplier(
    kind: str, n_tokens: int, tiles: int, x_token: int, y_tile: int, y_token: int, lines: int
) -> Callable:
    """multiply(w, tile_bytes, column_bytes, x, n_in, y, begins, ask): y [tiles] [n_tokens] [16] += products.

    Tiles stand tile_bytes apart, their columns column_bytes; tokens of x x_token bytes, tiles of y y_tile and
    its tokens y_token. y is zero at first if ``begins`` is 0. Meanwhile memory from ``ask`` on is brought into
    the caches, so many lines for each column: what is read next.
    """
    n, size = lanes(), BYTES[kind]
    at_once = tiles if n == LANES else min(tiles, 2)  # smaller registers come in sixteens

    @emitter(types.void, *[i64] * 8)
    def multiply(e, w, tile_bytes, column_bytes, x, n_in, y, begins, ask):
        """Multiply tiles of rows by the rows of x."""
        w, x, y, ask = e.ptr(w), e.ptr(x), e.ptr(y), e.ptr(ask)
        cells = [(r, first) for first in range(0, LANES, n) for r in range(tiles)]
        tokens = [x_token * t for t in range(n_tokens)]
        for i in range(0, len(cells), at_once):
            some = cells[i : i + at_once]
            bases = [e.at(e.at(w, e.b.mul(tile_bytes, I64(r))), first * size) for r, first in some]
            places = [y_tile * r + y_token * t + 4 * l for t in range(n_tokens) for r, l in some]
            acc = sums_at(e, y, places, n, begins)
            asks = 0 if i else lines  # in the first pass alone
            how = column_bytes, x, tokens, n_in, n, acc, ask, asks
            for place, v in zip(places, accumulate(e, kind, bases, *how), strict=True):
                e.store(v, y, place)

    return multiply


@lru_cache
def multiplier(reader: Reader, tiles: int) -> Callable:
    """multiply(w, x, slot, n_blocks, y, ahead): neighbouring tiles times one token x [n_in] -> y [tiles][16].

    ``slot`` is not used; it keeps the signature of ``micro.multiplier``, which explains ``ahead``.
    """
    n = lanes()
    at_once = tiles if n == LANES else min(tiles, 2)  # smaller registers come in sixteens
    passes = tiles // at_once * (LANES // n)

    @emitter(types.void, i64, i64, i64, i64, i64, i64)
    def multiply(e, w, x, slot, n_blocks, y, ahead):
        """Multiply tiles by one row of x, and write the sums to y."""
        b, w, x, y = e.b, e.ptr(w), e.ptr(x), e.ptr(y)
        tile_bytes = b.mul(n_blocks, I64(reader.tile_bytes))

        def some(tile, first):
            bases = [e.at(w, b.mul(tile_bytes, b.add(tile, I64(r)))) for r in range(at_once)]

            def blocks(i, n_blocks, acc, ahead=None):
                at = b.mul(i, I64(reader.tile_bytes))
                xi = e.alone(e.at(x, b.mul(i, I64(4))))
                heads = [(e.at(base, at), first) for base in bases]
                for c, ws in enumerate(columns(e, reader, heads, n, n_blocks, ahead)):
                    value = e.broadcast(xi, F32, n, 4 * c)
                    acc = [e.fma(value, v, a) for v, a in zip(ws, acc, strict=True)]
                return acc

            acc = [e.const(0.0, V(F32, n))] * at_once
            to = e.at(y, b.mul(b.add(b.mul(tile, I64(LANES)), first), I64(4)))
            for r, v in enumerate(by_lines(e, reader, n_blocks, acc, blocks, ahead)):
                e.store(v, to, 4 * LANES * r)

        def each(i, state):
            runs = I64(LANES // n)
            some(b.mul(b.sdiv(i, runs), I64(at_once)), b.mul(b.srem(i, runs), I64(n)))
            return state

        e.loop(passes, [], each)

    return multiply


def columns(e: Emit, reader: Reader, heads: list, n: int, n_blocks: int, ahead) -> Iterator[tuple]:
    """The columns of some blocks of several tiles side by side; heads: their addresses and first rows."""
    taken = (reader.columns(e, p, first, n, n_blocks, ahead) for p, first in heads)
    return zip(*taken, strict=True)


def by_lines(e: Emit, reader: Reader, n_blocks, acc: list, blocks: Callable, ahead) -> list:
    """blocks(i, n, acc, ahead) for all blocks: n, those of a cache line, at once, and the last ones singly."""
    b, line = e.b, reader.line
    lines = b.sdiv(n_blocks, I64(line))
    done = b.mul(lines, I64(line))
    acc = e.loop_maybe(lines, acc, lambda i, acc: blocks(b.mul(i, I64(line)), line, acc, ahead))
    if line == 1:
        return acc
    return e.loop_maybe(b.sub(n_blocks, done), acc, lambda i, acc: blocks(b.add(done, i), 1, acc))


@emitter(types.void, *[i64] * 9)
def multiply_panel(e, panel, n_columns, x, row_bytes, n_rows, sums, begins, to, to_bytes):
    """sums [TOKENS][PANEL_ROW] += the panel's columns times those of n_rows rows of x.

    Rows that are missing repeat the last one. The sums are zero at first if ``begins`` is 0. Meanwhile memory
    is asked for, little by little, or the loads between would wait: the rows of x that come next, and rows
    of PANEL_ROW bytes that are written next, to_bytes apart.
    """
    b, n = e.b, lanes()
    panel, x, sums, to = e.ptr(panel), e.ptr(x), e.ptr(sums), e.ptr(to)
    tokens = [e.at(x, b.mul(at_most(e, t, n_rows), row_bytes)) for t in range(TOKENS)]
    ahead, lines = b.mul(row_bytes, I64(TOKENS)), b.sdiv(n_columns, I64(LINE))
    done = b.mul(lines, I64(LINE))
    registers = range(0, PANEL_ROW, 4 * n)
    at_once = GROUP if n == LANES else 2  # smaller registers come in sixteens
    for i in range(0, len(registers), at_once):
        some = registers[i : i + at_once]
        places = [t * PANEL_ROW + at for t in range(TOKENS) for at in some]

        def column(i, acc, some=some):
            here, xi = e.at(panel, b.mul(i, I64(PANEL_ROW))), b.mul(i, I64(4))
            w = [e.load(here, V(F32, n), at) for at in some]
            values = [e.broadcast(e.at(token, xi), F32, n) for token in tokens]
            pairs = [(x, v) for x in values for v in w]
            return [e.fma(v, x, a) for a, (x, v) in zip(acc, pairs, strict=True)]

        def line(i, acc, column=column, asks=i == 0):
            start, row = b.mul(i, I64(LINE)), e.at(to, b.mul(i, to_bytes))
            for token in tokens if asks else ():
                e.prefetch(e.at(token, b.add(ahead, b.mul(start, I64(4)))), 0)
            for place in range(0, PANEL_ROW, 64) if asks else ():
                e.prefetch(row, place, to_write=True)
            return e.loop(LINE, acc, lambda j, acc: column(b.add(start, j), acc))

        acc = sums_at(e, sums, places, n, begins)
        acc = e.loop_maybe(lines, acc, line)
        acc = e.loop_maybe(b.sub(n_columns, done), acc, lambda i, acc: column(b.add(done, i), acc))
        for place, v in zip(places, acc, strict=True):
            e.store(v, sums, place)


def few() -> int:
    """How many tokens are multiplied straight from the tiles: fewer than widening these pays for."""
    return 48 if lanes() == LANES else 16


def few_at_once(n_tokens: int) -> int:
    """How many of a few tokens are multiplied in a pass, as registers hold sums; a pass costs two more."""
    choices = (4, 6, 8, 12) if lanes() == LANES else (4, 6)
    return min(choices, key=lambda n: (-(-n_tokens // n) * (n + 2), -n))


def slots_of(at_once: int) -> int:
    """Places for the tokens of a pass, side by side: a power of two."""
    return 1 << (at_once - 1).bit_length()


@lru_cache
def spreader(slots: int) -> Callable:
    """Make spread(x, row_bytes, n_rows, out): 16 columns of x to out [16][slots]; the last row repeats."""

    @emitter(types.void, i64, i64, i64, i64)
    def spread(e, x, row_bytes, n_rows, out):
        """Write 16 columns of some rows of x, column by column."""
        x, out, half = e.ptr(x), e.ptr(out), slots // 2
        rows = [e.b.mul(at_most(e, t, n_rows), row_bytes) for t in range(slots)]
        v = [e.load(e.at(x, row), V16F) for row in rows]
        for _ in range(slots.bit_length() - 1):  # rows that are half of all apart, by turns
            v = [both for i in range(half) for both in e.interleave(v[i], v[i + half])]
        for i, some in enumerate(v):
            e.store(some, out, 64 * i)

    return spread


@lru_cache
def few_multiplier(reader: Reader, n_tokens: int) -> Callable:
    """Make multiply(w, tile_bytes, n_tiles, n_blocks, x, sums, begins, ahead).

    sums [n_tokens][PANEL_ROW] += some blocks of up to GROUP tiles, which stand tile_bytes apart, times
    x [columns][slots]. Tiles that are missing repeat the last one. The sums are zero at first if ``begins``
    is 0. ``ahead``: as in ``micro.multiplier``.
    """
    n, slots = lanes(), slots_of(n_tokens)
    at_once = GROUP if n == LANES and n_tokens <= TOKENS else 2  # 24 sums, or 12 of small registers
    cells = [(r, first) for first in range(0, LANES, n) for r in range(GROUP)]

    @emitter(types.void, *[i64] * 8)
    def multiply(e, w, tile_bytes, n_tiles, n_blocks, x, sums, begins, ahead):
        """Add the products of some blocks of tiles and columns of x to the sums."""
        b = e.b
        w, x, sums = e.ptr(w), e.ptr(x), e.ptr(sums)
        tiles = [e.at(w, b.mul(at_most(e, r, n_tiles), tile_bytes)) for r in range(GROUP)]
        for i in range(0, len(cells), at_once):
            some = cells[i : i + at_once]
            asks = ahead if i < GROUP else I64(0)  # later the lines are the same

            def blocks(i, n_blocks, acc, ahead=None, some=some):
                at = b.mul(i, I64(reader.tile_bytes))
                xi = e.alone(e.at(x, b.mul(i, I64(4 * slots))))
                heads = [(e.at(tiles[r], at), I64(first)) for r, first in some]
                for c, ws in enumerate(columns(e, reader, heads, n, n_blocks, ahead)):
                    e.in_order()  # registers do not hold the values of several columns at once
                    places = [4 * (slots * c + t) for t in range(n_tokens)]
                    values = [e.broadcast(xi, F32, n, place) for place in places]
                    both = [(v, value) for value in values for v in ws]
                    acc = [e.fma(v, value, a) for a, (v, value) in zip(acc, both, strict=True)]
                return acc

            places = [t * PANEL_ROW + 64 * r + 4 * l for t in range(n_tokens) for r, l in some]
            acc = sums_at(e, sums, places, n, begins)
            acc = by_lines(e, reader, n_blocks, acc, blocks, asks)
            for place, v in zip(places, acc, strict=True):
                e.store(v, sums, place)

    return multiply


def at_most(e: Emit, i: int, n):
    """i, or n - 1 if that is less."""
    last = e.b.sub(n, I64(1))
    return e.b.select(e.b.icmp_signed("<", I64(i), last), I64(i), last)


@lru_cache
def tile_widener(reader: Reader) -> Callable:
    """Make widen_tile(w, n_blocks, panel, ahead): write columns of a tile to a panel, as floats."""
    n = lanes()

    @emitter(types.void, i64, i64, i64, i64)
    def widen_tile(e, w, n_blocks, panel, ahead):
        """Write columns of a tile to a panel, as floats."""
        b, w, panel = e.b, e.ptr(w), e.ptr(panel)
        rounds = b.sdiv(n_blocks, I64(UNROLLED))
        done = b.mul(rounds, I64(UNROLLED))

        def blocks(i, n_blocks, ahead=None):
            source = e.at(w, b.mul(i, I64(reader.tile_bytes)))
            to = e.at(panel, b.mul(i, I64(PANEL_ROW)))

            def rows(first):
                here = e.at(to, b.mul(first, I64(4)))
                for c, v in enumerate(reader.columns(e, source, first, n, n_blocks, ahead)):
                    e.store(v, here, c * PANEL_ROW)

            e.each_run(rows)
            return []

        e.loop_maybe(rounds, [], lambda i, _: blocks(b.mul(i, I64(UNROLLED)), UNROLLED, ahead))
        e.loop_maybe(b.sub(n_blocks, done), [], lambda i, _: blocks(b.add(done, i), 1))

    return widen_tile


@lru_cache
def widener(kind: str) -> Callable:
    """Make weight(p, i): the i-th weight at p as a float."""
    size = BYTES[kind]

    @emitter(types.float32, i64, i64)
    def weight(e, p, i):
        """The i-th weight at p as a float."""
        at = e.at(e.ptr(p), e.b.mul(i, I64(size)))
        return e.b.extract_element(widen(e, at, kind, 0, 1), I32(0))

    return weight


# ---- kernels; the micro-kernels that they name are given by ``jit.kernel``

multiply = multiply_group = widen_tile = weight = store_row = spread = GIVEN


def matvec_float(w, x, y, bias, tile_bytes, n_blocks, ahead, tiles, first, last, worker):
    """y [n_out] of one token; a piece is GROUP tiles. y has room for whole tiles."""
    for piece in range(first, last):
        tile, stop = piece * GROUP, min(piece * GROUP + GROUP, tiles)
        if stop - tile == GROUP:
            multiply_group(w + tile * tile_bytes, x, 0, n_blocks, y + 64 * tile, ahead)
        else:
            for t in range(tile, stop):
                multiply(w + t * tile_bytes, x, 0, n_blocks, y + 64 * t, ahead)
        if bias != 0:
            for t in range(tile, stop):
                store(y + 64 * t, load(y + 64 * t) + load(bias + 64 * t))


def spread_rows(x, out, n_rows, n, at_once, slots, first, last, worker):
    """x [T, n] -> [T / at_once][n][slots]; spare slots hold anything. A piece is SPREAD columns of a pass."""
    pieces = (n + SPREAD - 1) // SPREAD
    for piece in range(first, last):
        row, begin = piece // pieces * at_once, piece % pieces * SPREAD
        source, to = x + 4 * row * n, out + 4 * (piece // pieces) * n * slots
        stop = min(begin + SPREAD, n)
        whole = begin + (stop - begin) // 16 * 16
        for i in range(begin, whole, 16):
            spread(source + 4 * i, 4 * n, n_rows - row, to + 4 * i * slots)
        for i in range(whole, stop):
            for slot in range(min(at_once, n_rows - row)):
                set_f32(to + 4 * (i * slots + slot), get_f32(source + 4 * (slot * n + i)))


def matmul_float_few(
    w, x, y, bias, tile_bytes, n_blocks, ahead, tiles, n_out, n_tokens, at_once, slots, scratch,
    scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """y [T, n_out] of a few tokens straight from the tiles, ``at_once`` a pass; a piece is GROUP tiles.

    x is as ``spread_rows`` leaves it.
    """
    for piece in range(first, last):
        tile = piece * GROUP
        n_tiles, source = min(GROUP, tiles - tile), w + tile * tile_bytes
        for begin in range(0, n_blocks, FEW_COLUMNS):
            n, sums = min(FEW_COLUMNS, n_blocks - begin), scratch + worker * scratch_bytes
            here, asks = source + begin * (tile_bytes // n_blocks), ahead
            for token in range(0, n_tokens, at_once):
                some = x + 4 * slots * (token // at_once * n_blocks + begin)
                multiply(here, tile_bytes, n_tiles, n, some, sums, begin, asks)
                sums += at_once * PANEL_ROW
                asks = 0  # the columns are in a cache now
        width, bias_here = min(16 * GROUP, n_out - 16 * tile), bias + 64 * tile if bias != 0 else 0
        for t in range(n_tokens):
            sums = scratch + worker * scratch_bytes + t * PANEL_ROW
            store_row(sums, y + 4 * (t * n_out + 16 * tile), width, bias_here)


def matmul_float(
    w, x, y, bias, tile_bytes, n_blocks, ahead, tiles, n_out, n_tokens, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """y [T, n_out] of many tokens; a piece is GROUP tiles and TOKEN_BLOCK tokens.

    COLUMNS of the tiles become floats together, and pass the tokens; the first time as many as are left over.
    """
    panel, groups = scratch + worker * scratch_bytes, (tiles + GROUP - 1) // GROUP
    row_bytes = 4 * n_blocks
    for piece in range(first, last):
        tile, token0 = piece % groups * GROUP, piece // groups * TOKEN_BLOCK
        n_tiles, token1 = min(GROUP, tiles - tile), min(token0 + TOKEN_BLOCK, n_tokens)
        width, bias_here = min(16 * GROUP, n_out - 16 * tile), bias + 64 * tile if bias != 0 else 0
        begin, n = i64(0), (n_blocks - 1) % COLUMNS + 1
        while begin < n_blocks:
            sums = panel + COLUMNS * PANEL_ROW
            for t in range(n_tiles):
                source = w + (tile + t) * tile_bytes + begin * (tile_bytes // n_blocks)
                widen_tile(source, n, panel + 64 * t, ahead)
            for token in range(token0, token1, TOKENS):
                rows, n_rows = x + 4 * (token * n_blocks + begin), min(TOKENS, token1 - token)
                if begin + n < n_blocks:
                    to = sums + TOKENS * PANEL_ROW
                    multiply_panel(panel, n, rows, row_bytes, n_rows, sums, begin, to, PANEL_ROW)
                else:
                    to = y + 4 * (token * n_out + 16 * tile)
                    multiply_panel(panel, n, rows, row_bytes, n_rows, sums, begin, to, 4 * n_out)
                    for t in range(n_rows):
                        store_row(sums + t * PANEL_ROW, to + 4 * t * n_out, width, bias_here)
                sums += TOKENS * PANEL_ROW
            begin += n
            n = i64(COLUMNS)


@lru_cache
def row_storer(activate: Callable | None) -> Callable:
    """Make store_row(source, to, n, bias): write n floats plus bias, through an activation function if any."""
    active = activate is not None

    def store_row(source, to, n, bias):
        """Write n floats plus bias, through the activation function if there is one."""
        for i in range(0, n, 16):
            v = load(source + 4 * i)
            if bias != 0:
                v = v + load(bias + 4 * i)
            if active:
                v = activate(v)
            if n - i >= 16:
                store(to + 4 * i, v)
            else:
                store_n(to + 4 * i, v, n - i)

    return store_row


def embed_float(w, ids, y, scale: f32, tile_bytes, n, first, last, worker):
    """Rows ids of w, scaled."""
    for t in range(first, last):
        row = get_i32(ids + 4 * t)
        base = w + (row // 16) * tile_bytes
        for j in range(n):
            set_f32(y + 4 * (t * n + j), weight(base, 16 * j + row % 16) * scale)


# ---- shared with the quantised formats


@emitter(types.void, i64, f32x16)
def stream(e, p, v):
    """Store to whole cache lines that are not read soon, past the caches."""
    address = e.b.bitcast(e.ptr(p), V16F.as_pointer())
    instruction = e.b.store(v, address, align=64)
    instruction.set_metadata("nontemporal", e.b.module.add_metadata([I32(1)]))


def store_tiles(sums, corner, n, n_tiles, n_out, column, bias, past):
    """sums [tile][16][16] of n tokens -> rows of y from ``column`` on, plus bias; no column past its end.

    Row by row, as rows may lie a page apart: written tile by tile they took a quarter of a product's time.
    With ``past`` the caches, lines are not first read from memory; it wants whole ones.
    """
    for t in range(n):
        source, to = sums + 64 * t, corner + 4 * t * n_out
        for first in range(column, column + 16 * n_tiles, 16):
            v = load(source)
            if bias != 0:
                v = v + load_n(bias + 4 * first, n_out - first)
            if past:
                stream(to, v)
            else:
                store_n(to, v, n_out - first)
            source += 1024
            to += 64


@emitter(f32, i64)
def as_float(e, v):
    """An integer as float32."""
    return e.b.sitofp(v, F32)
