"""F32, F16 and BF16 weights in bfloat16 arithmetic with float32 sums, for more than one token: opt-in.

Weights and activations lose what is behind the 8th binary digit; products are exact, and sums are float32. On
a matrix unit (Intel AMX) one instruction multiplies 16 tokens, 16 rows and 32 columns; elsewhere AVX512-BF16
multiplies 2 columns of 16 rows.

Activations become *records* of 16 tokens and 32 columns, ``[16][32]``, once for all matrices that read them. A
tile of weights becomes a *panel* while all tokens pass it: for each pair of columns, ``[16][2]``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from ...errors import DeviceError
from . import amx, jit
from .amx import VOID
from .elementwise import ACTIVATIONS
from .emit import F32, I8, I16, I32, I64, LANES, V16F, Emit, V, has_amx, target
from .floats import GROUP, PANEL_ROW, row_storer
from .jit import GIVEN
from .program import CPUArray, Tape
from .readers import BYTES, widen
from .simd import clear, emitter, f32x16, i64, load, load_n, types
from .weights import CPUWeight

SLOTS = 16  # tokens of a record
WIDTH = 32  # columns of a record
RECORD = 2 * SLOTS * WIDTH  # bytes
COLUMNS = 1024  # columns of a panel
PANEL = COLUMNS // WIDTH * RECORD  # bytes
TOKENS = 2 * SLOTS  # multiplied at once, with two tiles
TOKEN_BLOCK = 512  # whose sums wait while the columns pass
AT_ONCE = 8  # tokens whose sums, with those of two tiles, registers hold
SUMS, LEFT, RIGHT = ((0, 1), (2, 3)), (4, 5), (6, 7)  # tile registers


class _BFloat(ir.Type):
    """LLVM's type bfloat, for which llvmlite has no class."""

    def __str__(self) -> str:
        return "bfloat"


# the results and operands of instructions; LLVM 15 took them for integers
ROUNDED = V(_BFloat(), WIDTH) if llvm.llvm_version_info[0] >= 16 else V(I16, WIDTH)
PAIRS = ROUNDED if llvm.llvm_version_info[0] >= 16 else V(I32, LANES)


def available() -> bool:
    """Whether kernels are compiled for a processor that multiplies bfloat16."""
    return {"avx512bf16", "avx512bw", "avx512vl"} <= target()[2]


def has_unit() -> bool:
    """Whether a matrix unit does so too."""
    return "amx-bf16" in target()[2] and has_amx()


def check_available() -> None:
    """DeviceError where there are no such instructions."""
    if not available():
        raise DeviceError(
            "compute='bf16' needs a processor with AVX512-BF16 (Intel from Cooper Lake on, AMD from Zen 4 "
            "on), which this one is not; leave compute out"
        )


class RoundedWeight(CPUWeight):
    """A matrix of floats, stored as any other, that is multiplied as bfloat16 with more than one token."""


# ---- rounding


def rounded(e: Emit, low, high):
    """Two vectors as 32 bfloat16, to nearest even."""
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return e.b.bitcast(e.call(name, ROUNDED, high, low), V(I16, WIDTH))


def paired(e: Emit, first, second):
    """Two columns of 16 rows as bfloat16, row by row side by side."""
    both = rounded(e, first, second)
    order = [i for row in range(LANES) for i in (row, LANES + row)]
    return e.b.shuffle_vector(both, both, ir.Constant(V(I32, WIDTH), order))


@emitter(types.void, i64, f32x16, f32x16)
def store_rounded(e, p, low, high):
    """32 floats to an address, as bfloat16."""
    e.store(rounded(e, low, high), e.ptr(p))


@lru_cache
def packer(kind: str) -> Callable:
    """Make pack(w, n_columns, panel): write columns of a tile to a panel; an odd last one gets zeros."""
    column_bytes = LANES * BYTES[kind]

    @emitter(types.void, i64, i64, i64)
    def pack(e, w, n_columns, panel):
        """Write columns of a tile to a panel."""
        b, w, panel = e.b, e.ptr(w), e.ptr(panel)

        def pair(i, n):
            source = e.at(w, b.mul(i, I64(2 * column_bytes)))
            columns = [widen(e, source, kind, c * column_bytes, LANES) for c in range(n)]
            columns += [e.const(0.0, V16F)] * (2 - n)
            e.store(paired(e, *columns), panel, b.mul(i, I64(64)))
            return []

        pairs = b.ashr(n_columns, I64(1))
        e.loop_maybe(pairs, [], lambda i, _: pair(i, 2))
        e.loop_maybe(b.and_(n_columns, I64(1)), [], lambda i, _: pair(pairs, 1))

    return pack


def round_rows(x, out, n_rows, n, first, last, worker):
    """x [T, n] -> records; a piece is SLOTS tokens, of which those behind the last repeat it."""
    to = out + first * ((n + WIDTH - 1) // WIDTH) * RECORD
    for piece in range(first, last):
        # record by record: the lines of a row lie where caches have few places
        for i in range(0, n, WIDTH):
            for slot in range(SLOTS):
                p = x + 4 * (n * min(piece * SLOTS + slot, n_rows - 1) + i)
                if n - i >= WIDTH:
                    store_rounded(to, load(p), load(p + 64))
                else:
                    store_rounded(to, load_n(p, n - i), load_n(p + 64, n - i - 16))
                to += 2 * WIDTH


# ---- multiplying: multiply(panels, records, x_bytes, n_steps, sums, begins)
#
# sums [32 tokens][PANEL_ROW] of two neighbouring panels += them times records, which go on for the second
# 16 tokens x_bytes behind; n_steps records of each. Sums are zero at first if ``begins`` is 0.


@emitter(types.void)
def start(e):
    """Shape the tile registers of the matrix unit: all have 16 rows of 64 bytes."""
    config = e.room(ir.ArrayType(I8, 64))
    p = e.b.bitcast(config, e.ptr(I64(0)).type)
    e.store(ir.Constant(V(I8, 64), [0] * 64), p)
    e.store(I8(1), p)  # palette 1
    for register in range(8):
        e.store(I16(64), p, 16 + 2 * register)
        e.store(I8(16), p, 48 + register)
    e.call("llvm.x86.ldtilecfg", VOID, p)


@emitter(types.void, i64, i64, i64, i64, i64, i64)
def multiply_unit(e, panels, records, x_bytes, n_steps, sums, begins):
    """On the matrix unit; an operand is loaded as soon as the product before has read its register."""
    b, panels, records, sums = e.b, e.ptr(panels), e.ptr(records), e.ptr(sums)
    places = [(SUMS[t][r], SLOTS * PANEL_ROW * t + 64 * r) for t in range(2) for r in range(2)]

    def tile(what, register, p, stride):
        e.call(f"llvm.x86.tile{what}64", VOID, I8(register), p, I64(stride))

    with b.if_else(b.icmp_signed("==", begins, I64(0))) as (fresh, more):
        with fresh:
            for register, _ in places:
                e.call("llvm.x86.tilezero", VOID, I8(register))
        with more:
            for register, place in places:
                tile("loadd", register, e.at(sums, place), PANEL_ROW)

    def step(i, _):
        at = b.mul(i, I64(RECORD))
        x, w = e.at(records, at), e.at(panels, at)
        tile("loadd", RIGHT[0], w, 64)
        tile("loadd", LEFT[0], x, 64)
        tile("loadd", LEFT[1], e.at(x, x_bytes), 64)
        tile("loadd", RIGHT[1], e.at(w, PANEL), 64)
        for t, r in ((0, 0), (1, 0), (0, 1), (1, 1)):
            e.call("llvm.x86.tdpbf16ps", VOID, I8(SUMS[t][r]), I8(LEFT[t]), I8(RIGHT[r]))
        return []

    e.loop(n_steps, [], step)
    for register, place in places:
        tile("stored", register, e.at(sums, place), PANEL_ROW)


@emitter(types.void, i64, i64, i64, i64, i64, i64)
def multiply_vectors(e, panels, records, x_bytes, n_steps, sums, begins):
    """With AVX512-BF16, AT_ONCE tokens at a time."""
    b, panels, records, sums = e.b, e.ptr(panels), e.ptr(records), e.ptr(sums)
    fresh = b.icmp_signed("==", begins, I64(0))
    name = "llvm.x86.avx512bf16.dpbf16ps.512"

    def dot(total, w, x):
        return e.call(name, V16F, total, b.bitcast(x, PAIRS), b.bitcast(w, PAIRS))

    def some(first):
        x = e.at(records, x_bytes if first >= SLOTS else 0)
        rows = [2 * WIDTH * ((first + t) % SLOTS) for t in range(AT_ONCE)]
        places = [PANEL_ROW * (first + t) + 64 * r for t in range(AT_ONCE) for r in range(2)]

        def pair(i, acc):
            step, place = b.ashr(i, I64(4)), b.and_(i, I64(15))
            here = e.at(x, b.add(b.mul(step, I64(RECORD)), b.mul(place, I64(4))))
            at = e.at(panels, b.mul(i, I64(64)))
            ws = [e.load(at, V(I32, LANES), PANEL * r) for r in range(2)]
            xs = [e.broadcast(here, I32, LANES, row) for row in rows]
            products = [(w, value) for value in xs for w in ws]
            return [dot(a, *product) for a, product in zip(acc, products, strict=True)]

        zero = e.const(0.0, V(F32, LANES))
        acc = [b.select(fresh, zero, e.load(sums, V16F, place)) for place in places]
        acc = e.loop(b.mul(n_steps, I64(WIDTH // 2)), acc, pair)
        for v, place in zip(acc, places, strict=True):
            e.store(v, sums, place)

    for first in range(0, TOKENS, AT_ONCE):
        some(first)


@emitter(types.void, i64, i64, i64)
def fetch_rows(e, p, n_rows, row_bytes):
    """Ask for the lines of n_rows rows of outputs, to write to."""
    rows = e.ptr(p)

    def row(i, state):
        for line in range(0, PANEL_ROW, 64):
            e.prefetch(e.at(rows, e.b.mul(i, row_bytes)), line, to_write=True)
        return state

    e.loop(n_rows, [], row)


# ---- the kernel; what it names is given by ``jit.kernel``

pack = multiply = store_row = begin = end = GIVEN


def matmul_bfloat(
    w, x, y, bias, tile_bytes, n_blocks, tiles, n_out, n_tokens, x_bytes, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """y [T, n_out] of many tokens; a piece is GROUP tiles and TOKEN_BLOCK tokens. A block is a column."""
    panels = scratch + worker * scratch_bytes
    groups = (tiles + GROUP - 1) // GROUP
    begin()
    for piece in range(first, last):
        tile, token0 = piece % groups * GROUP, piece // groups * TOKEN_BLOCK
        n_tiles, token1 = min(GROUP, tiles - tile), min(token0 + TOKEN_BLOCK, n_tokens)
        width, bias_here = min(16 * GROUP, n_out - 16 * tile), bias + 64 * tile if bias != 0 else 0
        for column in range(0, n_blocks, COLUMNS):
            n = min(COLUMNS, n_blocks - column)
            steps = (n + WIDTH - 1) // WIDTH
            for t in range(n_tiles):
                panel = panels + t * PANEL
                if n % WIDTH != 0:
                    clear(panel + (steps - 1) * RECORD, RECORD)
                pack(w + (tile + t) * tile_bytes + column * (tile_bytes // n_blocks), n, panel)
            sums = panels + GROUP * PANEL
            for token in range(token0, token1, TOKENS):
                records = x + token // SLOTS * x_bytes + column // WIDTH * RECORD
                corner, n_rows = y + 4 * (token * n_out + 16 * tile), min(TOKENS, token1 - token)
                if column + n == n_blocks:
                    fetch_rows(corner, n_rows, 4 * n_out)
                for t in range(0, n_tiles, 2):
                    to = sums + 64 * t
                    multiply(panels + t * PANEL, records, x_bytes, steps, to, column)
                if column + n == n_blocks:
                    for t in range(n_rows):
                        store_row(sums + t * PANEL_ROW, corner + 4 * t * n_out, width, bias_here)
                sums += TOKENS * PANEL_ROW
    end()


# ---- compiled and recorded


def round_array(tape: Tape, x: CPUArray) -> CPUArray:
    """x [T, n] as records."""
    n_rows, n = x.shape
    pieces = -(-n_rows // TOKENS) * 2
    out = tape.array((pieces, -(-n // WIDTH) * RECORD), "u1")
    tape.add(jit.kernel(round_rows), pieces, x=x, out=out, n_rows=n_rows, n=n)
    return out


def matmul_kernel(
    tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str
) -> tuple[jit.Kernel, dict[str, Any], int]:
    """The kernel for many tokens in bfloat16, some of its arguments, and its number of pieces."""
    size = GROUP * PANEL + -(-min(n_tokens, TOKEN_BLOCK) // TOKENS) * TOKENS * PANEL_ROW
    scratch = tape.array((n_workers, size), "u1")
    names = {"pack": packer(w.kind), "store_row": row_storer(ACTIVATIONS[act] if act else None)}
    if has_unit():
        how, names = "unit", names | {"multiply": multiply_unit, "begin": start, "end": amx.stop}
    else:
        nothing = {"begin": amx.nothing, "end": amx.nothing}
        how, names = "vectors", names | {"multiply": multiply_vectors, **nothing}
    kernel = jit.kernel(matmul_bfloat, f"matmul_bf16_{how}_{w.kind}_{act}", **names)
    pieces = -(-w.n_tiles // GROUP) * -(-n_tokens // TOKEN_BLOCK)
    more: dict[str, Any] = {"tiles": w.n_tiles, "n_out": w.n_out, "n_tokens": n_tokens}
    more |= {"x_bytes": -(-w.n_in // WIDTH) * RECORD, "scratch": scratch, "scratch_bytes": size}
    return kernel, more, pieces
