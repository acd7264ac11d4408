"""Loading weights and multiplying with them.

Up to MATVEC_ROWS rows go through ``matvec.c``, where each weight goes from memory straight into
registers; more through ``matmul.c``, which stages tiles of both sides. Quantised matrices multiply
with the int8 form of the activations, made once for all the matrices that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ...errors import ArgumentError, DeviceError
from ...gguf.quants import FORMATS
from ..backend import Source
from . import sources, weights
from .arrays import Buffer, Early, GPUArray, Product, Sum
from .device import Device, f32, i32, u64
from .weights import LAYOUTS, PLAIN, GPUWeight

MATVEC_ROWS = 16
MATVEC_CHOICES = 32  # of experts; with more, rows are sorted by expert
LANES, WARPS, ROWS = 32, 4, 2  # as in src/matvec.c
GATED_WARPS, GATED_OUTPUTS = 8, 32
ADD_THREADS, ADD_OUTPUTS = 512, 32
BUSY = 48  # rows in flight that keep a core busy: 24 warps
TILE_TOKENS, TILE_ROWS, TILE_THREADS = 32, 64, 128  # as in src/matmul.c
MAX_EXPERTS = 1024  # as in src/experts.c
EXPERTS = sources.plain("experts.c")
ROWWISE = sources.plain("activations.h", "reduce.h", "rows.c")

Operand = tuple[GPUArray | None, GPUArray | None, GPUArray | None]


class Matrices(Device):
    """The part of a GPU backend that holds weights."""

    # ---- loading

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> GPUWeight:
        kind = weights.stored_kind(source)
        chosen, shape = weights.chosen_rows(source, rows)
        if kind in PLAIN:
            return self._load_plain(source, kind, chosen, shape)
        self._any_quantised = True
        n_in, block = shape[-1], FORMATS[kind].block_size
        total = prod(shape) // block
        nbytes = total * weights.plane_bytes(kind)
        buffer = self.allocate(nbytes)
        for start, raw in weights.read_pieces(source, chosen):
            first = start * (n_in // block)
            for before, plane in weights.split_planes(kind, raw):
                self.put(buffer, total * before + first * plane.shape[1], plane)
        return self._kept(GPUWeight(source.type, kind, shape, nbytes, buffer, total))

    def _load_plain(
        self, source: Source, kind: str, rows: np.ndarray | range, shape: tuple[int, ...]
    ) -> GPUWeight:
        unit = 8 * int(PLAIN[kind]["WEIGHT_BYTES"])
        row_nbytes = -(-shape[-1] // 8) * unit
        nbytes = prod(shape[:-1]) * row_nbytes
        buffer = self.allocate(nbytes)
        for start, raw in weights.read_pieces(source, rows):
            self.put(buffer, start * row_nbytes, weights.padded_rows(source.type, kind, raw))
        return self._kept(GPUWeight(source.type, kind, shape, nbytes, buffer, prod(shape)))

    def _kept(self, w: GPUWeight) -> GPUWeight:
        self._weights.add(w)
        return w

    def grid(self, kind: str) -> Buffer | None:
        """The codebook of a format on the device, or None."""
        name = None if kind in PLAIN else LAYOUTS[kind].grid
        if name is None:
            return None
        if name not in self._grids:
            self._grids[name] = self.array(weights.codebook_words(name))
        return self._grids[name].buffer

    # ---- products

    def embed(self, w: GPUWeight, ids: GPUArray, scale: float = 1.0) -> GPUArray:  # type: ignore[override]
        y = self.empty((*ids.shape, w.n_in))
        unit = 8 if w.kind in PLAIN else 32
        groups = (ids.size, -(-w.n_in // (unit * LANES)), 1)
        program = sources.matrix(w.kind, "matvec.c")
        matrix = w.buffer, u64(w.total), self.grid(w.kind)
        self.launch(
            program, "embed", groups, (LANES, 1, 1), *matrix, ids, y, i32(w.n_in), f32(scale)
        )
        return y

    def matmul(self, w: GPUWeight, x: GPUArray, bias: GPUArray | None = None) -> GPUArray:  # type: ignore[override]
        if x.size != w.n_in or w.n_out % ADD_OUTPUTS or self.max_threads < ADD_THREADS:
            return self.matmuls([w], x, [bias])[0]
        y = self.empty((*x.shape[:-1], w.n_out))
        y.pending = Product(lambda y: self.few_rows([(w, bias, y)], x, 1), w, x, bias)
        return y

    def matmuls(  # type: ignore[override]
        self, ws: Sequence[GPUWeight], x: GPUArray, biases: Sequence[GPUArray | None]
    ) -> list[GPUArray]:
        n_x = x.size // x.shape[-1]
        ys = [self.empty((*x.shape[:-1], w.n_out)) for w in ws]
        for w in ws:
            if x.shape[-1] != w.n_in:
                raise ArgumentError(f"x {x.shape} does not fit a matrix of {w.shape}")
        for run in _runs(list(zip(ws, biases, ys, strict=True))):
            few = n_x <= self.most_few_rows(run[0][0])
            (self.few_rows if few else self.many_rows)(run, x, n_x)
        return ys

    def most_few_rows(self, w: GPUWeight) -> int:
        """With more rows of activations than these, ``many_rows`` is the faster one."""
        return MATVEC_ROWS

    def few_rows(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Up to three matrices of one format in one launch of matvec."""
        w = run[0][0]
        m = next((m for m in (1, 2, 4) if n_x <= m), 8)
        operand, squares = self._early_operand(w, x)
        split = self._split(sum(job[0].n_out for job in run) * -(-n_x // m), w)
        per_group = ROWS * WARPS >> split
        n_groups = sum(-(-job[0].n_out // per_group) for job in run)
        self.launch(
            sources.matrix(w.kind, "matvec.c"),
            f"matvec_{m}",
            (n_groups, -(-n_x // m), 1),
            (LANES, WARPS, 1),
            *outputs(run),
            *operand,
            self.grid(w.kind),
            i32(n_x),
            i32(w.n_in),
            i32(split),
            *squares,
        )

    def _split(self, n_rows: int, w: GPUWeight) -> int:
        """1 << split warps share a row: more when the rows alone leave the device idle, as long as each warp
        has all that it loads at once.
        """
        split, rounds = 0, w.n_in // (LANES * weights.weights_at_once(w.kind))
        while WARPS >> split > 1 and rounds >> split > 1 and n_rows << split < BUSY * self.n_cores:
            split += 1
        return split

    def many_rows(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Up to three matrices of one format, in tiles of both sides."""
        for w, bias, y in run:
            groups = (-(-w.n_out // TILE_ROWS), -(-n_x // TILE_TOKENS), 1)
            shape = i32(n_x), i32(w.n_in), i32(w.n_out)
            matrix = w.buffer, u64(w.total), bias, y
            args = *matrix, *self.operand(w, x), self.grid(w.kind), *shape
            program = sources.matrix(w.kind, "matmul.c")
            self.launch(program, "matmul", groups, (TILE_THREADS, 1, 1), *args)

    def matmul_experts(  # type: ignore[override]
        self, w: GPUWeight, x: GPUArray, experts: GPUArray, bias: GPUArray | None = None
    ) -> GPUArray:
        y = self.empty((*experts.shape, w.n_out))
        few = experts.size <= MATVEC_CHOICES
        (self._few_choices if few else self.many_choices)((w, bias, y), x, experts)
        return y

    def matmul_heads(self, w: GPUWeight, x: GPUArray) -> GPUArray:  # type: ignore[override]
        h, n_out, n_in = w.shape
        t = x.shape[0]
        if (t, h) not in self._heads:
            self._heads[t, h] = self.array(np.tile(np.arange(h, dtype=np.int32), (t, 1)))
        y = self.matmul_experts(w, x.reshape(t, h, n_in), self._heads[t, h])
        return y.reshape(t, h * n_out)

    def _few_choices(self, job: Job, x: GPUArray, experts: GPUArray) -> None:
        """A matvec for each choice."""
        w, bias, y = job
        split = self._split(w.n_out * experts.size, w)
        groups = -(-w.n_out // (ROWS * WARPS >> split)), experts.size, 1
        shape = (i32(n) for n in (experts.size, shared(experts, x), w.n_in, w.n_out, split))
        args = w.buffer, u64(w.total), bias, y, *self.operand(w, x), self.grid(w.kind), experts
        program = sources.matrix(w.kind, "matvec.c")
        self.launch(program, "matvec_experts", groups, (LANES, WARPS, 1), *args, *shape)

    def fits_gated(self, ws: Sequence[GPUWeight], x: GPUArray) -> bool:
        """Whether both matrices are alike, as matvec_gated needs them, and groups may be that large."""
        gate, up = ws
        alike = gate.kind == up.kind and gate.shape == up.shape and gate.n_in == x.shape[-1]
        return alike and self.max_threads >= GATED_WARPS * LANES

    def few_gated(
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        biases: Sequence[GPUArray | None],
        kind: np.int32,
        y: GPUArray,
        experts: GPUArray | None,
    ) -> None:
        """Y = act(x gate^T) * (x up^T) of one row, or of each choice of experts, in one launch."""
        w = ws[0]
        n_choices = 1 if experts is None else experts.size
        if self.wants_int8(y):
            y.int8 = self.new_int8(y.size)
        groups = -(-w.n_out // GATED_OUTPUTS), n_choices, 1
        matrices = ws[0].buffer, ws[1].buffer, u64(w.total), *biases
        share = n_choices // (x.size // w.n_in)
        operand, squares = self._early_operand(w, x)
        self.launch(
            sources.matrix(w.kind, "matvec.c"),
            "matvec_gated",
            groups,
            (LANES, GATED_WARPS, 1),
            *(*matrices, y, *(y.int8 or (None, None, None)), *operand, self.grid(w.kind)),
            *(experts, i32(share), i32(w.n_in), i32(w.n_out), kind, *squares),
        )

    def norm_early(self, x: GPUArray, weight: GPUArray | None, eps: float, y: GPUArray) -> bool:
        """If x is a pending sum with a pending product, make both and what the norm y will divide."""
        added = x.pending
        product = added.y.pending if isinstance(added, Sum) else None
        if not isinstance(added, Sum) or not isinstance(product, Product):
            return False
        w, x.pending = product.w, None
        values, squares = self.empty(x.shape), self.empty((w.n_out // ADD_OUTPUTS,))
        int8 = self.new_int8(x.size) if self.wants_int8(x) else None
        self.launch(
            sources.matrix(w.kind, "matvec.c"),
            "matvec_add",
            (w.n_out // ADD_OUTPUTS, 1, 1),
            (LANES, ADD_THREADS // LANES, 1),
            *(w.buffer, u64(w.total), product.bias, added.x, weight, x, values),
            *(*(int8 or (None, None, None)), squares, *self.operand(w, product.x)),
            *(self.grid(w.kind), i32(w.n_in), f32(added.scale)),
        )
        y.early = Early(values, int8, squares, eps)
        return True

    def _early_operand(self, w: GPUWeight, x: GPUArray) -> tuple[Operand, tuple[object, ...]]:
        """The activations, and what the product is still to be divided by: see Early."""
        early = x.early if x.pending is not None else None
        if early is None or (w.kind not in PLAIN and early.int8 is None):
            return self.operand(w, x), (None, i32(0), f32(0))
        squares = early.squares, i32(early.squares.size), f32(early.eps)
        floats = None, early.values, None
        return (floats if early.int8 is None or w.kind in PLAIN else early.int8), squares

    def many_choices(self, job: Job, x: GPUArray, experts: GPUArray) -> None:
        """The choices sorted by expert, and tiles of each expert's."""
        w, bias, y = job
        order, tiles = self.sorted_choices(experts, w.shape[0], TILE_TOKENS)
        groups, shape = (-(-w.n_out // TILE_ROWS), len(tiles), 1), (w.n_in, w.n_out)
        matrix = w.buffer, u64(w.total), bias, y, *self.operand(w, x), self.grid(w.kind)
        args = *matrix, order, tiles, i32(shared(experts, x)), *(i32(n) for n in shape)
        program = sources.matrix(w.kind, "matmul.c")
        self.launch(program, "matmul_experts", groups, (TILE_THREADS, 1, 1), *args)

    def sorted_choices(
        self, experts: GPUArray, n_expert: int, size: int
    ) -> tuple[GPUArray, GPUArray]:
        """The choices in order of their experts, and tiles of up to ``size`` choices of one: int32 [n, 3]."""
        if n_expert > MAX_EXPERTS:
            raise DeviceError(f"{n_expert} experts; at most {MAX_EXPERTS} run on a GPU")
        if experts.by_expert is None:
            n_choices = experts.size
            n_tiles = min(n_choices, n_choices // size + n_expert)
            order, tiles = self.empty((n_choices,), np.int32), self.empty((n_tiles, 3), np.int32)
            sizes = (i32(n) for n in (n_choices, n_expert, size, n_tiles))
            args = experts, order, tiles, *sizes
            self.launch(EXPERTS, "sort_choices", (1, 1, 1), (256, 1, 1), *args)
            experts.by_expert = size, (order, tiles)
        assert experts.by_expert[0] == size
        return experts.by_expert[1]

    def operand(self, w: GPUWeight, x: GPUArray) -> Operand:
        """The activations as w's kernels read them: int8 codes, scales and sums, or floats alone."""
        if w.kind in PLAIN:
            return None, x, None
        _ = x.buffer  # a pending norm makes the int8 form, too
        if x.int8 is None:
            n = x.size
            x.int8 = self.new_int8(n)
            groups, args = (-(-n // 512), 1, 1), (x, *x.int8, i32(n // 4))
            self.launch(ROWWISE, "quantise", groups, (128, 1, 1), *args)
        return x.int8

    def new_int8(self, n: int) -> tuple[GPUArray, GPUArray, GPUArray]:
        """Room for the int8 form of n values: codes, scales, sums."""
        return self.empty((n,), np.int8), self.empty((n // 32,)), self.empty((n // 16,))

    def wants_int8(self, x: GPUArray) -> bool:
        """Whether quantised matrices are likely to read x, whole runs of 32 values."""
        return self._any_quantised and x.shape[-1] % 32 == 0


Job = tuple[GPUWeight, GPUArray | None, GPUArray]


def shared(experts: GPUArray, x: GPUArray) -> int:
    """How many choices read the same row of x."""
    return experts.size // (x.size // x.shape[-1])


def outputs(run: Sequence[Job]) -> list[object]:
    """What a kernel for three matrices is told of each; a missing one has no rows."""
    told: list[object] = []
    for w, bias, y in run:
        told += [w.buffer, u64(w.total), i32(w.n_out), bias, y]
    return told + [run[0][0].buffer, u64(0), i32(0), None, run[0][2]] * (3 - len(run))


def _runs(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Neighbours of one format, three at most."""
    run: list[Job] = []
    for job in jobs:
        if run and (len(run) == 3 or run[0][0].kind != job[0].kind):
            yield run
            run = []
        run.append(job)
    yield run
