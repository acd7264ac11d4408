"""Decisions: OpenAI's route and System One's, beside ``Model.decide``."""

from __future__ import annotations

import pytest

TICKET = "I was charged twice for my order last week, and nobody has replied."
QUESTIONS = [
    {"type": "predicate", "name": "angry", "instructions": "The customer is angry."},
    {
        "type": "choice",
        "name": "team",
        "instructions": "Which team should handle this?",
        "choices": [{"value": "billing"}, {"value": "shipping", "description": "parcels"}],
    },
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "Is it paid?"}],
        "choices": [{"value": True}, {"value": "true"}, {"value": False}],
    },
    {
        "type": "score",
        "name": "urgency",
        "instructions": "How urgent is it?",
        "levels": [{"label": "can wait"}, {"label": "this week"}, {"label": "today"}],
    },
]


def asked(questions):
    return [
        {**q, "instructions": "Is it paid?"} if isinstance(q["instructions"], list) else q
        for q in questions
    ]


def test_decisions_are_those_of_decide(app, model):
    answer = app.post("/v1/decisions", {"model": "tales", "input": TICKET, "questions": QUESTIONS})
    assert answer.status_code == 200, answer.text
    found, expected = answer.json(), model.decide(TICKET, asked(QUESTIONS))
    assert [a.pop("mass") for a in found["answers"]] == expected.mass
    assert found["answers"] == expected.answers
    assert found["answers"][2]["probabilities"][0]["value"] is True
    assert found["model"] == "tales"
    usage = found["usage"]
    assert usage["input_tokens"] == usage["total_tokens"] == expected.usage.prompt_tokens
    assert usage["output_tokens"] == 0


def test_decisions_about_a_conversation(app, model):
    data = {"type": "input_json", "data": {"paid": 2}}
    given = [
        {"role": "developer", "content": "You sort letters."},
        {"role": "user", "content": [{"type": "input_text", "text": TICKET}, data]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I see."}]},
    ]
    found = app.post("/v1/decisions", {"input": given, "questions": QUESTIONS[:1]})
    messages = [
        {"role": "system", "content": "You sort letters."},
        {"role": "user", "content": TICKET + '{"paid": 2}'},
        {"role": "assistant", "content": "I see."},
    ]
    expected = model.decide(messages, QUESTIONS[:1]).answers[0]["probability"]
    assert found.json()["answers"][0]["probability"] == expected


def test_system_one_names_its_answers(app, model):
    questions = {
        "angry": {
            "type": "noul",
            "instructions": "The customer is angry.",
            "criteria": {"true": "complains", "false": None},
        },
        "team": {
            "type": "choice",
            "instructions": {"ask": "Which team?"},
            "criteria": {"billing": None, "shipping": "parcels"},
        },
        "urgency": {
            "type": "score",
            "instructions": "How urgent is it?",
            "criteria": ["can wait", "today"],
        },
    }
    state = {"ticket": TICKET}
    found = app.post("/v1/systemone", {"state": state, "questions": questions}).json()
    expected = model.decide(
        f'{{"ticket": "{TICKET}"}}',
        [
            {
                "type": "predicate",
                "instructions": "The customer is angry.",
                "criteria": {"true": "complains"},
            },
            {
                "type": "choice",
                "instructions": '{"ask": "Which team?"}',
                "choices": ["billing", {"value": "shipping", "description": "parcels"}],
            },
            {
                "type": "score",
                "instructions": "How urgent is it?",
                "levels": ["can wait", "today"],
            },
        ],
    )
    angry, team, urgency = expected.answers
    answers = found["answers"]
    assert list(answers) == ["angry", "team", "urgency"]
    assert answers["angry"] == {
        "type": "noul", "noul": angry["probability"], "mass": expected.mass[0],
    }  # fmt: skip
    assert answers["team"]["choice"] == team["choice"]
    assert answers["team"]["confidence"] == team["confidence"]
    assert list(answers["team"]["probabilities"]) == ["billing", "shipping"]
    assert answers["urgency"]["legend"] == {"0": "can wait", "1": "today"}
    assert (
        answers["urgency"]["score"] == urgency["score"] == answers["urgency"]["probabilities"]["1"]
    )
    assert found["usage"] == {"input_tokens": expected.usage.prompt_tokens, "output_tokens": 0}


ONE = QUESTIONS[0]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("decisions", {"input": TICKET, "questions": []}, "questions"),
        ("decisions", {"input": TICKET, "questions": [ONE] * 401}, "at most 400"),
        ("decisions", {"input": "", "questions": [ONE]}, "input"),
        ("decisions", {"input": TICKET, "questions": [{**ONE, "nonsense": 1}]}, "nonsense"),
        ("decisions", {"input": TICKET, "questions": [{**ONE, "type": "odd"}]}, 'found "odd"'),
        ("decisions", {"input": "word " * 600, "questions": [ONE]}, "context"),
        ("decisions", {"input": TICKET, "questions": [{**QUESTIONS[1], "choices": []}]}, "choices"),
        (
            "decisions",
            {
                "input": TICKET,
                "questions": [{**QUESTIONS[1], "choices": [{"value": "a"}, {"value": "a"}]}],
            },
            "once",
        ),
        ("systemone", {"state": TICKET, "questions": {}}, "questions"),
        ("systemone", {"state": TICKET, "questions": {"a": {"type": "noul"}}}, "instructions"),
        ("systemone", {"state": TICKET, "images": [], "questions": {}}, "supplied: images"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(app, path, body, said):
    answer = app.post(f"/v1/{path}", body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
