"""OpenAI's chat completions, with llama-server's and vLLM's further fields and a few of our own."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from ..engine.completion import Completion
from ..engine.request import Request as EngineRequest
from ..tokenizers import Tokenizer
from .errors import Refusal
from .fields import (
    Constrained,
    Count,
    Format,
    Id,
    Loose,
    Strict,
    check_size,
    constraint,
    schema_of,
)
from .pool import Served
from .reply import Reply, dumps, quoted
from .settings import Settings
from .texts import Asked, News, ask

router = APIRouter()


class TextPart(Loose):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: str


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
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

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


class FunctionTool(Loose):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


class NamedFunction(Strict):
    """A function's name."""

    name: str


class NamedChoice(Strict):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Ignored(Strict):
    """Fields that change nothing here: who asks, where it is kept, what it costs."""

    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    cache_prompt: bool | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None


class ChatBody(Constrained, Ignored):
    """A request of ``/v1/chat/completions``."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Count, Field(le=100)] | None = None
    response_format: Format | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    continue_final_message: bool | None = None
    prefix_ids: list[Id] | None = None

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


def check(body: ChatBody, settings: Settings) -> None:
    """Refuse what goes together badly, or is too much."""
    if len(body.messages) > settings.max_messages:
        raise Refusal(400, f"{len(body.messages)} messages; at most {settings.max_messages}")
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs is given without logprobs: true", param="top_logprobs")
    if body.prefix_ids and (body.continue_final_message or body.tools):
        raise Refusal(400, "prefix_ids goes with neither continue_final_message nor tools")
    check_size([t.model_dump() for t in body.tools or ()], settings)


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request) -> Reply:
    """Answer a conversation."""
    pool = request.app.state.pool
    check(body, pool.settings)
    held = constraint(body, {"response_format": schema_of(body.response_format)}, pool.settings)
    if "response_format" in held:
        held["json_schema"] = held.pop("response_format")
    n = body.n or 1

    def submit(served: Served) -> Iterator[EngineRequest]:
        model = served.model
        messages = [m.plain() for m in body.messages]
        options = {**body.sampling(model.tokenizer.eog), **held}
        if body.logprobs:
            options["logprobs"] = body.top_logprobs or 0
        turn = model.turn(
            messages,
            template_vars=body.variables(),
            continue_final_message=bool(body.continue_final_message),
        )
        ids = turn.ids + (body.prefix_ids or [])
        for i in range(n):
            yield served.engine.submit(ids, body.limit(), **seeded(options, i))

    asked = await ask(pool, body.model, submit, n)
    return Reply(asked, ChatWriter(asked, body), bool(body.stream))


def seeded(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options of choice i: it draws from a seed of its own."""
    seed = options["seed"]
    return options if seed is None else {**options, "seed": (seed + i) % (1 << 64)}


FINISH = {"context": "length", "deadline": "length", "cancelled": "stop"}


def finish_of(end: Completion) -> str:
    """Why a text ended, in OpenAI's words."""
    return FINISH.get(end.finish_reason, end.finish_reason)


class ChatWriter:
    """Tells the texts of a chat."""

    def __init__(self, asked: Asked, body: ChatBody) -> None:
        self.body = body
        self.tokenizer = asked.served.model.tokenizer
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.served.name,
            "system_fingerprint": "tinyllm",
        }
        self.usage = bool(body.stream_options and body.stream_options.include_usage)

    async def events(self, asked: Asked) -> AsyncIterator[bytes]:
        head = dumps({**self.head, "object": "chat.completion.chunk"})[:-1]
        before = b"data: " + head + b',"choices":[{"index":'
        after = b',"usage":null}\n\n' if self.usage else b"}\n\n"
        for i in range(asked.n_texts):
            first = b'%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            yield before + first % i + after
        ends: dict[int, Completion] = {}
        async for news in asked.follow():
            yield self._chunk(before, after, news)
            if news.whole is not None:
                ends[news.index] = news.whole
                last = b'%d,"delta":{},"logprobs":null,"finish_reason":"%s"}]'
                yield before + last % (news.index, finish_of(news.whole).encode()) + after
        if self.usage:
            told = {"usage": asked.usage, "timings": timings(list(ends.values()))}
            yield b"data: " + head + b',"choices":[],' + dumps(told)[1:] + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _chunk(self, before: bytes, after: bytes, news: News) -> bytes:
        tokens = b"null"
        if self.body.logprobs:
            tokens = dumps({"content": entries(self.tokenizer, news.tokens), "refusal": None})
        elif not news.piece:
            return b""
        body = b'%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":null}]'
        return before + body % (news.index, quoted(news.piece), tokens) + after

    async def whole(self, asked: Asked) -> dict[str, Any]:
        ends = await asked.whole()
        choices = []
        for i, end in enumerate(ends):
            logprobs = None
            if self.body.logprobs:
                logprobs = {"content": entries(self.tokenizer, end.logprobs or ()), "refusal": None}
            message = {"role": "assistant", "content": end.text, "refusal": None}
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": finish_of(end),
                }
            )
        return {**self.head, "choices": choices, "usage": asked.usage, "timings": timings(ends)}

    def failed(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body("") + b"\n\n"


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
