"""Mamba 2's mixer: heads that decay as one, with inputs and outputs shared in groups. arXiv:2405.21060.

Also both kinds of mixer side by side (Falcon-H1, arXiv:2507.22448), and Mamba's with such heads (PLaMo 2).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Array, LayerCache
from . import probe
from .attention import Attention
from .config import Config
from .mixer import Mixer, widened
from .step import Step
from .weights import Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class Mamba2(Mixer):
    """[T, E] -> [T, E]; n = ssm_inner channels in H heads, S = ssm_state values each, G groups of heads."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        n, s, g, h = c.ssm_inner, c.ssm_state, c.ssm_group, c.ssm_dt_rank
        check_groups(c)
        self.be, self.i, self.width, self.n, self.s = w.be, i, c.ssm_conv, n, s
        self.n_head, self.n_shared = h, g * s
        bounds = np.cumsum([0, n, n, g * s, g * s, h])
        cuts = [slice(lo, hi) for lo, hi in pairwise(bounds)]
        self.gate, *self.inputs, self.dt = (
            w.linear("ssm_in", int(bounds[-1]), c.n_embd, rows) for rows in cuts
        )
        self.convs = convolutions(w, c, [slice(r.start - n, r.stop - n) for r in cuts[1:4]])
        self.dt_bias = w.array("ssm_dt.bias", h)
        self.a = w.be.array(np.repeat(w.host("ssm_a", h, 1), n // h, 0))
        self.d = w.be.array(np.repeat(w.host("ssm_d", h, 1), n // h))
        self.norm = None
        if w.has("ssm_norm.weight"):
            flat = w.be.array(w.host("ssm_norm.weight", g, n // g).ravel())
            self.norm = Norm(w.be, "rms", c.norm_eps, flat, None, n // g)
        self.out = w.linear("ssm_out", c.n_embd, n)

    @property
    def cache(self) -> LayerCache:
        sizes = ("x", self.n), ("b", self.n_shared), ("c", self.n_shared)
        convs = ((f"conv_{name}", (self.width - 1, size)) for name, size in sizes)
        return LayerCache(arrays=(*convs, ("ssm", (self.n, self.s))))

    def __call__(self, step: Step, h: Array) -> Array:
        be, batch = self.be, step.batch
        x, b, c = (
            be.act(be.conv1d(batch, self.i, linear(h), weight, bias, f"conv_{name}"), "silu")
            for name, linear, (weight, bias) in zip("xbc", self.inputs, self.convs, strict=True)
        )
        dt = be.act(be.add(self.dt(h), self.dt_bias), "softplus")
        dt = step.tap(f"blk.{self.i}.rate", dt)
        dt = widened(be, dt, self.n_head, self.n // self.n_head)
        y = be.scan(batch, self.i, x, dt, self.a, b, c, self.d)
        probe.state(step, self.i, "ssm", y)
        gate = step.tap(f"blk.{self.i}.gate", self.gate(h))
        y = be.act_mul(gate, y, "silu")
        return self.out(self.norm(y) if self.norm else y)


class MambaByHead(Mixer):
    """Mamba whose rates and decays are heads', and whose gates lie head by head beside the inputs (PLaMo 2).

    What the rates are made of, and what goes into and out of the states, is normalised. [T, E] -> [T, E].
    """

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        n, s, h = c.ssm_inner, c.ssm_state, c.ssm_dt_rank
        check_divides(c, "time_step_rank", h, n)
        self.be, self.i, self.width, self.n, self.s = w.be, i, c.ssm_conv, n, s
        self.n_head, d = h, n // h
        gates = (np.arange(h)[:, None] * 2 * d + np.arange(d)).ravel()
        self.gate, self.x_in = (w.linear("ssm_in", 2 * n, c.n_embd, r) for r in (gates, gates + d))
        self.conv = w.array("ssm_conv1d.weight", n, c.ssm_conv)
        self.conv_bias = w.optional("ssm_conv1d.bias", n)
        n_all = w.source("ssm_x.weight").shape[0]
        sizes = {"b": s, "c": s, "dt": n_all - 2 * s}
        bounds = np.cumsum([0, *sizes.values()])
        self.low = [w.linear("ssm_x", n_all, n, slice(lo, hi)) for lo, hi in pairwise(bounds)]
        self.norms = [w.norm(f"ssm_{name}_norm", size) for name, size in sizes.items()]
        self.dt = w.linear("ssm_dt", h, sizes["dt"])
        w.require("ssm_dt.bias")
        self.a = w.be.array(np.repeat(w.host("ssm_a").reshape(h, 1), d, 0).repeat(s, 1))
        self.d = w.be.array(np.repeat(w.host("ssm_d").reshape(h), d))
        self.out = w.linear("ssm_out", c.n_embd, n)

    @property
    def cache(self) -> LayerCache:
        """The last inputs of the convolution, and the states."""
        return LayerCache(arrays=(("conv", (self.width - 1, self.n)), ("ssm", (self.n, self.s))))

    def __call__(self, step: Step, h: Array) -> Array:
        be, batch = self.be, step.batch
        x = be.act(be.conv1d(batch, self.i, self.x_in(h), self.conv, self.conv_bias), "silu")
        b, c, low = (norm(part(x)) for norm, part in zip(self.norms, self.low, strict=True))
        dt = step.tap(f"blk.{self.i}.rate", be.act(self.dt(low), "softplus"))
        dt = widened(be, dt, self.n_head, self.n // self.n_head)
        y = be.scan(batch, self.i, x, dt, self.a, b, c, self.d)
        probe.state(step, self.i, "ssm", y)
        gate = step.tap(f"blk.{self.i}.gate", self.gate(h))
        return self.out(be.act_mul(gate, y, "silu"))


def check_groups(c: Config) -> None:
    """Raise GGUFError unless channels divide into heads, and heads into groups."""
    check_divides(c, "time_step_rank", c.ssm_dt_rank, c.ssm_inner)
    check_divides(c, "group_count", c.ssm_group, c.ssm_dt_rank)


def check_divides(c: Config, key: str, n: int, whole: int) -> None:
    """Raise GGUFError unless what a key says divides something into parts."""
    if not n or not whole or whole % n:
        raise GGUFError(f"is {n}; expected a divisor of {whole}", name=f"{c.arch}.ssm.{key}")


def convolutions(w: Tensors, c: Config, cuts: list[slice]) -> list[tuple[Array, Array | None]]:
    """The kernels of x, b and c, which the file stores as one, and their biases."""
    n = cuts[-1].stop
    weight = w.host("ssm_conv1d.weight", n, c.ssm_conv)
    bias = w.host("ssm_conv1d.bias", n) if w.has("ssm_conv1d.bias") else None
    return [
        (w.be.array(weight[rows]), None if bias is None else w.be.array(bias[rows]))
        for rows in cuts
    ]


class AttentionBesideMamba2(Mixer):
    """Both read the same row; their outputs are added. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be = w.be
        self.attention, self.mamba = Attention(c, a, i, w), Mamba2(c, a, i, w)
        self.rope = self.attention.rope

    @property
    def cache(self) -> LayerCache:
        kv = self.attention.cache
        return LayerCache(kv.n_head_kv, kv.head_dim, kv.head_dim_v, self.mamba.cache.arrays)

    def __call__(self, step: Step, h: Array) -> Array:
        return self.be.add(self.attention(step, h), self.mamba(step, h))
