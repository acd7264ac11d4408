"""``Model.decide``: probabilities of fixed answers, each question as if it were asked alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.chat.questions import certainty, labels_of, nearness, questions_of
from tinyllm.errors import ArgumentError, ContextOverflow, TemplateError

INPUT = "Customer message: I was charged twice for my order, and nobody has replied."
QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "name": "angry", "instructions": "The customer is angry."},
    {"type": "choice", "instructions": "Which team?", "choices": ["billing", "shipping", True]},
    {"type": "choice", "instructions": "Which?", "choices": [{"value": "a", "description": "the first"}, "b"]},
    {"type": "score", "instructions": "How urgent is it?", "levels": ["low", "middle", "high"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load() as m:
        yield m


def test_each_answer_is_that_of_the_question_alone(model: tinyllm.Model) -> None:
    together = model.decide(INPUT, QUESTIONS)
    alone = [model.decide(INPUT, [q]) for q in QUESTIONS]
    assert together.answers == [a.answers[0] for a in alone]
    assert together.mass == [a.mass[0] for a in alone]
    assert together.usage.prompt_tokens < sum(a.usage.prompt_tokens for a in alone)
    many = model.decide(INPUT, QUESTIONS * 100)
    assert many.answers == together.answers * 100


def test_the_probabilities_are_those_of_the_next_token(model: tinyllm.Model) -> None:
    found = model.decide(INPUT, QUESTIONS[:1])
    labels, ids = labels_of(model.tokenizer, 2)
    assert labels == ["A", "B"]
    asked = questions_of(QUESTIONS[:1])[0].text(labels)
    turn = model.turn([{"role": "user", "content": f"{INPUT}\n\n{asked}"}])
    p = np.exp(model.logits(turn.ids)[-1].astype(np.float64))
    yes, no = (p[i].sum() for i in ids)
    assert found.answers[0]["probability"] == pytest.approx(yes / (yes + no), rel=1e-6)
    assert found.mass[0] == pytest.approx((yes + no) / p.sum(), rel=1e-6)


def test_answers_have_their_forms(model: tinyllm.Model) -> None:
    angry, team, _, urgency = model.decide(INPUT, QUESTIONS).answers
    assert angry["name"] == "angry"
    assert set(angry) == {"type", "name", "probability"}
    assert [p["value"] for p in team["probabilities"]] == ["billing", "shipping", True]
    assert team["choice"] == max(team["probabilities"], key=lambda p: p["probability"])["value"]
    assert sum(p["probability"] for p in team["probabilities"]) == pytest.approx(1)
    assert urgency["score"] == pytest.approx(
        sum(p["value"] * p["probability"] for p in urgency["probabilities"])
    )
    assert [p["label"] for p in urgency["probabilities"]] == ["low", "middle", "high"]


def test_a_conversation_is_asked_about_as_well(model: tinyllm.Model) -> None:
    messages = [
        {"role": "user", "content": INPUT},
        {"role": "assistant", "content": "We are sorry."},
        {"role": "user", "content": "Thank you."},
    ]
    assert len(model.decide(messages, QUESTIONS).answers) == 4
    as_text = model.decide([{"role": "user", "content": INPUT}], QUESTIONS)
    assert as_text.answers == model.decide(INPUT, QUESTIONS).answers


def test_confidence_is_0_where_all_is_equally_likely_and_1_where_one_is_certain() -> None:
    for n in (2, 3, 10, 255):
        flat, sure = np.full(n, 1 / n), np.eye(n)[n // 2]
        assert certainty(flat) == pytest.approx(0)
        assert certainty(sure) == pytest.approx(1)
        if n <= 10:
            assert nearness(flat) == pytest.approx(0, abs=1e-9)
            assert nearness(sure) == pytest.approx(1)
    assert nearness(np.array([0.5, 0, 0, 0.5])) == 0
    # llama-server's example of its /v1/systemone
    assert certainty(np.array([0.9998, 0.0001, 0.0001])) == pytest.approx(0.9997, abs=1e-4)
    shown = np.array([0.0023, 0.116, 0.6753, 0.2064])
    assert nearness(shown) == pytest.approx(0.673, abs=1e-3)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"type": "maybe"}, "type is one of"),
        ("Is it?", "type is one of"),
        ({"type": "predicate"}, r"questions\[0\].instructions"),
        ({"type": "predicate", "instructions": " "}, "instructions"),
        ({"type": "predicate", "instructions": "x", "choices": []}, "choices is unknown"),
        ({"type": "predicate", "instructions": "x", "criteria": {"maybe": "y"}}, "criteria"),
        ({"type": "choice", "instructions": "x", "choices": ["a"]}, "2 to 255"),
        ({"type": "choice", "instructions": "x", "choices": ["a", "a"]}, "once"),
        ({"type": "choice", "instructions": "x", "choices": ["a", 3]}, r"choices\[1\].value"),
        ({"type": "choice", "instructions": "x", "choices": ["a", {"value": "b", "c": 1}]}, "perhaps"),
        ({"type": "score", "instructions": "x", "levels": ["a"] * 11}, "2 to 10"),
        ({"type": "score", "instructions": "x", "levels": [True, "b"]}, "label"),
        ({"type": "score", "instructions": "x", "levels": "ab"}, "levels"),
        ({"type": "choice", "instructions": "x", "choices": ["a", "b"], "name": 3}, "name"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(model: tinyllm.Model, question: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        model.decide(INPUT, [question])


def test_limits_are_named(model: tinyllm.Model) -> None:
    for questions in ([], QUESTIONS * 101, "Is it?", None):
        with pytest.raises(ArgumentError, match="questions"):
            model.decide(INPUT, questions)  # type: ignore[arg-type]
    many = {"type": "choice", "instructions": "x", "choices": [str(i) for i in range(255)]}
    try:
        n = len(model.decide(INPUT, [many]).answers[0]["probabilities"])
    except ArgumentError as e:
        assert "ask in groups" in str(e)  # noqa: PT017
    else:
        assert n == 255
    with pytest.raises(ContextOverflow):
        model.decide("word " * 100_000, QUESTIONS[:1])


def test_a_template_that_opens_reasoning_is_refused(model: tinyllm.Model) -> None:
    thinks = (
        "{% for m in messages %}{{ m.content }}{% if '</think>' in m.content %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    with pytest.raises(TemplateError, match="reasoning"):
        model.decide(INPUT, QUESTIONS[:1], template=thinks)
