"""Attention probabilities for a tap that asks for them. Backends never hold them whole: they are computed anew.

A tap asks by an attribute: ``tap.attn_probs = True``. It then also sees ``blk.N.attn_probs``, float32
[H, T, S] of each sequence in turn, and what it returns in their place weighs the values. That is slow (keys and
values come to the host, and the matrix is whole), and meant for looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import ArgumentError
from ..kernels.backend import Array
from .step import Step

F32 = np.float32


@dataclass(frozen=True)
class Scoring:
    """How a layer turns products of queries and keys into scores, as ``Backend.attention`` does."""

    layer: int
    source: int  # the layer whose keys and values it reads
    n_head: int
    n_head_kv: int
    causal: bool
    scale: float
    window: int
    softcap: float
    slopes: Array | None
    sinks: Array | None


def asked(step: Step) -> bool:
    """Whether the user's tap wants probabilities."""
    return bool(getattr(step.user_tap, "attn_probs", False))


def attend(step: Step, s: Scoring, q: Array, k: Array, v: Array) -> Array:
    """Attention through probabilities that the tap has seen -> [T, H * Dv]; k and v are already stored."""
    out = []
    for here, keys, values, past in sequences(step, s, q, k, v):
        probs = probabilities(step, s, here, keys, past)
        tapped = step.be.numpy(step.tap(f"blk.{s.layer}.attn_probs", step.be.array(probs)))
        out.append(np.einsum("hts,shd->thd", tapped, values).reshape(len(here), -1))
    return step.be.array(np.concatenate(out))


def sequences(
    step: Step, s: Scoring, q: Array, k: Array, v: Array
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Each sequence's q [T, H, D], all of its k and v [S, H, .], and its number of earlier positions."""
    be, batch = step.be, step.batch
    rows, starts, n_past = (np.array(be.numpy(a)) for a in (q, batch.starts, batch.n_past))
    fresh = [np.array(be.numpy(a)) for a in (k, v)]
    for i, (start, stop) in enumerate(pairwise(starts)):
        here = rows[start:stop].reshape(stop - start, s.n_head, -1)
        past = int(n_past[i])
        if s.causal:
            stored = batch.caches[i].export(past + stop - start)
            both = [stored[f"{s.source}.{name}"] for name in "kv"]
        else:
            both = [a[start:stop].reshape(stop - start, s.n_head_kv, -1) for a in fresh]
        if both[0].dtype == np.uint8:
            raise ArgumentError("attention probabilities need kv_type 'f16' or 'f32', not 'q8_0'")
        each = s.n_head // s.n_head_kv
        keys, values = (np.repeat(a.astype(F32), each, axis=1) for a in both)
        yield here, keys, values, past


def probabilities(step: Step, s: Scoring, q: np.ndarray, k: np.ndarray, past: int) -> np.ndarray:
    """softmax of the scores: q [T, H, D], k [S, H, D] -> [H, T, S]."""
    distance = np.arange(past, past + len(q))[:, None] - np.arange(len(k))  # i - j
    hidden = distance < 0 if s.causal else np.zeros(distance.shape, bool)
    if s.window:
        here = np.arange(past, past + len(q))[:, None]
        reach = s.window if s.window > 0 else here % -s.window + 1
        hidden |= distance >= reach if s.causal else np.abs(distance) > s.window // 2
    scores = np.einsum("thd,shd->hts", q, k) * F32(s.scale)
    if s.softcap:
        scores = F32(s.softcap) * np.tanh(scores / F32(s.softcap))
    if s.slopes is not None:
        slopes = np.array(step.be.numpy(s.slopes))
        scores = scores - slopes[:, None, None] * np.abs(distance).astype(F32)
    scores = np.where(hidden, F32(-np.inf), scores)
    top = scores.max(-1, keepdims=True)
    sinks = None if s.sinks is None else np.array(step.be.numpy(s.sinks))[:, None, None]
    top = top if sinks is None else np.maximum(top, sinks)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
    return np.asarray(e / total, F32)
