"""The feed-forward half of a block: plain, gated, or a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Array, Backend, LayerCache, Routing
from . import probe
from .config import Config
from .mixer import Mixer
from .step import Step
from .weights import Linear, Norm, Row, Tensors

if TYPE_CHECKING:
    from .archs import Arch


LEAST_SILU = 0.2785


class FFN:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate. [T, E] -> [T, E]."""

    def __init__(
        self, c: Config, a: Arch, w: Tensors, n_ff: int, suffix: str = "", limit: float = 0.0
    ) -> None:
        self.be, self.act, self.limit = w.be, a.act, Limit(w.be, limit, n_ff) if limit else None
        self.gate, self.up = halves(a, w, n_ff, c.n_embd, suffix)
        self.down = w.linear(f"ffn_down{suffix}", c.n_embd, n_ff)
        self.norm = w.norm_if("ffn_sub_norm", n_ff)  # BitNet's, of what goes into down
        self.point = f"{w.at}ffn_act{suffix}"

    def __call__(self, step: Step, x: Array) -> Array:
        if self.norm is not None:
            return self.down(self.norm(step.tap(self.point, self.hidden(x))))
        plain = all(p.plain for p in (self.gate, self.up) if p is not None)
        if self.limit is not None or not plain:
            return self.down(step.tap(self.point, self.hidden(x)))
        if self.gate is None:
            hidden = self.be.matmul_act(self.up.weight, x, self.up.bias, self.act)
            return self.down(step.tap(self.point, hidden))
        both = self.gate, self.up
        ws, biases = [p.weight for p in both], [p.bias for p in both]
        return self.down(step.tap(self.point, self.be.matmul_gated(ws, x, biases, self.act)))

    def hidden(self, x: Array) -> Array:
        """What goes into down."""
        up = self.up(x)
        if self.limit is not None and self.gate is not None:
            return self.limit(self.be.act(self.gate(x), self.act), up)
        return (
            self.be.act(up, self.act)
            if self.gate is None
            else self.be.act_mul(self.gate(x), up, self.act)
        )


class Limit:
    """Keep an activated gate below a bound and what it multiplies within it: [.., n] twice -> [.., n]."""

    def __init__(self, be: Backend, bound: float, n: int) -> None:
        self.be, self.bound = be, bound
        # silu is never below -0.28, so that a wider bound may count both ways
        self.top = None if bound > LEAST_SILU else be.array(np.full(n, bound, np.float32))

    def __call__(self, gate: Array, up: Array) -> Array:
        be = self.be
        if self.top is None:
            gate = be.clamp(gate, self.bound)
        else:
            above = be.act(be.add(gate, self.top, scale=-1.0), "relu")
            gate = be.add(gate, above, scale=-1.0)
        return be.mul(gate, be.clamp(up, self.bound))


class FeedForwardAlone(Mixer):
    """A feed-forward half, experts or not, that is a layer of its own (Nemotron-H). [T, E] -> [T, E]."""

    cache = LayerCache()

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        routed = w.has(*(f"ffn_{n}.weight" for n in ("gate_inp", "up_exps", "down_exps")))
        n_ff = 0 if routed else w.source("ffn_down.weight").shape[1]
        self.half = MoE(c, a, w) if routed else FFN(c, a, w, n_ff)

    def __call__(self, step: Step, x: Array) -> Array:
        return self.half(step, x)


class XIELU:
    """down(act(up(x))) with an activation that is quadratic above 0 and exponential below; each layer has
    its own coefficients. arXiv:2411.13010. [T, E] -> [T, E].
    """

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be = w.be
        if len(c.xielu) != c.n_layer:
            raise GGUFError("required key is missing", name="xielu.alpha_p")
        self.positive, self.negative, self.linear = c.xielu[i]
        self.up = w.linear("ffn_up", c.n_ff[i], c.n_embd)
        self.down = w.linear("ffn_down", c.n_embd, c.n_ff[i])
        self.minus_one = w.be.array(np.full(c.n_ff[i], -1, np.float32))
        self.point = f"{w.at}ffn_act"

    def __call__(self, step: Step, x: Array) -> Array:
        return self.down(step.tap(self.point, self.activated(self.up(x))))

    def activated(self, x: Array) -> Array:
        """p max(x, 0)^2 + q (e^m - 1 - m) + b x, with m = min(x, 0)."""
        be = self.be
        m = be.scale_softcap(be.act(be.scale_softcap(x, -1.0), "relu"), -1.0)
        below = be.add(be.add(be.act(m, "exp"), m, scale=-1.0), self.minus_one)
        y = be.add(be.scale_softcap(x, self.linear), be.act(x, "relu2"), scale=self.positive)
        return be.add(y, below, scale=self.negative)


def halves(
    a: Arch, w: Tensors, n_ff: int, n_embd: int, suffix: str
) -> tuple[Linear | None, Linear]:
    """The gate and the up projection; a file may store both as one ``ffn_up``, gate first."""
    up = f"ffn_up{suffix}"
    if not a.gated:
        return None, w.linear(up, n_ff, n_embd)
    if not w.has(f"ffn_gate{suffix}.weight") and w.source(f"{up}.weight").shape[0] == 2 * n_ff:
        cuts = slice(0, n_ff), slice(n_ff, 2 * n_ff)
        gate, rest = (w.linear(up, 2 * n_ff, n_embd, rows) for rows in cuts)
        return gate, rest
    return w.linear(f"ffn_gate{suffix}", n_ff, n_embd), w.linear(up, n_ff, n_embd)


class Choices:
    """What the chosen ones of a stack of experts make of a row, weighed. [T, E] -> [T, E]."""

    def __init__(
        self,
        c: Config,
        a: Arch,
        w: Tensors,
        n: int,
        e: int,
        suffix: str = "exps",
        limit: float = 0.0,
    ) -> None:
        self.be, self.act, self.inputs = w.be, a.act, a.weigh_inputs
        self.gate, self.up, n_ff = stacks(a, w, n, e, suffix)
        self.down = Experts(w, f"ffn_down_{suffix}", n, e, n_ff)
        self.limit = Limit(w.be, limit, n_ff) if limit else None
        self.down_scale = None  # a number for each expert
        if w.has(f"ffn_down_{suffix}.scale"):
            name = f"ffn_down_{suffix}.scale"
            self.down_scale = w.be.load(Row(name, w.host(name, n).reshape(n, 1)))
        self.point = f"{w.at}ffn_act_{suffix}"

    def __call__(self, step: Step, x: Array, experts: Array, weights: Array) -> Array:
        """The sum, by weights [T, k], of what experts [T, k] make of x."""
        be = self.be
        if self.down_scale is not None:
            weights = be.mul(weights, be.per_choice(self.down_scale, experts))
        if self.inputs:  # Llama 4 weighs what goes into the experts
            x = be.weigh(x, weights)
            weights = be.act(be.scale_softcap(weights, 0.0), "exp")  # ones
        if self.gate is None:
            hidden = be.act(self.up(x, experts), self.act)
        elif self.limit is not None:
            gate = be.act(self.gate(x, experts), self.act)
            hidden = self.limit(gate, self.up(x, experts))
        else:
            both = self.gate, self.up
            ws, biases = [p.weight for p in both], [p.bias for p in both]
            hidden = (
                be.matmul_experts_gated(ws, x, experts, biases, self.act)
                if all(p.plain for p in both)
                else be.act_mul(self.gate(x, experts), self.up(x, experts), self.act)
            )
        hidden = step.tap(self.point, hidden)
        return be.combine(self.down(hidden, experts), weights)


class MoE:
    """Each row through its chosen experts, plus a shared one where the file has it. [T, E] -> [T, E].

    Neighbouring experts may have a small one in common, which works as often as they do. Mixtral
    arXiv:2401.04088; DeepSeekMoE arXiv:2401.06066; small experts arXiv:2508.07785.
    """

    def __init__(
        self, c: Config, a: Arch, w: Tensors, limit: float = 0.0, shared_limit: float = 0.0
    ) -> None:
        n, e = c.n_expert, c.n_embd
        if not n:
            raise GGUFError("is 0, yet the file has experts", name=f"{c.arch}.expert_count")
        self.be, self.scale = w.be, a.experts_scale
        self.router = w.linear("ffn_gate_inp", n, e)
        self.narrow = self.wide = None
        if w.has("ffn_latent_down.weight", "ffn_latent_up.weight"):
            narrow = w.source("ffn_latent_down.weight").shape[0]
            self.narrow = w.linear("ffn_latent_down", narrow, e)
            self.wide = w.linear("ffn_latent_up", e, narrow)
            e = narrow
        self.chosen = Choices(c, a, w, n, e, limit=limit)
        self.small = None
        if c.n_experts_sharing:
            self.small = Choices(c, a, w, n // c.n_experts_sharing, e, "chexps")
            self.small_of = w.be.array(np.arange(n, dtype=np.int32)[:, None] // c.n_experts_sharing)
            self.small_scale = c.small_experts_scale
        needs_bias = c.expert_gating == "sigmoid" and a.choice_bias
        self.bias = (  # DeepSeek-V3's choice, and of those after it
            w.array("exp_probs_b.bias", n) if needs_bias else w.optional("exp_probs_b.bias", n)
        )
        self.shared = self.shared_gate = None
        if w.has(*(f"ffn_{n}_shexp.weight" for n in ("up", "gate", "down"))):
            n_shared = w.source("ffn_down_shexp.weight").shape[1]
            self.shared = FFN(c, a, w, n_shared, "_shexp", shared_limit)
        if w.has("ffn_gate_inp_shexp.weight"):
            self.shared_gate = shared_gate(w, c.n_embd)
        self.routing, self.at = routing(c, a), w.at

    def __call__(self, step: Step, x: Array, routed_by: Array | None = None) -> Array:
        """x through its experts, which the router chooses by ``routed_by``, or by x itself."""
        be = self.be
        logits = self.router(x if routed_by is None else routed_by)
        logits = step.tap(f"{self.at}router_logits", logits)
        experts, weights = be.route(logits, self.routing, self.bias)
        if step.asks(self.at, "router_probs"):
            name = f"{self.at}router_probs"
            experts, weights = probe.routed(step, name, experts, weights, logits.shape[1])
        y = self.chosen(step, x if self.narrow is None else self.narrow(x), experts, weights)
        if self.small is not None:
            small = be.looked_up(self.small_of, experts)
            more = self.small(step, x, small, weights)
            y = be.add(y, more, scale=self.small_scale)
        y = y if self.wide is None else self.wide(y)
        if self.shared is not None:
            extra = self.shared(step, x)
            if self.shared_gate is not None:
                extra = be.mul(extra, be.act(self.shared_gate(x), "sigmoid"))
            y = be.add(y, extra)
        return y if self.scale == 1 else be.scale_softcap(y, self.scale)


def stacks(
    a: Arch, w: Tensors, n: int, n_in: int, suffix: str = "exps"
) -> tuple[Experts | None, Experts, int]:
    """The experts' gates, their up projections, and how wide they are inside."""
    both = f"ffn_gate_up_{suffix}"
    name = both if w.has(f"{both}.weight") else f"ffn_up_{suffix}"
    shape = w.source(f"{name}.weight").shape
    if len(shape) != 3:
        full = f"{w.prefix}{name}.weight"
        raise GGUFError(f"has shape {shape}; expected a matrix for each expert", name=full)
    if name == both:
        n_ff = shape[1] // 2
        return Experts(w, both, n, n_ff, n_in, 0), Experts(w, both, n, n_ff, n_in, 1), n_ff
    gate = Experts(w, f"ffn_gate_{suffix}", n, shape[1], n_in) if a.gated else None
    return gate, Experts(w, name, n, shape[1], n_in), shape[1]


class BesideMoE:
    """A plain half and experts of the same input, their sum scaled (Grok 2). [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, w: Tensors, n_ff: int) -> None:
        self.be, self.scale = w.be, a.experts_beside
        self.plain, self.experts = FFN(c, a, w, n_ff), MoE(c, a, w)

    def __call__(self, step: Step, x: Array) -> Array:
        both = self.be.add(self.plain(step, x), self.experts(step, x))
        return self.be.scale_softcap(both, self.scale)


class NormedBesideMoE:
    """A plain half and experts side by side, with norms of their own before and behind each (Gemma 4).

    The router reads through a norm with a scale of its own. [T, E] -> [T, E].
    """

    norms_itself = True

    def __init__(self, c: Config, a: Arch, w: Tensors, n_ff: int) -> None:
        e = c.n_embd
        self.be = w.be
        self.plain, self.experts = FFN(c, a, w, n_ff), MoE(c, a, w)
        self.plain_norm, self.experts_norm = w.norm("ffn_norm", e), w.norm("pre_ffw_norm_2", e)
        self.plain_post, self.experts_post = (
            w.norm("post_ffw_norm_1", e),
            w.norm("post_ffw_norm_2", e),
        )
        scale = w.host("ffn_gate_inp.scale", e) / np.sqrt(e, dtype=np.float32)
        self.router_norm = Norm(w.be, c.norm, c.norm_eps, w.be.array(scale), None)

    def __call__(self, step: Step, x: Array) -> Array:
        plain = self.plain_post(self.plain(step, self.plain_norm(x)))
        chosen = self.experts(step, self.experts_norm(x), self.router_norm(x))
        return self.be.add(plain, self.experts_post(chosen))


class Experts:
    """A stack of matrices and biases, one per expert."""

    def __init__(
        self, w: Tensors, name: str, n: int, n_out: int, n_in: int, half: int | None = None
    ) -> None:
        self.be, self.n = w.be, n
        self.weight = w.stack(f"{name}.weight", n, n_out, n_in, half)
        self.bias = w.optional(f"{name}.bias", n, n_out)
        rows = None if half is None else slice(half * n_out, (half + 1) * n_out)
        self.beside = w.beside(f"{name}.weight", rows)

    @property
    def plain(self) -> bool:
        """Whether the products are the matrices' alone in the present step."""
        return self.beside is None or self.beside.idle

    def __call__(self, x: Array, experts: Array) -> Array:
        """x [T, n_in] or [T, k, n_in] -> [T, k, n_out]."""
        y = self.be.matmul_experts(self.weight, x, experts, self.bias)
        if self.beside is None or self.beside.idle:
            return y
        return self.beside.added_to_experts(y, x, experts, self.n)


def make_ffn(c: Config, a: Arch, i: int, w: Tensors) -> Any:
    """The feed-forward half: the row's own, experts where there is a router, else a plain one."""
    if a.ffn != "file":
        return a.ffn and a.ffn(c, a, i, w)
    if a.halves == "file" and not c.n_ff[i]:
        return None
    if w.has("ffn_norm_exps.weight"):
        return FFN(c, a, w, w.source("ffn_up.weight").shape[0])
    names = "ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps", "ffn_down_exps", "ffn_gate_inp"
    if not w.has(*(f"{n}.weight" for n in names)):
        return FFN(c, a, w, c.n_ff[i], limit=c.ffn_limits[i])
    beside = w.has("ffn_up.weight", "ffn_gate.weight", "ffn_down.weight")
    if beside and a.experts_beside != 1:
        return BesideMoE(c, a, w, c.n_ff[i])
    if beside:
        return NormedBesideMoE(c, a, w, c.n_ff[i])
    return MoE(c, a, w, c.expert_limits[i], c.ffn_limits[i])


def shared_gate(w: Tensors, n_embd: int) -> Linear:
    """The shared expert's gate: one output; some files store it as a vector."""
    name = "ffn_gate_inp_shexp"
    if len(w.tensors[f"{w.prefix}{name}.weight"].shape) == 2:
        return w.linear(name, 1, n_embd)
    row = Row(f"{w.prefix}{name}.weight", w.host(f"{name}.weight", n_embd).reshape(1, -1))
    return Linear(w.be, w.be.load(row), None)


def routing(c: Config, a: Arch) -> Routing:
    """How experts are chosen: the file's keys first, then the row."""
    renormalise = a.renormalise if c.expert_renormalise is None else c.expert_renormalise
    return Routing(
        n_used=c.n_expert_used,
        gating=c.expert_gating or a.gating,  # type: ignore[arg-type]
        renormalise=renormalise,
        scale=c.expert_weights_scale,
        n_group=c.n_expert_group,
        n_group_used=c.n_expert_group_used,
    )
