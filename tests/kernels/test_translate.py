"""Kernels mean what they mean in Python: the same functions are run by both."""

from __future__ import annotations

import ctypes
import math
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from tinyllm.kernels.cpu import jit
from tinyllm.kernels.cpu.simd import get_f32, get_i64, i64, set_f32, set_i64

F32 = np.float32
CHOICE, HALF = 2, F32(0.5)


def peek(kind: Any) -> Any:
    return lambda address: kind.from_address(address).value


def poke(kind: Any) -> Any:
    def write(address: int, value: Any) -> None:
        kind.from_address(address).value = value

    return write


IN_PYTHON = {
    "get_i64": peek(ctypes.c_int64),
    "set_i64": poke(ctypes.c_int64),
    "get_f32": lambda address: F32(ctypes.c_float.from_address(address).value),
    "set_f32": poke(ctypes.c_float),
    "i64": int,
}


def interpreted(body: Any) -> Any:
    """A kernel as a Python function, its helpers too."""
    names = {**body.__globals__, **IN_PYTHON}
    for name in ("floor_mod", "collatz"):
        helper = body.__globals__[name]
        names[name] = FunctionType(helper.__code__, names, name)
    return FunctionType(body.__code__, names, body.__name__)


def both(body: Any, numbers: list[Any], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The memory behind ``numbers`` after the kernel, and after Python."""
    found = []
    for run in (jit.function(body), interpreted(body)):
        memory = np.zeros(512, np.uint8).view(dtype)
        memory[: len(numbers)] = numbers
        run(memory.ctypes.data, memory.ctypes.data + 256, len(numbers), 3)
        found.append(memory)
    return found[0], found[1]


# ---- kernels: (input, output, how many inputs, 3)


def floor_mod(x, y):
    """Quotient and remainder in one number."""
    if y == 0:
        return 0
    return 1000 * (x // y) + x % y


def collatz(n):
    """Steps to 1; -1 for what never gets there."""
    steps = 0
    while n > 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
        if steps == 50:
            return -1
    return steps


def divisions(p, out, n, worker):
    """// and % of all pairs."""
    total = 0
    for i in range(n):
        for j in range(n):
            total = 31 * total + floor_mod(get_i64(p + 8 * i), get_i64(p + 8 * j))
            total += get_i64(p + 8 * i) // 8 - get_i64(p + 8 * i) % 8
            total = (total ^ (total >> 7)) & 0xFFFFFFFF
    set_i64(out, total)


def loops(p, out, n, worker):
    """Loops that break, continue, nest, run down and do not run."""
    count, last = 0, i64(0)
    for i in range(n - 1, -1, -2):
        if get_i64(p + 8 * i) < 0:
            continue
        for j in range(2, 100):
            if j * j > get_i64(p + 8 * i):
                break
            count += j
        last = i
    for _ in range(5, 5):
        count = -1
    while True:
        count += collatz(get_i64(p + 8 * last))
        last -= 1
        if last < 0 or count > 100000:
            break
    set_i64(out, count)
    set_i64(out + 8, last)


def choices(p, out, n, worker):
    """and, or, not, comparisons in a row, if-expressions, constants, swaps, several targets."""
    a = b = get_i64(p)
    k = 0
    for i in range(n):
        v = get_i64(p + 8 * i)
        a, b = b, v
        if -5 < v <= 7 and not (v == 3 or v == -3):
            k += 1
        elif v > 1000 or a > b:
            k += 10 if i % 2 else 100
        else:
            k = max(k, abs(v), -v) - min(v, 3, k)
        if CHOICE == 2:
            k += 1
        else:
            k = undefined_and_never_translated  # noqa: F821
        k += 5 if CHOICE > 2 else 7
        seen = i != 0 and get_i64(p + 8 * (i - 1)) > v
        if seen:
            k -= worker
    set_i64(out, k)
    set_i64(out + 8, a << 3 | b & 15)


def floats(p, out, n, worker):
    """float32 stays float32, alone and with helpers of math."""
    total, least = F32(0), get_f32(p)
    for i in range(n):
        x = get_f32(p + 4 * i)
        total += x * HALF - total / F32(3)
        least = min(least, x)
        root = F32(math.sqrt(abs(x)))
        set_f32(out + 4 * i, max(total, -x) + root if x < total or root > F32(1) else least)


def doubles(p, out, n, worker):
    """An int and a float32 make a float64; log1p, exp, rint and conversions."""
    for i in range(n):
        v = np.float64(get_f32(p + 4 * i)) / 7 + i
        v = F32(math.log1p(math.exp(-abs(v))))
        set_f32(out + 4 * i, v + F32(i64(np.rint(get_f32(p + 4 * i) * F32(2.5)))))


INTEGERS = [0, 1, -1, 7, -7, 8, -8, 3, -3, 1000003, -1000, 64, 63, 17, 5, 2]


@pytest.mark.parametrize("body", [divisions, loops, choices])
def test_integers_are_pythons(body: Any) -> None:
    ours, theirs = both(body, INTEGERS, np.int64)
    assert ours[32:].any()
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("body", [floats, doubles])
def test_floats_are_numpys(body: Any) -> None:
    numbers = [0.0, 1.5, -2.25, 1e-20, -1e10, 3.0, 0.1, 77.7, -0.4, 1e4]
    ours, theirs = both(body, numbers, F32)
    assert ours[64:].any()
    np.testing.assert_allclose(ours, theirs, rtol=2e-7 if body is doubles else 0)


# ---- what kernels cannot have


def with_list(p, out, n, worker):
    """Has no translation."""
    set_i64(out, [1, 2][n])


def with_two_types(p, out, n, worker):
    """What v is depends on n."""
    v = 0
    if n > 1:
        v = F32(1)
    set_f32(out, v)


def with_unknown_name(p, out, n, worker):
    """v has no value."""
    set_i64(out, v)  # noqa: F821


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (with_list, r"cannot have '\[1, 2\]\[n\]': .*test_translate.py, line \d+"),
        (with_two_types, "'v' changes its type"),
        (with_unknown_name, "'v' has no value yet"),
    ],
)
def test_errors_name_the_line(body: Any, complaint: str) -> None:
    with pytest.raises(SyntaxError, match=complaint):
        jit.function(body)
