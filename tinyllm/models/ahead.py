"""A step of decoding that is begun before the host knows its ids: the device has just chosen them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels.backend import Best
from .state import State


@dataclass(eq=False)
class Flight:
    """One row of each of several states, on its way.

    ``result`` is on the device, ``rows`` waits for it, ``n_step`` is its number there. The device went on with
    ``ids``; the states may go on with others, or not at all. ``states`` are their Python ids: references to
    them would keep them.
    """

    result: Any
    rows: Callable[[], list[Best]]
    n_step: int
    states: list[int]
    past: list[int]
    ids: list[int]


def landed(segments: Sequence[tuple[State, int, str]]) -> Flight | None:
    """The step that was begun for these states, if it is the one that they need now. It is theirs no more."""
    states = [s for s, _, _ in segments]
    flight = states[0].flight
    same = flight is not None and all(s.flight is flight for s in states)
    for s in states:
        s.flight = None
    if not same or flight.states != [id(s) for s in states]:
        return None
    if any(n != 1 or want == "none" for _, n, want in segments):
        return None
    now = [s.n_past for s in states], [s.ids[s.n_past] for s in states]
    return flight if (flight.past, flight.ids) == now else None
