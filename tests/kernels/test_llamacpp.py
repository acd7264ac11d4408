"""llama.cpp's products, where llama-cpp-python is installed."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllm.kernels import llamacpp
from tinyllm.kernels.lab import QUANTISED, RandomMatrix


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_its_products_are_right(kind: str, n_tokens: int) -> None:
    where = llamacpp.folder()
    if where is None:
        pytest.skip("llama-cpp-python is not installed")
    matrix = RandomMatrix(kind, 64, 512)
    x = np.random.default_rng(0).standard_normal((n_tokens, 512), dtype=np.float32)
    found, seconds = llamacpp.Products(where, 1).multiply(matrix, x)
    exact = x @ matrix.values().T
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < QUANTISED
    assert seconds > 0
