"""The words for tensor cores, on a device that acts them out, by NVRTC, and on CUDA where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.errors import DeviceError
from tinyllm.kernels.gpu import devices, nvrtc, sources

EMULATOR = Path(__file__).parent / "emulator"
F16, F32 = np.float16, np.float32


def text(prelude: str) -> str:
    return prelude + (EMULATOR / "tensor_words.c").read_text("utf-8")


def run_emulated(kernel: str, *arrays: np.ndarray) -> None:
    """The kernel with one warp, the arrays changed in place."""
    cl = pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from tinyllm.kernels.gpu.opencl import build

    try:
        context = cl.Context([devices.choose_opencl("0")[1]])
    except DeviceError as e:
        pytest.skip(str(e))
    queue = cl.CommandQueue(context)
    emulated = (EMULATOR / "emulated_tensor.h").read_text("utf-8")
    source = text(sources.read("prelude_opencl.h") + emulated)
    program = build(context, source)
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    buffers = [cl.Buffer(context, flags, hostbuf=x) for x in arrays]
    getattr(program, kernel)(queue, (32,), (32,), *buffers)
    for x, buffer in zip(arrays, buffers, strict=True):
        cl.enqueue_copy(queue, x, buffer)


def run_cuda(kernel: str, *arrays: np.ndarray) -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy")

    try:
        devices.cuda_devices()
    except DeviceError as e:
        pytest.skip(str(e))
    source = text(sources.read("prelude_cuda.h") + sources.read("tensor.h"))
    on_device = [cupy.asarray(x) for x in arrays]
    module = cupy.RawModule(code=source, options=("-std=c++17",), backend="nvrtc")
    module.get_function(kernel)((1,), (32,), tuple(on_device))
    for x, there in zip(arrays, on_device, strict=True):
        x[...] = there.get()


def run_interpreted(kernel: str, *arrays: np.ndarray) -> None:
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from emulator.interpreted_cuda import interpret

    code = (EMULATOR / "tensor_words.c").read_text("utf-8")
    for architecture in ("compute_75", "compute_90"):
        copies = [x.copy() for x in arrays]
        interpret(code, kernel, 32, *copies, architecture=architecture)
    for x, copy in zip(arrays, copies, strict=True):
        x[...] = copy


RUNS = [run_emulated, run_interpreted, run_cuda]


@pytest.mark.device
@pytest.mark.parametrize("run", RUNS)
def test_products_of_tiles(run: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(F16), rng.standard_normal((16, 8)).astype(F16)
    c, transposed, xor = (np.zeros(n, F32) for n in (128, 128, 32))
    run("words", a, b, c, transposed, xor)
    want = 1 + a.astype(F32) @ b.astype(F32)
    assert np.abs(c.reshape(16, 8) - want).max() < 1e-5
    assert np.abs(transposed.reshape(16, 8) - want).max() < 1e-5
    assert np.array_equal(xor, np.arange(32) ^ 5)


@pytest.mark.device
@pytest.mark.parametrize("run", RUNS)
def test_pairs_of_halves(run: Any) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(64).astype(F16) for _ in range(3))
    x = rng.standard_normal(64).astype(F32)
    fma, add, pair = (np.zeros(32, np.uint32) for _ in range(3))
    run("halves", *(v.view(np.uint32) for v in (a, b, c)), x, fma, add, pair)
    wide = a.astype(F32) * b.astype(F32) + c.astype(F32)
    assert np.abs(fma.view(F16) - wide).max() < 2e-3
    assert np.array_equal(add.view(F16), a + b)
    assert np.array_equal(pair.view(F16), x.astype(F16))


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_the_words_compile(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy_backends.cuda.libs", reason="needs CuPy")
    monkeypatch.setattr(
        sources, "text", lambda prelude, _: text(sources.read(prelude) + sources.read("tensor.h"))
    )
    code, kernels = nvrtc.compile_program((("tensor_words.c",), ()), arch)
    assert code[:4] == b"\x7fELF"
    assert {k.kernel: k.stack for k in kernels} == {"words": 0, "halves": 0}
