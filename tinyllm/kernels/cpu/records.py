"""Activations as the kernels for quantised weights read them: records of int8 codes, scales and sums.

A record is ``span`` columns, which share a scale, of S tokens side by side: 32 or 256 columns; S = 1 in decode,
else 16. It is ``codes [S][span]`` int8, then for each 32 columns planes ``[S]`` of 4 bytes (``fields``), whose
values are broadcast to all rows when read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir

from .emit import F32, I8, I16, I32, I64, LANES, Emit, V, instruction_set
from .simd import emitter, i64, types

SMALLEST = 2.0**-120  # the inverse of scales below overflows: such activations count as 0
INVERSE_127 = float(np.float32(1 / 127))
SLOTS = 16  # tokens of a record when there are more than one
EXACT_DIGITS = 3  # rows of int8 that hold what a row of float32 does
# d: the scale. sum*d: of all 32, of the first and last 16. -8 * sum, -128 * sum; -sum of the first 16, and
# both halves' as 16-bit numbers
FIELDS = ("d", "ds", "ds0", "ds1", "n8", "n128", "n0", "n01")
# Pairs of 16-bit numbers: -32 * sum of each 8 columns, in two planes; -16 * sum of each half
PAIRS = ("n32_0", "n32_1", "n16")
# For sums of so many fours of columns the offset of codes, from -offset to offset - 1, that fit in 16 bits
OFFSETS = {2: 32, 4: 16, 8: 8}


def has_pairs() -> bool:
    """Whether records of 256 columns have ``PAIRS``."""
    return instruction_set() == "avx512vnni"


def fields(span: int) -> tuple[str, ...]:
    """The planes of each 32 columns of a record."""
    return FIELDS + PAIRS if span == 256 and has_pairs() else FIELDS


def plane_bytes(slots: int, span: int) -> int:
    """Bytes of the planes of 32 columns of ``slots`` tokens."""
    return 4 * slots * len(fields(span))


def record_bytes(slots: int, span: int) -> int:
    """Bytes of 32 columns of ``slots`` tokens, codes and planes."""
    return 32 * slots + plane_bytes(slots, span)


class Activations:
    """32 columns of S tokens: ``x`` is the address of their codes, ``f`` that of their planes."""

    def __init__(self, e: Emit, x, f, slots: int, n: int, span: int = 32) -> None:
        self.e, self.x, self.f, self.slots, self.n, self.span = e, x, f, slots, n, span

    def codes(self, token: int, c: int):
        """4 codes of a token in all lanes."""
        return self.e.broadcast(self.x, I32, self.n, self.span * token + 4 * c)

    def codes_of_two(self, tokens: tuple[int, int], c: int):
        """8 codes of a token, then 8 of another."""
        pair = ir.Constant(V(I64, 2), ir.Undefined)
        for i, token in enumerate(tokens):
            eight = self.e.load(self.x, I64, self.span * token + 4 * c)
            pair = self.e.b.insert_element(pair, eight, I32(i))
        return pair

    def field(self, token: int, name: str):
        """A value of a token in all lanes."""
        ty = F32 if name.startswith("d") else I32
        return self.e.broadcast(self.f, ty, self.n, self._place(token, name))

    def _place(self, token: int, name: str) -> int:
        return 4 * (fields(self.span).index(name) * self.slots + token)

    def short_start(self, token: int, run: range):
        """What the sum of a run of fours of columns begins with, in the lower 16 bits of each lane.

        It is -offset * the sum of the codes, for the offset of so long a run in ``OFFSETS``.
        """
        i = run.start // len(run)
        name = {2: f"n32_{i // 2}", 4: "n16", 8: "n8"}[len(run)]
        return self.e.broadcast(self.f, I32, self.n, self._place(token, name) + 2 * (i % 2))

    def start(self, token: int, offset: int, half: int | None = None):
        """What a sum begins with: -offset * the sum of the codes."""
        if offset == 0:
            return self.e.const(0, V(I32, self.n))
        if half is not None:
            n = self.field(token, "n01" if half else "n0")
            n = self.e.b.ashr(n, self.e.const(16, n.type)) if half else n
            return self.e.shl(n, offset.bit_length() - 1)
        if offset in (8, 128):
            return self.field(token, f"n{offset}")
        n8, shift = self.field(token, "n8"), offset.bit_length() - 4
        if shift > 0:
            return self.e.shl(n8, shift)
        return self.e.b.ashr(n8, self.e.const(-shift, n8.type))


@lru_cache
def quantiser(slots: int, span: int, digit: int = 0) -> Callable:
    """Make quantise(x, record, slot): write ``span`` floats, or a later digit of them, into a record."""
    names = fields(span)
    fields_of = _fields_with_pairs if "n16" in names else _fields

    @emitter(types.void, i64, i64, i64)
    def quantise(e, x, record, slot):
        """Write floats into a record, as int8 with one scale."""
        b, ty = e.b, V(F32, LANES)
        source, record = e.ptr(x), e.ptr(record)
        v = [e.load(source, ty, 4 * i) for i in range(0, span, LANES)]
        d, inverse = _scale(e, v)
        for _ in range(digit):
            less = e.splat(b.fneg(d), LANES)
            v = [e.fma(less, e.to_float(_rounded(e, b.fmul(p, inverse))), p) for p in v]
            d, inverse = _scale(e, v)
        to = e.at(record, b.mul(slot, I64(span)))
        planes = e.at(record, b.add(I64(span * slots), b.mul(slot, I64(4))))
        codes = [_rounded(e, b.fmul(p, inverse)) for p in v]
        for i, c in enumerate(codes):
            e.store(b.trunc(c, V(I8, LANES)), to, LANES * i)
        for i, values in enumerate(fields_of(e, d, codes)):
            for j, name in enumerate(names):
                e.store(values[name], planes, 4 * slots * (len(names) * i + j))

    return quantise


def _scale(e: Emit, vectors: list):
    """The scale of floats as int8, and in all lanes what they are multiplied by to become codes."""
    b = e.b
    most = _largest(e, [e.call("llvm.fabs.v16f32", v.type, v) for v in vectors])
    some = b.fcmp_ordered(">", most, F32(SMALLEST))
    inverse = b.select(some, b.fdiv(F32(127.0), most), F32(0.0))
    return b.fmul(most, F32(INVERSE_127)), e.splat(inverse, LANES)


def _largest(e: Emit, vectors: list):
    """The largest of all lanes, none of which has a sign; NaN if one is.

    As integers their bits are in the same order, those of NaN behind all others.
    """
    b = e.b

    def larger(p, q):
        return b.select(b.icmp_signed("<", p, q), q, p)

    bits = [b.bitcast(v, V(I32, LANES)) for v in vectors]
    while len(bits) > 1:
        bits = [larger(p, q) for p, q in zip(bits[::2], bits[1::2], strict=True)]
    return b.bitcast(e.fold(bits[0], larger), F32)


def _rounded(e: Emit, v):
    """The nearest integers."""
    return e.b.fptosi(e.call("llvm.rint.v16f32", v.type, v), V(I32, LANES))


def _fields(e: Emit, d, codes: list) -> Iterator[dict[str, Any]]:
    """The fields of each 32 columns, from their codes."""
    b = e.b
    for pair in zip(codes[::2], codes[1::2], strict=True):
        s = [e.fold(c, b.add) for c in pair]
        both = b.add(*s)
        sums = zip(("ds", "ds0", "ds1"), (both, *s), strict=True)
        less = [b.neg(k) for k in s]
        halves = b.or_(b.and_(less[0], I32(0xFFFF)), b.shl(less[1], I32(16)))
        yield {
            "d": d,
            **{name: b.fmul(d, b.sitofp(k, F32)) for name, k in sums},
            "n8": b.mul(both, I32(-8)),
            "n128": b.mul(both, I32(-128)),
            "n0": less[0],
            "n01": halves,
        }


def _fields_with_pairs(e: Emit, d, codes: list) -> Iterator[dict[str, Any]]:
    """The fields of each 32 of 256 columns, from their codes; all parts are computed at once."""
    b = e.b

    def times(v, factor: int):
        return b.mul(v, e.const(factor, v.type))

    def two_by_two(v):
        """Neighbouring lanes, of 16 bits, as one."""
        return b.bitcast(b.trunc(v, V(I16, v.type.count)), V(I32, v.type.count // 2))

    short = [b.trunc(c, V(I8, LANES)) for c in codes]
    while len(short) > 4:
        short = [e.joined(*two) for two in zip(short[::2], short[1::2], strict=True)]
    zeros, ones = e.const(0, V(I32, LANES)), e.const(0x01010101, V(I32, LANES))
    fours = [e.dot(zeros, ones, b.bitcast(v, zeros.type)) for v in short]
    eights = [b.add(*e.separate(*two)) for two in (fours[:2], fours[2:])]
    halves = b.add(*e.separate(*eights))
    first, last = e.separate(*(e.half_of(halves, i) for i in range(2)))
    both = b.add(first, last)
    n32 = two_by_two(times(e.joined(*eights), -32))
    n32_0, n32_1 = e.separate(*(e.half_of(n32, i) for i in range(2)))
    floats = [b.fmul(e.splat(d, 8), e.to_float(s)) for s in (both, first, last)]
    vectors = dict(zip(("ds", "ds0", "ds1"), floats, strict=True))
    vectors |= {"n8": times(both, -8), "n128": times(both, -128), "n0": times(first, -1)}
    vectors |= {"n01": two_by_two(times(halves, -1)), "n16": two_by_two(times(halves, -16))}
    vectors |= {"n32_0": n32_0, "n32_1": n32_1}
    for j in range(8):
        yield {"d": d, **{name: b.extract_element(v, I32(j)) for name, v in vectors.items()}}
