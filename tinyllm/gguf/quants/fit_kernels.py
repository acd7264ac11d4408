"""The loops of `fit.py` and `place.py` as numba compiles them: groups of weights, one after another.

Each is compiled when it is first needed, and kept in TINYLLM_CACHE, or else where numba keeps what it compiles.
Arrays are float32 and filled in place; they release the GIL. No sum changes its order for speed: what they
write is the same on every processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from ...system import cache_folder
from .format import Floats

COMPILING = Lock()  # numba compiles in one thread at a time
ROUNDS = 3  # how often codes and scales are fitted to each other, from the best start
MOVES = 4  # how often a group's integers move by one


@cache
def _jitted(body: Callable[..., None]) -> Any:
    from numba import config, njit

    before = config.CACHE_DIR
    if os.environ.get("TINYLLM_CACHE"):
        config.CACHE_DIR = str(cache_folder() / "quantisers")
    try:  # sums stay in their order, so that every processor writes the same file
        return njit(cache=True, nogil=True)(body)
    except RuntimeError:  # no folder can be written: compiled anew in each process
        return njit(nogil=True)(body)
    finally:
        config.CACHE_DIR = before


def run(body: Callable[..., None], *args: Any) -> None:
    """Call a kernel on arrays, of which the first ones have rows for groups or blocks."""
    with COMPILING:
        function = _jitted(body)
        if not function.signatures:
            function(*(a[:0] if isinstance(a, np.ndarray) and a.ndim else a for a in args))
    function(*args)


def lines(
    x: Floats, w: Floats, high: float, below: bool, starts: Floats, scale: Floats, minimum: Floats
) -> None:
    """Scales and minima of x, w [G, n], codes 0..high, with small weighed squared errors -> [G] twice.

    starts: by how much ``high`` is stretched, one try each; below: no minimum is above 0.
    """
    n, f = x.shape[1], np.float32
    codes = np.empty(n, np.float32)
    top = f(high)
    for g in range(len(x)):
        low, most = x[g, 0], x[g, 0]
        sum_w, sum_x = f(0), f(0)
        for i in range(n):
            low, most = min(low, x[g, i]), max(most, x[g, i])
            sum_w += w[g, i]
            sum_x += w[g, i] * x[g, i]
        mean_x = sum_x / sum_w
        if below:
            low = min(low, f(0))
        scale[g], minimum[g] = f(0), low
        span = most - low
        if span <= f(0):
            continue
        best, scale[g] = f(0), span / top  # as they are, without a fit
        for i in range(n):
            away = scale[g] * np.rint((x[g, i] - low) * (top / span)) + low - x[g, i]
            best += w[g, i] * away * away
        for k in range(len(starts) + ROUNDS):
            if k < len(starts):
                inverse, base = (top + starts[k]) / span, low
            elif scale[g] > f(0):
                inverse, base = f(1) / scale[g], minimum[g]
            else:
                break
            sum_q = f(0)
            for i in range(n):
                q = min(max(np.rint((x[g, i] - base) * inverse), f(0)), top)
                codes[i] = q
                sum_q += w[g, i] * q
            mean_q = sum_q / sum_w
            qq, xq = f(0), f(0)  # about the means: one weight may outweigh all others
            for i in range(n):
                away = w[g, i] * (codes[i] - mean_q)
                qq += away * (codes[i] - mean_q)
                xq += away * (x[g, i] - mean_x)
            s, m = f(1) / inverse, base
            if qq > f(0):
                s = xq / qq
                m = mean_x - s * mean_q
            if below and sum_q > f(0) and (m > f(0) or not qq > f(0)):
                s = (xq + sum_q * mean_x) / (qq + sum_q * mean_q)
                m = f(0)
            error = f(0)
            for i in range(n):
                away = s * codes[i] + m - x[g, i]
                error += w[g, i] * away * away
            if error < best and s > f(0):
                best, scale[g], minimum[g] = error, s, m


def among(x: Floats, w: Floats, high: float, scales: Floats, minima: Floats, found: Floats) -> None:
    """Which of the scales and which of the minima [G, k] of x, w [G, n], codes 0..high, together err least.

    -> found [G, 2]
    """
    f = np.float32
    n, k = x.shape[1], scales.shape[1]
    top = f(high)
    for g in range(len(x)):
        best = f(3.4e38)
        for a in range(k):
            s = scales[g, a]
            inverse = f(1) / s if s != f(0) else f(0)
            for b in range(k):
                m, error = minima[g, b], f(0)
                for i in range(n):
                    q = min(max(np.rint((x[g, i] - m) * inverse), f(0)), top)
                    away = s * q + m - x[g, i]
                    error += w[g, i] * away * away
                if error < best:
                    best, found[g, 0], found[g, 1] = error, s, m


def rays(x: Floats, w: Floats, low: float, high: float, starts: Floats, scale: Floats) -> None:
    """Scales of x, w [G, n], codes low..high, with small weighed squared errors -> [G].

    starts: the codes that the value farthest from zero is mapped to, one try each.
    """
    n, f = x.shape[1], np.float32
    least, most = f(low), f(high)
    for g in range(len(x)):
        top = f(0)
        for i in range(n):
            top = x[g, i] if abs(x[g, i]) > abs(top) else top
        scale[g] = f(0)
        if top == f(0):
            continue
        best = f(0)
        for k in range(len(starts) + ROUNDS):
            if k < len(starts):
                inverse = starts[k] / top
            elif scale[g] != f(0):
                inverse = f(1) / scale[g]
            else:
                break
            sum_xq, sum_qq = f(0), f(0)
            for i in range(n):
                q = min(max(np.rint(x[g, i] * inverse), least), most)
                wq = w[g, i] * q
                sum_xq += wq * x[g, i]
                sum_qq += wq * q
            if not sum_qq > f(0):
                continue
            s = sum_xq / sum_qq
            if s * sum_xq > best:
                best, scale[g] = s * sum_xq, s


def units(values: Floats, weights: Floats, top: float, unit: Floats) -> None:
    """The unit of which values [N, groups] are about whole multiples up to ``top`` -> [N].

    weights: how much each value's squared error counts. A negative top: the value farthest from zero is mapped
    to it, and has its sign.
    """
    f = np.float32
    n = values.shape[1]
    for b in range(len(values)):
        far = f(0)
        for g in range(n):
            far = values[b, g] if abs(values[b, g]) > abs(far) else far
        unit[b] = f(0)
        if far == f(0):
            continue
        least = f(0) if top > 0 else f(top)
        most = f(top) if top > 0 else -f(top) - f(1)
        best = f(0)
        for k in range(-6, 7):
            inverse = (f(top) + f(0.15) * f(k)) / far
            xq, qq = f(0), f(0)
            for g in range(n):
                q = min(max(np.rint(values[b, g] * inverse), least), most)
                xq += weights[b, g] * values[b, g] * q
                qq += weights[b, g] * q * q
            if qq > f(0) and xq * xq / qq > best:
                best, unit[b] = xq * xq / qq, xq / qq


def place(
    x: Floats, w: Floats, low: float, high: float, bounds: Floats, d: Floats, s: Floats, m: Floats,
    codes: Floats, error: Floats, fresh: Floats,
) -> None:  # fmt: skip
    """Whole scales and minima of each group, its codes, the blocks' errors, and units that would be better.

    x, w, codes [N, groups, n]; d, fresh [N, 2], the units of scales and of minima; s, m [N, groups] in and out;
    bounds: least and largest s, and largest m. A group's integers move by one as long as its error falls.
    """
    f = np.float32
    n_groups, n = x.shape[1], x.shape[2]
    least, most = f(low), f(high)
    for b in range(len(x)):
        total = f(0)
        aa, ab, bb, xa, xb = 0.0, 0.0, 0.0, 0.0, 0.0
        for g in range(n_groups):
            best = f(3.4e38)
            here_s, here_m = s[b, g], m[b, g]
            for move in range(1 + 4 * MOVES):
                way = (move - 1) % 4
                try_s, try_m = here_s, here_m
                if move:
                    if way == 0:
                        try_s += f(1)
                    elif way == 1:
                        try_s -= f(1)
                    elif way == 2:
                        try_m += f(1)
                    else:
                        try_m -= f(1)
                    if way == 0 and move > 1 and here_s == s[b, g] and here_m == m[b, g]:
                        break  # none of the four was better
                    if way == 0:
                        s[b, g], m[b, g] = here_s, here_m
                    if try_s < bounds[0] or try_s > bounds[1] or try_m < f(0) or try_m > bounds[2]:
                        continue
                step, base = d[b, 0] * try_s, d[b, 1] * try_m
                inverse = f(1) / step if step != f(0) else f(0)
                loss = f(0)
                for i in range(n):
                    q = min(max(np.rint((x[b, g, i] + base) * inverse), least), most)
                    away = step * q - base - x[b, g, i]
                    loss += w[b, g, i] * away * away
                if loss < best:
                    best, here_s, here_m = loss, try_s, try_m
            s[b, g], m[b, g] = here_s, here_m
            step, base = d[b, 0] * here_s, d[b, 1] * here_m
            inverse = f(1) / step if step != f(0) else f(0)
            sum_w, sum_x, sum_q, sum_qq, sum_xq = f(0), f(0), f(0), f(0), f(0)
            for i in range(n):
                q = min(max(np.rint((x[b, g, i] + base) * inverse), least), most)
                codes[b, g, i] = q
                wi = w[b, g, i]
                sum_w += wi
                sum_x += wi * x[b, g, i]
                sum_q += wi * q
                sum_qq += wi * q * q
                sum_xq += wi * q * x[b, g, i]
            total += best
            aa += float(here_s * here_s * sum_qq)
            ab -= float(here_s * here_m * sum_q)
            bb += float(here_m * here_m * sum_w)
            xa += float(here_s * sum_xq)
            xb -= float(here_m * sum_x)
        error[b] = total
        fresh[b, 0], fresh[b, 1] = d[b, 0], d[b, 1]
        det = aa * bb - ab * ab
        if bb == 0.0:
            if aa > 0.0:
                fresh[b, 0] = f(xa / aa)
        elif det > 1e-9 * aa * bb:
            fresh[b, 0] = f((xa * bb - xb * ab) / det)
            fresh[b, 1] = f((xb * aa - xa * ab) / det)
