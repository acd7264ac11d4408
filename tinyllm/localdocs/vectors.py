"""All vectors of a store in memory, and the exact search among them: a product of one matrix with the question.

The rows have 8 bits a number and stand in the layout of the CPU's kernels, which multiply them as they do a
model's Q8_0 weights: at the speed at which memory is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import system
from ..errors import StateError
from ..kernels.backend import Backend
from ..kernels.devices import open_backend
from .embedding import KIND, padded, row_bytes
from .store import Store

SEGMENT = 1 << 16  # rows of a matrix; the last one is loaded again when rows come


@dataclass(frozen=True)
class Rows:
    """Stored vectors as a backend loads them: a tensor of ``KIND``."""

    raw: np.ndarray  # uint8 [n, row_bytes]
    shape: tuple[int, ...]
    name: str = "vectors"
    type: str = KIND

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes of some rows."""
        if out is None:
            return self.raw[start:stop]
        out[...] = self.raw[start:stop].reshape(out.shape)
        return out


@dataclass(frozen=True)
class Segment:
    """Up to SEGMENT vectors: their numbers in the store, ascending, and the matrix."""

    ids: np.ndarray
    weight: Any


class Vectors:
    """The vectors of a store, brought up to date at each search."""

    def __init__(self, store: Store, width: int, n_threads: int | None = None) -> None:
        self._store, self._width = store, width
        self._n_threads = n_threads
        self._backend: Backend | None = None
        self._segments: list[Segment] = []
        self._removals = ""
        self._allowed: tuple[Any, np.ndarray] = None, np.empty(0, np.int64)

    def __len__(self) -> int:
        return sum(len(s.ids) for s in self._segments)

    @property
    def backend(self) -> Backend:
        """What multiplies."""
        if self._backend is None:
            self._backend = open_backend("cpu", self._n_threads)
        return self._backend

    def refresh(self) -> None:
        """Load what has come since the last time; all again where something was taken out."""
        removals = self._store.setting("removals") or "0"
        last = self._segments[-1].ids[-1] if self._segments else 0
        newest = self._store.one("SELECT max(id) FROM vectors") or 0
        if removals != self._removals:
            self._segments = []
        elif newest == last:
            return
        self._removals = removals
        if self._segments and len(self._segments[-1].ids) < SEGMENT:
            self._segments.pop()
        self._check_memory()
        after = int(self._segments[-1].ids[-1]) if self._segments else 0
        cursor = self._store.db.execute(
            "SELECT id, codes FROM vectors WHERE id > ? ORDER BY id", (after,)
        )
        while rows := cursor.fetchmany(SEGMENT):
            ids = np.array([i for i, _ in rows], np.int64)
            raw = np.frombuffer(b"".join(codes for _, codes in rows), np.uint8)
            raw = raw.reshape(len(rows), row_bytes(self._width))
            source = Rows(raw, (len(rows), -(-self._width // 32) * 32))
            self._segments.append(Segment(ids, self.backend.load(source)))

    def _check_memory(self) -> None:
        n = self._store.one("SELECT count(*) FROM vectors")
        held = sum(len(s.ids) for s in self._segments)
        wanted, free = nbytes(n - held, self._width), system.available_bytes()
        if wanted > free:
            raise StateError(
                f"the vectors of {n:,} texts take {wanted / 1e6:,.0f} MB more, {free / 1e6:,.0f} MB are free"
            )

    def allowed(self, where: str, values: Sequence[Any]) -> np.ndarray:
        """The numbers, ascending, of vectors whose chunks fulfil a condition; kept for the next query."""
        newest = self._store.rows(
            "SELECT max(id) FROM chunks UNION ALL SELECT max(id) FROM vectors"
        )
        key = where, tuple(values), newest
        if self._allowed[0] != key:
            rows = self._store.rows(
                "SELECT DISTINCT v.id FROM documents d JOIN chunks c ON c.document = d.id"
                f" JOIN vectors v ON v.digest = c.digest WHERE {where} ORDER BY v.id", *values,
            )  # fmt: skip
            self._allowed = key, np.array([i for (i,) in rows], np.int64)
        return self._allowed[1]

    def best(
        self, query: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k vectors nearest to a query [width]: their numbers and their products with it, best first.

        ``allowed`` has the numbers, ascending, of those that count; None: all.
        """
        if not self._segments:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        be = self.backend
        x = be.array(padded(query[None].astype(np.float32)))
        products = be.matmuls([s.weight for s in self._segments], x, [None] * len(self._segments))
        scores = np.concatenate([be.numpy(y).reshape(-1) for y in products])
        ids = np.concatenate([s.ids for s in self._segments])
        if allowed is not None:
            at = np.searchsorted(ids, allowed)
            at = at[(at < len(ids)) & (ids[np.minimum(at, len(ids) - 1)] == allowed)]
            ids, scores = ids[at], scores[at]
        if not len(ids):
            return ids, scores
        found, values = be.top_k(np.ascontiguousarray(scores), min(k, len(ids)))
        return ids[found], values


def nbytes(n: int, width: int) -> int:
    """Bytes that a search among n vectors takes: rows, numbers, products, and a segment as it is read."""
    return n * (row_bytes(width) + 8 + 8) + min(n, SEGMENT) * (row_bytes(width) + 256)
