"""What a model has read, found again: a tree of token sequences, whose nodes hold forks of states.

A fork shares its pages with the states that it came from and with those that go on from it, so a beginning
that many requests have in common is stored once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import DeviceError

if TYPE_CHECKING:
    from ..models.adapters import Scales
    from ..models.network import Network
    from ..models.state import State

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

    All methods are called by one thread at a time, or under the network's lock.
    """

    def __init__(self, net: Network, max_bytes: int) -> None:
        self._net, self.max_bytes = net, max_bytes
        self.nbytes = 0  # pages of several states count once
        # LongRoPE rotates long contexts otherwise, and adapters make other keys
        self._roots: dict[tuple[bool, Scales], Node] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()  # nodes with a state, by their last use
        self._holders: Counter[int] = Counter()  # states that hold a page, by the page's number

    def __len__(self) -> int:
        return len(self._used)

    def find(self, ids: Sequence[int], n_ctx: int, scales: Scales = ()) -> State | None:
        """A new state of ``n_ctx`` tokens' room that has read as many of the first ids as are known; or None.

        At least the last id is left to read. ``scales`` are those of the adapters.
        """
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
        if not n or state.spoilt or state.nbytes > self.max_bytes:  # it would only drive others out
            return
        node = self._place(self._root(state.n_ctx, state.scales), state.ids[:n])
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

    def trim(self, max_bytes: int) -> None:
        """Forget what was not used for longest until at most so many bytes are held."""
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
            node.parent, node = (
                None,
                parent,
            )  # no circles, whose memory would wait for the collector

    def _count(self, state: State, change: int) -> None:
        """Note that a state's pages have one holder more, or one less; each counts once."""
        for page, nbytes in state.cache.held().items():
            before = self._holders[page]
            self._holders[page] += change
            if before == 0:
                self.nbytes += nbytes
            elif self._holders[page] == 0:
                self.nbytes -= nbytes
                del self._holders[page]


def needs_snapshots(net: Network) -> bool:
    """Whether states of a model cannot be cut back to any length: recurrent layers, or layers with a window."""
    return any(c.arrays or c.window for c in net.decoder.caches)


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
