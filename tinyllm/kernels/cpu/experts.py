"""Mixtures of experts: rows through matrices of a stack, chosen row by row.

One token: each of its choices goes through its matrix by itself (``matvec_experts``). More: rows are sorted
by expert when the program runs (``group_rows``) and brought together (``gather_records``, ``gather_floats``);
then a piece takes one expert and a few tiles and calls the kernels of ``matmul`` on the rows that chose it,
so each expert's weights are read once. Those kernels compute the same bits for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import jit, matmul, micro
from .floats import GROUP, multiplier
from .program import CPUArray, Tape
from .simd import (
    arg,
    copy,
    get_f32,
    get_i32,
    get_i64,
    load_n,
    set_f32,
    set_i32,
    set_i64,
    store_n,
)
from .threads import call_kernel
from .weights import CPUWeight

# ---- kernels; the micro-kernel that they name is given by ``jit.kernel``

multiply = None
ROWS_AT_ONCE = 480  # of one expert: their outputs wait in a worker's scratch memory
INNER = 256  # bytes of the arguments of the kernel that a piece calls
FEW, FEW_FLOAT = 6, 2  # rows that go one by one: cheaper than unpacking, the tiles being in cache
SEGMENT = 24  # bytes: an expert, its first place in ``order``, its number of rows


def matvec_experts(args, first, last, worker):
    """y [rows, n_out], row r through the matrix experts[r]; a piece is a tile of one row."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_blocks, tiles, n_out = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    experts, x_bytes, choices, scratch = arg(args, 8), arg(args, 9), arg(args, 10), arg(args, 11)
    out = scratch + 64 * worker
    for piece in range(first, last):
        row, tile = piece // tiles, piece % tiles
        expert = get_i32(experts + 4 * row)
        source = x + (row // choices) * x_bytes
        multiply(w + (expert * tiles + tile) * tile_bytes, source, 0, n_blocks, out)
        n = min(16, n_out - 16 * tile)
        if bias != 0:
            for i in range(n):
                b = get_f32(bias + 4 * (expert * n_out + 16 * tile + i))
                set_f32(out + 4 * i, get_f32(out + 4 * i) + b)
        copy(y + 4 * (row * n_out + 16 * tile), out, 4 * n)


def group_rows(args, first, last, worker):
    """experts [rows] -> segments, one for each expert that is chosen, and ``order``: the rows of a segment
    side by side, each segment beginning a run of ``slots``; -1 where there is none. One piece.
    """
    experts, n_rows, n_experts, slots = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    segments, n_segments = arg(args, 4), arg(args, 5)
    order, n_order, ends = arg(args, 6), arg(args, 7), arg(args, 8)
    for e in range(n_experts):
        set_i32(ends + 4 * e, 0)
    for i in range(n_order):
        set_i32(order + 4 * i, -1)
    for r in range(n_rows):
        e = ends + 4 * get_i32(experts + 4 * r)
        set_i32(e, get_i32(e) + 1)
    place, segment = 0, segments
    for e in range(n_experts):
        n = get_i32(ends + 4 * e)
        set_i32(ends + 4 * e, place)
        if n > 0:
            set_i64(segment, e)
            set_i64(segment + 8, place)
            set_i64(segment + 16, n)
            segment += SEGMENT
            place += (n + slots - 1) // slots * slots
    while segment < segments + n_segments * SEGMENT:
        set_i64(segment + 16, 0)
        segment += SEGMENT
    for r in range(n_rows):
        e = ends + 4 * get_i32(experts + 4 * r)
        set_i32(order + 4 * get_i32(e), r)
        set_i32(e, get_i32(e) + 1)


def gather_records(args, first, last, worker):
    """Records of one token -> records of ``slots``; a piece is a run of ``order``."""
    x, out, order, choices = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n_bytes, slots, span = arg(args, 4), arg(args, 5), arg(args, 6)
    for piece in range(first, last):
        run = order + 4 * slots * piece
        for slot in range(slots):
            row = get_i32(run + 4 * slot)
            if row < 0:
                break
            source = x + row // choices * n_bytes
            to = out + piece * n_bytes * slots
            for _ in range(0, n_bytes, 2 * span):  # as many bytes of codes as of fields
                copy(to + span * slot, source, span)
                for i in range(0, span, 4):
                    set_i32(to + (span + i) * slots + 4 * slot, get_i32(source + span + i))
                source += 2 * span
                to += slots * 2 * span


def gather_floats(args, first, last, worker):
    """Rows of x [.., n], side by side as in ``order``; a piece is a row."""
    x, out, order, choices = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n_bytes = arg(args, 4)
    for piece in range(first, last):
        row = get_i32(order + 4 * piece)
        if row >= 0:
            copy(out + n_bytes * piece, x + n_bytes * (row // choices), n_bytes)


def matmul_experts(args, first, last, worker):
    """y [rows, n_out] of grouped rows; a piece is one segment and ``at_once`` tiles."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, tiles, n_out, at_once = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    segments, order, choices = arg(args, 8), arg(args, 9), arg(args, 10)
    x_bytes, packed, packed_bytes, slots = (
        arg(args, 11),
        arg(args, 12),
        arg(args, 13),
        arg(args, 14),
    )
    matvec, matvec_args, per_piece = arg(args, 15), arg(args, 16), arg(args, 17)
    matmul, matmul_args = arg(args, 18), arg(args, 19)
    at_most, inner = arg(args, 22), arg(args, 20) + worker * arg(args, 21)
    out, groups = inner + INNER, (tiles + at_once - 1) // at_once
    most = ROWS_AT_ONCE // slots * slots
    for piece in range(first, last):
        segment, tile = segments + SEGMENT * (piece // groups), piece % groups * at_once
        expert, place, n_rows = get_i64(segment), get_i64(segment + 8), get_i64(segment + 16)
        n_tiles = min(at_once, tiles - tile)
        width, n = 16 * n_tiles, min(16 * n_tiles, n_out - 16 * tile)
        few = n_rows <= at_most
        copy(inner, matvec_args if few else matmul_args, INNER)
        set_i64(inner, w + (expert * tiles + tile) * tile_bytes)
        set_i64(inner + 16, out)
        set_i64(inner + 48, n_tiles)
        set_i64(inner + 56, width)
        start = 0
        while start < n_rows:
            rows = 1 if few else min(most, n_rows - start)
            if few:
                row = get_i32(order + 4 * (place + start))
                set_i64(inner + 8, x + row // choices * x_bytes)
                call_kernel(matvec, inner, 0, (n_tiles + per_piece - 1) // per_piece, worker)
            else:
                set_i64(inner + 8, packed + (place + start) // slots * packed_bytes)
                set_i64(inner + 64, rows)
                call_kernel(matmul, inner, 0, 1, worker)
            for r in range(rows):
                row = get_i32(order + 4 * (place + start + r))
                to, source = y + 4 * (row * n_out + 16 * tile), out + 4 * r * width
                if bias == 0:
                    copy(to, source, 4 * n)
                    continue
                b = bias + 4 * (expert * n_out + 16 * tile)
                for i in range(0, n, 16):
                    v = load_n(source + 4 * i, n - i) + load_n(b + 4 * i, n - i)
                    store_n(to + 4 * i, v, n - i)
            start += rows


# ---- recorded


def record_experts(
    tape: Tape, w: CPUWeight, x: CPUArray, experts: CPUArray, bias: CPUArray | None, n_workers: int
) -> CPUArray:
    """Each row and choice through its own matrix: [T, k, n_out]."""
    n_tokens, k = experts.shape
    forms = _single(tape, w, x)
    groups = _Groups.of(tape, w, experts) if n_tokens > 1 else None
    packed = groups.gather(tape, w, x, forms) if groups else None
    y = tape.array((n_tokens, k, w.n_out))
    common = [w.address, forms.address, y.address, bias.address if bias is not None else 0]
    if groups:
        _record_grouped(tape, w, common, groups, packed, _choices(x, k), n_workers)
    else:
        _record_each(tape, w, common, experts, _choices(x, k), n_workers)
    tape.keep(w, x, forms, experts, bias, y)
    return y


def _choices(x: CPUArray, k: int) -> int:
    """How many outputs a row of x has."""
    return 1 if len(x.shape) == 3 else k


def _single(tape: Tape, w: CPUWeight, x: CPUArray) -> CPUArray:
    """x as the kernels for one row read it, made once for all that share x."""
    if w.format is None:
        return x
    key = ("single", w.format.span)
    if key not in x.derived:
        flat = x.reshape(-1, w.n_in)
        x.derived[key] = matmul.quantise_array(tape, flat, w.format.span, single=True)
    return x.derived[key]


def _row_bytes(w: CPUWeight) -> int:
    """Of one row of x in the form ``_single``."""
    return w.n_in // 32 * micro.record_bytes(1) if w.format else 4 * w.n_in


def _record_each(
    tape: Tape, w: CPUWeight, common: list[int], experts: CPUArray, choices: int, n_workers: int
) -> None:
    one = micro.multiplier(w.format, 1, 1) if w.format else multiplier(w.kind, 1)
    scratch = tape.array((n_workers, 64), "u1")
    args = [*common, w.tile_bytes, w.n_blocks, w.n_tiles, w.n_out, experts.address]
    args += [_row_bytes(w), choices, scratch.address]
    address = jit.kernel(matvec_experts, f"matvec_experts_{w.kind}", multiply=one)
    pieces = experts.size * w.n_tiles
    tape.add(address, pieces, args, matmul.chunk(pieces))


class _Groups:
    """Where the rows of each expert are: ``segments`` and ``order`` as ``group_rows`` leaves them."""

    def __init__(self, tape: Tape, experts: CPUArray, n_experts: int, slots: int) -> None:
        n_rows = experts.size
        self.slots, self.n_rows, self.n_segments = slots, n_rows, min(n_experts, n_rows)
        self.n_runs = n_rows if slots == 1 else n_rows // slots + self.n_segments
        self.segments = tape.array((self.n_segments, SEGMENT // 8), np.int64)
        self.order = tape.array((self.n_runs, slots), np.int32)
        ends = tape.array((n_experts,), np.int32)
        args = [experts.address, n_rows, n_experts, slots, self.segments.address, self.n_segments]
        args += [self.order.address, self.order.size, ends.address]
        tape.add(jit.kernel(group_rows), 1, args)
        self.packed: dict[CPUArray, CPUArray] = {}

    @staticmethod
    def of(tape: Tape, w: CPUWeight, experts: CPUArray) -> _Groups:
        """Of this choice of experts, sorted once for all products with it."""
        slots = micro.SLOTS if w.format else 1
        key = ("groups", slots)
        if key not in experts.derived:
            experts.derived[key] = _Groups(tape, experts, w.shape[0], slots)
        return experts.derived[key]

    def gather(self, tape: Tape, w: CPUWeight, x: CPUArray, forms: CPUArray) -> CPUArray:
        """Rows of x, in the form ``forms``, brought together by expert."""
        if forms in self.packed:
            return self.packed[forms]
        n = w.n_in
        size = micro.record_bytes(1) * n // 32 if w.format else 4 * n
        out = tape.array((self.n_runs * self.slots, size), "u1")
        body: Callable = gather_records if w.format else gather_floats
        args = [forms.address, out.address, self.order.address, self.n_rows * n // x.size]
        args += [size, self.slots, w.format.span] if w.format else [4 * n]
        tape.add(jit.kernel(body), self.n_runs, args)
        self.packed[forms] = out
        return out


def _record_grouped(
    tape: Tape,
    w: CPUWeight,
    common: list[int],
    groups: _Groups,
    packed: CPUArray,
    choices: int,
    n_workers: int,
) -> None:
    at_once, per_piece = (matmul.tiles_together(w, n_workers), 1) if w.format else (GROUP, GROUP)
    most = min(groups.n_rows, ROWS_AT_ONCE)
    matvec, one_more = matmul.matvec_kernel(w)
    product, many_more, _, inner = matmul.matmul_kernel(tape, w, most, n_workers)
    blocks = [w.tile_bytes, w.n_blocks]
    templates = np.zeros((2, INNER // 8), np.int64)
    for template, more in zip(templates, (one_more, many_more), strict=True):
        template[4 : 6 + len(more)] = blocks + more
    scratch = tape.array((n_workers, INNER + 64 * at_once * most), "u1")
    args = [*common, w.tile_bytes, w.n_tiles, w.n_out, at_once]
    args += [groups.segments.address, groups.order.address, choices, _row_bytes(w)]
    args += [packed.address, packed.nbytes // groups.n_runs, groups.slots]
    args += [matvec, templates[0].ctypes.data, per_piece]
    args += [product, templates[1].ctypes.data, scratch.address, scratch.shape[1]]
    args += [FEW if w.format else FEW_FLOAT]
    pieces = groups.n_segments * -(-w.n_tiles // at_once)
    tape.add(jit.kernel(matmul_experts), pieces, args)
    tape.keep(templates, inner, scratch)
