"""Which state a step that was begun early serves, and how long it lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.models.ahead import PendingStep, RunAhead
from tinyllm.models.state import State


def decoding(m: tinyllm.Model) -> State:
    """A state with three tokens computed and one to come."""
    state = m.new_state(16)
    state.append([5, 6, 7])
    m.network.forward([(state, 3, "last")])
    state.append([8])
    return state


@pytest.fixture
def states(stories260k: Path) -> Iterator[list[State]]:
    with tinyllm.load(stories260k, device="reference") as m:
        yield [decoding(m), decoding(m)]


def waiting(ahead: RunAhead, states: list[State]) -> PendingStep:
    """A step over the states' next tokens, begun early."""
    step = PendingStep(None, list, 1, [s.ids for s in states], [3] * len(states), [8] * len(states))
    for s in states:
        ahead.pending[s] = step
    return step


def of(states: list[State]) -> list[Any]:
    return [(s, 1, "last") for s in states]


def test_a_step_serves_the_states_it_was_begun_for(states: list[State]) -> None:
    ahead = RunAhead(enabled=True)
    step = waiting(ahead, states)
    assert ahead.take_pending(of(states)) is step
    assert ahead.take_pending(of(states)) is None  # once


@pytest.mark.parametrize("which", [[0], [1], [1, 0]], ids=str)
def test_a_step_serves_no_other_batch(states: list[State], which: list[int]) -> None:
    ahead = RunAhead(enabled=True)
    waiting(ahead, states)
    assert ahead.take_pending(of([states[i] for i in which])) is None
    assert ahead.take_pending(of(states)) is None  # some state has gone on without it


def test_batches_have_steps_of_their_own(states: list[State]) -> None:
    ahead = RunAhead(enabled=True)
    first, second = (waiting(ahead, [s]) for s in states)
    assert ahead.take_pending(of(states)[1:]) is second
    assert ahead.take_pending(of(states)[:1]) is first


def restored(state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "state.npz")
    state.restore(tmp_path / "state.npz")


@pytest.mark.parametrize(
    "change",
    [
        lambda s, _: s.ids.__setitem__(-1, 9),
        lambda s, _: s.truncate(2),
        lambda s, _: s.reuse([5, 6, 1, 8]),
        lambda s, _: s.shift(1, 1),
        restored,
    ],
    ids=["another token", "truncated", "another text", "shifted", "restored"],
)
def test_a_step_does_not_serve_a_state_that_changed(
    states: list[State], change: Any, tmp_path: Path
) -> None:
    ahead = RunAhead(enabled=True)
    waiting(ahead, states)
    change(states[0], tmp_path)
    assert ahead.take_pending(of(states)) is None


@pytest.mark.parametrize(("n", "want"), [(2, "last"), (1, "none")])
def test_a_step_serves_one_row_whose_logits_are_wanted(
    states: list[State], n: int, want: Any
) -> None:
    ahead = RunAhead(enabled=True)
    waiting(ahead, states[:1])
    states[0].append([1])
    assert ahead.take_pending([(states[0], n, want)]) is None


def test_a_step_keeps_no_state_and_ends_with_the_last(states: list[State]) -> None:
    ahead = RunAhead(enabled=True)
    step = weakref.ref(waiting(ahead, states))
    alive = [weakref.ref(s) for s in states]
    states.clear()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert step() is None
    assert not ahead.pending
