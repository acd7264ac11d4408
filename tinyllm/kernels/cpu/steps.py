"""Recorded steps: the program of a step, run again without recording it again.

A step under a key is recorded once. When the key comes again, its batch is copied to where the recorded one
lies, instructions whose work grows with the past are given their pieces, and the program runs: one native call.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakMethod

import numpy as np

from ..backend import Array, Batch
from ..profile import Profile
from . import jit
from .attention import BLOCK
from .profile import TimedTape
from .program import CPUArray, Tape, wrapped

MOST_STEPS = 24  # recorded at a time: texts come and go, and prompts are read beside them
MOST_ROWS = 32  # longer steps take long enough to be recorded anew each time
INPUTS = ("ids", "positions", "starts", "n_past", "outputs", "scales")  # arrays of a batch


@dataclass
class Growing:
    """An instruction whose amount of work depends on how many positions are stored."""

    row: int
    tiles: np.ndarray  # [n_seq]: pieces for each block of a sequence's past
    room: int  # pieces that it has memory for

    def pieces(self, blocks: Sequence[int]) -> int:
        """How many pieces it has when the sequences see so many blocks."""
        return int((self.tiles * blocks).sum())


@dataclass
class Recorded:
    """A step's program, its inputs' places and its result."""

    tape: Tape
    batch: Batch
    inputs: dict[str, np.ndarray]  # views of the batch's arrays
    tables: np.ndarray  # [n_seq] int64: addresses of the caches' tables
    caches: CPUArray  # the memory of ``tables``
    lengths: list[int]  # [n_seq]: rows of each sequence
    sources: (
        CPUArray | None
    )  # [T] int64: addresses of the tables of what the rows' sequences have read
    growing: list[Growing] = field(default_factory=list)
    blocks: list[int] | None = None  # [n_seq]: blocks of the past that ``growing`` rows are set for
    result: Array = None
    replayable: bool = True

    def replay(self, batch: Batch, n_workers: int) -> bool:
        """Put a batch in the place of the recorded one, and run; False if its past has outgrown the step."""
        # by the last of the new tokens
        seen = zip(batch.n_past.tolist(), self.lengths, strict=True)
        blocks = [(n + new - 1) // BLOCK + 1 for n, new in seen] if self.growing else None
        if blocks != self.blocks and blocks is not None:
            pieces = [g.pieces(blocks) for g in self.growing]
            if any(n > g.room for n, g in zip(pieces, self.growing, strict=True)):
                return False
            for n, g in zip(pieces, self.growing, strict=True):
                self.tape.set_pieces(g.row, n)
            self.blocks = blocks
        for name, view in self.inputs.items():
            view[...] = getattr(batch, name)
        past = batch.n_past.tolist()
        make_room(batch, past, self.lengths)
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
        self._local, self._workers = _Local(), 1

    @property
    def tape(self) -> Tape:
        """Where operations are recorded."""
        return self._local.tape

    @property
    def now(self) -> Recorded | None:
        """The step being recorded."""
        return self._local.now

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
        """The result of fn on the batch, by replay where a step of this key is known."""
        self.settle()
        if key is None or batch.n_rows > MOST_ROWS:
            try:
                return self._record(fn, batch).result
            finally:
                self.tape.clear()
        key = (key, batch.starts.tobytes(), tuple([c.kv_type for c in batch.caches]))
        known = self._known.pop(key, None)
        if known is None or not known.replay(batch, self._workers):
            known = self._first_time(fn, batch)
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

    def _first_time(self, fn: Callable[[Batch], Array], batch: Batch) -> Recorded:
        """Record on a tape that stays the step's own."""
        mine = self.tape
        self._local.tape = self._local.new_tape()
        try:
            recorded = self._record(fn, batch)
        finally:
            self._local.tape = mine
        while len(self._known) >= MOST_STEPS:
            self._known.popitem(last=False)
        return recorded

    def _record(self, fn: Callable[[Batch], Array], batch: Batch) -> Recorded:
        """Call fn on the batch's device form, and run what it recorded."""
        outer, tape = self.now, self.tape
        lengths = np.diff(batch.starts).tolist()
        make_room(batch, batch.n_past.tolist(), lengths)
        tables = np.array(addresses(batch), np.int64)
        upload = self._upload()
        assert upload is not None  # its backend owns these steps
        uploaded = upload(batch)
        given = {name: getattr(uploaded, name) for name in INPUTS}
        inputs = {name: x.view() for name, x in given.items() if x is not None}
        read = None if batch.source is None else np.array(addresses(batch.source), np.int64)
        sources = None if read is None else wrapped(read)
        recorded = Recorded(tape, uploaded, inputs, tables, wrapped(tables), lengths, sources)
        self._local.now = recorded
        try:
            recorded.result = fn(recorded.batch)
            jit.end_line()
            tape.run(self._workers)
        finally:
            self._local.now = outer
            # these sequences may end before the step
            recorded.batch = replace(uploaded, caches=(), source=None)
        return recorded


class _Local(threading.local):
    """What each Python thread has for itself."""

    def __init__(self) -> None:
        self.new_tape: Callable[[], Tape] = Tape
        self.tape = Tape()
        self.now: Recorded | None = None


def make_room(batch: Batch, past: list[int], lengths: list[int]) -> None:
    """Have each cache take the pages that its new rows need."""
    for c, n, new in zip(batch.caches, past, lengths, strict=False):  # encoders have no caches
        if n < c.ready_from or n + new > c.ready_to:
            c.reserve(n, n + new)


def addresses(batch: Batch) -> list[int]:
    """Those of the caches' tables; a batch without caches has one that nobody reads."""
    return [c.address for c in batch.caches] or [0]
