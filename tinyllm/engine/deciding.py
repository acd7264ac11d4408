"""How likely some next tokens are after many endings of one text, which is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import NumericError
from .completion import SMALLEST_CONTEXT
from .embedding import BeforeStep, no_matter, pack
from .generate import DAMAGED, check_fits

if TYPE_CHECKING:
    from ..models.adapters import Scales
    from ..models.network import Network
    from ..models.state import State
    from .prefixes import Prefixes
    from .request import Usage


@dataclass(frozen=True)
class Decisions:
    """Answers to questions about one input.

    ``answers`` are mappings, in the order of the questions: {"type", "name"} with "probability" (predicate),
    "choice", "confidence" and "probabilities" (choice), or "score", "confidence" and "probabilities" (score).
    ``mass`` says of each question how much of the model's probability its options had together: little
    means that the model would rather have written something else.
    """

    answers: list[dict[str, Any]]
    mass: list[float]
    usage: Usage


def shares(
    net: Network,
    texts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    n_ctx: int,
    tree: Prefixes,
    before_step: BeforeStep = no_matter,
) -> tuple[list[np.ndarray], list[float], int, int]:
    """How likely each text goes on with each of its options.

    Parameters
    ----------
    net : Network
        What computes.
    texts : sequence of ids
        What they have in common at their beginnings is read once.
    options : sequence of sequence of ids
        For each text its options, each the tokens that spell it.
    n_ctx : int
        Tokens that a text may have.
    tree : Prefixes
        What the texts have in common may be known there, and is kept there.
    before_step : callable
        Called before each step; what it raises ends the work.

    Returns
    -------
    list of float64 [options], list of float, int, int
        Each text's probabilities, which sum to 1; the probability of all its options together; tokens, what is
        common once; and how many of them were known.
    """
    for ids in texts:
        check_fits(len(ids), n_ctx, "error")
    net.check_ids(texts)
    common = beginning_of([ids[:-1] for ids in texts])
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    mass = [0.0] * len(texts)
    # one number for all: some models rotate keys by it
    room = max([SMALLEST_CONTEXT, *map(len, texts)])
    start, n_known = read_common(net, common, texts[0][len(common)], room, tree, None, before_step)
    rest = [ids[len(common) :] for ids in texts]
    for group in pack([len(ids) for ids in rest], net.n_batch):
        forks = []
        for i in group:
            forks.append(start.fork_first(len(common), room))
            forks[-1].append(rest[i])
        before_step()
        with net.lock:
            rows = last_rows(net, forks)
            for i, logits in zip(group, rows, strict=True):
                found[i], mass[i] = options_of_row(logits, options[i])
    return found, mass, len(common) + sum(map(len, rest)), n_known


def beginning_of(texts: Sequence[Sequence[int]]) -> list[int]:
    """The longest sequence of ids that all begin with."""
    same = takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False))
    return [ids[0] for ids in same]


def read_common(
    net: Network,
    common: list[int],
    following: int,
    n_ctx: int,
    tree: Prefixes,
    scales: Scales | None = None,
    before_step: BeforeStep = no_matter,
) -> tuple[State, int]:
    """A state that has read what some texts have in common, which is kept, and how much of it was known.

    ``following`` is the token that one of them has behind it.
    """
    state = tree.find([*common, following], n_ctx, scales) or tree.new_state(n_ctx, scales)
    n_known = state.n_past
    state.append(common[n_known:])
    read(net, state, before_step)
    tree.add(state)
    return state, n_known


def read(net: Network, state: State, before_step: BeforeStep) -> None:
    """Compute what a state has not read yet."""
    while n := min(net.n_batch, len(state.ids) - state.n_past):
        before_step()
        with net.lock:
            net.forward([(state, n, "none")])


def last_rows(net: Network, states: Sequence[State]) -> list[np.ndarray]:
    """The logits after the last token of each state; valid while the caller holds the network's lock."""
    if len(states) == 1:  # its text may be longer than a step
        while len(states[0].ids) - states[0].n_past > net.n_batch:
            net.forward([(states[0], net.n_batch, "none")])
    pending = [(s, len(s.ids) - s.n_past) for s in states]
    return [rows[-1] for rows in net.forward([(s, n, "last") for s, n in pending])]


def options_of_row(
    logits: np.ndarray, options: Sequence[Sequence[int]]
) -> tuple[np.ndarray, float]:
    """Probabilities of some options, each spelled by one of several tokens, and their sum before scaling."""
    if not np.isfinite(logits).all():
        raise NumericError(DAMAGED)
    p = np.exp(logits.astype(np.float64) - float(logits.max()))
    each = np.array([p[list(ids)].sum() for ids in options])
    return each / each.sum(), float(each.sum() / p.sum())
