"""Products in integers or floats, on any device: ``matvec.c`` for few rows, ``matmul.c`` for many.

In matvec.c each weight goes from memory straight into registers; matmul.c stages tiles of both sides. Quantised
matrices multiply with the int8 form of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import experts, sources, weights
from .arrays import GPUArray, PendingProduct, PendingSum, Undivided, f32, i32, u64
from .operands import new_int8, operand, undivided_operand, wants_int8
from .weights import PLAIN, GPUWeight

if TYPE_CHECKING:
    from .backend import GPUBackend

LANES, WARPS, ROWS = 32, 4, 2  # the values in src/matvec.c
GATED_WARPS, GATED_OUTPUTS = 8, 32
ADD_THREADS, ADD_OUTPUTS = 512, 32
BUSY = 48  # rows in flight that keep a core busy: 24 warps
TILE_TOKENS, TILE_ROWS, TILE_THREADS = 32, 64, 128  # the values in src/matmul.c


class Job(NamedTuple):
    """One product to compute: y = x w^T + bias, for activations x that are given apart."""

    w: GPUWeight
    bias: GPUArray | None
    y: GPUArray


class Matvec:
    """Products of few rows, by ``matvec.c``; also what else that file does with single rows."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be

    def multiply(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Up to three matrices of one format times n_x rows, in one launch."""
        be, w = self.be, run[0].w
        m = next((m for m in (1, 2, 4) if n_x <= m), 8)
        activations, squares = undivided_operand(be, w, x)
        split = self._split(sum(job.w.n_out for job in run) * -(-n_x // m), w)
        per_group = ROWS * WARPS >> split
        n_groups = sum(-(-job.w.n_out // per_group) for job in run)
        be.launch(
            sources.matrix(w.kind, "matvec.c"),
            f"matvec_{m}",
            (n_groups, -(-n_x // m), 1),
            (LANES, WARPS, 1),
            *(*three_outputs(run), *activations, be.codebook(w.kind)),
            *(i32(n_x), i32(w.n_in), i32(split), *squares),
        )

    def multiply_choices(self, job: Job, x: GPUArray, chosen: GPUArray) -> None:
        """Each (row, expert) through its matrix of the stack, a product each."""
        be, (w, bias, y) = self.be, job
        split = self._split(w.n_out * chosen.size, w)
        groups = -(-w.n_out // (ROWS * WARPS >> split)), chosen.size, 1
        shape = (i32(n) for n in (chosen.size, rows_share(chosen, x), w.n_in, w.n_out, split))
        args = w.buffer, u64(w.total), bias, y, *operand(be, w, x), be.codebook(w.kind), chosen
        program = sources.matrix(w.kind, "matvec.c")
        be.launch(program, "matvec_experts", groups, (LANES, WARPS, 1), *args, *shape)

    def _split(self, n_rows: int, w: GPUWeight) -> int:
        """The base-2 logarithm of the number of warps that share a row of weights.

        It is more than 0 where the rows alone leave the device idle, as long as each warp has all that it
        loads at once.
        """
        split, rounds = 0, w.n_in // (LANES * weights.weights_at_once(w.kind))
        busy = BUSY * self.be.n_cores
        while WARPS >> split > 1 and rounds >> split > 1 and n_rows << split < busy:
            split += 1
        return split

    # ---- a row of weights decoded

    def embed(self, w: GPUWeight, ids: GPUArray, scale: float) -> GPUArray:
        """Rows ``ids`` of w, decoded and scaled, float32 [*ids.shape, n_in]."""
        be = self.be
        y = be.empty((*ids.shape, w.n_in))
        unit = 8 if w.kind in PLAIN else 32
        groups = (ids.size, -(-w.n_in // (unit * LANES)), 1)
        args = w.buffer, u64(w.total), be.codebook(w.kind), ids, y, i32(w.n_in), f32(scale)
        be.launch(sources.matrix(w.kind, "matvec.c"), "embed", groups, (LANES, 1, 1), *args)
        return y

    # ---- a product of one row with what follows it, in one launch

    def pending(self, w: GPUWeight, x: GPUArray, bias: GPUArray | None) -> GPUArray | None:
        """The product, left to be computed when it is read; None for more than one row, and for odd shapes."""
        if self.be.outside.get(("matvec", w.kind)):
            return None
        if x.size != w.n_in or w.n_out % ADD_OUTPUTS or self.be.max_threads < ADD_THREADS:
            return None
        y = self.be.empty((*x.shape[:-1], w.n_out))
        y.pending = PendingProduct(lambda y: self.multiply([Job(w, bias, y)], x, 1), w, x, bias)
        return y

    def add_for_norm(self, x: GPUArray, weight: GPUArray | None, eps: float) -> Undivided | None:
        """If x is a pending sum with a pending product, compute both, and what a norm of x divides."""
        added = x.pending
        product = added.y.pending if isinstance(added, PendingSum) else None
        if not isinstance(added, PendingSum) or not isinstance(product, PendingProduct):
            return None
        be, w, x.pending = self.be, product.w, None
        values, squares = be.empty(x.shape), be.empty((w.n_out // ADD_OUTPUTS,))
        int8 = new_int8(be, x.size) if wants_int8(be, x) else None
        be.launch(
            sources.matrix(w.kind, "matvec.c"),
            "matvec_add",
            (w.n_out // ADD_OUTPUTS, 1, 1),
            (LANES, ADD_THREADS // LANES, 1),
            *(w.buffer, u64(w.total), product.bias, added.x, weight, x, values),
            *(*(int8 or (None, None, None)), squares, *operand(be, w, product.x)),
            *(be.codebook(w.kind), i32(w.n_in), f32(added.scale)),
        )
        return Undivided(values, int8, squares, eps)

    def fits_gated(self, ws: Sequence[GPUWeight], x: GPUArray) -> bool:
        """Whether ``multiply_gated`` takes these: like matrices, and a device with groups that large."""
        gate, up = ws
        alike = gate.kind == up.kind and gate.shape == up.shape and gate.n_in == x.shape[-1]
        ours = ("matvec", gate.kind) not in self.be.outside or len(gate.shape) > 2
        return alike and ours and self.be.max_threads >= GATED_WARPS * LANES

    def multiply_gated(
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        biases: Sequence[GPUArray | None],
        code: np.int32,
        chosen: GPUArray | None = None,
    ) -> GPUArray:
        """act(x gate^T) * (x up^T) of one row, or of each choice of experts, in one launch."""
        be, w = self.be, ws[0]
        n_choices = 1 if chosen is None else chosen.size
        y = be.empty((*(x.shape[:-1] if chosen is None else chosen.shape), w.n_out))
        if wants_int8(be, y):
            y.int8 = new_int8(be, y.size)
        share = n_choices // (x.size // w.n_in)
        activations, squares = undivided_operand(be, w, x)
        be.launch(
            sources.matrix(w.kind, "matvec.c"),
            "matvec_gated",
            (-(-w.n_out // GATED_OUTPUTS), n_choices, 1),
            (LANES, GATED_WARPS, 1),
            *(ws[0].buffer, ws[1].buffer, u64(w.total), *biases),
            *(y, *(y.int8 or (None, None, None)), *activations, be.codebook(w.kind)),
            *(chosen, i32(share), i32(w.n_in), i32(w.n_out), code, *squares),
        )
        return y


class Tiles:
    """Products of many rows, by ``matmul.c``."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be

    def multiply(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Each matrix times n_x rows, a launch each."""
        be = self.be
        for w, bias, y in run:
            groups = (-(-w.n_out // TILE_ROWS), -(-n_x // TILE_TOKENS), 1)
            shape = i32(n_x), i32(w.n_in), i32(w.n_out)
            args = w.buffer, u64(w.total), bias, y, *operand(be, w, x), be.codebook(w.kind), *shape
            program = sources.matrix(w.kind, "matmul.c")
            be.launch(program, "matmul", groups, (TILE_THREADS, 1, 1), *args)

    def multiply_choices(self, job: Job, x: GPUArray, chosen: GPUArray) -> None:
        """The rows sorted by expert, in tiles of one expert each."""
        be, (w, bias, y) = self.be, job
        order, tiles = experts.sorted_choices(be, chosen, w.shape[0], TILE_TOKENS)
        groups = -(-w.n_out // TILE_ROWS), len(tiles), 1
        matrix = w.buffer, u64(w.total), bias, y, *operand(be, w, x), be.codebook(w.kind)
        shape = (i32(n) for n in (rows_share(chosen, x), w.n_in, w.n_out))
        program = sources.matrix(w.kind, "matmul.c")
        args = *matrix, order, tiles, *shape
        be.launch(program, "matmul_experts", groups, (TILE_THREADS, 1, 1), *args)


def rows_share(chosen: GPUArray, x: GPUArray) -> int:
    """How many choices of experts read the same row of x."""
    return chosen.size // (x.size // x.shape[-1])


def three_outputs(run: Sequence[Job]) -> list[object]:
    """The arguments by which a kernel knows three matrices; a missing one has no rows."""
    told: list[object] = []
    for w, bias, y in run:
        told += [w.buffer, u64(w.total), i32(w.n_out), bias, y]
    return told + [run[0].w.buffer, u64(0), i32(0), None, run[0].y] * (3 - len(run))


def runs(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Neighbours of one format, three at most, which one launch can compute."""
    run: list[Job] = []
    for job in jobs:
        if run and (len(run) == 3 or run[0].w.kind != job.w.kind):
            yield run
            run = []
        run.append(job)
    yield run
