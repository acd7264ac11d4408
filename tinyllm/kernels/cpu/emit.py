"""What kernels are compiled for, and the writer of LLVM IR that their vector code goes through.

``Emit`` has the few words that kernels need for vectors of any length. Only dot products of bytes
(``Emit.dot``) differ between instruction sets, and they are exact, so all sets give equal integers.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from ...errors import DeviceError
from ...system import allow_amx, arm_features, native_stderr

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
P8 = I8.as_pointer()
V = ir.VectorType
V16F, V16I = V(F32, LANES), V(I32, LANES)
NAME, FEATURES = "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"


@lru_cache(1)
def target() -> tuple[str, str, frozenset[str]]:
    """The triple, processor name and enabled features that kernels are compiled for.

    The host's, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name others, as for numba. A warning tells of
    names that LLVM does not know; DeviceError if the features have no signs, which would end the process.
    """
    check_names()
    features = features_text().split(",")
    return llvm.get_process_triple(), cpu_name(), frozenset(f[1:] for f in features if f[:1] == "+")


def chosen() -> dict[str, str]:
    """Those of the two variables that are set, and what they say."""
    return {name: os.environ[name] for name in (NAME, FEATURES) if os.environ.get(name) is not None}


def check_names() -> None:
    """Tell of what the variables name and LLVM does not know."""
    features = [f.strip() for f in chosen().get(FEATURES, "").split(",") if f.strip()]
    if wrong := [f for f in features if f[0] not in "+-"]:
        raise DeviceError(
            f"{FEATURES}={chosen()[FEATURES]}: {wrong[0]!r:.40} has no sign; "
            "expected names behind + or -, such as +avx2,+fma,+f16c"
        )
    for name, value in chosen().items():
        llvm.initialize_native_target()
        target = llvm.Target.from_triple(llvm.get_process_triple())
        given = {"cpu": value} if name == NAME else {"features": value}
        told = native_stderr(partial(target.create_target_machine, **given))
        if unknown := sorted(set(re.findall(r"'([^']*)' is not a recognized", told))):
            kind = "processor" if name == NAME else "feature"
            names = ", ".join(unknown)
            warnings.warn(
                f"{name}={value}: LLVM knows no {kind} {names}, and leaves it out", stacklevel=3
            )


def cpu_name() -> str:
    """The processor's name as LLVM has it: "haswell", "znver4", "generic", ..."""
    return os.environ.get(NAME) or llvm.get_host_cpu_name()


@lru_cache(1)
def features_text() -> str:
    """Features as LLVM reads them: "+avx2,-avx512f,..."."""
    if (features := os.environ.get(FEATURES)) is not None:
        return features
    # not cpu_name(): LLVM calls a processor newer than itself generic, too, and yet knows its features
    if os.environ.get(NAME, "").lower() == "generic":
        return ""
    return ",".join(filter(None, [llvm.get_host_cpu_features().flatten(), *_arm_features()]))


# Where the system does not tell what an ARM processor has, LLVM's name of it does.
BY_NAME = {
    "dotprod": "apple-(m|a1[3-9])|neoverse|cortex-(x|a55|a65|a7[5-8]|a[57][12])|ampere|oryon|grace",
    "i8mm": "apple-(m[2-9]|a1[5-9])|neoverse-(v|n[23])|cortex-(x[2-9]|a[57][12])|ampere|oryon|grace",
}


def _arm_features() -> list[str]:
    """Features as the operating system tells them: LLVM may know none, under emulation or on macOS, say."""
    if not is_arm():
        return []
    found = arm_features()
    if found is None:
        found = {name for name, processors in BY_NAME.items() if re.match(processors, cpu_name())}
    return [f"+{name}" for name in sorted(found)]


def is_arm() -> bool:
    """Whether the processor is one of 64-bit ARM."""
    return llvm.get_process_triple().startswith(("aarch64", "arm64"))


@lru_cache(1)
def instruction_set() -> str:
    """The byte dot product in use: "avx512vnni", "avxvnni", "avx2", "neon" or "generic"."""
    features = target()[2]
    if is_arm():
        return "neon" if "dotprod" in features else "generic"
    if {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c", "fma"} <= features:
        return "avx512vnni"
    if {"avx2", "f16c", "fma"} <= features:
        return "avxvnni" if "avxvnni" in features else "avx2"
    return "generic"


def instructions() -> str:
    """For people: the instruction set, and the unit for matrices of bytes if there is one."""
    unit = " and amx" if has_amx() else " and i8mm" if has_i8mm() else ""
    return instruction_set() + unit


@lru_cache(1)
def has_fma() -> bool:
    """Whether a fused multiply-add is an instruction; elsewhere it would be a slow library call."""
    return "fma" in target()[2] or is_arm()


@lru_cache(1)
def has_half() -> bool:
    """Whether half <-> float conversion is an instruction."""
    return "f16c" in target()[2] or is_arm()


@lru_cache(1)
def has_i8mm() -> bool:
    """Whether NEON has an instruction that multiplies 8 columns of two rows with those of two tokens."""
    return instruction_set() == "neon" and "i8mm" in target()[2]


@lru_cache(1)
def has_amx() -> bool:
    """Whether kernels are compiled for AMX and the system lets this process use it (Linux must be asked)."""
    if not {"amx-int8", "amx-tile", "avx512f"} <= target()[2]:
        return False
    return allow_amx()


def lanes() -> int:
    """Lanes of one 32-bit register: how many rows a micro-kernel treats at once."""
    return {"avx512vnni": 16, "avx2": 8, "avxvnni": 8}.get(instruction_set(), 4)


def in_a_register(ty) -> bool:
    """Whether a vector of integers or of float32 takes one register; otherwise it takes two."""
    bits = 32 if ty.element == F32 else ty.element.width
    return bool(bits * ty.count <= 32 * lanes())


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

    def alone(self, p):
        """An address in a register of its own, where AVX-512 multiplies by what lies there.

        LLVM would add two registers in each of these instructions, and Intel's processors split such ones.
        """
        if lanes() < LANES:
            return p
        return self.b.asm(ir.FunctionType(p.type, [p.type]), "", "=r,0", [p], False)

    def load(self, p, ty, offset=0, align=1):
        return self.b.load(self.b.bitcast(self.at(p, offset), ty.as_pointer()), align=align)

    def store(self, v, p, offset=0, align=1):
        self.b.store(v, self.b.bitcast(self.at(p, offset), v.type.as_pointer()), align=align)

    def prefetch(self, p, offset, level=1, to_write=False):
        """Ask for the cache line at an address, which may lie past what may be read.

        It comes into the caches from a level on.
        """
        args = (self.at(p, offset), I32(int(to_write)), I32(4 - level), I32(1))  # data
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

    def call_each(self, name, ret, *args):
        """``call`` of an instruction for each register that its vectors take: one, or two."""
        if in_a_register(ret):
            return self.call(name, ret, *args)
        half = V(ret.element, ret.count // 2)
        some = [[self.half_of(a, i) for a in args] for i in range(2)]
        return self.joined(*(self.call(name, half, *one) for one in some))

    def half_of(self, v, i):
        """The lower or the upper lanes of a vector; whatever is none stays whole."""
        if not isinstance(v.type, ir.VectorType):
            return v
        n = v.type.count // 2
        return self.b.shuffle_vector(v, v, ir.Constant(V(I32, n), list(range(i * n, i * n + n))))

    def joined(self, low, high):
        """The lanes of two vectors, one behind the other."""
        n = 2 * low.type.count
        return self.b.shuffle_vector(low, high, ir.Constant(V(I32, n), list(range(n))))

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

    def each_run(self, body: Callable, n: int = 0) -> None:
        """body(first) for each run of n rows of a tile, of those in a register if 0: a loop, not copies."""
        n = n or lanes()
        if n == LANES:
            body(I64(0))
        else:
            self.loop(LANES // n, [], lambda i, _: body(self.b.mul(i, I64(n))) or [])

    def loop_maybe(self, n, init: Sequence, body: Callable) -> list:
        """A loop as ``loop`` makes it, for n >= 0: it may not run at all."""
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
            # AVX-VNNI's, too: LLVM picks the encoding
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes()}"
            return self.call_each(name, total.type, total, codes, x4)
        if isa == "neon":
            v16b = V(I8, 16)
            a, c = self.b.bitcast(codes, v16b), self.b.bitcast(x4, v16b)
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", V(I32, n), total, a, c)
        return self.add_pairs(total, self.pairs(codes, x4, signed))

    def interleave(self, x, y):
        """The lanes of two vectors by turns: those of their first halves, those of their second halves."""
        n = x.type.count
        turns = [i + side for i in range(n) for side in (0, n)]
        return [
            self.b.shuffle_vector(x, y, ir.Constant(V(I32, n), t)) for t in (turns[:n], turns[n:])
        ]

    def separate(self, x, y):
        """The inverse of ``interleave``."""
        n = x.type.count
        lanes_of = [list(range(first, 2 * n, 2)) for first in (0, 1)]
        return [self.b.shuffle_vector(x, y, ir.Constant(V(I32, n), t)) for t in lanes_of]

    def dot_2x2(self, totals, rows, tokens):
        """totals + the sums of 8 products of signed bytes, exactly: 2 rows by 2 tokens; where ``has_i8mm``.

        totals: (row 0, token 0), (0, 1), (1, 0), (1, 1). rows and tokens: two times 8 bytes.
        """
        v16b = V(I8, 16)
        a, c = self.b.bitcast(rows, v16b), self.b.bitcast(tokens, v16b)
        return self.call("llvm.aarch64.neon.smmla.v4i32.v16i8", totals.type, totals, a, c)

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
            s = self.call_each("llvm.x86.avx2.psign.b", bytes_, s, u)
            u = self.call(f"llvm.abs.v{4 * n}i8", bytes_, u, I1(0))
        return self.call_each("llvm.x86.avx2.pmadd.ub.sw", pairs, u, s)

    def add_pairs(self, total, pairs, factors=None):
        """The other half: total + the sums of 2 neighbouring 16-bit lanes, on AVX2 times factors if given."""
        b, ty = self.b, total.type
        if instruction_set() == "avx2":
            ty16 = V(I16, 2 * ty.count)
            factors = b.bitcast(factors, ty16) if factors else self.const(1, ty16)
            pairs = b.bitcast(pairs, ty16)
            return b.add(total, self.call_each("llvm.x86.avx2.pmadd.wd", ty, pairs, factors))
        both, half = b.bitcast(pairs, ty), self.const(16, ty)
        return b.add(b.add(total, b.ashr(b.shl(both, half), half)), b.ashr(both, half))

    def finish(self, values: list) -> list:
        """Compute the values before anything that follows: LLVM would mix both until registers run out."""
        kind = {"x86_64": "v", "aarch6": "w"}.get(target()[0][:6])
        if kind is None or len(values) == 1:
            return values
        if not in_a_register(values[0].type):
            halves = self.finish([self.half_of(v, i) for v in values for i in range(2)])
            return [self.joined(*pair) for pair in zip(halves[::2], halves[1::2], strict=True)]
        kinds = [v.type for v in values]
        ty = ir.FunctionType(ir.LiteralStructType(kinds), kinds)
        places = [*[f"={kind}"] * len(values), *map(str, range(len(values))), "~{memory}"]
        out = self.b.asm(ty, "", ",".join(places), values, True)
        return [self.b.extract_value(out, i) for i in range(len(values))]

    def in_order(self) -> None:
        """Keep what is loaded from here on behind what was loaded before: LLVM would mix it."""
        self.b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)

    def _bytes_of_pairs(self, v):
        """The lower and the upper byte of each 16-bit lane, sign-extended."""
        v = self.b.bitcast(v, V(I16, 2 * v.type.count))
        eight = self.const(8, v.type)
        return self.b.ashr(self.b.shl(v, eight), eight), self.b.ashr(v, eight)
