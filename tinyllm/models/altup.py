"""Gemma 3n: several streams of activations of which each layer computes one (AltUp), a low-rank way around
attention (LAuReL), and a feed-forward half of which few values act.

AltUp arXiv:2301.13310; LAuReL arXiv:2411.07501; hf.co/google/gemma-3n-E2B-it. The active stream is the first:
it is what blocks are given and return; the others are in ``step.carried``.
"""

from __future__ import annotations

from math import isfinite, sqrt
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedModel
from ..kernels.backend import Array, Backend
from .config import Config
from .decoder import Block, normed
from .ffn import FFN
from .step import Step
from .weights import Linear, Part, Row, Tensors, products

if TYPE_CHECKING:
    from .archs import Arch


def names(c: Config) -> list[str]:
    """What the streams behind the first are called in ``step.carried``."""
    if c.altup_active:
        raise UnsupportedModel(f"{c.arch}.altup.active_idx is {c.altup_active}; we know 0")
    return [f"stream{k}" for k in range(1, c.n_stream)]


class Magnitude:
    """The root of the mean square of a row, and rows of the same magnitude."""

    def __init__(self, be: Backend, n: int) -> None:
        self.be = be
        self.mean = be.load(Row("mean", np.full((1, n), 1 / n, np.float32)))

    def of(self, x: Array) -> Array:
        """x [T, n] -> [T, 1]."""
        be = self.be
        return be.matmul(self.mean, be.mul(x, be.rms_norm(x, None, 1e-30)))

    def like(self, x: Array, y: Array) -> Array:
        """y [T, n] with the magnitude of x."""
        return self.be.mul(self.be.rms_norm(y, None, 1e-30), self.of(x))


class Streams:
    """The other streams are made of the embedding, and all become one before the last norm."""

    def __init__(self, c: Config, first: Tensors, last: Tensors) -> None:
        self.names = names(c)
        self.spread = matrices(first, "altup_proj.weight", len(self.names), c.n_embd)
        self.gather = matrices(last, "altup_unembd_proj.weight", len(self.names), c.n_embd)
        self.first, self.last = Magnitude(first.be, c.n_embd), Magnitude(last.be, c.n_embd)
        self.be, self.share = last.be, 1 / c.n_stream

    def begin(self, step: Step, x: Array) -> Array:
        for name, matrix in zip(self.names, self.spread, strict=True):
            step.carried[name] = self.first.like(x, matrix(x))
        return x

    def end(self, step: Step, x: Array) -> Array:
        others = zip(self.names, self.gather, strict=True)
        made = [self.last.like(x, matrix(step.carried[name])) for name, matrix in others]
        return self.be.scale_softcap(self.be.add(x, *made), self.share)


def matrices(w: Tensors, name: str, n: int, n_embd: int) -> list[Linear]:
    """The matrices of a stack [n, E, E], each by itself."""
    whole = w.source(name, n, n_embd, n_embd)
    rows = np.arange(n * n_embd).reshape(n, n_embd)
    parts = (Part(whole, (n_embd, n_embd), r) for r in rows)
    return [Linear(w.be, w.be.load(p), None) for p in parts]


class SparseFFN(FFN):
    """Only those values of the gate act that lie so far above its mean. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        n = c.n_ff[i]
        super().__init__(c, a, w, n)
        self.cutoff = None
        deviations = c.sparsity[i] if c.sparsity else -np.inf
        if isfinite(deviations):
            cut = np.full(n, -deviations, np.float32)
            self.cutoff, self.magnitude = w.be.array(cut), Magnitude(w.be, n)
            self.mean = w.be.load(Row("mean", np.full((1, n), 1 / n, np.float32)))

    def __call__(self, step: Step, x: Array) -> Array:
        if self.cutoff is None or self.gate is None:
            return super().__call__(step, x)
        be = self.be
        both = self.gate, self.up
        gate, up = products(both, x)
        unit = be.layer_norm(gate, None, 1e-30)
        deviation = be.matmul(self.mean, be.mul(gate, unit))
        gate = be.mul(be.act(be.add(unit, self.cutoff), "relu"), deviation)
        return self.down(step.tap(self.point, be.act_mul(gate, up, self.act)))


class AltUpBlock(Block):
    """Predict all streams, compute the first, correct all by what came of it."""

    carries = True

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        super().__init__(c, a, i, w)
        n, e = c.n_stream, c.n_embd
        self.names = names(c)
        rank = w.source("laurel_l.weight").shape[0]
        self.left, self.right = w.linear("laurel_l", rank, e), w.linear("laurel_r", e, rank)
        self.laurel_norm = w.norm("laurel_post_norm", e)
        self.router, self.router_norm = (
            w.linear("altup_router", n, e),
            w.norm("altup_router_norm", e),
        )
        self.predict = [
            w.linear("altup_predict_coef", n * n, n, slice(j * n, (j + 1) * n)) for j in range(n)
        ]
        self.correct = [w.linear("altup_correct_coef", n, n, slice(j, j + 1)) for j in range(n)]
        self.correct_scale = w.array("altup_correct_scale.weight", e)
        self.narrow = 1 / e

    def __call__(self, step: Step, x: Array) -> Array:
        be, tap, i = self.be, step.tap, self.i
        predicted = self.predicted(x, [step.carried[name] for name in self.names])
        active = predicted[0]
        assert self.attn_norm is not None
        h = tap(f"blk.{i}.attn_norm", normed(step, f"blk.{i}.attn_norm", self.attn_norm, active))
        around = be.add(self.laurel_norm(self.right(self.left(h))), h)
        y = tap(f"blk.{i}.attn_out", self.mixer(step, h))
        y = tap(f"blk.{i}.attn_post", self.attn_post(y)) if self.attn_post else y
        y = tap(f"blk.{i}.resid_mid", be.scale_softcap(be.add(y, active, around), sqrt(0.5)))
        f = self.feed(step, self.normed(step, y))
        y = be.add(y, tap(f"blk.{i}.ffn_post", self.ffn_post(f)) if self.ffn_post else f)
        return tap(f"blk.{i}.out", self.corrected(step, predicted, y))

    def modalities(self, x: Array) -> Array:
        """How much of each stream's kind a row is -> [T, n]."""
        be = self.be
        return be.act(self.router(be.scale_softcap(self.router_norm(x), self.narrow)), "tanh")

    def predicted(self, x: Array, others: list[Array]) -> list[Array]:
        """Each stream and a mixture of all of them."""
        kinds, streams = self.modalities(x), [x, *others]
        stacked = self.be.stacked(streams)
        return [
            self.be.add(s, self.be.combine(stacked, mix(kinds)))
            for s, mix in zip(streams, self.predict, strict=True)
        ]

    def corrected(self, step: Step, predicted: list[Array], y: Array) -> Array:
        """Move each stream by its share of what the first one's prediction lacked."""
        be = self.be
        kinds, new = self.modalities(y), be.add(y, predicted[0], scale=-1.0)
        first, *others = (
            be.add(p, new, be.mul(new, share(kinds)))
            for p, share in zip(predicted, self.correct, strict=True)
        )
        assert self.per_layer is not None
        extra = self.per_layer(step, be.mul(first, self.correct_scale))
        extra = step.tap(f"blk.{self.i}.per_layer", extra)
        for name, other in zip(self.names, others, strict=True):
            step.carried[name] = be.add(other, extra)
        return first
