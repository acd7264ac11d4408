"""Kernels mean what they mean in Python: the same functions are run by both."""

from __future__ import annotations

import ctypes
import inspect
import math
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

from tinyllm.kernels.cpu import jit, simd
from tinyllm.kernels.cpu.program import Tape
from tinyllm.kernels.cpu.simd import f32, get_f32, get_i64, i64, set_f32, set_i64, store

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
    for name in ("floor_mod", "parted", "collatz"):
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


def parted(x, y):
    """Quotient and remainder, 0 and x of nothing."""
    if y == 0:
        return 0, x
    return x // y, x % y


def divisions(p, out, n, worker):
    """// and % of all pairs."""
    total = 0
    for i in range(n):
        for j in range(n):
            total = 31 * total + floor_mod(get_i64(p + 8 * i), get_i64(p + 8 * j))
            quotient, rest = parted(get_i64(p + 8 * i), get_i64(p + 8 * j))
            total += 7 * quotient - rest
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


# ---- what kernels cannot have; the line that an error names ends with "HERE"


def with_list(p, out, n, worker):
    """Has no translation."""
    set_i64(out, [1, 2][n])  # HERE


def with_two_types(p, out, n, worker):
    """What v is depends on n."""
    v = 0
    if n > 1:  # HERE
        v = F32(1)
    set_f32(out, v)


def with_unknown_name(p, out, n, worker):
    """v has no value."""
    set_i64(out, v)  # noqa: F821 HERE


def with_value_of_one_branch(p, out, n, worker):
    """v has a value if n is 2, or in a loop that may not run."""
    if n == 1:
        v = 1
    elif n == 2:
        set_i64(out, 0)
    else:
        return
    set_i64(out, v)  # HERE


def with_value_of_a_loop(p, out, n, worker):
    """v has a value if the loop ran."""
    for i in range(n):
        v = i
    set_i64(out, v)  # HERE


def with_value_after_a_break(p, out, n, worker):
    """v has a value at one of two breaks."""
    while True:
        if n == 1:
            break
        v = n
        if n == 2:
            break
        n -= 1
    set_i64(out, v)  # HERE


def with_local_of_a_global_name(p, out, n, worker):
    """CHOICE is a variable here, as Python sees it."""
    if n == 1:
        CHOICE = n
    set_i64(out, CHOICE)  # HERE


def with_else_of_for(p, out, n, worker):
    """Would do what nobody asked."""
    for i in range(n):
        set_i64(out, i)
    else:
        set_i64(out, 7)  # HERE


def with_else_of_while(p, out, n, worker):
    """An else of a loop of another sort."""
    while n > 0:
        n -= 1
    else:
        set_i64(out, 7)  # HERE


def with_keyword(p, out, n, worker):
    """Arguments of calls have no names."""
    set_i64(
        out,
        min(n, 3, key=abs),  # HERE
    )


def with_keyword_of_range(p, out, n, worker):
    """Nor do those of range."""
    for i in range(n, step=2):  # HERE
        set_i64(out, i)


def with_missing_argument(p, out, n, worker):
    """A helper wants two."""
    set_i64(out, floor_mod(n))  # HERE


def with_missing_argument_of_an_emitter(p, out, n, worker):
    """So does an instruction."""
    set_i64(out)  # HERE


def with_one_value_to_compare(p, out, n, worker):
    """Python's min of one value goes through it."""
    set_i64(out, min(n))  # HERE


def forever(n):
    """Calls itself."""
    return forever(n - 1) if n > 0 else 0  # HERE


def with_recursion(p, out, n, worker):
    """Would be written in line without end."""
    set_i64(out, forever(n))


def of_default(x, y=2):  # HERE
    """The default would be needed where no such function is called."""
    return x + y


def with_default(p, out, n, worker):
    """A helper's parameters have no defaults."""
    set_i64(out, of_default(n, 1))


def sometimes(n):  # noqa: RET503
    """None if n is 0."""
    if n > 0:
        return n  # HERE


def with_value_at_times(p, out, n, worker):
    """The helper's value may be none."""
    set_i64(out, sometimes(n))


def with_three_of_two(p, out, n, worker):
    """Two names for three values."""
    a, b = n, n, n  # HERE
    set_i64(out, a + b)


def with_vector_of_integer(p, out, n, worker):
    """An address is no vector."""
    n += 1
    store(out, n)  # HERE


def with_identity(p, out, n, worker):
    """No comparison of numbers."""
    set_i64(out, 1 if n is worker else 0)  # HERE


def with_attribute(p, out, n, worker):
    """A number has none."""
    set_i64(out, n.real)  # HERE


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (with_list, r"cannot have '\[1, 2\]\[n\]'"),
        (with_two_types, "'v' changes its type"),
        (with_unknown_name, "'v' has no value yet"),
        (with_value_of_one_branch, "'v' has no value yet, or not on every way here"),
        (with_value_of_a_loop, "'v' has no value yet, or not on every way here"),
        (with_value_after_a_break, "'v' has no value yet, or not on every way here"),
        (with_local_of_a_global_name, "'CHOICE' has no value yet, or not on every way here"),
        (with_else_of_for, "a loop of a kernel cannot have an else"),
        (with_else_of_while, "a loop of a kernel cannot have an else"),
        (with_keyword, r"min\(n, 3, key=abs\): arguments in kernels have no names"),
        (with_keyword_of_range, r"cannot have 'range\(n, step=2\)'"),
        (with_missing_argument, r"floor_mod\(n\) has 1 arguments; expected 2"),
        (with_missing_argument_of_an_emitter, r"set_i64\(out\) has 1 arguments; expected 2"),
        (with_one_value_to_compare, r"min\(n\) has 1 arguments; expected 2"),
        (with_recursion, "forever is called 32 calls deep; kernels cannot recurse"),
        (with_default, "have no defaults"),
        (with_value_at_times, "sometimes does not always return a value of one type"),
        (with_three_of_two, r"\(a, b\) is set to what is not 2 values"),
        (with_vector_of_integer, "i64 where <16 x float> is expected"),
        (with_identity, "cannot have 'n is worker'"),
        (with_attribute, "cannot have 'n.real'"),
    ],
)
def test_errors_name_the_line(body: Any, complaint: str) -> None:
    with pytest.raises(SyntaxError, match=f"{complaint}.*: .*test_translate.py, line") as error:
        jit.function(body)
    line = int(str(error.value).rpartition(" ")[2])
    lines = Path(__file__).read_text("utf-8").splitlines()
    assert lines[line - 1].endswith("HERE"), lines[line - 1]
    own = inspect.getsourcelines(body)[1]
    helper = {
        with_recursion: forever,
        with_default: of_default,
        with_value_at_times: sometimes,
    }.get(body)
    first = inspect.getsourcelines(helper)[1] if helper else own
    assert line == next(i for i in range(first, len(lines)) if lines[i - 1].endswith("HERE"))


def test_what_is_known_after_branches_and_loops() -> None:
    ours, theirs = both(ways, [3, 1, 4], np.int64)
    assert ours[32] == 3 + 1 + 5
    assert np.array_equal(ours, theirs)


def ways(p, out, n, worker):
    """Each variable has a value on every way to where it is read."""
    if n == 1:
        a = 2
    elif n == 2:
        return
    else:
        a = 3
    while True:
        b = n - 2
        if b > 0:
            c = 5
            break
        n += 1
    set_i64(out, a + b + c)


# ---- arguments by name


def scaled(x, y, n, factor: f32, first, last, worker):
    """y = x times a factor; a piece is a value."""
    for i in range(first, min(last, n)):
        set_f32(y + 4 * i, get_f32(x + 4 * i) * factor)


def unfinished(x, y, worker, first, last):
    """Its parameters end otherwise than a kernel's."""


def test_arguments_have_names() -> None:
    x, y = np.arange(5, dtype=F32), np.zeros(5, F32)
    tape, places = Tape(), {"y": y.ctypes.data, "x": x.ctypes.data}
    tape.add(jit.kernel(scaled), 5, chunk=2, factor=0.1, n=4, **places)
    tape.run(2)
    assert np.array_equal(y[:4], x[:4] * F32(0.1))
    assert y[4] == 0
    jit.kernel(scaled)(4, 5, factor=2, n=5, **places)
    assert y[4] == 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"factor": None, "scale": 1.0}, "missing: factor; unknown: scale"),
        ({"n": None}, "missing: n; unknown: none"),
        ({"m": 3, "pieces": 2}, "missing: none; unknown: m, pieces"),
        ({"n": 2.5}, "n is 2.5; expected an int64 or an address"),
        ({"n": 1 << 63}, "n is 9223372036854775808; expected an int64 or an address"),
        ({"factor": "1"}, "factor is '1'; expected a number that a float32 holds"),
        ({"factor": 1e300}, r"factor is 1e\+300; expected a number that a float32 holds"),
        ({"x": np.zeros(3, F32)}, "x is array.*; expected an int64 or an address"),
    ],
)
def test_arguments_are_checked_when_they_are_recorded(change: dict, complaint: str) -> None:
    args = {"x": 0, "y": 0, "n": 0, "factor": 1.0, **change}
    tape = Tape()
    with pytest.raises(TypeError, match=f"kernel scaled.*{complaint}"):
        tape.add(jit.kernel(scaled), 1, **{k: v for k, v in args.items() if v is not None})
    assert tape.n == 0
    with pytest.raises(TypeError, match="multiple values for keyword argument 'x'"):
        tape.add(jit.kernel(scaled), 1, x=1, **args)


def test_a_kernel_ends_with_its_pieces_and_worker() -> None:
    with pytest.raises(TypeError, match="must end with first, last, worker"):
        jit.kernel(unfinished)


def test_an_instruction_has_room_for_so_many_arguments() -> None:
    kernel = jit.Kernel("many", 0, {f"x{i}": simd.i64 for i in range(28)})
    with pytest.raises(TypeError, match="kernel many: 28 arguments; at most 27"):
        Tape().add(kernel, 1, **dict.fromkeys(kernel.parameters, 0))


def test_the_translator_keeps_to_its_budget() -> None:
    path = Path(jit.__file__).with_name("translate.py")
    assert len(path.read_text("utf-8").splitlines()) <= 500
