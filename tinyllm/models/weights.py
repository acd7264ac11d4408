"""A file's tensors, taken by name and checked: what is missing, misshapen or left over is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GGUFError, UnsupportedModel
from ..kernels.backend import Array, Backend, Weight
from .config import Config

# Tensors that a file may carry although the model does not read them, each with its reason.
MAY_BE_LEFT = {
    "rope_freqs.weight": "written per file, used by the layers that rotate",
    "attn_rot_embd": "a table of angles that old converters stored",
    "rotary_emb.inv_freq": "likewise",
}


@dataclass(frozen=True)
class Linear:
    """A matrix and its optional bias on the backend of its layer."""

    be: Backend
    weight: Weight
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """x [T, n_in] -> [T, n_out]."""
        return self.be.matmul(self.weight, x, self.bias)


@dataclass(frozen=True)
class Norm:
    """Root-mean-square or layer norm, over a row or over runs of ``group`` values of it."""

    be: Backend
    kind: str
    eps: float
    weight: Array | None
    bias: Array | None
    group: int = 0

    def __call__(self, x: Array) -> Array:
        norm = self.be.rms_norm if self.kind == "rms" else self.be.layer_norm
        return norm(x, self.weight, self.eps, self.bias, self.group)


class Tensors:
    """The tensors below one prefix (``blk.3.``), loaded to one backend as they are asked for."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        be: Backend,
        c: Config,
        prefix: str = "",
        taken: set[str] | None = None,
    ) -> None:
        self.tensors, self.be, self.c, self.prefix = tensors, be, c, prefix
        self.taken: set[str] = set() if taken is None else taken

    def below(self, prefix: str, be: Backend | None = None) -> Tensors:
        """The same tensors under a longer prefix, perhaps on another backend."""
        return Tensors(self.tensors, be or self.be, self.c, self.prefix + prefix, self.taken)

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.tensors

    def source(self, name: str, *shape: int) -> Any:
        """The tensor, with its shape checked where one is given, marked as used."""
        full = self.prefix + name
        if full not in self.tensors:
            raise GGUFError(f"tensor is missing; architecture {self.c.arch!r} needs it", name=full)
        tensor = self.tensors[full]
        if shape and tuple(tensor.shape) != shape:
            raise GGUFError(f"has shape {tuple(tensor.shape)}; expected {shape}", name=full)
        self.taken.add(full)
        return tensor

    def array(self, name: str, *shape: int) -> Array:
        """Any small tensor as float32 on the device."""
        return self.be.array(self.host(name, *shape))

    def host(self, name: str, *shape: int) -> np.ndarray:
        """Any small tensor as float32 on the host."""
        return np.asarray(self.source(name, *shape).dequantize())

    def optional(self, name: str, *shape: int) -> Array | None:
        return self.array(name, *shape) if self.has(name) else None

    def matrix(self, name: str, *shape: int, rows: slice | np.ndarray | None = None) -> Weight:
        """A matrix or a stack of them, [n_out, n_in] or [n, n_out, n_in], as the file stores it."""
        return self.be.load(self.source(name, *shape), rows)

    def linear(
        self, name: str, n_out: int, n_in: int, rows: slice | np.ndarray | None = None
    ) -> Linear:
        """``name.weight`` [n_out, n_in] and, if there, ``name.bias``; ``rows`` keeps only those outputs."""
        bias = None
        if self.has(f"{name}.bias"):
            host = self.host(f"{name}.bias", n_out)
            bias = self.be.array(host if rows is None else host[rows])
        return Linear(self.be, self.matrix(f"{name}.weight", n_out, n_in, rows=rows), bias)

    def norm(self, name: str, size: int, kind: str | None = None) -> Norm:
        """``name.weight`` [size] and, if there, ``name.bias``."""
        kind = kind or self.c.norm
        weight = self.array(f"{name}.weight", size)
        return Norm(self.be, kind, self.c.norm_eps, weight, self.optional(f"{name}.bias", size))

    def norm_if(self, name: str, size: int, kind: str | None = None) -> Norm | None:
        return self.norm(name, size, kind) if self.has(f"{name}.weight") else None

    def leftovers(self) -> list[str]:
        """Tensors that nobody used."""
        return sorted(
            n
            for n in self.tensors
            if n not in self.taken and not any(n.endswith(m) for m in MAY_BE_LEFT)
        )


def check_uniform(tensors: Mapping[str, Any], n_layer: int, ignore: frozenset[str]) -> None:
    """Layers of one kind (dense, experts; attention, recurrent) have the same tensors.

    ``ignore`` names suffixes that a row allows to differ. GGUFError names the first tensor that is missing.
    """
    layers: list[set[str]] = [set() for _ in range(n_layer)]
    for name in tensors:
        head, _, rest = name.partition(".")
        number, _, suffix = rest.partition(".")
        if head == "blk":
            if not number.isdigit() or int(number) >= n_layer:
                raise UnsupportedModel(
                    f"tensor {name!r:.80} belongs to no layer; there are {n_layer}"
                )
            layers[int(number)].add(suffix)
    kinds: dict[tuple[bool, bool], tuple[int, set[str]]] = {}
    for i, names in enumerate(layers):
        kind = ("ffn_gate_inp.weight" in names, "attn_output.weight" in names)
        first, expected = kinds.setdefault(kind, (i, names))
        for suffix in sorted((expected ^ names) - ignore):
            there, absent = (first, i) if suffix in expected else (i, first)
            raise GGUFError(
                f"tensor is missing; layer {there} has it and is of the same kind",
                name=f"blk.{absent}.{suffix}",
            )
