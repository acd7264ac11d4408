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
from afresh import afresh

import tinyllm
from tinyllm import Engine, Model
from tinyllm.engine.prefixes import Prefixes
from tinyllm.engine.scheduler import ROOM
from tinyllm.errors import ArgumentError, DeviceError
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


@pytest.mark.parametrize("room", [0, 16, 1000])
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
        shared: dict[int, int] = {}
        own = 0
        for node in tree._used:
            assert node.state is not None
            held = node.state.cache.held()
            shared |= held
            own += node.state.nbytes - sum(held.values())
        assert tree.nbytes == sum(shared.values()) + own
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


@pytest.mark.parametrize("room", [None, 0, 16])
def test_an_engine_writes_the_same_with_and_without(m: Model, room: int | None) -> None:
    state = m.new_state(512)
    m.logits([5], state)
    prefix_bytes = None if room is None else room * state.nbytes
    r = random.Random(1)
    asked = [(prompt(r, m), {"max_tokens": 5, "seed": i, "logprobs": 2}) for i in range(40)]
    with afresh(m):
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
        m.prefix_bytes = 0
        del e, request
        assert n_pages() == before


@pytest.mark.slow
def test_ten_thousand_requests_leave_no_page_behind(m: Model) -> None:
    """They end, are cancelled, run out of time, fail, are set aside; some guess, some share beginnings."""
    kept, m.prefix_bytes = m.prefix_bytes, 0
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
    m.prefix_bytes = 0
    del e, request, asked
    assert n_pages() == before
    m.prefix_bytes = kept


def of(c: Any) -> tuple[object, ...]:
    """What must be equal to the bit."""
    return c.text, c.ids, c.logprobs


def test_what_was_read_once_is_found_by_any_call(m: Model) -> None:
    m.prefix_bytes = 1 << 30
    options: dict[str, Any] = {"max_tokens": 6, "seed": 1, "logprobs": 2}
    ids = np.random.default_rng(0).integers(3, m.network.n_vocab, 100).tolist()
    asked = [ids + [i] * (i + 1) for i in range(3, 6)]
    with afresh(m):
        expected = [of(m.generate(a, **options)) for a in asked]
        assert not len(m.prefixes)
    first = m.generate(asked[0], **options)
    assert (of(first), first.timings.n_reused) == (expected[0], 0)
    again = m.generate(asked[0], **options)
    assert of(again) == expected[0]
    known = again.timings.n_reused
    # windows and sums of the past are known at the ends of prompts and texts
    whole = not any(c.arrays or c.window for c in m.network.decoder.caches)
    assert known == len(asked[0]) - 1 if whole else known in (0, len(asked[0]) - 1)
    pieces = m.generate(asked[1], stream=True, **options)
    assert "".join(pieces) == expected[1][0]
    assert of(pieces.completion) == expected[1]
    assert not whole or pieces.completion.timings.n_reused == 100
    with Engine(m) as e:
        request = e.submit(asked[2], **options)
        assert of(request.result(20)) == expected[2]
        assert not whole or request.usage.cached_tokens == 100
    longer = [*asked[2], *expected[2][1], 9]  # type: ignore[misc]
    with afresh(m):
        want = of(m.generate(longer, **options))
    m.generate(asked[2], **options)
    found = m.generate(longer, **options)
    assert of(found) == want
    assert found.timings.n_reused >= len(asked[2])


def test_a_stream_that_is_closed_is_found_as_far_as_it_was_read(m: Model) -> None:
    m.prefix_bytes = 1 << 30
    pieces = m.generate([7] * 80, max_tokens=50, temperature=0, stream=True)
    next(pieces)
    pieces.close()
    with afresh(m):
        want = of(m.generate([7] * 80 + [5], max_tokens=5, temperature=0, logprobs=1))
    m.generate([7] * 80, max_tokens=1, temperature=0)
    found = m.generate([7] * 80 + [5], max_tokens=5, temperature=0, logprobs=1)
    assert of(found) == want
    assert found.timings.n_reused == 80


def test_taps_and_patches_read_anew_and_leave_nothing(m: Model) -> None:
    m.prefix_bytes = 1 << 30
    ids = [5, 6, 7] * 20
    plain = m.generate(ids, max_tokens=4, temperature=0, logprobs=1)
    kept = len(m.prefixes)
    rows: list[int] = []

    def tap(name: str, x: np.ndarray) -> None:
        if name == "embd":
            rows.append(len(x))

    seen = m.generate(ids, max_tokens=4, temperature=0, logprobs=1, tap=tap)
    assert of(seen) == of(plain)
    assert rows[0] == len(ids)
    with m.patched("embd", 0):
        patched = m.generate(ids, max_tokens=4, temperature=0, logprobs=1)
        again = m.generate(ids, max_tokens=4, temperature=0, logprobs=1)
    assert patched.timings.n_reused == again.timings.n_reused == 0
    assert of(patched) == of(again) != of(plain)
    assert len(m.prefixes) == kept
    begun = m.generate([8] * 60, max_tokens=9, temperature=0, stream=True)
    with m.patched("embd", 0):
        list(begun)
    assert len(m.prefixes) == kept


def test_prompts_of_a_call_read_what_they_have_in_common_once(m: Model) -> None:
    shared = np.random.default_rng(1).integers(3, m.network.n_vocab, 90).tolist()
    asked = [[*shared, i, 9, i] for i in range(3, 8)]
    options: dict[str, Any] = {"max_tokens": 5, "seed": 2, "logprobs": 1}
    with afresh(m):
        expected = m.generate(asked, **options)
        assert [c.timings.n_prompt for c in expected] == [93] * 5
    m.prefix_bytes = 1 << 30
    got = m.generate(asked, **options)
    assert list(map(of, got)) == list(map(of, expected))
    assert [c.timings.n_prompt for c in got] == [93, 3, 3, 3, 3]
    assert [c.timings.n_reused for c in got] == [0, 90, 90, 90, 90]


def test_questions_find_what_was_asked_about_before() -> None:
    asked = [{"type": "predicate", "instructions": "It is a complaint."}] * 2
    with tinyllm.load() as m:
        first = m.decide("I was charged twice.", asked)
        again = m.decide("I was charged twice.", asked)
        assert again.answers == first.answers
        assert first.usage.cached_tokens == 0
        assert again.usage.cached_tokens > 20
        assert again.usage.prompt_tokens == first.usage.prompt_tokens


def test_a_model_keeps_what_it_is_told_to(stories260k: Path) -> None:
    with pytest.raises(ArgumentError, match=r"prefix_bytes=-1; expected a whole number"):
        tinyllm.load(stories260k, prefix_bytes=-1)
    with tinyllm.load(stories260k, prefix_bytes=0) as m:
        for _ in range(2):
            assert m.generate([5] * 50, max_tokens=1).timings.n_reused == 0
        m.prefix_bytes = 1 << 20
        m.generate([5] * 50, max_tokens=1)
        assert m.prefixes.nbytes
        held = m.prefixes.nbytes
        for _ in range(3):  # nothing more, as it is known
            m.generate([5] * 50, max_tokens=1)
        assert m.prefixes.nbytes == held
        with pytest.raises(ArgumentError, match="prefix_bytes=None"):
            m.prefix_bytes = None  # type: ignore[assignment]
        m.prefix_bytes = 0
        assert not m.prefixes.nbytes


def test_what_is_kept_gives_way_to_states_that_need_its_memory(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tinyllm.load(stories260k) as m:
        m.generate([5] * 50, max_tokens=1)
        new = m.network.new_state

        def scarce(*given: Any) -> Any:
            if m.prefixes.nbytes:
                raise DeviceError("no memory")
            return new(*given)

        monkeypatch.setattr(m.network, "new_state", scarce)
        assert m.new_state().n_past == 0
        assert not len(m.prefixes)
