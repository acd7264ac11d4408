"""Backends that several files test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tinyllm.errors import DeviceError

OFTEN = ("Q4_0", "Q6_K", "IQ2_S", "F16")  # formats that are interpreted with any number of rows


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreting is slow: most formats are, by default, with one row and with 20."""
    for item in items:
        found = re.search(r"test_matmul_equals\w+\[interpreted-(\w+)-(3|8|70)\]", item.name)
        if found and found[1] not in OFTEN:
            item.add_marker(pytest.mark.slow)


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
    from emulator.interpreted_cuda import Interpreter
    from emulator.simulated_cuda import backend as opened

    driver = Interpreter()
    backend = opened(driver)
    backend.driver = driver
    yield backend
    backend.close()
