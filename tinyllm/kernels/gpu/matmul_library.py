"""Products of many rows through a library's half-precision matrix product, with ``products.c`` around it.

The library wants quantised weights decoded to halves in memory, which is done piece by piece. Plain weights
are used as they lie; their activations are cut into several half-precision terms, which keeps the precision
of float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from . import sources
from .arrays import Buffer, GPUArray, i32, u64
from .matmul import LANES, Job
from .operands import halves
from .sources import PRODUCTS
from .weights import PLAIN, GPUWeight

if TYPE_CHECKING:
    from .backend import GPUBackend

MOST_PIECE = 128 << 20  # bytes of decoded weights at a time
TILE, TILES = 128, 4  # a multiprocessor should have some tiles [128, 128] of the library's product
ALIGNED_ROWS = 64  # a piece of many rows has a multiple of these: the library wants aligned columns
MOST_ROWS = 32768  # in a piece: the second dimension of a CUDA grid ends at 65535
MOST_PARTS = 64 << 20  # bytes of products that wait to be added up


class Gemm(Protocol):
    """A library's matrix product."""

    def __call__(
        self,
        kind: str,
        w: tuple[Buffer, int],
        x: GPUArray,
        rows: range,
        y: GPUArray,
        columns: range,
        keep: bool = False,
    ) -> None:
        """y[: len(rows), columns] = x[rows] w^T, plus what was there with ``keep``.

        w: a buffer of [len(columns), row length] of ``kind`` (F32, F16, BF16), and its row length, of which the
        first n_in are used; x [.., n_in] of that kind too; y [.., n_out] float32.
        """


class Library:
    """Products by ``gemm``, for plain weights of ``kinds`` and for quantised ones."""

    def __init__(self, be: GPUBackend, gemm: Gemm, kinds: Collection[str] = tuple(PLAIN)) -> None:
        self.be, self.gemm, self.kinds = be, gemm, kinds

    def takes(self, w: GPUWeight) -> bool:
        """Whether the library multiplies with weights of this format."""
        return w.kind not in PLAIN or w.kind in self.kinds

    def multiply(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Each matrix times n_x rows."""
        for w, bias, y in run:
            if w.kind == "F32":
                self._multiply(w, x.reshape(n_x, w.n_in), range(n_x), y)
                if bias is not None:
                    self._finish(y, y, 1, None, bias)
                continue
            cut, scales = halves(self.be, w, x)
            if w.kind in PLAIN:
                self._by_terms(w, cut, y, scales, bias)
            else:
                self._by_pieces(w, cut, y)
                self._finish(y, y, 1, scales, bias)

    def _multiply(
        self, w: GPUWeight, x: GPUArray, rows: range, y: GPUArray, keep: bool = False
    ) -> None:
        row_length = -(-w.n_in // 8) * 8  # the length of a row on the device
        self.gemm(w.kind, (w.buffer, row_length), x, rows, y, range(w.n_out), keep)

    def _by_terms(
        self, w: GPUWeight, cut: GPUArray, y: GPUArray, scales: GPUArray, bias: GPUArray | None
    ) -> None:
        """All terms of few rows in one product, which reads the weights once; of many one after another."""
        terms, n_x, _ = cut.shape
        if terms * y.nbytes <= MOST_PARTS:
            parts = self.be.empty((terms * n_x, w.n_out))
            self._multiply(w, cut, range(terms * n_x), parts)
            self._finish(y, parts, terms, scales, bias)
            return
        for term in range(terms):
            self._multiply(w, cut, range(term * n_x, (term + 1) * n_x), y, keep=term > 0)
        self._finish(y, y, 1, scales, bias)

    def _by_pieces(self, w: GPUWeight, cut: GPUArray, y: GPUArray) -> None:
        """Decode some rows of weights, multiply with them, and so on."""
        be = self.be
        step = min(self._piece_rows(w.n_in, cut.shape[1]), w.n_out)
        piece = be.empty((step, w.n_in), np.uint16)
        program = sources.matrix(w.kind, "matvec.c")
        for first in range(0, w.n_out, step):
            rows = min(step, w.n_out - first)
            groups = (-(-w.n_in // (32 * LANES)), rows, 1)
            matrix = w.buffer, u64(w.total), be.codebook(w.kind)
            args = *matrix, piece, u64(first), i32(w.n_in)
            be.launch(program, "decode_rows", groups, (LANES, 1, 1), *args)
            columns = range(first, first + rows)
            self.gemm("F16", (piece.buffer, w.n_in), cut, range(cut.shape[1]), y, columns)

    def _piece_rows(self, n_in: int, n_x: int) -> int:
        """As few as keep the device busy, so that a second-level cache may hold the decoded weights."""
        busy = TILES * self.be.n_cores * TILE * TILE // n_x
        fit = max(min(busy, MOST_PIECE // (2 * n_in), MOST_ROWS), 1)
        return fit // ALIGNED_ROWS * ALIGNED_ROWS or fit

    def _finish(
        self,
        y: GPUArray,
        parts: GPUArray,
        terms: int,
        scales: GPUArray | None,
        bias: GPUArray | None,
    ) -> None:
        """Set y to the sum of the parts [terms, T, n_out], times the scales [T], plus the bias."""
        n_out = y.shape[-1]
        args = parts, scales, bias, y, i32(terms), i32(n_out)
        self.be.each(PRODUCTS, "finish_rows", y.size, *args)
