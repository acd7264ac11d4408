"""Products of some rows with quantised weights on tensor cores, by ``matmul_tensor.c``.

Weights are decoded on their way into a multiprocessor, so that a step of 16 sequences reads no more memory
than one of a single sequence. A library's product, which needs decoded weights in memory, pays from some
hundred rows on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import experts, sources
from .arrays import GPUArray, i32, u64
from .matmul import Job, rows_share, three_outputs
from .operands import halves

if TYPE_CHECKING:
    from .backend import GPUBackend

TILE_ROWS, THREADS = 128, 256  # the values in src/matmul_tensor.c
UNIT = 32
TOKENS = 16, 32, 64  # rows of activations in a tile: one program each
LEAST_UNITS = 8  # units of a row that a group looks after


class TensorTiles:
    """Products with quantised matrices, on CUDA devices with tensor cores."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be

    def multiply(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Up to three matrices of one format times n_x rows, in one launch."""
        be, w = self.be, run[0].w
        tokens = next((t for t in TOKENS if n_x <= t), TOKENS[-1])
        tiles = -(-n_x // tokens), sum(-(-job.w.n_out // TILE_ROWS) for job in run)
        splits = self._splits(tiles[0] * tiles[1], w.n_in // UNIT)
        room = splits * tiles[0] * tiles[1] * TILE_ROWS * tokens
        parts = None if splits == 1 else be.empty((room,))
        shape = i32(n_x), i32(w.n_in), i32(splits)
        args = *halves(be, w, x), be.codebook(w.kind), parts, be.counters(), *shape
        program, groups = sources.tensor(w.kind, tokens), (*tiles, splits)
        outputs = three_outputs(run)
        be.launch(program, "matmul_tensor", groups, (THREADS, 1, 1), *outputs, *args)

    def multiply_choices(self, job: Job, x: GPUArray, chosen: GPUArray) -> None:
        """The rows sorted by expert, in tiles of one expert each."""
        be, (w, bias, y) = self.be, job
        tokens = TOKENS[0] if chosen.size <= TOKENS[0] * w.shape[0] else TOKENS[-1]
        order, tiles = experts.sorted_choices(be, chosen, w.shape[0], tokens)
        groups = len(tiles), -(-w.n_out // TILE_ROWS), 1
        matrix = w.buffer, u64(w.total), bias, y, *halves(be, w, x), be.codebook(w.kind)
        shape = (i32(n) for n in (rows_share(chosen, x), w.n_in, w.n_out))
        program = sources.tensor(w.kind, tokens)
        args = *matrix, order, tiles, *shape
        be.launch(program, "matmul_tensor_experts", groups, (THREADS, 1, 1), *args)

    def _splits(self, n_tiles: int, n_units: int) -> int:
        """Parts of a row: more when the tiles alone leave multiprocessors without two groups each."""
        if n_tiles > self.be.n_counters:
            return 1
        most = max(1, n_units // LEAST_UNITS)
        return max(1, min(2 * self.be.n_cores // n_tiles, most, 16))
