"""How each quantised format lies in memory here, and how a micro-kernel takes it apart.

At load, 16 rows of a matrix become a *tile*: field i of a block (4 bytes of codes, a 2-byte scale) is
stored for all 16 rows side by side before field i + 1. So one load brings the same field of 16 rows, one per
lane, and no sum across lanes is ever needed. The bits themselves are the file's: a tile has exactly its size.

A format's ``take`` yields, for each 32 columns of a block, a ``Part``: 8 vectors of codes (4 neighbouring
columns in each lane) and the scales and minima of their rows: weight = scale * (code - offset) + minimum.
Where a block is 256 columns with integer scales and one float, ``unit``, the sums of the whole block are added
as integers first (``span`` = 256): weight = unit * scale * (code - offset) + minimum.
Layouts of the blocks: ``tinyllm.gguf.quants``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .simd import F32, I8, I16, I32, LANES, Emit, V, instruction_set

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
NIBBLES = 0x0F0F0F0F


@dataclass
class Part:
    """32 columns of some rows: see the module's text. One scale and minimum for all 32, or one per 16."""

    codes: list[Callable[[], Any]]  # 8 x () -> i32 lanes, computed when asked for
    scales: list[Any]
    minima: list[Any]
    unit: Any = None  # where scales are integers, what they are multiples of


@dataclass(frozen=True)
class Format:
    """A quantised format. ``fields`` are (byte in the file's block, bytes), in the order of a tile."""

    name: str
    block: int  # columns
    fields: tuple[tuple[int, int], ...]
    take: Callable[[Emit, Tile], Iterator[Part]]
    offset: int = 0  # what is subtracted from a code
    signed: bool = False  # codes are signed bytes; else 0..127
    group: int = 32  # columns that share a scale
    minima: bool = False
    bits: int = 8  # that hold the size of any code
    span: int = 32  # columns whose sums are added as integers: activations share a scale as far

    @property
    def block_bytes(self) -> int:
        return sum(size for _, size in self.fields)

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 rows of one block."""
        return LANES * self.block_bytes


class Tile:
    """The fields of one tile as vectors of n rows, beginning with row ``first``."""

    def __init__(self, e: Emit, p: Any, fmt: Format, first: int, n: int) -> None:
        self.e, self.p, self.n = e, p, n
        self.offsets, at = {}, 0
        for start, size in fmt.fields:
            self.offsets[start] = at + first * size
            at += LANES * size

    def word(self, start: int) -> Any:
        """The 4 bytes at ``start`` of the block."""
        return self.e.load(self.p, V(I32, self.n), self.offsets[start])

    def half(self, start: int) -> Any:
        """A half-precision number, as float."""
        return self.e.half(self.e.load(self.p, V(I16, self.n), self.offsets[start]))

    def short(self, start: int) -> Any:
        """Two bytes, as an unsigned integer."""
        return self.e.b.zext(
            self.e.load(self.p, V(I16, self.n), self.offsets[start]), V(I32, self.n)
        )

    def byte(self, start: int) -> Any:
        """One byte, as an unsigned integer."""
        return self.e.b.zext(
            self.e.load(self.p, V(I8, self.n), self.offsets[start]), V(I32, self.n)
        )


def _words(start: int, stop: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, 4) for i in range(start, stop, 4))


def _byte_of(e: Emit, words: list[Any], i: int) -> Any:
    """Byte i of consecutive words, unsigned."""
    return e.mask(e.shr(words[i // 4], 8 * (i % 4)), 255)


def _nibbles(e: Emit, tile: Tile, start: int) -> list[Callable[[], Any]]:
    """16 bytes: the low halves are columns 0..15, the high halves 16..31."""
    words = [tile.word(start + 4 * c) for c in range(4)]
    low = [lambda w=w: e.mask(w, NIBBLES) for w in words]
    return low + [lambda w=w: e.mask(e.shr(w, 4), NIBBLES) for w in words]


def _take_q4_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_nibbles(e, t, 2), [t.half(0)], [])


def _take_q4_1(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_nibbles(e, t, 4), [t.half(0)], [t.half(2)])


def _fifth_bits(e: Emit, codes: list[Callable], high: Any) -> list[Callable]:
    """Bit i of ``high`` becomes bit 4 of code i."""

    def join(c):
        four = e.mask(e.shr(high, 4 * c), 15)
        spread = e.mask(
            e.b.mul(four, e.const(0x00204081, four.type)), 0x01010101
        )  # bit i to byte i
        return e.b.or_(codes[c](), e.shl(spread, 4))

    return [lambda c=c: join(c) for c in range(8)]


def _take_q5_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_fifth_bits(e, _nibbles(e, t, 6), t.word(2)), [t.half(0)], [])


def _take_q5_1(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_fifth_bits(e, _nibbles(e, t, 8), t.word(4)), [t.half(0)], [t.half(2)])


def _take_q8_0(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part([lambda c=c: t.word(2 + 4 * c) for c in range(8)], [t.half(0)], [])


def _lookup(e: Emit, codes: Any, values: tuple[int, ...]) -> Any:
    """values[code] for each byte of the lanes; codes are 0..15."""
    n = codes.type.count * 4
    ty, isa = V(I8, n), instruction_set()
    index = e.b.bitcast(codes, ty)
    if isa in ("avx512vnni", "avxvnni", "avx2"):
        table = ir.Constant(ty, [v & 255 for v in values] * (n // 16))
        name = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b"}[n]
        return e.b.bitcast(e.call(name, ty, table, index), codes.type)
    if isa == "neon":
        table = ir.Constant(ty, [v & 255 for v in values])
        return e.b.bitcast(e.call("llvm.aarch64.neon.tbl1.v16i8", ty, table, index), codes.type)
    found = e.const(0, ty)
    for i, v in enumerate(values):
        found = e.b.select(
            e.b.icmp_signed("==", index, e.const(i, ty)), e.const(v & 255, ty), found
        )
    return e.b.bitcast(found, codes.type)


def _looked_up(e: Emit, codes: list[Callable], values: tuple[int, ...]) -> list[Callable]:
    return [lambda c=c: _lookup(e, c(), values) for c in codes]


def _take_iq4_nl(e: Emit, t: Tile) -> Iterator[Part]:
    yield Part(_looked_up(e, _nibbles(e, t, 2), IQ4_VALUES), [t.half(0)], [])


def _take_mxfp4(e: Emit, t: Tile) -> Iterator[Part]:
    """The scale is half of a power of two: 2^(x - 128), below the normal numbers for x < 2."""
    x = t.byte(0)
    normal = e.shl(e.b.sub(x, e.const(1, x.type)), 23)
    tiny = e.b.shl(e.const(0x00200000, x.type), x)
    bits = e.b.select(e.b.icmp_unsigned("<", x, e.const(2, x.type)), tiny, normal)
    scale = e.b.bitcast(bits, V(F32, t.n))
    yield Part(_looked_up(e, _nibbles(e, t, 1), MXFP4_VALUES), [scale], [])


def _two_bits(e: Emit, t: Tile, start: int, q: int) -> list[Callable]:
    """Bits 2q, 2q + 1 of 32 bytes."""
    return [lambda c=c: e.mask(e.shr(t.word(start + 4 * c), 2 * q), 0x03030303) for c in range(8)]


def _take_q2_k(e: Emit, t: Tile) -> Iterator[Part]:
    words = [t.word(4 * i) for i in range(4)]
    d, less = t.half(80), e.b.fneg(t.half(82))
    for i in range(8):
        both = [_byte_of(e, words, 2 * i + g) for g in range(2)]
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
        both = [_byte_of(e, words, 2 * i + g) for g in range(2)]
        scales = [e.b.sub(s, e.const(32, s.type)) for s in both]
        two = _two_bits(e, t, 32 + 32 * (i // 4), i % 4)
        yield Part([lambda c=c, i=i, two=two: code(c, i, two) for c in range(8)], scales, [], d)


def _six_bit_scales(e: Emit, t: Tile) -> tuple[list[Any], list[Any]]:
    """The 12 bytes at 4 hold 8 scales and 8 minima of 6 bits: two words of bytes each."""
    a, b, c = (t.word(4 + 4 * i) for i in range(3))
    top = [e.shl(e.mask(e.shr(w, 6), 0x03030303), 4) for w in (a, b)]
    scales = [e.mask(a, 0x3F3F3F3F), e.b.or_(e.mask(c, NIBBLES), top[0])]
    minima = [e.mask(b, 0x3F3F3F3F), e.b.or_(e.mask(e.shr(c, 4), NIBBLES), top[1])]
    return scales, minima


def _take_q4_k(e: Emit, t: Tile, codes: Callable | None = None) -> Iterator[Part]:
    scales, minima = _six_bit_scales(e, t)
    d, less = t.half(0), e.b.fneg(t.half(2))
    for i in range(8):
        scale = _byte_of(e, scales, i)
        least = e.b.fmul(less, e.to_float(_byte_of(e, minima, i)))
        yield Part((codes or _pair_nibbles)(e, t, i), [scale], [least], d)


def _pair_nibbles(e: Emit, t: Tile, i: int, start: int = 16) -> list[Callable]:
    """32 bytes serve two runs of 32 columns: low halves the even run, high halves the odd one."""
    at, shift = start + 32 * (i // 2), 4 * (i % 2)
    return [lambda c=c: e.mask(e.shr(t.word(at + 4 * c), shift), NIBBLES) for c in range(8)]


def _q5_k_codes(e: Emit, t: Tile, i: int) -> list[Callable]:
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
        codes = _looked_up(e, _nibbles(e, t, 8 + 16 * i), IQ4_VALUES)
        yield Part(codes, [scale], [], d)


def _take_tq2_0(e: Emit, t: Tile) -> Iterator[Part]:
    d, one = t.half(64), e.const(1, V(I32, t.n))
    for i in range(8):
        yield Part(_two_bits(e, t, 32 * (i // 4), i % 4), [one], [], d)


def _take_int8(group: int, minima: bool) -> Callable:
    """32 signed codes, then float scales and minima: how other formats are repacked at load."""
    n = 32 // group

    def take(e: Emit, t: Tile) -> Iterator[Part]:
        def floats(first):
            return [e.b.bitcast(t.word(32 + 4 * (first + i)), V(F32, t.n)) for i in range(n)]

        codes = [lambda c=c: t.word(4 * c) for c in range(8)]
        yield Part(codes, floats(0), floats(n) if minima else [])

    return take


def int8_format(group: int, minima: bool) -> Format:
    """Signed bytes with a float scale, and perhaps a minimum, for each ``group`` columns."""
    n_floats = 32 // group * (1 + minima)
    name = f"int8_{group}{'_min' if minima else ''}"
    fields = _words(0, 32 + 4 * n_floats)
    return Format(name, 32, fields, _take_int8(group, minima), 0, True, group, minima)


def _take_whole(group: int) -> Callable:
    """256 columns as ``_take_int8`` has 32, but with integer scales, and last their unit."""
    n = 32 // group
    size = 32 + 4 * n

    def take(e: Emit, t: Tile) -> Iterator[Part]:
        unit = e.b.bitcast(t.word(8 * size), V(F32, t.n))
        for at in range(0, 8 * size, size):
            codes = [lambda c=c, at=at: t.word(at + 4 * c) for c in range(8)]
            yield Part(codes, [t.word(at + 32 + 4 * j) for j in range(n)], [], unit)

    return take


def whole_format(group: int, offset: int, signed: bool, bits: int) -> Format:
    """Unpacked blocks of 256 columns: codes as bytes, integer scales; one float for all. No minima."""
    name = f"whole_{group}_{'signed' if signed else offset}_{bits}"
    fields = _words(0, 8 * (32 + 4 * (32 // group)) + 4)
    layout = (name, 256, fields, _take_whole(group), offset, signed, group)
    return Format(*layout, bits=bits, span=256)


# in the order in which they are read: memory is fastest so (Q6_K: 10 % against the file's order)
_D, _M = (0, 2), (2, 2)
_Q2_K = ((80, 2), (82, 2), *_words(0, 80))
_Q3_K = ((108, 2), *_words(96, 108), *_words(0, 96))
_Q6_K = ((208, 2), *_words(192, 208))
for _n in range(2):  # 128 columns: low bits of 32 bytes, high bits of 32 bytes, low bits of 32 more
    _Q6_K += (*_words(64 * _n, 64 * _n + 32), *_words(128 + 32 * _n, 160 + 32 * _n))
    _Q6_K += _words(64 * _n + 32, 64 * _n + 64)
FORMATS = {
    f.name: f
    for f in (
        Format("Q4_0", 32, (_D, *_words(2, 18)), _take_q4_0, offset=8, bits=4),
        Format("Q4_1", 32, (_D, _M, *_words(4, 20)), _take_q4_1, minima=True, bits=4),
        Format("Q5_0", 32, (_D, *_words(2, 22)), _take_q5_0, offset=16, bits=5),
        Format("Q5_1", 32, (_D, _M, *_words(4, 24)), _take_q5_1, minima=True, bits=5),
        Format("Q8_0", 32, (_D, *_words(2, 34)), _take_q8_0, signed=True),
        Format("IQ4_NL", 32, (_D, *_words(2, 18)), _take_iq4_nl, signed=True),
        Format("MXFP4", 32, ((0, 1), *_words(1, 17)), _take_mxfp4, signed=True, bits=4),
        Format("Q2_K", 256, _Q2_K, _take_q2_k, group=16, minima=True, span=256, bits=2),
        Format("Q3_K", 256, _Q3_K, _take_q3_k, offset=4, group=16, span=256, bits=3),
        Format("Q4_K", 256, (_D, _M, *_words(4, 144)), _take_q4_k, minima=True, span=256, bits=4),
        Format("Q5_K", 256, (_D, _M, *_words(4, 176)), _take_q5_k, minima=True, span=256, bits=5),
        Format("Q6_K", 256, _Q6_K, _take_q6_k, offset=32, group=16, span=256, bits=6),
        Format("IQ4_XS", 256, (_D, _M, *_words(4, 136)), _take_iq4_xs, signed=True, span=256),
        Format("TQ2_0", 256, ((64, 2), *_words(0, 64)), _take_tq2_0, offset=1, span=256, bits=2),
    )
}
