"""Threads share the pieces of a program: each is done once, and stages follow one another."""

from __future__ import annotations

import ctypes
import threading
import time
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
        pool = threads.Pool()
    kept.append(pool)
    return pool


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


def test_the_stretches_of_threads_that_never_come_are_done_by_another() -> None:
    pool = threads.Pool()
    tape, outs, want = tape_of()
    pool.run(tape.rows.ctypes.data, 1)
    for out in outs:
        out[:] = 0
    pool._work(pool._state, 0, tape.rows.ctypes.data, pool.size)  # none of them was started
    assert [set(out.tolist()) for out in outs] == [{each} for each in want]


def test_a_late_thread_claims_nothing_of_the_program_that_comes_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "n_cores", lambda: 2)
    pool = threads.Pool()
    tape, outs, want = tape_of()
    program, state = tape.rows.ctypes.data, pool._state
    pool.run(program, 1)
    last = pool._counter(threads.GENERATION)
    for out in outs:
        out[:] = 0
    jit.function(threads.announce, "announce")(state, program, 2, last + 1)
    kept.append(pool)  # the late one sleeps on its memory
    threading.Thread(target=pool._work, args=(state, 1, last - 1, 0), daemon=True).start()
    while pool._counter(threads.SLEEPERS) == 0:  # it found nothing to claim, and waits
        time.sleep(0.01)
    assert not any(out.any() for out in outs)
    pool._work(state, 0, program, 2)
    assert [set(out.tolist()) for out in outs] == [{each} for each in want]


def test_programs_are_let_go_while_one_thread_works_and_others_sleep(five: threads.Pool) -> None:
    tape, _, _ = tape_of()
    program = tape.rows.ctypes.data
    five.run(program, 5)
    for _ in range(2 * threads.RETIRED):
        five.retire(tape)
        five.run(program, 1)
    for _ in range(6000):  # a busy machine lets the others wait
        five.run(program, 1)
        if len(five._retired) <= threads.RETIRED:
            return
        time.sleep(0.01)
    pytest.fail(f"{len(five._retired)} programs are kept")


def test_programs_run_on_when_they_were_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "n_cores", lambda: 5)
    pool = threads.Pool()
    kept.append(pool)
    tape, outs, want = tape_of()
    many = ctypes.c_int64.from_address(pool._state + threads.GENERATION)
    many.value = (1 << 33) - 1  # before the first thread is there
    pool.run(tape.rows.ctypes.data, 5)
    assert many.value == 1 << 33
    assert [set(out.tolist()) for out in outs] == [{each} for each in want]


def test_a_thread_that_the_system_refuses_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(system, "n_cores", lambda: 2)
    pool = threads.Pool()
    kept.append(pool)
    tape, outs, want = tape_of()
    with monkeypatch.context() as m:
        m.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.run(tape.rows.ctypes.data, 2)
    pool.run(tape.rows.ctypes.data, 2)
    assert [set(out.tolist()) for out in outs] == [{each} for each in want]
