"""Mamba's mixer: a short convolution and a selective scan instead of attention. arXiv:2312.00752."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.backend import Array, LayerCache
from . import probe
from .config import Config
from .mixer import Mixer
from .step import Step
from .weights import Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class Mamba(Mixer):
    """[T, E] -> [T, E]; n = ssm_inner channels, S = ssm_state values of state each."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        n, s, r = c.ssm_inner, c.ssm_state, c.ssm_dt_rank
        self.be, self.i, self.width = w.be, i, c.ssm_conv
        self.n, self.s = n, s
        self.x_in = w.linear("ssm_in", 2 * n, c.n_embd, slice(0, n))
        self.gate_in = w.linear("ssm_in", 2 * n, c.n_embd, slice(n, 2 * n))
        self.conv = w.array("ssm_conv1d.weight", n, c.ssm_conv)
        self.conv_bias = w.optional("ssm_conv1d.bias", n)
        cuts = slice(0, r), slice(r, r + s), slice(r + s, r + 2 * s)
        self.to_dt, self.to_b, self.to_c = (w.linear("ssm_x", r + 2 * s, n, rows) for rows in cuts)
        self.dt = w.linear("ssm_dt", n, r)
        self.a, self.d = w.array("ssm_a", n, s), w.array("ssm_d", n)
        self.out = w.linear("ssm_out", c.n_embd, n)
        bare = Norm(w.be, "rms", c.norm_eps, None, None) if c.ssm_norm else None
        sizes = {"dt": r, "b": s, "c": s}
        self.norms = [w.norm_if(f"ssm_{n}_norm", size) or bare for n, size in sizes.items()]

    @property
    def cache(self) -> LayerCache:
        return LayerCache(arrays=(("conv", (self.width - 1, self.n)), ("ssm", (self.n, self.s))))

    def __call__(self, step: Step, h: Array) -> Array:
        be, batch = self.be, step.batch
        x = be.act(be.conv1d(batch, self.i, self.x_in(h), self.conv, self.conv_bias), "silu")
        parts = self.to_dt(x), self.to_b(x), self.to_c(x)
        low, b, c = (n(y) if n else y for n, y in zip(self.norms, parts, strict=True))
        dt = be.act(self.dt(low), "softplus")
        dt = step.tap(f"blk.{self.i}.rate", dt)
        y = be.scan(batch, self.i, x, dt, self.a, b, c, self.d)
        probe.state(step, self.i, "ssm", y)
        gate = step.tap(f"blk.{self.i}.gate", self.gate_in(h))
        return self.out(be.act_mul(gate, y, "silu"))
