"""OpenAI's completions: texts to go on with, without a chat template."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError, WrapValidator

from ..engine.completion import Completion
from ..engine.generate import Token
from ..engine.request import Request as EngineRequest
from ..model import Model
from .conversation import finish_of, seeded
from .errors import Refusal
from .fields import (
    Constrained,
    Count,
    Flag,
    Id,
    Likeliest,
    Many,
    NoLimit,
    Positive,
    Wrong,
    check_ids,
)
from .openai_chat import Ignored, Streamed, check_stream_options, timings
from .pool import Served
from .reply import Reply, dumps
from .shapes import CompletionShape, shaped
from .texts import Asked, ask
from .wording import fields_of, shown

router = APIRouter()
Ids = Annotated[Many[Id], Field(min_length=1)]


def _prompt(value: Any, read: Any) -> Any:
    """One complaint for all forms that it may have."""
    try:
        return read(value)
    except ValidationError:
        inner = [v for v in value if isinstance(v, list)] if isinstance(value, list) else []
        found = shown(value) if not inner else f"{shown(value)}, with {shown(inner[0])}"
        raise Wrong(
            f"expected a text, ids of tokens (whole numbers), or a list of either; found {found}"
        ) from None


Prompt = Annotated[
    str
    | Ids
    | Annotated[Many[str], Field(min_length=1)]
    | Annotated[Many[Ids], Field(min_length=1)],
    WrapValidator(_prompt),
]


class CompletionBody(Constrained, Streamed, Ignored):
    """A request of ``/v1/completions``."""

    model: str | None = None
    prompt: Prompt = ""
    max_tokens: Count | NoLimit | None = None
    n: Positive | None = None
    best_of: Positive | None = None
    echo: Flag | None = None
    logprobs: Likeliest | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        p: Any = self.prompt
        return [p] if isinstance(p, str) or isinstance(p[0], int) else p


@router.post(
    "/v1/completions",
    **shaped(
        CompletionShape, stream=True, example={"prompt": "Once upon a time", "max_tokens": 60}
    ),
)
async def complete(body: CompletionBody, request: Request) -> Reply:
    """Continue one text or several."""
    pool = request.app.state.pool
    prompts, n = body.prompts(), body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise Refusal(400, "best_of is taken only where it equals n", param="best_of")
    if body.suffix and body.echo:
        raise Refusal(400, "suffix and echo do not go together", param="suffix")
    check_stream_options(body)
    held = body.held(pool.settings)
    limit = 16 if body.max_tokens is None else body.max_tokens
    scores = bool(body.echo) and body.logprobs is not None  # the prompt's tokens too
    writer = CompletionWriter(body, n, scores and limit == 0)

    def submit(served: Served) -> Iterator[EngineRequest]:
        model = served.model
        options = {**body.sampling(model.tokenizer.eog), **held}
        check_ids(list(options["logit_bias"] or ()), model, "logit_bias")
        if body.logprobs is not None:
            options |= {"logprobs": body.logprobs, "echo": bool(body.echo)}
        for prompt in prompts:
            ids = prompt_ids(model, prompt, body.suffix)
            check_ids(ids, model, "prompt")
            writer.echoed.append(echo_of(model, prompt, ids) if body.echo else "")
            for i in range(n):  # nothing is read for no token at all, so one is written for scores
                tokens = 1 if writer.drops else limit
                yield served.engine.submit(ids, tokens, **seeded(options, i))

    fields = fields_of(body, json_schema=body.schema_field)
    asked = await ask(pool, body.model, submit, n * len(prompts), len(prompts), fields)
    asked.counts_written = not writer.drops
    writer.asked = asked
    return Reply(asked, writer, bool(body.stream))


def prompt_ids(model: Model, prompt: str | list[int], suffix: str | None) -> list[int]:
    """The tokens to go on with; with a suffix, those that ask for what stands before it.

    Raises
    ------
    Refusal
        The vocabulary has no tokens for that.
    """
    if not suffix:
        return model.prompt_ids(prompt)
    t = model.tokenizer
    marks = [t.vocab.special.get(role) for role in ("fim_pre", "fim_suf", "fim_mid")]
    if None in marks:
        raise Refusal(
            400, "the model knows no suffix: its vocabulary has no FIM tokens", param="suffix"
        )
    if not isinstance(prompt, str):
        raise Refusal(400, "with a suffix the prompt is a text", param="suffix")
    before, after, middle = (i for i in marks if i is not None)
    first = [t.bos] if t.add_bos and t.bos is not None else []
    return [
        *first, before, *t.encode_inside(prompt), after, *t.encode_inside(suffix), middle,
    ]  # fmt: skip


def echo_of(model: Model, prompt: str | list[int], ids: list[int]) -> str:
    """A prompt's text."""
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(ids, skip_special=True)


class CompletionWriter:
    """Tells completions."""

    def __init__(self, body: CompletionBody, n: int, drops: bool) -> None:
        self.body, self.n, self.drops = body, n, drops
        self.echoed: list[str] = []
        self.asked: Asked
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.usage = bool(body.stream_options and body.stream_options.include_usage)

    @property
    def head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.asked.served.name,
        }  # fmt: skip

    async def events(self) -> AsyncIterator[bytes]:
        asked, head = self.asked, self.head
        more = {"usage": None} if self.usage else {}
        spellings = [self._spelling() for _ in asked.requests]
        begun: set[int] = set()
        ends: list[Completion] = []
        async for news in asked.follow():
            i, text, tokens = news.index, news.piece, list(news.tokens)
            if self.drops:
                text, tokens = "", []
            scored = None
            if self.body.logprobs is not None:
                prompt = self._prompt_tokens(asked.requests[i]) if i not in begun else []
                scored = spellings[i].tell([*prompt, *tokens])
            if i not in begun:
                begun.add(i)
                text = self.echoed[i // self.n] + text
            reason = None
            if news.whole is not None:
                ends.append(news.whole)
                reason = finish_of(news.whole)
            elif not text and not (scored and scored["tokens"]):
                continue
            choice = {"index": i, "text": text, "logprobs": scored, "finish_reason": reason}
            yield b"data: " + dumps({**head, "choices": [choice], **more}) + b"\n\n"
        if self.usage:
            told = {"choices": [], "usage": asked.usage, "timings": timings(ends)}
            yield b"data: " + dumps({**head, **told}) + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def whole(self) -> dict[str, Any]:
        asked = self.asked
        ends = await asked.whole()
        choices = []
        for i, end in enumerate(ends):
            scored = None
            if self.body.logprobs is not None:
                written = [] if self.drops else end.logprobs or []
                scored = self._spelling().tell([*self._prompt_tokens(asked.requests[i]), *written])
            text = self.echoed[i // self.n] + ("" if self.drops else end.text)
            choices.append(
                {"index": i, "text": text, "logprobs": scored, "finish_reason": finish_of(end)}
            )
        return {**self.head, "choices": choices, "usage": asked.usage, "timings": timings(ends)}

    def _prompt_tokens(self, request: EngineRequest) -> list[Token]:
        """The prompt's tokens with their probabilities, where they are wanted."""
        if not self.body.echo or request.job is None:
            return []
        return [Token(request.prompt_ids[0]), *request.job.run.prompt]

    def _spelling(self) -> Spelling:
        return Spelling(self.asked.served.model)

    def failed(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body("") + b"\n\n"


class Spelling:
    """Tells tokens as completions do: texts, log-probabilities, and where each text begins."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = model.tokenizer
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def tell(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The next tokens."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self.tokenizer.token_bytes(token.id)))
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens],
            "text_offset": offsets,
            "token_ids": [t.id for t in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one that stands there; of several with one text the likeliest."""
        if token.logprob is None or token.top is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in [*token.top.items(), (token.id, token.logprob)]:
            text = self._text(i)
            found[text] = max(logprob, found.get(text, logprob))
        return found

    def _text(self, i: int) -> str:
        t = self.tokenizer
        if t.is_control(i):
            return t.token_text(i)
        raw = t.token_bytes(i)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
