"""The devices of this machine, as ``load(device=...)`` names them."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from .. import system
from ..errors import DeviceError
from .backend import Backend, Compute, Device, check_n_threads


def list_devices() -> list[Device]:
    """The CPU first, then what CuPy and PyOpenCL find, where they are installed."""
    return [cpu(), *gpus()]


def cpu() -> Device:
    return Device("cpu", 0, system.cpu_name(), system.memory_bytes())


def gpus() -> list[Device]:
    """What CUDA and OpenCL reach; nothing when no package for them is installed."""
    if find_spec("cupy") is None and find_spec("pyopencl") is None:
        return []
    from .gpu import devices

    return list(devices.list())


def resolve(device: str | None) -> str:
    """The engine's name of a device, "cpu" or "cuda:1", for whatever a caller may say.

    "auto" is the first real GPU, else the CPU; "gpu" the first real GPU; "kompute" means OpenCL; a maker
    ("nvidia", "amd", "intel") or a part of a device's name finds that device.

    Raises
    ------
    DeviceError
        Nothing here answers to that name.
    """
    wanted = device or "cpu"
    kind = wanted.partition(":")[0]
    if kind in ("cpu", "reference", "cuda", "opencl"):
        return wanted
    if kind == "kompute":
        return "opencl" + wanted[len(kind) :]
    present = gpus()
    real = [d for d in present if d.is_real_gpu]
    if wanted in ("auto", "gpu"):
        if wanted == "auto" and not real:
            return "cpu"
        matches = real
    else:
        named = [d for d in present if wanted.lower() in d.name.lower()]
        matches = sorted(named, key=lambda d: d.on_cpu)
    if not matches:
        names = ", ".join(f"{d.id} ({d.name})" for d in present) or "none"
        raise DeviceError(
            f"no device answers to {wanted!r:.60}; expected 'cpu', 'reference', or a GPU: {names}. "
            "For NVIDIA install tinyllm[cuda13] or [cuda12], for others tinyllm[opencl]"
        )
    return matches[0].id


def resolve_all(device: str | None) -> list[str]:
    """The engine's names of one device, or of several with commas between them: "cuda:0,cuda:1"."""
    return [resolve(part.strip()) for part in (device or "cpu").split(",")]


def on_gpu(name: str) -> bool:
    """Is the device of this engine's name one that layers can be moved to?"""
    return name.partition(":")[0] in ("cuda", "opencl")


def open_backend(device: str, n_threads: int | None = None, compute: Compute = "f32") -> Backend:
    """The backend of a device name: "cpu", "reference", "cuda[:i]", "opencl[:i]".

    ``compute``: in what numbers matrices are multiplied: `tinyllm.load`.

    Raises
    ------
    DeviceError
        The name is unknown, the driver or the optional package is missing, or the device cannot compute so.
    ArgumentError
        ``n_threads`` is no number of threads, also where the device does not ask for one.
    """
    check_n_threads(n_threads)
    kind, _, index = device.partition(":")
    able = {"bf16": ["cpu"], "exact": ["cpu", "reference"]}
    if kind not in able.get(compute, [kind]):
        where = " or ".join(map(repr, able[compute]))
        raise DeviceError(
            f"compute={compute!r} is for device={where}, not {device!r}; leave it out"
        )
    if kind == "reference":
        from .reference import ReferenceBackend

        return ReferenceBackend()
    if kind == "cpu":
        from .cpu import jit

        if not jit.can_compile():
            return _instead_of_cpu(compute)
        from .cpu.backend import CPUBackend

        return CPUBackend(n_threads, compute)
    if kind == "cuda":
        from .gpu.cuda import CUDABackend

        return CUDABackend(index or "0")
    if kind == "opencl":
        from .gpu.opencl import OpenCLBackend

        return OpenCLBackend(index or "0")
    raise DeviceError(
        f"unknown device {device!r}; expected 'cpu', 'reference', 'cuda[:i]' or 'opencl[:i]'"
    )


def _instead_of_cpu(compute: Compute) -> Backend:
    """What computes where the sources of the CPU's kernels were not shipped: NumPy, with a warning."""
    missing = "the sources of the CPU's kernels are missing (only bytecode was shipped)"
    advice = "ship tinyllm/kernels/cpu/*.py too"
    if compute == "bf16":
        raise DeviceError(f"compute={compute!r}: {missing}; {advice}")
    warnings.warn(f"{missing}: NumPy computes, slowly; {advice}", RuntimeWarning, stacklevel=2)
    from .reference import ReferenceBackend

    return ReferenceBackend()
