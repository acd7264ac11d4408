"""A quantised matrix in memory: tiles of 16 rows, stored field by field, and helpers to decode them.

At load, 16 rows of a matrix become a *tile*: field i of a block (4 bytes of codes, a 2-byte scale) is
stored for all 16 rows side by side before field i + 1. So one load brings the same field of 16 rows, one per
lane, and no sum across lanes is ever needed. The bits themselves are the file's: a tile has exactly its size.

A format's ``take`` yields, for each 32 columns of a block, a ``Part``: 8 vectors of codes (4 neighbouring
columns in each lane) and the scales and minima of their rows: weight = scale * (code - offset) + minimum.
Where a block is 256 columns with integer scales and one float, ``unit``, the sums of the whole block are added
as integers first (``span`` = 256): weight = unit * scale * (code - offset) + minimum.
The formats themselves stand in ``formats`` and, those with codebooks, in ``formats_grid``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from llvmlite import ir

from .emit import I8, I16, I32, I64, LANES, Emit, V, instruction_set, lanes, target

NIBBLES = 0x0F0F0F0F
Code: TypeAlias = Callable[..., Any]  # called without arguments: 4 columns as i32 lanes


@dataclass
class Part:
    """32 columns of some rows: weight = scale * (code - offset) + minimum, for all 32 or for each 16."""

    codes: list[Code]  # 8, each computed when it is called
    scales: list[Any]
    minima: list[Any]
    unit: Any = None  # where scales are integers: the float that multiplies them
    short: bool = False  # whether 16-bit scales have nothing above these bits


@dataclass(frozen=True)
class Format:
    """A quantised format. ``fields`` are (byte in the file's block, bytes), in the order of a tile."""

    name: str
    block: int  # columns
    fields: tuple[tuple[int, int], ...]
    take: Callable[[Emit, Tile], Iterator[Part]]
    offset: int = 0  # subtracted from a code
    signed: bool = False  # codes are signed bytes; else 0..127
    group: int = 32  # columns that share a scale
    minima: bool = False
    bits: int = 8  # enough for the size of any code
    narrow: bool = False  # a code times its integer scale fits a byte
    span: int = 32  # columns that are summed as integers; the activations of so many share a scale

    @property
    def block_bytes(self) -> int:
        return sum(size for _, size in self.fields)

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 rows of one block."""
        return LANES * self.block_bytes


class Tile:
    """The fields of one tile as vectors of n rows, beginning with row ``first``.

    Whoever loads a cache line first asks for the one that is ``ahead`` bytes further, if that is given: so
    requests are spread among the arithmetic, and the processor's queue of them never fills. ``level``: of the
    first cache that gets it. ``in_order``: each load stays behind the one before.
    """

    def __init__(
        self,
        e: Emit,
        p: Any,
        fmt: Format,
        first: Any,
        n: int,
        ahead: Any = None,
        in_order: bool = False,
        level: int = 1,
    ) -> None:
        self.e, self.n, self.in_order, self.level = e, n, in_order, level
        self.further = None if ahead is None else e.at(p, ahead)
        self.asked = 0  # bytes of the tile whose likes were asked for
        self.rows = {size: e.at(p, e.b.mul(first, I64(size))) for size in (1, 2, 4)}
        self.offsets, at = {}, 0
        for start, size in fmt.fields:
            self.offsets[start] = at
            at += LANES * size

    def _load(self, element: Any, size: int, start: int) -> Any:
        at = self.offsets[start]
        while self.further is not None and self.asked < at + LANES * size:
            self.e.prefetch(self.further, self.asked, self.level)
            self.asked += 64
        if self.in_order:
            self.e.in_order()
        return self.e.load(self.rows[size], V(element, self.n), at)

    def word(self, start: int) -> Any:
        """The 4 bytes at ``start`` of the block."""
        return self._load(I32, 4, start)

    def held(self, start: int) -> Callable[[], Any]:
        """The word for several uses: loaded once, or each time where vectors take two registers."""
        if self.n > lanes():
            return lambda: self.word(start)
        word = self.word(start)
        return lambda: word

    def half(self, start: int) -> Any:
        """A half-precision number, as float."""
        return self.e.half(self._load(I16, 2, start))

    def short(self, start: int) -> Any:
        """Two bytes, as an unsigned integer."""
        return self.e.b.zext(self._load(I16, 2, start), V(I32, self.n))

    def byte(self, start: int) -> Any:
        """One byte, as an unsigned integer."""
        return self.e.b.zext(self._load(I8, 1, start), V(I32, self.n))


def words(start: int, stop: int) -> tuple[tuple[int, int], ...]:
    return tuple((i, 4) for i in range(start, stop, 4))


def byte_of(e: Emit, words: list[Any], i: int) -> Any:
    """Byte i of consecutive words, unsigned."""
    if instruction_set() == "avx2":  # one shuffle, which the next may be joined with
        return shuffle(e, words[i // 4], (i % 4, None, None, None))
    return e.mask(e.shr(words[i // 4], 8 * (i % 4)), 255)


def lookup(e: Emit, codes: Any, values: tuple[int, ...]) -> Any:
    """values[code] for each byte of the lanes; codes are 0..15."""
    n = codes.type.count * 4
    ty, isa = V(I8, n), instruction_set()
    index = e.b.bitcast(codes, ty)
    if isa in ("avx512vnni", "avxvnni", "avx2"):
        table = ir.Constant(ty, [v & 255 for v in values] * (n // 16))
        name = "llvm.x86.avx512.pshuf.b.512" if isa == "avx512vnni" else "llvm.x86.avx2.pshuf.b"
        return e.b.bitcast(e.call_each(name, ty, table, index), codes.type)
    if isa == "neon":
        table = ir.Constant(ty, [v & 255 for v in values])
        return e.b.bitcast(e.call("llvm.aarch64.neon.tbl1.v16i8", ty, table, index), codes.type)
    found = e.const(0, ty)
    for i, v in enumerate(values):
        if v:
            here = e.b.icmp_signed("==", index, e.const(i, ty))
            found = e.b.select(here, e.const(v & 255, ty), found)
    return e.b.bitcast(found, codes.type)


def lookup_nibbles(e: Emit, v: Any, half: int, values: tuple[int, ...]) -> Any:
    """values[nibble] for the lower (half 0) or the upper nibble of each byte of the lanes."""
    v = e.shr(v, 4 * half)
    if not has_bit_fields():
        return lookup(e, e.mask(v, NIBBLES), values)
    return permute_bytes(e, v, values * 4)


def permute_bytes(e: Emit, v: Any, values: tuple[int, ...]) -> Any:
    """values[index], of 64, for the lower 6 bits of each byte; where there are bit fields."""
    ty = V(I8, 64)
    table, index = ir.Constant(ty, [value & 255 for value in values]), e.b.bitcast(v, ty)
    return e.b.bitcast(e.call("llvm.x86.avx512.permvar.qi.512", ty, table, index), v.type)


def has_bit_fields() -> bool:
    """Whether one instruction takes 8 bits from anywhere in 64, for each byte."""
    return instruction_set() == "avx512vnni" and "avx512vbmi" in target()[2]


def bit_fields(e: Emit, v: Any, starts: tuple[int, ...], mask: int = 0xFFFFFFFF) -> Any:
    """Make byte j of each lane from 8 of its bits from ``starts[j]`` on; keep the lane's bits in ``mask``."""
    control = [(32 * odd + start) % 64 for odd in range(2) for start in starts]
    ty = V(I8, 4 * v.type.count)
    table = ir.Constant(ty, control * (v.type.count // 2))
    name = f"llvm.x86.avx512.pmultishift.qb.{8 * ty.count}"
    found = e.call(name, ty, table, e.b.bitcast(v, ty))
    return e.mask(e.b.bitcast(found, v.type), mask)


def spread(e: Emit, v: Any, first: int, width: int, shift: int = 0) -> Any:
    """Make byte j of each lane from its ``width`` (1 or 2) bits at ``first + width * j``, shifted left."""
    if has_bit_fields():
        starts = tuple(first + width * j - shift for j in range(4))
        return bit_fields(e, v, starts, 0x01010101 * ((1 << width) - 1 << shift))
    if width == 1:
        return _spread_bits(e, v, first, shift)
    four = e.mask(e.shr(v, first), 255)
    two = e.mask(e.b.or_(four, e.shl(four, 12)), 0x000F000F)
    return e.shl(e.mask(e.b.or_(two, e.shl(two, 6)), 0x03030303), shift)


def _spread_bits(e: Emit, v: Any, first: int, shift: int) -> Any:
    ty, n = V(I8, 4 * v.type.count), v.type.count
    bytes_ = e.b.bitcast(shuffle(e, v, (first // 8,) * 4), ty)
    bits = ir.Constant(ty, [1 << first % 8 + j for j in range(4)] * n)
    unset = e.b.icmp_signed("==", e.b.and_(bytes_, bits), e.const(0, ty))
    return e.b.bitcast(e.b.select(unset, e.const(0, ty), e.const(1 << shift, ty)), v.type)


def shuffle(e: Emit, v: Any, places: tuple[int | None, ...]) -> Any:
    """Byte j of each lane is its byte ``places[j]``, or 0."""
    ty, n = V(I8, 4 * v.type.count), v.type.count
    order = [4 * lane + (4 * n if p is None else p) for lane in range(n) for p in places]
    zeros = e.const(0, ty)
    moved = e.b.shuffle_vector(e.b.bitcast(v, ty), zeros, ir.Constant(V(I32, 4 * n), order))
    return e.b.bitcast(moved, v.type)
