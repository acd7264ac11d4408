"""Vector types and instructions for kernels, on whatever instruction set they are compiled for.

Two ways to write a kernel with this module:

* in Python: ``v = load(p); store(q, v * splat(2.0))`` with 16 lanes of float32, addresses being integers;
* as an *emitter*: a Python function that writes LLVM IR through ``Emit`` and so can unroll a loop over
  tokens and rows with a plain ``for``. ``emitter`` turns it into a function that kernels call.

Vectors have 16 lanes for every processor: LLVM splits what its registers do not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .emit import (
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    V16F,
    V,
)


class types:
    """The types of values, by numba's names."""

    void, int64, float32, float64 = ir.VoidType(), I64, F32, F64


i64, f32, f32x16 = I64, F32, V16F


@dataclass(frozen=True, eq=False)
class Emitter:
    """A function for kernels: ``emit(e, *values)`` writes what a call of it does."""

    emit: Callable
    ret: ir.Type
    args: tuple[ir.Type, ...]

    @property
    def __name__(self) -> str:
        return self.emit.__name__

    def __call__(self, *args: Any) -> Any:
        raise TypeError(f"{self.__name__} is an instruction of kernels; Python cannot call it")


def emitter(ret: ir.Type, *args: ir.Type) -> Callable[[Callable], Emitter]:
    """Turn ``gen(e, *values)``, which writes IR with an Emit, into a function of these types for kernels."""
    return lambda gen: Emitter(gen, ret, args)


@emitter(f32x16, i64)
def load(e, p):
    """16 floats at an address."""
    return e.load(e.ptr(p), V16F)


@emitter(types.void, i64, f32x16)
def store(e, p, v):
    """16 floats to an address."""
    e.store(v, e.ptr(p))


def _whole(e, n):
    """Whether n lanes are all. Nearly always: then a mask would cost more than what is done with the values."""
    return e.b.icmp_signed(">=", n, I64(LANES))


def _tail(e, n):
    """The mask of the first n lanes."""
    index = ir.Constant(V(I64, LANES), list(range(LANES)))
    return e.b.icmp_signed("<", index, e.splat(n, LANES))


@emitter(f32x16, i64, i64)
def load_n(e, p, n):
    """The first n lanes from an address, zeros in the others; memory behind them is not touched."""
    address, zero = e.b.bitcast(e.ptr(p), V16F.as_pointer()), e.const(0.0, V16F)
    with e.b.if_else(_whole(e, n)) as (whole, rest):
        with whole:
            here, everything = e.b.block, e.b.load(address, align=1)
        with rest:
            some = e.call("llvm.masked.load.v16f32.p0", V16F, address, I32(1), _tail(e, n), zero)
            there = e.b.block
    v = e.b.phi(V16F)
    v.add_incoming(everything, here)
    v.add_incoming(some, there)
    return v


@emitter(types.void, i64, f32x16, i64)
def store_n(e, p, v, n):
    """The first n lanes to an address."""
    address = e.b.bitcast(e.ptr(p), V16F.as_pointer())
    with e.b.if_else(_whole(e, n)) as (whole, rest):
        with whole:
            e.b.store(v, address, align=1)
        with rest:
            args = v, address, I32(1), _tail(e, n)
            e.call("llvm.masked.store.v16f32.p0", ir.VoidType(), *args)


@emitter(f32x16, i64)
def load_half(e, p):
    """16 halves at an address, as floats."""
    return e.half(e.load(e.ptr(p), V(I16, LANES)))


@emitter(types.void, i64, f32x16)
def store_half(e, p, v):
    """16 floats to an address, as halves."""
    e.store(e.to_half(v), e.ptr(p))


@emitter(f32x16, f32)
def splat(e, x):
    """One value in all lanes."""
    return e.splat(x, LANES)


@emitter(f32x16, f32x16, f32x16, f32x16)
def fma(e, x, y, z):
    """x * y + z."""
    return e.fma(x, y, z)


@emitter(f32x16, f32x16, f32x16)
def vmax(e, x, y):
    """The larger; a NaN in x stays."""
    return e.select("<", x, y, y, x)


@emitter(f32x16, f32x16, f32x16)
def vmin(e, x, y):
    """The smaller; a NaN in x stays."""
    return e.select(">", x, y, y, x)


@emitter(f32x16, f32x16)
def vabs(e, x):
    """Absolute values."""
    return e.call("llvm.fabs.v16f32", V16F, x)


@emitter(f32, f32x16)
def hsum(e, v):
    """The sum of the lanes, in a fixed tree."""
    return e.fold(v, e.b.fadd)


@emitter(f32, f32x16)
def hmax(e, v):
    """The largest lane."""
    return e.fold(v, lambda x, y: e.select("<", x, y, y, x))


# the series of e^f, its last term first
SERIES = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LEAST, LARGEST = -87.0, 88.0  # e^x is 0 below the one, and that of the other above it


def emit_exp(e, x):
    """e^x: 2^n times the series of e^f, |f| <= ln(2) / 2, cut after f^7 (error below 1e-8)."""
    b, ty = e.b, x.type
    high = e.const(LARGEST, ty)
    constants = exp_constants(e, ty, 1.5 * 2.0**23, SERIES)
    p, whole = exp_parts(e, e.select(">", x, high, high, x), constants)
    power = b.add(e.shl(whole, 23), e.const(127 << 23, whole.type))
    return exp_or_zero(e, x, p, power, constants)


def emit_exp_below(e, x, constants=None):
    """e^x of x <= 0, the bits of ``emit_exp`` with less work: half of p times 2^(n + 1)."""
    p, whole = exp_parts(e, x, constants or below_constants(e, x.type))
    return exp_or_zero(e, x, p, e.shl(whole, 23), constants or below_constants(e, x.type))


def below_constants(e, ty):
    """What ``emit_exp_below`` multiplies with and adds."""
    return exp_constants(e, ty, 1.5 * 2.0**23 + 128, [c / 2 for c in SERIES])


def exp_constants(e, ty, shift, series):
    """Least exponent, 1 / ln 2, a number behind whose point nothing fits, ln 2 in two parts (the first has few
    bits), the series.
    """
    return [
        e.const(c, ty)
        for c in (LEAST, 1.4426950408889634, shift, -0.693359375, 2.12194440e-4, *series)
    ]


def exp_parts(e, x, constants):
    """The series of e^f, and n in the lowest bits of an integer, of e^x = 2^n e^f."""
    _, inverse, shift, high, low, p, *series = constants
    whole = e.fma(x, inverse, shift)
    n = e.b.fsub(whole, shift)
    f = e.fma(n, low, e.fma(n, high, x))
    for c in series:
        p = e.fma(p, f, c)
    return p, e.b.bitcast(whole, V(I32, x.type.count))


def exp_or_zero(e, x, p, power, constants):
    """p times the float whose bits are power; 0 where x is so small that these are anything."""
    seen = e.b.fcmp_unordered(">=", x, constants[0])
    return e.b.select(seen, e.b.fmul(p, e.b.bitcast(power, x.type)), e.const(0.0, x.type))


@emitter(f32x16, f32x16)
def exp(e, x):
    """e^x, 0 below -87, e^88 above 88."""
    return emit_exp(e, x)


@emitter(f32x16, f32x16)
def exp_below(e, x):
    """The bits of ``exp`` for x that is not above 0."""
    return emit_exp_below(e, x)


def emit_tanh(e, x):
    """1 - 2 / (e^2x + 1); near 0, where that cancels, four terms of the series."""
    b, ty = e.b, x.type
    one, two = e.const(1.0, ty), e.const(2.0, ty)
    far = b.fsub(one, b.fdiv(two, b.fadd(emit_exp(e, b.fmul(x, two)), one)))
    q = b.fmul(x, x)
    p = e.const(-17 / 315, ty)
    for c in (2 / 15, -1 / 3):
        p = e.fma(p, q, e.const(c, ty))
    near = e.fma(b.fmul(p, q), x, x)
    size = e.call(f"llvm.fabs.v{ty.count}f32", ty, x)
    return e.select("<", size, e.const(0.15, ty), near, far)


@emitter(f32x16, f32x16)
def tanh(e, x):
    """The hyperbolic tangent."""
    return emit_tanh(e, x)


@emitter(f32x16, f32x16)
def erf(e, x):
    """The error function: Abramowitz and Stegun 7.1.26, absolute error below 2e-7."""
    b, ty = e.b, x.type
    size = e.call("llvm.fabs.v16f32", ty, x)
    t = b.fdiv(e.const(1.0, ty), e.fma(size, e.const(0.3275911, ty), e.const(1.0, ty)))
    p = e.const(1.061405429, ty)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = e.fma(p, t, e.const(c, ty))
    tail = b.fmul(b.fmul(p, t), emit_exp_below(e, b.fneg(b.fmul(x, x))))
    return e.call("llvm.copysign.v16f32", ty, b.fsub(e.const(1.0, ty), tail), x)


def _scalar(ty, llvm):
    @emitter(ty, i64)
    def read(e, p):
        v = e.load(e.ptr(p), llvm)
        return v if llvm in (I64, F32) else e.b.sext(v, I64)

    @emitter(types.void, i64, ty)
    def write(e, p, v):
        e.store(v if llvm in (I64, F32) else e.b.trunc(v, llvm), e.ptr(p))

    return read, write


get_i64, set_i64 = _scalar(i64, I64)
get_i32, set_i32 = _scalar(i64, I32)
get_i16, set_i16 = _scalar(i64, I16)
get_i8, set_i8 = _scalar(i64, I8)
get_f32, set_f32 = _scalar(f32, F32)


@emitter(f32, i64)
def get_half(e, p):
    """The half at an address, as a float."""
    one = e.b.insert_element(ir.Constant(V(I16, 1), ir.Undefined), e.load(e.ptr(p), I16), I32(0))
    return e.b.extract_element(e.half(one), I32(0))


@emitter(types.void, i64, f32)
def set_half(e, p, x):
    """A float to an address, as a half."""
    e.store(e.b.extract_element(e.to_half(e.splat(x, 1)), I32(0)), e.ptr(p))


@emitter(types.void, i64, i64, i64)
def copy(e, to, source, n):
    """n bytes."""
    args = (e.ptr(to), e.ptr(source), n, I1(0))
    e.call("llvm.memcpy.p0.p0.i64", ir.VoidType(), *args)


@emitter(types.void, i64, i64)
def clear(e, p, n):
    """Zeros in n bytes."""
    e.call("llvm.memset.p0.i64", ir.VoidType(), e.ptr(p), I8(0), n, I1(0))


@emitter(f32x16, i64)
def ramp(e, start):
    """start, start + 1, ... as floats; exact below 2^24."""
    steps = ir.Constant(V16F, [float(i) for i in range(LANES)])
    return e.b.fadd(e.splat(e.b.sitofp(start, F32), LANES), steps)


@emitter(f32x16, f32x16, f32x16, f32, f32, f32x16)
def where_within(e, v, x, low, high, other):
    """v where low <= x <= high, else other."""
    b = e.b
    above = b.fcmp_ordered(">=", x, e.splat(low, LANES))
    inside = b.and_(above, b.fcmp_ordered("<=", x, e.splat(high, LANES)))
    return b.select(inside, v, other)
