"""Micro-kernels for quantised weights: 16 rows times a few tokens, and unpacking a tile.

Activations are int8 in *records* of 32 columns for S tokens side by side (S = 1 in decode, else 16):
``codes [S][32] int8``, then eight planes ``[S]`` of 4 bytes (``FIELDS``), broadcast to all rows when read.

Every path (decode, batches, prefill, all instruction sets) computes for each output, for each 32 columns in
ascending order, with exact integer sums t:

    acc = fma(float(t) * scale, d, acc)                                             one scale
    acc = fma(fma(float(t1), scale1, float(t0) * scale0), d, acc)                   one per 16 columns
    acc = fma(minimum, d * sum of codes, acc)                                       for each minimum

so the bits do not depend on the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from . import amx
from .formats import Format, Part, Tile, int8_format
from .simd import F32, I8, I32, I64, LANES, Emit, V, emitter, i64, instruction_set, lanes, types

INVERSE_127 = float(np.float32(1 / 127))
SLOTS = 16  # tokens of a record when there are more than one
AHEAD = 6144  # bytes prefetched ahead in a few tokens' product: 15 to 50 % where memory is slow
# d: the scale. sum*d: of all 32, of the first and last 16. -8 * sum, -128 * sum; -sum of the first and last 16
FIELDS = ("d", "ds", "ds0", "ds1", "n8", "n128", "n0", "n1")

# how many bits hold the size of any code; 8 for formats not named
BITS = {"Q2_K": 2, "TQ2_0": 2, "Q3_K": 3, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "MXFP4": 4}
BITS |= {"Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6}


@dataclass(frozen=True)
class Form(Format):
    """How a tile is kept while many tokens are multiplied with it: codes as bytes, ``bits`` of them in use."""

    bits: int = 8


def code_bits(fmt: Format) -> int:
    """How many bits hold the size of any code."""
    return fmt.bits if isinstance(fmt, Form) else BITS.get(fmt.name, 8)


def record_bytes(slots: int) -> int:
    """Bytes of 32 columns of ``slots`` tokens."""
    return slots * (32 + 4 * len(FIELDS))


def is_vnni() -> bool:
    """Whether the dot product takes unsigned codes up to 255."""
    return instruction_set() in ("avx512vnni", "avxvnni")


class Activations:
    """One record of S tokens: ``x`` is the address of its codes, ``f`` that of its planes."""

    def __init__(self, e: Emit, x, f, slots: int, n: int) -> None:
        self.e, self.x, self.f, self.slots, self.n = e, x, f, slots, n

    def codes(self, token: int, c: int):
        """4 codes of a token in all lanes."""
        return self.e.broadcast(self.x, I32, self.n, 32 * token + 4 * c)

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
            return self.e.shl(self.field(token, f"n{half}"), offset.bit_length() - 1)
        if offset in (8, 128):
            return self.field(token, f"n{offset}")
        n8, shift = self.field(token, "n8"), offset.bit_length() - 4
        if shift > 0:
            return self.e.shl(n8, shift)
        return self.e.b.ashr(n8, self.e.const(-shift, n8.type))


def _multiply(e: Emit, fmt: Format, part: Part, x: Activations, tokens: range, acc: list) -> list:
    """acc[token] + these 32 columns; the formula in the module's text."""
    flip = fmt.signed and is_vnni()
    offset = 128 if flip else fmt.offset
    runs = [range(8)] if len(part.scales) == 1 else [range(4), range(4, 8)]

    def code(c: int):
        w = part.codes[c]()
        return e.b.xor(w, e.const(0x80808080, w.type)) if flip else w

    def start(half: int) -> list:
        return [x.start(t, offset, half if len(runs) > 1 else None) for t in tokens]

    add = _add_in_pairs if instruction_set() in ("avx2", "generic") else _add_dots
    dots = partial(add, e, fmt, code, x, tokens)
    totals = [dots(run, partial(start, half)) for half, run in enumerate(runs)]
    return [scaled(e, part, [s[i] for s in totals], x, t, acc[i]) for i, t in enumerate(tokens)]


def _add_dots(
    e: Emit, fmt: Format, code: Callable, x: Activations, tokens: range, run: range, start: Callable
) -> list:
    """start() + the products of the codes of ``run`` with each token's."""
    totals = start()
    for c in run:
        w = code(c)
        xs = [x.codes(t, c) for t in tokens]
        totals = [e.dot(s, w, x4, fmt.signed) for s, x4 in zip(totals, xs, strict=True)]
    return totals


def _add_in_pairs(
    e: Emit, fmt: Format, code: Callable, x: Activations, tokens: range, run: range, start: Callable
) -> list:
    """The same, in 16 bits as far as sums fit: with AVX2 two instructions for a dot product, not three."""
    fit = max(1, 32767 // (2 * 127 * (2 ** code_bits(fmt) - 1)))
    totals = []
    for first in run[::fit]:
        sums = []
        for c in range(first, min(first + fit, run.stop)):
            w = code(c)
            more = [e.pairs(w, x.codes(t, c), fmt.signed) for t in tokens]
            sums = [e.b.add(s, m) for s, m in zip(sums, more, strict=True)] if sums else more
        totals = totals or start()  # not before it is needed: registers are few
        totals = [e.add_pairs(t, s) for t, s in zip(totals, sums, strict=True)]
    return totals


def scaled(e: Emit, part: Part, totals: list, x: Activations, token: int, acc):
    value = e.b.fmul(e.to_float(totals[0]), part.scales[0])
    for total, scale in zip(totals[1:], part.scales[1:], strict=True):
        value = e.fma(e.to_float(total), scale, value)
    acc = e.fma(value, x.field(token, "d"), acc)
    sums = ("ds",) if len(part.minima) == 1 else ("ds0", "ds1")
    for minimum, name in zip(part.minima, sums, strict=False):
        acc = e.fma(minimum, x.field(token, name), acc)
    return acc


@lru_cache
def multiplier(fmt: Format, n_tokens: int, slots: int, resume: bool = False) -> Callable:
    """multiply(w, x, slot, n_blocks, y): one tile of 16 rows times tokens [slot, slot + n_tokens).

    w: the tile's blocks; x: the tokens' records; y [n_tokens][16] floats, added to if ``resume``.
    """
    n = lanes()
    per_block = fmt.block // 32

    def rows(e: Emit, w, x, slot, n_blocks, y, first: int):
        x = e.ptr(x)
        codes = e.at(x, e.b.mul(slot, I64(32)))
        planes = e.at(x, e.b.add(I64(32 * slots), e.b.mul(slot, I64(4))))

        def block(i, acc):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            if first == 0 and not resume:
                for line in range(0, fmt.tile_bytes, 64):
                    e.prefetch(p, AHEAD + line)
            tile = Tile(e, p, fmt, first, n)
            step = e.b.mul(i, I64(per_block * record_bytes(slots)))
            for j, part in enumerate(fmt.take(e, tile)):
                at = e.b.add(step, I64(j * record_bytes(slots)))
                here = Activations(e, e.at(codes, at), e.at(planes, at), slots, n)
                acc = _multiply(e, fmt, part, here, range(n_tokens), acc)
            return acc

        y, zero = e.ptr(y), e.const(0.0, V(F32, n))
        places = [4 * (LANES * t + first) for t in range(n_tokens)]
        acc = [e.load(y, zero.type, p) if resume else zero for p in places]
        for p, v in zip(places, e.loop(n_blocks, acc, block), strict=True):
            e.store(v, y, p)

    @emitter(types.void, i64, i64, i64, i64, i64)
    def multiply(e, w, x, slot, n_blocks, y):
        """See ``multiplier``."""
        for first in range(0, LANES, n):
            rows(e, w, x, slot, n_blocks, y, first)

    return multiply


@lru_cache
def unpacked(fmt: Format) -> Form:
    """The form of a format's tiles: as the dot product takes codes with the least work."""
    plain = int8_format(fmt.group, fmt.minima)
    signed = amx.available() or (fmt.signed and not is_vnni())
    offset = 0 if signed else 128 if fmt.signed else fmt.offset
    layout = (plain.fields, plain.take, offset, signed, fmt.group, fmt.minima)
    return Form(f"{plain.name}_{offset}", 32, *layout, code_bits(fmt))


def subtract_bytes(e: Emit, v, n: int):
    """n from each byte of the lanes."""
    ty = V(I8, 4 * v.type.count)
    return e.b.bitcast(e.b.sub(e.b.bitcast(v, ty), e.const(n, ty)), v.type)


@lru_cache
def unpacker(fmt: Format) -> Callable:
    """unpack(w, n_blocks, out): a tile of 16 rows into the form ``unpacked(fmt)``."""
    n = lanes()
    per_block = fmt.block // 32
    form = unpacked(fmt)

    def put(e: Emit, part: Part, out, first: int):
        vectors = [code() for code in part.codes]
        if fmt.signed and not form.signed:
            vectors = [e.b.xor(v, e.const(0x80808080, v.type)) for v in vectors]
        elif form.signed and fmt.offset:
            vectors = [subtract_bytes(e, v, fmt.offset) for v in vectors]
        for i, v in enumerate(vectors + part.scales + part.minima):
            e.store(v, out, 4 * (LANES * i + first))

    @emitter(types.void, i64, i64, i64)
    def unpack(e, w, n_blocks, out):
        """See ``unpacker``."""

        def block(i, state):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            to = e.at(e.ptr(out), e.b.mul(i, I64(per_block * form.tile_bytes)))
            for first in range(0, LANES, n):
                parts = fmt.take(e, Tile(e, p, fmt, first, n))
                for j, part in enumerate(parts):
                    put(e, part, e.at(to, j * form.tile_bytes), first)
            return state

        e.loop(n_blocks, [], block)

    return unpack


@lru_cache
def quantiser(slots: int) -> Callable:
    """quantise(x, record, slot): 32 floats into a record, as int8 with one scale."""

    @emitter(types.void, i64, i64, i64)
    def quantise(e, x, record, slot):
        """See ``quantiser``."""
        b, half, ints = e.b, V(F32, LANES), V(I32, LANES)
        source, record = e.ptr(x), e.ptr(record)
        v = [e.load(source, half, 64 * i) for i in range(2)]
        size = [e.call("llvm.fabs.v16f32", half, p) for p in v]
        most = e.fold(
            e.select("<", size[0], size[1], size[1], size[0]),
            lambda p, q: e.select("<", p, q, q, p),
        )
        d = b.fmul(most, F32(INVERSE_127))
        some = b.fcmp_ordered(">", most, F32(0.0))
        inverse = e.splat(b.select(some, b.fdiv(F32(127.0), most), F32(0.0)), LANES)
        codes = [b.fptosi(e.call("llvm.rint.v16f32", half, b.fmul(p, inverse)), ints) for p in v]
        to = e.at(record, b.mul(slot, I64(32)))
        for i, c in enumerate(codes):
            e.store(b.trunc(c, V(I8, LANES)), to, 16 * i)
        s = [e.fold(c, b.add) for c in codes]
        both = b.add(*s)
        scaled = [b.fmul(d, b.sitofp(k, F32)) for k in (both, *s)]
        whole = [b.mul(both, I32(-8)), b.mul(both, I32(-128)), *(b.neg(k) for k in s)]
        planes = e.at(record, b.add(I64(32 * slots), b.mul(slot, I64(4))))
        for i, value in enumerate([d, *scaled, *whole]):
            e.store(value, planes, 4 * slots * i)

    return quantise


@lru_cache
def tokens_multiplier(form: Format) -> Callable:
    """multiply(panel, records, n, n_steps, y): y += an unpacked tile times the first n tokens.

    They go by 8, 4 or 2 where there are 32 registers for their sums, by 4, 2 or 1 where there are 16.
    """
    most = 8 if instruction_set() in ("avx512vnni", "neon") else 4
    half, quarter = most // 2, most // 4
    emit = {m: multiplier(form, m, SLOTS, resume=True) for m in (most, half, quarter)}
    many, some, few = emit.values()

    def multiply(panel, records, n, n_steps, y):
        """See ``tokens_multiplier``."""
        slot = 0
        while slot < n:
            to = y + 64 * slot
            if n - slot > half:
                many(panel, records, slot, n_steps, to)
                slot += most
            elif n - slot > quarter:
                some(panel, records, slot, n_steps, to)
                slot += half
            else:
                few(panel, records, slot, n_steps, to)
                slot += quarter

    return multiply
