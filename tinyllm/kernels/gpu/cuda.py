"""The CUDA backend, through CuPy: memory, compilation, captured graphs, tensor cores and cuBLAS."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..backend import Device
from . import cublas, devices, sources
from .arrays import Buffer, GPUArray
from .backend import GPUBackend
from .matmul_library import Library
from .pinned import Pinned
from .sources import Program, Size
from .steps import NotRecordable
from .weights import PLAIN

try:
    import cupy
    from cupy.cuda import runtime
except ImportError as e:  # pragma: no cover
    raise DeviceError(devices.NO_CUPY) from e

OPTIONS = ("-std=c++17",)
UP, DOWN, ACROSS = 1, 2, 3  # cudaMemcpyKind
FIRST_WITH_BF16 = 8  # compute capability from which cuBLAS multiplies bfloat16


class CUDABackend(GPUBackend):
    """Memory, kernels and graphs of one CUDA device.

    Parameters
    ----------
    which : str
        The device's number, or a part of its name.

    Raises
    ------
    DeviceError
        No such device, no driver, or CuPy without its libraries.
    """

    def __init__(self, which: str = "0") -> None:
        found = devices.cuda_devices()
        self.index = devices.pick(which, [name for _, name, _ in found], "cuda")
        self.where = Device("cuda", self.index, found[self.index][1])
        runtime.setDevice(self.index)
        properties = runtime.getDeviceProperties(self.index)
        self.n_cores = properties["multiProcessorCount"]
        self.tensor_cores = (properties["major"], properties["minor"]) >= (7, 5)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._kernels: dict[tuple[Program, str], Any] = {}
        self._modules: dict[Program, Any] = {}
        self._pinned = Pinned(cupy.cuda.alloc_pinned_memory, self.stream.synchronize)
        self._cublas = cublas.library(runtime.runtimeGetVersion() // 1000)
        self._products: cublas.Products | None = None
        self._workspace: Buffer = None
        super().__init__()
        if self._cublas is not None:
            without = () if properties["major"] >= FIRST_WITH_BF16 else ("BF16",)
            self.library = Library(self, self.gemm, [kind for kind in PLAIN if kind not in without])

    # ---- memory

    def _allocate(self, nbytes: int) -> Buffer:
        runtime.setDevice(self.index)
        try:
            return cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
        except runtime.CUDARuntimeError as e:
            if "OutOfMemory" in str(e) or "MemoryAllocation" in str(e):
                raise MemoryError from e
            raise

    def free(self, buffer: Buffer) -> None:
        """Do nothing: CuPy frees memory with the last reference to its pointer."""

    def put(self, buffer: Buffer, offset: int, x: np.ndarray) -> None:
        self.refuse_recording()
        runtime.setDevice(self.index)
        target, stream = buffer.ptr + offset, self.stream.ptr
        for start, source, nbytes in self._pinned.staged(x):
            runtime.memcpyAsync(target + start, source, nbytes, UP, stream)

    def get(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        self.refuse_recording()
        runtime.setDevice(self.index)
        source, stream = buffer.ptr + offset, self.stream.ptr
        return self._pinned.fetched(
            nbytes, lambda target: runtime.memcpyAsync(target, source, nbytes, DOWN, stream)
        )

    def fetch(self, buffer: Buffer, nbytes: int) -> Callable[[], np.ndarray]:
        self.refuse_recording()
        runtime.setDevice(self.index)
        landing = self._pinned.landing(nbytes)
        runtime.memcpyAsync(landing.address, buffer.ptr, nbytes, DOWN, self.stream.ptr)
        event = cupy.cuda.Event(disable_timing=True)
        event.record(self.stream)

        def arrived() -> np.ndarray:
            event.synchronize()
            return landing.memory[:nbytes].copy()

        return arrived

    def copy(
        self, target: Buffer, source: Buffer, nbytes: int, start: int = 0, to: int = 0
    ) -> None:
        self.refuse_recording()
        runtime.setDevice(self.index)
        runtime.memcpyAsync(target.ptr + to, source.ptr + start, nbytes, ACROSS, self.stream.ptr)

    def finish(self) -> None:
        runtime.setDevice(self.index)
        self.stream.synchronize()

    def timed(self, queue: Callable[[], None]) -> Callable[[], float]:
        runtime.setDevice(self.index)
        start, end = (cupy.cuda.Event(disable_timing=False) for _ in range(2))
        start.record(self.stream)
        queue()
        end.record(self.stream)

        def seconds() -> float:
            end.synchronize()
            return 1e-3 * float(cupy.cuda.get_elapsed_time(start, end))

        return seconds

    def view(self, buffer: Buffer, offset: int, nbytes: int) -> Buffer:
        return buffer + offset

    def memory(self) -> tuple[int, int]:
        runtime.setDevice(self.index)
        free, total = runtime.memGetInfo()
        return int(free) + self.idle(), int(total)

    # ---- programs

    def launch(
        self, program: Program, kernel: str, groups: Size, threads: Size, *args: Any
    ) -> None:
        runtime.setDevice(self.index)
        compiled = self._kernels.get((program, kernel))
        if compiled is None:
            compiled = self._kernel(program, kernel)
        compiled(groups, threads, [_argument(a) for a in args], 0, self.stream)

    def _kernel(self, program: Program, kernel: str) -> Any:
        if program not in self._modules:
            text = sources.text("prelude_cuda.h", program)
            self._modules[program] = cupy.RawModule(code=text, options=OPTIONS, backend="nvrtc")
        try:
            compiled = self._modules[program].get_function(kernel).kernel
        except Exception as e:  # CuPy passes on whatever the missing library or the compiler raised
            reason = sources.complaint(str(e) or type(e).__name__)
            raise DeviceError(
                f"{self.name}: {sources.name(program)} was not compiled: {reason}. CUDA's libraries come "
                "with pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x[ctk])"
            ) from e
        self._kernels[program, kernel] = compiled
        return compiled

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        runtime.setDevice(self.index)
        self.recording = True
        self.stream.begin_capture(runtime.streamCaptureModeRelaxed)
        try:
            result = run()
        finally:
            self.recording = False
            graph = self._captured()

        def replay() -> None:
            runtime.setDevice(self.index)
            graph.launch(self.stream)

        return replay, result

    def _captured(self) -> Any:
        """The captured graph. Where the driver refuses, a warning, and NotRecordable."""
        try:
            return self.stream.end_capture()
        except runtime.CUDARuntimeError as e:
            told = f"{self.name}: a step was not captured ({e}); it runs kernel by kernel, which is slower"
            warnings.warn(told, stacklevel=2)
            raise NotRecordable from e

    # ---- prefill

    def gemm(
        self,
        kind: str,
        w: tuple[Buffer, int],
        x: GPUArray,
        rows: range,
        y: GPUArray,
        columns: range,
        keep: bool = False,
    ) -> None:
        """cuBLAS's matrix product, as ``matmul_library.Gemm`` describes it."""
        n_in = x.shape[-1]
        left = x.buffer.ptr + rows.start * n_in * x.dtype.itemsize, n_in
        out = y.buffer.ptr + 4 * columns.start, y.shape[-1]
        runtime.setDevice(self.index)
        shape = len(columns), len(rows), n_in
        self._handle().add_product(kind, shape, (w[0].ptr, w[1]), left, out, keep)

    def _handle(self) -> cublas.Products:
        """A handle of cuBLAS for this device and stream, made at first use."""
        if self._products is None:
            self.refuse_recording()
            self._workspace = self.allocate(cublas.WORKSPACE)
            runtime.setDevice(self.index)
            place = self.stream.ptr, self._workspace.ptr, cublas.WORKSPACE
            self._products = cublas.Products(self._cublas, *place)
        return self._products

    def close(self) -> None:
        if self.closed:
            return
        runtime.setDevice(self.index)
        self.stream.synchronize()
        super().close()
        if self._products is not None:
            self._products.close()
        self._products = self._workspace = None
        self._kernels.clear()
        self._modules.clear()
        self._pinned = Pinned(cupy.cuda.alloc_pinned_memory, self.stream.synchronize)


def _argument(a: Any) -> Any:
    """An argument of a kernel; addresses as numbers, because CuPy passes eight-byte integers unchanged."""
    if isinstance(a, GPUArray):
        a = a.buffer
    if a is None:
        return np.uint64(0)
    return np.uint64(a.ptr) if isinstance(a, cupy.cuda.MemoryPointer) else a
