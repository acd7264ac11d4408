"""The head of a reranker: one row of a sequence -> scores. It is small, and runs on the host.

BERT's pooler and classifier, RoBERTa's classification head and ModernBERT's prediction head are all
``output(norm(act(dense(row))))`` with parts left out; which, the tensors say.
"""

from __future__ import annotations

from math import erf

import numpy as np

from .config import Config
from .pooling import pool
from .weights import Tensors


class RankHead:
    """Rows of one sequence [T, E] -> scores [n_label]."""

    def __init__(self, c: Config, w: Tensors) -> None:
        self.rows, self.eps = c.rank_pooling or "cls", c.norm_eps
        first = ("cls.weight", "cls.bias", "cls.norm.weight")
        self.dense = matrix(w, "cls") if w.has(*first) else None
        self.norm = w.host("cls.norm.weight", c.n_embd) if w.has("cls.norm.weight") else None
        single = self.dense is not None and len(self.dense[0]) == 1  # Jina: dense is the last part
        self.output = None if single else matrix(w, "cls.output")
        self.n_label = 1 if self.output is None else len(self.output[0])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        x = pool(rows, self.rows)
        if self.dense is not None:
            x = product(self.dense, x)
            x = np.tanh(x) if self.norm is None else layer_norm(gelu(x), self.norm, self.eps)
        return x if self.output is None else product(self.output, x)


class Projections:
    """Matrices that EmbeddingGemma and others multiply pooled rows by, in turn: [.., E] -> [.., n_out]."""

    def __init__(self, w: Tensors) -> None:
        names = [n for n in ("dense_2", "dense_3") if w.has(f"{n}.weight")]
        self.matrices = [(w.host(f"{n}.weight"), None) for n in names]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for m in self.matrices:
            x = product(m, x)
        return x


def matrix(w: Tensors, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """``name.weight`` [n_out, E] and, if there, ``name.bias``; a single row may be stored flat."""
    weight = np.atleast_2d(w.host(f"{name}.weight"))
    weight = w.host(f"{name}.weight", len(weight), w.c.n_embd) if len(weight) > 1 else weight
    bias = w.host(f"{name}.bias", len(weight)) if w.has(f"{name}.bias") else None
    return weight, bias


def product(m: tuple[np.ndarray, np.ndarray | None], x: np.ndarray) -> np.ndarray:
    """x [.., n_in] times a matrix [n_out, n_in] transposed, plus its bias -> [.., n_out]."""
    weight, bias = m
    y = (x @ weight.astype(np.float64).T).astype(np.float32)
    return np.asarray(y if bias is None else y + bias)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU with the exact error function, as the reference has it."""
    return np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in x.tolist()], np.float32)


def layer_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(dtype=np.float64)
    return np.asarray((x / np.sqrt(np.mean(x * x) + eps) * weight).astype(np.float32))
