"""Speculation: the same texts and log-probabilities to the bit, in fewer steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import Completion, Engine, Model
from tinyllm.engine import speculate
from tinyllm.engine.speculate import Costs, Lookup, best_length
from tinyllm.errors import ArgumentError
from tinyllm.kernels.pages import Page

PROMPT = "Lily had a red ball. Tom had a red ball. Lily had a red ball. Tom had a"


@cache
def bundled() -> Model:
    return tinyllm.load()


@pytest.fixture(scope="module")
def m(stories260k: Path) -> Iterator[Model]:
    with tinyllm.load(stories260k) as model:
        yield model


@pytest.fixture(params=["greedy lengths", "longest"])
def lengths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess as the clock says, or always as much as can be."""
    if request.param == "longest":
        monkeypatch.setattr(speculate, "best_length", lambda chances, *rest: len(chances))


def written(c: Completion) -> tuple[object, ...]:
    return c.text, c.ids, c.logprobs, c.finish_reason


def nudge(ids: list[int], logits: np.ndarray) -> None:
    logits[ids[-1]] -= 1.5


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8},
    "hot": {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    "logprobs": {"temperature": 0.7, "logprobs": 3},
    "penalties": {"temperature": 0.6, "repeat_penalty": 1.2, "frequency_penalty": 0.1},
    "processor": {"temperature": 0.6, "logits_processor": nudge, "logprobs": 0},
    "stop": {"temperature": 0, "stop": ["red ball. Tom had", "zz"]},
    "short": {"temperature": 0, "max_tokens": 7},
    "shift": {"temperature": 0.5, "max_tokens": 700, "overflow": "shift"},
    "full": {"temperature": 0.5, "max_tokens": -1},
    "regex": {"temperature": 0.5, "regex": "( Lily had a red (ball|dog)\\.)+", "max_tokens": 60},
}


@pytest.mark.usefixtures("lengths")
@pytest.mark.parametrize("name", OPTIONS)
def test_text_and_logprobs_are_those_without(m: Model, name: str) -> None:
    if name == "regex":
        pytest.importorskip("llguidance")
    for seed in range(4):
        options = {"max_tokens": 120, "seed": seed, **OPTIONS[name]}
        plain = m.generate(PROMPT, **options)
        assert written(m.generate(PROMPT, speculate="lookup", **options)) == written(plain)
        assert written(m.generate(PROMPT, speculate=m, **options)) == written(plain)


@pytest.mark.usefixtures("lengths")
@pytest.mark.parametrize("name", ["greedy", "drawn", "logprobs"])
def test_the_bundled_model_writes_the_same(name: str) -> None:
    for seed in range(2):
        options = {"max_tokens": 80, "seed": seed, **OPTIONS[name]}
        plain = bundled().generate(PROMPT, **options)
        assert written(bundled().generate(PROMPT, speculate="lookup", **options)) == written(plain)


@pytest.mark.usefixtures("lengths")
def test_smollm2_writes_the_same(smollm2: Path) -> None:
    text = "Copy this list: apples 3, pears 14, plums 15, grapes 92.\napples 3, pears 14,"
    with tinyllm.load(smollm2) as model:
        for options in ({"temperature": 0}, {"temperature": 0.7, "seed": 3, "logprobs": 2}):
            plain = model.generate(text, max_tokens=40, **options)
            got = model.generate(text, max_tokens=40, speculate="lookup", **options)
            assert written(got) == written(plain)


@pytest.mark.usefixtures("lengths")
def test_batches_and_the_engine_speculate(m: Model) -> None:
    prompts = [PROMPT[i:] for i in (0, 5, 11, 30)]
    options: dict[str, Any] = {"max_tokens": 90, "temperature": 0.6, "seed": 2, "logprobs": 1}
    expected = [written(m.generate(p, **options)) for p in prompts]
    assert [written(c) for c in m.generate(prompts, speculate="lookup", **options)] == expected
    with Engine(m, max_rows=20) as e:
        rs = [e.submit(p, speculate=s, **options) for p in prompts for s in ("lookup", m, None)]
        whole, e.max_bytes = e.max_bytes, 1
        next(iter(rs[0]))
        e.max_bytes = whole
        assert [written(r.result(60)) for r in rs] == [x for x in expected for _ in range(3)]


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_model_that_drafts_for_itself_is_always_right(
    m: Model, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "best_length", lambda chances, *rest: min(len(chances), 7))
    right: list[tuple[int, int]] = []
    learn = speculate.DraftModel.learn

    def noted(self: Any, n: int, n_right: int) -> None:
        right.append((n, n_right))
        learn(self, n, n_right)

    monkeypatch.setattr(speculate.DraftModel, "learn", noted)
    m.generate("Once", max_tokens=100, temperature=temperature, seed=1, speculate=m)
    assert len(right) < 20
    assert all(n == r for n, r in right[:-1])


def test_a_stream_shows_the_same_and_its_state_goes_on(m: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "stop": ["ball. L"]}
    texts, states = [], []
    for s in (None, "lookup"):
        state = m.new_state(512)
        texts.append("".join(m.generate(PROMPT, stream=True, speculate=s, state=state, **options)))
        texts.append(m.generate(" So", state=state, max_tokens=20, temperature=0).text)
        states.append(state.ids)
    assert texts[:2] == texts[2:]
    assert states[0] == states[1]


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_is_closed_gives_its_pages_back(m: Model, begun: bool) -> None:
    def n_pages() -> int:
        gc.collect()
        return sum(isinstance(x, Page) for x in gc.get_objects())

    before = n_pages()
    stream = m.generate("Once upon a time", max_tokens=60, seed=1, stream=True, speculate=m)
    text = "".join(islice(stream, 10 if begun else 0))
    assert n_pages() > before or not begun
    stream.close()
    assert n_pages() == before
    assert stream.completion.text.startswith(text)
    assert stream.completion.finish_reason == "cancelled"


def test_an_error_in_a_step_leaves_no_guess_in_the_state(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "best_length", lambda chances, *rest: len(chances))
    forward, state = m.network.forward, m.new_state(512)

    def fails(segments: Any, *args: Any) -> Any:
        if segments[0][2] == "all":
            raise OSError("gone")
        return forward(segments, *args)

    monkeypatch.setattr(m.network, "forward", fails)
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 0}
    with pytest.raises(OSError, match="gone"):
        m.generate(PROMPT, speculate="lookup", state=state, **options)
    monkeypatch.undo()
    ids = m.tokenizer.encode(PROMPT) + m.generate(PROMPT, **options).ids
    assert state.ids == ids[: len(state.ids)]


def test_a_number_of_guesses_is_chosen_by_what_it_promises() -> None:
    costs = Costs()
    assert best_length([0.95] * 15, 1, costs) == 15  # nothing was timed: rows are thought cheap
    for _ in range(20):
        for rows in (1, 2, 8):
            costs.note(rows, 1.0 + 0.14 * (rows - 1))
    assert best_length([0.95] * 15, 1, costs) == 11
    assert best_length([0.7] * 15, 1, costs) == 3
    assert best_length([0.1] * 15, 1, costs) == 0
    assert best_length([0.95] * 4, 1, costs) == 3
    assert best_length([0.95] * 15, 1, costs, each=1.0) == 0
    assert best_length([0.9] * 3 + [0.1] * 12, 1, costs) == 3  # where a form ends


def test_a_step_that_was_late_says_little_of_what_rows_cost() -> None:
    costs = Costs()
    costs.note(1, 1.0)
    costs.note(8, 30.0)  # the first of a size is recorded
    for rows in [1] + [1, 8] * 10:
        costs.note(rows, 1.0 + 0.1 * (rows - 1))
    costs.note(8, 20.0)
    assert costs.of(8) < 1.8
    for _ in range(200):
        costs.doubt()
    assert costs.of(1) == pytest.approx(1)
    assert costs.of(16) < 1.5


def follow(drafter: Lookup, ids: list[int], most: int = 8) -> list[int]:
    """What a drafter would guess, however unlikely."""
    run: Any = SimpleNamespace(state=SimpleNamespace(ids=ids))
    return drafter.guess(run, most, 1, Costs())


def test_lookup_guesses_what_followed_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "best_length", lambda chances, *rest: len(chances))
    drafter = Lookup()
    assert follow(drafter, [1, 2, 3, 4, 5, 6, 1, 2, 3, 4])[:7] == [5, 6, 1, 2, 3, 4, 5]
    assert follow(drafter, [9, 8, 7]) == []  # a shift has dropped what was known
    # the longest repetition counts, not the last one
    assert follow(Lookup(), [*range(1, 10), 50, 9, 51, *range(1, 10)], 2) == [50, 9]


def test_lookup_learns_where_a_form_is_filled_anew() -> None:
    drafter, costs, ids = Lookup(), Costs(), [0]
    run: Any = SimpleNamespace(state=SimpleNamespace(ids=ids))
    for rows in (1, 2, 4, 8) * 20:
        costs.note(rows, 1 + 0.12 * rows)
    form, guesses = (1, 2, 3, 4), list[tuple[int, list[int]]]()
    for value in range(100, 140):
        for token in (*form, value):
            made = drafter.guess(run, 8, 1, costs)
            drafter.learn(len(made), int(made[:1] == [token]))
            guesses.append((token, made[:1]))
            ids.append(token)
    # the form is guessed behind its first token; a value, and what follows it, is not
    assert guesses[-5:] == [(1, []), (2, [2]), (3, [3]), (4, [4]), (139, [])]


def test_what_cannot_speculate_says_so(m: Model, data: Path) -> None:
    with pytest.raises(ArgumentError, match="expected 'lookup'"):
        m.generate("x", speculate="loukup")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="vocabulary"):
        m.generate("x", speculate=bundled())
    with pytest.raises(ArgumentError, match="leave speculate out"):
        m.generate("x", speculate="lookup", tap=lambda name, x: None)


def test_a_step_of_fewer_rows_than_were_timed_takes_some_time() -> None:
    """Many texts begin side by side, and later few are left."""
    costs = Costs()
    for _ in range(9):
        costs.note(20, 0.020)
        costs.note(36, 0.052)
    assert all(costs.of(n) > 0 for n in range(1, 36))
    assert costs.of(36) > costs.of(20) >= costs.of(10) > 0
    assert best_length([0.9] * 15, 9, costs) >= 0
