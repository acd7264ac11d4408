"""The stored past of a sequence as a table of pages, which several sequences may share.

A page holds a fixed number of positions of all layers that look back equally far: they need it equally long.
A cache takes a page when a position of it is first written, copies one that it shares before it writes there,
and gives back those that lie behind every position its layers still look at.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from ..errors import ContextOverflow, StateError
from .batch import SLACK, Cache, LayerCache

if TYPE_CHECKING:
    from typing_extensions import Self


class Page:
    """Memory for some positions of the layers of one window.

    ``holders`` has one entry for each cache with this page in its table. It is a list because caches are
    collected in any thread, and ``append`` and ``pop`` cannot be interrupted.
    """

    __slots__ = ("__weakref__", "holders", "memory")

    def __init__(self, memory: Any) -> None:
        self.memory, self.holders = memory, [True]

    @property
    def shared(self) -> bool:
        """Whether another cache reads it too."""
        return len(self.holders) > 1


Pages: TypeAlias = "list[Page | None]"  # None: not yet written, or given back


class PagedCache(Cache):
    """What all backends' caches have in common: which pages a sequence holds, and when they change.

    ``groups`` lists the attention layers of each window. Positions from ``ready_from`` to ``ready_to`` can be
    written as they are: their pages are there, and nobody else reads them.
    """

    page_size: ClassVar[int]  # positions

    def __init__(self, layers: Sequence[LayerCache], n_ctx: int) -> None:
        self.layers, self.n_ctx = tuple(layers), n_ctx
        self.groups = self.groups_of(layers)
        self.windows = [layers[group[0]].window for group in self.groups]
        self.pages: list[Pages] = [[] for _ in self.groups]
        self.ready_from = self.ready_to = 0
        weakref.finalize(self, let_go_of_all, self.pages).atexit = False

    @staticmethod
    def groups_of(layers: Sequence[LayerCache]) -> list[list[int]]:
        """The numbers of the attention layers of each window."""
        attending = [i for i, c in enumerate(layers) if c.n_head_kv]
        windows = sorted({layers[i].window for i in attending})
        return [[i for i in attending if layers[i].window == w] for w in windows]

    # ---- what a backend provides

    @abstractmethod
    def empty(self, n_ctx: int) -> Self:
        """Another cache for the same layers, with nothing stored and room for ``n_ctx`` positions."""

    @abstractmethod
    def take(self, group: int) -> Page:
        """A new page for a group of layers, for this cache alone."""

    @abstractmethod
    def copy(self, group: int, to: Page, source: Page) -> None:
        """Copy what a page holds."""

    @abstractmethod
    def copy_arrays(self, source: Self) -> None:
        """Copy another cache's recurrent arrays to here."""

    @abstractmethod
    def page_bytes(self, group: int) -> int:
        """Bytes of a page of a group of layers."""

    def place(self, group: int, block: int, page: Page) -> None:
        """Note for the kernels that a page stands at a place of the table."""

    # ---- the table

    def reserve(self, first: int, end: int) -> None:
        """Make the positions from ``first`` to ``end`` writable; the positions before them are stored.

        Raises
        ------
        ContextOverflow
            There are more positions than the context has.
        """
        if end > self.n_ctx:
            raise ContextOverflow(f"{end} positions do not fit into a context of {self.n_ctx}")
        if self.ready_from <= first and end <= self.ready_to:
            return
        size = self.page_size
        start, stop = first // size, -(-end // size)
        if not self.ready_from <= first <= self.ready_to:
            self.ready_from = start * size
        for group, (window, pages) in enumerate(zip(self.windows, self.pages, strict=True)):
            if window:
                self._give_back(pages, (first - window - SLACK) // size)
            self._own(group, start, stop)
        self.ready_to = stop * size

    def _own(self, group: int, start: int, stop: int) -> None:
        """Have pages of this cache alone at some places of a group's table."""
        pages = self.pages[group]
        pages += [None] * (stop - len(pages))
        for block in range(start, stop):
            page = pages[block]
            if page is None or page.shared:
                new = self.take(group)
                if page is not None:
                    self.copy(group, new, page)
                    page.holders.pop()
                pages[block] = new
                self.place(group, block, new)

    def begin_anew(self, n: int) -> None:
        """Have pages for what position ``n`` looks at, and no others: all of it will be written."""
        self.truncate(0)
        for group in range(len(self.pages)):
            self._own(group, self.first_read(group, n), -(-n // self.page_size))

    def _give_back(self, pages: Pages, n: int) -> None:
        """Let go of the first n pages of a table."""
        if n > 0:
            self.ready_from = max(self.ready_from, n * self.page_size)
            gone = pages[:n]
            pages[:n] = [None] * len(gone)
            let_go(gone)

    def truncate(self, n: int) -> None:
        stop = -(-n // self.page_size)
        for pages in self.pages:
            gone = pages[stop:]
            del pages[stop:]
            let_go(gone)
        self.ready_to = min(self.ready_to, stop * self.page_size)
        self.ready_from = min(self.ready_from, self.ready_to)

    def fork(self, n_ctx: int) -> Self:
        other = self.empty(n_ctx)
        most = -(-n_ctx // self.page_size)
        for group, pages in enumerate(self.pages):
            for block, page in enumerate(pages[:most]):
                other.pages[group].append(page)
                if page is not None:
                    page.holders.append(True)
                    other.place(group, block, page)
        other.copy_arrays(self)
        self.ready_from = self.ready_to = 0
        return other

    def first_read(self, group: int, n: int) -> int:
        """The number of the first page that a group of layers reads for position ``n``."""
        window = self.windows[group]
        return max(n - window + 1, 0) // self.page_size if window else 0

    def holds(self, n: int) -> bool:
        for group, pages in enumerate(self.pages):
            first = self.first_read(group, n)
            if None in pages[first : -(-n // self.page_size)]:
                return False
        return True

    def holds_all(self, n: int) -> bool:
        return not any(None in pages[: -(-n // self.page_size)] for pages in self.pages)

    @property
    def nbytes(self) -> int:
        held = (len(pages) - pages.count(None) for pages in self.pages)
        paged = sum(n * self.page_bytes(group) for group, n in enumerate(held))
        arrays = (shape for layer in self.layers for _, shape in layer.arrays)
        return paged + sum(4 * prod(shape) for shape in arrays)

    def held(self) -> dict[int, int]:
        return {
            id(page): self.page_bytes(group)
            for group, pages in enumerate(self.pages)
            for page in pages
            if page is not None
        }


def let_go(pages: Pages) -> None:
    """Note that a cache no longer has these pages in its table."""
    for page in pages:
        if page is not None:
            page.holders.pop()


def let_go_of_all(tables: list[Pages]) -> None:
    """Note that a cache is gone."""
    for pages in tables:
        let_go(pages)


def check_saved(expected: dict[str, np.ndarray], arrays: dict[str, np.ndarray], n_ctx: int) -> int:
    """The number of positions in saved arrays; StateError unless they are like ``export(0)``."""
    if set(expected) != set(arrays):
        raise StateError(f"saved state has arrays {sorted(arrays)}; expected {sorted(expected)}")
    lengths = {0}
    for name, want in expected.items():
        here, stored = arrays[name], name.split(".", 1)[1] in ("k", "v")
        shape = (len(here), *want.shape[1:]) if stored else want.shape
        fits = not stored or len(here) <= n_ctx
        if here.shape != shape or here.dtype != want.dtype or not fits:
            raise StateError(
                f"saved array {name} is {here.dtype} {here.shape}; "
                f"expected {want.dtype} {shape}, at most {n_ctx} positions"
            )
        lengths |= {len(here)} if stored else set()
    if len(lengths - {0}) > 1:
        raise StateError(f"saved arrays hold different numbers of positions: {sorted(lengths)}")
    return max(lengths)
