"""An error in what the user passes in comes out as it is, and the model and its states stay usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import StateError

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


class Failure(Exception):
    """What the user's code raises."""


def after(n: int) -> Callable[..., None]:
    """A callback that fails when it is called for the n-th time."""
    calls = iter(range(n))

    def fail(*args: Any) -> None:
        if next(calls, None) is None:
            raise Failure

    return fail


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load() as m:
        yield m


@pytest.mark.parametrize("option", ["tap", "logits_processor"])
@pytest.mark.parametrize("n", [0, 1, 3, 40])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_callback_leaves_the_model_usable(
    model: tinyllm.Model, option: str, n: int, stream: bool
) -> None:
    expected = str(model.generate("Once upon a time", **GREEDY))
    state = model.new_state(64)
    options = {**GREEDY, "max_tokens": 50, "overflow": "shift", option: after(n)}
    with pytest.raises(Failure):
        list(model.generate("Once upon a time", state=state, stream=stream, **options))
    assert str(model.generate("Once upon a time", **GREEDY)) == expected
    state.truncate(0)
    assert str(model.generate("Once upon a time", state=state, **GREEDY)) == expected


def test_a_conversation_goes_on_after_a_failing_tap(model: tinyllm.Model) -> None:
    """What the tap broke off is computed again."""
    ids = model.tokenizer.encode("Once upon a time there was a dog")
    expected = model.logits(ids)
    state = model.new_state(64)
    model.logits(ids[:4], state)
    with pytest.raises(Failure):
        model.logits(ids[4:], state, tap=after(4))
    state.truncate(4)
    assert np.array_equal(model.logits(ids[4:], state), expected[4:])


@pytest.mark.parametrize("name", ["mamba", "rwkv7"])
def test_a_recurrent_state_says_that_it_is_lost(name: str, data: Path, tmp_path: Path) -> None:
    """Its layers may be between two tokens: going on would give other text."""
    path = data / "golden" / "models" / f"{name}.gguf"
    if not path.exists():
        pytest.skip(f"no {path.name} in the test data")
    with tinyllm.load(path) as model:
        ids = list(range(1, 9))
        expected, state = model.logits(ids), model.new_state(64)
        model.logits(ids[:4], state)
        with pytest.raises(Failure):
            model.logits(ids[4:], state, tap=after(4))
        for use in (lambda: model.logits([1], state), lambda: state.save(tmp_path / "state")):
            with pytest.raises(StateError, match="interrupted"):
                use()
        state.truncate(0)
        assert np.array_equal(model.logits(ids, state), expected)
        with pytest.raises(Failure):
            model.logits([1, 2], state, tap=after(4))
        assert state.reuse(ids) == 0
        assert np.array_equal(model._pending_logits(state, None), expected)


def test_a_failing_reader_of_a_stream_ends_it(model: tinyllm.Model) -> None:
    expected = str(model.generate("Once upon a time", **GREEDY))
    show = after(2)
    with pytest.raises(Failure):
        list(map(show, model.generate("Once upon a time", stream=True, max_tokens=50)))
    assert str(model.generate("Once upon a time", **GREEDY)) == expected
