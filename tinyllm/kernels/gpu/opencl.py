"""The OpenCL backend, through PyOpenCL: any vendor's GPU, and PoCL on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..backend import Device
from . import devices, sources
from .arrays import Buffer, GPUArray
from .backend import GPUBackend
from .sources import Program, Size

try:
    import pyopencl as cl
except ImportError as e:  # pragma: no cover
    raise DeviceError(devices.NO_PYOPENCL) from e

# Platforms whose optimiser is left out: PoCL's gives some kernels wrong numbers that others give
# right; Oclgrind does not know all the words that its own writes.
UNOPTIMISED = ("Portable Computing Language", "Oclgrind")


def options(device: Any) -> list[str]:
    """How programs are compiled for a device; on a processor, which is for tests, warnings are errors."""
    chosen = ["-cl-std=CL1.2"]
    if devices.on_cpu(device):
        chosen += ["-DCPU_DEVICE", "-Werror"]
    if device.platform.name in UNOPTIMISED:
        chosen.append("-cl-opt-disable")
    return chosen


def build(context: Any, text: str, *more: str, cache_dir: Any = None) -> Any:
    """A text compiled for the device of a context, with ``more`` options; PyOpenCL caches unless told False."""
    with warnings.catch_warnings():  # many drivers always have something to say
        warnings.simplefilter("ignore", cl.CompilerWarning)
        return cl.Program(context, text).build(
            [*options(context.devices[0]), *more], cache_dir=cache_dir
        )


@cache
def _context(device: Any) -> Any:
    """The one context of a device, so that all its backends share compiled programs."""
    return cl.Context([device])


@cache
def _build(device: Any, program: Program) -> Any:
    """A program compiled for a device; PyOpenCL also keeps it on disk."""
    text = sources.text("prelude_opencl.h", program)
    try:
        return build(_context(device), text)
    except cl.RuntimeError as e:
        raise DeviceError(
            f"{device.name.strip()}: its driver does not compile {sources.name(program)}: "
            f"{sources.complaint(str(e))}"
        ) from e


class OpenCLBackend(GPUBackend):
    """Buffers, programs and launches of one OpenCL device.

    Parameters
    ----------
    which : str
        The number of the device among all platforms' devices, as ``tinyllm devices`` lists them, or a
        part of its name.

    Raises
    ------
    DeviceError
        No such device, or no OpenCL driver.
    """

    def __init__(self, which: str = "0") -> None:
        self.index, self.device = devices.choose_opencl(which)
        named, there = self.device.name.strip(), devices.on_cpu(self.device)
        self.where = Device("opencl", self.index, named, on_cpu=there)
        self.n_cores = self.device.max_compute_units
        self.max_threads = 1 << (int(self.device.max_work_group_size).bit_length() - 1)
        self.context = _context(self.device)
        self.queue = cl.CommandQueue(self.context)
        self._tape: list[tuple[Any, ...]] = []
        self._kernels: dict[tuple[Program, str], Any] = {}
        super().__init__()

    # ---- memory

    def _allocate(self, nbytes: int) -> Buffer:
        if nbytes > self.device.max_mem_alloc_size:
            raise MemoryError
        try:
            return cl.Buffer(self.context, cl.mem_flags.READ_WRITE, nbytes)
        except (cl.MemoryError, cl.RuntimeError) as e:
            raise MemoryError from e

    def free(self, buffer: Buffer) -> None:
        buffer.release()

    def put(self, buffer: Buffer, offset: int, x: np.ndarray) -> None:
        self.refuse_recording()
        cl.enqueue_copy(self.queue, buffer, x, dst_offset=offset, is_blocking=True)

    def get(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        self.refuse_recording()
        out = np.empty(nbytes, np.uint8)
        if nbytes:
            cl.enqueue_copy(self.queue, out, buffer, src_offset=offset, is_blocking=True)
        return out

    def fetch(self, buffer: Buffer, nbytes: int) -> Callable[[], np.ndarray]:
        self.refuse_recording()
        out = np.empty(nbytes, np.uint8)
        event = cl.enqueue_copy(self.queue, out, buffer, is_blocking=False)

        def arrived() -> np.ndarray:
            event.wait()
            return out

        return arrived

    def copy(
        self, target: Buffer, source: Buffer, nbytes: int, start: int = 0, to: int = 0
    ) -> None:
        self.refuse_recording()
        cl.enqueue_copy(
            self.queue, target, source, byte_count=nbytes, src_offset=start, dst_offset=to
        )

    def finish(self) -> None:
        self.queue.finish()

    def timed(self, queue: Callable[[], None]) -> Callable[[], float]:
        asked = cl.command_queue_properties.PROFILING_ENABLE
        if not self.queue.properties & asked:  # from now on; some drivers are slower then
            self.queue.finish()
            self.queue = cl.CommandQueue(self.context, properties=asked)
        start = cl.enqueue_marker(self.queue)
        queue()
        end = cl.enqueue_marker(self.queue)

        def seconds() -> float:
            end.wait()
            return 1e-9 * float(end.profile.end - start.profile.end)

        return seconds

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. OpenCL does not say what is free: reckoned from what this backend holds."""
        total = int(self.device.global_mem_size)
        stores = [s for store in self._stores.values() for s in store.shelves]
        held = sum(w.nbytes for w in self._weights) + sum(s.room * s.nbytes for s in stores)
        return total - self.pool.nbytes - self.kept.nbytes - held + self.idle(), total

    def view(self, buffer: Buffer, offset: int, nbytes: int) -> Buffer:
        return buffer.get_sub_region(offset, nbytes)

    # ---- programs

    def launch(
        self, program: Program, kernel: str, groups: Size, threads: Size, *args: Any
    ) -> None:
        compiled = self._kernels.get((program, kernel))
        if compiled is None:
            compiled = self._kernel(program, kernel)
        plain = [a.buffer if isinstance(a, GPUArray) else a for a in args]
        total = tuple(g * t for g, t in zip(groups, threads, strict=True))
        if self.recording:
            self._tape.append((compiled, total, threads, plain))
        else:
            compiled(self.queue, total, threads, *plain)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape: list[tuple[Any, ...]] = []
        self._tape = tape
        self.recording = True
        try:
            result = run()
        finally:
            self.recording, self._tape = False, []

        def replay() -> None:
            for compiled, total, threads, args in tape:
                compiled(self.queue, total, threads, *args)

        return replay, result

    def _kernel(self, program: Program, kernel: str) -> Any:
        self._kernels[program, kernel] = cl.Kernel(_build(self.device, program), kernel)
        return self._kernels[program, kernel]

    def close(self) -> None:
        super().close()
        self._kernels.clear()
