"""Products in half precision: the activations as halves, and prefill through a library's matrix product.

A library's product wants quantised weights decoded to halves in memory, which is done piece by piece.
Plain weights are used as they lie; their activations are cut into several half-precision terms, which
keeps the precision of float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from . import sources
from .arrays import Buffer, GPUArray
from .device import i32, u64
from .matrices import LANES, Job, Matrices
from .weights import PLAIN, GPUWeight

MOST_PIECE = 128 << 20  # bytes of decoded weights at a time
TILE, TILES = (
    128,
    4,
)  # a library's product is quick when each multiprocessor has some tiles [128, 128]
ALIGNED_ROWS = 64  # a piece of many rows has a multiple of these: the library wants aligned columns
MOST_ROWS = 32768  # of a piece: the second dimension of a CUDA grid ends at 65535
TERMS = {"F16": 2, "BF16": 3}
PRODUCTS = sources.plain("products.c")


class HalfProducts(Matrices):
    """The half-precision form of activations."""

    def halves(self, w: GPUWeight, x: GPUArray) -> tuple[GPUArray, GPUArray]:
        """The activations in half precision, [terms, T, n_in], and each row's scale."""
        terms = TERMS.get(w.kind, 1)
        if terms not in x.half:
            n_x = x.size // w.n_in
            x.half[terms] = self.empty((terms, n_x, w.n_in), np.uint16), self.empty((n_x,))
            codes, floats, _ = self.operand(w, x)
            source = (floats, None, None) if codes is None else (None, codes, floats)
            shape = (i32(v) for v in (w.n_in, n_x, terms, w.kind == "BF16"))
            args = *source, *x.half[terms], *shape
            self.launch(PRODUCTS, "cut_rows", (n_x, 1, 1), (128, 1, 1), *args)
        return x.half[terms]


class LibraryProducts(HalfProducts):
    """``many_rows`` by ``gemm``."""

    @abstractmethod
    def gemm(
        self, kind: str, w: Buffer, w_row: int, x: GPUArray, term: int, y: GPUArray, columns: range
    ) -> None:
        """y[:, columns] = x[term] w^T, or += from the second term on.

        w [len(columns), w_row] of ``kind`` (F32, F16, BF16), its first n_in columns used; x [terms, T, n_in]
        of the same kind; y [T, n_out] float32.
        """

    def many_rows(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        for w, bias, y in run:
            if w.kind == "F32":
                dense = x.reshape(1, n_x, w.n_in)
                self.gemm("F32", w.buffer, _padded(w.n_in), dense, 0, y, range(w.n_out))
                if bias is not None:
                    self._finish(y, None, bias, w.n_out)
                continue
            cut, scales = self.halves(w, x)
            if w.kind in PLAIN:
                for term in range(cut.shape[0]):
                    self.gemm(w.kind, w.buffer, _padded(w.n_in), cut, term, y, range(w.n_out))
            else:
                self._by_pieces(w, cut, y)
            self._finish(y, scales, bias, w.n_out)

    def _by_pieces(self, w: GPUWeight, cut: GPUArray, y: GPUArray) -> None:
        """Decode some rows, multiply, and so on."""
        step = min(self._piece_rows(w.n_in, cut.shape[1]), w.n_out)
        piece = self.empty((step, w.n_in), np.uint16)
        program = sources.matrix(w.kind, "matvec.c")
        for first in range(0, w.n_out, step):
            rows = min(step, w.n_out - first)
            groups = (-(-w.n_in // (32 * LANES)), rows, 1)
            matrix = w.buffer, u64(w.total), self.grid(w.kind)
            args = *matrix, piece, u64(first), i32(w.n_in)
            self.launch(program, "decode_rows", groups, (LANES, 1, 1), *args)
            self.gemm("F16", piece.buffer, w.n_in, cut, 0, y, range(first, first + rows))

    def _piece_rows(self, n_in: int, n_x: int) -> int:
        """As few as keep the device busy, so that a second-level cache may hold the decoded weights."""
        busy = TILES * self.n_cores * TILE * TILE // n_x
        fit = max(min(busy, MOST_PIECE // (2 * n_in), MOST_ROWS), 1)
        return fit // ALIGNED_ROWS * ALIGNED_ROWS or fit

    def _finish(
        self, y: GPUArray, scales: GPUArray | None, bias: GPUArray | None, n_out: int
    ) -> None:
        self.each(PRODUCTS, "finish_rows", y.size, y, scales, bias, i32(n_out))


def _padded(n_in: int) -> int:
    """Weights in a row of a plain matrix as it lies on the device."""
    return -(-n_in // 8) * 8
