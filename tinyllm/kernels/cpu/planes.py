"""Products of blocks of 256 columns on the matrix unit: their sums need no scaling on the way.

A weight is a small integer, scale times code, of up to 13 bits, times the block's unit. Unpacked, it lies in
*planes* of bytes: weight = 128 * high + low (one plane where it fits). The unit adds up 64 columns of each
plane in one instruction, and a whole block before anything leaves it: the sums are those that ``micro`` states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from llvmlite import ir

from . import micro, records
from .amx import LEFT, RIGHT, SLOTS, SUMS, VOID
from .emit import F32, I8, I16, I32, I64, LANES, Emit, V
from .formats import Format, Part, Tile
from .simd import emitter, i64, types

TILE = 1024  # bytes of a tile register
STEPS = 4  # products of 64 columns to a block


def n_planes(fmt: Format) -> int:
    """Planes of bytes that a weight takes."""
    return 1 if fmt.narrow else 2


def panel_bytes(fmt: Format) -> int:
    """Bytes of an unpacked block of 16 rows: planes [STEPS][planes][64 columns][16 rows], and units."""
    return STEPS * n_planes(fmt) * TILE + 64


# ---- unpacking


@lru_cache
def unpacker(fmt: Format) -> Callable:
    """Make unpack(w, n_blocks, out, ahead): write a tile of 16 rows as planes.

    ``ahead``: as in ``micro.multiplier``.
    """

    @emitter(types.void, i64, i64, i64, i64)
    def unpack(e, w, n_blocks, out, ahead):
        """Write a tile of 16 rows as planes."""

        def block(i, state):
            p = e.at(e.ptr(w), e.b.mul(i, I64(fmt.tile_bytes)))
            to = e.at(e.ptr(out), e.b.mul(i, I64(panel_bytes(fmt))))
            _put_block(e, fmt, Tile(e, p, fmt, I64(0), LANES, ahead), to)
            return state

        e.loop(n_blocks, [], block)

    return unpack


def _put_block(e: Emit, fmt: Format, tile: Tile, to) -> None:
    planes = n_planes(fmt)
    for j, part in enumerate(fmt.take(e, tile)):
        step, half = divmod(j, 2)
        for c in range(8):
            for k, v in enumerate(_planes(e, fmt, part, c)):
                e.store(v, to, TILE * (planes * step + k) + 64 * (8 * half + c))
    e.store(part.unit, to, STEPS * planes * TILE)


def _planes(e: Emit, fmt: Format, part: Part, c: int) -> list:
    """The bytes of each plane for 4 neighbouring columns of 16 rows."""
    b, ty = e.b, V(I16, 2 * LANES)
    codes = part.codes[c]()
    if fmt.offset:
        codes = micro.subtract_bytes(e, codes, fmt.offset)
    scale = part.scales[c * len(part.scales) // 8]
    scale = b.bitcast(b.or_(e.mask(scale, 0xFFFF), e.shl(scale, 16)), ty)
    both = b.bitcast(codes, ty)
    eight = e.const(8, ty)
    even, odd = (b.mul(b.ashr(v, eight), scale) for v in (b.shl(both, eight), both))
    high_bytes, low_bytes = e.const(0xFF00, ty), e.const(0x00FF, ty)
    if n_planes(fmt) == 1:
        return [b.bitcast(b.or_(b.and_(even, low_bytes), b.shl(odd, eight)), codes.type)]
    low = b.or_(b.and_(even, e.const(0x7F, ty)), b.and_(b.shl(odd, eight), e.const(0x7F00, ty)))
    high = b.or_(
        b.and_(b.lshr(even, e.const(7, ty)), low_bytes),
        b.and_(b.shl(odd, e.const(1, ty)), high_bytes),
    )
    return [b.bitcast(v, codes.type) for v in (low, high)]


# ---- products


class Products:
    """Sums of one block: some tiles of rows times one or two tiles of 16 tokens.

    Even and odd tiles of rows have a memory each. A register is loaded again as soon as no product needs what
    it holds, and the product that takes the youngest register comes last, so that loads and products overlap.
    """

    def __init__(self, e: Emit, fmt: Format, panels, records: list, n_tiles, y: list) -> None:
        self.e, self.panels, self.y = e, e.ptr(panels), [e.ptr(v) for v in y]
        self.records = [e.ptr(r) for r in records]
        self.last = e.b.sub(n_tiles, I64(1))
        self.planes, self.panel_bytes = n_planes(fmt), panel_bytes(fmt)
        self.n_sums = self.planes * len(records)
        memory = e.room(ir.ArrayType(I8, 2 * TILE * self.n_sums))
        memory.align = 64
        self.memory = e.b.bitcast(memory, self.panels.type)

    def panel(self, i, offset: int = 0):
        """The address of the block of tile i, ``offset`` bytes on."""
        return self.e.at(
            self.panels, self.e.b.add(self.e.b.mul(i, I64(self.panel_bytes)), I64(offset))
        )

    def load_left(self, t: int, step: int) -> None:
        """Load 64 columns of tile t of tokens."""
        p = self.e.at(self.records[t], 64 * step)
        self.e.call("llvm.x86.tileloadd64", VOID, I8(LEFT[t]), p, I64(256))

    def load_right(self, k: int, i, step: int) -> None:
        """Load 64 columns of plane k of tile i."""
        p = self.panel(i, TILE * (self.planes * step + k))
        self.e.call("llvm.x86.tileloadd64", VOID, I8(RIGHT[k]), p, I64(64))

    def begin(self) -> None:
        """Load what the first step needs, in the order of ``step``."""
        self.load_left(0, 0)
        for k in range(self.planes):
            self.load_right(k, I64(0), 0)
        for t in range(1, len(self.records)):
            self.load_left(t, 0)

    def step(self, i, s: int) -> None:
        """Multiply 64 columns, and load the registers for the next 64."""
        b, tokens = self.e.b, range(len(self.records))
        after = b.add(i, I64(1))
        after = b.select(b.icmp_signed("<", after, self.last), after, self.last)
        following = (i, s + 1) if s < STEPS - 1 else (after, 0)
        order = list(range(self.planes))
        if s % 2:
            order.reverse()
        for t in tokens:
            for k in order:
                total = I8(SUMS[self.planes * t + k])
                if s == 0:
                    self.e.call("llvm.x86.tilezero", VOID, total)
                self.e.call("llvm.x86.tdpbssd", VOID, total, I8(LEFT[t]), I8(RIGHT[k]))
                if t == tokens[-1]:
                    self.load_right(k, *following)
            self.load_left(t, following[1])
            order.reverse()

    def sums(self, parity):
        """The address of the sums of even, or odd, tiles."""
        return self.e.at(self.memory, self.e.b.mul(parity, I64(TILE * self.n_sums)))

    def store(self, parity) -> None:
        """Store the sums of a tile in the memory of its parity."""
        for n in range(self.n_sums):
            out = self.e.at(self.sums(parity), TILE * n)
            self.e.call("llvm.x86.tilestored64", VOID, I8(SUMS[n]), out, I64(64))

    def scale(self, i, parity, tokens: range) -> None:
        """Add the scaled sums of tile i and some tokens to y [tile][16][16]."""
        e, b, vector = self.e, self.e.b, V(F32, LANES)
        unit = e.load(self.panel(i, STEPS * self.planes * TILE), vector)
        sums = self.sums(parity)
        for token in tokens:
            t, slot = divmod(token, SLOTS)
            f = e.at(self.records[t], 256 * SLOTS)
            d = records.Activations(e, f, f, SLOTS, LANES, 256).field(slot, "d")
            y = e.at(self.y[t], b.mul(i, I64(64 * SLOTS)))
            acc = e.load(y, vector, 64 * slot)
            acc = micro.add_unit(e, self.total(sums, t, slot), unit, d, acc)
            e.store(acc, y, 64 * slot)

    def total(self, sums, t: int, slot: int):
        """The sum over all planes for one token."""
        at = [TILE * (self.planes * t + k) + 64 * slot for k in range(self.planes)]
        parts = [self.e.load(sums, V(I32, LANES), p) for p in at]
        if len(parts) == 1:
            return parts[0]
        return self.e.b.add(parts[0], self.e.shl(parts[1], 7))


def _multiply(e: Emit, p: Products) -> None:
    """Multiply all tiles. One is scaled while the next is multiplied: its last sums take a while to arrive."""
    b, n = e.b, len(p.records) * SLOTS
    ends = [0, *(n * k // (STEPS - 1) for k in range(STEPS))]

    def tile(i, parity, before: Callable) -> None:
        for s in range(STEPS):
            p.step(i, s)
            before(range(ends[s], ends[s + 1]))
        p.store(parity)

    def following(i, state):
        parity = b.and_(b.add(i, I64(1)), I64(1))
        tile(b.add(i, I64(1)), parity, lambda tokens: p.scale(i, b.xor(parity, I64(1)), tokens))
        return state

    p.begin()
    tile(I64(0), I64(0), lambda tokens: None)
    e.loop_maybe(p.last, [], following)
    p.scale(p.last, b.and_(p.last, I64(1)), range(n))


@lru_cache
def multiplier(fmt: Format) -> Callable:
    """Make multiply(panels, _, records, n, _, n_tiles, y, x_bytes, y_bytes): one block times up to 32 tokens.

    The second 16 tokens stand x_bytes after the first, and their sums y_bytes.
    """

    @emitter(types.void, i64, i64, i64, i64)
    def one(e, panels, records, n_tiles, y):
        """Multiply all tiles by 16 tokens."""
        _multiply(e, Products(e, fmt, panels, [records], n_tiles, [y]))

    @emitter(types.void, i64, i64, i64, i64, i64, i64)
    def two(e, panels, records, n_tiles, y, x_bytes, y_bytes):
        """Multiply all tiles by 32 tokens."""
        more, out = e.b.add(records, x_bytes), e.b.add(y, y_bytes)
        _multiply(e, Products(e, fmt, panels, [records, more], n_tiles, [y, out]))

    def multiply(
        panels, panel_bytes, records, n, steps, n_tiles, y, x_bytes, y_bytes, ahead, ahead_bytes
    ):
        """Add the products of one block of all tiles with n tokens to y."""
        if n > 16:
            two(panels, records, n_tiles, y, x_bytes, y_bytes)
        else:
            one(panels, records, n_tiles, y)

    return multiply
