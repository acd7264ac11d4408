"""OpenAI's responses, without memory: each request has its whole conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Discriminator, Field, Tag

from ..chat.tools import CallPart, Delta
from ..tokenizers import Tokenizer
from .conversation import Answers, Conversation, Told, answer
from .errors import Refusal
from .fields import (
    Effort,
    Flag,
    FunctionName,
    Likeliest,
    Loose,
    Many,
    Name,
    OrAll,
    Parameters,
    Positive,
    Sampling,
    Schema,
    Share,
    Strict,
    Temperature,
    Text,
    Whole,
    Wrong,
    refused,
    start,
)
from .openai_chat import TextPart, entries
from .reply import Reply, event
from .shapes import ResponseShape, shaped
from .wording import fields_of

router = APIRouter()
STATELESS = "nothing is kept here between requests; send all of the conversation's items as input"


class InputMessage(Loose):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Many[TextPart]

    def text(self) -> str:
        """Its text."""
        return joined(self.content)


class InputCall(Loose):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputOutput(Loose):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text | Many[TextPart]


class ReasoningText(Loose):
    """A part of the assistant's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class InputReasoning(Loose):
    """Reasoning of the assistant."""

    type: Literal["reasoning"]
    summary: Many[ReasoningText] = Field(default_factory=list)
    content: Many[ReasoningText] | None = None


def _kind(item: Any) -> Any:
    """Which item it is meant to be; one without a type is a message."""
    if isinstance(item, dict):
        return item.get("type", "message" if "role" in item else None)
    return getattr(item, "type", None)


def _whole(item: Any) -> Any:
    if isinstance(item, dict) and item.get("type") == "item_reference":
        raise Wrong(STATELESS)
    return item


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
    BeforeValidator(_whole),
]


def joined(content: str | list[TextPart]) -> str:
    """A content's text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def messages_of(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as templates read them; calls belong to the message before them."""
    found: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        if isinstance(item, InputMessage):
            role = "system" if item.role == "developer" else item.role
            said = {"role": role, "content": item.text()}
            if role == "assistant" and thought:
                said["reasoning_content"], thought = thought, ""
            found.append(said)
        elif isinstance(item, InputReasoning):
            thought = "".join(part.text for part in item.content or item.summary)
        elif isinstance(item, InputCall):
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            if thought:
                found[-1]["reasoning_content"], thought = thought, ""
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            text = joined(item.output)
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    return found


class ResponseTool(Loose):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: Flag | None = None

    def plain(self) -> dict[str, Any]:
        """The tool as chat completions describe it."""
        function: dict[str, Any] = {"name": self.name}
        if self.parameters is not None:
            function["parameters"] = self.parameters
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ResponseChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class AnyText(Strict):
    """Any text."""

    type: Literal["text"]


class AnyObject(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaText(Strict):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    name: str = "schema"
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: Flag | None = None


class TextConfig(Strict):
    """The form of the answer."""

    format: Annotated[AnyText | AnyObject | SchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """How much the model reasons."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseStreamOptions(Strict):
    """Options of a stream; they change nothing here."""

    include_obfuscation: Flag | None = None


class ResponseBody(Strict):
    """A request of ``/v1/responses``."""

    model: str | None = None
    input: Text | Annotated[Many[Item], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Likeliest | None = None
    include: Many[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    tools: Many[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice | None = None
    parallel_tool_calls: Flag | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    stream: Flag | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Flag | None = None
    store: Flag | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    previous_response_id: Annotated[None, refused(STATELESS)] = None
    conversation: Annotated[None, refused(STATELESS)] = None
    top_k: OrAll | None = None
    min_p: Share | None = None
    seed: Whole | None = None
    ignore_eos: Flag | None = None

    def plain(self) -> list[dict[str, Any]]:
        """The conversation as templates read it."""
        head = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, {"role": "user", "content": self.input}]
        return [*head, *messages_of(self.input)]

    def variables(self) -> dict[str, Any]:
        """Variables of the template."""
        effort = self.reasoning and self.reasoning.effort
        if not effort:
            return {}
        return {
            "reasoning_effort": effort,
            **({"enable_thinking": False} if effort == "none" else {}),
        }

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' probabilities are told."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (
            self.include or ()
        )

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the engine takes."""
        shared = ("temperature", "top_p", "top_k", "min_p", "ignore_eos")
        chosen = Sampling.model_construct(**{n: getattr(self, n) for n in shared})
        found = {**chosen.sampling(tokenizer.eog), "seed": start(self.seed)}
        form = self.text and self.text.format
        if isinstance(form, SchemaText):
            found["json_schema"] = form.schema_
        elif isinstance(form, AnyObject):
            found["json_schema"] = {"type": "object"}
        if self.truncation == "auto":
            found["overflow"] = "truncate"
        if self.wants_logprobs:
            found["logprobs"] = self.top_logprobs or 0
        return found


@router.post(
    "/v1/responses",
    **shaped(
        ResponseShape, stream=True, example={"input": "Tell me a story.", "max_output_tokens": 60}
    ),
)
async def respond(body: ResponseBody, request: Request) -> Reply:
    """Answer a conversation, by OpenAI's newer protocol."""
    if body.background:
        raise Refusal(
            400,
            "background: an answer is written while its client waits for it",
            param="background",
        )
    choice = body.tool_choice or "auto"
    wanted: str | Mapping[str, Any] = (
        choice
        if isinstance(choice, str)
        else {"type": "function", "function": {"name": choice.name}}
    )
    c = Conversation(
        messages=body.plain(),
        tools=[tool.plain() for tool in body.tools or ()],
        tool_choice=wanted,
        parallel=body.parallel_tool_calls is not False,
        variables=body.variables(),
        max_tokens=-1 if body.max_output_tokens is None else body.max_output_tokens,
        streams=bool(body.stream),
        options=body.options,
        fields=fields_of(
            body,
            prompt="input",
            messages="input",
            template_vars="reasoning",
            json_schema="text.format.schema",
            form="text.format",
            parameters="tools.{}.parameters",
            overflow='truncation: "auto"',
        ),
    )
    if not c.messages:
        raise Refusal(400, "input has no message", param="input")
    answers = await answer(request.app.state.pool, body.model, c)
    return Reply(answers.asked, ResponseWriter(answers, body), bool(body.stream))


class ResponseWriter:
    """Tells an answer as items: reasoning, a message, calls."""

    def __init__(self, answers: Answers, body: ResponseBody) -> None:
        self.answers, self.body = answers, body
        self.tokenizer = answers.asked.served.model.tokenizer
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.output: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None  # the item that is being written
        self.logprobs: list[Any] = []
        self.n_events = 0

    # ---- the response as a whole

    def _response(self, status: str, told: Told | None = None) -> dict[str, Any]:
        body, choice = self.body, self.body.tool_choice or "auto"
        short = told is not None and self._is_short(told)
        if short and status == "completed":
            status = "incomplete"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "model": self.answers.asked.served.name, "output": self.output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "text": {"format": self._format()},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "truncation": body.truncation or "disabled", "metadata": body.metadata or {},
            "top_logprobs": body.top_logprobs or 0, "background": False, "user": body.user,
            "completed_at": int(time.time()) if status == "completed" else None,
            "usage": None if told is None else self._usage(),
        }  # fmt: skip

    def _is_short(self, told: Told) -> bool:
        """Whether the answer has ended, and was cut off."""
        return told.whole is not None and self.answers.finish(0, told.whole) == "length"

    def _format(self) -> dict[str, Any]:
        form = self.body.text and self.body.text.format
        return {"type": "text"} if form is None else form.model_dump(by_alias=True)

    def _usage(self) -> dict[str, Any]:
        used = self.answers.usage
        cached = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }

    async def whole(self) -> dict[str, Any]:
        response: dict[str, Any] = {}
        async for told in self.answers.follow():
            for delta in told.deltas:
                self._hear(delta)
            self._score(told)
            if told.whole is not None:
                self._close(self._is_short(told))
                response = self._response("completed", told)
        return response

    async def events(self) -> AsyncIterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        async for told in self.answers.follow():
            scores = self._score(told)
            for delta in told.deltas:
                for e in self._hear(delta, scores):
                    yield e
                scores = []
            if told.whole is not None:
                for e in self._close(self._is_short(told), ended=True):
                    yield e
                response = self._response("completed", told)
                yield self._event(f"response.{response['status']}", response=response)

    def _score(self, told: Told) -> list[Any]:
        if not self.body.wants_logprobs:
            return []
        found = entries(self.tokenizer, told.tokens)
        self.logprobs += found
        return found

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.n_events += 1
        return event({"type": kind, "sequence_number": self.n_events - 1, **fields}, kind)

    # ---- items

    def _hear(self, delta: Delta, scores: list[Any] | None = None) -> list[bytes]:
        """Add to the items, and return the events that say so."""
        if delta.part is not None:
            return self._part(delta.part)
        if delta.call is not None:
            if self.open is not None and self.open["type"] == "function_call":
                return self._close()  # its parts have told it
            f = delta.call["function"]
            whole = CallPart(0, delta.call["id"], f["name"], f["arguments"])
            return [*self._part(whole), *self._close()]
        kind, text = (
            ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.content)
        )
        if not text or (kind == "message" and self.open is None and not text.strip()):
            return []
        events = [] if self.open is not None and self.open["type"] == kind else self._begin(kind)
        assert self.open is not None
        self.open["content"][0]["text"] += text
        more: dict[str, Any] = {**self._place(), "delta": text}
        if kind == "message":
            return [
                *events,
                self._event("response.output_text.delta", **more, logprobs=scores or []),
            ]
        return [*events, self._event("response.reasoning_text.delta", **more)]

    def _place(self) -> dict[str, Any]:
        assert self.open is not None
        return {
            "item_id": self.open["id"],
            "output_index": len(self.output) - 1,
            "content_index": 0,
        }

    def _begin(self, kind: str) -> list[bytes]:
        events = self._close()
        if kind == "message":
            part: dict[str, Any] = {
                "type": "output_text",
                "text": "",
                "annotations": [],
                "logprobs": [],
            }
            item: dict[str, Any] = {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "role": "assistant",
            }
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": []}
        item |= {"status": "in_progress", "content": []}
        self.open = item
        self.output.append(item)
        events.append(self._added())
        item["content"] = [part]
        return [*events, self._event("response.content_part.added", **self._place(), part=part)]

    def _part(self, part: CallPart) -> list[bytes]:
        """A call, or what it has gained."""
        events: list[bytes] = []
        if self.open is None or self.open["type"] != "function_call":
            events = self._close()
            self.open = {
                "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": part.id,
                "name": part.name, "arguments": "", "status": "in_progress",
            }  # fmt: skip
            self.output.append(self.open)
            events.append(self._added())
        self.open["arguments"] += part.arguments
        place = {"item_id": self.open["id"], "output_index": len(self.output) - 1}
        kind = "response.function_call_arguments.delta"
        return [*events, self._event(kind, **place, delta=part.arguments)]

    def _added(self) -> bytes:
        """The event of the item that is begun."""
        index = len(self.output) - 1
        return self._event("response.output_item.added", output_index=index, item=self.open)

    def _close(self, short: bool = False, ended: bool = False) -> list[bytes]:
        """End the item that is being written: ``short``, as a call is once the answer has ``ended``."""
        item = self.open
        if item is None:
            return []
        index = len(self.output) - 1
        cut_off = short or (ended and item["type"] == "function_call")
        item["status"] = "incomplete" if cut_off else "completed"
        if item["type"] == "function_call":
            self.open = None
            told = {"name": item["name"], "arguments": item["arguments"]}
            kind, place = "response.function_call_arguments.done", {"item_id": item["id"]}
            events = [] if cut_off else [self._event(kind, **place, output_index=index, **told)]
            return [
                *events,
                self._event("response.output_item.done", output_index=index, item=item),
            ]
        part, place = item["content"][0], self._place()
        if item["type"] == "message":
            part["logprobs"] = self.logprobs
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [self._event("response.output_text.done", **place, **told)]
        else:
            events = [self._event("response.reasoning_text.done", **place, text=part["text"])]
        events.append(self._event("response.content_part.done", **place, part=part))
        self.open = None
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def failed(self, refusal: Refusal) -> bytes:
        code = "server_error" if refusal.status >= 500 else "invalid_prompt"
        fields = {"code": refusal.code or code, "message": refusal.message}
        return self._event("error", **fields, param=refusal.param)
