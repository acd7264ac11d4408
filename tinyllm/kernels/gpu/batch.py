"""The rows of a step with everything on the device that kernels ask about them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError
from ..backend import Batch
from .arrays import GPUArray
from .cache import GPUCache

if TYPE_CHECKING:
    from .common import GPUBackend

Tiles = tuple[GPUArray, int]


@dataclass(frozen=True)
class DeviceBatch(Batch):
    """A Batch on the device.

    ``seqs`` [T] is each row's sequence, ``pages`` [n_seq, n_pages] where its positions are stored,
    ``slots`` [n_seq] where its recurrent arrays are.
    """

    host: Batch
    seqs: GPUArray
    pages: GPUArray
    slots: GPUArray
    n_pages: int
    tiles: dict[int, Tiles] = field(default_factory=dict)


NAMES = ("ids", "positions", "starts", "n_past", "outputs", "seqs", "pages", "slots")


def host_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """All int32 arrays of a batch; room for its new rows is taken in the caches first."""
    lengths = np.diff(batch.starts)
    arrays = {name: np.asarray(getattr(batch, name), np.int32) for name in NAMES[:5]}
    arrays["seqs"] = np.repeat(np.arange(batch.n_seq, dtype=np.int32), lengths)
    caches = [cache for cache in batch.caches if isinstance(cache, GPUCache)]
    if len(caches) != len(batch.caches):
        raise ArgumentError("a batch holds caches of another backend")
    for cache, past, length in zip(caches, batch.n_past, lengths, strict=bool(caches)):
        cache.reserve(int(past) + int(length))
    n_pages = page_stride(caches)
    arrays["pages"] = np.zeros((batch.n_seq, n_pages), np.int32)
    for row, cache in zip(arrays["pages"], caches, strict=bool(caches)):
        row[: len(cache.pages)] = cache.pages
    arrays["slots"] = np.array([c.slot for c in caches] or [0] * batch.n_seq, np.int32)
    return arrays


def page_stride(caches: list[GPUCache]) -> int:
    """Columns of the page table: a power of two, so that few different steps are recorded."""
    most = max((len(cache.pages) for cache in caches), default=1)
    return 1 << max(most - 1, 0).bit_length()


def upload(be: GPUBackend, batch: Batch) -> DeviceBatch:
    """Copy a batch to the device."""
    arrays = host_arrays(batch)
    on_device = {name: be.array(x) for name, x in arrays.items()}
    rest = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in on_device}
    return DeviceBatch(**on_device, **rest, host=batch, n_pages=arrays["pages"].shape[1])


def refill(be: GPUBackend, target: DeviceBatch, batch: Batch) -> None:
    """Write another batch of the same key into the arrays of one on the device."""
    for name, x in host_arrays(batch).items():
        be.write(getattr(target, name), x)


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
