"""Questions about a text, answered with probabilities, as OpenAI's protocol and System One ask them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from ..chat.questions import MOST_CHOICES, MOST_LEVELS, MOST_QUESTIONS
from ..engine.deciding import Decisions
from ..engine.embedding import BeforeStep
from .extras import with_texts
from .fields import Flag, Many, Strict
from .openai_chat import TextPart
from .openai_responses import InputCall, InputMessage, InputOutput, messages_of
from .pool import Served
from .shapes import DecisionShape, SystemOneShape, shaped
from .wording import fields_of

router = APIRouter()
Text = Annotated[str, Field(min_length=1)]


class JsonPart(Strict):
    """A part of a message that is data."""

    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The data as the model reads it."""
        return json.dumps(self.data, ensure_ascii=False)


Parts = Annotated[Many[TextPart | JsonPart], Field(min_length=1)]


def text_of(given: str | Sequence[TextPart | JsonPart]) -> str:
    """A text, or the texts of its parts."""
    return given if isinstance(given, str) else "".join(part.text for part in given)


class DecisionMessage(InputMessage):
    """A message of the input."""

    content: str | Parts  # type: ignore[assignment]

    def text(self) -> str:
        """Its text."""
        return text_of(self.content)


class Predicate(Strict):
    """A statement that is true or not."""

    type: Literal["predicate"]
    instructions: Text | Parts
    name: str | None = None


class ChoiceValue(Strict):
    """One of the values to choose from."""

    value: Flag | Text
    description: str | None = None


class Choice(Strict):
    """A choice of one value."""

    type: Literal["choice"]
    instructions: Text | Parts
    name: str | None = None
    choices: Annotated[Many[ChoiceValue], Field(min_length=2, max_length=MOST_CHOICES)]


class Level(Strict):
    """One of the levels of a score."""

    label: Text
    description: str | None = None


class Score(Strict):
    """A level between the lowest and the highest."""

    type: Literal["score"]
    instructions: Text | Parts
    name: str | None = None
    levels: Annotated[Many[Level], Field(min_length=2, max_length=MOST_LEVELS)]


Question = Annotated[Predicate | Choice | Score, Field(discriminator="type")]


class DecisionBody(Strict):
    """A request of ``/v1/decisions``."""

    model: str | None = None
    input: Text | Annotated[Many[InputCall | InputOutput | DecisionMessage], Field(min_length=1)]
    questions: Annotated[Many[Question], Field(min_length=1, max_length=MOST_QUESTIONS)]
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None


@router.post(
    "/v1/decisions",
    **shaped(
        DecisionShape,
        example={
            "input": "I was charged twice.",
            "questions": [{"type": "predicate", "instructions": "It is a complaint."}],
        },
    ),
)
async def decide(body: DecisionBody, request: Request) -> dict[str, Any]:
    """Answer questions about a text or a conversation with probabilities."""
    given = body.input if isinstance(body.input, str) else messages_of(body.input)
    questions = [
        {**q.model_dump(exclude_none=True), "instructions": text_of(q.instructions)}
        for q in body.questions
    ]

    def work(served: Served, before_step: BeforeStep) -> dict[str, Any]:
        found = decided(served, given, questions, before_step)
        n_read = found.usage.prompt_tokens
        usage = {
            "input_tokens": n_read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": n_read,
        }
        answers = [{**a, "mass": m} for a, m in zip(found.answers, found.mass, strict=True)]
        return {"model": served.name, "answers": answers, "usage": usage}

    return await with_texts(request, body.model, work, fields_of(body, prompt="input"))  # type: ignore[no-any-return]


def decided(
    served: Served,
    given: str | list[dict[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    before_step: BeforeStep,
) -> Decisions:
    """What a model makes of questions.

    Raises
    ------
    Refusal
        The model writes no texts.
    """
    served.engine  # noqa: B018 (an encoder is refused)
    return served.model.decide(given, questions, served.settings.template, before_step=before_step)


# ---- System One


class Noul(Strict):
    """A question that is answered with yes or no."""

    class Criteria(Strict):
        """What yes and no mean."""

        true: str | None = None
        false: str | None = None

    type: Literal["noul"]
    instructions: Text | dict[str, Any] | list[Any]
    criteria: Criteria | None = None

    def asked(self) -> dict[str, Any]:
        """The question as ``Model.decide`` takes it."""
        said = self.criteria.model_dump() if self.criteria is not None else {}
        return {"type": "predicate", "criteria": said}

    def answer(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What was found, by System One's names."""
        return {"noul": found["probability"]}


class OptionChoice(Strict):
    """A choice of one option, each by its name, with a description or null."""

    type: Literal["choice"]
    instructions: Text | dict[str, Any] | list[Any]
    criteria: Annotated[dict[Text, str | None], Field(min_length=2, max_length=MOST_CHOICES)]

    def asked(self) -> dict[str, Any]:
        """The question as ``Model.decide`` takes it."""
        options = [{"value": v, "description": d} for v, d in self.criteria.items()]
        return {"type": "choice", "choices": options}

    def answer(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What was found, by System One's names."""
        shares = {p["value"]: p["probability"] for p in found["probabilities"]}
        return {
            "choice": found["choice"], "probabilities": shares, "confidence": found["confidence"],
        }  # fmt: skip


class LevelScore(Strict):
    """A level of a list, from the lowest to the highest."""

    type: Literal["score"]
    instructions: Text | dict[str, Any] | list[Any]
    criteria: Annotated[Many[Text], Field(min_length=2, max_length=MOST_LEVELS)]

    def asked(self) -> dict[str, Any]:
        """The question as ``Model.decide`` takes it."""
        return {"type": "score", "levels": self.criteria}

    def answer(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What was found, by System One's names."""
        levels = {str(p["value"]): p for p in found["probabilities"]}
        return {
            "score": found["score"],
            "legend": {i: p["label"] for i, p in levels.items()},
            "probabilities": {i: p["probability"] for i, p in levels.items()},
            "confidence": found["confidence"],
        }


SystemOneQuestion = Annotated[Noul | OptionChoice | LevelScore, Field(discriminator="type")]


class SystemOneBody(Strict):
    """A request of ``/v1/systemone``: what is not a text is read as JSON."""

    model: str | None = None
    state: Text | dict[str, Any] | list[Any]
    questions: Annotated[
        dict[Text, SystemOneQuestion], Field(min_length=1, max_length=MOST_QUESTIONS)
    ]


@router.post(
    "/v1/systemone",
    **shaped(
        SystemOneShape,
        example={
            "state": "I was charged twice.",
            "questions": {"angry": {"type": "noul", "instructions": "Is it a complaint?"}},
        },
    ),
)
async def systemone(body: SystemOneBody, request: Request) -> dict[str, Any]:
    """Answer questions about a state with probabilities, each by its name."""
    asked = [{**q.asked(), "instructions": plain(q.instructions)} for q in body.questions.values()]

    def work(served: Served, before_step: BeforeStep) -> dict[str, Any]:
        found = decided(served, plain(body.state), asked, before_step)
        answers = {
            name: {"type": q.type, **q.answer(a), "mass": m}
            for (name, q), a, m in zip(
                body.questions.items(), found.answers, found.mass, strict=True
            )
        }
        usage = {"input_tokens": found.usage.prompt_tokens, "output_tokens": 0}
        return {"model": served.name, "answers": answers, "usage": usage}

    return await with_texts(request, body.model, work, fields_of(body, prompt="state"))  # type: ignore[no-any-return]


def plain(given: str | dict[str, Any] | list[Any]) -> str:
    """A text as it is, anything else as JSON."""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
