"""The mixers of Qwen3-Next and Qwen 3.5: a gated delta net (arXiv:2412.06464), and attention behind a gate.

The delta rule S = g S (I - beta k k^T) + beta v k^T is RWKV 7's with decay g, a = k and b = -beta g k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedModel
from ..kernels.backend import Array, LayerCache
from . import probe
from .attention import Attention
from .config import Config
from .mamba2 import check_groups, convolutions
from .mixer import Mixer, widened
from .step import Step
from .weights import Linear, Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch

UNIT_EPS = 1e-6  # added to the lengths that queries and keys are divided by


class DeltaNet(Mixer):
    """[T, E] -> [T, E]; H value heads of D channels, G key heads of D channels."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        check_groups(c)
        n, g, h, d = c.ssm_inner, c.ssm_group, c.ssm_dt_rank, c.ssm_state
        if n != h * d:
            raise UnsupportedModel(f"value heads of {n // h} channels beside key heads of {d}")
        self.be, self.i, self.width, self.e = w.be, i, c.ssm_conv, c.n_embd
        self.n_head, self.n_group, self.dim, self.n = h, g, d, n
        cuts = [slice(0, g * d), slice(g * d, 2 * g * d), slice(2 * g * d, 2 * g * d + n)]
        self.inputs = [w.linear("attn_qkv", 2 * g * d + n, c.n_embd, rows) for rows in cuts]
        self.convs = convolutions(w, c, cuts)
        self.gate = w.linear("attn_gate", n, c.n_embd)
        self.tiled = w.has("ssm_beta.weight", "ssm_alpha.weight")
        self.beta, self.decay = rates(c, w, self.tiled)
        self.dt_bias, self.a = w.array("ssm_dt.bias", h), w.array("ssm_a", h)
        self.norm = Norm(w.be, "rms", c.norm_eps, w.array("ssm_norm.weight", d), None, d)
        self.out = w.linear("ssm_out", c.n_embd, n)

    @property
    def cache(self) -> LayerCache:
        sizes = zip("qkv", (self.n_group * self.dim, self.n_group * self.dim, self.n), strict=True)
        convs = ((f"conv_{name}", (self.width - 1, size)) for name, size in sizes)
        return LayerCache(arrays=(*convs, ("wkv", (self.n_head, self.dim, self.dim))))

    def __call__(self, step: Step, h: Array) -> Array:
        be, batch, d = self.be, step.batch, self.dim
        q, k, v = (
            be.act(be.conv1d(batch, self.i, linear(h), weight, bias, f"conv_{name}"), "silu")
            for name, linear, (weight, bias) in zip("qkv", self.inputs, self.convs, strict=True)
        )
        q, k = self.unit(q, 1 / d), self.unit(k, d**-0.5)
        at = f"blk.{self.i}."
        beta = self.per_channel(step.tap(f"{at}rate", be.act(self.beta(h), "sigmoid")))
        dt = be.act(be.add(self.decay(h), self.dt_bias), "softplus")
        g = self.per_channel(step.tap(f"{at}decay", be.act(be.mul(dt, self.a), "exp")))
        back = be.scale_softcap(be.mul(be.mul(beta, g), k), -1.0)
        y = be.wkv7(batch, self.i, q, g, k, be.mul(beta, v), k, back)
        probe.state(step, self.i, "wkv", y)
        gate = step.tap(f"{at}gate", self.gate(h))
        return self.out(be.act_mul(gate, self.norm(y), "silu"))

    def unit(self, x: Array, scale: float) -> Array:
        """Heads of length sqrt(D) * scale, each key head for its value heads: [T, G D] -> [T, H D]."""
        be, d = self.be, self.dim
        x = be.rms_norm(x, None, UNIT_EPS / d, None, d)
        copies = [be.scale_softcap(x, scale)] * (self.n_head // self.n_group)
        return be.concat(copies, 1 if self.tiled else self.n_group)

    def per_channel(self, x: Array) -> Array:
        return widened(self.be, x, self.n_head, self.dim)


def rates(c: Config, w: Tensors, tiled: bool) -> tuple[Linear, Linear]:
    """How fast each value head learns and forgets.

    Qwen 3.5 stores two matrices, and value head i reads key head i modulo G ("tiled"). Qwen3-Next stores one,
    group by group, and the heads of a group stand together.
    """
    g, h = c.ssm_group, c.ssm_dt_rank
    if tiled:
        return w.linear("ssm_beta", h, c.n_embd), w.linear("ssm_alpha", h, c.n_embd)
    both = np.arange(2 * h).reshape(g, 2, h // g)
    beta, decay = (w.linear("ssm_ba", 2 * h, c.n_embd, both[:, j].ravel()) for j in range(2))
    return beta, decay


class GatedAttention(Attention):
    """Attention whose output passes a gate; ``attn_q`` holds, head by head, the query and its gate."""

    def queries(self, c: Config, w: Tensors) -> Linear:
        rows = np.arange(2 * self.n_head * c.head_dim).reshape(self.n_head, 2, c.head_dim)
        q, self.beside = (
            w.linear("attn_q", rows.size, c.n_embd, rows[:, j].ravel()) for j in range(2)
        )
        return q

    def gated(self, x: Array, y: Array) -> Array:
        return self.be.mul(y, self.be.act(self.beside(x), "sigmoid"))


def delta_or_attention(c: Config, a: Arch, i: int, w: Tensors) -> DeltaNet | GatedAttention:
    """Make the mixer whose tensors the layer has."""
    matrices = "attn_qkv attn_gate ssm_alpha ssm_ba ssm_beta ssm_conv1d ssm_norm ssm_out".split()
    recurrent = w.has("ssm_a", "ssm_dt.bias", *(f"{n}.weight" for n in matrices))
    return DeltaNet(c, a, i, w) if recurrent else GatedAttention(c, a, i, w)
