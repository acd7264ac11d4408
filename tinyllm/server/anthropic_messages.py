"""Anthropic's protocol: messages, streamed or whole, and counting their tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from ..chat.tools import CallPart, Delta
from ..engine.completion import Completion
from ..tokenizers import Tokenizer
from .conversation import Answers, Conversation, answer
from .errors import Refusal
from .extras import with_model
from .fields import (
    Count,
    Flag,
    Loose,
    Many,
    OrAll,
    Parameters,
    Positive,
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
from .pool import Served
from .reply import Reply, event
from .shapes import AnthropicErrorShape, CountShape, MessageShape, errors, shaped
from .wording import fields_of

router = APIRouter(responses=errors(AnthropicErrorShape))


FIELDS = {
    "prompt": "messages",
    "template_vars": "thinking",
    "json_schema": "output_config.format.schema",
    "form": "output_config.format",
    "parameters": "tools.{}.input_schema",
}
"""Fields by what the engine's errors call them."""


class TextBlock(Loose):
    """Text."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(Loose):
    """Reasoning of the assistant."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Loose):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(default_factory=dict)


class ToolResultBlock(Loose):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text | Many[TextBlock] | None = None
    is_error: Flag | None = None


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class AnthropicMessage(Strict):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Text | Many[Block]

    def plain(self) -> list[dict[str, Any]]:
        """The messages that templates read: results of tools are messages of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        found: list[dict[str, Any]] = []
        said: dict[str, Any] = {"role": self.role, "content": ""}
        for block in self.content:
            if isinstance(block, TextBlock):
                said["content"] += block.text
            elif isinstance(block, ThinkingBlock):
                said["reasoning_content"] = block.thinking
            elif isinstance(block, ToolUseBlock):
                function = {
                    "name": block.name,
                    "arguments": json.dumps(block.input, ensure_ascii=False),
                }
                call = {"id": block.id, "type": "function", "function": function}
                said.setdefault("tool_calls", []).append(call)
            else:
                found.append(
                    {
                        "role": "tool",
                        "tool_call_id": block.tool_use_id,
                        "content": text_of(block.content),
                    }
                )
        if said["content"] or len(said) > 2 or not found:
            found.append(said)
        return found


def text_of(content: str | Sequence[TextBlock] | None) -> str:
    """A content's text."""
    return content if isinstance(content, str) else "".join(b.text for b in content or ())


class AnthropicTool(Loose):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
    description: Text | None = None
    input_schema: Parameters
    type: Literal["custom"] | None = None

    def plain(self) -> dict[str, Any]:
        """The tool as OpenAI describes it."""
        function = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class ToolChoice(Strict):
    """Whether tools may, must or must not be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: Flag | None = None

    def plain(self) -> str | dict[str, Any]:
        """The choice as OpenAI says it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return {"any": "required"}.get(self.type, self.type)


class JSONFormat(Strict):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Strict):
    """The form of the answer, and how much thought it is worth."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSONFormat | None = None


class Thinking(Strict):
    """Whether the model reasons first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: str | None = None

    @model_validator(mode="after")
    def _has_budget(self) -> Thinking:
        if self.type == "enabled" and self.budget_tokens is None:
            raise Wrong("budget_tokens is missing; enabled thinking has one")
        return self


class CountBody(Strict):
    """A request of ``/v1/messages/count_tokens``."""

    model: str | None = None
    messages: Annotated[Many[AnthropicMessage], Field(min_length=1)]
    system: Text | Many[TextBlock] | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    def plain(self) -> list[dict[str, Any]]:
        """The conversation as templates read it."""
        system = text_of(self.system)
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *(m for message in self.messages for m in message.plain())]

    def variables(self) -> dict[str, Any]:
        """Variables of the template."""
        found: dict[str, Any] = {}
        if self.thinking is not None:
            found["enable_thinking"] = self.thinking.type != "disabled"
        if self.output_config is not None and self.output_config.effort is not None:
            found["reasoning_effort"] = self.output_config.effort
        return found


class MessagesBody(CountBody):
    """A request of ``/v1/messages``; the last six fields are ours."""

    max_tokens: Positive
    stop_sequences: Many[Annotated[str, Field(min_length=1)]] | None = None
    stream: Flag | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: OrAll | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    speed: Literal["standard"] | None = None
    container: Annotated[None, refused("code is not run here; leave it out")] = None
    diagnostics: dict[str, Any] | None = None
    seed: Whole | None = None
    min_p: Share | None = None
    ignore_eos: Flag | None = None

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the engine takes."""
        from .fields import Sampling

        shared = ("temperature", "top_p", "top_k", "min_p", "ignore_eos")
        chosen = Sampling.model_construct(**{n: getattr(self, n) for n in shared})
        found = chosen.sampling(tokenizer.eog)
        found |= {"seed": start(self.seed), "stop": self.stop_sequences}
        if self.output_config is not None and self.output_config.format is not None:
            found["json_schema"] = self.output_config.format.schema_
        return found


@router.post(
    "/v1/messages",
    **shaped(
        MessageShape,
        stream=True,
        example={"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60},
    ),
)
async def messages(body: MessagesBody, request: Request) -> Reply:
    """Answer a conversation, by Anthropic's protocol."""
    pool = request.app.state.pool
    answers = await answer(pool, body.model, conversation(body))
    return Reply(answers.asked, MessageWriter(answers), bool(body.stream))


def conversation(body: MessagesBody) -> Conversation:
    """What a request asks for; a last message of the assistant is continued."""
    plain, choice = body.plain(), body.tool_choice
    last = plain[-1]
    go_on = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
    return Conversation(
        messages=plain,
        tools=[tool.plain() for tool in body.tools or ()],
        tool_choice="auto" if choice is None else choice.plain(),
        parallel=choice is None or not choice.disable_parallel_tool_use,
        variables=body.variables(),
        go_on=go_on,
        streams=bool(body.stream),
        max_tokens=body.max_tokens,
        options=body.options,
        fields=fields_of(body, **FIELDS),
    )


@router.post(
    "/v1/messages/count_tokens",
    **shaped(CountShape, example={"messages": [{"role": "user", "content": "Tell me a story."}]}),
)
async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    """Count the tokens that a conversation would be read as."""
    template = request.app.state.pool.settings.template

    def work(served: Served) -> dict[str, int]:
        tools = [tool.plain() for tool in body.tools or ()]
        choice = "auto" if body.tool_choice is None else body.tool_choice.plain()
        turn = served.model.turn(body.plain(), template, tools, choice, body.variables())
        return {"input_tokens": len(turn.ids)}

    return await with_model(request, body.model, work, fields_of(body, **FIELDS))  # type: ignore[no-any-return]


STOPS = {"stop": "end_turn", "length": "max_tokens"}


class MessageWriter:
    """Tells an answer as blocks of content."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.id = f"msg_{uuid.uuid4().hex}"
        self.n_blocks = 0
        self.open = ""  # the kind of the block that is being written

    def _message(self, content: list[Any], ends: dict[str, Any]) -> dict[str, Any]:
        usage = self._usage()
        return {
            "id": self.id, "type": "message", "role": "assistant", "content": content,
            "model": self.answers.asked.served.name, **ends, "usage": usage,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        used = self.answers.usage
        cached = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"] - cached,
            "output_tokens": used["completion_tokens"],
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    def _ends(self, whole: Completion) -> dict[str, Any]:
        job, reason = self.answers.asked.requests[0].job, self.answers.finish(0, whole)
        stopped = None if job is None else job.text.stopped
        if reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if stopped is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        return {"stop_reason": STOPS[reason], "stop_sequence": None}

    async def events(self) -> AsyncIterator[bytes]:
        message = self._message([], {"stop_reason": None, "stop_sequence": None})
        yield event({"type": "message_start", "message": message}, "message_start")
        yield event({"type": "ping"}, "ping")
        async for told in self.answers.follow():
            for delta in told.deltas:
                for e in self._delta(delta):
                    yield e
            if told.whole is not None:
                for e in self._close():
                    yield e
                last = {
                    "type": "message_delta",
                    "delta": self._ends(told.whole),
                    "usage": self._usage(),
                }
                yield event(last, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def _delta(self, delta: Delta) -> list[bytes]:
        if delta.part is not None:
            return self._part(delta.part)
        if delta.call is not None:
            if self.open == "tool_use":  # its parts have told it
                return self._close()
            f = delta.call["function"]
            return [
                *self._part(CallPart(0, delta.call["id"], f["name"], f["arguments"])),
                *self._close(),
            ]
        if delta.reasoning:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            begun = self._begin("thinking", block)
            return [*begun, self._change({"type": "thinking_delta", "thinking": delta.reasoning})]
        if not delta.content or (self.open != "text" and not delta.content.strip()):
            return []  # blank lines between reasoning, calls and text
        begun = self._begin("text", {"type": "text", "text": ""})
        return [*begun, self._change({"type": "text_delta", "text": delta.content})]

    def _part(self, part: CallPart) -> list[bytes]:
        block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
        begun = self._begin("tool_use", block)
        return [*begun, self._change({"type": "input_json_delta", "partial_json": part.arguments})]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self.open == kind:
            return []
        found = self._close()
        self.open = kind
        value = {"type": "content_block_start", "index": self.n_blocks, "content_block": block}
        return [*found, event(value, "content_block_start")]

    def _change(self, change: dict[str, Any]) -> bytes:
        value = {"type": "content_block_delta", "index": self.n_blocks, "delta": change}
        return event(value, "content_block_delta")

    def _close(self) -> list[bytes]:
        if not self.open:
            return []
        value = {"type": "content_block_stop", "index": self.n_blocks}
        self.open, self.n_blocks = "", self.n_blocks + 1
        return [event(value, "content_block_stop")]

    async def whole(self) -> dict[str, Any]:
        (end,) = await self.answers.whole()
        said, content = end.message or {}, []
        if said.get("reasoning"):
            content.append({"type": "thinking", "thinking": said["reasoning"], "signature": ""})
        if said["content"]:
            content.append({"type": "text", "text": said["content"]})
        for call in said.get("tool_calls", ()):
            f = call["function"]
            block = {"type": "tool_use", "id": call["id"], "name": f["name"]}
            content.append({**block, "input": json.loads(f["arguments"])})
        return self._message(content, self._ends(end))

    def failed(self, refusal: Refusal) -> bytes:
        return event(refusal.shown("/v1/messages"), "error")
