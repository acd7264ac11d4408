"""Mixtures of experts: which experts a row takes, and the rows of each expert side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import DeviceError
from ..backend import Routing
from .arrays import GPUArray, f32, i32
from .elementwise import code_of
from .sources import EXPERTS

if TYPE_CHECKING:
    from .backend import GPUBackend

MAX_EXPERTS = 1024  # the value in src/experts.c
GATINGS = ("softmax", "sigmoid", "softmax_selected")


def _check(n_expert: int) -> None:
    if n_expert > MAX_EXPERTS:
        raise DeviceError(f"{n_expert} experts; at most {MAX_EXPERTS} run on a GPU")


def route(
    be: GPUBackend, logits: GPUArray, routing: Routing, bias: GPUArray | None
) -> tuple[GPUArray, GPUArray]:
    """The experts of each row, int32 [T, k], and their weights [T, k]."""
    t, n = logits.shape
    _check(n)
    chosen, weights = be.empty((t, routing.n_used), np.int32), be.empty((t, routing.n_used))
    be.launch(
        EXPERTS,
        "route",
        (t, 1, 1),
        (64, 1, 1),
        *(logits, bias, chosen, weights, i32(n), i32(routing.n_used)),
        *(code_of(GATINGS, routing.gating), i32(routing.renormalise), f32(routing.scale)),
        *(i32(routing.n_group), i32(routing.n_group_used)),
    )
    return chosen, weights


def sorted_choices(
    be: GPUBackend, chosen: GPUArray, n_expert: int, size: int
) -> tuple[GPUArray, GPUArray]:
    """The choices in order of their experts, and runs of up to ``size`` choices of one expert, int32 [n, 3].

    Both are kept with ``chosen`` for the other matrices of the experts.
    """
    _check(n_expert)
    if size not in chosen.by_expert:
        n_choices = chosen.size
        n_tiles = min(n_choices, n_choices // size + n_expert)
        order, tiles = be.empty((n_choices,), np.int32), be.empty((n_tiles, 3), np.int32)
        args = chosen, order, tiles, *(i32(n) for n in (n_choices, n_expert, size, n_tiles))
        be.launch(EXPERTS, "sort_choices", (1, 1, 1), (256, 1, 1), *args)
        chosen.by_expert[size] = order, tiles
    return chosen.by_expert[size]


def combine(be: GPUBackend, x: GPUArray, weights: GPUArray) -> GPUArray:
    t, k, n = x.shape
    y = be.empty((t, n))
    be.each(EXPERTS, "combine_experts", y.size, x, weights, y, i32(k), i32(n))
    return y
