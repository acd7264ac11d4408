"""The past as pages: shared by forks, copied when one side writes, given back behind windows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from stored import normal

from tinyllm.errors import ContextOverflow, DeviceError
from tinyllm.kernels import pages
from tinyllm.kernels.backend import Backend, Batch, LayerCache
from tinyllm.kernels.devices import open_backend
from tinyllm.kernels.pages import Page

HEADS, DIM = 2, 16
LAYERS = [LayerCache(HEADS, DIM, DIM), LayerCache(), LayerCache(HEADS, DIM, DIM, window=100)]


@pytest.fixture(params=["cpu", "reference", pytest.param("opencl", marks=pytest.mark.device)])
def be(request: pytest.FixtureRequest) -> Iterator[Backend]:
    try:
        backend = open_backend(request.param)
    except (DeviceError, ImportError) as e:
        pytest.skip(f"{request.param}: {e}")
    yield backend
    backend.close()


def write(be: Backend, cache: Any, first: int, n: int, seed: int = 0) -> None:
    """Store random keys and values of n positions in all layers."""
    x = normal(n, HEADS * DIM, seed=seed)

    def fn(batch: Batch) -> Any:
        for layer in (0, 2):
            be.cache_write(batch, layer, be.array(x), be.array(-x))
        return be.array(np.zeros(1, np.float32))

    be.step(None, fn, Batch.of([[0] * n], [first], [0], [cache]))


def stored(cache: Any, n: int) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in cache.export(n).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def live() -> int:
    """Pages that somebody holds."""
    gc.collect()
    return sum(isinstance(x, Page) for x in gc.get_objects())


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_a_fork_shares_pages_until_one_side_writes(be: Backend, kv: Any) -> None:
    a = be.new_cache(LAYERS, 2000, kv)
    size = a.page_size
    n = 2 * size + 10
    write(be, a, 0, n)
    before, whole = stored(a, n), a.nbytes
    b = a.fork(a.n_ctx)
    assert a.held() == b.held()
    assert sum(a.held().values()) == a.nbytes == b.nbytes == whole
    write(be, b, n, 5, seed=1)
    assert same(stored(a, n), before)
    assert same(stored(b, n), before)
    assert len(a.held().keys() & b.held().keys()) == 4  # two whole pages of each window
    write(be, a, n, 5, seed=2)
    assert len(a.held().keys() & b.held().keys()) == 4
    assert not np.array_equal(stored(a, n + 5)["0.k"][n:], stored(b, n + 5)["0.k"][n:])


def test_memory_is_taken_as_it_fills_and_given_back(be: Backend) -> None:
    before = live()
    a = be.new_cache(LAYERS, 100_000, "f16")
    assert a.nbytes == 0
    write(be, a, 0, 1)
    one = a.nbytes
    write(be, a, 1, a.page_size)
    assert a.nbytes == 2 * one
    b = a.fork(a.n_ctx)
    b.truncate(1)
    assert b.nbytes == one
    a.truncate(0)
    assert a.nbytes == 0
    assert live() == before + 2
    del b
    assert live() == before
    with pytest.raises(ContextOverflow, match="100001 positions"):
        a.reserve(0, 100_001)


def test_writing_behind_a_cut_leaves_a_fork_alone(be: Backend) -> None:
    a = be.new_cache(LAYERS, 1000, "f32")
    write(be, a, 0, 500)
    b = a.fork(a.n_ctx)
    before = stored(b, 500)
    a.truncate(300)
    write(be, a, 300, 10, seed=1)
    a.truncate(100)
    write(be, a, 100, 300, seed=2)
    assert same(stored(b, 500), before)
    after = stored(a, 400)
    assert np.array_equal(after["0.k"][:100], before["0.k"][:100])
    assert not np.array_equal(after["0.k"][100:400], before["0.k"][100:400])


def test_a_shift_leaves_a_fork_alone(be: Backend) -> None:
    a = be.new_cache(LAYERS, 1000, "f32")
    write(be, a, 0, 500)
    b = a.fork(a.n_ctx)
    before = stored(b, 500)
    for layer in (0, 2):
        a.shift(layer, 10, 200, 500, None)
    assert same(stored(b, 500), before)
    moved = stored(a, 300)
    for name, x in moved.items():
        assert np.array_equal(x, np.concatenate([before[name][:10], before[name][210:]]))


def test_pages_behind_a_window_are_given_back(be: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SLACK", 64)
    a = be.new_cache(LAYERS, 8000, "f32")
    size, n = a.page_size, 3000
    for first in range(0, n, 500):
        write(be, a, first, 500, seed=first)
    whole, windowed = (len(p) - p.count(None) for p in a.pages)
    assert whole == -(-n // size)
    assert windowed <= (100 + 64 + 500) // size + 2
    assert a.holds(n)
    assert a.holds(n - 64)
    assert not a.holds(1000)
    assert a.holds(0)
    assert not a.holds_all(n)
    kept = stored(a, n)["2.k"]
    assert not kept[:1000].any()
    assert kept[n - 164 :].any(axis=(1, 2)).all()
    again = be.new_cache(LAYERS, 8000, "f32")
    again.restore(stored(a, n))
    assert again.holds(n)
    assert not again.holds(n - 2 * size - 100)
    assert np.array_equal(stored(again, n)["2.k"][n - 100 :], kept[n - 100 :])
    a.truncate(0)
    write(be, a, 0, 300)
    assert a.holds_all(300)


def test_a_fork_copies_recurrent_arrays(be: Backend) -> None:
    a = be.new_cache([LayerCache(arrays=(("ssm", (4, 8)),))], 100, "f32")
    x = normal(4, 8)
    a.restore({"0.ssm": x})
    b = a.fork(a.n_ctx)
    a.restore({"0.ssm": -x})
    assert np.array_equal(b.export(0)["0.ssm"], x)
    assert np.array_equal(a.export(0)["0.ssm"], -x)
