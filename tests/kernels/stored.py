"""Random activations, and random weights as tensors of a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinyllm.gguf import quants
from tinyllm.kernels.lab import random_blocks


@dataclass
class Stored:
    """Bytes as a tensor of a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    raw: np.ndarray  # [rows, row_bytes]

    @property
    def values(self) -> np.ndarray:
        """What the bytes mean, float32 [*shape]."""
        return quants.dequantize(self.type, self.raw).reshape(self.shape)

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return self.raw[start:stop]
        out.reshape(stop - start, -1)[...] = self.raw[start:stop]
        return out


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal values, float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def stored(type_name: str, *shape: int, seed: int = 1, written: bool = True) -> Stored:
    """Random weights of about unit size in any format; random bytes with sane scales where none is written.

    Those are the same bytes on every processor, as what quantisers write need not be.
    """
    rows, n = int(np.prod(shape[:-1])), shape[-1]
    f = quants.FORMATS[type_name]
    if written and f.quantize is not None:
        raw = quants.quantize(type_name, normal(rows, n, seed=seed))
    else:
        rng = np.random.default_rng(seed)
        raw = random_blocks(f, rows * n // f.block_size, rng).reshape(rows, -1)
    return Stored(f"{type_name}.weight", type_name, shape, raw)
