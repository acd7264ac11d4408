"""Scales and minima that lose little: least squares over a few candidates.

Rounding after dividing by the largest value wastes codes on outliers. So a few dividers are
tried; for the codes each gives, the best scale has a closed form; the smallest squared
error wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import numpy as np
from numpy.typing import NDArray

from .fit_kernels import ROUNDS, among, lines, rays, run, units
from .format import Array, Floats

Halves = NDArray[np.float16]
INF = np.float16(np.inf)


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

    limits: the codes that the value farthest from zero is mapped to, one try each, before codes and scale are
    fitted to each other; weights: how much each value's squared error counts.
    """
    top, x = peak(x)[..., 0], _group_first(x)
    weighed = x if weights is None else x * _group_first(weights)
    w = None if weights is None else _group_first(weights)
    best = scale = np.zeros_like(top)
    for limit in (*limits, *[None] * ROUNDS):
        inverse = divide(
            np.full_like(top, 1 if limit is None else limit), scale if limit is None else top
        )
        codes = snap(x * inverse)
        xq, qq = _dot(weighed, codes), _dot(codes, codes if w is None else codes * w)
        s = divide(xq, qq)
        gain = s * xq  # the squared error is sum(x * x) - gain
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, s, scale)
    return scale[..., None]


def fit_line(
    x: Floats, high: int, negative_min: bool, weights: Floats | None = None, tries: int = 13
) -> tuple[Floats, Floats]:
    """Find scale s and minimum m of x = s * q + m, q in 0..high: [..., n] -> two of [...].

    negative_min: the format stores -m unsigned, so m must not exceed 0; weights: how much each value's squared
    error counts; tries: how many stretches of the largest code are begun with.
    """
    starts = np.linspace(-0.9, 0.9, tries, dtype=np.float32)
    flat, w = _rows(x), _rows(np.ones_like(x) if weights is None else weights)
    scale, minimum = np.empty(len(flat), np.float32), np.empty(len(flat), np.float32)
    run(lines, flat, w, float(high), negative_min, starts, scale, minimum)
    return scale.reshape(x.shape[:-1]), minimum.reshape(x.shape[:-1])


def settle(x: Floats, high: int, weights: Floats, d: Halves, m: Halves) -> tuple[Halves, Halves]:
    """Move scales and minima [N] of x [N, n] to neighbouring halves as long as that lessens the error.

    Where one weight outweighs all others, it is their rounding that decides how near it comes.
    """
    found = np.stack([d, m], 1).astype(np.float32)  # what stays where no error is finite
    for _ in range(ROUNDS):
        tried = [np.stack([h, np.nextafter(h, -INF), np.nextafter(h, INF)], 1) for h in (d, m)]
        run(among, x, weights, float(high), *(t.astype(np.float32) for t in tried), found)
        d, m = (found[:, i].astype(np.float16) for i in (0, 1))
    return d, m


def fit_ray(x: Floats, low: int, weights: Floats | None = None) -> Floats:
    """Find scale s of x = s * q, q in low..-low-1: [..., n] -> [...].

    The value farthest from zero becomes about low; weights: how much each value's squared error counts.
    """
    flat, w = _rows(x), _rows(np.ones_like(x) if weights is None else weights)
    scale = np.empty(len(flat), np.float32)
    starts = np.float32(low) + np.linspace(-0.9, 1, 13, dtype=np.float32)
    run(rays, flat, w, float(low), float(-low - 1), starts, scale)
    return scale.reshape(x.shape[:-1])


def fit_unit(values: Floats, weights: Floats, top: int) -> Floats:
    """The unit of which values [N, groups] are about whole multiples, at most ``top`` -> [N].

    weights: how much each value's squared error counts; a negative top is what the value farthest from zero is
    mapped to.
    """
    unit = np.empty(len(values), np.float32)
    run(units, np.ascontiguousarray(values), weights, float(top), unit)
    return unit


def _rows(x: Floats) -> Floats:
    return np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])


def _group_first(x: Floats) -> Floats:
    """[..., n] -> [n, ...]: sums over the first axis run twice as fast."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 0))


def _dot(a: Floats, b: Floats) -> Floats:
    """Products summed over the first axis."""
    result: Floats = np.einsum("i...,i...->...", a, b)
    return result
