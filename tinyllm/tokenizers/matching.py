"""Finding the tokens that a text goes on with, quickly and with little memory.

Instead of a trie: the lengths that tokens have, by the first two symbols. Real vocabularies have few
lengths for each, and a slice with a dictionary look-up costs less than a walk through nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

S = TypeVar("S", str, bytes)


class Matcher(Generic[S]):
    """The tokens that begin at a place of a text.

    Parameters
    ----------
    tokens : iterable of str or of bytes
        Those to be found; empty ones never are.
    """

    def __init__(self, tokens: Iterable[S]) -> None:
        self.tokens: frozenset[S] = frozenset(t for t in tokens if t)
        lengths: defaultdict[S, set[int]] = defaultdict(set)
        for token in self.tokens:
            lengths[token[:2]].add(len(token))
        self._lengths: dict[S, tuple[int, ...]] = {
            head: tuple(sorted(n)) for head, n in lengths.items()
        }

    def ends(self, text: S, at: int) -> Iterator[int]:
        """Where the tokens that begin at `at` end, ascending."""
        for n in self._of(text, at):
            if text[at : at + n] in self.tokens and at + n <= len(text):
                yield at + n

    def longest(self, text: S, at: int) -> int:
        """Where the longest token that begins at `at` ends; `at` if there is none."""
        return max(self.ends(text, at), default=at)

    def _of(self, text: S, at: int) -> Iterator[int]:
        head = text[at : at + 2]
        if head[:1] in self.tokens:
            yield 1
        if len(head) == 2:
            yield from self._lengths.get(head, ())
