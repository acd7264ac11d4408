"""Mixtures of experts: rows through matrices of a stack, chosen row by row.

One token: each of its choices goes through its matrix by itself (``matvec_experts``). More: rows are sorted
by expert when the program runs (``group_rows``) and brought together (``gather_records``, ``gather_floats``);
then a piece takes one expert and a few tiles and calls the kernels of ``matmul`` on the rows that chose it,
so each expert's weights are read once. Those kernels compute the same bits for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from . import jit, matmul, records
from .floats import GROUP, multiplier
from .jit import GIVEN
from .program import CPUArray, Tape, wrapped
from .simd import copy, get_f32, get_i32, get_i64, load_n, set_f32, set_i32, set_i64, store_n
from .threads import call_kernel
from .translate import parameters
from .weights import CPUWeight

# ---- kernels; the micro-kernel that they name is given by ``jit.kernel``

multiply = GIVEN
ROWS_AT_ONCE = (
    480  # rows of one expert, within a piece of ``matmul``, whose outputs wait in a worker's memory
)
INNER = 256  # bytes of the arguments of the kernel that a piece calls
FEW, FEW_FLOAT = 6, 2  # rows that go one by one: cheaper than unpacking, the tiles being in cache
SEGMENT = 24  # bytes: an expert, its first place in ``order``, its number of rows

# the arguments of that kernel which a piece sets, and where they stand: all such kernels begin alike
SET = ("w", "x", "y", "tiles", "n_out", "n_tokens")
BEGINNING = tuple(parameters(matmul.matmul))
W, X, Y, TILES, N_OUT, N_TOKENS = (8 * BEGINNING.index(name) for name in SET)


def matvec_experts(
    w, x, y, bias, tile_bytes, n_blocks, ahead, tiles, n_out, experts, x_bytes, choices, scratch,
    first, last, worker,
):  # fmt: skip
    """y [rows, n_out], row r through the matrix experts[r]; a piece is a tile of one row."""
    out = scratch + 64 * worker
    for piece in range(first, last):
        row, tile = piece // tiles, piece % tiles
        expert = get_i32(experts + 4 * row)
        source = x + (row // choices) * x_bytes
        multiply(w + (expert * tiles + tile) * tile_bytes, source, 0, n_blocks, out, ahead)
        n = min(16, n_out - 16 * tile)
        if bias != 0:
            for i in range(n):
                b = get_f32(bias + 4 * (expert * n_out + 16 * tile + i))
                set_f32(out + 4 * i, get_f32(out + 4 * i) + b)
        copy(y + 4 * (row * n_out + 16 * tile), out, 4 * n)


def group_rows(
    experts, n_rows, n_experts, slots, segments, n_segments, order, n_order, ends,
    first, last, worker,
):  # fmt: skip
    """experts [rows] -> segments, one for each expert that is chosen, and ``order``: the rows of a segment
    side by side, each segment beginning a run of ``slots``; -1 where there is none. One piece.
    """
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


def gather_records(
    x, out, order, choices, n_bytes, digits, slots, span, fields_bytes, first, last, worker
):
    """Records of one token -> records of ``slots`` rows; a piece is a run of ``order``."""
    size = (span + fields_bytes) * digits
    for piece in range(first, last):
        run = order + 4 * slots * piece
        for i in range(slots * digits):
            row, slot, digit = get_i32(run + 4 * (i // digits)), i % slots, i % digits
            if row < 0:
                break
            source = x + row // choices * n_bytes
            to = out + (piece * n_bytes + i // slots * (n_bytes // digits)) * slots
            for _ in range(0, n_bytes, size):
                copy(to + span * slot, source + span * digit, span)
                for j in range(0, fields_bytes, 4):
                    field = source + (span + j) * digits + 4 * digit
                    set_i32(to + (span + j) * slots + 4 * slot, get_i32(field))
                source += size
                to += slots * (span + fields_bytes)


def gather_floats(x, out, order, choices, n_bytes, first, last, worker):
    """Rows of x [.., n], side by side as in ``order``; a piece is a row."""
    for piece in range(first, last):
        row = get_i32(order + 4 * piece)
        if row >= 0:
            copy(out + n_bytes * piece, x + n_bytes * (row // choices), n_bytes)


def matmul_experts(
    w, x, y, bias, tile_bytes, tiles, n_out, at_once, segments, order, choices, x_bytes,
    packed, packed_bytes, slots, matvec, matvec_args, per_piece, matmul, matmul_args, scratch,
    scratch_bytes, at_most, most,
    first, last, worker,
):  # fmt: skip
    """y [rows, n_out] of grouped rows; a piece is one segment and ``at_once`` tiles."""
    inner = scratch + worker * scratch_bytes
    out, groups = inner + INNER, (tiles + at_once - 1) // at_once
    for piece in range(first, last):
        segment, tile = segments + SEGMENT * (piece // groups), piece % groups * at_once
        expert, place, n_rows = get_i64(segment), get_i64(segment + 8), get_i64(segment + 16)
        n_tiles = min(at_once, tiles - tile)
        width, n = 16 * n_tiles, min(16 * n_tiles, n_out - 16 * tile)
        few = n_rows <= at_most
        copy(inner, matvec_args if few else matmul_args, INNER)
        set_i64(inner + W, w + (expert * tiles + tile) * tile_bytes)
        set_i64(inner + Y, out)
        set_i64(inner + TILES, n_tiles)
        set_i64(inner + N_OUT, width)
        start = 0
        while start < n_rows:
            rows = 1 if few else min(most, n_rows - start)
            if few:
                row = get_i32(order + 4 * (place + start))
                set_i64(inner + X, x + row // choices * x_bytes)
                call_kernel(matvec, inner, 0, (n_tiles + per_piece - 1) // per_piece, worker)
            else:
                set_i64(inner + X, packed + (place + start) // slots * packed_bytes)
                set_i64(inner + N_TOKENS, rows)
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
    args: dict[str, Any] = {"w": w, "x": forms, "y": y, "bias": bias, "tile_bytes": w.tile_bytes}
    args |= {"tiles": w.n_tiles, "n_out": w.n_out, "x_bytes": _row_bytes(w)}
    args["choices"] = 1 if len(x.shape) == 3 else k  # outputs of a row of x
    if groups is not None and packed is not None:
        _record_grouped(tape, w, groups, packed, n_workers, args)
    else:
        _record_each(tape, w, experts, n_workers, args)
    return y


def _single(tape: Tape, w: CPUWeight, x: CPUArray) -> CPUArray:
    """x as the kernels for one row read it, made once for all that share x."""
    if w.format is None:
        return x
    made, key = tape.made_of(x), ("single", w.format.span, w.digits)
    if key not in made:
        flat = x.reshape(-1, w.n_in)
        made[key] = matmul.quantise_array(tape, flat, w, single=True)
    return made[key]


def _row_bytes(w: CPUWeight) -> int:
    """Bytes of one row of x as ``_single`` makes it."""
    return w.n_in // 32 * records.record_bytes(w.digits, w.format.span) if w.format else 4 * w.n_in


def _record_each(
    tape: Tape, w: CPUWeight, experts: CPUArray, n_workers: int, args: dict[str, Any]
) -> None:
    way = matmul.way_of(w, 1, n_workers)
    name = f"{matmul.exact_name(w.kind, w.digits)}_{way.order}"
    if w.reader:
        one = multiplier(w.reader, 1)
    else:
        assert w.format
        one = matmul.row_multiplier(w.format, w.digits, way.order)
    kernel = jit.kernel(matvec_experts, f"matvec_experts_{name}", multiply=one)
    pieces = experts.size * w.n_tiles
    more: dict[str, Any] = {"n_blocks": w.n_blocks, "experts": experts, "ahead": way.ahead}
    scratch = tape.array((n_workers, 64), "u1")
    tape.add(kernel, pieces, matmul.chunk(pieces), scratch=scratch, **more, **args)


class _Groups:
    """Where the rows of each expert are: ``segments`` and ``order`` as ``group_rows`` leaves them."""

    def __init__(self, tape: Tape, experts: CPUArray, n_experts: int, slots: int) -> None:
        n_rows = experts.size
        self.slots, self.n_rows, self.n_segments = slots, n_rows, min(n_experts, n_rows)
        self.n_runs = n_rows if slots == 1 else n_rows // slots + self.n_segments
        self.segments = tape.array((self.n_segments, SEGMENT // 8), np.int64)
        self.order = tape.array((self.n_runs, slots), np.int32)
        ends = tape.array((n_experts,), np.int32)
        sizes: dict[str, Any] = {"n_rows": n_rows, "n_experts": n_experts, "slots": slots}
        sizes |= {"n_segments": self.n_segments, "n_order": self.order.size}
        places: dict[str, Any] = {"segments": self.segments, "order": self.order, "ends": ends}
        tape.add(jit.kernel(group_rows), 1, experts=experts, **places, **sizes)
        self.packed: dict[CPUArray, CPUArray] = {}

    @staticmethod
    def of(tape: Tape, w: CPUWeight, experts: CPUArray) -> _Groups:
        """The groups of this choice of experts, sorted once for all products with it."""
        slots = records.SLOTS if w.format else 1
        made, key = tape.made_of(experts), ("groups", slots)
        if key not in made:
            made[key] = _Groups(tape, experts, w.shape[0], slots)
        return made[key]

    def gather(self, tape: Tape, w: CPUWeight, x: CPUArray, forms: CPUArray) -> CPUArray:
        """Rows of x, in the form ``forms``, brought together by expert."""
        if forms in self.packed:
            return self.packed[forms]
        n = w.n_in
        size = _row_bytes(w)
        out = tape.array((self.n_runs * self.slots, size), "u1")
        body: Callable = gather_records if w.format else gather_floats
        args: dict[str, Any] = {"x": forms, "out": out, "order": self.order, "n_bytes": size}
        if w.format:
            span = w.format.span
            args |= {"slots": self.slots, "span": span, "digits": w.digits}
            args["fields_bytes"] = span // 32 * records.plane_bytes(1, span)
        tape.add(jit.kernel(body), self.n_runs, choices=self.n_rows * n // x.size, **args)
        self.packed[forms] = out
        return out


def _record_grouped(
    tape: Tape,
    w: CPUWeight,
    groups: _Groups,
    packed: CPUArray,
    n_workers: int,
    args: dict[str, Any],
) -> None:
    together = min(ROWS_AT_ONCE // w.digits, matmul.tokens_together(w.digits))
    most = min(groups.n_rows, together)
    at_once = matmul.tiles_together(w, most, n_workers) if w.format else GROUP
    matvec, one_more, _ = matmul.matvec_kernel(w, n_workers)
    product, many_more, _ = matmul.matmul_kernel(tape, w, most, n_workers)
    one, many = _inner(w, matvec, one_more), _inner(w, product, many_more)
    scratch = tape.array((n_workers, INNER + 64 * at_once * most), "u1")
    more: dict[str, Any] = {"segments": groups.segments, "order": groups.order}
    more |= {"slots": groups.slots, "most": together}
    more |= {"packed": packed, "packed_bytes": packed.nbytes // groups.n_runs}
    more |= {"matvec": matvec, "matvec_args": one, "per_piece": 1 if w.format else GROUP}
    more |= {"matmul": product, "matmul_args": many, "at_once": at_once}
    more |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
    pieces = groups.n_segments * -(-w.n_tiles // at_once)
    at_most = FEW if w.format else FEW_FLOAT
    tape.add(jit.kernel(matmul_experts), pieces, at_most=at_most, **more, **args)


def _inner(w: CPUWeight, kernel: jit.Kernel, args: dict[str, Any]) -> CPUArray:
    """The arguments of a kernel that ``matmul_experts`` calls, but for those that it sets itself."""
    numbers = {name: getattr(v, "address", v) for name, v in args.items()}
    packed = kernel.pack(
        tile_bytes=w.tile_bytes, n_blocks=w.n_blocks, **{**numbers, **_own(kernel)}
    )
    return wrapped(np.frombuffer(packed.ljust(INNER, b"\0"), np.uint8))


@lru_cache
def _own(kernel: jit.Kernel) -> dict[str, int]:
    """Zeros for what ``matmul_experts`` sets, which must stand where it believes, and for no bias."""
    for name in SET:
        i = BEGINNING.index(name)
        if kernel.parameters[i : i + 1] not in ((name,), ()):
            raise TypeError(f"kernel {kernel.name}{kernel.parameters}: {name} must be argument {i}")
    return {name: 0 for name in (*SET, "bias") if name in kernel.parameters}
