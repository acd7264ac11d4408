"""Points that no kernel has values of: what they show is computed beside the pass, which goes on as without.

Attention scores and probabilities, results of single heads, scales of norms, weights of experts, recurrent
states. What a tap returns in the place of one changes the pass by what it changes of the values shown; a tap
that changes nothing leaves every bit. Some are slow (keys and values come to the host, the matrix of scores is
whole), and meant for looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import ArgumentError
from ..kernels.backend import Array
from .step import Step
from .weights import Linear, Norm

F32 = np.float32
INSIDE = "attn_scores", "attn_probs"  # points within attention, shown for each sequence in turn


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
    bias: Array | None


def attend(step: Step, s: Scoring, q: Array, k: Array, v: Array, y: Array) -> Array:
    """Show scores and probabilities [H, T, S] of an attention with the result y; k and v are stored already.

    Returns y [T, H * Dv], in which the values of a sequence are weighed anew where the tap changed its scores
    or probabilities.
    """
    at, be = f"blk.{s.layer}.", step.be
    out, start, changed = np.array(be.numpy(y)), 0, False
    for here, keys, values, past in sequences(step, s, q, k, v):
        scores = scores_of(step, s, here, keys, past)
        others = show_if_asked(step, f"{at}attn_scores", scores)
        probs = softmax(step, s, scores if others is None else others)
        weights = show_if_asked(step, f"{at}attn_probs", probs)
        if others is not None or weights is not None:
            changed = True
            heads = np.einsum("hts,shd->thd", probs if weights is None else weights, values)
            out[start : start + len(here)] = heads.reshape(len(here), -1)
        start += len(here)
    return be.array(out) if changed else y


def show_if_asked(step: Step, name: str, values: np.ndarray) -> np.ndarray | None:
    """Values that a tap has put in the place of these; None where it changed nothing."""
    return step.show(name, values) if step.asks("", name) else None


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


def scores_of(step: Step, s: Scoring, q: np.ndarray, k: np.ndarray, past: int) -> np.ndarray:
    """What the softmax takes of q [T, H, D] and k [S, H, D] -> [H, T, S]; -inf where nothing is seen."""
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
    if s.bias is not None:
        bias = np.array(step.be.numpy(s.bias))
        most = bias.shape[1] // 2
        scores = scores + bias[:, np.clip(-distance, -most, most) + most]
    return np.asarray(np.where(hidden, F32(-np.inf), scores))


def softmax(step: Step, s: Scoring, scores: np.ndarray) -> np.ndarray:
    """Probabilities of scores [H, T, S]; sinks take a share of them."""
    top = scores.max(-1, keepdims=True)
    sinks = None if s.sinks is None else np.array(step.be.numpy(s.sinks))[:, None, None]
    top = top if sinks is None else np.maximum(top, sinks)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
    return np.asarray(e / total, F32)


def by_head(step: Step, name: str, o: Linear, y: Array, n_head: int, out: Array) -> Array:
    """Attention's output ``out`` [T, E] of what the heads read, y, with each head's part shown as [T, H, E].

    The parts are products of rows in which all other heads are 0, by the matrix as it is stored and the
    adapters beside it.
    """
    be, rows = step.be, np.array(step.be.numpy(y))
    alone = np.zeros((len(rows), n_head, n_head, rows.shape[1] // n_head), F32)
    each = np.arange(n_head)
    alone[:, each, each] = rows.reshape(len(rows), n_head, -1)
    x = be.array(alone.reshape(len(rows) * n_head, -1))
    parts = be.matmul(o.weight, x)
    if o.beside is not None and not o.beside.idle:
        parts = o.beside.added(parts, x, n_head)
    shown = np.array(be.numpy(parts)).reshape(len(rows), n_head, -1)
    changed = step.show(name, shown)
    return out if changed is None else be.add(out, be.array((changed - shown).sum(1)))


def rescaled(step: Step, name: str, norm: Norm, x: Array, y: Array) -> Array:
    """y = norm(x), with the magnitude [T, 1] that it divided each row by shown as ``name`` + "_scale"."""
    be, rows = step.be, np.array(step.be.numpy(x))
    if norm.kind != "rms":
        rows = rows - rows.mean(-1, keepdims=True)
    scale = np.sqrt((rows * rows).mean(-1, keepdims=True) + F32(norm.eps))
    changed = step.show(f"{name}_scale", scale)
    if changed is None:
        return y
    bias = 0 if norm.bias is None else np.array(be.numpy(norm.bias))
    return be.array((np.array(be.numpy(y)) - bias) * (scale / changed) + bias)


def routed(step: Step, name: str, experts: Array, weights: Array, n: int) -> tuple[Array, Array]:
    """The chosen experts and their weights, shown as one row of ``n`` weights for each token: [T, n].

    Raises ArgumentError where a tap gives a row more experts than the model chooses.
    """
    be = step.be
    chosen, given = np.array(be.numpy(experts)), np.array(be.numpy(weights))
    rows, k = np.arange(len(chosen))[:, None], chosen.shape[1]
    dense = np.zeros((len(chosen), n), F32)
    dense[rows, chosen] = given
    changed = step.show(name, dense)
    if changed is None:
        return experts, weights
    if (most := np.count_nonzero(changed, axis=1).max(initial=0)) > k:
        raise ArgumentError(f"{name}: a row has {most} experts; the model runs {k} of them")
    for t in np.flatnonzero((changed != dense).any(1)):
        chosen[t] = np.argsort(-np.abs(changed[t]), kind="stable")[:k]
    return be.array(chosen), be.array(changed[rows, chosen])


def state(step: Step, layer: int, name: str, y: Array) -> None:
    """Show what a recurrent layer has kept after these rows, [sequences, ...]; y is what they became of it."""
    point = f"blk.{layer}.state"
    if not step.asks("", point):
        return
    step.be.numpy(y)  # what writes the states has run
    key, caches = f"{layer}.{name}", step.batch.caches
    shown = np.stack([np.array(c.export(0)[key], F32) for c in caches])
    changed = step.show(point, shown)
    if changed is None:
        return
    starts, past = (np.array(step.be.numpy(a)) for a in (step.batch.starts, step.batch.n_past))
    for cache, end, value in zip(caches, past + np.diff(starts), changed, strict=True):
        cache.restore(cache.export(int(end)) | {key: value})
