"""Prefill through a library's matrix product: NumPy in the library's place, OpenCL kernels around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored import normal, stored

from tinyllm.kernels.gpu import backend, matmul_library
from tinyllm.kernels.gpu.matmul_library import Library
from tinyllm.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.device
pytest.importorskip("pyopencl", reason="needs PyOpenCL")
REFERENCE = ReferenceBackend()
F32 = np.float32


def as_float(kind: str, raw: np.ndarray) -> np.ndarray:
    """Raw bytes of plain numbers -> float32."""
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(F32)
    return raw.view({"F32": F32, "F16": np.float16}[kind]).astype(F32)


@pytest.fixture
def be(opencl: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def multiply(
        kind: str,
        w: tuple[Any, int],
        x: Any,
        rows: range,
        y: Any,
        columns: range,
        keep: bool = False,
    ) -> None:
        """Multiply as cuBLAS does it: with these buffers, leading dimensions and accumulation."""
        buffer, w_row = w
        n, n_in = len(columns), x.shape[-1]
        raw = opencl.get(buffer, 0, n * w_row * (4 if kind == "F32" else 2))
        matrix = as_float(kind, raw).reshape(n, w_row)[:, :n_in]
        left = as_float(kind, opencl.get(x.buffer, 0, x.nbytes)).reshape(-1, n_in)
        out = np.array(opencl.numpy(y)).reshape(-1, y.shape[-1])
        here = np.s_[: len(rows), columns.start : columns.stop]
        out[here] = left[rows.start : rows.stop] @ matrix.T + (out[here] if keep else 0)
        opencl.put(y.buffer, 0, out)

    opencl.library = Library(opencl, multiply)
    monkeypatch.setattr(backend, "LIBRARY_ROWS", backend.MATVEC_ROWS + 1)
    return opencl


@pytest.mark.parametrize("room", [0, matmul_library.MOST_PARTS])
@pytest.mark.parametrize("size", [1e-4, 1, 1e6])
@pytest.mark.parametrize(
    ("kind", "bound"),
    [("F32", 1e-6), ("F16", 2e-6), ("BF16", 2e-6), ("Q4_0", 0.0085), ("Q6_K", 0.0085)],
)
def test_library_products_are_as_exact_as_their_format(
    be: Any, kind: str, bound: float, size: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_library, "MOST_PARTS", room)
    monkeypatch.setattr(
        matmul_library, "MOST_PIECE", 2 * 256 * 20
    )  # 20 rows at a time, 8 at the end
    rng = np.random.default_rng(0)
    source = stored(kind, 48, 256)
    x = rng.standard_normal((20, 256), dtype=F32) * F32(size)
    x[3], bias = 0, rng.standard_normal(48, dtype=F32)
    want = REFERENCE.matmul(REFERENCE.load(source), x, bias)
    got = be.numpy(be.matmul(be.load(source), be.array(x), be.array(bias)))
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < bound


def test_rows_that_are_not_whole_words_are_padded(be: Any) -> None:
    source, x = stored("F16", 9, 37), normal(18, 37)
    want = REFERENCE.matmul(REFERENCE.load(source), x)
    got = be.numpy(be.matmul(be.load(source), be.array(x)))
    assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ2_S"])
def test_long_prompts_see_the_same_rounded_activations_as_single_tokens(be: Any, kind: str) -> None:
    w, x = be.load(stored(kind, 48, 256)), normal(20, 256)
    long = be.numpy(be.matmul(w, be.array(x)))
    single = np.concatenate([be.numpy(be.matmul(w, be.array(row[None]))) for row in x])
    assert np.sqrt(np.mean((long - single) ** 2) / np.mean(single**2)) < 5e-4
