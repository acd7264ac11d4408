"""The feed-forward half of a block: plain, gated, or a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Array, Routing
from .config import Config
from .step import Step
from .weights import Linear, Row, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class FFN:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, w: Tensors, n_ff: int, suffix: str = "") -> None:
        self.be, self.act = w.be, a.act
        self.gate, self.up = halves(a, w, n_ff, c.n_embd, suffix)
        self.down = w.linear(f"ffn_down{suffix}", c.n_embd, n_ff)

    def __call__(self, step: Step | None, x: Array) -> Array:
        if self.gate is None:
            hidden = self.be.matmul_act(self.up.weight, x, self.up.bias, self.act)
            return self.down(hidden)
        both = self.gate, self.up
        ws, biases = [p.weight for p in both], [p.bias for p in both]
        return self.down(self.be.matmul_gated(ws, x, biases, self.act))


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

    def __call__(self, step: Step | None, x: Array) -> Array:
        return self.down(self.activated(self.up(x)))

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


class MoE:
    """Each row through its chosen experts, plus a shared one where the file has it. [T, E] -> [T, E].

    Mixtral arXiv:2401.04088; DeepSeekMoE arXiv:2401.06066.
    """

    def __init__(self, c: Config, a: Arch, w: Tensors) -> None:
        n, e = c.n_expert, c.n_embd
        if not n:
            raise GGUFError("is 0, yet the file has experts", name=f"{c.arch}.expert_count")
        self.be, self.act = w.be, a.act
        self.router = w.linear("ffn_gate_inp", n, e)
        shape = w.source("ffn_up_exps.weight").shape
        if len(shape) != 3:
            name = f"{w.prefix}ffn_up_exps.weight"
            raise GGUFError(f"has shape {shape}; expected a matrix for each expert", name=name)
        n_ff = shape[1]
        self.up = Experts(w, "ffn_up_exps", n, n_ff, e)
        self.gate = Experts(w, "ffn_gate_exps", n, n_ff, e) if a.gated else None
        self.down = Experts(w, "ffn_down_exps", n, e, n_ff)
        needs_bias = c.expert_gating == "sigmoid"  # DeepSeek-V3's choice, and of those after it
        self.bias = (
            w.array("exp_probs_b.bias", n) if needs_bias else w.optional("exp_probs_b.bias", n)
        )
        self.shared = self.shared_gate = None
        if w.has(*(f"ffn_{n}_shexp.weight" for n in ("up", "gate", "down"))):
            self.shared = FFN(c, a, w, w.source("ffn_up_shexp.weight").shape[0], "_shexp")
        if w.has("ffn_gate_inp_shexp.weight"):
            self.shared_gate = shared_gate(w, e)
        self.routing = routing(c, a)

    def __call__(self, step: Step | None, x: Array) -> Array:
        be = self.be
        experts, weights = be.route(self.router(x), self.routing, self.bias)
        if self.gate is None:
            hidden = be.act(self.up(x, experts), self.act)
        else:
            both = self.gate, self.up
            ws, biases = [p.weight for p in both], [p.bias for p in both]
            hidden = be.matmul_experts_gated(ws, x, experts, biases, self.act)
        y = be.combine(self.down(hidden, experts), weights)
        if self.shared is None:
            return y
        extra = self.shared(None, x)
        if self.shared_gate is not None:
            extra = be.mul(extra, be.act(self.shared_gate(x), "sigmoid"))
        return be.add(y, extra)


class Experts:
    """A stack of matrices and biases, one per expert."""

    def __init__(self, w: Tensors, name: str, n: int, n_out: int, n_in: int) -> None:
        self.be = w.be
        self.weight = w.matrix(f"{name}.weight", n, n_out, n_in)
        self.bias = w.optional(f"{name}.bias", n, n_out)

    def __call__(self, x: Array, experts: Array) -> Array:
        """x [T, n_in] or [T, k, n_in] -> [T, k, n_out]."""
        return self.be.matmul_experts(self.weight, x, experts, self.bias)


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
