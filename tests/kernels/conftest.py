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
def interpreted() -> Iterator[Any]:
    """The CUDA backend with NVRTC's own code, interpreted."""
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from interpreted_cuda import Interpreter
    from simulated_cuda import backend as opened

    driver = Interpreter()
    backend = opened(driver)
    backend.driver = driver
    yield backend
    backend.close()
