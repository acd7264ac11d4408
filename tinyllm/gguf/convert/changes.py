"""What is done to the values of some tensors on their way from Hugging Face's order to GGUF's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Config = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """A function of the configuration and all values of a tensor, and the shape that it gives.

    ``by_rows``: it orders whole rows, and so the rows of a factor too; ``linear``: PEFT's factors of the tensor
    have GGUF's order already.
    """

    values: Callable[[Config, Floats], Floats]
    shape: Callable[[Config, Shape], Shape] = lambda c, s: s
    by_rows: bool = False
    linear: bool = False


def permuted(heads: str) -> Change:
    """Rows of each head in the order of GGUF, which turns neighbours; transformers turns two halves."""

    def values(c: Config, x: Floats) -> Floats:
        n = c.get(heads) or c["num_attention_heads"]
        paired: Floats = x.reshape(n, 2, -1, *x.shape[1:]).swapaxes(1, 2)
        return paired.reshape(x.shape)

    return Change(values, by_rows=True)


increased = Change(lambda c, x: x + np.float32(1))  # Gemma stores a norm's weight less 1
transposed = Change(
    lambda c, x: np.ascontiguousarray(x.T) if x.ndim == 2 else x, lambda c, s: s[::-1], linear=True
)
minus_exp = Change(lambda c, x: -np.exp(x.astype(np.float64)).astype(np.float32))
squeezed = Change(
    lambda c, x: x.squeeze(1) if x.ndim == 3 else x,
    lambda c, s: (s[0], s[2]) if len(s) == 3 else s,
)
gates = Change(  # the first half of each expert's rows, if a stack holds gate and up
    lambda c, x: x[:, : x.shape[1] // 2], lambda c, s: (s[0], s[1] // 2, s[2])
)
ups = Change(lambda c, x: x[:, x.shape[1] // 2 :], lambda c, s: (s[0], s[1] // 2, s[2]))


def _after_padding(c: Config) -> int:
    return int(c["pad_token_id"]) + 1 if c.get("pad_token_id") is not None else 0


# RoBERTa's positions begin behind that of the padding token
above_table = Change(
    lambda c, x: x[_after_padding(c) :], lambda c, s: (s[0] - _after_padding(c), s[1])
)


def _neox(c: Config, x: Floats) -> Floats:
    """Rows ordered by head, then q, k, v -> all of q, all of k, all of v."""
    heads: Floats = x.reshape(c["num_attention_heads"], 3, -1, *x.shape[1:]).swapaxes(0, 1)
    return heads.reshape(x.shape)


def _falcon(c: Config, x: Floats) -> Floats:
    """Rows ordered by key head, its queries first -> all of q, all of k, all of v."""
    n_head, n_kv = falcon_heads(c)
    groups = x.reshape(n_kv, n_head // n_kv + 2, -1, *x.shape[1:])
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return np.concatenate([p.reshape(-1, *x.shape[1:]) for p in parts])


def falcon_heads(c: Config) -> tuple[int, int]:
    """Query heads and key heads."""
    n_head = c.get("num_attention_heads") or c["n_head"]
    old = 1 if c.get("multi_query", True) and not c.get("new_decoder_architecture") else None
    return n_head, old or c.get("num_kv_heads") or c.get("n_head_kv") or 1


neox_qkv, falcon_qkv = Change(_neox, by_rows=True), Change(_falcon, by_rows=True)
