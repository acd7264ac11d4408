"""States that fork, that are cut and that leave their windows behind: the bits are those of reading anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.kernels import pages
from tinyllm.models.memory import cache_bytes

WINDOWED = ["gemma3", "gpt-oss", "cohere2", "olmo3-swa"]
DEVICES = ["cpu", "reference", pytest.param("opencl", marks=pytest.mark.device)]


def opened(path: Path, device: str = "cpu", **options: Any) -> tinyllm.Model:
    try:
        return tinyllm.load(path, device=device, **options)
    except tinyllm.errors.DeviceError as e:
        pytest.skip(f"{device}: {e}")


def tokens(m: tinyllm.Model, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, m.network.n_vocab, n).tolist()


def anew(m: tinyllm.Model, ids: list[int], n: int) -> np.ndarray:
    """Logits of the last n tokens, read by a state of their own."""
    return m.logits(ids, m.new_state(len(ids)))[-n:]


def close(m: tinyllm.Model, a: np.ndarray, b: np.ndarray) -> bool:
    """Equal; to the bit where the device promises that."""
    return np.array_equal(a, b) if m.device == "cpu" else np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["stories260K", "mamba", "qwen35"])
def test_forks_go_on_as_if_each_had_read_all(data: Path, name: str, device: str) -> None:
    places = [
        data / "models" / f"{name}.gguf",
        data / "golden" / "models" / f"{name}.gguf",
        Path(__file__).parent.parent / "data" / "models" / f"{name}.gguf",
    ]
    with opened(next(p for p in places if p.exists()), device) as m:
        n = 300 if device == "cpu" else 100  # pages have 256 and 64 positions
        ids = tokens(m, n)
        state = m.new_state(400)
        m.logits(ids, state)
        forks = [state.fork() for _ in range(3)]
        assert all(f.ids == ids and f.n_past == n for f in forks)
        for i, s in enumerate([*forks, state]):
            more = tokens(m, 20, seed=i + 1)
            assert close(m, m.logits(more, s), anew(m, ids + more, 20))
        second = forks[0].fork()
        rows = m.network.forward([(s, 1, "last") for s in appended([second, state], [5, 7])])
        rows = [np.array(r) for r in rows]
        for s, row in zip([second, state], rows, strict=True):
            assert close(m, row, anew(m, s.ids, 1))


def appended(states: list[Any], ids: list[int]) -> list[Any]:
    for s, i in zip(states, ids, strict=True):
        s.append([i])
    return states


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, device) for name in WINDOWED for device in ("cpu", "reference")]
    + [pytest.param("gemma3", "opencl", marks=pytest.mark.device)],
)
def test_windows_leave_pages_behind_and_no_bit_differs(
    data: Path, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(data / "golden" / "models" / f"{name}.gguf", device) as m:
        n = 1100 if device == "cpu" else 330
        ids = tokens(m, n + 60)
        whole = m.new_state(n + 60)
        expected = m.logits(ids, whole)
        monkeypatch.setattr(pages, "SLACK", 16)
        state = m.new_state(n + 60)
        got = [m.logits(ids[i : min(i + 100, n)], state) for i in range(0, n, 100)]
        got += [m.logits([i], state) for i in ids[n:]]
        assert close(m, np.concatenate(got), expected)
        assert state.nbytes < whole.nbytes
        assert not state.cache.holds_all(state.n_past)
        # a shallow cut keeps what is stored, a deep one reads anew
        state.truncate(n + 50)
        assert state.n_past == n + 50
        assert close(m, m.logits(ids[n + 50 :], state), expected[n + 50 :])
        state.truncate(100)
        assert (state.n_past, state.ids) == (0, ids[:100])
        assert close(m, m.logits(ids[100:150], state), expected[100:150])
        fork = whole.fork()
        whole.truncate(10)
        assert close(m, m.logits(ids[10:50], whole), expected[10:50])
        fork.truncate(n)
        assert close(m, m.logits(ids[n:], fork), expected[n:])


def test_a_shift_behind_dropped_pages_reads_anew(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SLACK", 16)
    with opened(data / "golden" / "models" / "gemma3.gguf") as m:
        ids = tokens(m, 1000)
        state = m.new_state(1000)
        m.logits(ids, state)
        state.shift(10, 500)
        assert (state.n_past, state.ids) == (0, ids[:10] + ids[510:])
        del state.ids[-1:]
        assert np.array_equal(m.logits(ids[-1:], state), anew(m, ids[:10] + ids[510:], 1))


def test_reuse_says_what_is_still_stored(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SLACK", 16)
    with opened(data / "golden" / "models" / "gemma3.gguf") as m:
        ids = tokens(m, 1000)
        state = m.new_state(1000)
        m.logits(ids, state)
        assert state.reuse([*ids[:995], 1, 2]) == 995
        assert state.reuse([*ids[:500], 1, 2]) == 0
        assert state.ids == [*ids[:500], 1, 2]


def test_bytes_of_a_context_are_those_that_it_takes(data: Path) -> None:
    with opened(data / "golden" / "models" / "gemma3.gguf") as m:
        n = 6000
        state = m.new_state(n)
        assert state.nbytes == 0
        m.logits(tokens(m, n), state)
        said = cache_bytes(m.network.decoder.caches, n, m.network.kv_type)
        unwindowed = n * 6 * 2 * m.config.n_head_kv[0] * 2 * m.config.head_dim
        assert state.nbytes <= 1.05 * said < unwindowed
        assert said <= 1.25 * state.nbytes
