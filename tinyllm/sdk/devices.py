"""GPT4All's names for devices: ``cuda:NAME`` and, for OpenCL, ``kompute:NAME``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..kernels.backend import Device

from .. import system

BackendName = Literal["cpu", "kompute", "cuda", "metal"]
VENDORS = ("amd", "nvidia", "intel")
BACKENDS: dict[str, BackendName] = {"cuda": "cuda", "opencl": "kompute"}  # by the engine's kinds


@dataclass(frozen=True)
class GPU:
    """A device as GPT4All names it."""

    device: Device  # as the engine knows it

    @property
    def backend(self) -> BackendName:
        return BACKENDS[self.device.kind]

    @property
    def full_name(self) -> str:
        return f"{self.backend}:{self.device.name}"

    def answers_to(self, backend: str, wanted: str) -> bool:
        """Whether this device was asked for, by kind, vendor, index or name.

        Digits are an index. A device that only plays a GPU answers to its full name alone.
        """
        if backend == "cuda" and self.backend != "cuda":
            return False
        name, real = self.device.name, self.device.is_real_gpu
        if wanted == "gpu" or wanted in VENDORS:
            return real and (wanted == "gpu" or wanted in name.lower())
        if wanted.isdigit():
            return self.backend == backend and self.device.index == int(wanted)
        return wanted in (name, self.full_name)


def backend_of(device: Device) -> BackendName:
    """GPT4All's name for the kind of a device."""
    return BACKENDS.get(device.kind, "cpu")


def gpu_name(device: Device) -> str | None:
    """The GPU's own name; None on the CPU."""
    return device.name if device.is_gpu else None


def gpus(mem_required: int = 0) -> list[GPU]:
    """The GPUs with at least this much memory, in bytes."""
    from ..kernels import devices

    return [GPU(d) for d in devices.list_devices() if d.is_gpu and d.memory >= mem_required]


def list_gpus(mem_required: int = 0) -> list[str]:
    """Names of the GPUs with at least this much memory, such as ``"cuda:NVIDIA H200"``.

    Raises
    ------
    ValueError
        There is none.
    """
    return [gpu.full_name for gpu in real(gpus(mem_required))]


def real(found: list[GPU]) -> list[GPU]:
    """The GPUs that are hardware, without programs that only play one; ValueError if there is none."""
    kept = [gpu for gpu in found if gpu.device.is_real_gpu]
    if not kept:
        raise ValueError("Unable to retrieve available GPU devices")
    return kept


def split_device(device: str | None) -> tuple[str, str | None]:
    """GPT4All's ``device`` argument as (backend, what to look for there); None: no GPU.

    Raises
    ------
    ValueError
        The platform has no such device.
    """
    if system.NAME == "darwin":
        if device is None:
            return "auto", None
        if device == "cpu":
            return "cpu", None
        if system.MACHINE != "arm64" or device != "gpu":
            raise ValueError(f"Unknown device for this platform: {device}")
        return "metal", None
    if device is None or device == "cpu":
        return "kompute", None
    if device in ("cuda", "kompute"):
        return device, "gpu"
    if device.startswith("cuda:"):
        return "cuda", device.removeprefix("cuda:")
    return "kompute", device.removeprefix("kompute:")


def choose(backend: str, device: str, mem_required: int = 0) -> GPU:
    """The GPU that ``device`` asks for: "gpu", a vendor, an index, or a name.

    Raises
    ------
    ValueError
        No GPU is there, or none of this name with enough memory.
    RuntimeError
        CUDA was asked for, and there is none.
    """
    reached = gpus()
    wanted = [gpu for gpu in reached if gpu.answers_to(backend, device)]
    if chosen := next((gpu for gpu in wanted if gpu.device.memory >= mem_required), None):
        return chosen
    if backend == "cuda" and not any(gpu.backend == "cuda" for gpu in reached):
        raise RuntimeError(
            "Unable to instantiate model: Could not find any implementations for backend: cuda"
            " (no CUDA device is reached; its package comes with tinyllm[cuda13] or [cuda12])"
        )
    present = real(reached)
    names = [gpu.full_name for gpu in present if gpu.device.memory >= mem_required]
    lacking = [gpu.full_name for gpu in present if gpu.device.memory < mem_required]
    message = f"Unable to initialize model on GPU: {device!r}\nAvailable GPUs: {names}"
    if lacking:
        message += f"\nUnavailable GPUs due to insufficient memory: {lacking}"
    raise ValueError(message)
