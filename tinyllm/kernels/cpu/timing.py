"""Choosing among ways to read weights by timing them on this machine; all give the same bits.

What is fastest differs between processors and cannot be told from their names: asking for memory ahead of
its use doubles the speed of one and halves that of another. So the first use of a kernel runs each way over
more memory than caches hold, for some milliseconds, and the winner is kept beside the compiled kernels. A
measurement whose rounds disagree, during which others had the processor, or that took too long because they
had it, is taken again after a while. ``tinyllm warmup`` measures thoroughly.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ... import system
from . import jit
from .program import Tape, huge, wrapped


@dataclass(frozen=True)
class Way:
    """How a kernel reads weights."""

    order: str = "parts"  # the order of the loads, one of ``micro.ORDERS``
    ahead: int = 0  # bytes between a line that is read and the one that is asked for


@dataclass
class Result:
    """The fastest way of a kernel, and GB/s of each in its fastest round, plain reading first."""

    name: str
    way: Way
    rates: dict[Way, float] = field(default_factory=dict)
    doubtful: bool = False  # the rounds disagree or are not whole, or others had the processor

    def __str__(self) -> str:
        plain, best = next(iter(self.rates.values())), self.rates[self.way]
        text = f"{self.name}: {best:.1f} GB/s by {self.way.order}, {self.way.ahead} bytes ahead"
        text += f"; {plain:.1f} with nothing asked for"
        return text + " (for now: the machine is busy)" * self.doubtful


Record = Callable[[Tape, int, int, Way], None]
QUICK = (0, 2048, 4096, 8192, 16384)  # bytes ahead
THOROUGH = (0, 512, 1024, 2048, 3072, 4096, 6144, 8192, 10240, 12288, 16384, 24576)
OUTER = (4096, 8192, 12288, 16384)  # bytes ahead in the order "outer"
BURSTS = (0, 6144)  # bytes ahead in other orders: kernels differ more than distances do
ROUNDS, MANY_ROUNDS = 3, 9
CLOSE = 1.02  # a way that is faster by less is not preferred to plain reading
SPREAD = 1.2  # the median round over the fastest, of a machine that does something else, too
SHARE = 0.8  # least part of the time for which the threads had a processor, where no neighbour was
PATIENCE = 1.0  # seconds for a kernel, if not thoroughly
GOOD_FOR = 3600  # seconds after which a doubtful result is no longer taken
SMALLEST, LARGEST = 48 << 20, 256 << 20  # bytes to read
_results: dict[str, Result] = {}
_lock = threading.RLock()
_thorough = False
system.after_fork(_lock._at_fork_reinit)  # type: ignore[attr-defined]


def chosen(
    name: str,
    orders: Sequence[str],
    record: Record,
    piece_bytes: int,
    n_workers: int,
) -> Way:
    """The fastest way of a kernel here: known, kept on disk, or timed now.

    Parameters
    ----------
    name : str
        The kernel's; letters, digits and underscores.
    orders : sequence of str
        Those that it can be compiled for.
    record : callable
        ``record(tape, address, pieces, way)`` adds the kernel's work on so many pieces of memory.
    piece_bytes : int
        Bytes of a piece.
    n_workers : int
        Threads that share the work.
    """
    with _lock:
        known = _results.get(name)
        if known is None and not _thorough:
            known = _read(name)
        if known is None:
            known = _measure(name, orders, record, piece_bytes, n_workers)
            _write(known)
        _results[name] = known
        return known.way


@contextmanager
def thoroughly() -> Iterator[list[Result]]:
    """What is first used within is timed longer, in more ways, whatever is kept; yields the results."""
    global _thorough
    with _lock:
        _results.clear()
        _thorough = True
    found: list[Result] = []
    try:
        yield found
    finally:
        with _lock:
            _thorough = False
            found += _results.values()


def _ways(orders: Sequence[str]) -> list[Way]:
    ways = []
    for order in orders:
        few = QUICK if order == orders[0] else OUTER if order == "outer" else BURSTS
        ways += [Way(order, n) for n in (THOROUGH if _thorough else few)]
    return ways


def _measure(
    name: str, orders: Sequence[str], record: Record, piece_bytes: int, n_workers: int
) -> Result:
    """Time all ways, round by round, so that what disturbs one disturbs all."""
    memory = huge(min(max(2 * system.cache_bytes(), SMALLEST), LARGEST))
    memory[:] = 1
    pieces = memory.nbytes // piece_bytes
    tapes = {way: Tape() for way in _ways(orders)}
    times: dict[Way, list[float]] = {way: [] for way in tapes}
    for way in tapes:
        record(tapes[way], wrapped(memory).address, pieces, way)
    rounds, patience = (MANY_ROUNDS, float("inf")) if _thorough else (ROUNDS, PATIENCE)
    begun, used = time.perf_counter(), time.process_time()
    for way in [*tapes] * rounds:
        start = time.perf_counter()
        if start - begun > patience:
            break
        tapes[way].run(n_workers)
        times[way].append(time.perf_counter() - start)
    had = (time.process_time() - used) / (n_workers * (time.perf_counter() - begun))
    whole = all(len(t) == rounds for t in times.values())
    if not all(times.values()):
        times = dict([next(iter(times.items()))])  # some ways were not tried: plain reading it is
    plain = next(iter(times))
    best = min(times, key=lambda way: min(times[way]))
    if min(times[plain]) < CLOSE * min(times[best]):
        best = plain
    doubtful = statistics.median(times[best]) > SPREAD * min(times[best]) or had < SHARE
    doubtful |= not whole
    rates = {way: pieces * piece_bytes / min(t) / 1e9 for way, t in times.items()}
    return Result(name, best, rates, doubtful)


# ---- kept beside the compiled kernels


def _path(name: str) -> Path | None:
    """A file for each kernel and processor: others may share the folder."""
    folder = jit.cache_folder()
    machine = hashlib.sha256(system.cpu_name().encode()).hexdigest()[:8]
    return folder / f"{name}-{machine}.way" if folder else None


def _read(name: str) -> Result | None:
    path = _path(name)
    stored = jit.kept(path) if path else None
    if not path or not stored:
        return None
    fields = json.loads(stored)
    if fields["doubtful"] and not 0 <= time.time() - path.stat().st_mtime < GOOD_FOR:
        return None
    rates = {Way(order, ahead): rate for order, ahead, rate in fields["rates"]}
    return Result(name, Way(**fields["way"]), rates, fields["doubtful"])


def _write(result: Result) -> None:
    rates = [(way.order, way.ahead, round(rate, 2)) for way, rate in result.rates.items()]
    text = json.dumps({"way": asdict(result.way), "rates": rates, "doubtful": result.doubtful})
    if path := _path(result.name):
        with suppress(OSError):  # the disk is full, say: it only costs measuring again next time
            jit.keep(path, text.encode())
