"""How kernels decode each quantised format without a codebook, from tiles as ``layout`` describes them.

``tinyllm.gguf.quants`` has the layouts of blocks in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import formats_grid
from .emit import F32, I8, I32, Emit, V
from .layout import NIBBLES, Code, Format, Part, Tile, byte_of, lookup_nibbles, spread, words

__all__ = ["FORMATS", "Format", "Part", "Tile", "int8_format", "whole_format"]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = tuple(16 + v for v in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))


def _nibbles(e: Emit, tile: Tile, start: int) -> list[Code]:
    """Codes in 16 bytes: the low halves are columns 0..15, the high halves 16..31."""
    words = [tile.held(start + 4 * c) for c in range(4)]
    low = [lambda w=w: e.mask(w(), NIBBLES) for w in words]
    return low + [lambda w=w: e.mask(e.shr(w(), 4), NIBBLES) for w in words]


def _take_q4_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_nibbles(e, t, 2), [t.half(0)], [])


def _take_q4_1(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_nibbles(e, t, 4), [t.half(0)], [t.half(2)])


def _fifth_bits(e: Emit, codes: list[Code], high: Any) -> list[Code]:
    """Codes whose bit 4 is bit i of ``high``, for code i."""
    return [lambda c=c: e.b.or_(codes[c](), spread(e, high, 4 * c, 1, 4)) for c in range(8)]


def _take_q5_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_fifth_bits(e, _nibbles(e, t, 6), t.word(2)), [t.half(0)], [])


def _take_q5_1(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_fifth_bits(e, _nibbles(e, t, 8), t.word(4)), [t.half(0)], [t.half(2)])


def _take_q8_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_bytes(t, 2), [t.half(0)], [])


def _take_q8_1(e: Emit, t: Tile) -> Iterator[Part]:
    """Q8_1; the sum of the codes stored at byte 2 is not needed."""
    yield Part(_bytes(t, 4), [t.half(0)], [])


def _take_q8_k(e: Emit, t: Tile) -> Iterator[Part]:
    """Q8_K; the sums of 16 codes stored at byte 260 are not needed."""
    d = e.b.bitcast(t.word(0), V(F32, t.n))
    for i in range(8):
        yield Part(_bytes(t, 4 + 32 * i), [d], [])


def _bytes(t: Tile, start: int) -> list[Code]:
    return [lambda c=c: t.word(start + 4 * c) for c in range(8)]


def _looked_up(e: Emit, t: Tile, start: int, values: tuple[int, ...]) -> list[Code]:
    """The values that 16 bytes select, nibble by nibble: the low halves are columns 0..15."""
    words = [t.held(start + 4 * c) for c in range(4)]
    return [lambda w=w, h=h: lookup_nibbles(e, w(), h, values) for h in range(2) for w in words]


def _take_iq4_nl(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_looked_up(e, t, 2, IQ4_VALUES), [t.half(0)], [])


def _take_mxfp4(e: Emit, t: Tile) -> Iterator[Part]:
    """MXFP4; the scale 2^(x - 128) is half of the file's power of two, and subnormal for x < 2."""
    x = t.byte(0)
    normal = e.shl(e.b.sub(x, e.const(1, x.type)), 23)
    tiny = e.b.shl(e.const(0x00200000, x.type), x)
    bits = e.b.select(e.b.icmp_unsigned("<", x, e.const(2, x.type)), tiny, normal)
    scale = e.b.bitcast(bits, V(F32, t.n))
    yield Part(_looked_up(e, t, 1, FP4_VALUES), [scale], [])


def _half_of_e4m3(e: Emit, x: Any) -> Any:
    """Halve a number with 4 bits of exponent, 3 of mantissa and no sign; 0x7F gives 0."""
    size = e.mask(x, 127)
    bits = e.b.add(e.shl(size, 20), e.const(119 << 23, x.type))
    normal = e.b.bitcast(bits, V(F32, x.type.count))
    tiny = e.b.fmul(e.to_float(size), e.const(2.0**-10, normal.type))
    value = e.b.select(e.b.icmp_unsigned("<", size, e.const(8, x.type)), tiny, normal)
    is_zero = e.b.icmp_unsigned("==", x, e.const(0x7F, x.type))
    return e.b.select(is_zero, e.const(0.0, value.type), value)


def _take_nvfp4(e: Emit, t: Tile) -> Iterator[Part]:
    """NVFP4; 16 columns are 8 bytes, the low halves before the high halves."""
    scales = [_half_of_e4m3(e, byte_of(e, [t.word(0)], g)) for g in range(4)]

    for i in range(2):
        pairs = [[t.held(4 + 8 * g + 4 * c) for c in range(2)] for g in (2 * i, 2 * i + 1)]
        places = [(w, h) for pair in pairs for h in range(2) for w in pair]
        codes: list[Code] = [
            lambda w=w, h=h: lookup_nibbles(e, w(), h, FP4_VALUES) for w, h in places
        ]
        yield Part(codes, scales[2 * i : 2 * i + 2], [])


def _two_bits(e: Emit, t: Tile, start: int, q: int) -> list[Code]:
    """Codes from bits 2q and 2q + 1 of 32 bytes."""
    return [lambda c=c: e.mask(e.shr(t.word(start + 4 * c), 2 * q), 0x03030303) for c in range(8)]


def _take_q2_k(e: Emit, t: Tile) -> Iterator[Part]:
    words = [t.word(4 * i) for i in range(4)]
    d, less = t.half(80), e.b.fneg(t.half(82))
    for i in range(8):
        both = [byte_of(e, words, 2 * i + g) for g in range(2)]
        scales = [e.mask(s, 15) for s in both]
        minima = [e.b.fmul(less, e.to_float(e.shr(s, 4))) for s in both]
        yield Part(_two_bits(e, t, 16 + 32 * (i // 4), i % 4), scales, minima, d)


def _take_q3_k(e: Emit, t: Tile) -> Iterator[Part]:
    w = [t.word(96 + 4 * i) for i in range(3)]
    low = [w[0], w[1], e.shr(w[0], 4), e.shr(w[1], 4)]
    words = [
        e.b.or_(e.mask(low[i], NIBBLES), e.shl(e.mask(e.shr(w[2], 2 * i), 0x03030303), 4))
        for i in range(4)
    ]
    d = t.half(108)

    def code(c, i, two):
        high = e.mask(e.shr(t.word(4 * c), i), 0x01010101)
        return e.b.or_(two[c](), e.shl(high, 2))

    for i in range(8):
        both = [byte_of(e, words, 2 * i + g) for g in range(2)]
        scales = [e.b.sub(s, e.const(32, s.type)) for s in both]
        two = _two_bits(e, t, 32 + 32 * (i // 4), i % 4)
        yield Part([lambda c=c, i=i, two=two: code(c, i, two) for c in range(8)], scales, [], d)


def _six_bit_scales(e: Emit, t: Tile) -> tuple[list[Any], list[Any]]:
    """The 8 scales and 8 minima of 6 bits that bytes 4..15 hold, as two words of bytes each."""
    a, b, c = (t.word(4 + 4 * i) for i in range(3))
    top = [e.shl(e.mask(e.shr(w, 6), 0x03030303), 4) for w in (a, b)]
    scales = [e.mask(a, 0x3F3F3F3F), e.b.or_(e.mask(c, NIBBLES), top[0])]
    minima = [e.mask(b, 0x3F3F3F3F), e.b.or_(e.mask(e.shr(c, 4), NIBBLES), top[1])]
    return scales, minima


def _take_q4_k(e: Emit, t: Tile, codes: Callable[..., list[Code]] | None = None) -> Iterator[Part]:
    scales, minima = _six_bit_scales(e, t)
    d, less = t.half(0), e.b.fneg(t.half(2))
    for i in range(8):
        scale = byte_of(e, scales, i)
        least = e.b.fmul(less, e.to_float(byte_of(e, minima, i)))
        yield Part((codes or _pair_nibbles)(e, t, i), [scale], [least], d)


def _pair_nibbles(e: Emit, t: Tile, i: int, start: int = 16) -> list[Code]:
    """Codes of run i: 32 bytes hold two runs of 32 columns, the even in low halves, the odd in high ones."""
    at, shift = start + 32 * (i // 2), 4 * (i % 2)
    return [lambda c=c: e.mask(e.shr(t.word(at + 4 * c), shift), NIBBLES) for c in range(8)]


def _q5_k_codes(e: Emit, t: Tile, i: int) -> list[Code]:
    four = _pair_nibbles(e, t, i, 48)

    def join(c):
        high = e.mask(e.shr(t.word(16 + 4 * c), i), 0x01010101)
        return e.b.or_(four[c](), e.shl(high, 4))

    return [lambda c=c: join(c) for c in range(8)]


def _take_q5_k(e: Emit, t: Tile) -> Iterator[Part]:
    yield from _take_q4_k(e, t, _q5_k_codes)


def _take_q6_k(e: Emit, t: Tile) -> Iterator[Part]:
    words = [t.word(192 + 4 * i) for i in range(4)]
    d = t.half(208)

    def scale(i):
        byte = e.shl(words[i // 4], 24 - 8 * (i % 4))
        return e.b.ashr(byte, e.const(24, byte.type))

    def code(c, n, q):
        four = e.mask(e.shr(t.word(64 * n + 32 * (q % 2) + 4 * c), 4 * (q // 2)), NIBBLES)
        two = e.mask(e.shr(t.word(128 + 32 * n + 4 * c), 2 * q), 0x03030303)
        return e.b.or_(four, e.shl(two, 4))

    for i in range(8):
        n, q = divmod(i, 4)
        codes = [lambda c=c, n=n, q=q: code(c, n, q) for c in range(8)]
        yield Part(codes, [scale(2 * i), scale(2 * i + 1)], [], d)


def _take_iq4_xs(e: Emit, t: Tile) -> Iterator[Part]:
    d, high, low = t.half(0), t.short(2), t.word(4)
    for i in range(8):
        four, two = e.mask(e.shr(low, 4 * i), 15), e.mask(e.shr(high, 2 * i), 3)
        scale = e.b.sub(e.b.or_(four, e.shl(two, 4)), e.const(32, low.type))
        codes = _looked_up(e, t, 8 + 16 * i, IQ4_VALUES)
        yield Part(codes, [scale], [], d)


def _take_tq2_0(e: Emit, t: Tile) -> Iterator[Part]:
    d, one = t.half(64), e.const(1, V(I32, t.n))
    for i in range(8):
        yield Part(_two_bits(e, t, 32 * (i // 4), i % 4), [one], [], d)


def _digit(e: Emit, word: Any, plane: int) -> Any:
    """A base-3 digit of the fraction in each byte; multiplying by 3 carries each digit out of the byte."""
    ty = V(I8, 4 * word.type.count)
    q = e.b.bitcast(word, ty)
    for _ in range(plane):
        q = e.b.add(e.b.add(q, q), q)
    above = [e.b.icmp_unsigned(">", q, e.const(third, ty)) for third in (85, 170)]
    return e.b.bitcast(e.b.add(*(e.b.zext(a, ty) for a in above)), word.type)


# for each 4 columns, the first of their bytes and which digit of it they are
_TQ1_0_ORDER = [(4 * c, n) for n in range(5) for c in range(8)]
_TQ1_0_ORDER += [(32 + 4 * c, n) for n in range(5) for c in range(4)]
_TQ1_0_ORDER += [(48, n) for n in range(4)]


def _take_tq1_0(e: Emit, t: Tile) -> Iterator[Part]:
    d, one = t.half(52), e.const(1, V(I32, t.n))
    for i in range(0, 64, 8):
        places = _TQ1_0_ORDER[i : i + 8]
        yield Part([lambda p=p: _digit(e, t.word(p[0]), p[1]) for p in places], [one], [], d)


def _take_bits(e: Emit, t: Tile, width: int, shift: int = 0) -> Iterator[Part]:
    """Q1_0 and Q2_0: the codes of a block stand in order, ``width`` bits each."""
    d = t.half(0)

    def code(bit):
        return spread(e, t.word(2 + bit // 32 * 4), bit % 32, width, shift)

    for start in range(0, 128, 32 * width):
        bits = range(start, start + 32 * width, 4 * width)
        yield Part([lambda bit=bit: code(bit) for bit in bits], [d], [])


_take_q1_0, _take_q2_0 = partial(_take_bits, width=1, shift=1), partial(_take_bits, width=2)


def _take_int8(group: int, minima: bool) -> Callable[[Emit, Tile], Iterator[Part]]:
    """Make ``take`` for unpacked tiles: 32 signed codes, then float scales and minima."""
    n = 32 // group

    def take(e: Emit, t: Tile) -> Iterator[Part]:
        def floats(first):
            return [e.b.bitcast(t.word(32 + 4 * (first + i)), V(F32, t.n)) for i in range(n)]

        codes = [lambda c=c: t.word(4 * c) for c in range(8)]
        yield Part(codes, floats(0), floats(n) if minima else [])

    return take


def int8_format(group: int, minima: bool) -> Format:
    """The format of unpacked tiles: signed bytes, and a float scale, perhaps a minimum, for each ``group``."""
    n_floats = 32 // group * (1 + minima)
    name = f"int8_{group}{'_min' if minima else ''}"
    fields = words(0, 32 + 4 * n_floats)
    return Format(name, 32, fields, _take_int8(group, minima), 0, True, group, minima)


def _take_whole(group: int) -> Callable[[Emit, Tile], Iterator[Part]]:
    """Make ``take`` for unpacked blocks of 256 columns: codes and integer scales of each 32, then the unit."""
    n = 32 // group
    size = 32 + 4 * n

    def take(e: Emit, t: Tile) -> Iterator[Part]:
        unit = e.b.bitcast(t.word(8 * size), V(F32, t.n))
        for at in range(0, 8 * size, size):
            codes = [lambda c=c, at=at: t.word(at + 4 * c) for c in range(8)]
            scales = [t.word(at + 32 + 4 * j) for j in range(n)]
            yield Part(codes, scales, [], unit, short=True)

    return take


def whole_format(group: int, offset: int, signed: bool, bits: int) -> Format:
    """The format of unpacked blocks of 256 columns: codes as bytes, integer scales, one float unit."""
    name = f"whole_{group}_{'signed' if signed else offset}_{bits}"
    fields = words(0, 8 * (32 + 4 * (32 // group)) + 4)
    layout = (name, 256, fields, _take_whole(group), offset, signed, group)
    return Format(*layout, bits=bits, span=256)


def _by_turns(a: int, b: int) -> tuple[tuple[int, int], ...]:
    """Words of the 32 bytes at a and at b, one of each in turn: for codes that need both."""
    return tuple(w for both in zip(words(a, a + 32), words(b, b + 32), strict=True) for w in both)


# Fields in the order in which they are read, which memory likes: Q6_K reads half as fast in the file's order.
_D, _M = (0, 2), (2, 2)
_Q2_K = ((80, 2), (82, 2), *words(0, 80))
_Q3_K = ((108, 2), *words(96, 108), *_by_turns(0, 32), *words(64, 96))
_Q5_K = (_D, _M, *words(4, 16), *_by_turns(16, 48), *words(80, 176))
_Q6_K = ((208, 2), *words(192, 208))
for _n in range(2):  # 128 columns: low and high bits of 32 bytes, then low bits of 32 more
    _Q6_K += (*_by_turns(64 * _n, 128 + 32 * _n), *words(64 * _n + 32, 64 * _n + 64))
_Q8_K = (*words(0, 260), *((i, 2) for i in range(260, 292, 2)))
FORMATS = {
    f.name: f
    for f in (
        *formats_grid.FORMATS,
        Format("Q4_0", 32, (_D, *words(2, 18)), _take_q4_0, offset=8, bits=4),
        Format("Q4_1", 32, (_D, _M, *words(4, 20)), _take_q4_1, minima=True, bits=4),
        Format("Q5_0", 32, (_D, *words(2, 22)), _take_q5_0, offset=16, bits=5),
        Format("Q5_1", 32, (_D, _M, *words(4, 24)), _take_q5_1, minima=True, bits=5),
        Format("Q8_0", 32, (_D, *words(2, 34)), _take_q8_0, signed=True),
        Format("Q8_1", 32, (_D, _M, *words(4, 36)), _take_q8_1, signed=True),
        Format("Q8_K", 256, _Q8_K, _take_q8_k, signed=True),
        Format("IQ4_NL", 32, (_D, *words(2, 18)), _take_iq4_nl, signed=True),
        Format("MXFP4", 32, ((0, 1), *words(1, 17)), _take_mxfp4, offset=16, bits=5),
        Format("NVFP4", 64, words(0, 36), _take_nvfp4, offset=16, group=16, bits=5),
        Format(
            "Q2_K", 256, _Q2_K, _take_q2_k, group=16, minima=True, span=256, bits=2, narrow=True
        ),
        Format("Q3_K", 256, _Q3_K, _take_q3_k, offset=4, group=16, span=256, bits=3),
        Format("Q4_K", 256, (_D, _M, *words(4, 144)), _take_q4_k, minima=True, span=256, bits=4),
        Format("Q5_K", 256, _Q5_K, _take_q5_k, minima=True, span=256, bits=5),
        Format("Q6_K", 256, _Q6_K, _take_q6_k, offset=32, group=16, span=256, bits=6),
        Format("IQ4_XS", 256, (_D, _M, *words(4, 136)), _take_iq4_xs, signed=True, span=256),
        Format(
            "TQ2_0",
            256,
            ((64, 2), *words(0, 64)),
            _take_tq2_0,
            offset=1,
            span=256,
            bits=2,
            narrow=True,
        ),
        Format(
            "TQ1_0",
            256,
            ((52, 2), *words(0, 52)),
            _take_tq1_0,
            offset=1,
            span=256,
            bits=2,
            narrow=True,
        ),
        Format("Q1_0", 128, (_D, *words(2, 18)), _take_q1_0, offset=1, bits=2),
        Format("Q2_0", 64, (_D, *words(2, 18)), _take_q2_0, offset=1, bits=2),
    )
}
