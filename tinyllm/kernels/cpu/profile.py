"""A tape that tells how long each of its instructions took.

Between any two instructions stands one more, which writes down the clock: stages run one after another,
so the difference of two readings is the time of what stands between them. Kernels, pieces and arguments are
those of an ordinary tape, so the results have the same bits; only instructions that would run side by side
run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import numpy as np
from llvmlite import ir

from ... import system
from .. import profile
from ..profile import Profile, Work
from . import jit
from .emit import I32, I64
from .program import Arena, CPUArray, Planned, Tape
from .simd import emitter, i64, set_i64
from .threads import ARGS, ROW, pool
from .weights import CPUWeight

BLANKS = 8  # readings before the first instruction: what a reading itself takes
UNCOUNTED = ("scratch", "parts", "caches")  # arrays that are not read and written once
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@emitter(i64)
def clock(e):
    """Nanoseconds since some moment."""
    room = e.room(ir.ArrayType(I64, 2))
    place = e.b.bitcast(room, I64.as_pointer())
    if system.NAME == "win32":
        e.call("GetSystemTimePreciseAsFileTime", ir.VoidType(), place)
        return e.b.mul(e.b.load(place), I64(100))
    e.call("clock_gettime", I32, I32(system.MONOTONIC), place)
    nanoseconds = e.b.load(e.b.gep(place, [I64(1)]))
    return e.b.add(e.b.mul(e.b.load(place), I64(10**9)), nanoseconds)


def read_clock(out, first, last, worker):
    """The clock to an address."""
    for _ in range(first, last):
        set_i64(out, clock())


class TimedTape(Tape):
    """A tape that notes in a ``Profile`` what it runs."""

    def __init__(self, profile: Profile, arena: Arena | None = None) -> None:
        super().__init__(arena)
        self._profile = profile
        self._notes: list[tuple[str, Callable[[], Work]]] = []  # one for each row

    def add(
        self, kernel: jit.Kernel, pieces: int, /, chunk: int = 1, joins: bool = False, **args: Any
    ) -> int:
        row = super().add(kernel, pieces, chunk, joins, **args)
        self._notes.append((kernel.name, work_of(kernel.name, args)))
        return row

    def put(self, planned: Planned, joins: bool = False, **arrays: Any) -> int:
        row = super().put(planned, joins, **arrays)
        name = planned.kernel.name
        self._notes.append((name, work_of(name, {**planned.numbers, **arrays})))
        return row

    def clear(self) -> None:
        super().clear()
        self._notes.clear()

    def run(self, n_threads: int) -> None:
        if not self.n:
            return
        times = np.zeros(BLANKS + self.n + 1, np.int64)
        program = self._with_clocks(times)
        pool().run(program.ctypes.data, n_threads)
        pool().retire(program)
        spent = np.diff(times)
        own = int(spent[:BLANKS].min())
        for (name, work), ticks in zip(self._notes, spent[BLANKS:].tolist(), strict=True):
            seconds = 1e-9 * max(ticks - own, 0)
            self._profile.add(name, partial(float, seconds), work())

    def _with_clocks(self, times: np.ndarray) -> np.ndarray:
        """The program with a reading of the clock before and after each instruction."""
        reading = jit.kernel(read_clock)
        n = len(times) + self.n
        program = np.zeros((n + 1, ROW), np.int64)
        program[0, 0] = n
        where = np.r_[1 : BLANKS + 1, BLANKS + 1 : n + 1 : 2]  # where the readings stand
        program[where, :ARGS] = reading.address, 1, 1, 1, 1
        program[where, ARGS] = times.ctypes.data + 8 * np.arange(len(times))
        rows = program[BLANKS + 2 :: 2]
        rows[...] = self.rows[1 : self.n + 1]
        rows[:, 3] = 1  # each begins a stage
        return program


def work_of(name: str, args: dict[str, Any]) -> Callable[[], Work]:
    """What an instruction has to do, to be asked when it has run: attention's depends on the past."""
    if name.startswith("attend_"):
        return _attention(name, args)
    arrays = {n: v for n, v in args.items() if isinstance(v, CPUArray) and n not in UNCOUNTED}
    w, y = args.get("w"), cast(CPUArray, args.get("y"))
    if name == "take":
        return _known(Work(2 * y.nbytes))
    if not isinstance(w, CPUWeight):
        return _known(Work(_bytes(arrays.values())))
    others = _bytes(arrays.values())
    if "ids" in args:  # rows of the matrix are decoded
        rows = len(args["ids"]) * w.tile_bytes // 16
        return _known(Work(others + rows, rows, kind=w.kind))
    matrices = w.nbytes
    if len(w.shape) > 2:
        matrices = w.nbytes // w.shape[0] * min(w.shape[0], y.size // w.n_out)
    numbers: profile.Numbers = "float" if w.reader else "int8"
    macs = y.size * w.n_in * w.digits
    return _known(Work(others + matrices, matrices, macs, numbers, w.kind))


def _known(work: Work) -> Callable[[], Work]:
    return lambda: work


def _bytes(arrays: Iterable[CPUArray]) -> int:
    """Bytes of arrays, each counted once."""
    return sum({a.address: a.nbytes for a in arrays}.values())


def _attention(name: str, args: dict[str, Any]) -> Callable[[], Work]:
    starts, n_past = args["starts"], args["n_past"]
    heads, dims = (args["n_head"], args["n_head_kv"]), (args["dim"], args["dim_v"])
    kv_bytes = KV_BYTES[name.removeprefix("attend_").rpartition("_")[0]]
    causal, window = args["causal"], args["window"]

    def work() -> Work:
        tokens, past = np.diff(starts.view()).tolist(), n_past.view().tolist()
        return profile.attention_work(tokens, past, causal, window, heads, dims, kv_bytes)

    return work
