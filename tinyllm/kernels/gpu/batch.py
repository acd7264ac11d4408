"""The rows of a step, with all that kernels read about them on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError
from ..backend import Batch
from .arrays import GPUArray
from .kvcache import GPUCache, Store

if TYPE_CHECKING:
    from .backend import GPUBackend

Tiles = tuple[GPUArray, int]


@dataclass(frozen=True)
class DeviceBatch(Batch):
    """A Batch on the device.

    ``seqs`` [T] is each row's sequence, ``pages`` [n_seq, n_pages] say where a sequence's positions are stored,
    for the layers of each window, ``slots`` [n_seq] where its recurrent arrays are; ``whole`` is the one array
    that holds them all.
    """

    host: Batch
    seqs: GPUArray
    pages: tuple[GPUArray, ...]
    slots: GPUArray
    n_pages: int
    whole: GPUArray
    tiles: dict[int, Tiles] = field(default_factory=dict)


ALIGNMENT = 512  # bytes; a part of an OpenCL buffer begins at a multiple of 128 to 512
FEWEST_PAGES = 16  # columns of a page table: for each number of columns a step is recorded anew
CHANGING = (
    "ids",
    "positions",
    "n_past",
    "outputs",
    "scales",
)  # what differs among batches of one key
GIVEN = ("starts", *CHANGING)


class Resident:
    """A batch's place on the device: its arrays lie side by side, and one copy brings them there.

    ``write`` puts another batch of the same key in that place; only what changed is laid out again.
    """

    def __init__(self, be: GPUBackend, batch: Batch, caches: list[GPUCache], n_pages: int) -> None:
        arrays = {n: np.asarray(x) for n in GIVEN if (x := getattr(batch, n)) is not None}
        numbers = np.arange(batch.n_seq, dtype=np.int32)
        arrays["seqs"] = np.repeat(numbers, np.diff(batch.starts))
        arrays["slots"] = np.zeros(batch.n_seq, np.int32)
        n_groups = len(caches[0].groups) if caches else 0
        self._tables = [f"pages{group}" for group in range(n_groups)]
        for name in self._tables:
            arrays[name] = np.zeros((batch.n_seq, n_pages), np.int32)
        self.n_pages = n_pages
        self._packed = np.zeros(sum(aligned(x.nbytes) for x in arrays.values()) // 4, np.int32)
        self._views = dict(zip(arrays, parts_of(self._packed, arrays.values()), strict=True))
        self._marks: list[int] = []
        for name in ("starts", "seqs"):
            self._views[name][...] = arrays[name]
        self._lay(batch, caches)
        self.whole = be.array(self._packed)
        self.tiles: dict[int, Tiles] = {}
        self.arrays: dict[str, GPUArray] = {}
        at = 0
        for name, x in arrays.items():
            part = be.view(self.whole.buffer, at, max(x.nbytes, 4))
            self.arrays[name] = GPUArray(x.shape, x.dtype, part, None, self.whole)
            at += aligned(x.nbytes)

    def _lay(self, batch: Batch, caches: list[GPUCache]) -> None:
        """Write what may differ to its place on the host."""
        for name in CHANGING:
            if name in self._views:
                self._views[name][...] = getattr(batch, name)
        marks = [cache.mark for cache in caches]
        if marks == self._marks:
            return
        slots, tables = self._views["slots"], [self._views[name] for name in self._tables]
        for row, cache in enumerate(caches):
            slots[row] = cache.slot
            for table, pages, numbers in zip(tables, cache.pages, cache.numbers, strict=True):
                table[row, : len(pages)] = numbers[: len(pages)]
        self._marks = marks

    def write(self, be: GPUBackend, batch: Batch, caches: list[GPUCache]) -> None:
        """Copy another batch over the one that is there."""
        self._lay(batch, caches)
        be.put(self.whole.buffer, 0, self._packed)

    def holding(self, batch: Batch) -> DeviceBatch:
        """The batch that was written last, with its arrays on the device."""
        rest: dict[str, Any] = {
            f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in self.arrays
        }
        rest |= {name: x for name, x in self.arrays.items() if name not in self._tables}
        rest |= {"pages": tuple(self.arrays[name] for name in self._tables)}
        rest |= {"host": batch, "n_pages": self.n_pages}
        return DeviceBatch(**rest, whole=self.whole, tiles=self.tiles)


def upload(be: GPUBackend, batch: Batch) -> DeviceBatch:
    """Copy a batch to the device in one piece."""
    caches = with_room(batch)
    here = Resident(be, batch, caches, page_stride(caches)).holding(batch)
    return here if batch.source is None else replace(here, source=upload(be, batch.source))


def on_device(be: GPUBackend, batch: Batch) -> DeviceBatch:
    """The batch as ``step`` gives it to operations; one from the host is copied first."""
    return batch if isinstance(batch, DeviceBatch) else upload(be, batch)


def shared_store(batch: DeviceBatch) -> Store:
    """The store that holds the past of all sequences of a batch."""
    stores = {id(c.store): c.store for c in batch.caches if isinstance(c, GPUCache)}
    if len(stores) != 1:
        raise ArgumentError("the sequences of a batch need caches of one model and one kv_type")
    return next(iter(stores.values()))


def with_room(batch: Batch) -> list[GPUCache]:
    """The batch's caches, with room for its new rows. The buffers of their stores may have moved for that."""
    caches = [cache for cache in batch.caches if isinstance(cache, GPUCache)]
    if len(caches) != len(batch.caches):
        raise ArgumentError("a batch holds caches of another backend")
    if caches:
        ends = batch.n_past + batch.starts[1:] - batch.starts[:-1]
        for cache, first, end in zip(caches, batch.n_past.tolist(), ends.tolist(), strict=True):
            cache.reserve(first, end)
    return caches


def page_stride(caches: list[GPUCache]) -> int:
    """The number of columns of the page table: a power of two, so that few different steps are recorded."""
    most = max((len(pages) for cache in caches for pages in cache.pages), default=0)
    return max(1 << (most - 1).bit_length(), FEWEST_PAGES) if most else 1


def parts_of(packed: np.ndarray, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Views of int32 ``packed``, one for each of the arrays, at offsets that a device can address."""
    at = 0
    for x in arrays:
        yield packed[at : at + x.nbytes // 4].view(x.dtype).reshape(x.shape)
        at += aligned(x.nbytes) // 4


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to where the next array may begin."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


def row_tiles(be: GPUBackend, batch: DeviceBatch, rows: int) -> Tiles:
    """Each sequence's rows in runs of at most ``rows``: int32 [n, 3] of sequence, first row, count; and n."""
    if rows not in batch.tiles:
        starts = batch.host.starts
        table = [
            (s, first, min(rows, int(starts[s + 1]) - first))
            for s in range(batch.n_seq)
            for first in range(int(starts[s]), int(starts[s + 1]), rows)
        ]
        batch.tiles[rows] = be.array(np.array(table, np.int32)), len(table)
    return batch.tiles[rows]
