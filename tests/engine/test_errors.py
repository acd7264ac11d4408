"""What fails ends alone, leaves what it was given as it was, and says so in one line."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import Engine, Model
from tinyllm.errors import ArgumentError, ContextOverflow, StateError, TinyLLMError

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"
TOLD = [{"role": "user", "content": "Once upon a time there was"}]


@pytest.fixture(scope="module")
def m(stories260k: Path) -> Iterator[Model]:
    with tinyllm.load(stories260k) as model:
        yield model


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_whatever_a_processor_raises_ends_its_request_alone(m: Model, error: type) -> None:
    def bad(ids: list[int], logits: np.ndarray) -> None:
        raise error("mine")

    with Engine(m) as e:
        other = e.submit("The dog", max_tokens=20, seed=2)
        with pytest.raises(error, match="mine"):
            e.submit("Once", logits_processor=bad).result(20)
        assert other.result(20).ids == m.generate("The dog", max_tokens=20, seed=2).ids
        assert e.submit("Once", max_tokens=2).result(20).ids


def test_an_error_that_ends_the_thread_is_told_to_all(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise SystemExit("the thread")

    monkeypatch.setattr(m.network, "forward", dies)
    e = Engine(m, max_texts=1)
    requests = [e.submit(text) for text in ("One", "Two")]
    for r in requests:
        with pytest.raises(SystemExit, match="the thread"):
            r.result(20)
    e._thread.join(20)
    with pytest.raises(TinyLLMError, match="ended by an error: SystemExit"):
        e.submit("Three")


@pytest.mark.parametrize("last", [False, True])
def test_a_listener_that_raises_ends_its_request_alone(m: Model, last: bool) -> None:
    gate = threading.Event()

    def waits(ids: list[int], logits: np.ndarray) -> None:
        gate.wait(20)

    with Engine(m) as e:
        r = e.submit("Once upon a time", max_tokens=20, logits_processor=waits)

        def bad() -> None:
            if not last or r.done:
                raise SystemExit("mine")

        r.listen(bad)
        other = e.submit("The dog", max_tokens=20, seed=2)
        gate.set()
        assert other.result(20).ids == m.generate("The dog", max_tokens=20, seed=2).ids
        assert e.submit("The dog", max_tokens=20).result(20).ids
    with pytest.raises(SystemExit, match="mine"):
        r.result(20)


def test_the_engines_thread_cannot_wait_for_itself(m: Model) -> None:
    with Engine(m) as e:
        for wait in (lambda r: r.result(), list, lambda r: asyncio.run(r._wait())):

            def waits(ids: list[int], logits: np.ndarray, wait: Any = wait) -> None:
                wait(e.submit("x", max_tokens=1))

            with pytest.raises(TinyLLMError, match="would wait for itself"):
                e.submit("Once", logits_processor=waits).result(20)


@pytest.mark.parametrize(
    "name", ["max_rows", "max_bytes", "max_queue", "max_texts", "prefix_bytes"]
)
def test_a_limit_is_checked_whenever_it_is_set(m: Model, name: str) -> None:
    with Engine(m) as e:
        before = getattr(e, name)
        for wrong in ("5", 1.5, -1, True):
            with pytest.raises(ArgumentError, match=f"{name}=.*; expected a whole number"):
                setattr(e, name, wrong)
            with pytest.raises(ArgumentError, match=f"{name}="):
                Engine(m, **{name: wrong})
        assert getattr(e, name) == before
        setattr(e, name, 1 << 30)
        assert e.submit("Once", max_tokens=2).result(20).ids


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1}, ArgumentError),
        ({"no_option": 1}, ArgumentError),
        ({"max_tokens": "x"}, ArgumentError),
        ({"json_schema": {"not": {}}}, ArgumentError),
        ({"grammar": "root ::= missing"}, ArgumentError),
        ({"grammar": "root ::= root"}, ArgumentError),
        ({"lora": {"x": 1.0}}, ArgumentError),
        ({"overflow": "x"}, ArgumentError),
        ({}, ContextOverflow),
    ],
)
def test_a_call_that_fails_leaves_the_state_as_it_was(
    m: Model, options: dict[str, Any], error: type[Exception]
) -> None:
    state = m.new_state(64)
    m.generate("Once upon a big", state=state, max_tokens=5, temperature=0)
    before, n_past = list(state.ids), state.n_past
    told = [{"role": "user", "content": "Once" + " upon" * (1 if options else 99)}]
    with Engine(m) as e:
        for call in (m.chat, lambda *a, **given: e.submit(*a, **given).result(20)):
            with pytest.raises(error):
                call(told, template=TEMPLATE, state=state, **options)
            assert (state.ids, state.n_past) == (before, n_past)
    with pytest.raises(TinyLLMError, match="closed"):
        e.submit(TOLD, template=TEMPLATE, state=state)
    assert (state.ids, state.n_past) == (before, n_past)
    assert m.generate(" x", state=state, max_tokens=1).ids
    with pytest.raises(ArgumentError, match="token ids"):
        m.generate([1 << 20], state=state)
    with pytest.raises(ArgumentError, match="token ids"):
        m.logits([1 << 20], state)
    assert max(state.ids) < m.network.n_vocab


def test_what_is_no_request_is_told(m: Model) -> None:
    with Engine(m) as e:
        for wrong, words in (
            ({"deadline": "5"}, "deadline='5'; expected seconds"),
            ({"deadline": float("nan")}, "deadline=nan"),
            ({"state": "x"}, "state is str 'x'"),
            ({"foo": 1}, "foo=1: there is no such option"),
            ({"tools": [{}]}, "tools belongs to messages"),
            ({"tool_choice": "none"}, "tool_choice belongs to messages"),
            ({"template": "chatml"}, "template belongs to messages"),
            ({"continue_final_message": True}, "continue_final_message belongs to messages"),
        ):
            with pytest.raises(ArgumentError, match=words):
                e.submit("Once", **wrong)
        with pytest.raises(ArgumentError, match="timeout='x'; expected seconds"):
            e.submit("Once", max_tokens=1).result("x")
    with pytest.raises(ArgumentError, match="model is NoneType None; expected a Model"):
        Engine(None)


def test_a_state_is_saved_whole(m: Model, tmp_path: Path) -> None:
    state = m.new_state(64)
    stream = m.generate("Once", state=state, max_tokens=9, stream=True)
    next(stream)
    with pytest.raises(StateError, match="in use"):
        state.save(tmp_path / "s.npz")
    stream.close()
    state.save(tmp_path / "s.npz")
    m.new_state(64).restore(tmp_path / "s.npz")


@pytest.mark.parametrize("ids", ["abc", [1.5], b"x", None, [True], [1 << 20], [-1]])
def test_what_are_no_ids_of_a_state_is_told(m: Model, ids: Any, tmp_path: Path) -> None:
    state = m.new_state(16)
    m.logits([3, 4], state)
    for call in (state.append, state.reuse):
        with pytest.raises(ArgumentError, match=r"ids is|token ids"):
            call(ids)
        assert (state.ids, state.n_past) == ([3, 4], 2)
    state.save(tmp_path / "s.npz")
    arrays = dict(np.load(tmp_path / "s.npz"))
    np.savez(tmp_path / "s.npz", **{**arrays, "ids": np.array([3, 1 << 20], np.int32)})
    with pytest.raises(StateError, match="token ids 3 to 1048576"):
        state.restore(tmp_path / "s.npz")


def test_a_text_behind_a_state_has_no_beginning(m: Model) -> None:
    state, there, bos = m.new_state(64), m.new_state(64), m.tokenizer.bos
    first = m.generate("Once upon a time", state=state, max_tokens=4, temperature=0)
    whole = m.generate("Once upon a time", max_tokens=8, temperature=0)
    assert first.prompt_ids[0] == bos
    assert first.ids + m.generate("", state=state, max_tokens=4, temperature=0).ids == whole.ids
    assert bos not in state.ids[1:]
    with Engine(m) as e:
        for text in ("Once upon a time", " Tom has"):
            e.submit(text, state=there, max_tokens=4, temperature=0).result(20)
    assert bos not in there.ids[1:]
    m.logits([5], there)
    with pytest.raises(ArgumentError, match="nothing left to read"):
        m.generate("", state=there)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_told_that_the_engine_is_elsewhere(m: Model) -> None:
    gate = threading.Event()
    with Engine(m) as e:
        r = e.submit("Once", max_tokens=1, logits_processor=lambda i, x: gate.wait(20) and None)
        if not (child := os.fork()):
            told = []
            for call in (lambda: e.submit("x"), lambda: r.result(5)):
                try:
                    call()
                except TinyLLMError as error:
                    told.append("fork" in str(error))
                except BaseException:
                    told.append(False)
            os._exit(0 if told == [True, True] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        gate.set()
        assert r.result(20).ids
