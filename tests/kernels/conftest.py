"""Backends that several files test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tinyllm.errors import DeviceError


@pytest.fixture
def opencl() -> Iterator[Any]:
    """The first OpenCL device; skips where there is none."""
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from tinyllm.kernels.gpu.opencl import OpenCLBackend

    try:
        backend = OpenCLBackend()
    except DeviceError as e:
        pytest.skip(str(e))
    yield backend
    backend.close()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA backend on a simulated driver; skips where there is no OpenCL to simulate it with."""
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from simulated_cuda import Driver, module

    try:
        driver = Driver()
    except DeviceError as e:
        pytest.skip(str(e))
    backend = module(driver, monkeypatch).CUDABackend("0")
    backend.driver = driver
    yield backend
    backend.close()
