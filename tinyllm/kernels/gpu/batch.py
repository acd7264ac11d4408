"""The rows of a step with everything on the device that kernels ask about them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

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
NAMES = ("ids", "positions", "starts", "n_past", "outputs", "seqs", "pages", "slots")


def host_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """All arrays of a batch; room for its new rows is taken in the caches first."""
    lengths = np.diff(batch.starts)
    arrays = {name: np.asarray(getattr(batch, name)) for name in NAMES[:5]}
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


def upload(
    be: GPUBackend, batch: Batch, arrays: dict[str, np.ndarray] | None = None
) -> DeviceBatch:
    """Copy a batch to the device, all arrays at once."""
    arrays = host_arrays(batch) if arrays is None else arrays
    packed = pack(arrays)
    whole = be.array(packed)
    on_device: dict[str, Any] = {}
    at = 0
    for name, x in arrays.items():
        part = be.view(whole.buffer, at, max(x.nbytes, 4))
        on_device[name] = GPUArray(x.shape, x.dtype, part, None, whole)
        at += aligned(x.nbytes)
    rest: dict[str, Any] = {
        f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in on_device
    }
    n_pages = arrays["pages"].shape[1]
    return DeviceBatch(**on_device, **rest, host=batch, n_pages=n_pages, whole=whole)


def refill(target: DeviceBatch, arrays: dict[str, np.ndarray], be: GPUBackend) -> None:
    """Write the arrays of another batch of the same key over those of one on the device."""
    be.put(target.whole.buffer, 0, pack(arrays))


def pack(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All arrays in one, each where a device may address it."""
    out = np.zeros(sum(aligned(x.nbytes) for x in arrays.values()) // 4, np.int32)
    at = 0
    for x in arrays.values():
        out[at : at + x.size] = np.ascontiguousarray(x).reshape(-1).view(np.int32)
        at += aligned(x.nbytes) // 4
    return out


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
