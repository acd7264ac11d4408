"""The devices of this machine, as ``load(device=...)`` names them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Device:
    """One device: ``id`` for ``load``, the maker's name, "cpu" | "cuda" | "opencl", bytes of memory."""

    id: str
    name: str
    kind: str
    memory: int


def list_devices() -> list[Device]:
    """The CPU first, then what CuPy and PyOpenCL find, where they are installed."""
    return [cpu(), *gpus()]


def cpu() -> Device:
    from .hardware import cpu_name, memory_bytes

    return Device("cpu", cpu_name(), "cpu", memory_bytes())


def gpus() -> list[Device]:
    """GPUs (and OpenCL devices of any kind); nothing when no package for them is installed."""
    if find_spec("cupy") is None and find_spec("pyopencl") is None:
        return []
    from .gpu.devices import list_gpus

    return list_gpus()
