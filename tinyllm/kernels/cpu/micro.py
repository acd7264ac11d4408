"""Micro-kernels for quantised weights: 16 rows times a few tokens, and unpacking a tile.

Activations are int8 in *records* of a format's ``span`` (32 or 256 columns, which share a scale) for S tokens
side by side (S = 1 in decode, else 16): ``codes [S][span] int8``, then for each 32 columns eight planes ``[S]``
of 4 bytes (``FIELDS``), broadcast to all rows when read.

Every path (decode, batches, prefill, all instruction sets) computes for each output, for each 32 columns in
ascending order, with exact integer sums t:

    acc = fma(float(t) * scale, d, acc)                                             one scale
    acc = fma(fma(float(t1), scale1, float(t0) * scale0), d, acc)                   one per 16 columns
    acc = fma(minimum, d * sum of codes, acc)                                       for each minimum

and where the span is 256, scales being integers, with the minima added up apart until the end,

    acc = fma(float(sum of t * scale) * unit, d, acc)                               once a block
    least = fma(minimum, d * sum of codes, least)
    y = acc + least

so the bits do not depend on the path.

Where activations must lose nothing (``compute="exact"``), a row of them becomes three rows of int8, its
*digits*: the second is what the first leaves, the third what the second leaves, each some 254 times finer. What
is left then is about 2 ** -24 of the largest of a span, as much as float32 rounds it by. An output is the sum
of those of its digits: first + (second + third).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, reduce

import numpy as np
from llvmlite import ir

from .emit import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    Emit,
    V,
    cpu_name,
    has_amx,
    has_i8mm,
    instruction_set,
    lanes,
)
from .formats import Format, Part, Tile, int8_format, whole_format
from .layout import shuffle
from .simd import emitter, i64, types

SMALLEST = 2.0**-120  # the inverse of scales below overflows: such activations count as 0
INVERSE_127 = float(np.float32(1 / 127))
SLOTS = 16  # tokens of a record when there are more than one
EXACT_DIGITS = 3  # rows of int8 that hold what a row of float32 does
# Orders of loading a tile. "parts": as its parts come, and what is ahead is asked for line by line. "outer": as
# parts, but what is ahead comes no nearer than the second-level cache, which keeps more requests under way than
# the first. "block": as LLVM likes within a block, and all lines ahead are asked for as it begins. "loads": as
# parts, load by load.
ORDERS = ("parts", "outer", "block", "loads")
# d: the scale. sum*d: of all 32, of the first and last 16. -8 * sum, -128 * sum; -sum of the first 16, and
# both halves' as 16-bit numbers
FIELDS = ("d", "ds", "ds0", "ds1", "n8", "n128", "n0", "n01")


def record_bytes(slots: int) -> int:
    """Bytes of 32 columns of ``slots`` tokens."""
    return slots * (32 + 4 * len(FIELDS))


def is_vnni() -> bool:
    """Whether the dot product takes unsigned codes up to 255."""
    return instruction_set() in ("avx512vnni", "avxvnni")


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
        i = FIELDS.index(name)
        ty = F32 if i < 4 else I32
        return self.e.broadcast(self.f, ty, self.n, 4 * (i * self.slots + token))

    def start(self, token: int, offset: int, half: int | None):
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


class Columns:
    """The products of a part's 32 columns of some rows with some tokens."""

    def __init__(self, e: Emit, fmt: Format, part: Part, x: Activations, tokens: range) -> None:
        self.e, self.fmt, self.part, self.x, self.tokens = e, fmt, part, x, tokens
        self.flip = fmt.signed and is_vnni()
        self.offset = 128 if self.flip else fmt.offset
        self.runs = [range(8)] if len(part.scales) == 1 else [range(4), range(4, 8)]

    def code(self, c: int):
        """4 codes of each row."""
        w = self.part.codes[c]()
        return self.e.b.xor(w, self.e.const(0x80808080, w.type)) if self.flip else w

    def start(self, half: int) -> list:
        """What the sums of a scale's columns begin with."""
        if self.part.unit is not None and multiplies_pairs():
            return [self.e.const(0, V(I32, self.x.n))] * len(self.tokens)
        which = half if len(self.runs) > 1 else None
        return [self.x.start(t, self.offset, which) for t in self.tokens]

    def sums(self, half: int, run: range | None = None) -> list:
        """The exact sums of a scale's columns, or of some of them, one per token."""
        if instruction_set() in ("avx2", "generic"):
            return self._sums_of_pairs(half)
        if has_i8mm() and len(self.tokens) > 1:
            return self._sums_of_two_tokens(half)
        totals = self.start(half)
        for c in run or self.runs[half]:
            w = self.code(c)
            xs = [self.x.codes(t, c) for t in self.tokens]
            some = zip(totals, xs, strict=True)
            totals = [self.e.dot(s, w, x4, self.fmt.signed) for s, x4 in some]
        return totals

    def _sums_of_two_tokens(self, half: int) -> list:
        """The sums by an instruction for two tokens; the last of an odd number of tokens goes twice."""
        e, run, last = self.e, self.runs[half], len(self.tokens) - 1
        twos = [(i, min(i + 1, last)) for i in range(0, last + 1, 2)]
        starts = self.start(half)
        totals = [e.interleave(starts[i], starts[j]) for i, j in twos]
        for c in run[::2]:
            rows = e.interleave(self.code(c), self.code(c + 1))
            for k, (i, j) in enumerate(twos):
                x = self.x.codes_of_two((self.tokens[i], self.tokens[j]), c)
                totals[k] = [e.dot_2x2(t, r, x) for t, r in zip(totals[k], rows, strict=True)]
        return [s for two in totals for s in e.separate(*two)][: last + 1]

    def pairs(self, half: int) -> Iterator[list]:
        """Partial sums in 16-bit lanes, each as long as it cannot overflow: two instructions, not three."""
        e, run = self.e, self.runs[half]
        fit = max(1, 32767 // (2 * 127 * (2**self.fmt.bits - 1)))
        for first in run[::fit]:
            sums: list = []
            for c in range(first, min(first + fit, run.stop)):
                if self.x.n > lanes():
                    e.in_order()  # two registers of rows leave no room for more columns
                w = self.code(c)
                more = [e.pairs(w, self.x.codes(t, c), self.fmt.signed) for t in self.tokens]
                sums = [e.b.add(s, m) for s, m in zip(sums, more, strict=True)] if sums else more
            yield sums

    def _sums_of_pairs(self, half: int) -> list:
        totals: list = []
        for pairs in self.pairs(half):
            totals = totals or self.start(half)  # not before it is needed: registers are few
            totals = [self.e.add_pairs(t, p) for t, p in zip(totals, pairs, strict=True)]
            if self.fmt.signed and len(totals) <= 4:  # beside sizes and signs registers run out
                totals = self.e.finish(totals)
        return totals

    def add_scaled(self, whole: list) -> list:
        """whole[token] + the sums times their integer scales."""
        e, scales = self.e, self.part.scales
        if self.offset and multiplies_pairs():
            whole = self._less_offset(whole)
        for half, scale in enumerate(scales):
            if instruction_set() == "avx2":
                both = shuffle(e, scale, (0, 1, 0, 1))
                for pairs in self.pairs(half):
                    whole = [e.add_pairs(w, p, both) for w, p in zip(whole, pairs, strict=True)]
            elif runs := self.short_runs(half):
                short = e.mask(scale, 0xFFFF)  # what is above would multiply a sum's sign
                for run in runs:
                    whole = self.add_products(whole, self.sums(half, run), short)
            else:
                some = zip(whole, self.sums(half), strict=True)
                whole = [e.b.add(w, e.b.mul(s, scale)) for w, s in some]
        return whole

    def short_runs(self, half: int) -> list[range]:
        """A scale's columns in runs whose sums 16 bits hold, where scaling these takes less than all."""
        run, most = self.runs[half], 255 if self.flip else 2**self.fmt.bits - 1
        fit, worth = 32767 // (4 * 127 * most), 2 if scales_in_two() else 1
        if not multiplies_pairs() or fit * worth < len(run):
            return []
        return [run[i : i + fit] for i in range(0, len(run), fit)]

    def add_products(self, totals: list, xs: list, y) -> list:
        """totals + xs * y, of both 16-bit numbers in each lane; LLVM would make two instructions of each.

        It does so for a single token, whose sums wait for each other.
        """
        e, ty = self.e, y.type
        some = zip(totals, xs, strict=True)
        if instruction_set() != "avx512vnni" or len(totals) == 1:
            return [add_products(e, t, x, y) for t, x in some]
        asm, types = "vpdpwssd $3, $2, $0", ir.FunctionType(ty, [ty] * 3)
        return [e.b.asm(types, asm, "=v,0,v,v", [t, x, y], False) for t, x in some]

    def _less_offset(self, whole: list) -> list:
        """whole[token] - offset * the sums of the token's codes times the scales: pairs of 16 bits."""
        both = offset_times_scales(self.e, self.offset, self.part.scales)
        return self.add_products(whole, [self.x.field(t, "n01") for t in self.tokens], both)


def offset_times_scales(e: Emit, offset: int, scales: list):
    """The offset times the scales of a part's halves, or twice times its only one: pairs of 16 bits."""
    low, high = (e.b.mul(s, e.const(offset, s.type)) for s in (scales * 2)[:2])
    return e.b.or_(e.mask(low, 0xFFFF), e.shl(high, 16))


def multiplies_pairs() -> bool:
    """Whether an instruction adds up two products of 16-bit numbers."""
    return instruction_set() in ("avx512vnni", "avxvnni", "avx2")


def scales_in_two() -> bool:
    """Whether the product of 32-bit lanes is two instructions inside: Intel's with AVX-512, not AMD's."""
    return instruction_set() == "avx512vnni" and not cpu_name().startswith("znver")


def add_products(e: Emit, total, x, y):
    """total + the products of the lower and of the upper 16 bits of each lane; where ``multiplies_pairs``."""
    if instruction_set() == "avx2":
        return e.add_pairs(total, x, y)
    return e.call_each(f"llvm.x86.avx512.vpdpwssd.{32 * lanes()}", total.type, total, x, y)


def scaled(e: Emit, part: Part, totals: list, x: Activations, token: int, acc):
    """acc + the sums of 32 columns, scaled: the formula in the module's text."""
    value = e.b.fmul(e.to_float(totals[0]), part.scales[0])
    for total, scale in zip(totals[1:], part.scales[1:], strict=True):
        value = e.fma(e.to_float(total), scale, value)
    return with_minima(e, part.minima, x, token, e.fma(value, x.field(token, "d"), acc))


def with_minima(e: Emit, minima: list, x: Activations, token: int, acc):
    """acc + the minima of 32 columns."""
    sums = ("ds",) if len(minima) == 1 else ("ds0", "ds1")
    for minimum, name in zip(minima, sums, strict=False):
        acc = e.fma(minimum, x.field(token, name), acc)
    return acc


def _add_parts(
    e: Emit, fmt: Format, parts: Callable, at: Callable, tokens: range, acc: list, order: str
) -> list:
    """acc[token] + the columns of a block; ``at(j)``: the activations of its part j."""
    for j, part in enumerate(parts()):
        if order != "block":
            e.in_order()
        x = at(j)
        columns = Columns(e, fmt, part, x, tokens)
        sums = zip(*(columns.sums(half) for half in range(len(part.scales))), strict=True)
        acc = [scaled(e, part, [*s], x, t, a) for s, t, a in zip(sums, tokens, acc, strict=True)]
    return acc


def rows_at_once(n_tokens: int) -> int:
    """Rows that a micro-kernel treats at once: one token's, two registers of 8 where registers are so short.

    So a tile streams by once, and what is read of activations serves both.
    """
    return LANES if lanes() == LANES // 2 and n_tokens == 1 else lanes()


def once(e: Emit, ahead, first, n: int):
    """``ahead`` for the first n rows of a tile; for others, whose lines are the same, 0."""
    if n == LANES:
        return ahead
    return e.b.select(e.b.icmp_signed("==", first, I64(0)), ahead, I64(0))


def _add_whole(
    e: Emit, fmt: Format, parts: Callable, at: Callable, tokens: range, acc: list, order: str
) -> list:
    """acc[token] + the columns of a block whose sums are added as integers.

    The last elements of ``acc`` are the sums of the minima.
    """
    acc, least = acc[: len(tokens)], acc[len(tokens) :]
    whole = [e.const(0, V(I32, acc[0].type.count))] * len(acc)
    if least:  # first, while registers are free
        for j, part in enumerate(parts()):
            x = at(j)
            least = [with_minima(e, part.minima, x, t, least[t]) for t in tokens]
    for j, part in enumerate(parts()):
        if order != "block":
            e.in_order()
        x = at(j)
        whole = e.finish(Columns(e, fmt, part, x, tokens).add_scaled(whole))
    ready = zip(whole, tokens, acc, strict=True)
    return [add_unit(e, s, part.unit, x.field(t, "d"), a) for s, t, a in ready] + least


def add_unit(e: Emit, whole, unit, d, acc):
    """acc + the integer sum of a block, scaled."""
    return e.fma(e.b.fmul(e.to_float(whole), unit), d, acc)


@lru_cache
def multiplier(
    fmt: Format,
    n_tokens: int,
    slots: int,
    resume: bool = False,
    order: str = "parts",
    joined: bool = False,
) -> Callable:
    """multiply(w, x, slot, n_blocks, y, ahead): one tile of 16 rows times tokens [slot, slot + n_tokens).

    w: the tile's blocks; x: the tokens' records; y [n_tokens][16] floats. The line ``ahead`` bytes behind each
    that is read is asked for; 0 asks for nothing new. With ``resume`` y is added to, and there is no ``ahead``:
    the blocks are in a cache. ``order``: see ``ORDERS``. ``joined``: the rows are digits of one token; y [16].
    """
    n, span = rows_at_once(n_tokens), fmt.span

    def rows(e: Emit, w, x, slot, n_blocks, y, first, ahead) -> None:
        ahead = None if ahead is None else once(e, ahead, first, n)
        x = e.ptr(x)
        codes = e.at(x, e.b.mul(slot, I64(span)))
        planes = e.at(x, e.b.add(I64(span * slots), e.b.mul(slot, I64(4))))

        def block(i, acc):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            if order == "block" and ahead is not None:
                for line in range(0, fmt.tile_bytes, 64):
                    e.prefetch(e.at(p, ahead), line)
            spread = None if order == "block" else ahead
            tile = Tile(e, p, fmt, first, n, spread, order == "loads", 2 if order == "outer" else 1)
            step = e.b.mul(i, I64(fmt.block // 32 * record_bytes(slots)))
            x, f = e.alone(e.at(codes, step)), e.alone(e.at(planes, step))

            def at(j):
                record, part = divmod(32 * j, span)
                here = record * span // 32 * record_bytes(slots)
                return Activations(
                    e, e.at(x, here + part), e.at(f, here + part * slots), slots, n, span
                )

            add = _add_parts if span == 32 else _add_whole
            return add(e, fmt, lambda: fmt.take(e, tile), at, range(n_tokens), acc, order)

        y, zero = e.at(e.ptr(y), e.b.mul(first, I64(4))), e.const(0.0, V(F32, n))
        places = [4 * LANES * t for t in range(n_tokens)]
        acc = [e.load(y, zero.type, p) if resume else zero for p in places]
        apart = span == 256 and fmt.minima
        acc = e.loop(n_blocks, acc + [zero] * (n_tokens * apart), block)
        if apart:
            acc = [
                e.b.fadd(v, least) for v, least in zip(acc[:n_tokens], acc[n_tokens:], strict=True)
            ]
        if joined:
            acc = [reduce(lambda rest, v: e.b.fadd(v, rest), reversed(acc))]
        for p, v in zip(places, acc, strict=False):
            e.store(v, y, p)

    @emitter(types.void, *[i64] * (5 if resume else 6))
    def multiply(e, w, x, slot, n_blocks, y, ahead=None):
        """Multiply a tile by tokens, and write the sums to y."""
        e.each_run(lambda first: rows(e, w, x, slot, n_blocks, y, first, ahead), n)

    return multiply


@lru_cache
def unpacked(fmt: Format, whole: bool = False) -> Format:
    """The form of a tile while many tokens are multiplied with it: codes as the dot product takes them best.

    ``whole``: blocks with integer scales stay so; else every 32 columns have floats.
    """
    signed = fmt.signed and not is_vnni()
    if whole and fmt.span == 256:
        offset = 0 if signed else 128 if fmt.signed else fmt.offset
        return whole_format(fmt.group, offset, signed, fmt.bits)
    plain = int8_format(fmt.group, fmt.minima)
    signed |= has_amx()
    offset = 0 if signed else 128 if fmt.signed else fmt.offset
    if is_vnni() and fmt.group == 32 and offset not in (0, 8):
        offset = 128  # what sums begin with then needs no shift for each token
    name = f"{plain.name}_{offset}_{fmt.bits}"
    return replace(plain, name=name, offset=offset, signed=signed, bits=fmt.bits)


def subtract_bytes(e: Emit, v, n: int):
    """n from each byte of the lanes."""
    ty = V(I8, 4 * v.type.count)
    return e.b.bitcast(e.b.sub(e.b.bitcast(v, ty), e.const(n, ty)), v.type)


@lru_cache
def unpacker(fmt: Format, form: Format) -> Callable:
    """unpack(w, n_blocks, out, ahead): a tile of 16 rows into a form of ``unpacked``.

    ``ahead``: as in ``multiplier``.
    """
    n = lanes()
    part_bytes = form.tile_bytes * 32 // form.block // 64 * 64

    def vectors(e: Emit, part: Part) -> list:
        codes = [code() for code in part.codes]
        if fmt.signed and not form.signed:
            codes = [e.b.xor(v, e.const(0x80808080, v.type)) for v in codes]
        elif fmt.offset != form.offset:
            codes = [subtract_bytes(e, v, fmt.offset - form.offset) for v in codes]
        scales = part.scales
        if part.unit is not None and form.span == 32:
            scales = [e.b.fmul(part.unit, e.to_float(s)) for s in scales]
        return codes + scales + part.minima

    def put(e: Emit, p, to, first, ahead) -> None:
        to = e.at(to, e.b.mul(first, I64(4)))
        for j, part in enumerate(fmt.take(e, Tile(e, p, fmt, first, n, once(e, ahead, first, n)))):
            e.in_order()
            for i, v in enumerate(vectors(e, part)):
                e.store(v, to, j * part_bytes + 4 * LANES * i)
        if form.span == 256:
            e.store(part.unit, to, form.tile_bytes - 64)

    @emitter(types.void, i64, i64, i64, i64)
    def unpack(e, w, n_blocks, out, ahead):
        """Write a tile as bytes with scales."""

        def block(i, state):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            to = e.at(e.ptr(out), e.b.mul(i, I64(fmt.block // form.block * form.tile_bytes)))
            e.each_run(lambda first: put(e, p, to, first, ahead))
            return state

        e.loop(n_blocks, [], block)

    return unpack


@lru_cache
def quantiser(slots: int, span: int, digit: int = 0) -> Callable:
    """Make quantise(x, record, slot): write ``span`` floats, or a later digit of them, into a record."""

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
        for i in range(span // 32):
            codes = [_rounded(e, b.fmul(p, inverse)) for p in v[2 * i : 2 * i + 2]]
            for j, c in enumerate(codes):
                e.store(b.trunc(c, V(I8, LANES)), to, 32 * i + 16 * j)
            for j, value in enumerate(_fields(e, d, codes)):
                e.store(value, planes, 4 * slots * (len(FIELDS) * i + j))

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


def _fields(e: Emit, d, codes: list) -> list:
    """``FIELDS`` of 32 columns, from their codes."""
    b = e.b
    s = [e.fold(c, b.add) for c in codes]
    both = b.add(*s)
    scaled = [b.fmul(d, b.sitofp(k, F32)) for k in (both, *s)]
    less = [b.neg(k) for k in s]
    halves = b.or_(b.and_(less[0], I32(0xFFFF)), b.shl(less[1], I32(16)))
    return [d, *scaled, b.mul(both, I32(-8)), b.mul(both, I32(-128)), less[0], halves]


def resuming(form: Format, n_tokens: int) -> Callable:
    """``multiplier`` for unpacked tiles."""
    return multiplier(form, n_tokens, SLOTS, resume=True)


@lru_cache
def tokens_multiplier(form: Format, one: Callable = resuming) -> Callable:
    """multiply(panels, panel_bytes, records, n, n_steps, n_tiles, y, ..): y += unpacked tiles times n tokens.

    They go by 8, 4 or 2 where there are 32 registers for their sums, by 4, 2 or 1 where there are 16, through
    what ``one(form, n_tokens)`` makes.
    """
    most = 8 if instruction_set() in ("avx512vnni", "neon") else 4
    half, quarter, per_block = most // 2, most // 4, form.block // 32
    many, some, few = (one(form, m) for m in (most, half, quarter))

    def multiply(panels, panel_bytes, records, n, n_steps, n_tiles, y, x_bytes, y_bytes):
        """Add the products of all tiles with n tokens to y."""
        n_blocks = n_steps // per_block
        for tile in range(n_tiles):
            panel, slot = panels + tile * panel_bytes, 0
            while slot < n:
                to = y + 1024 * tile + 64 * slot
                if n - slot > half:
                    many(panel, records, slot, n_blocks, to)
                    slot += most
                elif n - slot > quarter:
                    some(panel, records, slot, n_blocks, to)
                    slot += half
                else:
                    few(panel, records, slot, n_blocks, to)
                    slot += quarter

    return multiply
