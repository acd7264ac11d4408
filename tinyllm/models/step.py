"""What a forward pass carries from layer to layer beside the activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..errors import ArgumentError
from ..kernels.backend import Array, Backend, Batch

Tap = Callable[[str, np.ndarray], "np.ndarray | None"]


@dataclass(frozen=True)
class Step:
    """One pass over a batch: its rows, the room of its states, and the user's tap, if any."""

    be: Backend
    batch: Batch
    n_ctx: int = 0
    user_tap: Tap | None = None
    # int32 [T], for BERT: 0 for rows of a pair's first text, 1 for those of the second
    types: Array | None = None
    # what a layer hands to later layers of this pass (RWKV 7's first values)
    carried: dict[str, Array] = field(default_factory=dict)

    def tap(self, name: str, x: Array) -> Array:
        """Show the named activation to the user; what is returned, if anything, takes its place."""
        if self.user_tap is None:
            return x
        shown = np.array(self.be.numpy(x))
        result = self.user_tap(name, shown)
        if result is None:
            return x
        replacement = np.asarray(result, np.float32)
        if replacement.shape != shown.shape:
            raise ArgumentError(
                f"tap {name!r} returned shape {replacement.shape}; expected {shown.shape} or None"
            )
        return self.be.array(replacement)
