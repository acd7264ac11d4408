"""OpenAI's chat completions, with llama-server's and vLLM's further fields and a few of our own."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from ..chat.tools import Delta
from ..engine.completion import Completion
from ..engine.generate import Token
from ..tokenizers import Tokenizer
from .conversation import Answers, Conversation, answer
from .errors import Refusal
from .fields import (
    Constrained,
    Effort,
    Flag,
    FunctionName,
    Id,
    Likeliest,
    Loose,
    Many,
    Name,
    NoLimit,
    Parameters,
    Positive,
    Strict,
    Text,
    Wrong,
    refused,
)
from .reply import Reply, dumps, quoted
from .settings import Settings
from .shapes import ChatShape, shaped
from .wording import fields_of

router = APIRouter()


class TextPart(Loose):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class Function(Strict):
    """The name of a called function, and its arguments as JSON."""

    name: str
    arguments: str = "{}"


class Call(Loose):
    """A call that the assistant made before."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Many[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Annotated[None, refused("sound is neither read nor made here")] = None
    function_call: Annotated[None, refused("give tool_calls, which came after it")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        empty = self.content is None or (self.content == [] and self.role != "tool")
        if self.role != "assistant" and empty:
            raise Wrong("a message needs content, unless it is the assistant's")
        if self.role == "tool" and self.tool_call_id is None:
            raise Wrong("a tool's message needs tool_call_id, the id of the call that it answers")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as templates read it."""
        parts = self.content
        text = "".join(p.text for p in parts) if isinstance(parts, list) else parts or ""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        found: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [c.model_dump() for c in self.tool_calls]
        for key in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                found[key] = value
        return found


class Described(Loose):
    """A function's name, description and parameters."""

    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None


class FunctionTool(Loose):
    """A function that the model may call."""

    type: Literal["function"]
    function: Described

    def plain(self) -> dict[str, Any]:
        """The tool as it was given: templates write it out."""
        return self.model_dump(exclude_unset=True)


class NamedFunction(Strict):
    """A function's name."""

    name: Name


class NamedChoice(Strict):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: Flag | None = None
    include_obfuscation: Flag | None = None


class Streamed(Strict):
    """Whether the answer comes as a stream."""

    stream: Flag | None = None
    stream_options: StreamOptions | None = None


class Ignored(Strict):
    """Fields that change nothing here: who asks, where it is kept, what it costs."""

    user: str | None = None
    store: Flag | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    cache_prompt: Flag | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None


class ChatBody(Constrained, Streamed, Ignored):
    """A request of ``/v1/chat/completions``."""

    model: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: Positive | NoLimit | None = None
    max_completion_tokens: Positive | NoLimit | None = None
    n: Positive | None = None
    logprobs: Flag | None = None
    top_logprobs: Likeliest | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: Flag | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: Many[Literal["text"]] | None = None
    continue_final_message: Flag | None = None
    prefix_ids: Many[Id] | None = None

    def limit(self) -> int:
        """Tokens of an answer at most; -1: until the context is full."""
        given = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        return -1 if given is None else given

    def variables(self) -> dict[str, Any]:
        """Variables of the template."""
        found = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            found.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                found.setdefault("enable_thinking", False)
        return found


@router.post(
    "/v1/chat/completions",
    **shaped(
        ChatShape,
        stream=True,
        example={"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60},
    ),
)
async def chat(body: ChatBody, request: Request) -> Reply:
    """Answer a conversation."""
    pool = request.app.state.pool
    answers = await answer(pool, body.model, conversation(body, pool.settings))
    return Reply(answers.asked, ChatWriter(answers, body), bool(body.stream))


def conversation(body: ChatBody, settings: Settings) -> Conversation:
    """What a request asks for; refused where it goes together badly."""
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
    if body.prefix_ids and (body.continue_final_message or body.tools):
        raise Refusal(
            400,
            "prefix_ids goes with neither continue_final_message nor tools",
            param="prefix_ids",
        )
    check_stream_options(body)
    held = body.held(settings)
    last = body.messages[-1]
    may_go_on = last.role == "assistant" and bool(last.content) and not last.tool_calls
    if body.continue_final_message and not may_go_on:
        raise Refusal(
            400,
            "continue_final_message: the last message is not a text of the assistant",
            param="continue_final_message",
        )
    choice = body.tool_choice or "auto"

    def options(tokenizer: Tokenizer) -> dict[str, Any]:
        found = {**body.sampling(tokenizer.eog), **held}
        if body.logprobs:
            found["logprobs"] = body.top_logprobs or 0
        return found

    return Conversation(
        messages=[m.plain() for m in body.messages],
        tools=[tool.plain() for tool in body.tools or ()],
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        parallel=body.parallel_tool_calls is not False,
        variables=body.variables(),
        go_on=may_go_on and body.continue_final_message is not False,
        prefix_ids=body.prefix_ids or (),
        max_tokens=body.limit(),
        n=body.n or 1,
        streams=bool(body.stream),
        documents=settings.documents,
        options=options,
        fields=fields_of(
            body,
            prompt="messages",
            template_vars="chat_template_kwargs",
            json_schema=body.schema_field,
            form="response_format" if body.response_format else "json_schema",
            parameters="tools.{}.function.parameters",
        ),
    )


def check_stream_options(body: Streamed) -> None:
    """Refuse options of a stream where there is none, as OpenAI does."""
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options is given without stream: true", param="stream_options")


class ChatWriter:
    """Tells the answers of a chat."""

    def __init__(self, answers: Answers, body: ChatBody) -> None:
        self.answers, self.logprobs = answers, bool(body.logprobs)
        self.tokenizer = answers.asked.served.model.tokenizer
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": answers.asked.served.name,
            "system_fingerprint": "tinyllm",
        }
        self.usage = bool(body.stream_options and body.stream_options.include_usage)

    async def events(self) -> AsyncIterator[bytes]:
        head = dumps({**self.head, "object": "chat.completion.chunk"})[:-1]
        before = b"data: " + head + b',"choices":[{"index":'
        after = b',"usage":null}\n\n' if self.usage else b"}\n\n"

        def chunk(
            i: int, delta: bytes, logprobs: bytes = b"null", ends: str | None = None
        ) -> bytes:
            reason = b"null" if ends is None else b'"' + ends.encode() + b'"'
            body = b'%d,"delta":{%s},"logprobs":%s,"finish_reason":%s%s}]'
            found = self.references if ends else {}
            more = b"," + dumps(found)[1:-1] if found else b""
            return before + body % (i, delta, logprobs, reason, more) + after

        for i in range(self.answers.asked.n_texts):
            yield chunk(i, b'"role":"assistant","content":""')
        ends: list[Completion] = []
        n_calls = [0] * self.answers.asked.n_texts
        in_parts = [False] * len(n_calls)  # whether a call is being told
        async for told in self.answers.follow():
            i = told.index
            told_tokens = self._logprobs(told.tokens)
            for delta in told.deltas:
                if delta.part is not None or delta.call is not None:
                    if not (in_parts[i] and delta.call):
                        shown = {"tool_calls": [{"index": n_calls[i], **shown_call(delta)}]}
                        yield chunk(i, dumps(shown)[1:-1], told_tokens)
                        told_tokens = b"null"
                    in_parts[i] = delta.call is None
                    n_calls[i] += delta.call is not None
                    continue
                if delta.reasoning:
                    yield chunk(i, b'"reasoning_content":' + quoted(delta.reasoning), told_tokens)
                else:
                    yield chunk(i, b'"content":' + quoted(delta.content), told_tokens)
                told_tokens = b"null"
            if told_tokens != b"null":
                yield chunk(i, b'"content":""', told_tokens)
            if told.whole is not None:
                ends.append(told.whole)
                yield chunk(i, b"", ends=self.answers.finish(i, told.whole))
        if self.usage:
            found = {"usage": self.answers.usage, "timings": timings(ends)}
            yield b"data: " + head + b',"choices":[],' + dumps(found)[1:] + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _logprobs(self, tokens: Sequence[Token]) -> bytes:
        if not self.logprobs or not tokens:
            return b"null"
        return dumps({"content": entries(self.tokenizer, tokens), "refusal": None})

    async def whole(self) -> dict[str, Any]:
        ends = await self.answers.whole()
        choices = [self._choice(i, end) for i, end in enumerate(ends)]
        usage = self.answers.usage
        return {**self.head, "choices": choices, "usage": usage, "timings": timings(ends)}

    def _choice(self, i: int, end: Completion) -> dict[str, Any]:
        said = dict(end.message or {})
        message = {"role": "assistant", "content": said["content"], "refusal": None}
        calls = said.get("tool_calls")
        if calls:
            message |= {"content": said["content"] or None, "tool_calls": calls}
        if said.get("reasoning"):
            message["reasoning_content"] = said["reasoning"]
        logprobs = None
        if self.logprobs:
            logprobs = {"content": entries(self.tokenizer, end.logprobs or ()), "refusal": None}
        reason = self.answers.finish(i, end)
        choice = {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {**choice, **self.references}

    @property
    def references(self) -> dict[str, Any]:
        """What a choice has besides, where documents may be quoted."""
        found = self.answers.conversation.references
        return {} if found is None else {"references": found}

    def failed(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body("") + b"\n\n"


def shown_call(delta: Delta) -> dict[str, Any]:
    """A call, or a part of one, as streams tell it."""
    part = delta.part
    if part is None:
        return {**(delta.call or {})}
    if not part.name:
        return {"function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"id": part.id, "type": "function", "function": function}


def entries(tokenizer: Tokenizer, tokens: Sequence[Any]) -> list[dict[str, Any]]:
    """Tokens with their probabilities, as OpenAI tells them; ``id`` is ours."""
    return [
        {
            **entry(tokenizer, t.id, t.logprob),
            "top_logprobs": [entry(tokenizer, i, p) for i, p in (t.top or {}).items()],
        }
        for t in tokens
    ]


def entry(tokenizer: Tokenizer, i: int, logprob: float | None) -> dict[str, Any]:
    """One token: its text, or a control token's spelling, which has no bytes."""
    raw = tokenizer.token_bytes(i)
    text = tokenizer.token_text(i) if tokenizer.is_control(i) else raw.decode("utf-8", "replace")
    shown = None if logprob is None else max(logprob, -9999.0)
    return {"token": text, "logprob": shown, "bytes": list(raw), "id": i}


def timings(ends: Sequence[Completion]) -> dict[str, Any]:
    """How long reading and writing took, by llama-server's names."""
    if not ends:
        return {}
    t = ends[0].timings
    written, seconds = (
        sum(e.timings.n_generated for e in ends),
        max(e.timings.generated_s for e in ends),
    )
    return {
        "cache_n": t.n_reused,
        "prompt_n": t.n_prompt,
        "prompt_ms": 1e3 * t.prompt_s,
        "prompt_per_second": t.prompt_per_s,
        "predicted_n": written,
        "predicted_ms": 1e3 * seconds,
        "predicted_per_second": written / seconds if seconds else 0.0,
    }
