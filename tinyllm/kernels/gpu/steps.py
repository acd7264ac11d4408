"""Recorded steps: the launches of a step, replayed without running Python again.

A step whose key and shape have come before differs only in the values of its batch, which kernels read
from device memory. The first time it runs directly (kernels are compiled, memory is taken), the second time
it is recorded, and from then on it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..backend import Batch
from . import batch as batches
from .arrays import GPUArray
from .batch import Resident
from .kvcache import GPUCache

if TYPE_CHECKING:
    from .backend import GPUBackend

MOST_ROWS = (
    512  # in a recorded step; on more rows a device works longer than Python takes to launch
)
FIRST = 2  # the row of ``found`` in src/choose.c that holds the first ids
MOST_STEPS = 32  # recordings that are kept


class NotRecordable(Exception):
    """The step copies something to or from the device."""


@dataclass
class Recorded:
    """A step that was run before: where its batch lies, and, once it is recorded, how to replay it."""

    batch: Resident
    replay: Callable[[], None] | None = None
    result: Any = None
    refused: bool = False  # it cannot be recorded
    new: bool = False  # this is its first run, in which kernels are compiled and memory is taken


class Steps:
    """The recorded steps of one backend; the least recently used is forgotten first."""

    def __init__(self, be: GPUBackend) -> None:
        self.be = be
        self._known: dict[Hashable, Recorded] = {}
        self.count = 0  # steps that were run

    def forget(self) -> None:
        """Drop all steps: their buffers are going to be freed."""
        self._known.clear()

    def run(
        self,
        key: Hashable,
        fn: Callable[[Batch], Any],
        batch: Batch,
        found: GPUArray | None = None,
    ) -> Any:
        """Run fn on the batch, or replay its recording, and return its result.

        With ``found``, from ``pick`` for as many rows, the ids of the batch are the first that it holds for
        each row.
        """
        self.count += 1
        caches = batches.with_room(batch)
        n_pages = batches.page_stride(caches)
        full = key, shape_of(batch), n_pages, versions(caches)
        known = self._known.pop(full, None)
        if known is None:
            known = Recorded(Resident(self.be, batch, caches, n_pages), new=True)
        else:
            known.batch.write(self.be, batch, caches)
        self._remember(full, known)
        if found is not None:
            nbytes = 4 * batch.n_seq
            self.be.copy(known.batch.arrays["ids"].buffer, found.buffer, nbytes, FIRST * nbytes)
        if known.replay is None and not known.new and not known.refused:
            self._record(known, fn, batch)
        known.new = False
        if known.replay is None:
            return fn(known.batch.holding(batch))
        known.replay()
        return known.result

    def _record(self, known: Recorded, fn: Callable[[Batch], Any], batch: Batch) -> None:
        on_device = known.batch.holding(batch)
        try:
            known.replay, known.result = self.be.record(lambda: settled(fn(on_device)))
        except NotRecordable:
            known.refused = True

    def _remember(self, key: Hashable, known: Recorded) -> None:
        self._known[key] = known
        while len(self._known) > MOST_STEPS:
            del self._known[next(iter(self._known))]


def shape_of(batch: Batch) -> Hashable:
    """Recorded steps of one shape differ only in array values and caches."""
    kinds = bool(batch.caches), batch.scales is None, batch.source is None
    return batch.starts.tobytes(), batch.n_out, kinds


def versions(caches: list[GPUCache]) -> Hashable:
    """A key of the buffers that the caches are in: recorded steps hold their addresses."""
    return tuple(sorted((id(store), store.version) for store in {c.store for c in caches}))


def settled(result: Any) -> Any:
    """The result of a step, with all that was pending in it launched."""
    for array in result if isinstance(result, tuple) else (result,):
        if isinstance(array, GPUArray):
            _ = array.buffer
    return result
