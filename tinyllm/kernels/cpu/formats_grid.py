"""How kernels decode formats whose weights are rows of a codebook: IQ1, IQ2 (rows of 8), IQ3 (rows of 4).

A codebook's values are one of a few levels, so eight of them are the nibbles of one 32-bit number: one
look-up in memory brings 8 columns of a row. Bit 3 of a nibble is the sign, and a table of 16 has the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir

from ...gguf.quants.iq_tables import codebook
from .emit import I1, I8, I16, I32, I64, P8, Emit, V, instruction_set
from .layout import (
    NIBBLES,
    Code,
    Format,
    Part,
    Tile,
    bit_fields,
    byte_of,
    has_bit_fields,
    lookup,
    lookup_nibbles,
    permute_bytes,
    shuffle,
    spread,
    words,
)

OFFSET, OFFSET_IQ1 = 64, 16  # added to codes, which makes them positive
MINUS = 0x88888888


@cache
def table(name: str) -> tuple[int, ...]:
    """A codebook as one number for each row: bits 8j are the level of column j, bits 8j + 4 of column 4 + j."""
    rows = codebook(name)
    levels = np.searchsorted(np.unique(rows), rows).astype(np.uint32)
    shifts = np.array([0, 8, 16, 24, 4, 12, 20, 28], np.uint32)
    return tuple((levels << shifts[: rows.shape[1]]).sum(1).tolist())


@cache
def code_of_nibble(name: str) -> tuple[int, ...]:
    """The code of each nibble: OFFSET + level, or OFFSET - level where bit 3 is set.

    For IQ1 they are OFFSET_IQ1 + 8 * level + 1, or - 1 where bit 3 is set.
    """
    levels = np.unique(codebook(name))
    ways = [OFFSET + levels, OFFSET - levels]
    if name == "IQ1":
        ways = [OFFSET_IQ1 + 8 * levels + one for one in (1, -1)]
    plus, minus = (way.tolist() + [0] * (8 - len(way)) for way in ways)
    return (*plus, *minus)


def gather(e: Emit, name: str, index: Any) -> Any:
    """``table(name)[index]`` in each lane; the table is part of the compiled kernel."""
    p, ty, n = _constant(e, name), index.type, index.type.count
    if instruction_set() == "avx512vnni":
        args = e.const(0, ty), p, index, e.const(1, V(I1, n)), I32(4)
        return e.call("llvm.x86.avx512.mask.gather.dpi.512", ty, *args)
    if instruction_set() in ("avx2", "avxvnni"):
        args = e.const(0, ty), p, index, e.const(-1, ty), I8(4)
        return e.call_each("llvm.x86.avx2.gather.d.d.256", ty, *args)
    found = ir.Constant(ty, ir.Undefined)
    for i in range(n):
        at = e.b.shl(e.b.zext(e.b.extract_element(index, I32(i)), I64), I64(2))
        found = e.b.insert_element(found, e.load(p, I32, at), I32(i))
    return found


def _constant(e: Emit, name: str) -> Any:
    """The address of a codebook's table, which becomes a constant of the module."""
    module, numbers = e.b.module, table(name)
    if name not in module.globals:
        ty = ir.ArrayType(I32, len(numbers))
        memory = ir.GlobalVariable(module, ty, name)
        memory.initializer, memory.global_constant = ir.Constant(ty, list(numbers)), True
        memory.linkage, memory.align = "internal", 64
    return e.b.bitcast(module.globals[name], P8)


def _codes(e: Emit, name: str, index: Callable, minus: Callable) -> list[Code]:
    """Codes of 32 columns: ``index(k)`` is the row of their k-th 8 or 4, ``minus(run)`` the signs of 8."""
    codes = code_of_nibble(name)

    def levels(run: int) -> Any:
        if codebook(name).shape[1] == 8:
            return gather(e, name, index(run))
        low, high = (gather(e, name, index(2 * run + half)) for half in range(2))
        return e.b.or_(low, e.shl(high, 4))

    nibbles = cache(lambda run: e.b.or_(levels(run), minus(run)))
    return [lambda c=c: lookup_nibbles(e, nibbles(c // 2), c % 2, codes) for c in range(8)]


# ---- rows of 4 from tables in registers, where bytes can be permuted: IQ3_XXS 1.5 times as fast


@cache
def planes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A codebook of rows of 4 as two bytes for each: the two lower bits of its levels, and their third bits."""
    rows = codebook(name)
    levels = np.searchsorted(np.unique(rows), rows)
    two = ((levels & 3) << np.array([0, 2, 4, 6])).sum(1)
    third = ((levels >> 2) << np.arange(4)).sum(1)
    return tuple(two.tolist()), tuple(third.tolist())


@cache
def code_of_bits(name: str) -> tuple[int, ...]:
    """A table of 64 codes by the level (third bit in bit 1, lower two in bits 2 and 3) and the sign (bit 5)."""
    codes = code_of_nibble(name)
    return tuple(codes[(i >> 2 & 3) + (i >> 1 & 1) * 4 + (i >> 5) * 8] for i in range(64))


def _permute(e: Emit, plane: tuple[int, ...], index: Any, ninth: Any) -> Any:
    """Look up plane[index] for each byte; bit 0 of the bytes of ``ninth``, if any, adds 256 to the index."""
    ty, instruction = V(I8, 64), "llvm.x86.avx512.vpermi2var.qi.512"
    low = e.b.bitcast(index, ty)
    tables = [ir.Constant(ty, plane[i : i + 64]) for i in range(0, len(plane), 64)]
    pairs = zip(tables[::2], tables[1::2], strict=True)
    found = [e.call(instruction, ty, first, low, second) for first, second in pairs]
    bits = [e.b.icmp_signed("<", low, e.const(0, ty))]
    if ninth is not None:
        one = e.b.bitcast(e.mask(ninth, 0x01010101), ty)
        bits.append(e.b.icmp_signed("!=", one, e.const(0, ty)))
    for bit in bits:
        found = [e.b.select(bit, *two) for two in zip(found[1::2], found[::2], strict=True)]
    return e.b.bitcast(found[0], index.type)


def _permuted(e: Emit, name: str, index: list[Any], ninth: list[Any], signs: Any) -> list[Code]:
    """Codes of 32 columns from two words of 4 row numbers, their ninth bits, and a sign bit for each column."""

    @cache
    def found(i: int) -> tuple[Any, Any]:
        """Bytes of 4 rows: the two lower bits of their levels; and the third bits with the signs above."""
        two, third = (_permute(e, plane, index[i], ninth[i]) for plane in planes(name))
        nibbles = tuple(16 * i + 4 * row - 4 for row in range(4))
        return two, e.b.or_(third, bit_fields(e, signs, nibbles, 0xF0F0F0F0))

    def code(c: int) -> Any:
        (two, one), at = found(c // 4), c % 4 * 8
        lower = bit_fields(e, two, tuple(at + 2 * j - 2 for j in range(4)))
        others = bit_fields(e, one, tuple(at + j - 1 for j in range(4)))
        ty, if_else = lower.type, I32(0xCA)
        args = (e.const(0x0C0C0C0C, ty), lower, others, if_else)
        bits = e.call("llvm.x86.avx512.pternlog.d.512", ty, *args)
        return permute_bytes(e, bits, code_of_bits(name))

    return [lambda c=c: code(c) for c in range(8)]


# ---- the formats


def _signs(e: Emit, four: Any, run: int) -> Any:
    """Move each bit of byte ``run`` of ``four`` to bit 3 of its column's nibble."""
    if has_bit_fields():
        return bit_fields(e, four, tuple(8 * run + j - 3 for j in range(4)), MINUS)
    # the bits kept are far enough apart that the products below do not overlap
    few = e.mask(shuffle(e, four, (run, None, run, None)), 0x00CC0033)
    shorts = V(I16, 2 * few.type.count)
    factors = ir.Constant(shorts, [0x0408, 0x0102] * few.type.count)
    moved = e.b.mul(e.b.bitcast(few, shorts), factors)
    return e.mask(e.b.bitcast(moved, few.type), MINUS)


_ODD = tuple(128 * (i.bit_count() % 2) for i in range(16))


def _even(e: Emit, four: Any) -> Any:
    """Complete bytes of 7 bits with an eighth that makes the number of ones even."""
    nibbles = e.mask(e.b.xor(four, e.shr(four, 4)), NIBBLES)
    return e.b.or_(four, lookup(e, nibbles, _ODD))


def _packed_signs(e: Emit, word: Any) -> Any:
    """The four sign bytes that 4 x 7 bits of a word stand for."""
    if has_bit_fields():
        return _even(e, bit_fields(e, word, (0, 7, 14, 21), 0x7F7F7F7F))
    seven = [e.mask(e.shl(word, i), 0x7F << 8 * i) for i in range(4)]
    return _even(e, _any(e, seven))


def _any(e: Emit, parts: list[Any]) -> Any:
    """The bitwise or of all parts."""
    first, *others = parts
    for other in others:
        first = e.b.or_(first, other)
    return first


def _field(e: Emit, word: Any, at: int, mask: int, shift: int = 0) -> Any:
    """(word >> at & mask) << shift, in two instructions."""
    moved = e.shr(word, at - shift) if at >= shift else e.shl(word, shift - at)
    return e.mask(moved, mask << shift)


def _scale(e: Emit, word: Any, at: int, width: int) -> Any:
    """The scale 2 s + 1, with s in ``width`` bits of a word."""
    return e.b.or_(_field(e, word, at, (1 << width) - 1, 1), e.const(1, word.type))


def _two_scales(e: Emit, t: Tile, start: int, i: int) -> list[Any]:
    """The two scales that the nibbles of byte i hold."""
    word = t.word(start + i // 4 * 4)
    return [_scale(e, word, i % 4 * 8 + 4 * half, 4) for half in range(2)]


def _iq2_xxs(e: Emit, t: Tile, i: int) -> Part:
    index, word = t.word(2 + 8 * i), t.word(6 + 8 * i)
    minus = partial(_signs, e, _packed_signs(e, word))
    codes = _codes(e, "IQ2_XXS", lambda run: byte_of(e, [index], run), minus)
    return Part(codes, [_scale(e, word, 28, 4)], [])


def _iq2_xs(e: Emit, t: Tile, i: int) -> Part:
    """IQ2_XS; a run of 8 columns has two bytes: 9 bits of index, 7 of sign."""
    two = [t.word(2 + 8 * i + 4 * c) for c in range(2)]
    minus = partial(_signs, e, _even(e, e.mask(e.shr(_upper_bytes(e, two), 1), 0x7F7F7F7F)))
    codes = _codes(e, "IQ2_XS", lambda r: _field(e, two[r // 2], 16 * (r % 2), 511), minus)
    return Part(codes, _two_scales(e, t, 66, i), [])


def _upper_bytes(e: Emit, two: list[Any]) -> Any:
    """The upper bytes of four shorts, as the bytes of one word."""
    return e.b.or_(shuffle(e, two[0], (1, 3, None, None)), shuffle(e, two[1], (None, None, 1, 3)))


def _iq2_s(e: Emit, t: Tile, i: int) -> Part:
    low, signs, high = t.word(2 + 4 * i), t.word(34 + 4 * i), t.word(66 + i // 4 * 4)

    def index(run: int) -> Any:
        return e.b.or_(byte_of(e, [low], run), _field(e, high, i % 4 * 8 + 2 * run, 3, 8))

    codes = _codes(e, "IQ2_S", index, partial(_signs, e, signs))
    return Part(codes, _two_scales(e, t, 74, i), [])


def _iq3_xxs(e: Emit, t: Tile, i: int) -> Part:
    two, word = [t.word(2 + 8 * i + 4 * c) for c in range(2)], t.word(66 + 4 * i)
    signs = _packed_signs(e, word)
    if has_bit_fields():
        codes = _permuted(e, "IQ3_XXS", two, [None, None], signs)
    else:
        codes = _codes(e, "IQ3_XXS", lambda k: byte_of(e, two, k), partial(_signs, e, signs))
    return Part(codes, [_scale(e, word, 28, 4)], [])


def _iq3_s(e: Emit, t: Tile, i: int) -> Part:
    two, signs = [t.word(2 + 8 * i + 4 * c) for c in range(2)], t.word(74 + 4 * i)
    high = t.word(66 + i // 4 * 4)

    def index(k: int) -> Any:
        return e.b.or_(byte_of(e, two, k), _field(e, high, i % 4 * 8 + k, 1, 8))

    if has_bit_fields():
        ninth = [spread(e, high, i % 4 * 8 + 4 * w, 1) for w in range(2)]
        codes = _permuted(e, "IQ3_S", two, ninth, signs)
    else:
        codes = _codes(e, "IQ3_S", index, partial(_signs, e, signs))
    return Part(codes, [_scale(e, t.word(106), 4 * i, 4)], [])


def _all_signs(e: Emit, word: Any, bit: int) -> Any:
    """The signs of 8 columns: MINUS where the bit of the word is set, else 0."""
    top = e.shl(word, 31 - bit)
    return e.mask(e.b.ashr(top, e.const(31, top.type)), MINUS)


def _iq1_s(e: Emit, t: Tile, i: int) -> Part:
    low, high, at = t.word(2 + 4 * i), t.word(34 + i // 2 * 4), 16 * (i % 2)

    def index(run: int) -> Any:
        return e.b.or_(byte_of(e, [low], run), _field(e, high, at + 3 * run, 7, 8))

    minus = _all_signs(e, high, at + 15)
    return Part(_codes(e, "IQ1", index, lambda _: minus), [_scale(e, high, at + 12, 3)], [])


def _iq1_m(e: Emit, t: Tile, i: int) -> Part:
    low, high, at = t.word(4 * i), t.word(32 + i // 2 * 4), 16 * (i % 2)

    def index(run: int) -> Any:
        return e.b.or_(byte_of(e, [low], run), _field(e, high, at + 4 * run, 7, 8))

    scales, first = t.word(48 + i // 4 * 4), i // 2 % 2 * 16 + i % 2 * 6
    both = [_scale(e, scales, first + 3 * half, 3) for half in range(2)]
    return Part(_codes(e, "IQ1", index, lambda r: _all_signs(e, high, at + 4 * r + 3)), both, [])


def _first_half(e: Emit, t: Tile) -> Any:
    return t.half(0)


def _hidden_half(e: Emit, t: Tile) -> Any:
    """The half float whose nibbles are the upper nibbles of four shorts."""
    nibbles = [_field(e, t.word(48 + k // 2 * 4), 12 + 16 * (k % 2), 15, 4 * k) for k in range(4)]
    word = _any(e, nibbles)
    return e.half(e.b.trunc(word, V(I16, word.type.count)))


def _format(
    name: str,
    fields: tuple[tuple[int, int], ...],
    part: Callable,
    factor: float,
    group: int = 32,
    half: Callable = _first_half,
) -> Format:
    """A format of 256 columns: ``part(e, t, i)`` takes the i-th 32; the unit is ``half`` times ``factor``."""

    def take(e: Emit, t: Tile) -> Iterator[Part]:
        d = half(e, t)
        unit = e.b.fmul(d, e.const(factor, d.type))
        for i in range(8):
            yield replace(part(e, t, i), unit=unit)

    offset, bits = (OFFSET_IQ1, 5) if name.startswith("IQ1") else (OFFSET, 7)
    return Format(name, 256, fields, take, offset, group=group, bits=bits, span=256)


_D = (0, 2)
FORMATS = (
    _format("IQ2_XXS", (_D, *words(2, 66)), _iq2_xxs, 1 / 8),
    _format("IQ2_XS", (_D, *words(66, 74), *words(2, 66)), _iq2_xs, 1 / 8, 16),
    _format("IQ2_S", (_D, *words(66, 82), *words(2, 66)), _iq2_s, 1 / 8, 16),
    _format("IQ3_XXS", (_D, *words(2, 98)), _iq3_xxs, 1 / 4),
    _format("IQ3_S", (_D, *words(2, 110)), _iq3_s, 1),
    _format("IQ1_S", (_D, *words(2, 50)), _iq1_s, 1 / 8),
    _format("IQ1_M", words(0, 56), _iq1_m, 1 / 8, 16, _hidden_half),
)
