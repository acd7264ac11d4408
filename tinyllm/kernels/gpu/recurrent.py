"""Layers whose past is a few arrays: Mamba and RWKV. Kernels walk each sequence row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..backend import Batch
from . import batch as batches
from . import sources
from .arrays import GPUArray, i32, u64
from .batch import DeviceBatch
from .sources import Program

if TYPE_CHECKING:
    from .backend import GPUBackend

PLAIN = sources.recurrent()


def _state(b: DeviceBatch, layer: int, name: str) -> tuple[object, ...]:
    """Kernel arguments: all slots, the slot of each sequence, and where this array begins in a slot."""
    store = batches.shared_store(b)
    first, _ = store.layout.arrays[layer][name]
    floats = store.layout.slot_floats
    return store.slots.buffer, b.slots, b.starts, u64(floats), u64(first)


def _shape(b: DeviceBatch, layer: int, name: str) -> tuple[int, ...]:
    return batches.shared_store(b).layout.arrays[layer][name][1]


def _channels(
    be: GPUBackend, program: Program, kernel: str, b: DeviceBatch, n: int, *args: object
) -> None:
    """Launch a thread for each of the n channels of each sequence."""
    be.launch(program, kernel, (-(-n // 64), b.n_seq, 1), (64, 1, 1), *args)


def conv1d(
    be: GPUBackend,
    batch: Batch,
    layer: int,
    x: GPUArray,
    w: GPUArray,
    bias: GPUArray | None,
    name: str,
) -> GPUArray:
    b = batches.on_device(be, batch)
    y = be.empty(x.shape)
    n, width = w.shape
    args = x, w, bias, y, *_state(b, layer, name), i32(n), i32(width)
    _channels(be, PLAIN, "conv1d", b, n, *args)
    return y


def scan(
    be: GPUBackend,
    batch: Batch,
    layer: int,
    x: GPUArray,
    dt: GPUArray,
    a: GPUArray,
    b: GPUArray,
    c: GPUArray,
    d: GPUArray,
) -> GPUArray:
    on = batches.on_device(be, batch)
    y = be.empty(x.shape)
    n, size = _shape(on, layer, "ssm")
    program = sources.recurrent(size, N_DECAY=a.shape[-1], N_GROUP=b.shape[-1] // size)
    args = x, dt, a, b, c, d, y, *_state(on, layer, "ssm"), i32(n)
    _channels(be, program, "scan", on, n, *args)
    return y


def shift_rows(be: GPUBackend, batch: Batch, layer: int, x: GPUArray, name: str) -> GPUArray:
    b = batches.on_device(be, batch)
    y = be.empty(x.shape)
    n = x.shape[-1]
    _channels(be, PLAIN, "shift_rows", b, n, x, y, *_state(b, layer, name), i32(n))
    return y


def wkv(be: GPUBackend, kernel: str, batch: Batch, layer: int, *inputs: GPUArray) -> GPUArray:
    """RWKV's ``kernel``, "wkv6" or "wkv7", on its inputs in the order of its arguments."""
    b = batches.on_device(be, batch)
    y = be.empty(inputs[0].shape)
    n_head, size, _ = _shape(b, layer, "wkv")
    args = *inputs, y, *_state(b, layer, "wkv"), i32(n_head * size)
    be.launch(sources.recurrent(size), kernel, (n_head, b.n_seq, 1), (size, 1, 1), *args)
    return y
