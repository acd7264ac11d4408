"""Find the tokens that begin at a place of a text, quickly and with little memory.

There is no trie. A table has, for every two first symbols, the lengths of the tokens that begin with them.
Real vocabularies have few lengths for each, and a slice with a dictionary look-up costs less than a walk
through nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Generic, TypeVar

S = TypeVar("S", str, bytes)


class Lengths(Generic[S]):
    """How long the tokens can be that begin at a place of a text.

    Parameters
    ----------
    tokens : iterable of str or of bytes
        The tokens to be found; an empty one never is.
    """

    def __init__(self, tokens: Iterable[S]) -> None:
        by_head: defaultdict[S, set[int]] = defaultdict(set)
        for token in tokens:
            by_head[token[:2]].add(len(token))
        for head in [head for head in by_head if len(head) == 2]:
            by_head[head] |= by_head.get(head[:1], set())
        self._by_head: dict[S, tuple[int, ...]] = {
            head: tuple(sorted(n)) for head, n in by_head.items() if head
        }

    def at(self, text: S, at: int) -> tuple[int, ...]:
        """Lengths, ascending, of the tokens that may begin at `at`: the caller looks up each such slice."""
        head = text[at : at + 2]
        return self._by_head.get(head) or self._by_head.get(head[:1], ())


def longest(lengths: Lengths[S], ids: dict[S, int], text: S, at: int) -> tuple[int, int] | None:
    """The longest token that begins at `at`: where it ends, and its id."""
    for n in reversed(lengths.at(text, at)):
        piece = text[at : at + n]
        i = ids.get(piece)
        if i is not None:
            return at + len(piece), i
    return None
