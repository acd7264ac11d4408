"""GPT4All's names for devices: ``cuda:NAME`` and, for OpenCL, ``kompute:NAME``."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import Literal

BackendName = Literal["cpu", "kompute", "cuda", "metal"]
VENDORS = ("amd", "nvidia", "intel")


@dataclass(frozen=True)
class GPU:
    """A device as GPT4All names it, and as the engine does."""

    backend: BackendName
    name: str
    engine: str  # for tinyllm.load(device=...)
    memory: int

    @property
    def full_name(self) -> str:
        return f"{self.backend}:{self.name}"


def gpus(mem_required: int = 0) -> list[GPU]:
    """The GPUs with at least this much memory, in bytes."""
    from tinyllm.model import list_devices

    found = []
    for device in list_devices():
        if device.kind == "cpu" or device.memory < mem_required:
            continue
        engine = getattr(device, "id", None) or device.name.split(" ")[0]
        name = device.name.removeprefix(f"{engine} ")
        found.append(
            GPU("cuda" if device.kind == "cuda" else "kompute", name, engine, device.memory)
        )
    return found


def list_gpus(mem_required: int = 0) -> list[str]:
    """Names such as ``"cuda:NVIDIA H200"``.

    Raises
    ------
    ValueError
        There is none.
    """
    return [gpu.full_name for gpu in required(gpus(mem_required))]


def required(found: list[GPU]) -> list[GPU]:
    if not found:
        raise ValueError("Unable to retrieve available GPU devices")
    return found


def split_device(device: str | None) -> tuple[str, str | None]:
    """GPT4All's ``device`` argument as (backend, what to look for there); None: no GPU.

    Raises
    ------
    ValueError
        The platform has no such device.
    """
    if sys.platform == "darwin":
        if device is None:
            return "auto", None
        if device == "cpu":
            return "cpu", None
        if platform.machine() != "arm64" or device != "gpu":
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
    """The GPU that ``device`` asks for: "gpu", a vendor, or a name.

    Raises
    ------
    ValueError
        No GPU is there, or none of this name with enough memory.
    """
    everything = required(gpus())
    enough = [gpu for gpu in everything if gpu.memory >= mem_required]
    wanted = [gpu for gpu in enough if _matches(gpu, backend, device)]
    if wanted:
        return wanted[0]
    lacking = [gpu.full_name for gpu in everything if gpu not in enough]
    names = [gpu.full_name for gpu in enough]
    message = f"Unable to initialize model on GPU: {device!r}\nAvailable GPUs: {names}"
    if lacking:
        message += f"\nUnavailable GPUs due to insufficient memory: {lacking}"
    raise ValueError(message)


def _matches(gpu: GPU, backend: str, device: str) -> bool:
    if backend == "cuda" and gpu.backend != "cuda":
        return False
    if device == "gpu":
        return True
    if device in VENDORS:
        return device in gpu.name.lower()
    return device in (gpu.name, gpu.full_name)
