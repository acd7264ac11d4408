"""Routes beside the protocols: models, health, tokens, templates, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from ..errors import TinyLLMError
from .errors import Refusal
from .fields import Flag, Id, Many, Strict, check_ids
from .openai_chat import FunctionTool, Message
from .pool import Pool, Served
from .reply import dumps
from .shapes import (
    HealthShape,
    ModelShape,
    ModelsShape,
    PromptShape,
    TextShape,
    TokenizerShape,
    TokensShape,
    shaped,
)
from .wording import fields_of, in_words

router = APIRouter()


def pool_of(request: Request) -> Pool:
    """The models of a request's server."""
    pool: Pool = request.app.state.pool
    return pool


@router.get("/v1/models", **shaped(ModelsShape))
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [served.about() for served in pool_of(request)]}


@router.get("/v1/models/{name:path}", **shaped(ModelShape))
async def model(name: str, request: Request) -> dict[str, Any]:
    """Tell of one model."""
    return pool_of(request).find(name).about()


@router.get(
    "/health", response_model=None, responses={c: {"model": HealthShape} for c in (200, 503)}
)
@router.get("/v1/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Say whether the default model is loaded: 200, or 503 while it is being loaded."""
    pool = pool_of(request)
    if pool.ready:
        return Response(b'{"status":"ok"}', 200, None, "application/json")
    pool.begin()
    failed = any(served.state == "failed" for served in pool)  # why is told to who has a key
    body = {"status": "failed" if failed else "loading"}
    return Response(dumps(body), 503, {"Retry-After": "1"}, "application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Tell Prometheus."""
    text = request.app.state.metrics.text(pool_of(request))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


class TokenizeBody(Strict):
    """A text to be made tokens: llama-server's ``content``, or vLLM's ``prompt`` or ``messages``."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = Field(None, min_length=1)
    tools: Many[FunctionTool] | None = None
    add_special: Flag | None = None
    add_special_tokens: Flag | None = None
    parse_special: Flag = True
    with_pieces: Flag = False
    add_generation_prompt: Flag = True


class DetokenizeBody(Strict):
    """Tokens to be made text."""

    model: str | None = None
    tokens: Many[Id]


class TemplateBody(Strict):
    """A conversation to be put into the model's template."""

    model: str | None = None
    messages: Many[Message] = Field(min_length=1)
    tools: Many[FunctionTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag = True
    continue_final_message: Flag = False


async def with_model(
    request: Request, name: str | None, work: Any, fields: Mapping[str, str] | None = None
) -> Any:
    """What ``work`` makes of a loaded model, in a thread; ``fields`` as `in_words` has them."""
    pool = pool_of(request)
    served = await pool.hold(name)
    try:
        return await asyncio.get_running_loop().run_in_executor(pool.workers, work, served)
    except TinyLLMError as error:
        raise in_words(error, fields or {}) from error
    finally:
        pool.release(served)


async def with_texts(
    request: Request, name: str | None, work: Any, fields: Mapping[str, str] | None = None
) -> Any:
    """What ``work(served, before_step)`` makes of texts, as one text that is written.

    ``before_step`` raises once the client has gone, and work that has not begun then never begins.
    ``fields`` are as `in_words` has them.

    Raises
    ------
    Refusal
        429: as many texts as may are written and wait. 499: the client has gone.
    """
    gone = threading.Event()

    pool = pool_of(request)

    def before_step() -> None:
        if gone.is_set():
            pool.refuse_if_it_stops()
            raise Refusal(499, "the client has gone")

    def cancel() -> None:
        gone.set()
        job.cancel()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        cancel()

    served = await pool.hold(name)
    try:
        pool.refuse_if_it_stops()
        served.admit(1)
        job = pool.workers.submit(work, served, before_step)
        watching = asyncio.ensure_future(watch())
        pool.running.add(cancel)
        try:
            return await asyncio.shield(asyncio.wrap_future(job))
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            before_step()
        except TinyLLMError as error:
            raise in_words(error, fields or {}) from error
        finally:
            gone.set()  # work whose request was given up ends too
            pool.running.discard(cancel)
            watching.cancel()
            served.n_texts -= 1
    finally:
        pool.release(served)


@router.post("/tokenize", **shaped(TokensShape, example={"content": "Once upon a time"}))
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Make tokens of a text or a conversation."""
    given = [v for v in (body.content, body.prompt, body.messages) if v is not None]
    if len(given) != 1:
        raise Refusal(400, "one of content, prompt and messages is expected")

    def work(served: Served) -> dict[str, Any]:
        t = served.model.tokenizer
        if body.messages is not None:
            ids = conversation_ids(served, body)
        else:
            special = body.add_special if body.content is not None else body.add_special_tokens
            default = body.content is None  # vLLM adds them, llama-server does not
            text = body.content if body.content is not None else body.prompt
            assert text is not None
            ids = t.encode(text, default if special is None else special, body.parse_special)
        if body.content is None:
            return {"count": len(ids), "max_model_len": served.model.n_ctx, "tokens": ids}
        if not body.with_pieces:
            return {"tokens": ids}
        return {
            "tokens": [
                {"id": i, "piece": piece(t.token_bytes(i) or t.token_text(i).encode())} for i in ids
            ]
        }

    return await with_model(request, body.model, work, fields_of(body))  # type: ignore[no-any-return]


def piece(raw: bytes) -> str | list[int]:
    """A token's text; its bytes where they are no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def conversation_ids(served: Served, body: TokenizeBody | TemplateBody) -> list[int]:
    """The tokens of a conversation in the model's template."""
    from ..chat.render import chat_ids, given_template, pick_template
    from ..errors import TemplateError

    model, t, given = served.model, served.model.tokenizer, served.settings.template
    messages = [m.plain() for m in body.messages or ()]
    tools = [tool.plain() for tool in body.tools or ()]
    variables = getattr(body, "chat_template_kwargs", None)
    go_on = getattr(body, "continue_final_message", False)
    if body.add_generation_prompt or go_on:
        turn = model.turn(
            messages, given, tools, template_vars=variables, continue_final_message=go_on
        )
        return turn.ids
    template = pick_template(model.metadata) if given is None else given_template(given)
    if template is None:
        raise TemplateError("the file has no chat template")
    return chat_ids(
        t, template, messages, bos_id=t.bos, eos_id=t.eos, tools=tools or None,
        **{**(variables or {}), "add_generation_prompt": False},
    )  # fmt: skip


@router.get("/tokenizer_info", **shaped(TokenizerShape))
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Tell of the default model's vocabulary, as vLLM does; evaluations ask for it."""

    def work(served: Served) -> dict[str, Any]:
        from ..chat.render import given_template, pick_template

        t, model, given = served.model.tokenizer, served.model, served.settings.template
        spelled = {
            f"{name}_token": None if i is None else t.token_text(i)
            for name, i in (("bos", t.bos), ("eos", t.eos), ("unk", t.unk), ("pad", t.pad))
        }
        template = pick_template(model.metadata) if given is None else given_template(given)
        if template is not None:  # lm-eval renders it without them
            names = [name for name, text in spelled.items() if text is not None]
            quoted = {n: json.dumps(spelled[n], ensure_ascii=False) for n in names}
            set_all = "".join(f"{{%- set {n} = {text} +%}}" for n, text in quoted.items())
            template = set_all + template
        return {
            "tokenizer_class": type(t).__name__, **spelled, "add_bos_token": t.add_bos,
            "model_max_length": model.n_ctx, "chat_template": template,
        }  # fmt: skip

    return await with_model(request, None, work)  # type: ignore[no-any-return]


@router.post("/detokenize", **shaped(TextShape, example={"tokens": [5, 6, 7]}))
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    """Make text of tokens."""

    def work(served: Served) -> dict[str, Any]:
        check_ids(body.tokens, served.model, "tokens")
        text = served.model.tokenizer.decode(body.tokens)
        return {"content": text, "prompt": text}

    return await with_model(request, body.model, work)  # type: ignore[no-any-return]


@router.post(
    "/apply-template",
    **shaped(PromptShape, example={"messages": [{"role": "user", "content": "Tell me a story."}]}),
)
async def apply_template(body: TemplateBody, request: Request) -> dict[str, Any]:
    """Put a conversation into the model's chat template."""

    def work(served: Served) -> dict[str, Any]:
        ids = conversation_ids(served, body)
        return {"prompt": served.model.tokenizer.decode(ids), "tokens": ids}

    fields = fields_of(body, prompt="messages", template_vars="chat_template_kwargs")
    return await with_model(request, body.model, work, fields)  # type: ignore[no-any-return]
