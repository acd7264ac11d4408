"""Recorded steps: the program of a step, run again without recording it again.

A step under a key is recorded once for each *shape*: how many rows, sequences and results it has, whichever
sequence has which rows. When both come again, the batch is copied to where the recorded one lies, what follows
from the sequences' lengths and pasts is counted anew (``Fitted``), and the program runs: one native call.

The programs of a backend share one arena, as no two run at a time: a result is valid until the next step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Protocol
from weakref import WeakMethod

import numpy as np

from ..backend import Array, Batch
from ..profile import Profile
from . import jit
from .attention import BLOCK, tokens_of
from .profile import TimedTape
from .program import Arena, CPUArray, Tape, wrapped

MOST_BYTES = 16 << 20  # all programs that are kept, with their inputs
INPUTS = ("ids", "positions", "starts", "n_past", "outputs", "scales")  # arrays of a batch


class Fitted(Protocol):
    """What in a program depends on the sequences' lengths and pasts."""

    def fit(self, tape: Tape, lengths: Sequence[int], blocks: Sequence[int]) -> bool:
        """Count anew for sequences of so many rows that see so many blocks; False if there is no room."""
        ...


@dataclass
class Recorded:
    """A step's program, its inputs' places and its result."""

    tape: Tape
    batch: Batch
    inputs: dict[str, np.ndarray]  # views of the batch's arrays
    tables: np.ndarray  # [n_seq] int64: addresses of the caches' tables
    caches: CPUArray  # the memory of ``tables``
    # [T] int64: addresses of the tables of what the rows' sequences have read
    sources: CPUArray | None
    fitted: list[Fitted] = field(default_factory=list)
    seen: tuple[list[int], list[int]] | None = None  # the lengths and blocks that these fit
    result: Array = None
    replayable: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the program and its inputs."""
        return self.tape.rows.nbytes + sum(x.nbytes for x in self.inputs.values())

    def replay(self, batch: Batch, lengths: list[int], n_workers: int) -> bool:
        """Put a batch in the place of the recorded one, and run; False if it has outgrown the step."""
        past = batch.n_past.tolist()
        seen = lengths, blocks_of(lengths, past)
        if seen != self.seen:
            if not all(fitted.fit(self.tape, *seen) for fitted in self.fitted):
                return False
            self.seen = seen
        for name, view in self.inputs.items():
            view[...] = getattr(batch, name)
        make_room(batch, past, lengths)
        self.tables[:] = addresses(batch)
        self.tape.run(n_workers)
        return True


class Steps:
    """Tapes and recorded steps of one backend, the least recently used steps forgotten first.

    Each Python thread has a tape of its own, ``tape``, and at most one step that it records, ``now``.
    """

    def __init__(self, upload: Callable[[Batch], Batch]) -> None:
        # a strong reference would make a circle, and the backend's memory wait for the collector
        self._upload = WeakMethod(upload)
        self._known: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._local, self._workers, self._arena = _Local(), 1, Arena()

    @property
    def tape(self) -> Tape:
        """Where operations are recorded."""
        return self._local.tape

    @property
    def now(self) -> Recorded | None:
        """The step being recorded."""
        return self._local.now

    def follow(self, fitted: Fitted) -> None:
        """Have something fit each batch that the step being recorded will be replayed on."""
        if self.now is not None:
            self.now.fitted.append(fitted)

    def set_workers(self, n: int) -> None:
        """How many threads run programs; recorded steps have room for the old number."""
        self._workers = n
        self.forget()

    def forget(self) -> None:
        """Drop all recorded steps."""
        self._known.clear()

    def settle(self) -> None:
        """Run what this thread has recorded and not run."""
        tape = self.tape
        if tape.n:
            jit.end_line()
            tape.run(self._workers)
        tape.clear()

    def settle_for_values(self) -> None:
        """``settle``, as Python wants to see values: a step being recorded cannot be replayed then."""
        if self.now is not None:
            self.now.replayable = False
        self.settle()

    def run(self, key: Hashable | None, fn: Callable[[Batch], Array], batch: Batch) -> Array:
        """The result of fn on the batch, by replay where a step of this key and shape is known."""
        self.settle()
        lengths = lengths_of(batch.starts)
        if key is None or batch.source is not None:
            try:
                return self._record(fn, batch, lengths).result
            finally:
                self.tape.clear()
        key = (key, shape_of(batch, lengths))
        known = self._known.pop(key, None)
        if known is None or not known.replay(batch, lengths, self._workers):
            known = self._first_time(fn, batch, lengths)
            self._forget_to_hold(known.nbytes)
        if known.replayable:
            self._known[key] = known
        return known.result

    @contextmanager
    def profiled(self) -> Iterator[Profile]:
        """Run this thread's steps on tapes that note their times; those recorded before wait meanwhile."""
        found, mine, known = Profile(), self._local, self._known
        self.settle()
        tape, mine.new_tape = mine.tape, partial(TimedTape, found)
        self._known, mine.tape = OrderedDict(), TimedTape(found)
        try:
            yield found
            self.settle()
        finally:
            self._known, mine.tape, mine.new_tape = known, tape, Tape

    def _first_time(
        self, fn: Callable[[Batch], Array], batch: Batch, lengths: list[int]
    ) -> Recorded:
        """Record on a tape that stays the step's own."""
        mine = self.tape
        self._local.tape = self._local.new_tape(self._arena)
        try:
            recorded = self._record(fn, batch, lengths)
        finally:
            self._local.tape = mine
        y = recorded.result
        if isinstance(y, CPUArray) and y.in_arena:  # its place is left to the next step
            recorded.result = CPUArray(y.shape, y.dtype, y.address, self._arena)
        return recorded

    def _forget_to_hold(self, n_bytes: int) -> None:
        """Forget steps until so many bytes more may be kept."""
        held = n_bytes + sum(known.nbytes for known in self._known.values())
        while self._known and held > MOST_BYTES:
            held -= self._known.popitem(last=False)[1].nbytes

    def _record(self, fn: Callable[[Batch], Array], batch: Batch, lengths: list[int]) -> Recorded:
        """Call fn on the batch's device form, and run what it recorded."""
        outer, tape = self.now, self.tape
        make_room(batch, batch.n_past.tolist(), lengths)
        tables = np.array(addresses(batch), np.int64)
        upload = self._upload()
        assert upload is not None  # its backend owns these steps
        uploaded = upload(batch)
        given = {name: getattr(uploaded, name) for name in INPUTS}
        inputs = {name: x.view() for name, x in given.items() if x is not None}
        read = None if batch.source is None else np.array(addresses(batch.source), np.int64)
        sources = None if read is None else wrapped(read)
        recorded = Recorded(tape, uploaded, inputs, tables, wrapped(tables), sources)
        self._local.now = recorded
        try:
            recorded.result = fn(recorded.batch)
            jit.end_line()
            tape.run(self._workers)
        finally:
            self._local.now = outer
            tape.let_go()
            # these sequences may end before the step, and what was made of its inputs is nobody else's
            recorded.batch = replace(uploaded, caches=(), source=None)
            for x in given.values():
                if x is not None:
                    x.made = None
        return recorded


class _Local(threading.local):
    """What each Python thread has for itself."""

    def __init__(self) -> None:
        self.new_tape: Callable[..., Tape] = Tape
        self.tape = Tape()
        self.now: Recorded | None = None


def shape_of(batch: Batch, lengths: list[int]) -> Hashable:
    """What a program depends on besides its key: sizes, and kernels that are chosen by the batch."""
    kv_type = batch.caches[0].kv_type if batch.caches else None
    sizes = batch.n_rows, batch.n_seq, batch.n_out, tokens_of(max(lengths))
    return sizes, kv_type, batch.scales is None


def make_room(batch: Batch, past: list[int], lengths: list[int]) -> None:
    """Have each cache take the pages that its new rows need."""
    for c, n, new in zip(batch.caches, past, lengths, strict=False):  # encoders have no caches
        if n < c.ready_from or n + new > c.ready_to:
            c.reserve(n, n + new)


def addresses(batch: Batch) -> list[int]:
    """Those of the caches' tables; a batch without caches has one that nobody reads."""
    return [c.address for c in batch.caches] or [0]


def blocks_of(lengths: Sequence[int], past: Sequence[int]) -> list[int]:
    """How many blocks each sequence's last row sees, of so many rows behind so many positions."""
    return [(n + new - 1) // BLOCK + 1 for n, new in zip(past, lengths, strict=True)]


def lengths_of(starts: np.ndarray) -> list[int]:
    """How many rows each sequence has, given where they begin."""
    return [end - begin for begin, end in pairwise(starts.tolist())]
