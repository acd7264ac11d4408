"""The lab's command: kernels from outside are checked, then ranked beside ours and the machine's limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..kernels.backend import Backend
from ..kernels.devices import open_backend, resolve
from ..kernels.lab import FLOATS, Timing, Verdict, check, llamacpp_timings, timings
from ..kernels.outside import Outside, read_kernels

OURS = "tinyllm"


Key = tuple[str, str]  # an operation, and the format or activation


@dataclass(frozen=True)
class Report:
    """What was found of each kernel, on one device."""

    device: str
    limits: dict[str, float]
    verdicts: list[tuple[Outside, Verdict]]
    # right kernels that do the same beside each other, the fastest first in each test
    times: dict[Key, list[Timing]]

    @property
    def wrong(self) -> bool:
        return any(verdict.wrong for _, verdict in self.verdicts)

    def of_limit(self, kind: str, timing: Timing) -> float | None:
        """The share of what the machine could do; None where caches and products set no limit."""
        if not timing.macs:
            return None
        rate = self.limits["float GMAC/s" if kind in FLOATS else "dot GMAC/s"]
        least = max(timing.nbytes / self.limits["read GB/s"], timing.macs / rate) / 1e9
        return least / timing.seconds

    def lines(self) -> list[str]:
        """What is printed."""
        found = [
            f"{outside}: "
            + (
                f"WRONG: {verdict.wrong}"
                if verdict.wrong
                else f"right, error {verdict.error:.1e}; "
                + ("the bits are ours" if verdict.same_bits else "the bits differ from ours")
            )
            for outside, verdict in self.verdicts
        ]
        limits = ", ".join(f"{name} {value:.1f}" for name, value in self.limits.items())
        found += ["", f"{self.device}; limits: {limits}"] if self.times else []
        for (operation, kind), rows in self.times.items():
            wide = max([len(t.maker) for t in rows] + [24])
            found += [
                "",
                f"| {f'{operation} {kind}'.rstrip():<{wide}} | {'test':<10} | {'us':>10} | {'GB/s':>7} "
                f"| {'GMAC/s':>8} | {'of limit':>8} |",
                f"| {'-' * wide} | {'-' * 10} | {'-' * 9}: | {'-' * 6}: | {'-' * 7}: | {'-' * 7}: |",
            ]
            for t in rows:
                share = self.of_limit(kind, t)
                macs = f"{t.macs / t.seconds / 1e9:.1f}" if t.macs else "-"
                found.append(
                    f"| {t.maker:<{wide}} | {t.test:<10} | {1e6 * t.seconds:>10.1f} "
                    f"| {t.nbytes / t.seconds / 1e9:>7.1f} | {macs:>8} "
                    f"| {'-' if share is None else f'{share:.0%}':>8} |"
                )
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        kernels = [
            {
                "name": outside.name,
                "operation": outside.operation,
                "kind": outside.kind,
                "file": outside.file,
                **asdict(verdict),
                "error": None if verdict.wrong else verdict.error,
                "times": [
                    asdict(t) | {"of_limit": self.of_limit(outside.kind, t)}
                    for t in ([] if verdict.wrong else self.times[outside.key])
                ],
            }
            for outside, verdict in self.verdicts
        ]
        return {"device": self.device, "limits": self.limits, "kernels": kernels}

    def points(self) -> list[tuple[str, str, float, float]]:
        """What ``plots.roofline`` draws."""
        return [
            (
                f"{operation} {kind}, {t.test}",
                t.maker,
                t.macs / t.nbytes,
                t.macs / t.seconds / 1e9,
            )
            for (operation, kind), rows in self.times.items()
            for t in rows
            if t.macs
        ]


def examine(
    files: Sequence[str], device: str | None, n_threads: int | None, seconds: float
) -> Report:
    """Check the kernels of some files on a device, and time those that are right, some seconds each.

    Raises
    ------
    ArgumentError
        A file or a declaration is wrong, or a kernel is not for this device.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ArgumentError(f"{seconds:g} seconds for each time; expected a number above 0")
    name = resolve(device)
    outsides = [k for file in files for k in read_kernels([file])]
    ours, verdicts = open_backend(name, n_threads), []
    right: dict[Key, dict[str, Backend]] = {}
    names = Counter((k.key, k.name) for k in outsides)
    for outside in outsides:
        theirs = _with(outside, name, n_threads)
        verdict = check(outside, theirs, ours)
        verdicts.append((outside, verdict))
        if not verdict.wrong:
            alone = names[outside.key, outside.name] == 1 and outside.name != OURS
            shown = outside.name if alone else f"{outside.name} of {Path(outside.file).name}"
            right.setdefault(outside.key, {})[shown] = theirs
    times = {}
    for outside, verdict in verdicts:
        if not verdict.wrong and outside.key not in times:
            rows = list(timings(outside, right[outside.key] | {OURS: ours}, seconds))
            if isinstance(workers := getattr(ours, "n_threads", None), int):  # on the CPU
                rows += llamacpp_timings(outside, workers, seconds)
            rows.sort(key=lambda t: (len(t.test), t.test, t.seconds))
            times[outside.key] = rows
    limits = ours.limits(seconds) if times else {}
    return Report(ours.name, limits, verdicts, times)


def _with(outside: Outside, device: str, n_threads: int | None) -> Backend:
    """A backend that uses a kernel."""
    be = open_backend(device, n_threads)
    if not be.replace_kernels([outside]):
        raise ArgumentError(
            f"{outside} is {outside.language}, which does not run on {be.name}; give --device"
        )
    return be
