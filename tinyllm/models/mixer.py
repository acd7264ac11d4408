"""What every mixer provides: the half of a block in which the rows of a sequence meet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..kernels.backend import Array, LayerCache
from .step import Step

if TYPE_CHECKING:
    from .attention import Rope


class Mixer(ABC):
    """Attention, a recurrence or a convolution of one layer, made of (config, arch, layer, tensors)."""

    rope: Rope | None = None  # how stored keys were turned; a context shift turns them back
    can_shift = True  # may stored keys be turned to other positions?
    carries = False  # does it hand values to later layers, in ``step.carried``?

    @property
    @abstractmethod
    def cache(self) -> LayerCache:
        """What the layer keeps of the past."""

    @abstractmethod
    def __call__(self, step: Step, x: Array) -> Array:
        """Activations x [T, E] -> [T, E]."""
