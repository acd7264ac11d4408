"""The largest logits as a device finds them are those of the host, and the tokens chosen from them too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import normal

from tinyllm import gguf
from tinyllm.engine.generate import Run, Token, steps
from tinyllm.errors import DeviceError, NumericError
from tinyllm.kernels import choose
from tinyllm.models.build import build
from tinyllm.models.network import Network
from tinyllm.sampling import Sampler, SamplingParams

pytestmark = pytest.mark.device
pytest.importorskip("pyopencl", reason="needs PyOpenCL")
F32 = np.float32


def picked(be: Any, x: np.ndarray, k: int) -> list[Any]:
    return be.picked(be.pick(be.array(x), k))


@pytest.mark.parametrize("n", [5, 300, 10_000])
@pytest.mark.parametrize("k", [1, 3, 64, 256])
def test_the_largest_of_several_rows_are_those_of_the_host(opencl: Any, k: int, n: int) -> None:
    x = np.round(normal(3, n), 2)  # with equals, and zeros of both signs
    x[:, :2] = [0.0, -0.0]
    x[1] *= -1000
    for best, row in zip(picked(opencl, x, k), x, strict=True):
        ids, values = choose.top_k(row, min(k, n))
        assert best.finite
        assert len(best.ids) == len(best.values) >= min(k, n)
        assert np.array_equal(best.ids[: len(ids)], ids)
        assert np.array_equal(best.values[: len(ids)], values)
        assert np.array_equal(best.all(), row)


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
    assert len(first.ids) == 0
    assert second.ids.tolist() == [77]
    assert np.array_equal(first.all(), x[0])


# ---- whole answers


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from emulator.simulated_cuda import Driver, module

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


def runs_of(net: Network, n: int, sequences: int, eog: int = -1, **how: Any) -> list[Run]:
    """Different prompts to be continued."""
    runs = []
    for i in range(sequences):
        state = net.new_state(24)
        state.append([(11 * i + 7 * j + 3) % 300 for j in range(5 + i)])
        params = SamplingParams(**({"seed": 3} | how))
        sampler = Sampler(params, net.n_vocab, net.be.top_k)
        runs.append(Run(state, sampler, n, frozenset([eog]), overflow="shift"))
    return runs


def generate_tokens(net: Network, runs: list[Run]) -> Iterator[tuple[int, Token]]:
    """Each token that is chosen, with the number of its run; a step is taken when its tokens are asked for."""
    chosen: list[tuple[int, Token]] = []
    for i, run in enumerate(runs):
        run.accept = lambda token, i=i: chosen.append((i, token))
    for _ in steps(net, runs):
        found = chosen[:]
        chosen.clear()
        yield from found


def answers(net: Network, n: int = 12, sequences: int = 2, **how: Any) -> list[list[int]]:
    """The tokens after different prompts, decoded together."""
    runs, tokens = runs_of(net, n, sequences, **how), [[] for _ in range(sequences)]
    for i, token in generate_tokens(net, runs):
        tokens[i].append(token.id)
    return tokens


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
    net.be.picks = ()
    assert got == answers(net, **how)


def test_each_token_is_one_copy_up_one_graph_and_few_numbers_down(
    net: Network, driver: Any
) -> None:
    for _ in range(2):  # the second time the prompt is recorded
        answers(net, temperature=0, sequences=1)
    driver.launches = driver.replays = 0
    copies: dict[int, list[int]] = {1: [], 2: [], 3: []}  # bytes up, down, across
    runtime = type(net.be).get.__globals__["runtime"]
    copy = runtime.memcpyAsync

    def noted(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        copies[kind].append(nbytes)
        copy(target, source, nbytes, kind, stream)

    runtime.memcpyAsync = noted
    answers(net, temperature=0, sequences=1)
    assert driver.launches == 0  # another state finds the recorded steps
    assert driver.replays == 12
    assert [len(sizes) for sizes in copies.values()] == [12, 12, 11]
    assert max(copies[2]) < 4 * net.n_vocab // 8
    assert set(copies[3]) == {4}  # the id that the device goes on with


def test_damaged_weights_are_told(net: Network) -> None:
    pick = net.be.pick

    def damaged(logits: Any, k: int) -> Any:
        return pick(net.be.array(np.full((1, net.n_vocab), np.nan, F32)), k)

    net.be.pick = damaged
    with pytest.raises(NumericError, match="damaged"):
        answers(net, sequences=1)


# ---- steps that begin ahead


@pytest.fixture
def plain(net: Network) -> Any:
    """plain(run): what it gives without steps that begin ahead, and then with them."""

    def both(run: Any) -> tuple[Any, Any]:
        net.ahead.enabled = False
        want = run()
        net.ahead.enabled = True
        return want, run()

    return both


def test_the_next_step_is_queued_before_a_token_is_handed_out(net: Network, driver: Any) -> None:
    queued = [len(driver.pending) for _ in generate_tokens(net, runs_of(net, 9, 2, temperature=0))]
    assert all(queued[:-2])
    assert not any(queued[-2:])  # the last step has none behind it


@pytest.mark.parametrize(("n", "sequences"), [(1, 1), (2, 1), (25, 1), (20, 3)])
def test_the_tokens_are_the_same(net: Network, plain: Any, n: int, sequences: int) -> None:
    """25 tokens do not fit: the context is shifted."""
    want, got = plain(lambda: answers(net, n, sequences, temperature=0))
    assert got == want


def test_the_tokens_are_the_same_on_opencl(opencl: Any, data: Path) -> None:
    with gguf.open(data / "golden" / "quants" / "llama-h256-Q4_K.gguf") as f:
        net = build(f.metadata, f.tensors, opencl, "f16")
    got = answers(net, 8, 2, temperature=0)
    net.ahead.enabled = False
    assert got == answers(net, 8, 2, temperature=0)
    net.be.picks = ()
    assert got == answers(net, 8, 2, temperature=0)


def test_a_sequence_may_end_where_the_device_went_on(net: Network, plain: Any) -> None:
    first = answers(net, 12, 2, temperature=0)[0]
    want, got = plain(lambda: answers(net, 12, 2, temperature=0, eog=first[5]))
    assert got == want
    assert len(got[0]) < 12


def test_a_caller_may_change_the_sequence_between_tokens(net: Network, plain: Any) -> None:
    def edited() -> list[list[int]]:
        runs = runs_of(net, 11, 2, temperature=0)
        for count, (i, _) in enumerate(generate_tokens(net, runs)):
            if count == 7:
                runs[i].state.truncate(4)
                runs[i].state.append([9, 8, 7])
            if count == 15:
                runs[i].state.ids[-1] = 5
        return [run.state.ids for run in runs]

    want, got = plain(edited)
    assert got == want


def test_a_restored_state_does_not_go_on_with_an_older_step(
    net: Network, plain: Any, tmp_path: Path
) -> None:
    def continued(restored: bool) -> list[int]:
        (run,), (other,) = (runs_of(net, 8, 1, temperature=0) for _ in range(2))
        other.state.ids[:] = [400, 51, 302, 13, 444]
        tokens, others = generate_tokens(net, [run]), generate_tokens(net, [other])
        for _ in range(3):
            next(tokens), next(others)
        other.state.ids[-1] = run.state.ids[-1]
        other.state.save(tmp_path / "state.npz")
        if restored:
            run.state.restore(tmp_path / "state.npz")
        return [token.id for _, token in tokens]

    want, got = plain(lambda: continued(True))
    assert got == want != continued(False)


def test_sequences_of_several_callers_take_turns(net: Network, plain: Any) -> None:
    def turns() -> list[Any]:
        callers = [generate_tokens(net, [run]) for run in runs_of(net, 9, 3, temperature=0)]
        return [[next(c)[1].id for c in callers] for _ in range(9)]

    want, got = plain(turns)
    assert got == want


def test_many_equals_are_looked_at_again(net: Network, plain: Any) -> None:
    be, pick = net.be, net.be.pick
    net.be.pick = lambda logits, k: pick(be.clamp(be.scale_softcap(logits, -1.0), 1e-6), k)
    want, got = plain(lambda: answers(net, 6, 1, temperature=0))
    assert got == want
    assert len(set(want[0])) > 1


def test_states_that_end_leave_nothing_behind(net: Network, driver: Any) -> None:
    for _ in range(3):
        tokens = generate_tokens(net, runs_of(net, 30, 2, temperature=0))
        for _ in range(9):
            next(tokens)
        tokens.close()
    del tokens
    store = next(iter(net.be._stores.values()))
    assert store.idle > 0
    assert len(net.be._pinned._landings) <= 3
