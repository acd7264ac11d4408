"""Rows of a sequence -> one vector."""

from __future__ import annotations

import numpy as np

from ..errors import ArgumentError


def pool(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows [T, n_embd] -> [n_embd]: their mean, the first ("cls"), the last, or all of them ("none")."""
    if kind == "none":
        return rows
    if kind == "mean":
        return np.asarray(rows.mean(0, dtype=np.float64).astype(np.float32))
    if kind in ("cls", "last"):
        return np.asarray(rows[0 if kind == "cls" else -1])
    if kind == "rank":
        raise ArgumentError("this is a reranker; use rank(query, documents), or another pooling")
    raise ArgumentError(f"pooling={kind!r}; expected 'none', 'mean', 'cls' or 'last'")


def unit(x: np.ndarray) -> np.ndarray:
    """Each vector of x [.., n] scaled to length 1; a zero vector stays."""
    length = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    return np.asarray((x / np.maximum(length, 1e-12)).astype(np.float32))
