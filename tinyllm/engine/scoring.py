"""How likely a model finds texts, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import NumericError
from .embedding import pack
from .generate import DAMAGED

if TYPE_CHECKING:
    from ..models.network import Network
    from ..models.state import State

SLICE = 64  # rows of logits that are worked on at a time, which large vocabularies make wide


def losses_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits [n, V]) at targets [n] -> float64 [n]."""
    largest = logits.max(axis=1, keepdims=True)
    total: np.ndarray = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets] - largest[:, 0]
    return np.asarray(np.log(total) - chosen)


def logprobs(net: Network, texts: Sequence[Sequence[int]], n_ctx: int) -> list[np.ndarray]:
    """The natural logarithm of each token's probability behind those before it.

    Parameters
    ----------
    net : Network
        A decoder.
    texts : sequence of ids
        Each has 1 to ``n_ctx`` tokens; they are read side by side.
    n_ctx : int
        Room for a text; one number for all, as some models rotate keys by it.

    Returns
    -------
    list of float64 [len(ids) - 1]
        The first token of a text has none before it.

    Raises
    ------
    NumericError
        A logit is NaN or infinite.
    """
    net.check_ids(texts)
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    for group in pack([len(ids) for ids in texts], net.n_batch):
        states = [net.new_state(n_ctx) for _ in group]
        for state, i in zip(states, group, strict=True):
            state.append(texts[i])
        parts: list[list[np.ndarray]] = [[] for _ in group]
        for work in read(net, states):
            for part, (state, n, logits) in zip(parts, work, strict=True):
                first = state.n_past - n
                targets = np.array(state.ids[first + 1 : first + n + 1])
                part.append(-losses(logits[: len(targets)], targets))
        for i, part in zip(group, parts, strict=True):
            found[i] = np.concatenate(part)
    return found


def read(net: Network, states: Sequence[State]) -> Iterator[list[tuple[State, int, np.ndarray]]]:
    """Read all states to their ends; of each step the states, their rows, and logits [rows, V]."""
    n_batch = net.n_batch  # one text longer than this is alone, and read in pieces
    while pending := len(states[0].ids) - states[0].n_past:
        counts = [min(n_batch, pending)] if len(states) == 1 else [len(s.ids) for s in states]
        with net.lock:
            rows = net.forward([(s, n, "all") for s, n in zip(states, counts, strict=True)])
            yield list(zip(states, counts, rows, strict=True))


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``losses_of``, some rows at a time; NumericError for logits that are no numbers."""
    found = []
    for start in range(0, len(targets), SLICE):
        part = logits[start : start + SLICE]
        if not np.isfinite(part).all():
            raise NumericError(DAMAGED)
        found.append(losses_of(part, targets[start : start + SLICE]))
    return np.concatenate(found) if found else np.empty(0)
