"""LFM2's short convolution: a gate before it, a gate behind it. hf.co/LiquidAI/LFM2-1.2B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.backend import Array, LayerCache
from . import probe
from .config import Config
from .mixer import Mixer
from .step import Step
from .weights import Tensors, products

if TYPE_CHECKING:
    from .archs import Arch


class ShortConv(Mixer):
    """out(c * conv(b * x)), with b, c and x from one projection. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be, self.i, self.n, self.width = w.be, i, c.n_embd, c.ssm_conv
        e = c.n_embd
        cuts = [slice(j * e, (j + 1) * e) for j in range(3)]
        self.b, self.c, self.x = (w.linear("shortconv.in_proj", 3 * e, e, rows) for rows in cuts)
        self.conv = w.array("shortconv.conv.weight", e, c.ssm_conv)
        self.out = w.linear("shortconv.out_proj", e, e)

    @property
    def cache(self) -> LayerCache:
        return LayerCache(arrays=(("conv", (self.width - 1, self.n)),))

    def __call__(self, step: Step, h: Array) -> Array:
        be = self.be
        parts = (self.b, self.c, self.x)
        b, c, x = products(parts, h)
        b, c = step.tap(f"blk.{self.i}.rate", b), step.tap(f"blk.{self.i}.gate", c)
        y = be.conv1d(step.batch, self.i, be.mul(b, x), self.conv, None)
        probe.state(step, self.i, "conv", y)
        return self.out(be.mul(c, y))
