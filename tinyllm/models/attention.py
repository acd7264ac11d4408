"""The standard mixer: softmax attention with grouped heads, in every variety but latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Array, HeadNorms, LayerCache, RopeSpec, Weight
from . import probe
from .config import Config, RopeScaling
from .mixer import Mixer, widened
from .probe import Scoring
from .rope import FARTHEST, alibi_slopes, attention_scale, buckets, frequencies, magnitude
from .step import Step
from .weights import Linear, Norm, Row, Tensors, products

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
        c = c.at(i)
        self.be, self.i, self.causal = w.be, i, c.causal
        self.n_head, self.n_head_kv = c.n_head[i], c.n_head_kv[i]
        check_has_heads(c, i)
        self.head_dim, self.head_dim_v = c.head_dim, c.head_dim_v
        self.source = source_of(c, i)
        self.q, self.k, self.v = self.projections(c, a, w)
        name = a.roles.get("attn_output", "attn_output")
        self.o = w.linear(name, c.n_embd, self.n_head * c.head_dim_v)
        self.q_norm = head_norm(w, "attn_q_norm", self.n_head, c.head_dim)
        self.k_norm = head_norm(w, "attn_k_norm", self.n_head_kv, c.head_dim)
        self.v_norm = Norm(w.be, c.norm, c.norm_eps, None, None, c.head_dim_v) if a.v_norm else None
        self.o_norm = w.norm_if("attn_sub_norm", self.n_head * c.head_dim_v)
        self.gate, self.gate_act = output_gate(c, i, w), a.gate_act
        needs_sinks = a.sinks == "all" or (a.sinks == "file" and any_like_it(c, i, w))
        self.sinks = w.array("attn_sinks.weight", self.n_head) if needs_sinks else None
        self.scale, self.clamp = attention_scale(c), c.attn_clamp
        self.softcap, self.window = c.attn_softcap, c.window[i]
        self.value_scale = c.attn_value_scale
        self.rope = make_rope(c, a, i, w) if a.position == "rope" and c.rope_on[i] else None
        self.temperature = Heating(c, w) if c.temperature and c.heated[i] else None
        self.bias = relative_bias(c, w, self.n_head) if a.position == "relative" else None
        self.slopes = None
        if c.max_alibi_bias:
            self.slopes = w.be.array(alibi_slopes(self.n_head, c.max_alibi_bias))

    @property
    def scoring(self) -> Scoring:
        """How the layer makes scores, for a tap that asks for probabilities."""
        return Scoring(
            self.i, self.source, self.n_head, self.n_head_kv, self.causal, self.scale, self.window,
            self.softcap, self.slopes, self.sinks, self.bias,
        )  # fmt: skip

    @property
    def cache(self) -> LayerCache:
        """What this layer keeps of the past."""
        if not self.causal or self.source != self.i:
            return LayerCache()
        return LayerCache(self.n_head_kv, self.head_dim, self.head_dim_v, window=abs(self.window))

    def __call__(self, step: Step, x: Array) -> Array:
        be, tap, at = self.be, step.tap, f"blk.{self.i}."
        q, k, v = self.projected(x)
        own = self.source == self.i
        q = tap(f"{at}q_proj", q)
        k = tap(f"{at}k_proj", k) if own else k
        if own and self.causal and self.rope is not None:
            queries, q = q, tap(f"{at}q", self.stored(step, self.rope, q, k, v))
            if step.asks(at, "k", "v"):
                self.rewrite(step, queries, k, v)
        else:
            q, k = self.place(step, *self.normed(q, k))
            q = tap(f"{at}q", q)
            k, v = (tap(f"{at}k", k), tap(f"{at}v", v)) if own else (k, v)
            if own and self.causal:
                be.cache_write(step.batch, self.i, k, v)
        y = self.attend(step, q, k, v)
        y = self.gated(x, tap(f"{at}attn_heads", y))
        y = y if self.value_scale == 1 else be.scale_softcap(y, self.value_scale)
        y = self.o_norm(y) if self.o_norm else y
        y, heads = self.o(y), y
        if not step.asks(at, "attn_result"):
            return y
        return probe.by_head(step, f"{at}attn_result", self.o, heads, self.n_head, y)

    def projections(
        self, c: Config, a: Arch, w: Tensors
    ) -> tuple[Linear, Linear | None, Linear | None]:
        """Matrices for q, k and v; None where k and v are an earlier layer's, or v is what makes k."""
        if self.source != self.i:
            w.pass_over("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
            return self.queries(c, w), None, None
        if a.values_from_keys and not c.window[self.i] and not any_values(c, w):
            return (
                self.queries(c, w),
                w.linear("attn_k", self.n_head_kv * c.head_dim, c.n_embd),
                None,
            )
        return projections(c, self.i, w, self.queries)

    def projected(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of x; where the layer has no keys of its own, queries stand for them."""
        be = self.be
        if self.k is None:
            q = self.q(x)
            return q, q, q
        linears = [p for p in (self.q, self.k, self.v) if p is not None]
        q, k, *rest = products(linears, x)
        v = rest[0] if rest else k
        if self.clamp:
            q, k, v = (be.clamp(y, self.clamp) for y in (q, k, v))
        return q, k, self.v_norm(v) if self.v_norm else v

    def queries(self, c: Config, w: Tensors) -> Linear:
        """The projection to queries, where it is a matrix of its own."""
        return w.linear("attn_q", self.n_head * c.head_dim, c.n_embd)

    def normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Normalise queries and keys, where the layer has norms for them."""
        return self.q_norm(q) if self.q_norm else q, self.k_norm(k) if self.k_norm else k

    def place(self, step: Step, q: Array, k: Array) -> tuple[Array, Array]:
        """Turn queries and keys to their positions."""
        if self.rope is not None:
            spec, positions = self.rope.at(step.n_ctx), step.batch.positions
            q = self.be.rope(q, positions, spec, self.head_dim)
            if self.source == self.i:
                k = self.be.rope(k, positions, spec, self.head_dim)
        return self.heated(step, q), k

    def heated(self, step: Step, q: Array) -> Array:
        """Queries times the temperature of their positions, where the layer has one."""
        return q if self.temperature is None else self.temperature(step, q)

    def stored(self, step: Step, rope: Rope, q: Array, k: Array, v: Array) -> Array:
        """Norm and turn queries and keys, and store keys and values; returns the queries."""
        norms = head_norms(self.q_norm, self.k_norm, self.head_dim)
        if norms is None:
            q, k = self.normed(q, k)
        spec = rope.at(step.n_ctx)
        q = self.be.rope_write(step.batch, self.i, q, k, v, spec, self.head_dim, norms)
        return self.heated(step, q)

    def rewrite(self, step: Step, q: Array, k: Array, v: Array) -> None:
        """Show what ``stored`` has kept of the projected k and v, and keep what a tap puts in their place."""
        at = f"blk.{self.i}."
        _, turned = self.place(step, *self.normed(q, k))
        keys, values = step.tap(f"{at}k", turned), step.tap(f"{at}v", v)
        if keys is not turned or values is not v:
            self.be.cache_write(step.batch, self.i, keys, values)

    def gated(self, x: Array, y: Array) -> Array:
        """Gate the heads' outputs y by the layer's input x: each value, or each head, or not at all."""
        if self.gate is None:
            return y
        gate = self.be.act(self.gate(x), self.gate_act)
        if gate.shape[1] != y.shape[1]:
            gate = widened(self.be, gate, self.n_head, self.head_dim_v)
        return self.be.mul(y, gate)

    def attend(self, step: Step, q: Array, k: Array, v: Array) -> Array:
        """q [T, H D], k [T, K D], v [T, K Dv] -> [T, H Dv]; causal models have stored k and v."""
        if self.causal:
            y = self.scores(step, q)
        else:
            y = self.be.attention_full(
                step.batch, q, k, v, self.n_head, self.n_head_kv,
                scale=self.scale, window=self.window, slopes=self.slopes,
                bias=self.bias,
            )  # fmt: skip
        if not step.asks(f"blk.{self.i}.", *probe.INSIDE):
            return y
        return probe.attend(step, self.scoring, q, k, v, y)

    def scores(self, step: Step, q: Array) -> Array:
        """Attention of q [T, H D] over what is stored."""
        return self.be.attention(
            step.batch, self.source, q, self.n_head, scale=self.scale, window=self.window,
            softcap=self.softcap, slopes=self.slopes, sinks=self.sinks, bias=self.bias,
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


class BareNormsBehindRope(NormsBehindRope):
    """The norms have no weights, and only layers that rotate have them (Llama 4).

    The largest of these models, with 128 experts, has none; its files do not say so.
    """

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        super().__init__(c, a, i, w)
        if self.rope is not None and c.n_expert != 128:
            norm = Norm(w.be, c.norm, c.norm_eps, None, None, c.head_dim)
            self.q_norm = self.k_norm = norm


class Heating:
    """Queries times a factor that grows with their position: [T, H D] -> [T, H D].

    The factors are rows of a table, which all layers of a device share.
    """

    def __init__(self, c: Config, w: Tensors) -> None:
        t = c.temperature
        assert t is not None
        self.be = w.be

        def table() -> Weight:
            positions = np.arange(c.n_ctx_train)
            growth = np.log(np.floor((positions + t.offset) / t.length) + 1)
            return w.be.load(Row("temperature", (1 + t.scale * growth)[:, None]))

        self.table: Weight = w.once("temperature", table)

    def __call__(self, step: Step, q: Array) -> Array:
        return self.be.mul(q, self.be.embed(self.table, step.batch.positions))


def relative_bias(c: Config, w: Tensors, n_head: int) -> Array:
    """The bias of each distance [H, 2 M + 1], by the layer's own table of buckets or by the first layer's."""
    most = (
        FARTHEST * 2 if not c.causal else FARTHEST * 2 - 1
    )  # half of one side's are below FARTHEST
    if not 4 <= c.n_bucket <= most:
        raise GGUFError(
            f"is {c.n_bucket or 'missing'}; expected a number from 4 to {most}",
            name=f"{c.arch}.attention.relative_buckets_count",
        )
    tables = w if w.has("attn_rel_b.weight") else w.root.below(f"{c.blocks_at}.0.")

    def spread() -> Array:
        rows = tables.host("attn_rel_b.weight", c.n_bucket, n_head)
        return w.be.array(np.ascontiguousarray(rows[buckets(c.n_bucket, not c.causal)].T))

    return w.once(f"{tables.prefix}attn_rel_b", spread)


def source_of(c: Config, i: int) -> int:
    """The layer whose keys and values layer i reads: its own, or the last one of its kind that has some."""
    first = c.n_layer - c.n_kv_shared
    if i < first:
        return i
    alike = [j for j in range(first) if bool(c.window[j]) == bool(c.window[i])]
    if not alike:
        raise GGUFError(
            f"is {c.n_kv_shared}, but no earlier layer has keys for layer {i}",
            name=f"{c.arch}.attention.shared_kv_layers",
        )
    return alike[-1]


def any_like_it(c: Config, i: int, w: Tensors) -> bool:
    """Whether a layer that has a window, or none, as layer i does, has a sink."""
    alike = (j for j in range(c.n_layer) if bool(c.window[j]) == bool(c.window[i]))
    return w.root.has(*(f"blk.{j}.attn_sinks.weight" for j in alike))


def any_values(c: Config, w: Tensors) -> bool:
    """Whether a layer without a window has a matrix for values."""
    full = (j for j in range(c.n_layer) if not c.window[j])
    return w.root.has(*(f"blk.{j}.attn_v.weight" for j in full))


def output_gate(c: Config, i: int, w: Tensors) -> Linear | None:
    """The gate of the heads' outputs, one value for each of theirs or one for each head."""
    if not w.has("attn_gate.weight"):
        return None
    n, d = w.source("attn_gate.weight").shape[0], c.head_dim_v
    per_head = n == c.n_head[i]
    return w.linear("attn_gate", c.n_head[i] * (1 if per_head else d), c.n_embd)


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
    root = w.root

    def spec(table: str) -> RopeSpec:
        table = "" if c.window[i] and not c.rope_scaling_swa else table
        widest = max(c.rope_dim, c.rope_dim_swa) // 2  # one table for layers of both kinds
        factors = factors_of(root, table, widest, c.rope_dim // 2)
        freqs = frequencies(c.rope_dim, base, scaling, factors)
        return RopeSpec(w.be.array(freqs), a.pairing, first, magnitude(scaling))

    if root.has("rope_factors_long.weight", "rope_factors_short.weight"):
        return Rope(
            spec("rope_factors_short.weight"),
            spec("rope_factors_long.weight"),
            c.rope_scaling.n_ctx_original,
        )
    return Rope(spec("rope_freqs.weight" if root.has("rope_freqs.weight") else ""), None, 0)


def factors_of(root: Tensors, table: str, n: int, used: int) -> np.ndarray | None:
    """The first ``used`` of a table of n divisors of the frequencies; they must be positive."""
    if not table:
        return None
    factors = root.host(table, n)[:used]
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise GGUFError("holds a factor that is not positive", name=table)
    return factors
