"""Merging neighbouring symbols, best pair first: the heart of BPE and of SentencePiece's BPE.

Symbols form a doubly linked list. Every mergeable pair waits in a heap under one integer, `rank` times
the number of symbols plus the position of its left symbol, so the best pair, and of equals the leftmost,
comes out first. A pair that has changed since is recognised by its rank. n symbols take O(n log n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

Rank = Callable[[str, str], int | None]


def merge(symbols: Sequence[str], rank: Rank) -> list[str]:
    """Merge until no pair is left that has a rank.

    Parameters
    ----------
    symbols : sequence of str
        Usually the characters of a word.
    rank : callable
        The rank of (left, right), lower merged earlier; None if they do not merge.

    Returns
    -------
    list of str
        The symbols that remain, in order.
    """
    n = len(symbols)
    if n < 2:
        return list(symbols)
    text: list[str] = list(symbols)  # "" once merged into its left neighbour
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    ranks = [rank(a, b) for a, b in pairwise(symbols)]
    heap = [r * n + i for i, r in enumerate(ranks) if r is not None]
    heapify(heap)
    ranks.append(None)

    while heap:
        r, i = divmod(heappop(heap), n)
        if ranks[i] != r:
            continue
        j = after[i]
        k = after[j]
        text[i] += text[j]
        text[j], ranks[j], after[i] = "", None, k
        if k < n:
            before[k] = i
        for left, right in ((before[i], i), (i, k)):
            if left >= 0:
                new = ranks[left] = rank(text[left], text[right]) if right < n else None
                if new is not None:
                    heappush(heap, new * n + left)
    return [t for t in text if t]
