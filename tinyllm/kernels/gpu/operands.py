"""The forms in which products read their activations: float32, int8 with scales, or half precision.

A form is made once and kept with its array, for all the matrices that read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arrays import GPUArray, Int8, f32, i32
from .sources import PRODUCTS, ROWWISE
from .weights import PLAIN, GPUWeight

if TYPE_CHECKING:
    from .backend import GPUBackend

TERMS = {"F16": 2, "BF16": 3}  # half-precision numbers that add up to one float32
Operand = tuple[GPUArray | None, GPUArray | None, GPUArray | None]


def operand(be: GPUBackend, w: GPUWeight, x: GPUArray) -> Operand:
    """The activations as w's kernels read them: int8 codes, scales and sums, or floats alone."""
    if w.kind in PLAIN:
        return None, x, None
    _ = x.buffer  # computes a pending norm, which may make the int8 form too
    if x.int8 is None:
        n = x.size
        x.int8 = new_int8(be, n)
        groups, args = (-(-n // 512), 1, 1), (x, *x.int8, i32(n // 4))
        be.launch(ROWWISE, "quantise", groups, (128, 1, 1), *args)
    return x.int8


def undivided_operand(
    be: GPUBackend, w: GPUWeight, x: GPUArray
) -> tuple[Operand, tuple[object, ...]]:
    """The activations for a product that can divide by their norm itself, and what it needs for that.

    Where x is a pending norm with ``undivided`` values, these are read, and the norm is never computed.
    """
    early = x.undivided if x.pending is not None else None
    if early is None or (w.kind not in PLAIN and early.int8 is None):
        return operand(be, w, x), (None, i32(0), f32(0))
    squares = early.squares, i32(early.squares.size), f32(early.eps)
    floats = None, early.values, None
    return (floats if early.int8 is None or w.kind in PLAIN else early.int8), squares


def halves(be: GPUBackend, w: GPUWeight, x: GPUArray) -> tuple[GPUArray, GPUArray]:
    """The activations in half precision, uint16 [terms, T, n_in], and the scale of each row, float32 [T]."""
    terms = TERMS.get(w.kind, 1)
    if terms not in x.half:
        n_x = x.size // w.n_in
        x.half[terms] = be.empty((terms, n_x, w.n_in), np.uint16), be.empty((n_x,))
        codes, floats, _ = operand(be, w, x)
        source = (floats, None, None) if codes is None else (None, codes, floats)
        shape = (i32(v) for v in (w.n_in, n_x, terms, w.kind == "BF16"))
        args = *source, *x.half[terms], *shape
        be.launch(PRODUCTS, "cut_rows", (n_x, 1, 1), (128, 1, 1), *args)
    return x.half[terms]


def new_int8(be: GPUBackend, n: int) -> Int8:
    """Room for the int8 form of n values: codes, a scale for each 32, a sum for each 16."""
    return be.empty((n,), np.int8), be.empty((n // 32,)), be.empty((n // 16,))


def wants_int8(be: GPUBackend, x: GPUArray) -> bool:
    """Whether quantised matrices are likely to read x, and its rows are whole runs of 32 values."""
    return be.any_quantised and x.shape[-1] % 32 == 0
