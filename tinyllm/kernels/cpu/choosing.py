"""The largest of many logits, in one compiled pass and a look at the runs that hold them."""

from __future__ import annotations

import math
import threading

import numpy as np

from .. import choose
from . import jit
from .emit import F32, I1, I32, I64, LANES, V16F, V
from .simd import emitter, f32, get_f32, get_i32, i64, set_f32, set_i32

RUN = 256  # logits that share a maximum
MOST = 128  # found by insertion; more are left to NumPy
ACCUMULATORS = 4


@emitter(f32, i64)
def run_max(e, p):
    """The largest of RUN floats; NaN if one of them is."""
    b, at_once = e.b, ACCUMULATORS * LANES
    start = [e.load(e.ptr(p), V16F, 64 * i) for i in range(ACCUMULATORS)]

    def step(i, state):
        at = e.at(e.ptr(p), b.mul(i, I64(4 * at_once)))
        *most, nan = state
        for j in range(ACCUMULATORS):
            v = e.load(at, V16F, 64 * j)
            nan = b.or_(nan, b.fcmp_unordered("uno", v, v))
            most[j] = e.select("<", most[j], v, v, most[j])
        return [*most, nan]

    never = e.const(0, V(I1, LANES))
    *most, nan = e.loop(RUN // at_once, [*start, never], step)
    while len(most) > 1:
        most = [e.select("<", x, y, y, x) for x, y in zip(most[::2], most[1::2], strict=True)]
    largest = e.fold(most[0], lambda x, y: e.select("<", x, y, y, x))
    spoiled = b.icmp_unsigned("!=", e.fold(b.zext(nan, V(I32, LANES)), b.or_), I32(0))
    return b.select(spoiled, F32(float("nan")), largest)


def insert(ids, values, n, k, i, value):
    """Put a value into a list of n, largest first and at most k, behind its equals; the number then."""
    j = min(n, k - 1)
    while j > 0 and get_f32(values + 4 * (j - 1)) < value:
        set_f32(values + 4 * j, get_f32(values + 4 * (j - 1)))
        set_i32(ids + 4 * j, get_i32(ids + 4 * (j - 1)))
        j -= 1
    set_f32(values + 4 * j, value)
    set_i32(ids + 4 * j, i)
    return min(n + 1, k)


def tail_max(p, n):
    """``run_max`` of n floats."""
    most = get_f32(p)
    for i in range(1, n):
        v = get_f32(p + 4 * i)
        if v > most or v != v:
            most = v
        if v != v:
            break
    return most


def find_largest(x, n, k, maxima, ids, values, first, last, worker):
    """The k largest of x [n] -> ids, values; only the first value, NaN, if there is one. One piece.

    The k-th largest of the runs' maxima is a bound: only runs that reach it are looked at.
    """
    n_runs, found = (n + RUN - 1) // RUN, 0
    for r in range(n_runs):
        p, size = x + 4 * RUN * r, min(RUN, n - RUN * r)
        most = run_max(p) if size == RUN else tail_max(p, size)
        if most != most:
            set_f32(values, most)
            return
        set_f32(maxima + 4 * r, most)
        if found < k or most > get_f32(values + 4 * (k - 1)):
            found = insert(ids, values, found, k, r, most)
    bound = get_f32(values + 4 * (k - 1)) if found == k else f32(-np.inf)
    found = 0
    for r in range(n_runs):
        if get_f32(maxima + 4 * r) < bound:
            continue
        for i in range(RUN * r, min(RUN * r + RUN, n)):
            v = get_f32(x + 4 * i)
            if v >= bound and (found < k or v > get_f32(values + 4 * (k - 1))):
                found = insert(ids, values, found, k, i, v)


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of logits [n]: ids int32 and values, largest first, equal ones in order of their ids."""
    n = len(logits)
    if k == 1 or k > min(MOST, n) or not (logits.dtype == np.float32 and logits.flags.c_contiguous):
        return choose.top_k(logits, k)
    room = _room
    if n > room.n_logits:
        room.grow(n)
    jit.kernel(find_largest)(0, 1, x=logits.ctypes.data, n=n, k=k, **room.places)
    if not math.isfinite(room.values[0]):
        choose.check_largest(float(room.values[0]))
    return room.ids[:k].copy(), room.values[:k].copy()


class _Room(threading.local):
    """A thread's room for ``find_largest``: to ask NumPy for addresses costs more than the search."""

    n_logits = 0

    def grow(self, n: int) -> None:
        self.maxima = np.empty(-(-n // RUN), np.float32)
        self.ids, self.values = np.empty(MOST, np.int32), np.empty(MOST, np.float32)
        self.places = {
            name: getattr(self, name).ctypes.data for name in ("maxima", "ids", "values")
        }
        self.n_logits = n


_room = _Room()
