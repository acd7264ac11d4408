"""Prefill through a library's matrix product, on weights decoded to half floats piece by piece.

A piece is meant to stay in a large GPU's second-level cache (50 MB on an H100) between its decoding and
its use. Plain weights are used as they lie; their activations are cut into several half-precision terms,
which keeps the precision of float32.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from . import sources
from .arrays import Buffer, GPUArray
from .device import i32, u64
from .matrices import LANES, Matrices
from .weights import PLAIN, GPUWeight

PIECE = 16 << 20  # bytes of decoded weights at a time
ALIGNED_ROWS = 64  # a piece of many rows has a multiple of these: the library wants aligned columns
MOST_ROWS = 32768  # of a piece: the second dimension of a CUDA grid ends at 65535
TERMS = {"F16": 2, "BF16": 3}
PRODUCTS = sources.plain("products.c")


class LibraryProducts(Matrices):
    """``many_rows`` by ``gemm``."""

    @abstractmethod
    def gemm(
        self, kind: str, w: Buffer, w_row: int, x: GPUArray, term: int, y: GPUArray, columns: range
    ) -> None:
        """y[:, columns] = x[term] w^T, or += from the second term on.

        w [len(columns), w_row] of ``kind`` (F32, F16, BF16), its first n_in columns used; x [terms, T, n_in]
        of the same kind; y [T, n_out] float32.
        """

    def many_rows(
        self, w: GPUWeight, bias: GPUArray | None, y: GPUArray, x: GPUArray, n_x: int
    ) -> None:
        if w.kind == "F32":
            dense = x.reshape(1, n_x, w.n_in)
            self.gemm("F32", w.buffer, _padded(w.n_in), dense, 0, y, range(w.n_out))
            if bias is not None:
                self._finish(y, None, bias, w.n_out)
            return
        cut, scales = self._cut(w, x, n_x)
        if w.kind in PLAIN:
            for term in range(cut.shape[0]):
                self.gemm(w.kind, w.buffer, _padded(w.n_in), cut, term, y, range(w.n_out))
        else:
            self._by_pieces(w, cut, y)
        self._finish(y, scales, bias, w.n_out)

    def _by_pieces(self, w: GPUWeight, cut: GPUArray, y: GPUArray) -> None:
        """Decode some rows, multiply, and so on."""
        fit = min(PIECE // (2 * w.n_in), MOST_ROWS)
        step = min(max(fit // ALIGNED_ROWS * ALIGNED_ROWS or fit, 1), w.n_out)
        piece = self.empty((step, w.n_in), np.uint16)
        program = sources.matrix(w.kind, "matvec.c")
        for first in range(0, w.n_out, step):
            rows = min(step, w.n_out - first)
            groups = (-(-w.n_in // (32 * LANES)), rows, 1)
            matrix = w.buffer, u64(w.total), self.grid(w.kind)
            args = *matrix, piece, u64(first), i32(w.n_in)
            self.launch(program, "decode_rows", groups, (LANES, 1, 1), *args)
            self.gemm("F16", piece.buffer, w.n_in, cut, 0, y, range(first, first + rows))

    def _cut(self, w: GPUWeight, x: GPUArray, n_x: int) -> tuple[GPUArray, GPUArray]:
        """The activations in half precision, [terms, T, n_in], and each row's scale."""
        terms = TERMS.get(w.kind, 1)
        cut, scales = self.empty((terms, n_x, w.n_in), np.uint16), self.empty((n_x,))
        shape = (i32(v) for v in (w.n_in, n_x, terms, w.kind == "BF16"))
        codes, floats, _ = self.operand(w, x)
        source = (floats, None, None) if codes is None else (None, codes, floats)
        args = *source, cut, scales, *shape
        self.launch(PRODUCTS, "cut_rows", (n_x, 1, 1), (128, 1, 1), *args)
        return cut, scales

    def _finish(
        self, y: GPUArray, scales: GPUArray | None, bias: GPUArray | None, n_out: int
    ) -> None:
        self.each(PRODUCTS, "finish_rows", y.size, y, scales, bias, i32(n_out))


def _padded(n_in: int) -> int:
    """Weights in a row of a plain matrix as it lies on the device."""
    return -(-n_in // 8) * 8
