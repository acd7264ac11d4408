"""What was read once is found again: with the bits of reading anew, within its bytes, and without a leak."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import Engine, Model
from tinyllm.engine.prefixes import Prefixes
from tinyllm.engine.scheduler import ROOM
from tinyllm.kernels import pages
from tinyllm.kernels.pages import Page
from tinyllm.models.memory import cache_bytes


@pytest.fixture(scope="module", params=["stories260K", "gemma3", "mamba"])
def m(data: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    folder = "models" if request.param == "stories260K" else "golden/models"
    with tinyllm.load(data / folder / f"{request.param}.gguf", n_ctx=512) as model:
        yield model


def n_pages() -> int:
    """Pages that somebody holds."""
    gc.collect()
    return sum(isinstance(x, Page) for x in gc.get_objects())


def prompt(r: random.Random, m: Model, most: int = 300) -> list[int]:
    """Tokens of few kinds, so that beginnings are shared: runs of lengths drawn from few."""
    runs = [np.random.default_rng(r.randrange(2)).integers(3, m.network.n_vocab, 60).tolist()]
    runs += [[r.randrange(3, 6)] * r.choice([1, 7, 40]) for _ in range(r.randrange(6))]
    return [i for run in runs for i in run][: r.randrange(2, most)]


@pytest.mark.parametrize("room", [0, 3, 1000])
def test_what_is_found_goes_on_as_if_read_anew(
    m: Model, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SLACK", 16)
    before = n_pages()
    state = m.new_state(512)
    m.logits([5], state)
    tree = Prefixes(m.network, room * state.nbytes)
    del state
    r, n_found = random.Random(room), 0
    for _ in range(60):
        ids = prompt(r, m)
        state = tree.find(ids, 512) or m.new_state(512)
        n = state.n_past
        assert n < len(ids)
        assert state.ids == ids[:n]
        n_found += n
        got = m.logits(ids[n:], state)[-1]
        assert np.array_equal(got, m.logits(ids, m.new_state(512))[-1])
        tree.add(state)
        assert tree.nbytes <= tree.max_bytes
        held: dict[int, int] = {}
        for node in tree._used:
            assert node.state is not None
            held |= node.state.cache.held()
        assert tree.nbytes == sum(held.values())
    assert (n_found > 0) == (room > 0)
    tree.trim(-1)
    assert len(tree) == tree.nbytes == 0
    assert all(not root.children for root in tree._roots.values())
    del state
    assert n_pages() == before


def test_the_longest_beginning_is_found_down_to_the_token(stories260k: Path) -> None:
    with tinyllm.load(stories260k) as m:
        tree = Prefixes(m.network, 1 << 30)
        for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6]):
            state = m.new_state(512)
            m.logits(ids, state)
            tree.add(state)
        for ids, n in [
            ([5, 6, 7, 8, 9], 4), ([5, 6, 7, 8, 9, 1], 5), ([5, 6, 7, 10, 2], 4), ([5, 6, 7, 7], 3),
            ([5, 6, 1], 2), ([5, 5], 1), ([5], 0), ([6, 6, 6], 0),
        ]:  # fmt: skip
            found = tree.find(ids, 512)
            assert (0 if found is None else found.n_past) == n
            assert found is None or found.ids == ids[:n]


def test_a_text_that_grows_is_kept_once(stories260k: Path) -> None:
    with tinyllm.load(stories260k) as m:
        tree = Prefixes(m.network, 1 << 30)
        state = m.new_state(512)
        for i in range(4):
            m.logits([5 + i] * 20, state)
            tree.add(state)
        assert len(tree) == 1
        assert tree.nbytes == sum(state.cache.held().values())
        other = tree.find([5] * 20 + [9], 512)  # that begins like it, and goes on otherwise
        assert other is not None
        m.logits([9], other)
        tree.add(other)
        m.logits([9], other)
        tree.add(other)
        assert len(tree) == 2


@pytest.mark.parametrize("room", [None, 0, 4])
def test_an_engine_writes_the_same_with_and_without(m: Model, room: int | None) -> None:
    state = m.new_state(512)
    m.logits([5], state)
    prefix_bytes = None if room is None else room * state.nbytes
    r = random.Random(1)
    asked = [(prompt(r, m), {"max_tokens": 5, "seed": i, "logprobs": 2}) for i in range(40)]
    expected = [m.generate(ids, **how) for ids, how in asked]  # type: ignore[arg-type]
    with Engine(m, prefix_bytes=prefix_bytes, max_rows=32) as e:
        cached = 0
        for i in range(0, 40, 4):
            got = [e.submit(ids, **how) for ids, how in asked[i : i + 4]]  # type: ignore[arg-type]
            for request, want in zip(got, expected[i : i + 4], strict=True):
                c = request.result(60)
                assert (c.ids, c.logprobs) == (want.ids, want.logprobs)
                cached += request.usage.cached_tokens
        assert (cached > 0) == (room != 0)


def test_many_small_requests_leave_no_page_behind(stories260k: Path) -> None:
    with tinyllm.load(stories260k, n_ctx=512) as m:
        before, r = n_pages(), random.Random(3)
        with Engine(m, prefix_bytes=2_000_000) as e:
            for _ in range(20):
                for request in [e.submit(prompt(r, m, 20), max_tokens=1) for _ in range(20)]:
                    request.result(60)
            assert e._prefixes.nbytes <= 2_000_000
        del e, request
        assert n_pages() == before


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_page_behind(m: Model) -> None:
    """They end, are cancelled, run out of time, fail, are set aside; some guess, some share beginnings."""
    before, r = n_pages(), random.Random(4)

    def fails(ids: list[int], logits: np.ndarray) -> None:
        raise ZeroDivisionError

    each = cache_bytes(m.network.decoder.caches, 300 + ROOM, m.network.kv_type)
    recurrent = any(c.arrays for c in m.network.decoder.caches)
    reasons: Counter[str] = Counter()
    with Engine(m, prefix_bytes=20 * each, max_bytes=4 * each, max_rows=16) as e:
        for n in range(0, 10_000, 100):
            if n % 500 == 0:
                e.max_bytes = (1 if n % 1000 else 4) * each
            asked = []
            for i in range(n, n + 100):
                options: dict[str, Any] = {"max_tokens": r.randrange(4), "seed": i}
                if r.random() < 0.1:
                    options["deadline"] = r.random() / 100
                if r.random() < 0.05:
                    options["logits_processor"] = fails
                if r.random() < 0.2 and not recurrent:
                    options |= {"speculate": "lookup", "max_tokens": 12}
                asked.append(e.submit(prompt(r, m, 60 if r.random() < 0.9 else 300), **options))
                if r.random() < 0.1:
                    asked[-1].cancel()
            for request in asked:
                try:
                    reasons[request.result(120).finish_reason] += 1
                except ZeroDivisionError:
                    reasons["error"] += 1
    assert sum(reasons.values()) == 10_000
    assert {"length", "cancelled", "deadline", "error"} <= set(reasons)
    del e, request, asked
    assert n_pages() == before
