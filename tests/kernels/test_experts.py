"""Mixtures of experts on the cpu: rows grouped by expert give the same bits as rows one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored import stored

from tinyllm.kernels.backend import Batch
from tinyllm.kernels.cpu.backend import CPUBackend

N_EXPERTS, N_OUT, N_IN = 6, 200, 256


def choices(n_tokens: int) -> np.ndarray:
    """Two experts a token [n_tokens, 2]: most choose expert 1, one chooses 4, none 5."""
    some = np.random.default_rng(1).integers(2, 4, n_tokens)
    out = np.stack([np.ones(n_tokens), some], 1).astype(np.int32)
    out[n_tokens // 2] = [4, 0]
    return out


@pytest.fixture(scope="module")
def be() -> CPUBackend:
    return CPUBackend(2)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("type_name", "n_tokens"), [("Q4_K", 70), ("Q4_K", 530), ("F16", 530), ("Q8_0", 2)]
)
def test_grouped_rows_are_those_of_single_tokens(
    be: CPUBackend, type_name: str, n_tokens: int, each: bool
) -> None:
    rng, experts = np.random.default_rng(2), choices(n_tokens)
    w, bias = (
        be.load(stored(type_name, N_EXPERTS, N_OUT, N_IN)),
        be.array(rng.normal(0, 1, (N_EXPERTS, N_OUT))),
    )
    shape = (n_tokens, 2, N_IN) if each else (n_tokens, N_IN)
    x = rng.normal(0, 1, shape).astype(np.float32)
    together = be.numpy(be.matmul_experts(w, be.array(x), be.array(experts), bias)).copy()
    for t in {0, 1, n_tokens // 2, n_tokens - 1}:
        part = be.array(x[t : t + 1]), be.array(experts[t : t + 1])
        np.testing.assert_array_equal(be.numpy(be.matmul_experts(w, *part, bias))[0], together[t])


def test_a_replayed_step_groups_anew(be: CPUBackend) -> None:
    w, n = be.load(stored("Q8_0", N_EXPERTS, N_OUT, N_IN)), 8
    x = be.array(np.random.default_rng(3).normal(0, 1, (n, N_IN)))

    def chosen(batch: Batch) -> Any:
        return be.matmul_experts(w, x, batch.ids.reshape(n, 1))

    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, N_EXPERTS, n).astype(np.int32)
        got = be.numpy(be.step("experts", chosen, Batch.of([ids], [0], [0]))).copy()
        want = be.numpy(be.matmul_experts(w, x, be.array(ids.reshape(n, 1))))
        np.testing.assert_array_equal(got, want)
