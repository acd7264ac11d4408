"""What every mixer provides: the half of a block in which the rows of a sequence meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..kernels.backend import Array, Backend, LayerCache
from .step import Step

if TYPE_CHECKING:
    from .archs import Arch
    from .attention import Rope
    from .config import Config
    from .weights import Tensors


class Mixer(ABC):
    """Attention, a recurrence or a convolution of one layer, made of (config, arch, layer, tensors)."""

    rope: Rope | None = None  # how stored keys were turned; a context shift turns them back
    can_shift = True  # may stored keys be turned to other positions?
    carries = False  # does it hand values to later layers, in ``step.carried``?
    source = -1  # the earlier layer whose keys and values it reads, if any

    @property
    @abstractmethod
    def cache(self) -> LayerCache:
        """What the layer keeps of the past."""

    @abstractmethod
    def __call__(self, step: Step, x: Array) -> Array:
        """Activations x [T, E] -> [T, E]."""


class NoMixer(Mixer):
    """The mixer of a layer whose rows do not meet: nothing is added to the residual stream."""

    cache = LayerCache()

    def __call__(self, step: Step, x: Array) -> Array:
        raise AssertionError("a block without this half does not ask for it")


class LinearMixer(Mixer):
    """One matrix in place of attention (DeciLM). [T, E] -> [T, E]."""

    cache = LayerCache()

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.out = w.linear("attn_output", c.n_embd, c.n_embd)

    def __call__(self, step: Step, x: Array) -> Array:
        return self.out(x)


def widened(be: Backend, x: Array, n_head: int, width: int) -> Array:
    """Each head's value for all of its channels: [T, H] -> [T, H * width], by doubling."""
    y, n = x, 1
    while 2 * n <= width:
        y, n = be.concat([y, y], n_head), 2 * n
    return y if n == width else be.concat([y, *[x] * (width - n)], n_head)
