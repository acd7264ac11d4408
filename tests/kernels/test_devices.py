"""What a caller may call a device."""

from __future__ import annotations

import pytest

from tinyllm.errors import DeviceError
from tinyllm.kernels import devices
from tinyllm.kernels.backend import Device

GPUS = [
    Device("cuda", 0, "NVIDIA H200", 10),
    Device("opencl", 0, "AMD EPYC", 20, on_cpu=True),
    Device("opencl", 1, "AMD Radeon RX 7900", 30),
]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("reference", "reference"),
        ("cuda:1", "cuda:1"),
        ("auto", "cuda:0"),
        ("gpu", "cuda:0"),
        ("nvidia", "cuda:0"),
        ("amd", "opencl:1"),
        ("Radeon", "opencl:1"),
        ("kompute", "opencl"),
        ("kompute:1", "opencl:1"),
    ],
)
def test_names_find_devices(said: str | None, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: GPUS)
    assert devices.resolve(said) == meant


def test_auto_without_a_real_gpu_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: GPUS[1:2])
    assert devices.resolve("auto") == "cpu"
    with pytest.raises(DeviceError, match=r"opencl:0 \(AMD EPYC\).*tinyllm\[cuda13\]"):
        devices.resolve("gpu")


def test_the_cpu_is_always_there() -> None:
    first = devices.list_devices()[0]
    assert (first.id, first.kind) == ("cpu", "cpu")
    assert first.memory > 1 << 28
