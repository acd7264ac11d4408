"""Layers whose past is a few arrays: Mamba and RWKV."""

from __future__ import annotations

from ..backend import Batch
from . import sources
from .arrays import GPUArray
from .attention import Attention
from .batch import DeviceBatch
from .device import i32, u64
from .sources import Program

PLAIN = sources.plain("recurrent.c", SIZE=1)


class Recurrent(Attention):
    """The part of a GPU backend that walks sequences row by row."""

    def _state(self, b: DeviceBatch, layer: int, name: str) -> tuple[object, ...]:
        """Kernel arguments: all slots, whose is whose, and where this array begins in each."""
        store = self.shared_store(b)
        first, _ = store.layout.arrays[layer][name]
        floats = store.layout.slot_floats
        return store.slots.buffer, b.slots, b.starts, u64(floats), u64(first)

    def _shape(self, b: DeviceBatch, layer: int, name: str) -> tuple[int, ...]:
        return self.shared_store(b).layout.arrays[layer][name][1]

    def _channels(
        self, program: Program, kernel: str, b: DeviceBatch, n: int, *args: object
    ) -> None:
        """A thread for each channel of each sequence."""
        self.launch(program, kernel, (-(-n // 64), b.n_seq, 1), (64, 1, 1), *args)

    def conv1d(
        self,
        batch: Batch,
        layer: int,
        x: GPUArray,
        w: GPUArray,
        bias: GPUArray | None,
        name: str = "conv",
    ) -> GPUArray:
        b = self.on_device(batch)
        y = self.empty(x.shape)
        n, width = w.shape
        state = self._state(b, layer, name)
        self._channels(PLAIN, "conv1d", b, n, x, w, bias, y, *state, i32(n), i32(width))
        return y

    def scan(
        self,
        batch: Batch,
        layer: int,
        x: GPUArray,
        dt: GPUArray,
        a: GPUArray,
        b: GPUArray,
        c: GPUArray,
        d: GPUArray,
    ) -> GPUArray:
        on = self.on_device(batch)
        y = self.empty(x.shape)
        n, size = self._shape(on, layer, "ssm")
        state = self._state(on, layer, "ssm")
        groups = b.shape[-1] // size
        program = sources.plain("recurrent.c", SIZE=size, N_DECAY=a.shape[-1], N_GROUP=groups)
        self._channels(program, "scan", on, n, x, dt, a, b, c, d, y, *state, i32(n))
        return y

    def shift_rows(self, batch: Batch, layer: int, x: GPUArray, name: str) -> GPUArray:
        b = self.on_device(batch)
        y = self.empty(x.shape)
        n = x.shape[-1]
        self._channels(PLAIN, "shift_rows", b, n, x, y, *self._state(b, layer, name), i32(n))
        return y

    def wkv6(
        self,
        batch: Batch,
        layer: int,
        r: GPUArray,
        k: GPUArray,
        v: GPUArray,
        w: GPUArray,
        u: GPUArray,
    ) -> GPUArray:
        return self._wkv("wkv6", batch, layer, r, k, v, w, u)

    def wkv7(
        self,
        batch: Batch,
        layer: int,
        r: GPUArray,
        w: GPUArray,
        k: GPUArray,
        v: GPUArray,
        a: GPUArray,
        b: GPUArray,
    ) -> GPUArray:
        return self._wkv("wkv7", batch, layer, r, w, k, v, a, b)

    def _wkv(self, kernel: str, batch: Batch, layer: int, *inputs: GPUArray) -> GPUArray:
        b = self.on_device(batch)
        y = self.empty(inputs[0].shape)
        n_head, size, _ = self._shape(b, layer, "wkv")
        state = self._state(b, layer, "wkv")
        program = sources.plain("recurrent.c", SIZE=size)
        args = *inputs, y, *state, i32(n_head * size)
        self.launch(program, kernel, (n_head, b.n_seq, 1), (size, 1, 1), *args)
        return y
