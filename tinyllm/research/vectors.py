"""Control vectors from pairs of prompts: the difference of means, or the first principal direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ArgumentError
from ..gguf.control import ControlVector
from .cache import run_with_cache

if TYPE_CHECKING:
    from ..models.network import Network
    from .patches import Positions

Method = Literal["mean", "pca"]


def control_vector(
    net: Network,
    positive: Sequence[list[int]],
    negative: Sequence[list[int]],
    method: Method,
    positions: Positions,
) -> ControlVector:
    """``Model.control_vector`` for prompts that are ids."""
    if method not in ("mean", "pca"):
        raise ArgumentError(f"method={method!r:.40}; expected 'mean' or 'pca'")
    if not positive or not negative:
        raise ArgumentError("positive or negative is empty; give at least one prompt of each kind")
    if method == "pca" and len(positive) != len(negative):
        raise ArgumentError(
            f"{len(positive)} positive and {len(negative)} negative prompts; pca compares pairs"
        )
    high, low = (rows_after_layers(net, prompts, positions) for prompts in (positive, negative))
    directions = {}
    for layer in range(1, net.config.n_layer):
        difference = high[layer].mean(0) - low[layer].mean(0)
        if method == "pca":
            difference = principal(high[layer] - low[layer], difference)
        directions[layer] = difference.astype(np.float32)
    if not directions:
        raise ArgumentError("the model has one layer; control vectors begin with the second")
    return ControlVector(directions, net.arch.name)


def rows_after_layers(
    net: Network, prompts: Sequence[list[int]], positions: Positions
) -> np.ndarray:
    """The mean of some positions' rows of each prompt after each layer, float64 [layers, n, E]."""
    caches = run_with_cache(net, prompts, "out", positions, "float32", None)
    if not all(len(c.positions) for c in caches):
        raise ArgumentError(f"positions={positions!r:.60}; a prompt has none of these tokens")
    return np.stack([c.stack("out").astype(np.float64).mean(1) for c in caches], 1)


def principal(differences: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The direction that has most of the pairs' differences [n, E], as long as their mean [E] along it.

    The differences count with both signs, so that their own mean is a part of what is found.
    """
    direction = np.linalg.svd(differences, full_matrices=False)[2][0]
    return np.asarray(direction * (direction @ mean))
