"""The micro-kernel for many tokens on AVX2 alone: 16 registers of 8 lanes, and no dot product of 4 bytes.

A product of bytes takes two instructions there, into sums of pairs in 16-bit lanes, and what is read of tokens
can be no operand of them: loads are as scarce as arithmetic. So a tile is multiplied whole. What is read of a
token serves two registers of 8 rows, and their codes serve four tokens. The sums of 32 columns then take 8
registers; what they are added to lies in memory, for it is needed once in so many columns. ``Emit.finish``
keeps LLVM from mixing tokens until registers run out. Nothing is unrolled beyond 32 columns, so that the loop
stays where a processor keeps what it has decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from .emit import F32, I32, I64, Emit, V, instruction_set
from .formats import Format, Part
from .layout import shuffle
from .micro import add_products, add_unit, offset_times_scales, with_minima
from .records import SLOTS, Activations, plane_bytes, record_bytes
from .simd import emitter, i64, types

N = 8  # rows in a register
PARTS = 8  # parts of 32 columns in a block of 256
IN_REGISTERS = 2  # columns of codes that have room there beside 8 sums of 32 bits


def serves() -> bool:
    """Whether these are the instructions of the processor."""
    return instruction_set() == "avx2"


def columns_that_fit(form: Format) -> int:
    """How many products of 4 columns can be added up in 16-bit lanes."""
    return max(1, 32767 // (2 * 127 * (2**form.bits - 1)))


def unpacked_parts(e: Emit, form: Format, p) -> list[Part]:
    """32 unpacked columns of a tile at p: a part for each register of rows."""
    n_scales, scale = 32 // form.group, V(F32 if form.span == 32 else I32, N)
    parts = []
    for at in (0, 4 * N):
        codes = [lambda c=c, at=at: e.load(p, V(I32, N), 64 * c + at) for c in range(8)]
        floats = [e.load(p, scale, 512 + 64 * i + at) for i in range(n_scales * (1 + form.minima))]
        parts.append(Part(codes, floats[:n_scales], floats[n_scales:]))
    return parts


class Products:
    """The sums of 32 columns, of the rows of two parts for each of some tokens: [token][part]."""

    def __init__(self, e: Emit, form: Format, parts: list[Part], x: Activations, n: int) -> None:
        self.e, self.form, self.parts, self.x, self.n = e, form, parts, x, n
        self.n_halves = len(parts[0].scales)

    def runs(self, half: int) -> list[range]:
        """The columns of a scale, as many at a time as fit."""
        columns = range(8) if self.n_halves == 1 else (range(4), range(4, 8))[half]
        fit = columns_that_fit(self.form)
        return [columns[i : i + fit] for i in range(0, len(columns), fit)]

    def pairs(self, run: range) -> list:
        """Sums of pairs of a run's columns; the codes of a column at a time."""
        e = self.e
        sums: list = []
        for c in run:
            codes = e.finish([part.codes[c]() for part in self.parts])
            before, sums = sums, []
            for t in range(self.n):
                x4 = self.x.codes(t, c)
                more = [e.pairs(w, x4, self.form.signed) for w in codes]
                if before:
                    more = [e.b.add(*two) for two in zip(before[2 * t :], more, strict=False)]
                sums += e.finish(more)
        return sums

    def add(self, run: range, totals: list, factors: list) -> list:
        """totals + a run's sums times factors, of each part; a token at a time."""
        e, new = self.e, []
        codes = [e.finish([part.codes[c]() for part in self.parts]) for c in run]
        for t in range(self.n):
            xs = [self.x.codes(t, c) for c in run]
            for p, factor in enumerate(factors):
                pairs = [e.pairs(w[p], x, self.form.signed) for w, x in zip(codes, xs, strict=True)]
                both = pairs[0] if len(pairs) == 1 else e.b.add(*pairs)
                new.append(e.add_pairs(totals[2 * t + p], both, factor))
            new[-2:] = e.finish(new[-2:])
        return new

    def sums(self, half: int) -> list:
        """The exact sums of a scale's columns."""
        e, form = self.e, self.form
        totals = [e.const(0, V(I32, N))] * (2 * self.n)
        for run in self.runs(half):
            if columns_that_fit(form) <= IN_REGISTERS:
                totals = self.add(run, totals, [None, None])
            else:
                pairs = self.pairs(run)
                totals = [e.add_pairs(v, p) for v, p in zip(totals, pairs, strict=True)]
        if form.offset == 0:
            return totals
        which = half if self.n_halves > 1 else None
        starts = [self.x.start(t, form.offset, which) for t in range(self.n)]
        return [e.b.add(v, starts[i // 2]) for i, v in enumerate(totals)]

    def add_parts(self, y) -> None:
        """y [token][16] += the scaled sums, as ``micro.scaled`` has them."""
        e, x = self.e, self.x
        sums = [self.sums(half) for half in range(self.n_halves)]
        for t in range(self.n):
            d = x.field(t, "d")
            for p, part in enumerate(self.parts):
                value = e.b.fmul(e.to_float(sums[0][2 * t + p]), part.scales[0])
                for more, scale in zip(sums[1:], part.scales[1:], strict=True):
                    value = e.fma(e.to_float(more[2 * t + p]), scale, value)
                at = 64 * t + 32 * p
                acc = e.fma(value, d, e.load(y, V(F32, N), at))
                e.store(with_minima(e, part.minima, x, t, acc), y, at)

    def add_whole(self, whole: list) -> list:
        """whole + the sums times their integer scales."""
        e = self.e
        for half in range(self.n_halves):
            factors = [shuffle(e, part.scales[half], (0, 1, 0, 1)) for part in self.parts]
            for run in self.runs(half):
                if columns_that_fit(self.form) <= IN_REGISTERS:
                    whole = self.add(run, whole, factors)
                else:
                    some = zip(whole, self.pairs(run), factors * self.n, strict=True)
                    whole = [e.add_pairs(v, p, factor) for v, p, factor in some]
        if self.form.offset:
            factors = [offset_times_scales(e, self.form.offset, part.scales) for part in self.parts]
            less = [self.x.field(t, "n01") for t in range(self.n)]
            whole = [add_products(e, v, less[i // 2], factors[i % 2]) for i, v in enumerate(whole)]
        return e.finish(whole)


@lru_cache
def multiplier(form: Format, n_tokens: int) -> Callable:
    """multiply(w, x, slot, n_blocks, y): y [n_tokens][16] += an unpacked tile times tokens from ``slot`` on."""
    span = form.span
    part_bytes = form.tile_bytes * 32 // form.block // 64 * 64

    def columns(e: Emit, p, x, f) -> Products:
        xs = Activations(e, x, f, SLOTS, N, span)
        return Products(e, form, unpacked_parts(e, form, p), xs, n_tokens)

    def block_of_parts(e: Emit, w, codes, planes, y, i) -> None:
        step = e.b.mul(i, I64(record_bytes(SLOTS, span)))
        p = e.at(w, e.b.mul(i, I64(form.tile_bytes)))
        columns(e, p, e.at(codes, step), e.at(planes, step)).add_parts(y)

    def whole_block(e: Emit, w, codes, planes, y, i) -> None:
        step = e.b.mul(i, I64(PARTS * record_bytes(SLOTS, span)))
        w = e.at(w, e.b.mul(i, I64(form.tile_bytes)))
        codes, planes = e.at(codes, step), e.at(planes, step)

        def part(j, whole):
            p = e.at(w, e.b.mul(j, I64(part_bytes)))
            x = e.at(codes, e.b.mul(j, I64(32)))
            f = e.at(planes, e.b.mul(j, I64(plane_bytes(SLOTS, span))))
            return columns(e, p, x, f).add_whole(whole)

        whole = e.loop(PARTS, [e.const(0, V(I32, N))] * (2 * n_tokens), part)
        tokens = Activations(e, codes, planes, SLOTS, N, span)
        units = [e.load(w, V(F32, N), form.tile_bytes - 64 + at) for at in (0, 32)]
        for t in range(n_tokens):
            d = tokens.field(t, "d")
            for p, unit in enumerate(units):
                at = 64 * t + 32 * p
                acc = e.load(y, V(F32, N), at)
                e.store(add_unit(e, whole[2 * t + p], unit, d, acc), y, at)

    @emitter(types.void, *[i64] * 5)
    def multiply(e, w, x, slot, n_blocks, y):
        """Add the products of a tile to y."""
        e.b.function.attributes.alignstack = 32  # so no register that waits there crosses a line
        w, x, y = e.ptr(w), e.ptr(x), e.ptr(y)
        codes = e.at(x, e.b.mul(slot, I64(span)))
        planes = e.at(x, e.b.add(I64(span * SLOTS), e.b.mul(slot, I64(4))))

        def block(i, state):
            (block_of_parts if span == 32 else whole_block)(e, w, codes, planes, y, i)
            return state

        e.loop(n_blocks, [], block)

    return multiply
