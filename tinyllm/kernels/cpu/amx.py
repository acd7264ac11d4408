"""Intel AMX: a matrix unit for int8, 16 tokens x 16 rows x 32 columns in one instruction.

It computes the same exact integer sums as the byte dot products; scaling follows in the order that ``micro``
states, so results are equal to the bit. A tile of sums leaves the unit through memory (first-level cache).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import lru_cache

from llvmlite import ir

from .formats import Format, Tile
from .simd import F32, I8, I16, I32, I64, LANES, Emit, V, emitter, i64, target, types

SLOTS = 16
VOID = ir.VoidType()
SUMS, LEFT, RIGHT = (0, 1), (4, 5), (6, 7)  # tile registers


@lru_cache(1)
def available() -> bool:
    """Whether kernels are compiled for AMX and the system lets this process use it (Linux must be asked)."""
    if not {"amx-int8", "amx-tile", "avx512f"} <= target()[2] or sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@lru_cache
def starter(group: int) -> Callable:
    """start(): shape the tile registers for ``group`` columns at once."""

    @emitter(types.void)
    def start(e):
        """See ``starter``."""
        config = e.room(ir.ArrayType(I8, 64))
        config.align = 64
        p = e.b.bitcast(config, e.ptr(I64(0)).type)
        e.store(ir.Constant(V(I8, 64), [0] * 64), p)
        e.store(I8(1), p)  # palette 1
        shapes = {**dict.fromkeys(SUMS, (16, 64)), **dict.fromkeys(LEFT, (16, group))}
        shapes |= dict.fromkeys(RIGHT, (group // 4, 64))
        for register, (rows, row_bytes) in shapes.items():
            e.store(I16(row_bytes), p, 16 + 2 * register)
            e.store(I8(rows), p, 48 + register)
        e.call("llvm.x86.ldtilecfg", VOID, p)

    return start


@emitter(types.void)
def nothing(e):
    """Where a processor has no matrix unit to start or stop."""


@emitter(types.void)
def stop(e):
    """Give the tile registers back, so that the system need not save them."""
    e.call("llvm.x86.tilerelease", VOID)


def _sums(e: Emit, record, codes, group: int, g: int, k: int, zeros, out):
    """The sums of ``group`` columns for 16 tokens x 16 rows, to ``out`` [16][16] int32.

    Loading zeros, all rows from one address, takes half the time of a tilezero: that one makes the product
    wait for the register's last use (15 against 25 ns for product and store on a Sapphire Rapids Xeon).
    """
    c, a, b = I8(SUMS[k]), I8(LEFT[k % 2]), I8(RIGHT[k % 2])
    e.call("llvm.x86.tileloadd64", VOID, c, zeros, I64(0))
    e.call("llvm.x86.tileloadd64", VOID, a, e.at(record, group * g), I64(32))
    e.call("llvm.x86.tileloadd64", VOID, b, e.at(codes, 16 * group * g), I64(64))
    e.call("llvm.x86.tdpbssd", VOID, c, a, b)
    e.call("llvm.x86.tilestored64", VOID, c, out, I64(64))


@lru_cache
def multiplier(form: Format) -> Callable:
    """multiply(panel, records, slot, n_steps, y): y += an unpacked tile of signed codes times 16 tokens.

    Several products are under way at once, each in a register of its own, since nothing renames them.
    """
    n_groups = 32 // form.group
    at_once = len(SUMS) // n_groups  # steps of 32 columns

    @emitter(types.void, i64, i64, i64, i64, i64)
    def multiply(e, panel, records, slot, n_steps, y):
        """See ``multiplier``."""
        b = e.b
        memory = e.room(ir.ArrayType(I8, 1024 * len(SUMS) + 64))
        memory.align = 64
        sums = b.bitcast(memory, e.ptr(I64(0)).type)
        zeros = e.at(sums, 1024 * len(SUMS))
        e.store(e.const(0, V(I32, LANES)), zeros)

        def steps(first, n, acc):
            records_, codes_, outs = [], [], []
            for u in range(n):
                i = b.add(first, I64(u))
                records_.append(e.at(e.ptr(records), b.mul(i, I64(64 * SLOTS))))
                codes_.append(e.at(e.ptr(panel), b.mul(i, I64(form.tile_bytes))))
                outs.append(e.at(sums, 1024 * n_groups * u))
                for g in range(n_groups):
                    k = n_groups * u + g
                    _sums(e, records_[u], codes_[u], form.group, g, k, zeros, e.at(sums, 1024 * k))
            for record, codes, out in zip(records_, codes_, outs, strict=True):
                part = next(iter(form.take(e, Tile(e, codes, form, 0, LANES))))
                acc = [_scale(e, part, out, record, t, a) for t, a in enumerate(acc)]
            return acc

        n_rounds = b.sdiv(n_steps, I64(at_once))
        done = b.mul(n_rounds, I64(at_once))
        acc = [e.load(e.ptr(y), V(F32, LANES), 64 * t) for t in range(SLOTS)]
        acc = e.loop_maybe(
            n_rounds, acc, lambda i, acc: steps(b.mul(i, I64(at_once)), at_once, acc)
        )
        acc = e.loop_maybe(b.sub(n_steps, done), acc, lambda i, acc: steps(b.add(done, i), 1, acc))
        for t, v in enumerate(acc):
            e.store(v, e.ptr(y), 64 * t)

    return multiply


def _scale(e: Emit, part, sums, record, token: int, acc):
    from .micro import Activations, scaled  # it imports this module

    x = Activations(e, record, e.at(record, 32 * SLOTS), SLOTS, LANES)
    totals = [e.load(sums, V(I32, LANES), 1024 * g + 64 * token) for g in range(len(part.scales))]
    return scaled(e, part, totals, x, token, acc)
