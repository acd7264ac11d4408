"""A call that fails leaves the state that it was given as it was; one that is cancelled keeps what was read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import Engine, Model
from tinyllm.errors import DeviceError
from tinyllm.kernels import pages
from tinyllm.models.state import State

PLAIN = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"
TOLD = [{"role": "user", "content": "Lily has a dog"}]
N = 300  # tokens of a state before it is given: the second page of 256 has been begun


class Failure(Exception):
    """What the user's code raises."""


def after(m: Model, n: int, error: type[BaseException] = Failure) -> Callable[..., None]:
    """A processor that fails after n tokens, before which no text ends."""
    calls = iter(range(n))

    def fail(ids: list[int], logits: np.ndarray) -> None:
        if next(calls, None) is None:
            raise error
        logits[list(m.tokenizer.eog)] = -np.inf

    return fail


def generated(m: Model, ids: list[int], **options: Any) -> None:
    m.generate(ids, **options)


def streamed(m: Model, ids: list[int], **options: Any) -> None:
    list(m.generate(ids, stream=True, **options))


def submitted(m: Model, ids: list[int], **options: Any) -> None:
    with Engine(m) as e:
        e.submit(ids, **options).result(60)


def chatted(m: Model, ids: list[int], **options: Any) -> None:
    m.chat(TOLD, template=PLAIN, **options)


def streamed_chat(m: Model, ids: list[int], **options: Any) -> None:
    list(m.chat(TOLD, template=PLAIN, stream=True, **options))


def submitted_chat(m: Model, ids: list[int], **options: Any) -> None:
    with Engine(m) as e:
        e.submit(TOLD, template=PLAIN, **options).result(60)


CALLS = [generated, streamed, submitted, chatted, streamed_chat, submitted_chat]


@pytest.fixture(scope="module", params=["bundled", "gemma3", "mamba"])
def m(request: pytest.FixtureRequest) -> Any:
    if request.param == "bundled":
        with tinyllm.load() as model:
            yield model
        return
    data: Path = request.getfixturevalue("data")
    with tinyllm.load(data / "golden" / "models" / f"{request.param}.gguf") as model:
        yield model


def tokens(m: Model, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, m.network.n_vocab, n).tolist()


def read(m: Model, n_ctx: int = 1200) -> State:
    state = m.new_state(n_ctx)
    m.logits(tokens(m, N), state)
    return state


def goes_on_alike(m: Model, a: State, b: State) -> bool:
    """Whether two states have read the same, and give the same bits next."""
    same = (a.ids, a.n_past, a.spoilt) == (b.ids, b.n_past, b.spoilt)
    more = tokens(m, 4, seed=2)
    return same and np.array_equal(m.logits(more, a), m.logits(more, b))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("n", [0, 3])
def test_a_call_that_fails_leaves_its_state_as_it_was(
    m: Model, call: Callable[..., None], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SLACK", 16)  # windows soon drop what the state needs again
    state, error = read(m), Failure if n else KeyboardInterrupt
    prompt = tokens(m, 500, seed=1)
    with pytest.raises(error):
        call(m, prompt, state=state, logits_processor=after(m, n, error))
    assert goes_on_alike(m, state, read(m))


@pytest.mark.parametrize("call", CALLS)
def test_also_where_a_step_fails_or_the_context_has_shifted(
    m: Model, call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, expected = read(m, N + 8), read(m, N + 8)
    shifts = "shift" if state.can_truncate else "error"
    with pytest.raises(Failure):
        call(m, [5], state=state, overflow=shifts, logits_processor=after(m, 7))
    forward, calls = m.network.forward, iter([1])

    def fails_later(*args: Any) -> Any:
        if next(calls, None) is None:
            raise Failure
        return forward(*args)

    monkeypatch.setattr(m.network, "forward", fails_later)
    with pytest.raises(Failure):
        call(m, [5], state=state, logits_processor=after(m, 7))
    monkeypatch.undo()
    assert goes_on_alike(m, state, expected)


def test_a_state_that_cannot_be_kept_is_free_and_as_it_was(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(n_ctx: int) -> None:
        raise DeviceError("no memory")

    state = read(m)
    for call in CALLS:
        with monkeypatch.context() as here:
            here.setattr(state.cache, "fork", scarce)
            with pytest.raises(DeviceError, match="no memory"):
                call(m, [5], state=state)
    assert goes_on_alike(m, state, read(m))


def test_a_stream_that_is_abandoned_keeps_what_was_read_and_written(m: Model) -> None:
    state, other = read(m), read(m)
    stream = m.generate(tokens(m, 9, seed=1), state=state, stream=True, max_tokens=-1, seed=1)
    next(stream)
    written = stream.completion.ids
    assert written
    stream.close()
    assert state.ids == other.ids + tokens(m, 9, seed=1) + written
    m.logits(state.ids[N:-1], other)
    other.append(written[-1:])
    assert (state.ids, state.n_past) == (other.ids, other.n_past)
    unbegun = m.generate([5, 6], state=state, stream=True)
    unbegun.close()
    other.append([5, 6])
    assert (state.ids, state.n_past) == (other.ids, other.n_past)


def test_a_listener_that_raises_at_the_last_piece_is_heard() -> None:
    gate = threading.Event()
    with tinyllm.load() as m, Engine(m) as e:
        state, expected = read(m), read(m)
        waits = lambda ids, logits: gate.wait(20) and None  # noqa: E731
        r = e.submit("Once upon a time", state=state, max_tokens=5, logits_processor=waits)

        def bad() -> None:
            if r.job.run.n_generated == 5 and not r.done:
                raise Failure

        r.listen(bad)
        gate.set()
        with pytest.raises(Failure):
            r.result(20)
        assert goes_on_alike(m, state, expected)
