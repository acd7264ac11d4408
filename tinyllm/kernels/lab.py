"""The lab: a kernel from outside is held to its operation's contract, then timed beside ours.

The contract is the exact result, in float64, of the weights that the format's bytes mean. A product with
quantised weights may differ from it by what rounding activations to int8 costs; everything else by what
float32 costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..gguf import quants
from . import llamacpp
from .backend import Backend
from .outside import Outside
from .reference import ReferenceBackend

FLOAT, QUANTISED = 2e-5, 0.01  # root mean square error relative to the result's size
FURTHEST = 6  # times that, for the worst output
SHAPES = ((16, 256), (40, 512), (200, 1024))  # [n_out, n_in]: whole tiles, and some rows of one
TOKENS = (2, 3, 17, 40)
LARGE, SMALL, WIDTH = 32768, 2048, 2048  # rows of matrices for timing: from memory, from caches
FLOATS = ("F32", "F16", "BF16")


class RandomMatrix:
    """A tensor [rows, n] of a format, of random weights."""

    name = "random"

    def __init__(self, kind: str, rows: int, n: int, seed: int = 0, repeated: int = 0) -> None:
        self.type, self.shape = kind, (rows, n)
        f, rng = quants.FORMATS[kind], np.random.default_rng(seed)
        some = repeated or rows
        if n % f.block_size:
            raise ArgumentError(f"rows of {n} are not whole blocks of {kind}")
        if f.quantize is not None:
            raw = quants.quantize(kind, rng.normal(0, 0.1, (some, n)).astype(np.float32))
        else:
            raw = random_blocks(f, some * n // f.block_size, rng)
        self._raw = raw.reshape(some, -1)

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows, which repeat after ``repeated`` ones."""
        found: np.ndarray = self._raw[np.arange(start, stop) % len(self._raw)]
        if out is not None:
            out.reshape(found.shape)[...] = found
        return found

    def values(self) -> np.ndarray:
        """What the bytes mean, float64 [rows, n]."""
        raw = self.read_rows(0, self.shape[0])
        return quants.dequantize(self.type, raw).reshape(self.shape).astype(np.float64)


def random_blocks(f: quants.Format, n: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of n random blocks, with scales that are small and positive."""
    blocks = np.frombuffer(rng.bytes(n * f.type_size), f.dtype).copy()
    for name in ("d", "dmin", "m", "s"):
        if name in (f.dtype.names or ()) and f.dtype[name].kind == "f":
            blocks[name] = rng.uniform(0.01, 0.02, blocks[name].shape)
    if f.name == "IQ1_M":
        scales = blocks["scales"]
        scales[..., 3] = scales[..., 3] & 0x0FFF | 0x2000
    if f.name == "NVFP4":
        first = (f.dtype.names or ("",))[0]
        blocks[first] = rng.integers(0x28, 0x40, blocks[first].shape)
    raw: np.ndarray = blocks.view(np.uint8)
    return raw


# ---- against the contract


@dataclass(frozen=True)
class Case:
    """One call of an operation: what it is in words, what computes it, its exact result, its error's unit.

    ``unit`` has the result's shape or one that is broadcast to it.
    """

    words: str
    run: Callable[[Backend], np.ndarray]
    exact: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What the check found: "" or where the kernel is wrong; whether all bits are those of ours."""

    wrong: str
    same_bits: bool
    error: float  # the largest of the cases, root mean square, relative


def check(outside: Outside, theirs: Backend, ours: Backend) -> Verdict:
    """Hold a kernel, which ``theirs`` uses and ``ours`` does not, to the contract of its operation."""
    quantised = outside.kind in quants.FORMATS and outside.kind not in FLOATS
    bound, same, worst = QUANTISED if quantised else FLOAT, True, 0.0
    for case in cases(outside):
        got, own = case.run(theirs).copy(), case.run(ours)
        if wrong := difference(got, case, bound):
            return Verdict(wrong, False, float("inf"))
        same = same and got.tobytes() == own.tobytes()
        worst = max(worst, _rms((got - case.exact) / case.unit))
    return Verdict("", same, worst)


def difference(got: np.ndarray, case: Case, bound: float) -> str:
    """Where a result is wrong, in words; "" where it is right."""
    with np.errstate(invalid="ignore"):
        error = np.abs((got - case.exact) / case.unit)
    error = np.where(np.isfinite(got), error, np.inf)
    at = np.unravel_index(int(error.argmax()), error.shape)
    if error[at] <= FURTHEST * bound and _rms(error) <= bound:
        return ""
    wrong = int((error > FURTHEST * bound).sum())
    where = ", ".join(f"{name} {i}" for name, i in zip(("row", "output"), at, strict=True))
    return (
        f"{case.words}: {where}: got {got[at]:.6g}, expected {case.exact[at]:.6g}; "
        f"{wrong} of {error.size} outputs are off by more than {FURTHEST * bound:.2g} of the result's size"
    )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def cases(outside: Outside) -> Iterator[Case]:
    """What a kernel is called with."""
    if outside.operation in ("matvec", "matmul"):
        yield from _products(outside)
    elif outside.operation == "rms_norm":
        yield from _norms()
    else:
        yield from _activations(outside.kind)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def said(tokens: int) -> str:
    """ "1 token", "2 tokens"."""
    return f"{tokens} token{'s' * (tokens != 1)}"


def _products(outside: Outside) -> Iterator[Case]:
    for seed, (n_out, n_in) in enumerate(SHAPES):
        matrix = RandomMatrix(outside.kind, n_out, n_in, seed)
        values, b = matrix.values(), _normal(n_out, seed=9)
        for t in (1,) if outside.operation == "matvec" else TOKENS:
            for bias in (None, b):
                x = _normal(t, n_in, seed=t)

                def run(be: Backend, matrix: Any = matrix, x: Any = x, bias: Any = bias) -> Any:
                    w, given = be.load(matrix), None if bias is None else be.array(bias)
                    return np.array(be.numpy(be.matmul(w, be.array(x), given)))

                exact = x.astype(np.float64) @ values.T + (0 if bias is None else bias)
                size = np.sqrt(np.mean(x.astype(np.float64) ** 2, 1, keepdims=True))
                unit = size * np.sqrt((values**2).sum(1))
                words = f"{n_out} x {n_in}, {said(t)}" + ", bias" * (bias is not None)
                yield Case(words, run, exact, unit)


def _norms() -> Iterator[Case]:
    reference = ReferenceBackend()
    for n, group in ((64, 0), (100, 0), (192, 64), (20, 0)):
        x, w, b = _normal(5, n), _normal(group or n, seed=1), _normal(group or n, seed=2)
        for given in ((None, None), (w, None), (w, b)):

            def run(be: Backend, x: Any = x, given: Any = given, group: int = group) -> Any:
                w, b = (None if v is None else be.array(v) for v in given)
                return np.array(be.numpy(be.rms_norm(be.array(x), w, 1e-6, b, group)))

            words = f"rows of {n}" + f", norms of {group}" * (group > 0)
            words += ", weights" * (given[0] is not None) + ", bias" * (given[1] is not None)
            exact = np.asarray(reference.rms_norm(x, given[0], 1e-6, given[1], group))
            yield Case(words, run, exact, np.ones(1))


def _activations(kind: Any) -> Iterator[Case]:
    reference = ReferenceBackend()
    for n in (1000, 16, 5, 2048):
        x, up = 3 * _normal(2, n), _normal(2, n, seed=1)
        for given in (None, up):

            def run(be: Backend, x: Any = x, given: Any = given) -> Any:
                if given is None:
                    return np.array(be.numpy(be.act(be.array(x), kind)))
                return np.array(be.numpy(be.act_mul(be.array(x), be.array(given), kind)))

            exact = run(reference)
            yield Case(f"2 x {n}" + ", up" * (given is not None), run, exact, 1 + np.abs(exact))


# ---- beside ours


@dataclass(frozen=True)
class Timing:
    """What a kernel did in its fastest run."""

    test: str  # "1 token", "256 rows"
    maker: str  # whose kernel it is
    seconds: float
    nbytes: int  # weights, or arrays where there are none
    macs: int


def timings(outside: Outside, makers: Mapping[str, Backend], seconds: float) -> Iterator[Timing]:
    """Time the operation of a kernel on several backends, by their makers' names, in turn: some seconds each.

    A product with one token has more weights than caches hold.
    """
    if outside.operation in ("matvec", "matmul"):
        matrix, tests = product(outside)
        ws = {maker: be.load(matrix) for maker, be in makers.items()}
        for t in tests:
            x = _normal(t, WIDTH)
            runs = {m: (be, partial(be.matmul, ws[m], be.array(x))) for m, be in makers.items()}
            for maker, spent in _fastest(runs, seconds).items():
                macs = t * matrix.shape[0] * WIDTH
                yield Timing(said(t), maker, spent, ws[maker].nbytes, macs)
        return
    kind: Any = outside.kind
    runs = {}
    for maker, be in makers.items():
        x = be.array(_normal(256, WIDTH))
        run = partial(be.act, x, kind) if kind else partial(be.rms_norm, x, None, 1e-6)
        runs[maker] = be, run
    for maker, spent in _fastest(runs, seconds).items():
        yield Timing("256 rows", maker, spent, 8 * 256 * WIDTH, 0)


def product(outside: Outside) -> tuple[RandomMatrix, tuple[int, ...]]:
    """The matrix of a kernel's timings, and with how many tokens it is multiplied."""
    rows, tests = (LARGE, (1,)) if outside.operation == "matvec" else (SMALL, (8, 512))
    return RandomMatrix(outside.kind, rows, WIDTH, repeated=16), tests


def llamacpp_timings(outside: Outside, n_threads: int, seconds: float) -> Iterator[Timing]:
    """llama.cpp's times for the products that ``timings`` makes; none where it is not installed."""
    where = llamacpp.folder()
    if where is None or outside.operation not in ("matvec", "matmul"):
        return
    products = llamacpp.Products(where, n_threads)
    matrix, tests = product(outside)
    nbytes = quants.FORMATS[outside.kind].type_size * matrix.shape[0] * WIDTH
    nbytes //= quants.FORMATS[outside.kind].block_size
    for t in tests:
        _, spent = products.multiply(matrix, _normal(t, WIDTH), seconds)
        yield Timing(said(t), "llama.cpp", spent, nbytes, t * matrix.shape[0] * WIDTH)


Run = tuple[Backend, Callable[[], Any]]


def _fastest(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """The kernels' own time of the fastest of several runs, in seconds, by name.

    They take turns, for what disturbs the machine lasts longer than a run. Each gets some seconds, and one
    run however long that takes; of that one, which may compile, its kernels' time counts.
    """
    best, left = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, seconds)
    with ExitStack() as stack:
        profiles = {name: stack.enter_context(be.profiled()) for name, (be, _) in runs.items()}
        while any(spent > 0 for spent in left.values()):
            for name, (be, run) in runs.items():
                if left[name] > 0:
                    start = time.perf_counter()
                    _ = be.numpy(run())
                    found = max(launch.seconds for launch in profiles[name].take())
                    first = best[name] == float("inf")
                    left[name] -= found if first else time.perf_counter() - start
                    best[name] = min(best[name], found)
    return best
