"""The minima of formats whose blocks are summed as integers: a small product of floats beside the large one.

y += sum over groups of columns of minimum * (d * sum of the group's codes), in ascending order and apart
from the other sums (``micro`` states it), so that registers are used as in any product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .emit import F32, I64, LANES, Emit, V, lanes
from .formats import Format, Tile
from .records import SLOTS, Activations, plane_bytes, record_bytes
from .simd import emitter, i64, types

TOKENS = 8  # multiplied at once
PARTS = 8  # parts of 32 columns in a block


def n_minima(fmt: Format) -> int:
    """How many minima a row has in each block; 0 if they are not summed apart."""
    return fmt.block // fmt.group if fmt.minima and fmt.span == 256 else 0


@lru_cache
def unpacker(fmt: Format) -> Callable:
    """Make unpack(w, n_blocks, out): write the minima of a tile of 16 rows, [n_blocks][n_minima][16]."""
    n = lanes()

    def put(e: Emit, p, to, first) -> None:
        parts = fmt.take(e, Tile(e, p, fmt, first, n))
        for j, v in enumerate(v for part in parts for v in part.minima):
            e.store(v, to, 64 * j)

    @emitter(types.void, i64, i64, i64)
    def unpack(e, w, n_blocks, out):
        """Write the minima of a tile of 16 rows to out, [n_blocks][n_minima][16]."""
        if n_minima(fmt) == 0:
            return

        def block(i, state):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            to = e.at(e.ptr(out), e.b.mul(i, I64(64 * n_minima(fmt))))
            e.each_run(lambda first: put(e, p, e.at(to, e.b.mul(first, I64(4))), first))
            return state

        e.loop(n_blocks, [], block)

    return unpack


def _sums(e: Emit, fmt: Format, minima: list, records, n_blocks, n: int) -> list:
    """Minima of n rows of some tiles times TOKENS tokens, as vectors [tile][token]."""
    names = ("ds",) if fmt.group == 32 else ("ds0", "ds1")
    count = n_minima(fmt)

    def block(i, acc):
        acc = list(acc)
        record = e.at(records, e.b.mul(i, I64(PARTS * record_bytes(SLOTS, fmt.span))))
        planes = e.at(record, fmt.span * SLOTS)
        tiles = [e.at(m, e.b.mul(i, I64(64 * count))) for m in minima]
        for j in range(count):
            part, half = divmod(j, len(names))
            f = e.at(planes, plane_bytes(SLOTS, fmt.span) * part)
            x = Activations(e, planes, f, SLOTS, n, fmt.span)
            ds = [x.field(t, names[half]) for t in range(TOKENS)]
            for k, tile in enumerate(tiles):
                v = e.load(tile, V(F32, n), 64 * j)
                for t in range(TOKENS):
                    acc[TOKENS * k + t] = e.fma(v, ds[t], acc[TOKENS * k + t])
        return acc

    zero = e.const(0.0, V(F32, n))
    return e.loop(n_blocks, [zero] * (TOKENS * len(minima)), block)


@lru_cache
def adder(fmt: Format, n_tiles: int) -> Callable:
    """Make add(minima, tile_bytes, records, n_blocks, sums): sums [n_tiles][16][16] += those of 8 tokens."""
    n = lanes()

    @emitter(types.void, i64, i64, i64, i64, i64)
    def add(e, minima, tile_bytes, records, n_blocks, sums):
        """Add the products of the minima with 8 tokens to sums [n_tiles][16][16]."""

        def rows(first) -> None:
            here = e.b.mul(first, I64(4))
            w, y = e.at(e.ptr(minima), here), e.at(e.ptr(sums), here)
            tiles = [e.at(w, e.b.mul(tile_bytes, I64(k))) for k in range(n_tiles)]
            for i, v in enumerate(_sums(e, fmt, tiles, e.ptr(records), n_blocks, n)):
                k, t = divmod(i, TOKENS)
                at = 1024 * k + 64 * t
                e.store(e.b.fadd(e.load(y, v.type, at), v), y, at)

        e.each_run(rows)

    return add


@emitter(types.void, i64, i64, i64, i64, i64, i64, i64)
def no_minima(e, minima, tile_bytes, records, n_blocks, sums, n, n_tiles):
    """Do nothing: for formats without minima, and those that add them with the other sums."""


@lru_cache
def tiles_adder(fmt: Format) -> Callable:
    """Make add(minima, tile_bytes, records, n_blocks, sums, n, n_tiles), for n <= 16 tokens.

    Two tiles are computed at once where vectors have 16 lanes.
    """
    wide = 2 if lanes() == LANES else 1
    if n_minima(fmt) == 0:
        return no_minima
    some, one = adder(fmt, wide), adder(fmt, 1)

    def add(minima, tile_bytes, records, n_blocks, sums, n, n_tiles):
        """Add the products of the minima of n_tiles tiles with n tokens to sums."""
        for slot in range(0, n, TOKENS):
            tile = 0
            while tile < n_tiles:
                here, to = minima + tile * tile_bytes, sums + tile * 1024 + 64 * slot
                if tile + wide <= n_tiles:
                    some(here, tile_bytes, records + 4 * slot, n_blocks, to)
                    tile += wide
                else:
                    one(here, tile_bytes, records + 4 * slot, n_blocks, to)
                    tile += 1

    return add
