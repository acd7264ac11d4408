"""Norms, rotation, activations and sums: each value by itself, or each row."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError
from ..backend import Activation, RopeSpec
from .arrays import GPUArray, Pending, PendingSum, f32, i32
from .operands import new_int8, wants_int8
from .sources import ELEMENTWISE, ROWWISE

if TYPE_CHECKING:
    from .backend import GPUBackend

ACTIVATIONS = (
    *("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "softplus"),
    "swiglu_oai",
)
MOST_THREADS = 512  # the value in src/rows.c
NORM_QUADS = 4  # groups of four values that each thread keeps, as in src/rows.c


def code_of(names: Sequence[str], name: str) -> np.int32:
    """The number by which kernels know a name."""
    if name not in names:
        raise ArgumentError(f"unknown {name!r}; expected one of {', '.join(names)}")
    return i32(names.index(name))


# ---- norms


def norm(
    be: GPUBackend,
    x: GPUArray,
    w: GPUArray | None,
    eps: float,
    bias: GPUArray | None,
    group: int,
    centre: bool,
) -> GPUArray:
    """RMS norm, or layer norm with ``centre``; left pending where the product before it can begin it."""
    y = be.empty(x.shape)
    whole = w is not None and w.size == x.size == (group or x.size)
    if whole and not centre and bias is None:
        y.undivided = be.matvec.add_for_norm(x, w, eps)
    if y.undivided is None:
        _norm_into(be, y, x, w, eps, bias, group, centre)
    else:
        y.pending = Pending(lambda y: _norm_into(be, y, x, w, eps, bias, group, centre))
    return y


def _norm_into(
    be: GPUBackend,
    y: GPUArray,
    x: GPUArray,
    w: GPUArray | None,
    eps: float,
    bias: GPUArray | None,
    group: int,
    centre: bool,
) -> None:
    """Launch a norm; its kernel also computes a pending sum before it, and the int8 form of the result."""
    n = group or x.shape[-1]
    before = x.pending if isinstance(x.pending, PendingSum) else None
    inputs: tuple[object, ...] = x, None, None
    if before is not None:
        x.pending = None
        inputs = before.x, before.y, x
    threads = _norm_threads(be, n)
    kept = n % 4 == 0 and n <= 4 * NORM_QUADS * threads
    if kept and n == x.shape[-1] and wants_int8(be, y):
        y.int8 = new_int8(be, y.size)
    sizes = (0 if p is None else p.size for p in (w, bias))
    shape = (i32(v) for v in (n, *sizes, n // 4 if y.int8 else 0, centre))
    outputs = y, *(y.int8 or (None, None, None))
    numbers = f32(eps), f32(1.0 if before is None else before.scale)
    args = *inputs, w, bias, *outputs, *shape, *numbers
    kernel = ("norm_rows_centred" if centre else "norm_rows") if kept else "norm_runs"
    be.launch(ROWWISE, kernel, (x.size // n, 1, 1), (threads, 1, 1), *args)


def _norm_threads(be: GPUBackend, n: int) -> int:
    """Threads for a run of n values: a power of two, one for each four values if there are enough."""
    quads = 1 << (-(-n // 4) - 1).bit_length()
    return max(32, min(quads, MOST_THREADS, be.max_threads))


# ---- activations


def act(be: GPUBackend, x: GPUArray, up: GPUArray | None, kind: Activation) -> GPUArray:
    """act(x), or act(x) * up; with the int8 form where a quantised matrix may follow."""
    y = be.empty(x.shape)
    code = code_of(ACTIVATIONS[:-1] if up is None else ACTIVATIONS, kind)
    if wants_int8(be, y):
        y.int8 = new_int8(be, y.size)
        groups, args = (-(-y.size // 512), 1, 1), (x, up, y, *y.int8, code, i32(y.size // 4))
        be.launch(ROWWISE, "act_mul_int8", groups, (128, 1, 1), *args)
    elif up is None:
        be.each(ELEMENTWISE, "act", x.size, x, y, code)
    else:
        be.each(ELEMENTWISE, "act_mul", y.size, x, up, y, code)
    return y


# ---- sums and products of two arrays


def add(be: GPUBackend, x: GPUArray, y: GPUArray, scale: float) -> GPUArray:
    """x + scale * y; a sum of two arrays of one size is computed when it is read."""
    if y.size != x.size:
        return combine_two(be, x, y, scale)
    out = be.empty(x.shape)
    out.pending = PendingSum(lambda out: _combine_into(be, out, x, y, scale, False), x, y, scale)
    return out


def combine_two(
    be: GPUBackend, x: GPUArray, b: GPUArray, scale: float = 1.0, product: bool = False
) -> GPUArray:
    """x + scale * b, or x * b, for b [T, n], [T, 1] or [n]."""
    y = be.empty(x.shape)
    _combine_into(be, y, x, b, scale, product)
    return y


def _combine_into(
    be: GPUBackend, y: GPUArray, x: GPUArray, b: GPUArray, scale: float, product: bool
) -> None:
    n = x.shape[-1]
    if b.size == x.size:
        row, column = n, 1
    elif b.shape[-1] == 1:
        row, column = 1, 0
    elif b.size == n:
        row, column = 0, 1
    else:
        raise ArgumentError(f"{b.shape} does not match {x.shape}")
    numbers = i32(n), i32(row), i32(column), f32(scale), i32(product)
    be.each(ELEMENTWISE, "combine_two", x.size, x, b, y.raw_buffer, *numbers)


# ---- one array


def rope(
    be: GPUBackend, x: GPUArray, positions: GPUArray, spec: RopeSpec, head_dim: int
) -> GPUArray:
    y = be.empty(x.shape)
    shape = (i32(v) for v in (x.shape[-1], head_dim, spec.first, spec.freqs.size))
    how = i32(spec.pairing == "adjacent"), f32(spec.scale)
    be.each(ELEMENTWISE, "rope", x.size, x, positions, spec.freqs, y, *shape, *how)
    return y


def scale_softcap(be: GPUBackend, x: GPUArray, scale: float, cap: float) -> GPUArray:
    y = be.empty(x.shape)
    be.each(ELEMENTWISE, "scale_softcap", x.size, x, y, f32(scale), f32(cap))
    return y


def clamp(be: GPUBackend, x: GPUArray, limit: float) -> GPUArray:
    y = be.empty(x.shape)
    be.each(ELEMENTWISE, "clamp_all", x.size, x, y, f32(limit))
    return y


def concat(be: GPUBackend, xs: Sequence[GPUArray], n_head: int) -> GPUArray:
    t = xs[0].shape[0]
    widths = [x.size // (t * n_head) for x in xs]
    y = be.empty((t, n_head * sum(widths)))
    first = 0
    for x, d in zip(xs, widths, strict=True):
        shape = (i32(v) for v in (n_head, n_head, d, first, sum(widths)))
        be.each(ELEMENTWISE, "join", t * n_head * d, x, y, *shape)
        first += d
    return y


def repeat(be: GPUBackend, x: GPUArray, n: int) -> GPUArray:
    t, d = x.shape
    y = be.empty((t, n * d))
    shape = (i32(v) for v in (n, 1, d, 0, d))
    be.each(ELEMENTWISE, "join", y.size, x, y, *shape)
    return y


def take(be: GPUBackend, x: GPUArray, rows: GPUArray) -> GPUArray:
    if len(x) == rows.size == 1:  # the only row there is
        return x
    y = be.empty((rows.size, *x.shape[1:]), x.dtype)
    be.each(ELEMENTWISE, "take", y.size, x, rows, y, i32(prod(x.shape[1:])))
    return y
