"""GPT4All's names for devices: ``cuda:NAME`` and, for OpenCL, ``kompute:NAME``."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import Literal

BackendName = Literal["cpu", "kompute", "cuda", "metal"]
VENDORS = ("amd", "nvidia", "intel")
SOFTWARE = ("cpu", "pthread")  # how PoCL's devices begin, which run on the CPU


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

    @property
    def is_real(self) -> bool:
        return not self.name.lower().startswith(SOFTWARE)

    def answers_to(self, backend: str, wanted: str) -> bool:
        """Whether this device was asked for, by kind, vendor, index or name.

        Digits are an index. A device that only plays a GPU answers to its full name alone.
        """
        if backend == "cuda" and self.backend != "cuda":
            return False
        if wanted == "gpu" or wanted in VENDORS:
            return self.is_real and (wanted == "gpu" or wanted in self.name.lower())
        if wanted.isdigit():
            return self.backend == backend and self.engine.endswith(f":{wanted}")
        return wanted in (self.name, self.full_name)


def backend_of(engine: str) -> BackendName:
    """GPT4All's name for the kind of a device that the engine calls ``engine``, such as "cuda:0 X"."""
    names: dict[str, BackendName] = {"cuda": "cuda", "opencl": "kompute"}
    return names.get(engine.split(":")[0].split(" ")[0], "cpu")


def gpu_name(engine: str) -> str | None:
    """The GPU's own name in what the engine calls it; None on the CPU."""
    return None if backend_of(engine) == "cpu" else engine.partition(" ")[2] or engine


def gpus(mem_required: int = 0) -> list[GPU]:
    """The GPUs with at least this much memory, in bytes."""
    from ..kernels.devices import list_devices

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
    """Names of the GPUs with at least this much memory, such as ``"cuda:NVIDIA H200"``.

    Raises
    ------
    ValueError
        There is none.
    """
    return [gpu.full_name for gpu in real(gpus(mem_required))]


def real(found: list[GPU]) -> list[GPU]:
    """The GPUs that are hardware, without programs that only play one; ValueError if there is none."""
    kept = [gpu for gpu in found if gpu.is_real]
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
    if chosen := next((gpu for gpu in wanted if gpu.memory >= mem_required), None):
        return chosen
    if backend == "cuda" and not any(gpu.backend == "cuda" for gpu in reached):
        raise RuntimeError(
            "Unable to instantiate model: Could not find any implementations for backend: cuda"
            " (no CUDA device is reached; its package comes with tinyllm[cuda13] or [cuda12])"
        )
    present = real(reached)
    names = [gpu.full_name for gpu in present if gpu.memory >= mem_required]
    lacking = [gpu.full_name for gpu in present if gpu.memory < mem_required]
    message = f"Unable to initialize model on GPU: {device!r}\nAvailable GPUs: {names}"
    if lacking:
        message += f"\nUnavailable GPUs due to insufficient memory: {lacking}"
    raise ValueError(message)
