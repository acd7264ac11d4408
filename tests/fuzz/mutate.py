"""A seeded mutation fuzzer: damaged inputs may be refused with our own errors, and nothing else.

    python -m tests.fuzz.mutate --seconds 60
    python -m tests.fuzz.mutate --count 200000 --targets gguf
    python -m tests.fuzz.mutate --seed 7 --only 1234        # one mutant again, with its traceback

Every mutant follows from (seed, number). A mutant fails when it raises anything but a `TinyLLMError`, takes
more than a second of the processor, or makes the process need 256 MiB more than it had. What fails is kept in
``fuzz-findings/``.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tinyllm.errors import TinyLLMError

from .targets import TARGETS, Target

LIMIT_SECONDS = 1.0
LIMIT_BYTES = 256 << 20
FINDINGS = Path("fuzz-findings")
EDGES = (
    *(0, 1, 2, 7, 8, 13, 31, 32, 33, 64, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 16),
    *(
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        1 << 62,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
    ),
)


class TooSlow(BaseException):
    """A mutant ran into the alarm; no `except Exception` may swallow it."""


def flip_bit(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def set_byte(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] = rng.choice(
        (0, 1, 9, 10, 32, 127, 128, 192, 255, rng.randrange(256))
    )


def set_number(raw: bytearray, rng: random.Random) -> None:
    """Write an extreme length or count over four or eight bytes."""
    width, code = rng.choice(((4, "I"), (8, "Q"), (8, "Q")))
    number = struct.pack(rng.choice("<<<>") + code, rng.choice(EDGES) % (1 << 8 * width))
    at = rng.randrange(len(raw))
    raw[at : at + width] = number


def nudge_number(raw: bytearray, rng: random.Random) -> None:
    """Add a little to a number of eight bytes."""
    at = rng.randrange(len(raw))
    old = int.from_bytes(raw[at : at + 8], "little")
    raw[at : at + 8] = ((old + rng.choice((-8, -1, 1, 8, 32))) % (1 << 64)).to_bytes(8, "little")


def truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def delete(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    del raw[at : at + rng.choice((1, 4, 8, rng.randrange(1, 64)))]


def insert(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw) + 1)
    raw[at:at] = rng.randbytes(rng.choice((1, 4, 8, rng.randrange(1, 64))))


def repeat(raw: bytearray, rng: random.Random) -> None:
    """Copy a piece to another place, over what is there or between."""
    start, at = rng.randrange(len(raw)), rng.randrange(len(raw))
    piece = raw[start : start + rng.randrange(1, 80)]
    raw[at : at + rng.choice((0, len(piece)))] = piece


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(flip_bit, set_byte, set_number, set_number, nudge_number),
    *(truncate, delete, insert, repeat),
)


def mutant(target: Target, seed: int, number: int) -> bytes:
    """The mutant with this number: a few changes to one input, or two inputs spliced."""
    rng = random.Random(f"{target.name} {seed} {number}")
    if target.structured is not None and rng.random() < 0.7:
        return target.structured(rng)
    raw = bytearray(rng.choice(target.inputs))
    if rng.random() < 0.1:
        other = rng.choice(target.inputs)
        raw[rng.randrange(len(raw)) :] = other[rng.randrange(len(other)) :]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if raw:
            rng.choice(MUTATIONS)(raw, rng)
    return bytes(raw)


def alarm(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def run(target: Target, raw: bytes) -> str:
    """Feed one mutant; returns ``"accepted"``, ``"refused"`` or what is wrong."""
    start = time.process_time()  # a busy machine is no finding
    signal.setitimer(signal.ITIMER_PROF, 10 * LIMIT_SECONDS)
    try:
        target.feed(raw)
        result = "accepted"
    except TinyLLMError:
        result = "refused"
    except TooSlow:
        return f"stopped after {10 * LIMIT_SECONDS:.0f} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    return result if seconds < LIMIT_SECONDS else f"took {seconds:.1f} s"


def limit_memory() -> None:
    """More than the allowance beyond what we have is a MemoryError, which is a finding."""
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_BYTES, now + LIMIT_BYTES))


def keep(target: Target, raw: bytes, seed: int, number: int, what: str) -> None:
    FINDINGS.mkdir(exist_ok=True)
    (FINDINGS / f"{target.name}-{seed}-{number}.bin").write_bytes(raw)
    sys.stderr.write(f"{target.name} seed {seed} number {number}: {what.strip()}\n")


def fuzz(targets: list[Target], seed: int, seconds: float, count: int) -> Counter[str]:
    """Run mutants, the targets in turn, until the time or the count is reached; counts of the results."""
    results: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for number in range(count):
        if time.monotonic() > end:
            break
        target = targets[number % len(targets)]
        raw = mutant(target, seed, number)
        result = run(target, raw)
        if result not in ("accepted", "refused"):
            keep(target, raw, seed, number, result)
            result = "failed"
        results[f"{target.name} {result}"] += 1
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--count", type=int, default=sys.maxsize, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run only the mutant of this number, unguarded")
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    return parser.parse_args()


def main() -> int:
    args = arguments()
    targets = [TARGETS[name]() for name in args.targets]
    if args.only is not None:
        target = targets[args.only % len(targets)]
        target.feed(mutant(target, args.seed, args.only))
        return 0
    for target in targets:
        for raw in target.inputs:
            target.feed(raw)  # what the mutants come from must work
    signal.signal(signal.SIGPROF, alarm)
    limit_memory()
    results = fuzz(targets, args.seed, args.seconds, args.count)
    for name in sorted(results):
        sys.stdout.write(f"{name}: {results[name]}\n")
    return int(any(name.endswith("failed") for name in results))


if __name__ == "__main__":
    sys.exit(main())
