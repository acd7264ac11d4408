"""Products of some rows with quantised weights on tensor cores, by ``matmul_tensor.c``.

Weights are decoded on their way into a multiprocessor, so that a step of 16 sequences reads no more
memory than one of a single sequence. A library's product, which needs decoded weights in memory, pays
from some hundred rows on.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import sources
from .arrays import GPUArray
from .device import COUNTERS, i32, u64
from .matmul import Job, Matrices, outputs, shared
from .products import HalfProducts
from .weights import PLAIN, GPUWeight

TILE_ROWS, THREADS = 128, 256  # as in src/matmul_tensor.c
UNIT = 32
TOKENS = 16, 32, 64  # of a tile: one program each
LEAST_UNITS = 8  # of a row, that a group looks after


class TensorProducts(HalfProducts):
    """``few_rows`` by matvec.c, ``many_rows`` and ``many_choices`` by matmul_tensor.c."""

    def most_few_rows(self, w: GPUWeight) -> int:
        return 8 if w.kind in PLAIN else 4

    def many_rows(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        w = run[0][0]
        if w.kind in PLAIN:
            Matrices.many_rows(self, run, x, n_x)  # not a library's, which may be missing
            return
        tokens = next((t for t in TOKENS if n_x <= t), TOKENS[-1])
        tiles = -(-n_x // tokens), sum(-(-job[0].n_out // TILE_ROWS) for job in run)
        splits = self._splits(tiles[0] * tiles[1], w.n_in // UNIT)
        room = splits * tiles[0] * tiles[1] * TILE_ROWS * tokens
        parts = None if splits == 1 else self.empty((room,))
        shape = i32(n_x), i32(w.n_in), i32(splits)
        args = *self.halves(w, x), self.grid(w.kind), parts, self.counters(), *shape
        program = sources.tensor(w.kind, tokens)
        groups = *tiles, splits
        self.launch(program, "matmul_tensor", groups, (THREADS, 1, 1), *outputs(run), *args)

    def many_choices(self, job: Job, x: GPUArray, experts: GPUArray) -> None:
        w, bias, y = job
        if w.kind in PLAIN:
            super().many_choices(job, x, experts)
            return
        tokens = TOKENS[0] if experts.size <= TOKENS[0] * w.shape[0] else TOKENS[-1]
        order, tiles = self.sorted_choices(experts, w.shape[0], tokens)
        groups, shape = (len(tiles), -(-w.n_out // TILE_ROWS), 1), (w.n_in, w.n_out)
        matrix = w.buffer, u64(w.total), bias, y, *self.halves(w, x), self.grid(w.kind)
        args = *matrix, order, tiles, i32(shared(experts, x)), *(i32(n) for n in shape)
        program = sources.tensor(w.kind, tokens)
        self.launch(program, "matmul_tensor_experts", groups, (THREADS, 1, 1), *args)

    def _splits(self, n_tiles: int, n_units: int) -> int:
        """Parts of a row: more when the tiles alone leave multiprocessors without two groups each."""
        most = max(1, n_units // LEAST_UNITS)
        return max(1, min(2 * self.n_cores // n_tiles, most, 16)) if n_tiles <= COUNTERS else 1
