"""Merge neighbouring symbols, best pair first: the heart of BPE and of SentencePiece's BPE.

The list of merges that a file has is read and checked here, too.

Symbols form a doubly linked list. Every mergeable pair waits in a heap under one integer, `rank` times
the number of symbols plus the position of its left symbol, so the best pair, and of equals the leftmost,
comes out first. A pair that has changed since is recognised by its rank. n symbols take O(n log n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from ..gguf import StringArray
from .membership import Known, Strings, all_differ
from .vocab import Vocab, key_error

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


def read_merges(vocab: Vocab, required: bool) -> Sequence[str]:
    """The merges of `tokenizer.ggml.merges`, "left right", best first.

    Raises
    ------
    GGUFError
        If one is not two tokens with a space between whose union is a token, or stands twice.
    """
    merges, tokens = vocab.stored("merges", required), vocab.get("tokens")
    if isinstance(merges, StringArray) and isinstance(tokens, StringArray):
        if _well_formed(merges, tokens):
            return merges
    _check_singly(list(merges), vocab)
    return merges


def _check_singly(merges: list[str], vocab: Vocab) -> None:
    """Check one merge after the other; the error names the one that is wrong."""
    for i, m in enumerate(merges):
        if " " not in m:
            raise key_error("merges", f"merge {i}, {m[:40]!r}, is not two tokens with a space")
    for i, m in enumerate(merges):
        at = m.find(" ", 1)
        left, right = m[:at], m[at + 1 :]
        if not {left, right, left + right} <= vocab.ids.keys():
            raise key_error("merges", f"merge {i}, {m[:40]!r}, is of or to no token")
    if len(set(merges)) < len(merges):
        raise key_error("merges", "a merge stands twice")


def _well_formed(merges: StringArray, tokens: StringArray) -> bool:
    """Check all merges together, in a tenth of the time; False may also mean that this cannot tell.

    It cannot where a token holds a space or a zero byte.
    """
    memory, ends, starts, n = merges.memory, merges.ends, merges.starts(), len(merges)
    spaces = np.flatnonzero(np.frombuffer(memory, np.uint8) == ord(" "))
    if len(spaces) != n or merges.holds_zeros or tokens.holds_zeros:
        return False
    if not ((starts < spaces) & (spaces < ends - 1)).all():
        return False
    known = Known(Strings(tokens.memory, tokens.starts(), tokens.ends))
    before = np.arange(n)  # spaces that are left out
    unions = Strings(memory.replace(b" ", b""), starts - before, ends - before - 1)
    whole = Strings(memory, starts, ends)
    halves = whole.others(np.concatenate([starts, spaces + 1]), np.concatenate([spaces, ends]))
    return known.has_all(unions) and known.has_all(halves) and all_differ(whole)
