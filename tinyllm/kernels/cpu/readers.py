"""How the float kernels read weights: column after column of a tile, some rows of it in a vector of float32.

F32, F16 and BF16 are stored so, a column a block. Quantised formats are decoded in registers, for
``compute="exact"``: weight = fma(unit * scale, code, minimum), with what the formats' ``take`` brings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .emit import F32, I16, I32, I64, LANES, Emit, V
from .formats import FORMATS, Format, Part, Tile

BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def widen(e: Emit, p: Any, kind: str, offset: int, n: int) -> Any:
    """n weights of a type as float32."""
    if kind == "F32":
        return e.load(p, V(F32, n), offset)
    raw = e.load(p, V(I16, n), offset)
    if kind == "F16":
        return e.half(raw)
    return e.b.bitcast(e.shl(e.b.zext(raw, V(I32, n)), 16), V(F32, n))


@dataclass(frozen=True)
class Reader:
    """What the float kernels are compiled for."""

    name: str  # that kernels carry
    block: int  # columns that a kernel counts as one
    tile_bytes: int  # those of 16 rows of a block

    @property
    def line(self) -> int:
        """Blocks of a cache line, at least one."""
        return max(64 // self.tile_bytes, 1)

    def columns(
        self, e: Emit, p: Any, first: Any, n: int, n_blocks: int, ahead: Any = None
    ) -> Iterator[Any]:
        """The columns of some blocks at p: of n rows, beginning with row ``first``.

        The lines ``ahead`` bytes behind those that are read are asked for, if it is given.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Reader):
    """F32, F16 or BF16, which ``name`` is."""

    def columns(
        self, e: Emit, p: Any, first: Any, n: int, n_blocks: int, ahead: Any = None
    ) -> Iterator[Any]:
        size = BYTES[self.name]
        for line in range(0, n_blocks * self.tile_bytes, 64) if ahead is not None else ():
            e.prefetch(e.at(p, ahead), line)
        rows = e.at(p, e.b.mul(first, I64(size)))
        for c in range(n_blocks):
            yield widen(e, rows, self.name, c * self.tile_bytes, n)


@dataclass(frozen=True)
class Decoded(Reader):
    """A quantised format."""

    format: Format

    def columns(
        self, e: Emit, p: Any, first: Any, n: int, n_blocks: int, ahead: Any = None
    ) -> Iterator[Any]:
        for i in range(n_blocks):
            tile = Tile(e, e.at(p, i * self.tile_bytes), self.format, first, n, ahead)
            for part in self.format.take(e, tile):
                yield from decoded(e, self.format, part)


def decoded(e: Emit, fmt: Format, part: Part) -> Iterator[Any]:
    """32 columns as floats.

    A code becomes the upper bits of the mantissa of 2 ** bits, which makes it 2 ** bits + code. What that is
    too much, times the scale, and the format's offset, are part of what is added.
    """
    bits, offset = (8, 128) if fmt.signed else (fmt.bits, fmt.offset)
    scales, minima = part.scales, part.minima
    if part.unit is not None:
        scales = [e.b.fmul(part.unit, e.to_float(s)) for s in scales]
    less = [e.const(-(2**bits + offset), s.type) for s in scales]
    if minima:
        least = [e.fma(s, v, m) for s, v, m in zip(scales, less, minima, strict=True)]
    else:
        least = [e.b.fmul(s, v) for s, v in zip(scales, less, strict=True)]
    mantissa, exponent = 2**bits - 1 << 23 - bits, 127 + bits << 23
    for c, code in enumerate(part.codes):
        e.in_order()
        word, group = code(), c * len(scales) // len(part.codes)
        if fmt.signed:
            word = e.b.xor(word, e.const(0x80808080, word.type))
        for shift in range(23 - bits, -bits - 8, -8):
            moved = e.shl(word, shift) if shift > 0 else e.shr(word, -shift)
            number = e.b.or_(e.mask(moved, mantissa), e.const(exponent, word.type))
            value = e.b.bitcast(number, scales[group].type)
            yield e.fma(value, scales[group], least[group])


@lru_cache
def plain(kind: str) -> Plain:
    """The reader of F32, F16 or BF16."""
    return Plain(kind, 1, LANES * BYTES[kind])


@lru_cache
def exact(kind: str) -> Decoded:
    """The reader of a quantised format."""
    fmt = FORMATS[kind]
    return Decoded(f"exact_{kind}", fmt.block, fmt.tile_bytes, fmt)
