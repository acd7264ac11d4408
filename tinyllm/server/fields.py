"""Fields of requests that several protocols share, and their translation to what the engine takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WrapValidator,
    model_serializer,
    model_validator,
)

from ..model import Model
from .errors import Refusal
from .settings import Settings

T = TypeVar("T")
Many = Annotated[
    list[T], Field(fail_fast=True)
]  # a list of a million wrong items has one complaint
MOST_FIELDS = 256  # known and unknown ones of an object


class Wrong(ValueError):
    """What a check of a field raises; it says what was found."""


class Strict(BaseModel):
    """A request, or a part of one: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise Wrong(f"{len(given)} fields; at most {MOST_FIELDS} are read")
        return given


class Loose(BaseModel):
    """A part of a request whose further fields are kept, all in their order: templates write them out."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    _order: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _as_given(cls, given: Any, read: Any) -> Any:
        made = read(given)
        made._order = tuple(given) if isinstance(given, dict) else ()
        return made

    @model_serializer(mode="wrap")
    def _in_order(self, told_of: Any) -> dict[str, Any]:
        told: dict[str, Any] = told_of(self)
        return {name: told[name] for name in self._order if name in told} | told


def _number(value: object) -> object:
    """JSON has one kind of numbers; true and "1" are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a number is expected")
    return value


def refused(why: str) -> BeforeValidator:
    """What refuses a field that we know and cannot do, whatever it holds but null."""

    def check(value: object) -> None:
        if value is not None:
            raise Wrong(why)

    return BeforeValidator(check)


NUMBER = BeforeValidator(_number)  # stands behind limits, which are not in OpenAPI otherwise
Flag = Annotated[bool, Field(strict=True)]  # 1 and "yes" are none
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Temperature = Annotated[
    float, Field(ge=0, le=100), NUMBER
]  # OpenAI's ends at 2; with min_p, more is used
Penalty = Annotated[float, Field(ge=-100, le=100), NUMBER]
Whole = Annotated[int, NUMBER]
Id = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]  # 1.0 is none
Count = Annotated[int, Field(ge=0, lt=1 << 31), NUMBER]
Positive = Annotated[int, Field(ge=1, lt=1 << 31), NUMBER]
OrAll = Annotated[int, Field(ge=-1, lt=1 << 31), NUMBER]  # -1: no limit
NoLimit = Literal[-1]
Likeliest = Annotated[int, Field(ge=0, le=100), NUMBER]
Name = Annotated[str, Field(min_length=1)]
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]  # OpenAI's
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]  # OpenAI's
Schema = dict[str, Any]


def _speakable(text: str) -> str:
    """Tokens are made of UTF-8, which has no half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise Wrong(
            f"character {error.start} is half a surrogate pair, U+{half:04X}; send the whole pair"
        ) from None
    return text


def _of_object(schema: Schema) -> Schema:
    """Arguments are an object."""
    if (kind := schema.get("type", "object")) != "object":
        shown = json.dumps(kind) if isinstance(kind, (str, list)) else "no text"
        raise Wrong(f'the type is {shown:.60}; expected "object", with the arguments as properties')
    return schema


Text = Annotated[str, AfterValidator(_speakable)]
Parameters = Annotated[Schema, AfterValidator(_of_object)]


def _few_wrong(given: Any, read: Any) -> Any:
    """One complaint for many entries."""
    try:
        return read(given)
    except ValidationError as error:
        if (n := error.error_count()) > MOST_FIELDS:
            raise Wrong(f"{n} wrong entries; expected numbers from -100 to 100, by ids") from None
        raise


class Sampling(Strict):
    """How tokens are chosen, by the names of OpenAI and llama-server."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: OrAll | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1), NUMBER] | None = None
    repeat_penalty: Annotated[float, Field(ge=1e-6, le=1e6), NUMBER] | None = None
    repeat_last_n: OrAll | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Penalty], WrapValidator(_few_wrong)
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64), NUMBER] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[Many[Annotated[str, Field(min_length=1)]], Field(max_length=64)]
        | None
    ) = None
    ignore_eos: Flag | None = None

    def sampling(self, eog: frozenset[int]) -> dict[str, Any]:
        """What the engine takes: OpenAI's defaults where a request is silent."""
        names = (
            "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "presence_penalty",
            "frequency_penalty",
        )  # fmt: skip
        given = {n: v for n in names if (v := getattr(self, n)) is not None}
        bias = {int(i): float(b) for i, b in (self.logit_bias or {}).items()}
        if self.ignore_eos:
            bias.update(dict.fromkeys(eog, -math.inf))
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else max(self.top_p, 1e-9),
            "top_k": max(self.top_k or 0, 0),
            "logit_bias": bias or None,
            "seed": start(self.seed),
            "stop": self.stop,
            **given,
        }


def start(seed: int | None) -> int | None:
    """Where random numbers start; -1 is llama-server's word for anywhere."""
    return None if seed is None or seed == -1 else seed % (1 << 64)


def check_ids(ids: Sequence[int], model: Model, param: str) -> None:
    """Refuse tokens that the model does not have."""
    n_vocab = model.network.n_vocab
    if ids and max(ids) >= n_vocab:
        raise Refusal(400, f"{param} has id {max(ids)}; expected ids below {n_vocab}", param=param)


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")


class NamedSchema(Strict):
    """A JSON schema, as OpenAI wraps it."""

    name: str = "schema"
    description: str | None = None
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: Flag | None = None


class SchemaFormat(Strict):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Constrained(Sampling):
    """What a text must be: OpenAI's field, and llama-server's."""

    response_format: Format | None = None
    json_schema: Schema | None = None
    grammar: str | None = None
    regex: str | None = None

    def held(self, settings: Settings) -> dict[str, Any]:
        """At most one of the engine's constraints.

        Raises
        ------
        Refusal
            There are several, or one is too large.
        """
        names = ("json_schema", "grammar", "regex")
        form = {"response_format": schema_of(self.response_format)}
        given = {n: getattr(self, n) for n in names} | form
        found = [name for name, value in given.items() if value is not None]
        if len(found) > 1:
            raise Refusal(400, f"a text is held to one of {', '.join(found)}", param=found[1])
        for name in found:
            check_size(given[name], settings, name)
        return {"json_schema" if n == "response_format" else n: given[n] for n in found}

    @property
    def schema_field(self) -> str:
        """Which field has the schema, as errors name it."""
        form = self.response_format
        if isinstance(form, SchemaFormat):
            return "response_format.json_schema.schema"
        return "json_schema" if form is None else "response_format.schema"


def schema_of(form: TextFormat | ObjectFormat | SchemaFormat | None) -> Schema | None:
    """The schema that a ``response_format`` asks for."""
    if isinstance(form, ObjectFormat):
        return {"type": "object"} if form.schema_ is None else form.schema_
    return form.json_schema.schema_ if isinstance(form, SchemaFormat) else None


def check_size(schemas: Any, settings: Settings, param: str) -> None:
    """Refuse schemas and descriptions of tools that are too large."""
    if schemas and (n := len(json.dumps(schemas))) > settings.max_schema:
        raise Refusal(
            400, f"{param}: {n} bytes of JSON; at most {settings.max_schema}", param=param
        )
