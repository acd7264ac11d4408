"""Vector types and instructions for kernels, on whatever instruction set they are compiled for.

Two ways to write a kernel with this module:

* in Python: ``v = load(p); store(q, v * splat(2.0))`` with 16 lanes of float32, addresses being integers;
* as an *emitter*: a Python function that writes LLVM IR through ``Emit`` and so can unroll a loop over
  tokens and rows with a plain ``for``. ``emitter`` turns it into a function that kernels call.

Vectors have 16 lanes for every processor: LLVM splits what its registers do not hold. Only dot products
of bytes differ between instruction sets (``Emit.dot``), and they are exact, so all sets give equal integers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
P8 = I8.as_pointer()
V = ir.VectorType
V16F, V16I = V(F32, LANES), V(I32, LANES)


@lru_cache(1)
def target() -> tuple[str, str, frozenset[str]]:
    """The triple, processor name and enabled features that kernels are compiled for.

    The host's, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name others, as for numba.
    """
    features = features_text().split(",")
    return llvm.get_process_triple(), cpu_name(), frozenset(f[1:] for f in features if f[:1] == "+")


def cpu_name() -> str:
    """As LLVM calls it: "haswell", "znver4", "generic", ..."""
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()


@lru_cache(1)
def features_text() -> str:
    """Features as LLVM reads them: "+avx2,-avx512f,..."."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is not None:
        return chosen
    if cpu_name().lower() == "generic":
        return ""
    return llvm.get_host_cpu_features().flatten()


@lru_cache(1)
def instruction_set() -> str:
    """The byte dot product in use: "avx512vnni", "avxvnni", "avx2", "neon" or "generic"."""
    triple, _, features = target()
    if triple.startswith(("aarch64", "arm64")):
        return "neon" if "dotprod" in features else "generic"
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"} <= features:
        return "avx512vnni"
    if {"avx2", "f16c", "fma"} <= features:
        return "avxvnni" if "avxvnni" in features else "avx2"
    return "generic"


@lru_cache(1)
def has_fma() -> bool:
    """Whether a fused multiply-add is an instruction; elsewhere it would be a slow library call."""
    triple, _, features = target()
    return "fma" in features or triple.startswith(("aarch64", "arm64"))


@lru_cache(1)
def has_half() -> bool:
    """Whether half <-> float conversion is an instruction."""
    triple, _, features = target()
    return "f16c" in features or triple.startswith(("aarch64", "arm64"))


def lanes() -> int:
    """Lanes of one 32-bit register: how many rows a micro-kernel treats at once."""
    return {"avx512vnni": 16, "avx2": 8, "avxvnni": 8}.get(instruction_set(), 4)


@lru_cache(1024)  # an operand of every other instruction, and slow to write out
def _constant(value, sign, element, count):
    """The value in all lanes; by its sign too, as -0.0 equals 0.0."""
    return ir.Constant(V(element, count), [value] * count)


class Emit:
    """An LLVM IR builder with the few words that vector kernels need. Offsets are bytes."""

    def __init__(self, builder: ir.IRBuilder):
        self.b = builder

    # ---- memory

    def ptr(self, address):
        return address if address.type == P8 else self.b.inttoptr(address, P8)

    def at(self, p, offset):
        return self.b.gep(p, [I64(offset) if isinstance(offset, int) else offset])

    def load(self, p, ty, offset=0, align=1):
        return self.b.load(self.b.bitcast(self.at(p, offset), ty.as_pointer()), align=align)

    def store(self, v, p, offset=0, align=1):
        self.b.store(v, self.b.bitcast(self.at(p, offset), v.type.as_pointer()), align=align)

    def prefetch(self, p, offset):
        """Ask for the cache line at an address, which may lie past what may be read."""
        args = (self.at(p, offset), I32(0), I32(3), I32(1))  # to read, into all levels, data
        self.call("llvm.prefetch.p0", ir.VoidType(), *args)

    # ---- values

    def const(self, value, ty):
        """A constant vector; float32 values are rounded first, as LLVM wants them exact."""
        v = float(np.float32(value)) if ty.element == F32 else value
        return _constant(v, math.copysign(1, v), ty.element, ty.count)

    def splat(self, scalar, n):
        ty = V(scalar.type, n)
        undef = ir.Constant(ty, ir.Undefined)
        one = self.b.insert_element(undef, scalar, I32(0))
        return self.b.shuffle_vector(one, undef, ir.Constant(V(I32, n), [0] * n))

    def broadcast(self, p, ty, n, offset=0):
        """The value at an address in all lanes."""
        return self.splat(self.load(p, ty, offset), n)

    def call(self, name, ret, *args):
        return self.b.call(self.function(name, ir.FunctionType(ret, [a.type for a in args])), args)

    def function(self, name, ty):
        """A function of LLVM's or the C library's, declared when first used."""
        module = self.b.module
        return module.globals.get(name) or ir.Function(module, ty, name)

    def room(self, ty):
        """The address of a value kept on the stack."""
        with self.b.goto_entry_block():
            return self.b.alloca(ty)

    def shr(self, v, n):
        return self.b.lshr(v, self.const(n, v.type)) if n else v

    def shl(self, v, n):
        return self.b.shl(v, self.const(n, v.type)) if n else v

    def mask(self, v, m):
        return self.b.and_(v, self.const(m, v.type))

    def fma(self, x, y, z):
        """x * y + z, rounded once where the processor can."""
        if has_fma():
            return self.call(f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)
        return self.b.fadd(self.b.fmul(x, y), z)

    def to_float(self, v):
        return self.b.sitofp(v, V(F32, v.type.count))

    def half(self, v):
        """Halves (as i16 lanes) to float32, exactly."""
        n = v.type.count
        if has_half():
            return self.b.fpext(self.b.bitcast(v, V(F16, n)), V(F32, n))
        return self._half_by_bits(self.b.zext(v, V(I32, n)))

    def _half_by_bits(self, h):
        """Exponent and mantissa into place, infinity and NaN with their own.

        Below 2^-14 a half counts steps of 2^-24: as bits of a float it would be taken for zero.
        """
        b, ty = self.b, h.type
        size = self.mask(h, 0x7FFF)
        bits = self.shl(size, 13)
        normal = b.add(bits, self.const(112 << 23, ty))
        special = b.or_(bits, self.const(0x7F800000, ty))
        steps = b.fmul(self.to_float(size), self.const(2.0**-24, V(F32, ty.count)))
        value = b.select(b.icmp_unsigned("<", size, self.const(0x7C00, ty)), normal, special)
        tiny = b.icmp_unsigned("<", size, self.const(0x0400, ty))
        value = b.select(tiny, b.bitcast(steps, ty), value)
        return b.bitcast(b.or_(value, self.shl(self.mask(h, 0x8000), 16)), steps.type)

    def to_half(self, v):
        """float32 to halves (as i16 lanes), to nearest even."""
        n = v.type.count
        if has_half():
            return self.b.bitcast(self.b.fptrunc(v, V(F16, n)), V(I16, n))
        return self._to_half_by_bits(v)

    def _to_half_by_bits(self, v):
        b, n = self.b, v.type.count
        ty = V(I32, n)
        bits = b.bitcast(v, ty)
        sign, a = self.shr(self.mask(bits, 0x80000000), 16), self.mask(bits, 0x7FFFFFFF)
        odd = self.mask(self.shr(a, 13), 1)
        normal = self.shr(
            b.add(b.sub(a, self.const(112 << 23, ty)), b.add(odd, self.const(0xFFF, ty))), 13
        )
        # below 2^-14 halves are multiples of 2^-24: adding 0.5 (whose last bit is 2^-24) rounds to them
        magic = b.fadd(b.bitcast(a, V(F32, n)), self.const(0.5, V(F32, n)))
        tiny = b.sub(b.bitcast(magic, ty), self.const(0x3F000000, ty))
        h = b.select(b.icmp_unsigned("<", a, self.const(113 << 23, ty)), tiny, normal)
        h = b.select(
            b.icmp_unsigned(">=", a, self.const(0x477FF000, ty)), self.const(0x7C00, ty), h
        )
        h = b.select(b.icmp_unsigned(">", a, self.const(0x7F800000, ty)), self.const(0x7E00, ty), h)
        return b.trunc(b.or_(h, sign), V(I16, n))

    def halves(self, v, width):
        """Fold a vector with itself in a fixed order: yields (low, high) until one lane is left."""
        while v.type.count > 1:
            n = v.type.count // 2
            low, high = (
                self.b.shuffle_vector(v, v, ir.Constant(V(I32, n), list(range(o, o + n))))
                for o in (0, n)
            )
            v = yield low, high

    def fold(self, v, f):
        """Reduce the lanes with f in a fixed tree, the same on every instruction set."""
        steps = self.halves(v, v.type.count)
        pair = next(steps)
        while True:
            v = f(*pair)
            try:
                pair = steps.send(v)
            except StopIteration:
                return self.b.extract_element(v, I32(0))

    def select(self, op, x, y, a, b):
        """Lanes of a where x op y holds (never with a NaN), of b elsewhere."""
        return self.b.select(self.b.fcmp_ordered(op, x, y), a, b)

    # ---- control

    def loop(self, n, init: Sequence, body: Callable) -> list:
        """for i in range(n), with n >= 1: state = body(i, state); returns the final state."""
        b = self.b
        before, inside, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(I64)
        i.add_incoming(I64(0), before)
        state = [b.phi(v.type) for v in init]
        for phi, v in zip(state, init, strict=True):
            phi.add_incoming(v, before)
        new = body(i, state)
        following, end = b.add(i, I64(1)), b.block
        i.add_incoming(following, end)
        for phi, v in zip(state, new, strict=True):
            phi.add_incoming(v, end)
        b.cbranch(b.icmp_signed("<", following, I64(n) if isinstance(n, int) else n), inside, after)
        b.position_at_end(after)
        return new

    def each_run(self, body: Callable) -> None:
        """body(first) for each run of rows of a tile that vectors hold: a loop, not copies of the body."""
        n = lanes()
        if n == LANES:
            body(I64(0))
        else:
            self.loop(LANES // n, [], lambda i, _: body(self.b.mul(i, I64(n))) or [])

    def loop_maybe(self, n, init: Sequence, body: Callable) -> list:
        """The same for n >= 0."""
        b = self.b
        before = b.block
        with b.if_then(b.icmp_signed(">", n, I64(0))):
            new = self.loop(n, init, body)
            end = b.block
        out = [b.phi(v.type) for v in init]
        for phi, v, w in zip(out, init, new, strict=True):
            phi.add_incoming(v, before)
            phi.add_incoming(w, end)
        return out

    # ---- dot products of bytes

    def dot(self, total, codes, x4, signed=False):
        """total + the sum of 4 neighbouring products of bytes, in each 32-bit lane, exactly.

        codes and x4 are i32 lanes of 4 bytes. Codes are 0..255 for "avx512vnni" and "avxvnni" and must
        be 0..127 elsewhere; with ``signed`` (never for those two) they are -128..127.
        """
        isa, n = instruction_set(), total.type.count
        if isa in ("avx512vnni", "avxvnni"):
            name = f"llvm.x86.avx512.vpdpbusd.{32 * n}"  # AVX-VNNI's, too: LLVM picks the encoding
            return self.call(name, total.type, total, codes, x4)
        if isa == "neon":
            v16b = V(I8, 16)
            a, c = self.b.bitcast(codes, v16b), self.b.bitcast(x4, v16b)
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", V(I32, n), total, a, c)
        return self.add_pairs(total, self.pairs(codes, x4, signed))

    def pairs(self, codes, x4, signed=False):
        """Half of a dot product, without an instruction for all: sums of 2 products, in 16-bit lanes.

        They just fit: 128 * 127 * 2 is 32,512.
        """
        b, n = self.b, codes.type.count
        bytes_, pairs = V(I8, 4 * n), V(I16, 2 * n)
        if instruction_set() != "avx2":
            u, s = self._bytes_of_pairs(codes), self._bytes_of_pairs(x4)
            return b.add(b.mul(u[0], s[0]), b.mul(u[1], s[1]))
        u, s = b.bitcast(codes, bytes_), b.bitcast(x4, bytes_)
        if signed:  # |w| * (x with w's sign)
            s = self.call("llvm.x86.avx2.psign.b", bytes_, s, u)
            u = self.call("llvm.abs.v32i8", bytes_, u, I1(0))
        return self.call("llvm.x86.avx2.pmadd.ub.sw", pairs, u, s)

    def add_pairs(self, total, pairs, factors=None):
        """The other half: total + the sums of 2 neighbouring 16-bit lanes, on AVX2 times factors if given."""
        b, ty = self.b, total.type
        if instruction_set() == "avx2":
            ty16 = V(I16, 2 * ty.count)
            factors = b.bitcast(factors, ty16) if factors else self.const(1, ty16)
            pairs = b.bitcast(pairs, ty16)
            return b.add(total, self.call("llvm.x86.avx2.pmadd.wd", ty, pairs, factors))
        both, half = b.bitcast(pairs, ty), self.const(16, ty)
        return b.add(b.add(total, b.ashr(b.shl(both, half), half)), b.ashr(both, half))

    def finish(self, values: list) -> list:
        """The same values, computed before anything that follows: LLVM would mix it until registers run out."""
        kind = {"x86_64": "v", "aarch6": "w"}.get(target()[0][:6])
        if kind is None or len(values) == 1:
            return values
        kinds = [v.type for v in values]
        ty = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
        places = [*[f"={kind}"] * len(values), *map(str, range(len(values))), "~{memory}"]
        out = self.b.asm(ty, "", ",".join(places), values, True)
        return [self.b.extract_value(out, i) for i in range(len(values))]

    def _bytes_of_pairs(self, v):
        """The lower and the upper byte of each 16-bit lane, sign-extended."""
        v = self.b.bitcast(v, V(I16, 2 * v.type.count))
        eight = self.const(8, v.type)
        return self.b.ashr(self.b.shl(v, eight), eight), self.b.ashr(v, eight)


# ---- the same for kernels in Python: types, and functions that write instructions


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


def _tail(e, n):
    """The mask of the first n lanes."""
    index = ir.Constant(V(I64, LANES), list(range(LANES)))
    return e.b.icmp_signed("<", index, e.splat(n, LANES))


@emitter(f32x16, i64, i64)
def load_n(e, p, n):
    """The first n lanes from an address, zeros in the others; memory behind them is not touched."""
    ty = V16F.as_pointer()
    zero = e.const(0.0, V16F)
    address = e.b.bitcast(e.ptr(p), ty)
    return e.call("llvm.masked.load.v16f32.p0", V16F, address, I32(1), _tail(e, n), zero)


@emitter(types.void, i64, f32x16, i64)
def store_n(e, p, v, n):
    """The first n lanes to an address."""
    address = e.b.bitcast(e.ptr(p), V16F.as_pointer())
    e.call("llvm.masked.store.v16f32.p0", ir.VoidType(), v, address, I32(1), _tail(e, n))


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


def emit_exp(e, x):
    """e^x: 2^n times the series of e^f, |f| <= ln(2) / 2, cut after f^7 (error below 1e-8)."""
    b, ty = e.b, x.type
    n_ty = V(I32, ty.count)
    low, high, shift = (e.const(c, ty) for c in (-87.0, 88.0, 1.5 * 2.0**23))
    y = e.select("<", x, low, low, e.select(">", x, high, high, x))
    whole = e.fma(y, e.const(1.4426950408889634, ty), shift)  # n in the lowest bits
    n = b.fsub(whole, shift)
    f = e.fma(n, e.const(-0.693359375, ty), y)  # ln 2 in two parts: the first has few bits
    f = e.fma(n, e.const(2.12194440e-4, ty), f)
    p = e.const(1 / 5040, ty)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = e.fma(p, f, e.const(c, ty))
    power = b.add(e.shl(b.bitcast(whole, n_ty), 23), e.const(127 << 23, n_ty))
    return e.select("<", x, low, e.const(0.0, ty), b.fmul(p, b.bitcast(power, ty)))


@emitter(f32x16, f32x16)
def exp(e, x):
    """e^x, 0 below -87, e^88 above 88."""
    return emit_exp(e, x)


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
    tail = b.fmul(b.fmul(p, t), emit_exp(e, b.fneg(b.fmul(x, x))))
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
