"""Scales and minima that lose little: least squares over a few candidates.

Rounding after dividing by the largest value wastes codes on outliers. So a few dividers are
tried; for the codes each gives, the best scale has a closed form; the smallest squared
error wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import numpy as np

from .format import Array, Floats


def peak(x: Floats) -> Floats:
    """Return the value farthest from zero, with its sign: [..., n] -> [..., 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)


@overload
def grouped(x: Floats, groups: int) -> Floats: ...
@overload
def grouped(x: Floats | None, groups: int) -> Floats | None: ...
def grouped(x: Floats | None, groups: int) -> Floats | None:
    """Each block's values in groups: [N, n] -> [N, groups, n / groups]."""
    return None if x is None else x.reshape(len(x), groups, -1)


def divide(x: Floats, by: Floats) -> Floats:
    """x / by, and 0 where by is 0."""
    return np.divide(
        x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape), "f4"), where=by != 0
    )


def rounded(low: int, high: int) -> Callable[[Floats], Floats]:
    """Make the function that rounds to the nearest integer in low..high."""
    return lambda x: np.rint(x).clip(low, high)


def nearest_index(table: Array, x: Floats) -> Array:
    """Index of the entry of the ascending table that is nearest to each x: uint8, shape of x.

    Counting midpoints is several times faster than a binary search of so few.
    """
    index = np.zeros(x.shape, np.uint8)
    for midpoint in (table[1:].astype(np.float32) + table[:-1]) / 2:
        index += x > midpoint
    return index


def fit_scale(
    x: Floats,
    limits: Iterable[float],
    snap: Callable[[Floats], Floats],
    weights: Floats | None = None,
) -> Floats:
    """Find the scale s of x = s * snap(x / s) with a small squared error: [..., n] -> [..., 1].

    limits: the codes that the value farthest from zero is mapped to, one try each; weights: how much each
    value's squared error counts.
    """
    top, x = peak(x)[..., 0], _group_first(x)
    weighed = x if weights is None else x * _group_first(weights)
    w = None if weights is None else _group_first(weights)
    best = scale = np.zeros_like(top)
    for limit in limits:
        codes = snap(x * divide(np.full_like(top, limit), top))
        xq, qq = _dot(weighed, codes), _dot(codes, codes if w is None else codes * w)
        s = divide(xq, qq)
        gain = s * xq  # the squared error is sum(x * x) - gain
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, s, scale)
    return scale[..., None]


def fit_affine(
    x: Floats, high: int, negative_min: bool, weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """Find scale s and minimum m of x = s * q + m, q in 0..high: [..., n] -> two of [..., 1].

    negative_min: the format stores -m unsigned, so m must not exceed 0; weights: how much each value's squared
    error counts.
    """
    x, snap = _group_first(x), rounded(0, high)
    w = None if weights is None else _group_first(weights)
    low = np.minimum(x.min(0), 0) if negative_min else x.min(0)
    above, span = x - low, x.max(0) - low
    scale, minimum, best = span / np.float32(high), low, np.full_like(low, -1)
    for stretch in np.linspace(-0.5, 1, 7):
        codes = snap(above * divide(np.full_like(span, high + stretch), span))
        s, m, gain = _line(x, codes, negative_min, w)
        better = gain > best
        best = np.where(better, gain, best)
        scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
    return scale[..., None], minimum[..., None]


def _line(
    x: Floats, q: Floats, negative_min: bool, w: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Least-squares line s * q + m through points [n, ...]; and by how much it lowers sum(x * x)."""
    if w is None:
        n: Floats = np.float32(len(x))
        mean_x, mean_q, xq, qq = x.mean(0), q.mean(0), _dot(x, q), _dot(q, q)
    else:
        n, wq = w.sum(0), w * q
        mean_x, mean_q, xq, qq = _dot(w, x) / n, wq.sum(0) / n, _dot(x, wq), _dot(q, wq)
    covariance = xq - n * mean_x * mean_q
    s = divide(covariance, qq - n * mean_q * mean_q)
    m = mean_x - s * mean_q
    gain = s * covariance + n * mean_x * mean_x
    if not negative_min:
        return s, m, gain
    ray = divide(xq, qq)  # where m would be positive, the best line through the origin
    return np.where(m > 0, ray, s), np.minimum(m, 0), np.where(m > 0, ray * xq, gain)


def _group_first(x: Floats) -> Floats:
    """[..., n] -> [n, ...]: sums over the first axis run twice as fast."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 0))


def _dot(a: Floats, b: Floats) -> Floats:
    """Products summed over the first axis."""
    result: Floats = np.einsum("i...,i...->...", a, b)
    return result
