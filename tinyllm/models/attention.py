"""The standard mixer: softmax attention with grouped heads, in every variety but latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Array, HeadNorms, LayerCache, RopeSpec
from . import probe
from .config import Config, RopeScaling
from .mixer import Mixer
from .probe import Scoring
from .rope import alibi_slopes, attention_scale, frequencies, magnitude
from .step import Step
from .weights import Linear, Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


@dataclass(frozen=True)
class Rope:
    """A layer's rotation: for LongRoPE, one below and one above the originally trained length."""

    short: RopeSpec
    long: RopeSpec | None
    n_ctx_original: int

    def at(self, n_ctx: int) -> RopeSpec:
        """The rotation of a state with room for ``n_ctx`` positions."""
        return self.long if self.long is not None and n_ctx > self.n_ctx_original else self.short


class Attention(Mixer):
    """Project to q, k, v; normalise, rotate; attend over the past; project back. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be, self.i, self.causal = w.be, i, c.causal
        self.n_head, self.n_head_kv = c.n_head[i], c.n_head_kv[i]
        check_has_heads(c, i)
        self.head_dim, self.head_dim_v = c.head_dim, c.head_dim_v
        self.q, self.k, self.v = projections(c, i, w, self.queries)
        self.o = w.linear("attn_output", c.n_embd, self.n_head * c.head_dim_v)
        self.q_norm = head_norm(w, "attn_q_norm", self.n_head, c.head_dim)
        self.k_norm = head_norm(w, "attn_k_norm", self.n_head_kv, c.head_dim)
        self.o_norm = w.norm_if("attn_sub_norm", self.n_head * c.head_dim_v)
        self.sinks = w.optional("attn_sinks.weight", self.n_head)
        self.scale, self.clamp = attention_scale(c), c.attn_clamp
        self.softcap, self.window = c.attn_softcap, c.window[i]
        self.rope = make_rope(c, a, i, w) if a.position == "rope" and c.rope_on[i] else None
        self.slopes = None
        if c.max_alibi_bias:
            self.slopes = w.be.array(alibi_slopes(self.n_head, c.max_alibi_bias))

    @property
    def scoring(self) -> Scoring:
        """How the layer makes scores, for a tap that asks for probabilities."""
        return Scoring(
            self.i, self.n_head, self.n_head_kv, self.causal, self.scale, self.window,
            self.softcap, self.slopes, self.sinks,
        )  # fmt: skip

    @property
    def cache(self) -> LayerCache:
        """What this layer keeps of the past."""
        if not self.causal:
            return LayerCache()
        return LayerCache(self.n_head_kv, self.head_dim, self.head_dim_v, window=self.window)

    def __call__(self, step: Step, x: Array) -> Array:
        be, tap = self.be, step.tap
        linears = (self.q, self.k, self.v)
        q, k, v = be.matmuls([p.weight for p in linears], x, [p.bias for p in linears])
        if self.clamp:
            q, k, v = (be.clamp(y, self.clamp) for y in (q, k, v))
        if self.rope is not None and self.causal and step.user_tap is None:
            y = self.scores(step, self.stored(step, self.rope, q, k, v))
        else:
            q, k = self.place(step, *self.normed(q, k))
            q, k, v = (tap(f"blk.{self.i}.{n}", y) for n, y in (("q", q), ("k", k), ("v", v)))
            y = tap(f"blk.{self.i}.attn_heads", self.attend(step, q, k, v))
        y = self.gated(x, y)
        return self.o(self.o_norm(y) if self.o_norm else y)

    def queries(self, c: Config, w: Tensors) -> Linear:
        """The projection to queries, where it is a matrix of its own."""
        return w.linear("attn_q", self.n_head * c.head_dim, c.n_embd)

    def normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Normalise queries and keys, where the layer has norms for them."""
        return self.q_norm(q) if self.q_norm else q, self.k_norm(k) if self.k_norm else k

    def place(self, step: Step, q: Array, k: Array) -> tuple[Array, Array]:
        """Turn queries and keys to their positions."""
        if self.rope is None:
            return q, k
        spec, positions = self.rope.at(step.n_ctx), step.batch.positions
        q = self.be.rope(q, positions, spec, self.head_dim)
        return q, self.be.rope(k, positions, spec, self.head_dim)

    def stored(self, step: Step, rope: Rope, q: Array, k: Array, v: Array) -> Array:
        """Norm and turn queries and keys, and store keys and values; returns the queries."""
        norms = head_norms(self.q_norm, self.k_norm, self.head_dim)
        if norms is None:
            q, k = self.normed(q, k)
        spec = rope.at(step.n_ctx)
        return self.be.rope_write(step.batch, self.i, q, k, v, spec, self.head_dim, norms)

    def gated(self, x: Array, y: Array) -> Array:
        """Gate the heads' outputs y by the layer's input x; plain attention lets all pass."""
        return y

    def attend(self, step: Step, q: Array, k: Array, v: Array) -> Array:
        """q [T, H D], k [T, K D], v [T, K Dv] -> [T, H Dv]; causal models store k and v first."""
        batch = step.batch
        if self.causal:
            self.be.cache_write(batch, self.i, k, v)
        if probe.asked(step):
            return probe.attend(step, self.scoring, q, k, v)
        if not self.causal:
            return self.be.attention_full(
                batch, q, k, v, self.n_head, self.n_head_kv,
                scale=self.scale, window=self.window, slopes=self.slopes,
            )  # fmt: skip
        return self.scores(step, q)

    def scores(self, step: Step, q: Array) -> Array:
        """Attention of q [T, H D] over what is stored."""
        return self.be.attention(
            step.batch, self.i, q, self.n_head, scale=self.scale, window=self.window,
            softcap=self.softcap, slopes=self.slopes, sinks=self.sinks,
        )  # fmt: skip


class NormsBehindRope(Attention):
    """Attention that turns queries and keys before it normalises them (Hunyuan)."""

    can_shift = False  # what is stored is no longer a rotation

    def normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        return q, k

    def place(self, step: Step, q: Array, k: Array) -> tuple[Array, Array]:
        return super().normed(*super().place(step, q, k))

    def stored(self, step: Step, rope: Rope, q: Array, k: Array, v: Array) -> Array:
        q, k = self.place(step, q, k)
        self.be.cache_write(step.batch, self.i, k, v)
        return q


def check_has_heads(c: Config, i: int) -> None:
    """Raise GGUFError unless an attention layer has heads, and they have values."""
    for key, n in (
        ("head_count", c.n_head[i]),
        ("head_count_kv", c.n_head_kv[i]),
        ("key_length", c.head_dim),
    ):
        if not n:
            raise GGUFError(
                f"is 0 in layer {i}, which has attention", name=f"{c.arch}.attention.{key}"
            )


def projections(
    c: Config, i: int, w: Tensors, queries: Callable[[Config, Tensors], Linear]
) -> tuple[Linear, Linear, Linear]:
    """q, k and v as three matrices, also where the file stores them as one; biases all or none."""
    n_q, n_k = c.n_head[i] * c.head_dim, c.n_head_kv[i] * c.head_dim
    n_v, e = c.n_head_kv[i] * c.head_dim_v, c.n_embd
    if w.has("attn_qkv.weight"):
        cuts = (slice(0, n_q), slice(n_q, n_q + n_k), slice(n_q + n_k, n_q + n_k + n_v))
        q, k, v = (w.linear("attn_qkv", n_q + n_k + n_v, e, rows) for rows in cuts)
        return q, k, v
    parts = queries(c, w), w.linear("attn_k", n_k, e), w.linear("attn_v", n_v, e)
    if len({p.bias is None for p in parts}) > 1:
        missing = next(n for n in "qkv" if not w.has(f"attn_{n}.bias"))
        raise GGUFError(
            "tensor is missing; q, k and v have biases all or none",
            name=f"{w.prefix}attn_{missing}.bias",
        )
    return parts


def head_norm(w: Tensors, name: str, n_head: int, head_dim: int) -> Norm | None:
    """A norm of queries or keys: its weight's shape says over what.

    [D]: each head, one weight for all; [H, D]: each head, its own; [H * D]: the whole projection.
    """
    if not w.has(f"{name}.weight"):
        return None
    weight = w.host(f"{name}.weight")
    if weight.size not in (head_dim, n_head * head_dim):
        raise GGUFError(
            f"has shape {weight.shape}; expected {head_dim}, or {n_head} x {head_dim} values",
            name=f"{w.prefix}{name}.weight",
        )
    whole = weight.ndim == 1 and weight.size != head_dim
    bias = w.optional(f"{name}.bias", *weight.shape)
    flat = w.be.array(weight.reshape(-1))
    return Norm(w.be, w.c.norm, w.c.norm_eps, flat, bias, 0 if whole else head_dim)


def head_norms(q: Norm | None, k: Norm | None, head_dim: int) -> HeadNorms | None:
    """Norms that ``rope_write`` can do along the way: RMS of each head, with one weight for all."""
    if q is None or k is None:
        return None
    for norm in (q, k):
        alike = norm.kind == "rms" and norm.bias is None and norm.group == head_dim
        if not alike or norm.weight is None or norm.weight.shape != (head_dim,):
            return None
    return HeadNorms(q.weight, k.weight, q.eps) if q.eps == k.eps else None


def make_rope(c: Config, a: Arch, i: int, w: Tensors, first: int = 0) -> Rope:
    """The rotation of layer i: its base, its scaling, and the file's table of factors, if any."""
    if not c.rope_dim:
        raise GGUFError(
            "is 0, yet this architecture rotates", name=f"{c.arch}.rope.dimension_count"
        )
    local = bool(c.window[i]) and c.rope_freq_base_swa > 0
    base = c.rope_freq_base_swa if local else c.rope_freq_base
    scaling = RopeScaling() if c.window[i] and not c.rope_scaling_swa else c.rope_scaling
    root = Tensors(w.tensors, w.be, c, "", w.taken)

    def spec(table: str) -> RopeSpec:
        factors = factors_of(root, table, c.rope_dim // 2)
        freqs = frequencies(c.rope_dim, base, scaling, factors)
        return RopeSpec(w.be.array(freqs), a.pairing, first, magnitude(scaling))

    if root.has("rope_factors_long.weight", "rope_factors_short.weight"):
        return Rope(
            spec("rope_factors_short.weight"),
            spec("rope_factors_long.weight"),
            c.rope_scaling.n_ctx_original,
        )
    return Rope(spec("rope_freqs.weight" if root.has("rope_freqs.weight") else ""), None, 0)


def factors_of(root: Tensors, table: str, n: int) -> np.ndarray | None:
    """A table of divisors of the frequencies; they must be positive."""
    if not table:
        return None
    factors = root.host(table, n)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise GGUFError("holds a factor that is not positive", name=table)
    return factors
