"""Layers on several devices: each computes a run of neighbours, and hands its activations to the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StateError
from ..kernels.backend import Backend, Batch, Cache, KVType, LayerCache, RopeSpec

if TYPE_CHECKING:
    from .weights import Stored

LAYER = re.compile(r"(?:enc\.|dec\.)?blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers on one backend. The first stage has the embedding too, the last one the head."""

    be: Backend
    layers: range

    @property
    def label(self) -> str:
        """The stage's layers in words: "layers 0 to 11"."""
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first} to {last}"

    def own(self, layers: Sequence[LayerCache]) -> list[LayerCache]:
        """What each layer keeps, with nothing to keep for the layers of other stages."""
        return [c if i in self.layers else LayerCache() for i, c in enumerate(layers)]


Place = Callable[[int], Sequence[Stage]]  # from a model's number of layers to where they go


def divide(backends: Sequence[Backend], layers: range) -> list[Stage]:
    """A run of the layers for each backend, in proportion to the memory that is free there now."""
    free = np.array([max(be.memory()[0], 1) for be in backends], np.float64)
    ends = np.rint(len(layers) * np.cumsum(free) / free.sum()).astype(int).tolist()
    starts = [0, *ends[:-1]]
    stages = [Stage(be, layers[a:b]) for be, a, b in zip(backends, starts, ends, strict=True)]
    return [s for s in stages if len(s.layers)]


def gpus_first(stages: Sequence[Stage]) -> list[Stage]:
    """The stages on GPUs before those on the CPU, otherwise in the order of their layers."""
    return sorted(stages, key=lambda s: not s.be.where.is_gpu)


def stage_bytes(
    tensors: Mapping[str, Stored], stages: Sequence[Stage], blocks: Sequence[int]
) -> list[int]:
    """Bytes of each stage's weights; a tied embedding counts where it is read and where it is the head.

    blocks: which of the file's each layer is. One that several layers are counts once in each of their stages.
    """
    total = [0] * len(stages)
    for name, tensor in tensors.items():
        for i in stages_of(name, stages, blocks):
            total[i] += tensor.nbytes
    tied = tensors.get("token_embd.weight") if "output.weight" not in tensors else None
    if len(stages) > 1 and tied is not None:
        total[-1] += tied.nbytes
    return total


def stages_of(name: str, stages: Sequence[Stage], blocks: Sequence[int]) -> list[int]:
    """The numbers of the stages that a tensor belongs to."""
    block = LAYER.match(name)
    if block is None:
        return [len(stages) - 1 if name.startswith(("output", "cls", "dense")) else 0]
    number = int(block[1])
    return [i for i, s in enumerate(stages) if number in {blocks[j] for j in s.layers}] or [0]


class StagedCache(Cache):
    """One sequence's past, each layer's part on the backend that computes the layer."""

    def __init__(self, stages: Sequence[Stage], parts: Sequence[Cache]) -> None:
        self.stages, self.parts = tuple(stages), tuple(parts)
        self.n_ctx = parts[0].n_ctx

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def held(self) -> dict[int, int]:
        return {number: n for part in self.parts for number, n in part.held().items()}

    def fork(self, n_ctx: int) -> StagedCache:
        return StagedCache(self.stages, [part.fork(n_ctx) for part in self.parts])

    def truncate(self, n: int) -> None:
        for part in self.parts:
            part.truncate(n)

    def holds(self, n: int) -> bool:
        return all(part.holds(n) for part in self.parts)

    def holds_all(self, n: int) -> bool:
        return all(part.holds_all(n) for part in self.parts)

    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        part = next(p for s, p in zip(self.stages, self.parts, strict=True) if layer in s.layers)
        part.shift(layer, keep, discard, n_past, rope)

    def export(self, n_past: int) -> dict[str, np.ndarray]:
        return {name: x for part in self.parts for name, x in part.export(n_past).items()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        names = [part.export(0).keys() for part in self.parts]
        expected = set().union(*names)
        if arrays.keys() != expected:
            raise StateError(
                f"saved state has arrays {sorted(arrays)}; expected {sorted(expected)}"
            )
        for part, own in zip(self.parts, names, strict=True):
            part.restore({name: arrays[name] for name in own})


def caches_of(batch: Batch, i: int) -> Batch:
    """The batch for stage i, with that stage's part of each cache."""
    parts = tuple(c.parts[i] for c in batch.caches if isinstance(c, StagedCache))
    return replace(batch, caches=parts) if parts else batch


def new_cache(
    stages: Sequence[Stage], layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType
) -> Cache:
    """Room for one sequence: a backend's own cache, or one part on each."""
    parts = [s.be.new_cache(s.own(layers), n_ctx, kv_type) for s in stages]
    return parts[0] if len(parts) == 1 else StagedCache(stages, parts)
