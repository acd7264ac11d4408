"""The largest of many logits that lie on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import NumericError

SIGN = np.uint32(1 << 31)


@dataclass(slots=True)
class Best:
    """The largest logits of a row, as a device found them.

    ``finite``: is every logit of the row a finite number? ``pairs`` int32 [n, 2] has an id and a key
    in each row, in no order: all logits down to some bound; None where they were too many. Keys are unsigned;
    larger logits have larger ones. ``all`` fetches the row itself, float32 [n_vocab], until the next step.
    """

    finite: bool
    pairs: np.ndarray | None
    all: Callable[[], np.ndarray]

    def sorted(self, n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The first n ids int32 and values, largest first, equal ones in the order of their ids."""
        assert self.pairs is not None
        ids, keys = self.pairs.T
        both = (keys.astype(np.uint32).astype(np.int64) << 31) - ids  # 63 bits
        both.sort()
        both = both[::-1][:n]
        ids = -both & 0x7FFFFFFF
        keys = (both + ids >> 31).astype(np.uint32)
        values = np.where(keys & SIGN, keys ^ SIGN, ~keys).view(np.float32)
        return ids.astype(np.int32), values

    def first(self) -> int:
        """The smallest id of the largest."""
        assert self.pairs is not None
        return int(self.pairs[0, 0]) if len(self.pairs) == 1 else int(self.sorted(1)[0][0])


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of logits [n]: ids int32 and values, largest first, equal ones in the order of their ids.

    Raises NumericError for NaN, for +inf, and when every logit is -inf.
    """
    if k == 1:
        ids = np.array([logits.argmax()], np.int32)  # a NaN comes first
        check_largest(float(logits[ids[0]]))
        return ids, logits[ids]
    check_largest(float(logits.max()))
    ids = _candidates(logits, k)
    ids = ids[np.argsort(-logits[ids], kind="stable")[:k]]
    return ids.astype(np.int32), logits[ids]


def check_largest(logit: float) -> None:
    """NumericError unless the largest of all logits (NaN if there is one) is a number that can be drawn."""
    if logit == -math.inf:
        raise NumericError("every token is forbidden (all logits are -inf); allow at least one")
    if not math.isfinite(logit):
        raise NumericError(f"found a logit of {logit}; expected finite numbers, or -inf to forbid")


def _candidates(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids, in order, of all logits [n] not below a bound that k of them reach, and few more do.

    The k-th largest of the maxima of n / 64 columns is such a bound, at a third of a partition's cost.
    """
    n, columns = len(logits), len(logits) // 64
    if k >= n:
        return np.arange(n)
    heads = logits[: 64 * columns].reshape(64, columns).max(axis=0) if k < columns else logits
    bound = np.partition(heads, len(heads) - k)[len(heads) - k]
    return np.flatnonzero(logits >= bound)
