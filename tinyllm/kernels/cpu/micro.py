"""Micro-kernels for quantised weights: 16 rows times a few tokens, and unpacking a tile.

Activations are int8 in *records* of a format's ``span`` (32 or 256 columns): ``records``.

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
from typing import NamedTuple

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
from .records import OFFSETS, SLOTS, Activations, has_pairs, plane_bytes, record_bytes
from .simd import emitter, i64, types

# Orders of loading a tile. "parts": as its parts come, and what is ahead is asked for line by line. "outer": as
# parts, but what is ahead comes no nearer than the second-level cache, which keeps more requests under way than
# the first. "block": as LLVM likes within a block, and all lines ahead are asked for as it begins. "loads": as
# parts, load by load.
ORDERS = ("parts", "outer", "block", "loads")


def is_vnni() -> bool:
    """Whether the dot product takes unsigned codes up to 255."""
    return instruction_set() in ("avx512vnni", "avxvnni")


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

    def start(self, half: int, run: range) -> list:
        """What the sums of a scale's columns, or of a run of them, begin with."""
        if self.part.unit is not None and multiplies_pairs():
            way = scaling(self.fmt)
            if way.start == 0:
                return [self.e.const(0, V(I32, self.x.n))] * len(self.tokens)
            if way.run:
                return [self.x.short_start(t, run) for t in self.tokens]
        which = half if len(self.runs) > 1 else None
        return [self.x.start(t, self.offset, which) for t in self.tokens]

    def sums(self, half: int, run: range | None = None) -> list:
        """The exact sums of a scale's columns, or of some of them, one per token."""
        if instruction_set() in ("avx2", "generic"):
            return self._sums_of_pairs(half)
        if has_i8mm() and len(self.tokens) > 1:
            return self._sums_of_two_tokens(half)
        run = run or self.runs[half]
        totals = self.start(half, run)
        for c in run:
            w = self.code(c)
            xs = [self.x.codes(t, c) for t in self.tokens]
            some = zip(totals, xs, strict=True)
            totals = [self.e.dot(s, w, x4, self.fmt.signed) for s, x4 in some]
        return totals

    def _sums_of_two_tokens(self, half: int) -> list:
        """The sums by an instruction for two tokens; the last of an odd number of tokens goes twice."""
        e, run, last = self.e, self.runs[half], len(self.tokens) - 1
        twos = [(i, min(i + 1, last)) for i in range(0, last + 1, 2)]
        starts = self.start(half, run)
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
            if not totals:  # not before it is needed: registers are few
                totals = self.start(half, self.runs[half])
            totals = [self.e.add_pairs(t, p) for t, p in zip(totals, pairs, strict=True)]
            if self.fmt.signed and len(totals) <= 4:  # beside sizes and signs registers run out
                totals = self.e.finish(totals)
        return totals

    def add_scaled(self, whole: list) -> list:
        """whole[token] + the sums times their integer scales."""
        e, part, way = self.e, self.part, scaling(self.fmt)
        if way.corrects:
            whole = self._less_offset(whole)
        for half, scale in enumerate(part.scales):
            if instruction_set() == "avx2":
                both = shuffle(e, scale, (0, 1, 0, 1))
                for pairs in self.pairs(half):
                    whole = [e.add_pairs(w, p, both) for w, p in zip(whole, pairs, strict=True)]
            elif way.run:
                short = scale if part.short else e.mask(scale, 0xFFFF)  # not a sum's upper bits
                columns = self.runs[half]
                for run in (columns[i : i + way.run] for i in range(0, len(columns), way.run)):
                    whole = self.add_products(whole, self.sums(half, run), short)
            else:
                some = zip(whole, self.sums(half), strict=True)
                whole = [e.b.add(w, e.b.mul(s, scale)) for w, s in some]
        return whole

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


class Scaling(NamedTuple):
    """How the sums of a part are multiplied by integer scales.

    Sums of 16 bits are multiplied and added in one instruction. More columns fit in them where a sum begins
    with -start * the sum of a token's codes, as if the weights' were smaller by ``start``, and of either sign.
    """

    cost: float  # instructions for a token and 32 columns
    run: int  # fours of columns in a sum of 16 bits; 0: one sum of 32 bits
    start: int
    corrects: bool  # whether the offset is taken off afterwards


@lru_cache
def scaling(fmt: Format) -> Scaling:
    """The way that takes the fewest instructions."""
    flip, fours, n = fmt.signed and is_vnni(), fmt.group // 4, 32 // fmt.group
    offset, most = (128, 255) if flip else (fmt.offset, 2**fmt.bits - 1)
    corrects = offset != 0 and multiplies_pairs()
    each = 3 if scales_in_two() else 1.5  # AMD adds twice as often as it multiplies
    ways = [Scaling(each * n + corrects, 0, 0, corrects)]
    if instruction_set() not in ("avx512vnni", "avxvnni"):
        return ways[0]
    if fit := min(32767 // (4 * 127 * most), fours):
        ways.append(Scaling(-(-fours // fit) * n + corrects, fit, 0, corrects))
    if has_pairs():
        ways += [
            Scaling(fours // run * n, run, offset, False)
            for run, size in OFFSETS.items()
            if size == offset and most < 2 * size and run <= fours
        ]
        if offset == 128 and n == 1:
            ways.append(Scaling(each, 0, 128, False))
    return min(ways)


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
    asks: int = 0,
) -> Callable:
    """multiply(w, x, slot, n_blocks, y, ahead): one tile of 16 rows times tokens [slot, slot + n_tokens).

    w: the tile's blocks; x: the tokens' records; y [n_tokens][16] floats. The line ``ahead`` bytes behind each
    that is read is asked for; 0 asks for nothing new. With ``resume`` y is added to, and there is no ``ahead``:
    the blocks are in a cache. ``order``: see ``ORDERS``. ``joined``: the rows are digits of one token; y [16].
    ``asks``: bytes of memory from the address ``ahead`` on that are asked for while a block is multiplied.
    """
    n, span = rows_at_once(n_tokens), fmt.span
    lines, n_parts = -(-asks // 64), fmt.block // 32

    def rows(e: Emit, w, x, slot, n_blocks, y, first, ahead) -> None:
        asked, ahead = ahead, None if ahead is None or asks else once(e, ahead, first, n)
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
            step = e.b.mul(i, I64(fmt.block // 32 * record_bytes(slots, span)))
            x, f = e.alone(e.at(codes, step)), e.alone(e.at(planes, step))

            def at(j):
                record, part = divmod(32 * j, span)
                here = record * span // 32 * record_bytes(slots, span)
                planes = e.at(f, here + part // 32 * plane_bytes(slots, span))
                return Activations(e, e.at(x, here + part), planes, slots, n, span)

            def parts():
                memory = e.at(e.ptr(asked), e.b.mul(i, I64(asks)))
                for j, part in enumerate(fmt.take(e, tile)):
                    for line in range(j * lines // n_parts, (j + 1) * lines // n_parts):
                        e.prefetch(memory, 64 * line, 2)
                    yield part

            add = _add_parts if span == 32 else _add_whole
            take = parts if asks else lambda: fmt.take(e, tile)
            return add(e, fmt, take, at, range(n_tokens), acc, order)

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

    @emitter(types.void, *[i64] * (5 if resume and not asks else 6))
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
        forms = [whole_format(fmt.group, offset, signed, fmt.bits)]
        if has_pairs() and offset:
            forms += [
                whole_format(fmt.group, larger, False, larger.bit_length())
                for larger in (*OFFSETS.values(), 128)
                if larger > offset and 2**fmt.bits + larger - offset <= 2 * larger
            ]
        return min(forms, key=lambda form: scaling(form).cost)
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
    part_bytes = 4 * LANES * (8 + 32 // form.group * (1 + form.minima))

    def vectors(e: Emit, part: Part) -> list:
        codes = [code() for code in part.codes]
        if fmt.signed and not form.signed:
            codes = [e.b.xor(v, e.const(0x80808080, v.type)) for v in codes]
        elif fmt.offset != form.offset:
            codes = [subtract_bytes(e, v, fmt.offset - form.offset) for v in codes]
        scales = part.scales
        if part.unit is not None and form.span == 32:
            scales = [e.b.fmul(part.unit, e.to_float(s)) for s in scales]
        elif form.span == 256 and scaling(form).run:
            scales = [e.mask(s, 0xFFFF) for s in scales]
        return codes + scales + part.minima * form.minima

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


def resuming(form: Format, n_tokens: int, asks: int = 0) -> Callable:
    """``multiplier`` for unpacked tiles."""
    return multiplier(form, n_tokens, SLOTS, resume=True, asks=asks)


@lru_cache
def tokens_multiplier(form: Format, one: Callable = resuming, asks: int = 0) -> Callable:
    """multiply(panels, panel_bytes, records, n, n_steps, n_tiles, y, .., ahead, ahead_bytes).

    y += unpacked tiles times n tokens. With ``asks`` so many bytes for each block are asked for meanwhile, from
    ``ahead`` on for the first tile, from ahead_bytes further on for the next, unless ``ahead`` is 0.

    They go by 8, 4 or 2 where there are 32 registers for their sums, by 4, 2 or 1 where there are 16, through
    what ``one(form, n_tokens)`` makes.
    """
    most = 8 if instruction_set() in ("avx512vnni", "neon") else 4
    half, quarter, per_block = most // 2, most // 4, form.block // 32
    many, some, few = (one(form, m) for m in (most, half, quarter))

    def rest(panel, records, slot, n, n_blocks, y):
        """Add the products of a tile with tokens [slot, n) to y."""
        while slot < n:
            to = y + 64 * slot
            if n - slot > half:
                many(panel, records, slot, n_blocks, to)
                slot += most
            elif n - slot > quarter:
                some(panel, records, slot, n_blocks, to)
                slot += half
            else:
                few(panel, records, slot, n_blocks, to)
                slot += quarter

    def multiply(
        panels, panel_bytes, records, n, n_steps, n_tiles, y, x_bytes, y_bytes, ahead, ahead_bytes
    ):
        """Add the products of all tiles with n tokens to y."""
        for tile in range(n_tiles):
            rest(panels + tile * panel_bytes, records, 0, n, n_steps // per_block, y + 1024 * tile)

    if asks == 0:
        return multiply
    first = one(form, most, asks)

    def multiply_and_ask(
        panels, panel_bytes, records, n, n_steps, n_tiles, y, x_bytes, y_bytes, ahead, ahead_bytes
    ):
        """Add the products of all tiles with n tokens to y, and ask for memory."""
        for tile in range(n_tiles):
            panel, to, slot = panels + tile * panel_bytes, y + 1024 * tile, 0
            if ahead != 0:
                memory = ahead + tile * ahead_bytes
                first(panel, records, 0, n_steps // per_block, to, memory)
                slot = most
            rest(panel, records, slot, n, n_steps // per_block, to)

    return multiply_and_ask
