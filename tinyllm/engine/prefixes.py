"""What a model has read, found again: a tree of token sequences, whose nodes hold forks of states.

A fork shares its pages with the states that it came from and with those that go on from it, so a beginning
that many requests have in common is stored once.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import ArgumentError, DeviceError
from ..models.step import hook_of

if TYPE_CHECKING:
    from ..models.adapters import Scales
    from ..models.network import Network
    from ..models.state import State

WORTH_WAITING = 32  # tokens that texts have in common, for the others to wait while one reads them
SNAPSHOT = 512  # tokens between two forks of a state that cannot be cut back to any length


class Node:
    """A run of tokens behind those of its parents; ``state`` has read all of them, if it is there."""

    __slots__ = ("children", "ids", "parent", "state")

    def __init__(self, ids: list[int], parent: Node | None) -> None:
        self.ids, self.parent = ids, parent
        self.children: dict[int, Node] = {}
        self.state: State | None = None


class Prefixes:
    """Forks of states by what they have read, the least recently used dropped beyond ``max_bytes``.

    A model has one, for all that write with it: any thread may call its methods. ``max_bytes`` may be changed
    at any time; None is a quarter of the memory that is free now.
    """

    def __init__(self, net: Network, max_bytes: int | None = None) -> None:
        self._net = net
        self.nbytes = 0  # pages of several states count once
        # LongRoPE rotates long contexts otherwise, and adapters make other keys
        self._roots: dict[tuple[bool, Scales], Node] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()  # nodes with a state, by their last use
        self._holders: Counter[int] = Counter()  # states that hold a page, by the page's number
        # how many tokens apart texts are kept; 0: at their ends, as states can be cut back to any length
        recurrent_or_window = any(c.arrays or c.window for c in net.decoder.caches)
        self._apart = SNAPSHOT if recurrent_or_window else 0
        self.max_bytes = quarter_of_free(net) if max_bytes is None else max_bytes

    @property
    def max_bytes(self) -> int:
        """Bytes of keys and values that are kept at most."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, most: int) -> None:
        check_bytes(most)
        self._max_bytes = most
        self.trim(most)

    def __len__(self) -> int:
        return len(self._used)

    def find(self, ids: Sequence[int], n_ctx: int, scales: Scales | None = None) -> State | None:
        """A new state of ``n_ctx`` tokens' room that has read as many of the first ids as are known; or None.

        At least the last id is left to read. ``scales`` are those of the adapters; None: as the model was
        loaded. Where activations may be replaced, nothing is known.
        """
        scales = self._net.adapters.scales if scales is None else scales
        if hook_of(self._net.number, None) is not None:
            return None
        with self._net.lock:
            best: tuple[int, Node] | None = None
            root = self._roots.get((self._net.rope_class(n_ctx), scales))
            for node, n in () if root is None else self._matches(root, ids):
                state = node.state
                assert state is not None
                if (best is None or n > best[0]) and state.can_go_on(n):
                    best = n, node
            if best is None:
                return None
            n, node = best
            self._used.move_to_end(node)
            assert node.state is not None
            return node.state.fork_first(n, n_ctx)

    def new_state(
        self, n_ctx: int, scales: Scales | None = None, source: Sequence[int] | None = None
    ) -> State:
        """``Network.new_state``; what is kept here is forgotten where it needs the memory."""
        try:
            return self._net.new_state(n_ctx, scales, source)
        except (DeviceError, MemoryError):
            if not self._used:
                raise
            self.trim(0)
            return self._net.new_state(n_ctx, scales, source)

    def _root(self, n_ctx: int, scales: Scales) -> Node:
        """The tree of the states that have keys in common."""
        return self._roots.setdefault((self._net.rope_class(n_ctx), scales), Node([], None))

    def _matches(self, node: Node, ids: Sequence[int]) -> Iterator[tuple[Node, int]]:
        """Nodes with a state, and how many ids they share: those on the way, and the nearest behind its end."""
        n, limit = 0, len(ids) - 1
        while n < limit and (child := node.children.get(ids[n])) is not None:
            same = n_same(child.ids, ids[n:limit])
            n += same
            node = child
            if same < len(child.ids):
                break
            if child.state is not None:
                yield child, n
        if n:
            yield from ((below, n) for below in self._below(node) if below.state is not None)

    def _below(self, node: Node) -> Iterator[Node]:
        """A node and the nearest ones behind it that have states."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            yield node
            if node.state is None:
                waiting += node.children.values()

    def add(self, state: State) -> None:
        """Remember what a state has read, sharing its pages."""
        n = state.n_past
        if state.source is not None:  # texts that begin alike are about different ones
            return
        if not n or state.spoilt or state.altered:
            return
        with self._net.lock:
            if state.nbytes > self.max_bytes:  # it would only drive others out
                return
            node = self._place(self._root(state.n_ctx, state.scales), state.ids[:n])
            longer = (x for x in self._below(node) if x.state is not None)
            node = next((x for x in longer if x.state and x.state.can_go_on(n)), node)
            if node.state is None:
                try:
                    node.state = state.fork_first(n, state.n_ctx)
                except (DeviceError, MemoryError):  # recurrent arrays would be copied
                    return
                self._count(node.state, 1)
                self._absorb(node)
            self._used[node] = None
            self._used.move_to_end(node)
            self.trim(self.max_bytes)

    def due(self, n: int, n_prompt: int) -> int:
        """At how many tokens a text is kept next that has ``n``, ``n_prompt`` of them its prompt's.

        Its prompt is, once it is read, as others may begin with it before the text ends.
        """
        if n >= n_prompt:
            return sys.maxsize
        return (
            min(n // self._apart * self._apart + self._apart, n_prompt) if self._apart else n_prompt
        )

    def trim(self, max_bytes: int) -> None:
        """Forget what was not used for longest until at most so many bytes are held."""
        with self._net.lock:
            if self.nbytes <= max_bytes or not self._used:
                return
            while self.nbytes > max_bytes and self._used:
                node, _ = self._used.popitem(last=False)
                self._drop(node)
            # callers choose scales: trees of those that are gone would pile up
            self._roots = {key: root for key, root in self._roots.items() if root.children}

    def _place(self, node: Node, ids: list[int]) -> Node:
        """The node at the end of ids below another, made where it is missing."""
        n = 0
        while n < len(ids):
            child = node.children.get(ids[n])
            if child is None:
                node.children[ids[n]] = child = Node(ids[n:], node)
                return child
            same = n_same(child.ids, ids[n:])
            if same < len(child.ids):
                child = split(child, same)
            node, n = child, n + same
        return node

    def _absorb(self, node: Node) -> None:
        """Let go of states that only this one goes on from, where it can be cut back to them.

        Each has a page of its own, the last, which the longer state copied before it wrote there.
        """
        assert node.state is not None
        n, above = node.state.n_past, node
        while above.parent is not None and len(above.parent.children) == 1:
            n, above = n - len(above.ids), above.parent
            if above.state is not None and node.state.can_go_on(n):
                del self._used[above]
                self._drop(above)

    def _drop(self, node: Node) -> None:
        """Let go of a node's state, and of the nodes that are needed no more."""
        assert node.state is not None
        self._count(node.state, -1)
        node.state = None
        while (parent := node.parent) is not None and node.state is None and not node.children:
            del parent.children[node.ids[0]]
            node.parent = None  # no circles, whose memory would wait for the collector
            node = parent

    def _count(self, state: State, change: int) -> None:
        """Note that a state's pages have one holder more, or one less; each counts once.

        What it has for itself, as recurrent layers do, counts each time.
        """
        pages = state.cache.held()
        self.nbytes += change * (state.nbytes - sum(pages.values()))
        for page, nbytes in pages.items():
            before = self._holders[page]
            self._holders[page] += change
            if before == 0:
                self.nbytes += nbytes
            elif self._holders[page] == 0:
                self.nbytes -= nbytes
                del self._holders[page]


def check_bytes(most: object) -> None:
    """ArgumentError unless this is a number of bytes that may be kept."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ArgumentError(f"prefix_bytes={most!r:.40}; expected a whole number of at least 0")


def quarter_of_free(net: Network) -> int:
    """A quarter of the bytes that are free where a network's layers are."""
    return min(stage.be.memory()[0] for stage in net.stages) // 4


def n_same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences have in common at their beginnings."""
    if a == b[: len(a)]:
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def split(node: Node, n: int) -> Node:
    """Cut a node behind its first n tokens; returns the first part."""
    parent = node.parent
    assert parent is not None
    first = Node(node.ids[:n], parent)
    parent.children[first.ids[0]] = first
    first.children[node.ids[n]] = node
    node.ids, node.parent = node.ids[n:], first
    return first
