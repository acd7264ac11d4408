"""The rows of a step with everything on the device that kernels ask about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError
from ..backend import Batch
from .arrays import GPUArray
from .kvcache import GPUCache

if TYPE_CHECKING:
    from .backend import GPUBackend

Tiles = tuple[GPUArray, int]


@dataclass(frozen=True)
class DeviceBatch(Batch):
    """A Batch on the device.

    ``seqs`` [T] is each row's sequence, ``pages`` [n_seq, n_pages] where its positions are stored,
    ``slots`` [n_seq] where its recurrent arrays are; ``whole`` holds them all.
    """

    host: Batch
    seqs: GPUArray
    pages: GPUArray
    slots: GPUArray
    n_pages: int
    whole: GPUArray
    tiles: dict[int, Tiles] = field(default_factory=dict)


ALIGNMENT = 512  # bytes; OpenCL devices ask for 128 to 512 at the start of a part of a buffer
FEWEST_PAGES = 16  # columns of a table: recording a step costs as much as computing some
CHANGING = ("ids", "positions", "n_past", "outputs")  # among batches of one key
GIVEN = ("starts", *CHANGING)


class Resident:
    """A batch on the device: its arrays lie in one, and are copied as one.

    Another batch of the same key takes its place by ``write``: only what changed is laid out again.
    """

    def __init__(self, be: GPUBackend, batch: Batch, caches: list[GPUCache], n_pages: int) -> None:
        arrays = {name: np.asarray(getattr(batch, name)) for name in GIVEN}
        numbers = np.arange(batch.n_seq, dtype=np.int32)
        arrays["seqs"] = np.repeat(numbers, np.diff(batch.starts))
        arrays["slots"] = np.zeros(batch.n_seq, np.int32)
        arrays["pages"] = np.zeros((batch.n_seq, n_pages), np.int32)
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
        """What may differ, into its place on the host."""
        for name in CHANGING:
            self._views[name][...] = getattr(batch, name)
        marks = [cache.mark for cache in caches]
        if marks == self._marks:
            return
        pages, slots = self._views["pages"], self._views["slots"]
        for row, cache in enumerate(caches):
            slots[row] = cache.slot
            pages[row, : len(cache.pages)] = cache.pages
        self._marks = marks

    def write(self, be: GPUBackend, batch: Batch, caches: list[GPUCache]) -> None:
        """Put another batch in the place of the last one."""
        self._lay(batch, caches)
        be.put(self.whole.buffer, 0, self._packed)

    def holding(self, batch: Batch) -> DeviceBatch:
        """The batch, which was written last, with its arrays on the device."""
        rest: dict[str, Any] = {
            f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in self.arrays
        }
        rest |= self.arrays
        n_pages = self.arrays["pages"].shape[1]
        return DeviceBatch(**rest, host=batch, n_pages=n_pages, whole=self.whole, tiles=self.tiles)


def upload(be: GPUBackend, batch: Batch) -> DeviceBatch:
    """Copy a batch to the device, all arrays at once."""
    caches = with_room(batch)
    return Resident(be, batch, caches, page_stride(caches)).holding(batch)


def with_room(batch: Batch) -> list[GPUCache]:
    """The batch's caches, room taken for its new rows: the buffers of their stores may have moved."""
    caches = [cache for cache in batch.caches if isinstance(cache, GPUCache)]
    if len(caches) != len(batch.caches):
        raise ArgumentError("a batch holds caches of another backend")
    if caches:
        ends = batch.n_past + batch.starts[1:] - batch.starts[:-1]
        for cache, end in zip(caches, ends.tolist(), strict=True):
            cache.reserve(end)
    return caches


def page_stride(caches: list[GPUCache]) -> int:
    """Columns of the page table: a power of two, so that few different steps are recorded."""
    most = max((len(cache.pages) for cache in caches), default=0)
    return max(1 << (most - 1).bit_length(), FEWEST_PAGES) if most else 1


def parts_of(packed: np.ndarray, arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Views of int32 ``packed``, one like each of the arrays, each where a device may address it."""
    at = 0
    for x in arrays:
        yield packed[at : at + x.nbytes // 4].view(x.dtype).reshape(x.shape)
        at += aligned(x.nbytes) // 4


def aligned(nbytes: int) -> int:
    """Room for an array that others follow."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


def row_tiles(be: GPUBackend, batch: DeviceBatch, rows: int) -> Tiles:
    """Each sequence's rows in runs of at most ``rows``: int32 [n, 3] of sequence, first row, count."""
    if rows not in batch.tiles:
        starts = batch.host.starts
        table = [
            (s, first, min(rows, int(starts[s + 1]) - first))
            for s in range(batch.n_seq)
            for first in range(int(starts[s]), int(starts[s + 1]), rows)
        ]
        batch.tiles[rows] = be.array(np.array(table, np.int32)), len(table)
    return batch.tiles[rows]
