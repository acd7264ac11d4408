"""Which GPUs there are, and which one a name means."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any

from ...errors import DeviceError
from ..backend import Device

NO_CUPY = (
    "device 'cuda' needs CuPy: pip install 'tinyllm[cuda13]' (or [cuda12] with an older driver)"
)
NO_PYOPENCL = "device 'opencl' needs PyOpenCL: pip install 'tinyllm[opencl]'"


def list() -> Sequence[Device]:  # noqa: A001 (read as devices.list())
    """All GPUs that an installed package and driver reach; none is no error."""
    found: MutableSequence[Device] = []
    for kind, look in (("cuda", cuda_devices), ("opencl", opencl_devices)):
        try:
            found += [Device(kind, *described) for described in look()]
        except DeviceError:
            continue
    return found


def opencl_devices() -> Any:
    """(index, name, memory, on_cpu) of each OpenCL device; DeviceError without package or driver."""
    return [
        (i, d.name.strip(), int(d.global_mem_size), on_cpu(d)) for i, d in enumerate(_all_opencl())
    ]


def on_cpu(device: Any) -> bool:
    """Whether an OpenCL driver computes on the processor."""
    import pyopencl as cl

    return bool(device.type & cl.device_type.CPU)


def _all_opencl() -> Any:
    try:
        import pyopencl as cl
    except ImportError as e:
        raise DeviceError(NO_PYOPENCL) from e
    try:
        return [d for platform in cl.get_platforms() for d in platform.get_devices()]
    except cl.Error as e:
        raise DeviceError(
            "no OpenCL driver was found; install the one of your GPU (or pocl-opencl-icd for the CPU)"
        ) from e


def choose_opencl(which: str) -> tuple[int, Any]:
    """The OpenCL device of a number or a part of a name."""
    found = _all_opencl()
    index = pick(which, [d.name for d in found], "opencl")
    return index, found[index]


def cuda_devices() -> Any:
    """(index, name, memory) of each CUDA device; DeviceError without package or driver."""
    try:
        import cupy
    except ImportError as e:
        raise DeviceError(NO_CUPY) from e
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        raise DeviceError(f"no CUDA device was found: {e}; install NVIDIA's driver") from e
    properties = [cupy.cuda.runtime.getDeviceProperties(i) for i in range(count)]
    return [(i, p["name"].decode(), p["totalGlobalMem"]) for i, p in enumerate(properties)]


def pick(which: str, names: Any, kind: str) -> int:
    """Index of a device by number ("1", or as a model says it, "1 NVIDIA H200") or by a part of its name."""
    number = which.partition(" ")[0]
    matches = [i for i, name in enumerate(names) if str(i) == number]
    if not number.isdigit():
        matches = [i for i, name in enumerate(names) if which.lower() in name.lower()]
    if not matches:
        present = ", ".join(f"{i} ({name.strip()})" for i, name in enumerate(names)) or "none"
        raise DeviceError(f"no device {kind}:{which}; there are: {present}")
    return matches[0]
