"""What a GPU language must provide: memory, and the launch of a kernel."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..backend import Backend
from .arrays import Buffer, GPUArray, Pool
from .sources import Program
from .steps import NotRecordable
from .weights import GPUWeight

i32, u64, f32 = np.int32, np.uint64, np.float32
Size = tuple[int, int, int]
COUNTERS = 1024
_NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


class Device(Backend):
    """One device with its pool of arrays. Subclasses implement the primitives."""

    name: str
    n_cores: int  # multiprocessors, compute units
    max_threads = 512  # of a group; a power of two
    closed = False
    recording = False  # launches, to be carried out later
    _any_quantised = False  # among the weights

    def __init__(self) -> None:
        self.pool = Pool(self.allocate, self.free)  # of arrays that belong to a step
        self.kept = Pool(self.allocate, self.free)  # of those that outlive it
        self._weights: weakref.WeakSet[GPUWeight] = weakref.WeakSet()
        self._grids: dict[str, GPUArray] = {}
        self._stores: dict[Any, Any] = {}  # layers and kv_type -> Store
        self._heads: dict[tuple[int, int], GPUArray] = {}
        self._counters: GPUArray | None = None

    # ---- primitives

    @abstractmethod
    def _allocate(self, nbytes: int) -> Buffer:
        """Device memory, or MemoryError."""

    @abstractmethod
    def free(self, buffer: Buffer) -> None:
        """Give memory back to the driver; kernels already queued may still read it."""

    @abstractmethod
    def put(self, buffer: Buffer, offset: int, x: np.ndarray) -> None:
        """Copy a host array to ``offset`` bytes into the buffer; x may change afterwards."""

    @abstractmethod
    def get(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of a buffer, uint8, when all that was launched before has run."""

    @abstractmethod
    def fetch(self, buffer: Buffer, nbytes: int) -> Callable[[], np.ndarray]:
        """Queue a copy of a buffer's first bytes to the host; what is returned waits for just that."""

    @abstractmethod
    def copy(self, target: Buffer, source: Buffer, nbytes: int, start: int = 0) -> None:
        """Queue a copy of bytes of a buffer, from ``start`` on, to the beginning of another."""

    @abstractmethod
    def finish(self) -> None:
        """Return when all that was queued is done."""

    @abstractmethod
    def timed(self, queue: Callable[[], None]) -> Callable[[], float]:
        """Call what queues work; what is returned waits for it, and says how many seconds the device took."""

    @abstractmethod
    def view(self, buffer: Buffer, offset: int, nbytes: int) -> Buffer:
        """A part of a buffer, which must outlive it."""

    @abstractmethod
    def launch(
        self, program: Program, kernel: str, groups: Size, threads: Size, *args: Any
    ) -> None:
        """Queue a kernel. Arguments: arrays, buffers, None for no buffer, NumPy scalars."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""

    def close(self) -> None:
        """Free the weights and what the pool holds."""
        if self.closed:
            return
        self.closed = True
        self.forget()
        for w in list(self._weights):
            self.free(w.buffer)
            w.buffer = None
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self._grids.clear()
        self._heads.clear()
        self._counters = None
        self.pool.close()
        self.kept.close()

    def forget(self) -> None:
        """Drop what holds on to spare buffers."""

    def idle(self) -> int:
        """Bytes of the stores that are freed when they are wanted for something else."""
        return sum(int(store.idle) for store in list(self._stores.values()))

    def refuse_recording(self) -> None:
        """Give a recording up: what comes now is done at once, or would take what it refers to."""
        if self.recording:
            raise NotRecordable

    # ---- arrays

    def allocate(self, nbytes: int) -> Buffer:
        """Device memory; spare buffers are freed first if there is too little, then DeviceError."""
        for retry in (True, False):
            try:
                return self._allocate(max(nbytes, 256))
            except MemoryError as e:
                if retry:
                    self.refuse_recording()
                    self.forget()
                    self.pool.trim()
                    self.kept.trim()
                    for store in list(self._stores.values()):
                        store.trim()
                    continue
                free, total = self.memory()
                raise DeviceError(
                    f"{self.name}: {nbytes >> 20} MiB more do not fit, {free >> 20} of "
                    f"{total >> 20} MiB are free; use a smaller n_ctx or n_gpu_layers"
                ) from e
        raise AssertionError

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> GPUArray:
        """An array of this step, its values undefined."""
        return self._new(shape, dtype, self.pool)

    def _new(self, shape: tuple[int, ...], dtype: Any, pool: Pool) -> GPUArray:
        buffer, room = pool.take(prod(shape) * np.dtype(dtype).itemsize)
        return GPUArray(shape, dtype, buffer, pool, room=room)

    def array(self, x: np.ndarray) -> GPUArray:
        # never a buffer of `pool`: recorded steps write to those although they are spare
        x = np.asarray(x)
        x = np.ascontiguousarray(x, _NARROW.get(x.dtype, x.dtype)).reshape(x.shape)
        y = self._new(x.shape, x.dtype, self.kept)
        if x.size:
            self.put(y.buffer, 0, x)
        return y

    def numpy(self, x: GPUArray | np.ndarray) -> np.ndarray:
        if isinstance(x, np.ndarray):
            return x
        if not x.size:
            return np.empty(x.shape, x.dtype)
        return self.get(x.buffer, 0, x.nbytes).view(x.dtype).reshape(x.shape)

    def counters(self) -> GPUArray:
        """COUNTERS zeros, by which groups of a launch find out who is the last; it leaves zeros behind."""
        if self._counters is None:
            self._counters = self.array(np.zeros(COUNTERS, np.int32))
        return self._counters

    def each(self, program: Any, kernel: str, count: int, *args: Any) -> None:
        """Launch one thread for each of ``count`` values; the kernel's last argument is the count."""
        self.launch(program, kernel, (-(-count // 256), 1, 1), (256, 1, 1), *args, i32(count))
