"""Kimi Linear's mixer: a gated delta net whose decay is its own for every channel. arXiv:2510.26692.

S = S diag(w) (I - beta k k^T) + beta v k^T is RWKV 7's rule with a = w k and b = -beta k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..kernels.backend import Array, LayerCache
from . import probe
from .config import Config
from .deltanet import UNIT_EPS
from .mixer import Mixer, widened
from .mla import LatentAttention
from .step import Step
from .weights import Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class KimiDelta(Mixer):
    """[T, E] -> [T, E]; H heads of D channels for queries, keys and values alike."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        h, d, e = c.n_head[i], c.kda_head_dim, c.n_embd
        n = h * d
        self.be, self.i, self.width, self.n_head, self.dim = w.be, i, c.ssm_conv, h, d
        self.inputs = [w.linear(f"attn_{name}", n, e) for name in "qkv"]
        self.convs = [
            w.be.array(w.host(f"ssm_conv1d_{name}.weight").reshape(n, c.ssm_conv)) for name in "qkv"
        ]
        self.forget_down, self.forget_up = w.linear("ssm_f_a", d, e), w.linear("ssm_f_b", n, d)
        self.gate_down, self.gate_up = w.linear("ssm_g_a", d, e), w.linear("ssm_g_b", n, d)
        self.dt_bias = w.array("ssm_dt.bias", n)
        self.a = w.be.array(np.repeat(w.host("ssm_a").reshape(h), d))
        self.beta = w.linear("ssm_beta", h, e)
        self.norm = Norm(w.be, "rms", c.norm_eps, w.array("ssm_norm.weight", d), None, d)
        self.out = w.linear("attn_output", e, n)

    @property
    def cache(self) -> LayerCache:
        n = self.n_head * self.dim
        convs = ((f"conv_{name}", (self.width - 1, n)) for name in "qkv")
        return LayerCache(arrays=(*convs, ("wkv", (self.n_head, self.dim, self.dim))))

    def __call__(self, step: Step, h: Array) -> Array:
        be, batch, d = self.be, step.batch, self.dim
        q, k, v = (
            be.act(be.conv1d(batch, self.i, linear(h), weight, None, f"conv_{name}"), "silu")
            for name, linear, weight in zip("qkv", self.inputs, self.convs, strict=True)
        )
        q, k = self.unit(q, 1 / d), self.unit(k, d**-0.5)
        at = f"blk.{self.i}."
        beta = step.tap(f"{at}rate", be.act(self.beta(h), "sigmoid"))
        beta = widened(be, beta, self.n_head, d)
        dt = be.act(be.add(self.forget_up(self.forget_down(h)), self.dt_bias), "softplus")
        decay = step.tap(f"{at}decay", be.act(be.mul(dt, self.a), "exp"))
        back = be.scale_softcap(be.mul(beta, k), -1.0)
        y = be.wkv7(batch, self.i, q, decay, k, be.mul(beta, v), be.mul(decay, k), back)
        probe.state(step, self.i, "wkv", y)
        gate = step.tap(f"{at}gate", self.gate_up(self.gate_down(h)))
        return self.out(be.act_mul(gate, self.norm(y), "sigmoid"))

    def unit(self, x: Array, scale: float) -> Array:
        """Heads of length sqrt(D) * scale."""
        be, d = self.be, self.dim
        return be.scale_softcap(be.rms_norm(x, None, UNIT_EPS / d, None, d), scale)


def delta_or_latent(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads it is recurrent."""
    return (LatentAttention if c.n_head_kv[i] else KimiDelta)(c, a, i, w)
