"""Threads share the pieces of a program: each is done once, and stages follow one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyllm import system
from tinyllm.kernels.cpu import jit, threads
from tinyllm.kernels.cpu.program import Tape, wrapped
from tinyllm.kernels.cpu.simd import get_i64, set_i64

SIZES = [
    (1, 1),
    (2, 1),
    (3, 2),
    (40, 4),
    (333, 3),
    (2, 1),
]  # pieces, and how many are claimed at once
STAGE = [0, 2, 3]  # those of them that begin a stage


def count(source: int, out: int, first: int, last: int, worker: int) -> None:
    """Each number is one more than the first of the stage before."""
    for i in range(first, last):
        set_i64(out + 8 * i, get_i64(out + 8 * i) + get_i64(source) + 1)


@pytest.fixture(scope="module")
def five() -> threads.Pool:
    """Five threads, whatever this machine has; they sleep on the pool's memory as long as the process lives."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(system, "n_cores", lambda: 5)
        kept.append(threads.Pool())
    return kept[0]


kept: list[threads.Pool] = []


def tape_of() -> tuple[Tape, list[np.ndarray], list[int]]:
    """A program, what it counts, and what each count is after one run."""
    tape, outs, want = Tape(), [np.zeros(1, np.int64)], [0]
    before = 0
    for i, (pieces, chunk) in enumerate(SIZES):
        if i in STAGE:
            before = i
        outs.append(np.zeros(pieces, np.int64))
        args: dict[str, Any] = {"source": wrapped(outs[before]), "out": wrapped(outs[-1])}
        tape.add(jit.kernel(count), pieces, chunk, i not in STAGE, **args)
        want.append(want[before] + 1)
    tape.rows[0, 0] = tape.n
    return tape, outs, want


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_every_piece_is_done_once_and_after_the_stage_before(
    five: threads.Pool, n_threads: int
) -> None:
    tape, outs, want = tape_of()
    for _ in range(200):
        for out in outs:
            out[:] = 0
        five.run(tape.rows.ctypes.data, n_threads)
        for out, each in zip(outs, want, strict=True):
            assert set(out.tolist()) == {each}


def test_the_lanes_of_threads_that_never_come_are_done_by_another() -> None:
    pool = threads.Pool()
    tape, outs, want = tape_of()
    pool.run(tape.rows.ctypes.data, 1)
    for out in outs:
        out[:] = 0
    pool._work(pool._state, 0, tape.rows.ctypes.data, pool.size)  # none of them was started
    assert [set(out.tolist()) for out in outs] == [{each} for each in want]
