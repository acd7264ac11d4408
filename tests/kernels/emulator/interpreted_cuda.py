"""A simulated CUDA driver whose kernels are NVRTC's own code, carried out by an interpreter (ptx.py).

Slow, but it knows no OpenCL: inline assembly, addresses, alignment and barriers are those of the device's code.
Fresh memory holds NaNs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinyllm.kernels.gpu import sources

from . import ptx, ptx_text
from .simulated_cuda import PAGE, CUDARuntimeError, Driver, Stream

ARCHITECTURE = "compute_90"


class Interpreter(Driver):
    """Memory as NumPy arrays, modules as PTX."""

    def __init__(self, total: int = 1 << 30) -> None:
        self.memory = ptx.Memory()
        self.sizes: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self.next, self.total, self.device = 1, total, 0
        self.tape, self.pending = None, []
        self.launches = self.replays = self.products = 0
        self.kernels: set[str] = set()

    def allocate(self, nbytes: int) -> int:
        if sum(self.sizes.values()) + nbytes > self.total:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        address, self.next = self.next * PAGE, self.next + 1
        self.memory.allocations[address // PAGE] = np.full(nbytes, 0xFF, np.uint8)
        self.sizes[address], self.owner[address] = nbytes, self.device
        return address

    def free(self, address: int) -> None:
        self.finish()
        del self.memory.allocations[address // PAGE], self.sizes[address], self.owner[address]

    def read(self, address: int, nbytes: int) -> np.ndarray:
        data, at = self.memory.allocations[address // PAGE], address % PAGE
        assert at + nbytes <= len(data)
        return data[at : at + nbytes].copy()

    def write(self, address: int, x: np.ndarray) -> None:
        data, at = self.memory.allocations[address // PAGE], address % PAGE
        assert at + x.nbytes <= len(data)
        data[at : at + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)

    def find(self, address: int) -> tuple[Any, int, int]:
        data, at = self.memory.allocations[address // PAGE], address % PAGE
        return data, at, len(data) - at

    def finish(self) -> None:
        work, self.pending = self.pending, []
        for each in work:
            each()

    def compile(self, code: str) -> Any:
        return Module(self, code)


class Module:
    def __init__(self, driver: Interpreter, code: str) -> None:
        self.driver, self.kernels = driver, ptx_text.parse(compiled(code))

    def get_function(self, name: str) -> Any:
        kernel, driver = self.kernels[name], self.driver

        def call(grid: Any, block: Any, args: Any, shared: int, stream: Stream) -> None:
            assert stream.device == driver.device
            driver.launches += 1
            driver.kernels.add(name)
            driver.do(lambda: ptx.launch(kernel, driver.memory, grid, block, args))

        return SimpleNamespace(kernel=call)


def interpret(
    code: str, name: str, threads: int, *arrays: np.ndarray, architecture: str = ARCHITECTURE
) -> None:
    """One group of a kernel of this text, after CUDA's prelude, on arrays that it may change."""
    text = sources.read("prelude_cuda.h") + sources.read("tensor.h") + code
    kernel, memory = ptx_text.parse(compiled(text, architecture))[name], ptx.Memory()
    for i, x in enumerate(arrays):
        memory.allocations[i + 1] = x.reshape(-1).view(np.uint8)
    addresses = [np.uint64((i + 1) * PAGE) for i in range(len(arrays))]
    ptx.launch(kernel, memory, (1, 1, 1), (threads, 1, 1), addresses)


def compiled(code: str, architecture: str = ARCHITECTURE) -> str:
    """A program's PTX; the test is skipped where there is no NVRTC."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy")
    handle = nvrtc.createProgram(code, "program.cu", (), ())
    try:
        nvrtc.compileProgram(handle, [f"-arch={architecture}", "-std=c++17"])
        text = nvrtc.getPTX(handle)
    finally:
        nvrtc.destroyProgram(handle)
    return str(text if isinstance(text, str) else text.decode())
