"""The CUDA backend, through CuPy: memory, compilation, captured graphs, cuBLAS for prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import DeviceError
from . import devices, sources
from .arrays import Buffer, GPUArray
from .common import GPUBackend
from .device import Size
from .products import LibraryProducts
from .sources import Program
from .steps import NotRecordable

try:
    import cupy
    from cupy.cuda import runtime
except ImportError as e:  # pragma: no cover
    raise DeviceError(devices.NO_CUPY) from e

OPTIONS = ("-std=c++17",)
UP, DOWN, ACROSS = 1, 2, 3  # cudaMemcpyKind
CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_GEMM_DEFAULT, CUBLAS_COMPUTE_32F = 0, 1, -1, 68


class CUDABackend(LibraryProducts, GPUBackend):
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
        self.name = f"cuda:{self.index} {found[self.index][1]}"
        runtime.setDevice(self.index)
        self.n_cores = runtime.getDeviceProperties(self.index)["multiProcessorCount"]
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._kernels: dict[tuple[Program, str], Any] = {}
        self._modules: dict[Program, Any] = {}
        self._recording = False
        self._pinned: np.ndarray | None = None
        self._one, self._zero = np.array(1, np.float32), np.array(0, np.float32)
        self._cublas = _load_cublas()
        super().__init__()

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
        """Nothing: the memory goes with the last reference to the pointer."""

    def put(self, buffer: Buffer, offset: int, x: np.ndarray) -> None:
        self._refuse_recording()
        x = np.ascontiguousarray(x)
        runtime.setDevice(self.index)
        target, source = buffer.ptr + offset, x.ctypes.data
        runtime.memcpyAsync(target, source, x.nbytes, UP, self.stream.ptr)

    def get(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        self._refuse_recording()
        runtime.setDevice(self.index)
        host = self._host(nbytes)
        runtime.memcpyAsync(host.ctypes.data, buffer.ptr + offset, nbytes, DOWN, self.stream.ptr)
        self.stream.synchronize()
        return host.copy()

    def _host(self, nbytes: int) -> np.ndarray:
        """Page-locked memory, from which copies run at full speed."""
        if self._pinned is None or len(self._pinned) < nbytes:
            room = max(nbytes, 1 << 20)
            memory = cupy.cuda.alloc_pinned_memory(room)
            self._pinned = np.frombuffer(memory, np.uint8, room)
        return self._pinned[:nbytes]

    def copy(self, target: Buffer, source: Buffer, nbytes: int) -> None:
        runtime.setDevice(self.index)
        runtime.memcpyAsync(target.ptr, source.ptr, nbytes, ACROSS, self.stream.ptr)
        self.stream.synchronize()  # the source is freed next

    def view(self, buffer: Buffer, offset: int, nbytes: int) -> Buffer:
        return buffer + offset

    def memory(self) -> tuple[int, int]:
        runtime.setDevice(self.index)
        free, total = runtime.memGetInfo()
        return int(free), int(total)

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
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise DeviceError(
                f"{self.name}: {program[0][-1]} was not compiled: {reason}. CUDA's libraries come "
                "with pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x[ctk])"
            ) from e
        self._kernels[program, kernel] = compiled
        return compiled

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        runtime.setDevice(self.index)
        self._recording = True
        with self.stream:
            self.stream.begin_capture(runtime.streamCaptureModeRelaxed)
            try:
                result = run()
            finally:
                self._recording = False
                graph = self.stream.end_capture()

        def replay() -> None:
            runtime.setDevice(self.index)
            graph.launch(self.stream)

        return replay, result

    def _refuse_recording(self) -> None:
        if self._recording:
            raise NotRecordable

    # ---- prefill

    def many_rows(self, *args: Any) -> None:
        if self._cublas is None:  # our own tiles need no library
            GPUBackend.many_rows(self, *args)
        else:
            LibraryProducts.many_rows(self, *args)

    def gemm(
        self,
        kind: str,
        w: Buffer,
        x: GPUArray,
        term: int,
        y: GPUArray,
        first: int,
        rows: int,
        w_row: int,
    ) -> None:
        """cuBLAS counts columns first: it computes y^T = (w^T)^T x^T."""
        number = {"F32": runtime.CUDA_R_32F, "F16": runtime.CUDA_R_16F, "BF16": runtime.CUDA_R_16BF}
        _, n_x, n_in = x.shape
        x_ptr = x.buffer.ptr + term * n_x * n_in * x.dtype.itemsize
        n_out = y.shape[-1]
        beta = self._one if term else self._zero
        with self.stream:
            self._cublas.gemmEx(
                *(cupy.cuda.device.get_cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, rows, n_x, n_in),
                *(self._one.ctypes.data, w.ptr, number[kind], w_row),
                *(x_ptr, number[kind], n_in, beta.ctypes.data),
                *(y.buffer.ptr + 4 * first, runtime.CUDA_R_32F, n_out),
                *(CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            )

    def close(self) -> None:
        if not self.closed:
            runtime.setDevice(self.index)
            self.stream.synchronize()
        super().close()
        self._kernels.clear()
        self._modules.clear()
        self._pinned = None


def _argument(a: Any) -> Any:
    """An address as a number: CuPy passes eight-byte integers as they are."""
    if isinstance(a, GPUArray):
        a = a.buffer
    if a is None:
        return np.uint64(0)
    return np.uint64(a.ptr) if isinstance(a, cupy.cuda.MemoryPointer) else a


def _load_cublas() -> Any:
    """CuPy's binding of cuBLAS, or None where the library is not installed."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError:
        return None
    return cublas
