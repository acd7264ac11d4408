"""What tasks make of texts: what the model makes of each alone, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.mapping import Decide, Embed, Generate, Score
from tinyllm.model import Model

TEXTS = [
    "Once upon a time",
    "The cat",
    "Lily went to the park. " * 9,
    "One day, a dog said: hello!",
]
ROWS = [(f"k{i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with tinyllm.load() as model:
        yield model


@pytest.fixture(params=[(8, 1), (64, 2)], ids=str)
def other(request: pytest.FixtureRequest) -> Iterator[Model]:
    """The model with steps of another length, and other threads."""
    n_batch, n_threads = request.param
    with tinyllm.load(n_threads=n_threads) as model:
        model.network.n_batch = n_batch
        model.network.pace = lambda *_: None  # else it learns another
        yield model


def test_embeddings_are_those_of_each_text_alone(model: Model, other: Model) -> None:
    found = dict(Embed(other).run(ROWS))
    for key, text in ROWS:
        assert found[key]["embedding"].tobytes() == model.embed(text).tobytes()
        assert found[key]["error"] is None


def test_embeddings_take_pooling_and_keep_lengths(model: Model) -> None:
    found = dict(Embed(model, "last", normalize=False).run(ROWS))
    assert (found["k1"]["embedding"] == model.embed(TEXTS[1], "last", normalize=False)).all()


def test_scores_are_those_of_the_logits(model: Model, other: Model) -> None:
    found = dict(Score(other).run(ROWS))
    for key, text in ROWS:
        ids = model.tokenizer.encode(text, parse_special=False)
        logits = model.logits(ids).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        expected = sum(logprobs[t, i] for t, i in enumerate(ids[1:]))
        assert found[key]["logprob"] == pytest.approx(expected, abs=1e-4)
        assert found[key]["n_scored"] == len(ids) - 1


def test_scores_do_not_depend_on_the_texts_beside_them(model: Model, other: Model) -> None:
    together = dict(Score(other).run(ROWS))
    assert together == dict(next(Score(model).run([row])) for row in ROWS)


def test_texts_are_those_of_each_prompt_alone(model: Model, other: Model) -> None:
    found = dict(Generate(other, max_tokens=12, seed=5).run(ROWS * 40))
    for key, text in ROWS:
        alone = model.generate(text, max_tokens=12, seed=5)
        assert found[key] == {
            "completion": alone.text, "finish_reason": alone.finish_reason,
            "n_prompt": len(alone.prompt_ids), "n_completion": len(alone.ids), "error": None,
        }  # fmt: skip


def test_the_seed_is_0_unless_given(model: Model) -> None:
    ((_, found),) = Generate(model, max_tokens=12).run(ROWS[:1])
    assert found["completion"] == model.generate(TEXTS[0], max_tokens=12, seed=0).text


def test_each_row_has_one_result_although_more_wait_than_are_written(model: Model) -> None:
    rows = [(i, TEXTS[i % 2]) for i in range(300)]
    found = [list(Generate(model, max_tokens=n).run(rows)) for n in (1, 3)]
    for results in found:
        assert sorted(i for i, _ in results) == list(range(300))


def test_answers_are_in_the_chat_template(model: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}]
    ((_, found),) = Generate(model, 6, system="Be brief.", template_vars={}).run(ROWS[:1])
    assert found["completion"] == model.chat(messages, max_tokens=6, seed=0).text
    ((_, plain),) = Generate(model, 6, chat=True).run(ROWS[:1])
    assert plain["completion"] == model.chat(messages[1:], max_tokens=6, seed=0).text


def test_decisions_are_the_models(model: Model) -> None:
    questions = [{"type": "predicate", "instructions": "It has an animal."}]
    for (_, found), text in zip(Decide(model, questions).run(ROWS), TEXTS, strict=True):
        alone = model.decide(text, questions)
        assert json.loads(found["answers"]) == [{**alone.answers[0], "mass": alone.mass[0]}]


@pytest.mark.parametrize("task", [Embed, Score, Generate])
def test_a_text_that_does_not_fit_has_an_error_and_the_others_their_results(
    task: type, model: Model
) -> None:
    rows = [(0, "cat " * 9000), (1, "The cat")]
    found = dict(task(model).run(rows))
    assert "tokens" in found[0]["error"]
    assert all(found[0][n] is None for n in task.columns if n != "error")
    assert found[1]["error"] is None
    assert set(found[0]) == set(found[1]) == set(task.columns)


def test_what_a_model_cannot_do_is_refused(model: Model, data: object) -> None:
    with pytest.raises(ArgumentError, match="expected 'mean', 'cls' or 'last'"):
        Embed(model, pooling="none")
    with pytest.raises(ArgumentError, match="choices"):
        Decide(model, [{"type": "choice", "instructions": "Which?"}])


@pytest.mark.parametrize("rows", [["abc"], ["ab"], [("k", None)], [("k", "a", "b")]], ids=str)
@pytest.mark.parametrize("task", [Embed, Score, Generate], ids=lambda task: task.__name__)
def test_what_is_no_pair_of_a_tag_and_a_text_is_told(model: Model, task: type, rows: list) -> None:
    with pytest.raises(ArgumentError, match="expected pairs of a tag and a text"):
        list(task(model).run(rows))


def test_wrong_options_are_told_when_a_task_is_made(model: Model) -> None:
    for wrong in ({"temperature": -1}, {"max_tokens": -5}, {"max_tokens": "many"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            Generate(model, **wrong)
    with pytest.raises(ArgumentError, match="nix"):
        Generate(model, nix=1)
    Generate(model, template="chatml", tools=[], regex="a*", deadline=3.0, top_k=4)
