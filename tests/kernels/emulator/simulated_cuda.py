"""A CUDA driver made of OpenCL: CuPy's names, with PoCL's kernels, buffers and NumPy's products behind them.

It runs ``tinyllm.kernels.gpu.cuda`` on machines without NVIDIA's hardware: addresses, copies, launches,
captured graphs and cuBLAS calls are carried out as the driver would, so that a wrong argument gives a
wrong result. As on a device, nothing is carried out before the host waits: a copy from host memory that has
been written again by then, or an address that has been freed, shows. There are two devices, and memory,
streams and handles of one cannot be used while the other is current.

What it cannot show is that NVIDIA's compiler and device agree; NVRTC's tests and a device show that.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyopencl as cl
import pytest

import tinyllm.kernels.gpu as package
from tinyllm.kernels.gpu import cublas, devices, sources
from tinyllm.kernels.gpu.opencl import build

EMULATED = (Path(__file__).parent / "emulated_tensor.h").read_text("utf-8")
PAGE = 1 << 33  # addresses of one allocation
STREAM = 100  # address of the first device's
UP, DOWN = 1, 2
NUMBER = {0: np.float32, 2: np.float16, 14: np.uint16}  # CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class Driver:
    """Memory by address, one queue in order, and what was asked of it."""

    def __init__(self, total: int = 1 << 30) -> None:
        _, device = devices.choose_opencl("0")
        self.context = cl.Context([device])
        self.queue = cl.CommandQueue(self.context)
        self.buffers: dict[int, cl.Buffer] = {}
        self.sizes: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self.next, self.total, self.device = 1, total, 0
        self.tape: list[Callable[[], None]] | None = None
        self.pending: list[Callable[[], None]] = []
        self.launches = self.replays = self.products = 0
        self.kernels: set[str] = set()  # launched

    def allocate(self, nbytes: int) -> int:
        if sum(self.sizes.values()) + nbytes > self.total:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        address, self.next = self.next * PAGE, self.next + 1
        self.buffers[address] = cl.Buffer(self.context, cl.mem_flags.READ_WRITE, nbytes)
        self.sizes[address], self.owner[address] = nbytes, self.device
        return address

    def free(self, address: int) -> None:
        """As cudaFree: when all that was queued before is done."""
        self.finish()
        self.buffers.pop(address).release()
        del self.sizes[address], self.owner[address]

    def find(self, address: int) -> tuple[cl.Buffer, int, int]:
        """Buffer, offset and bytes that are left behind it."""
        base = address // PAGE * PAGE
        return self.buffers[base], address - base, self.sizes[base] - (address - base)

    def check_here(self, address: int) -> None:
        """The memory belongs to the current device."""
        assert address == 0 or self.owner[address // PAGE * PAGE] == self.device

    def region(self, address: int) -> cl.Buffer | None:
        if address == 0:
            return None
        buffer, offset, left = self.find(address)
        return buffer.get_sub_region(offset, left) if offset else buffer

    def read(self, address: int, nbytes: int) -> np.ndarray:
        buffer, offset, left = self.find(address)
        assert nbytes <= left
        out = np.empty(nbytes, np.uint8)
        cl.enqueue_copy(self.queue, out, buffer, src_offset=offset)
        return out

    def write(self, address: int, x: np.ndarray) -> None:
        buffer, offset, left = self.find(address)
        assert x.nbytes <= left
        cl.enqueue_copy(self.queue, buffer, np.ascontiguousarray(x), dst_offset=offset)

    def do(self, work: Callable[[], None]) -> None:
        """When the host waits, or when the graph being captured is launched."""
        (self.pending if self.tape is None else self.tape).append(work)

    def finish(self, last: Callable[[], None] | None = None) -> None:
        """Carry out what is queued, to the end or to some work."""
        while self.pending:
            work = self.pending.pop(0)
            work()
            if work is last:
                break
        self.queue.finish()

    def compile(self, code: str) -> Any:
        """A module with CuPy's ``get_function``."""
        return RawModule(self, code)

    # ---- CuPy's names

    def memcpy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        assert self.tape is None, "copies between host and device cannot be captured here"
        assert stream == STREAM + self.device
        if kind == UP:
            self.check_here(target)
            self.do(lambda: self.write(target, host(source, nbytes).copy()))
        elif kind == DOWN:
            self.check_here(source)

            def down() -> None:
                host(target, nbytes)[:] = self.read(source, nbytes)

            self.do(down)
        else:
            self.do(lambda: self.write(target, self.read(source, nbytes)))

    def matrix(self, address: int, kind: int, rows: int, stride: int, columns: int) -> np.ndarray:
        size = np.dtype(NUMBER[kind]).itemsize
        flat = self.read(address, size * (stride * (rows - 1) + columns)).view(NUMBER[kind])
        if kind == 14:
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        padded = np.zeros(rows * stride, np.float32)
        padded[: len(flat)] = flat
        return padded.reshape(rows, stride)[:, :columns]


def host(address: int, nbytes: int) -> np.ndarray:
    """Host memory by its address."""
    from ctypes import POINTER, c_ubyte, cast

    return np.ctypeslib.as_array(cast(address, POINTER(c_ubyte)), (nbytes,))


class CuBLAS:
    """The library's functions that ``gpu.cublas`` calls; they return 0."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handles: dict[int, dict[str, int]] = {}

    def cublasCreate_v2(self, place: Any) -> int:
        handle = 7 + len(self.handles)
        self.handles[handle] = {"device": self.driver.device}
        place._obj.value = handle
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: int) -> int:
        device = self.handles[handle.value]["device"]
        self.handles[handle.value] = {"device": device, "stream": stream}  # the workspace is reset
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, workspace: int, nbytes: int) -> int:
        assert nbytes <= self.driver.find(workspace)[2]
        self.handles[handle.value]["workspace"] = workspace
        return 0

    def cublasDestroy_v2(self, handle: Any) -> int:
        del self.handles[handle.value]
        return 0

    def cublasGemmEx(
        self, handle: Any, ta: int, tb: int, m: int, n: int, k: int, *rest: Any
    ) -> int:
        """C [m, n] = A^T B + beta C, columns first."""
        alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, _ = rest
        assert (ta, tb, c_type, compute) == (1, 0, 0, 68)
        assert a_type == b_type
        assert alpha._obj.value == 1
        driver, keep, bound = self.driver, beta._obj.value, self.handles[handle.value]
        assert bound["device"] == driver.device
        assert bound["stream"] == STREAM + driver.device
        for address in (a, b, c, bound["workspace"]):
            driver.check_here(address)

        def work() -> None:
            driver.products += 1
            left = driver.matrix(a, a_type, m, lda, k)
            right = driver.matrix(b, b_type, n, ldb, k)
            out = driver.read(c, 4 * (ldc * (n - 1) + m)).view(np.float32)
            rows = np.lib.stride_tricks.as_strided(out, (n, m), (4 * ldc, 4))
            rows[:] = right @ left.T + (keep * rows if keep else 0)
            driver.write(c, out)

        driver.do(work)
        return 0


class Memory:
    def __init__(self, driver: Driver, nbytes: int) -> None:
        self.driver, self.ptr = driver, driver.allocate(nbytes)

    def __del__(self) -> None:
        if hasattr(self, "ptr") and not sys.is_finalizing():
            self.driver.free(self.ptr)


class MemoryPointer:
    def __init__(self, memory: Memory, offset: int) -> None:
        self.mem, self.ptr = memory, memory.ptr + offset

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


class Stream:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.device = driver, driver.device
        self.ptr = STREAM + driver.device

    def synchronize(self) -> None:
        assert self.driver.tape is None
        self.driver.finish()

    def begin_capture(self, mode: int) -> None:
        assert self.driver.device == self.device
        self.driver.tape = []

    def end_capture(self) -> Any:
        tape, self.driver.tape = self.driver.tape or [], None

        def launch(stream: Stream) -> None:
            assert stream is self
            assert self.driver.device == self.device
            self.driver.replays += 1
            self.driver.pending += tape

        return SimpleNamespace(launch=launch)


class Event:
    """A place in the queue; waiting for it leaves the work behind it undone."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def record(self, stream: Stream) -> None:
        assert self.driver.tape is None
        assert self.driver.device == stream.device

        def reached() -> None:
            self.driver.queue.finish()
            self.seconds = time.perf_counter()

        self.reached = reached
        self.driver.do(reached)

    def synchronize(self) -> None:
        if any(work is self.reached for work in self.driver.pending):
            self.driver.finish(self.reached)


class RawModule:
    def __init__(self, driver: Driver, code: str) -> None:
        prelude, tensor = sources.read("prelude_cuda.h"), sources.read("tensor.h")
        assert prelude in code
        text = code.replace(prelude, sources.read("prelude_opencl.h")).replace(tensor, EMULATED)
        self.driver = driver
        plain = "-cl-kernel-arg-info", "-cl-opt-disable"
        # a cached program of Intel's driver does not know its arguments
        self.program = build(driver.context, text, *plain, cache_dir=False)

    def get_function(self, name: str) -> Any:
        kernel, driver = cl.Kernel(self.program, name), self.driver
        info, private = cl.kernel_arg_info, cl.kernel_arg_address_qualifier.PRIVATE
        is_value = [
            kernel.get_arg_info(i, info.ADDRESS_QUALIFIER) == private
            for i in range(kernel.num_args)
        ]

        def call(grid: Any, block: Any, args: Any, shared: int, stream: Stream) -> None:
            assert len(args) == len(is_value)
            assert max(grid[1:]) < 65536
            assert stream.device == driver.device
            driver.launches += 1
            driver.kernels.add(name)
            for a, v in zip(args, is_value, strict=True):
                if not v:
                    driver.check_here(int(a))
            total = tuple(g * b for g, b in zip(grid, block, strict=True))

            def work() -> None:
                given = [
                    a if v else driver.region(int(a)) for a, v in zip(args, is_value, strict=True)
                ]
                kernel(driver.queue, total, tuple(block), *given)

            driver.do(work)

        return SimpleNamespace(kernel=call)


def backend(driver: Driver) -> Any:
    """A CUDA backend on a driver."""
    with pytest.MonkeyPatch.context() as patch:
        return module(driver, patch).CUDABackend("0")


def module(driver: Driver, monkeypatch: Any) -> ModuleType:
    """``tinyllm.kernels.gpu.cuda`` on the simulated driver, beside the real one."""
    runtime = SimpleNamespace(
        setDevice=lambda i: setattr(driver, "device", i),
        getDeviceCount=lambda: 2,
        getDeviceProperties=lambda i: {
            "name": b"Simulated",
            "totalGlobalMem": driver.total,
            "multiProcessorCount": 64,
            "major": 9,
            "minor": 0,
        },
        runtimeGetVersion=lambda: 13000,
        memcpyAsync=driver.memcpy,
        memGetInfo=lambda: (driver.total - sum(driver.sizes.values()), driver.total),
        streamCaptureModeRelaxed=2,
        CUDARuntimeError=CUDARuntimeError,
    )
    cuda = ModuleType("cupy.cuda")
    cuda.__dict__.update(
        runtime=runtime,
        Stream=lambda non_blocking: Stream(driver),
        Event=lambda disable_timing: Event(driver),
        get_elapsed_time=lambda start, end: 1e3 * (end.seconds - start.seconds),
        Memory=lambda nbytes: Memory(driver, nbytes),
        MemoryPointer=MemoryPointer,
        alloc_pinned_memory=lambda nbytes: bytearray(nbytes),
    )
    cupy = ModuleType("cupy")
    cupy.__dict__.update(cuda=cuda, RawModule=lambda code, options, backend: driver.compile(code))
    for name, part in (("cupy", cupy), ("cupy.cuda", cuda)):
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setattr(cublas, "library", lambda cuda_major: CuBLAS(driver))
    path = f"{package.__path__[0]}/cuda.py"
    spec = importlib.util.spec_from_file_location("tinyllm.kernels.gpu.simulated", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
