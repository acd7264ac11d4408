"""Scales and minima that lose little: least squares over a few candidates.

Rounding after dividing by the largest value wastes codes on outliers. So a few dividers are
tried; for the codes each gives, the best scale has a closed form; the smallest squared
error wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .format import Array, Floats


def peak(x: Floats) -> Floats:
    """Return the value farthest from zero, with its sign: [..., n] -> [..., 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)


def divide(x: Floats, by: Floats) -> Floats:
    """x / by, and 0 where by is 0."""
    return np.divide(
        x, by, out=np.zeros(np.broadcast_shapes(x.shape, by.shape), "f4"), where=by != 0
    )


def rounded(low: int, high: int) -> Callable[[Floats], Floats]:
    """Make the function that rounds to the nearest integer in low..high."""
    return lambda x: np.rint(x).clip(low, high)


def nearest_index(table: Array, x: Floats) -> Array:
    """Index of the entry of the ascending table that is nearest to each x."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, x)


def fit_scale(x: Floats, limits: Iterable[float], snap: Callable[[Floats], Floats]) -> Floats:
    """Find the scale s of x = s * snap(x / s) with a small squared error: [..., n] -> [..., 1].

    limits: the codes that the value farthest from zero is mapped to, one try each.
    """
    top = peak(x)
    best_gain = np.zeros_like(top)
    scale = np.zeros_like(top)
    for limit in limits:
        codes = snap(x * divide(np.float32(limit), top))
        xq = (x * codes).sum(-1, keepdims=True)
        qq = (codes * codes).sum(-1, keepdims=True)
        gain = divide(xq * xq, qq)  # the squared error is sum(x * x) - gain
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        scale = np.where(better, divide(xq, qq), scale)
    return scale


def fit_affine(x: Floats, high: int, negative_min: bool) -> tuple[Floats, Floats]:
    """Find scale s and minimum m of x = s * q + m, q in 0..high: [..., n] -> two of [..., 1].

    negative_min: the format stores -m unsigned, so m must not exceed 0.
    """
    low = x.min(-1, keepdims=True)
    low = np.minimum(low, 0) if negative_min else low
    span = x.max(-1, keepdims=True) - low
    scale, minimum = span / np.float32(high), low
    best = np.full_like(low, np.inf)
    for stretch in np.linspace(-0.5, 1, 7, dtype=np.float32):
        codes = np.rint((x - low) * divide(high + stretch, span)).clip(0, high)
        s, m = _line(x, codes, negative_min)
        error = np.square(x - s * codes - m).sum(-1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
    return scale, minimum


def _line(x: Floats, q: Floats, negative_min: bool) -> tuple[Floats, Floats]:
    """Least-squares line through the points (q, x)."""
    mean_x, mean_q = x.mean(-1, keepdims=True), q.mean(-1, keepdims=True)
    centred = q - mean_q
    s = divide((centred * x).sum(-1, keepdims=True), np.square(centred).sum(-1, keepdims=True))
    m = mean_x - s * mean_q
    if not negative_min:
        return s, m
    through_zero = divide((q * x).sum(-1, keepdims=True), np.square(q).sum(-1, keepdims=True))
    return np.where(m > 0, through_zero, s), np.minimum(m, 0)
