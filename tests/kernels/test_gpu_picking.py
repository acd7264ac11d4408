"""The largest logits as a device finds them are those of the host, and the tokens chosen from them too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import DeviceError, NumericError
from tinyllm.generate import Run, generate_tokens
from tinyllm.kernels import choose
from tinyllm.models.network import Network, build
from tinyllm.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.device
pytest.importorskip("pyopencl", reason="needs PyOpenCL")
F32 = np.float32


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=F32)


def picked(be: Any, x: np.ndarray, k: int) -> list[Any]:
    return be.picked(be.pick(be.array(x), k))


@pytest.mark.parametrize("n", [5, 300, 10_000])
@pytest.mark.parametrize("k", [1, 3, 256])
def test_the_largest_of_several_rows_are_those_of_the_host(opencl: Any, k: int, n: int) -> None:
    x = np.round(normal(3, n), 2)  # with equals, and zeros of both signs
    x[:, :2] = [0.0, -0.0]
    x[1] *= -1000
    for best, row in zip(picked(opencl, x, k), x, strict=True):
        ids, values = choose.top_k(row, min(k, n))
        got, found = best.sorted()
        assert best.finite
        assert len(got) >= min(k, n)
        assert np.array_equal(got[: len(ids)], ids)
        assert np.array_equal(found[: len(ids)], values)
        assert np.array_equal(best.all(), row)
        assert best.first() == ids[0]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [1, 256])
def test_a_row_that_is_not_finite_is_told(opencl: Any, k: int, bad: float) -> None:
    x = normal(3, 5000)
    x[1, 4321] = bad
    assert [best.finite for best in picked(opencl, x, k)] == [True, False, True]


def test_more_equals_than_there_is_room_for_are_left_to_the_host(opencl: Any) -> None:
    x = np.ones((2, 5000), F32)
    x[1, 77] = 2
    first, second = picked(opencl, x, 1)
    assert (first.pairs, second.first()) == (None, 77)
    assert np.array_equal(first.all(), x[0])


# ---- whole answers


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from simulated_cuda import Driver, module

    try:
        driver = Driver()
    except DeviceError as e:
        pytest.skip(str(e))
    driver.backend = module(driver, monkeypatch).CUDABackend("0")
    yield driver
    driver.backend.close()


@pytest.fixture
def net(driver: Any, data: Path) -> Network:
    with gguf.open(data / "golden" / "quants" / "llama-h256-Q8_0.gguf") as f:
        return build(f.metadata, f.tensors, driver.backend, "f16")


def answers(net: Network, n: int = 12, sequences: int = 2, **how: Any) -> list[list[int]]:
    """The tokens after different prompts, decoded together."""
    runs = []
    for i in range(sequences):
        state = net.new_state(64)
        state.append([(11 * i + 7 * j + 3) % 300 for j in range(5 + i)])
        params = SamplingParams(**({"seed": 3} | how))
        runs.append(Run(state, Sampler(params, net.n_vocab, net.be.top_k), n))
    for _ in generate_tokens(net, runs):
        pass
    return [run.state.ids[5 + i :] for i, run in enumerate(runs)]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 0, "repeat_penalty": 1.3},
        {"temperature": 2.0},
        {"temperature": 2.0, "repeat_penalty": 1.2, "frequency_penalty": 0.3, "typical_p": 0.9},
        {"temperature": 2.0, "repeat_penalty": 0.7},  # lifts tokens: all logits are brought
        {"temperature": 2.0, "top_k": 0},
        {"temperature": 0, "logit_bias": {7: 30.0}},
    ],
    ids=str,
)
def test_answers_are_those_of_a_host_that_sees_all_logits(net: Network, how: Any) -> None:
    got = answers(net, **how)
    net.be.most_picked = 0
    assert got == answers(net, **how)


def test_few_numbers_cross_and_one_graph_runs_for_each_token(net: Network, driver: Any) -> None:
    for _ in range(2):  # the second time the prompt is recorded
        answers(net, temperature=0, sequences=1)
    driver.launches = driver.replays = 0
    fetched: list[int] = []
    runtime = type(net.be).get.__globals__["runtime"]
    copy = runtime.memcpyAsync

    def noted(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        if kind == 2:
            fetched.append(nbytes)
        copy(target, source, nbytes, kind, stream)

    runtime.memcpyAsync = noted
    answers(net, temperature=0, sequences=1)
    assert driver.launches == 0  # another state finds the recorded steps
    assert driver.replays == len(fetched) == 12
    assert max(fetched) < 4 * net.n_vocab // 8


def test_damaged_weights_are_told(net: Network) -> None:
    pick = net.be.pick

    def damaged(logits: Any, k: int) -> Any:
        return pick(net.be.array(np.full((1, net.n_vocab), np.nan, F32)), k)

    net.be.pick = damaged
    with pytest.raises(NumericError, match="damaged"):
        answers(net, sequences=1)
