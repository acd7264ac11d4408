"""Perplexity of a text, scored as llama.cpp's tool does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..engine.scoring import losses_of
from ..errors import ArgumentError
from ..model import Model


@dataclass(frozen=True)
class Perplexity:
    """The result; ``error`` is the standard error of ``value``."""

    value: float
    error: float
    n_windows: int
    n_scored: int


Progress = Callable[[Iterable[int], int], Iterable[int]]


def perplexity(
    model: Model,
    ids: list[int],
    window: int = 512,
    n_windows: int | None = None,
    progress: Progress = lambda starts, n: starts,
) -> Perplexity:
    """How surprised the model is by a text, e to the mean negative log probability of its tokens.

    The text is cut into windows; each begins with the BOS token, where the vocabulary has one, in place of
    its own first token, and the tokens of its second half are scored.

    Parameters
    ----------
    model : Model
        A decoder.
    ids : list of int
        The whole text, special tokens added.
    window : int
        Tokens per window; at least 4.
    n_windows : int, optional
        At most so many windows from the beginning.
    progress : callable, optional
        Wraps the iteration over windows.

    Raises
    ------
    ArgumentError
        The text does not fill one window, or the window is too short.
    """
    if n_windows is not None and n_windows < 1:
        raise ArgumentError(f"n_windows={n_windows}; expected at least 1, or leave it out for all")
    n = len(ids) // window if window >= 4 else 0
    if n == 0:
        raise ArgumentError(
            f"the text has {len(ids)} tokens; a window of {window} needs as many, and at least 4"
        )
    starts = [i * window for i in range(min(n, n_windows or n))]
    if len(starts) * scored(window) < 2:
        raise ArgumentError(
            "one token alone would be scored; give a larger window, or more of them"
        )
    bos = model.tokenizer.bos if model.tokenizer.add_bos else None
    losses = []
    for start in progress(starts, len(starts)):
        part = list(ids[start : start + window])
        if bos is not None:
            part[0] = bos
        losses.append(window_losses(model, part))
    loss = np.concatenate(losses)
    value = math.exp(loss.mean())
    error = value * loss.std(ddof=1) / math.sqrt(len(loss))
    return Perplexity(value, float(error), len(starts), len(loss))


def scored(window: int) -> int:
    """How many tokens of a window are scored: those of its second half but the first."""
    return window - window // 2 - 1


def window_losses(model: Model, ids: list[int]) -> np.ndarray:
    """Negative log probabilities, float64, of the tokens of the second half but its first."""
    half = len(ids) // 2
    state = model.new_state(len(ids))
    state.append(ids[:half])
    while left := half - state.n_past:
        model.network.forward([(state, min(left, model.network.n_batch), "none")])
    logits = model.logits(ids[half:-1], state)
    return losses_of(logits, np.array(ids[half + 1 :]))
