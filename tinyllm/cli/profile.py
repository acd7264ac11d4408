"""Where the time of a token and of a prompt goes, kernel by kernel, beside what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import system
from ..kernels.profile import Launch
from ..model import Model
from ..models.state import State
from .bench import Result, Work, read_prompt, write_tokens

MEASURE = 0.2  # seconds for each limit of the machine
SMALLEST = 4.5  # bits per weight of the smallest formats that lose little
FEW_BITS = "4.5 bits (Q4_0, Q4_K)"
LEAST = 3  # prompts that are profiled: a neighbour may hold up one
BATCH = 8  # sequences side by side, to say what a batch would change


@dataclass(frozen=True)
class Row:
    """All launches of one kind of kernel within a step."""

    kernel: str
    calls: int
    seconds: float
    nbytes: int
    stored: int  # those that come from memory
    macs: int
    numbers: str
    kind: str = ""  # the format of the weights; "" where there are none

    def least(self, limits: dict[str, float]) -> float:
        """Seconds that the machine would need at its limits; 0 where memory and products set none."""
        return max(self.reading(limits), self.multiplying(limits))

    def reading(self, limits: dict[str, float]) -> float:
        """Seconds for what comes from memory."""
        return self.stored / limits["read GB/s"] / 1e9

    def multiplying(self, limits: dict[str, float]) -> float:
        """Seconds for the products alone."""
        rate = limits["float GMAC/s" if self.numbers == "float" else "dot GMAC/s"]
        return self.macs / rate / 1e9


@dataclass(frozen=True)
class Part:
    """A step: a prompt ("pp512") or one token ("tg64"), each of its launches at the fastest of ``steps``."""

    name: str
    rows: list[Row]  # the longest first
    outside: float  # seconds that no kernel explains: starting a step, waiting for one another
    steps: int = 1

    @property
    def kernels(self) -> float:
        """Seconds within kernels."""
        return sum(row.seconds for row in self.rows)

    @property
    def whole(self) -> float:
        return self.kernels + self.outside


def measure(model: Model, results: Sequence[Result]) -> list[Part]:
    """Profile what ``bench.measure`` has timed."""
    parts = []
    for result in results:
        single = result.name.startswith("tg")
        work = write_tokens if single else read_prompt
        plain = min(_plain(model, result, work) if single else result.seconds)
        steps = list(_profiled(model, result, work, single))
        rows = by_kernel(fastest([launches for launches, _ in steps]))
        # a profile takes time of its own, and neighbours disturb whole steps: both can only add
        unexplained = [plain - sum(row.seconds for row in rows), *(rest for _, rest in steps)]
        parts.append(Part(result.name, rows, max(min(unexplained), 0.0), len(steps)))
    return parts


def _runs(model: Model, result: Result, single: bool) -> Iterator[tuple[State, list[list[int]]]]:
    """States at the depth that was asked for, and what is computed there step by step."""
    n, depth = result.n_tokens, result.depth
    ids = np.random.default_rng(0).integers(0, model.network.n_vocab, depth + n + 1).tolist()
    for _ in range(1 if single else 1 + max(len(result.seconds), LEAST)):
        state = model.new_state(depth + n + 1)
        read_prompt(model.network, state, ids[:depth])
        yield state, [[i] for i in ids[depth:]] if single else [ids[depth : depth + n]]


def _plain(model: Model, result: Result, work: Work) -> list[float]:
    """Seconds of each token without a profile, one before them to warm up."""
    times = []
    for state, runs in _runs(model, result, True):
        for run in runs:
            start = time.perf_counter()
            work(model.network, state, run)
            times.append(time.perf_counter() - start)
    return times[1:]


def _profiled(
    model: Model, result: Result, work: Work, single: bool
) -> Iterator[tuple[list[Launch], float]]:
    """The launches of each step and the seconds that they do not explain.

    The first step is not among them: the system gives a profile's arrays their memory when they are written.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(s.be.profiled()) for s in model.network.stages]
        steps = ((state, run) for state, runs in _runs(model, result, single) for run in runs)
        for i, (state, run) in enumerate(steps):
            for profile in found:
                profile.take()  # what was read to come to the depth
            start = time.perf_counter()
            work(model.network, state, run)
            seconds = time.perf_counter() - start
            launches = [launch for profile in found for launch in profile.take()]
            if i > 0:
                yield launches, seconds - sum(launch.seconds for launch in launches)


def fastest(steps: Sequence[list[Launch]]) -> list[Launch]:
    """Each launch with the shortest of its times; the shortest step where steps differ in their launches.

    Neighbours on the machine only lengthen times.
    """
    if len({tuple(launch.kernel for launch in step) for step in steps}) > 1:
        return min(steps, key=lambda step: sum(launch.seconds for launch in step))
    return [
        Launch(same[0].kernel, min(s.seconds for s in same), same[-1].work)
        for same in zip(*steps, strict=True)
    ]


def by_kernel(launches: Sequence[Launch]) -> list[Row]:
    """One row for each kernel."""
    kinds: dict[str, list[Launch]] = {}
    for launch in launches:
        kinds.setdefault(launch.kernel, []).append(launch)
    rows = [
        Row(
            kernel,
            len(some),
            sum(launch.seconds for launch in some),
            sum(launch.work.nbytes for launch in some),
            sum(launch.work.stored for launch in some),
            sum(launch.work.macs for launch in some),
            some[0].work.numbers,
            some[0].work.kind,
        )
        for kernel, some in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


# ---- shown


@dataclass(frozen=True)
class Report:
    """The profile of a model on a device, with the limits of the device measured before and after."""

    parts: list[Part]
    limits: dict[str, float]
    n_threads: int | None  # that work; None on a GPU
    n_cores: int

    def lines(self) -> list[str]:
        """Tables, and below each what it says in words."""
        found = []
        for part in self.parts:
            found += ["", *as_table(part, self.limits), *self._words(part)]
        return found

    def _words(self, part: Part) -> list[str]:
        return in_words(part, self.limits, self.n_threads, self.n_cores)

    def as_json(self) -> dict[str, Any]:
        """All numbers; seconds are of one step."""
        found: dict[str, Any] = {"limits": self.limits}
        for part in self.parts:
            rows = [
                asdict(row) | {"share": row.seconds / part.whole} | _rates(row, self.limits)
                for row in part.rows
            ]
            about = {"seconds": part.whole, "outside_kernels": part.outside, "steps": part.steps}
            found[part.name] = about | {"kernels": rows, "words": self._words(part)}
        return found

    def bars(self) -> dict[str, list[tuple[str, float, float]]]:
        """What ``plots.profile`` draws."""
        return {
            f"{part.name}: {_ms(part.whole)}": [
                *((row.kernel, row.seconds, row.least(self.limits)) for row in part.rows),
                ("(outside kernels)", part.outside, 0.0),
            ]
            for part in self.parts
        }


def report(model: Model, results: Sequence[Result]) -> Report:
    """Profile what was timed."""
    be = model.network.be
    before = be.limits(MEASURE)
    parts = measure(model, results)
    limits = {name: max(value, before[name]) for name, value in be.limits(MEASURE).items()}
    n_cores = system.n_cores()
    asked = getattr(be, "n_threads", None)  # only "cpu" has threads
    return Report(parts, limits, asked and min(asked, n_cores), n_cores)


def _rates(row: Row, limits: dict[str, float]) -> dict[str, float]:
    seconds = max(row.seconds, 1e-12)
    return {
        "gb_per_s": row.nbytes / seconds / 1e9,
        "gmac_per_s": row.macs / seconds / 1e9,
        "of_limit": row.least(limits) / seconds,
    }


def as_table(part: Part, limits: dict[str, float]) -> list[str]:
    """A Markdown table of one part."""
    what = "a token" if part.name.startswith("tg") else "the prompt"
    wide = max([len(row.kernel) for row in part.rows] + [22])
    lines = [
        f"{part.name}: {_ms(part.whole)} {what}, each kernel at its fastest of {part.steps}; limits: "
        + ", ".join(f"{name} {value:.1f}" for name, value in limits.items()),
        f"| {'kernel':<{wide}} | {'calls':>5} | {'us':>9} | {'share':>6} | {'MB':>8} | {'GB/s':>7} "
        f"| {'GMAC/s':>7} | {'of limit':>8} |",
        f"| {'-' * wide} | {'-' * 4}: | {'-' * 8}: | {'-' * 5}: | {'-' * 7}: | {'-' * 6}: "
        f"| {'-' * 6}: | {'-' * 7}: |",
    ]
    for row in part.rows:
        r = _rates(row, limits)
        macs = f"{r['gmac_per_s']:.1f}" if row.macs else "-"
        share = f"{r['of_limit']:.0%}" if row.least(limits) else "-"
        lines.append(
            f"| {row.kernel:<{wide}} | {row.calls:>5} | {1e6 * row.seconds:>9.1f} "
            f"| {row.seconds / part.whole:>6.1%} | {row.nbytes / 1e6:>8.2f} | {r['gb_per_s']:>7.1f} "
            f"| {macs:>7} | {share:>8} |"
        )
    lines.append(
        f"| {'(outside kernels)':<{wide}} | {'':>5} | {1e6 * part.outside:>9.1f} "
        f"| {part.outside / part.whole:>6.1%} | {'':>8} | {'':>7} | {'':>7} | {'':>8} |"
    )
    return lines


# ---- in words


def in_words(
    part: Part, limits: dict[str, float], n_threads: int | None, n_cores: int
) -> list[str]:
    """What limits this part, and what would change it."""
    reading = sum(row.reading(limits) for row in part.rows)
    multiplying = sum(row.multiplying(limits) for row in part.rows)
    single, whole = part.name.startswith("tg"), part.whole
    what = "a token" if single else "the prompt"
    stored = sum(row.stored for row in part.rows) / 1e6
    memory = (
        f"reading {stored:.1f} MB of weights, keys and values takes {_ms(reading)} "
        f"at {limits['read GB/s']:.1f} GB/s, {reading / whole:.0%} of {what}"
    )
    products = (
        f"the products take {_ms(multiplying)} at the limits, {multiplying / whole:.0%} of {what}"
    )
    first, second = (memory, products) if reading >= multiplying else (products, memory)
    found = [f"What limits it: {first}; {second}."]
    slow = max(part.rows, key=lambda row: row.seconds - row.least(limits))
    if (lost := slow.seconds - slow.least(limits)) > 0.1 * whole:
        found.append(
            f"What could be faster: {slow.kernel} takes {_ms(lost)} more than the limits ask."
        )
    if part.outside > 0.1 * whole:
        found.append(
            f"Outside kernels: {part.outside / whole:.0%} pass in starting the step "
            "and in waiting, for threads or for neighbours on this machine."
        )
    if single:
        found += _smaller(part) + _batch(part, limits)
    else:
        found.append("A smaller format: changes little, for the products stay the same.")
    if n_threads is not None:
        more = (
            f"-t {n_cores} would use all {n_cores} cores"
            if n_threads < n_cores
            else "none are idle"
        )
        found.append(f"More threads: {more}.")
    return found


def _smaller(part: Part) -> list[str]:
    """What fewer bits per weight would save where a token reads each weight once."""
    large = [row for row in _products(part) if bits(row) > SMALLEST + 0.1]
    saved = sum(row.seconds * (1 - SMALLEST / bits(row)) for row in large)
    names = " and ".join(dict.fromkeys(row.kind for row in large))
    if not large:
        return ["A smaller format: these are small; fewer bits than 4.5 cost quality."]
    return [
        f"A smaller format: {names} in {FEW_BITS} would save some {_ms(saved)} of {_ms(part.whole)}."
    ]


def _batch(part: Part, limits: dict[str, float]) -> list[str]:
    """What several sequences, which read the weights once, would take for a token at best."""
    rows = _products(part)
    each = max(
        sum(row.seconds for row in rows) / BATCH, sum(row.multiplying(limits) for row in rows)
    )
    rest = part.kernels - sum(row.seconds for row in rows) + part.outside / BATCH
    return [
        f"A batch: with {BATCH} sequences side by side, a token takes {_ms(each + rest)} at best."
    ]


def _products(part: Part) -> list[Row]:
    """The rows that multiply with weights."""
    return [row for row in part.rows if row.macs and row.kind]


def bits(row: Row) -> float:
    """Bits per weight of products with one token: each weight is multiplied once."""
    return 8 * row.stored / row.macs


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
