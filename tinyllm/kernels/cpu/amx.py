"""Intel AMX: a matrix unit for int8, 16 tokens x 16 rows x 32 columns in one instruction.

It computes the same exact integer sums as the byte dot products; scaling follows in the order that ``micro``
states, so results are equal to the bit. A tile of sums leaves the unit through memory (first-level cache).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from llvmlite import ir

from .emit import F32, I8, I16, I32, I64, LANES, Emit, V
from .formats import Format, Tile
from .micro import scaled
from .records import Activations
from .simd import emitter, i64, types

SLOTS = 16  # tokens of a tile register
VOID = ir.VoidType()
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)  # tile registers


@lru_cache
def starter(fmt: Format) -> Callable:
    """Make start(): shape the tile registers for as many columns as share a scale, 64 at most."""
    group = min(64, fmt.group if fmt.span == 32 else fmt.span)

    @emitter(types.void)
    def start(e):
        """Shape the tile registers."""
        config = e.room(ir.ArrayType(I8, 64))
        config.align = 64
        p = e.b.bitcast(config, e.ptr(I64(0)).type)
        e.store(ir.Constant(V(I8, 64), [0] * 64), p)
        e.store(I8(1), p)  # palette 1
        shapes = {**dict.fromkeys(SUMS, (16, 64)), **dict.fromkeys(LEFT, (16, group))}
        shapes |= dict.fromkeys(RIGHT, (group // 4, 64))
        for register, (rows, row_bytes) in shapes.items():
            e.store(I16(row_bytes), p, 16 + 2 * register)
            e.store(I8(rows), p, 48 + register)
        e.call("llvm.x86.ldtilecfg", VOID, p)

    return start


@emitter(types.void)
def nothing(e):
    """Do nothing: stands for start and stop where a processor has no matrix unit."""


@emitter(types.void)
def stop(e):
    """Give the tile registers back, so that the system need not save them."""
    e.call("llvm.x86.tilerelease", VOID)


class Products:
    """Sums of 16 tokens x 16 rows, ``group`` columns at a time; even and odd steps have a memory each.

    The operands of a product are loaded before the product ahead of it is computed: a register that is loaded
    just in time makes the unit wait (this order is 1.15 to 1.45 times as fast with 512 tokens).
    """

    def __init__(self, e: Emit, panel, records, n_steps, form: Format) -> None:
        self.e, self.panel, self.records, self.form = e, e.ptr(panel), e.ptr(records), form
        self.last = e.b.sub(n_steps, I64(1))
        self.n_groups = 32 // form.group
        memory = e.room(ir.ArrayType(I8, 2 * 1024 * self.n_groups))
        memory.align = 64
        self.memory = e.b.bitcast(memory, self.panel.type)

    def place(self, i) -> tuple:
        """Addresses of the records and codes of step i, or of the last step when there are no more."""
        b = self.e.b
        i = b.select(b.icmp_signed("<", i, self.last), i, self.last)
        record = self.e.at(self.records, b.mul(i, I64(64 * SLOTS)))
        return record, self.e.at(self.panel, b.mul(i, I64(self.form.tile_bytes)))

    def fetch(self, i, g: int, k: int) -> None:
        """Load the codes of group g of step i into the registers of parity k, and clear their sums."""
        e, group = self.e, self.form.group
        record, codes = self.place(i)
        e.call("llvm.x86.tilezero", VOID, I8(SUMS[k]))
        e.call("llvm.x86.tileloadd64", VOID, I8(LEFT[k]), e.at(record, group * g), I64(32))
        e.call("llvm.x86.tileloadd64", VOID, I8(RIGHT[k]), e.at(codes, 16 * group * g), I64(64))

    def compute(self, i, parity: int) -> None:
        """Compute the sums of step i, whose operands are loaded already, and load those of the next."""
        e, n = self.e, self.n_groups
        for g in range(n):
            k = (parity * n + g) % 2
            following = (e.b.add(i, I64(1)), 0) if g == n - 1 else (i, g + 1)
            self.fetch(*following, 1 - k)
            e.call("llvm.x86.tdpbssd", VOID, I8(SUMS[k]), I8(LEFT[k]), I8(RIGHT[k]))
            out = e.at(self.memory, 1024 * (parity * n + g))
            e.call("llvm.x86.tilestored64", VOID, I8(SUMS[k]), out, I64(64))

    def scale(self, i, parity, acc: list) -> list:
        """acc [16 tokens] + the sums of step i, scaled."""
        record, codes = self.place(i)
        sums = self.e.at(self.memory, self.e.b.mul(parity, I64(1024 * self.n_groups)))
        part = next(iter(self.form.take(self.e, Tile(self.e, codes, self.form, I64(0), LANES))))
        return [_scale(self.e, part, sums, record, t, a) for t, a in enumerate(acc)]


@lru_cache
def multiplier(form: Format) -> Callable:
    """Make multiply(panels, panel_bytes, records, n, n_steps, n_tiles, y, ..): y += tiles times 16 tokens.

    The tiles are unpacked. The sums of a step are scaled while the unit computes the next one.
    """

    @emitter(types.void, i64, i64, i64, i64)
    def tile(e, panel, records, n_steps, y):
        """Multiply one tile by 16 tokens."""
        b, p = e.b, Products(e, panel, records, n_steps, form)

        def step(i, parity, acc):
            p.compute(i, parity)
            return p.scale(b.sub(i, I64(1)), I64(1 - parity), acc)

        def pair(j, acc):
            i = b.add(b.mul(j, I64(2)), I64(1))
            return step(b.add(i, I64(1)), 0, step(i, 1, acc))

        acc = [e.load(e.ptr(y), V(F32, LANES), 64 * t) for t in range(SLOTS)]
        p.fetch(I64(0), 0, 0)
        p.compute(I64(0), 0)
        acc = e.loop_maybe(b.ashr(p.last, I64(1)), acc, pair)
        odd = b.and_(p.last, I64(1))
        acc = e.loop_maybe(odd, acc, lambda _, acc: step(p.last, 1, acc))
        for t, v in enumerate(p.scale(p.last, odd, acc)):
            e.store(v, e.ptr(y), 64 * t)

    def multiply(
        panels, panel_bytes, records, n, n_steps, n_tiles, y, x_bytes, y_bytes, ahead, ahead_bytes
    ):
        """Add the products of all tiles with 16 tokens to y."""
        for i in range(n_tiles):
            tile(panels + i * panel_bytes, records, n_steps, y + 1024 * i)

    return multiply


def _scale(e: Emit, part, sums, record, token: int, acc):
    x = Activations(e, record, e.at(record, 32 * SLOTS), SLOTS, LANES)
    totals = [e.load(sums, V(I32, LANES), 1024 * g + 64 * token) for g in range(len(part.scales))]
    return scaled(e, part, totals, x, token, acc)
