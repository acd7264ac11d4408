"""Embeddings and ranking scores of many sequences: sorted by length and packed into steps without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ContextOverflow, UnsupportedModel
from ..models.pooling import pool, unit

if TYPE_CHECKING:
    from ..models.network import Network


BeforeStep = Callable[[], object]  # called before each step of a long work; what it raises ends it


def no_matter() -> None:
    """A work that nothing ends before its time."""


def embed(
    net: Network,
    ids: Sequence[Sequence[int]],
    pooling: str | None,
    normalize: bool,
    before_step: BeforeStep = no_matter,
) -> list[np.ndarray]:
    """One embedding for each sequence of ids -> float32 [n_embd], or [len(ids), n_embd] with pooling "none"."""
    kind = (net.config.pooling or "mean") if pooling is None else pooling
    lengths = [len(sequence) for sequence in ids]
    check_lengths(lengths, net.config.n_ctx_train)
    out: list[np.ndarray] = [np.empty(0)] * len(ids)
    for group in pack(lengths, net.n_batch, net.rope_border):
        before_step()
        for i, rows in zip(group, net.hidden([ids[i] for i in group]), strict=True):
            x = net.decoder.pooled(pool(rows, kind))
            out[i] = unit(x) if normalize else x
    return out


def check_ranks(net: Network) -> None:
    """Raise UnsupportedModel unless the model has a ranking head with one score."""
    head = net.decoder.rank
    if head is None or head.n_label != 1:
        what = "no ranking head" if head is None else f"a head of {head.n_label} labels"
        raise UnsupportedModel(f"the model has {what}; load a reranker, or compare embeddings")


def rank(
    net: Network,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    before_step: BeforeStep = no_matter,
) -> np.ndarray:
    """The score of each pair of texts, given as (ids, token types) -> float32 [n]."""
    head = net.decoder.rank
    assert head is not None
    lengths = [len(ids) for ids, _ in pairs]
    check_lengths(lengths, net.config.n_ctx_train)
    scores = np.empty(len(pairs), np.float32)
    for group in pack(lengths, net.n_batch):
        before_step()
        ids, types = zip(*(pairs[i] for i in group), strict=True)
        for i, rows in zip(group, net.hidden(ids, types=types), strict=True):
            scores[i] = head(rows)[0]
    return scores


def check_lengths(lengths: Iterable[int], n_ctx_train: int) -> None:
    """Raise ContextOverflow for a sequence that is empty or longer than the model was trained for."""
    for n in lengths:
        if not 0 < n <= n_ctx_train:
            raise ContextOverflow(f"a text has {n} tokens; the model takes 1 to {n_ctx_train}")


def pack(lengths: Sequence[int], n_rows: int, border: int = 0) -> Iterator[list[int]]:
    """Group the indices of sequences of similar lengths, at most ``n_rows`` rows together.

    A sequence longer than ``n_rows`` is a group of its own. Those longer than ``border``, if it is not 0, are
    in other groups than the rest.
    """
    group: list[int] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        crosses = bool(group) and lengths[group[-1]] <= border < lengths[i]
        if group and (crosses or filled + lengths[i] > n_rows):
            yield group
            group, filled = [], 0
        group.append(i)
        filled += lengths[i]
    if group:
        yield group
