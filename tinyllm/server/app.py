"""The application: routes behind a guard. Any ASGI server runs it; it opens no port by itself."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__
from ..errors import TinyLLMError
from ..model import Model
from . import (
    anthropic_messages,
    decisions,
    extras,
    openai_chat,
    openai_completions,
    openai_embeddings,
    openai_responses,
    page,
)
from .errors import Refusal
from .guard import Guard
from .metrics import Metrics
from .pool import Pool, Source
from .reply import dumps, told
from .settings import Settings
from .shapes import ErrorShape, errors
from .wording import unreadable, wrong_field

log = logging.getLogger("tinyllm.server")
ROUTES = (
    openai_chat, openai_completions, openai_embeddings, openai_responses, decisions,
    anthropic_messages, extras, page,
)  # fmt: skip


JSON = re.compile(r"application/(.+\+)?json")


class Server(FastAPI):
    """The application of ``create_app``; ``close`` frees its models."""

    pool: Pool

    def build_middleware_stack(self) -> ASGIApp:
        """Put the guard outside of everything, so that it sees every answer."""
        return Guard(super().build_middleware_stack(), self.pool.settings, self.state.metrics)

    def close(self) -> None:
        """End all texts, and free what was loaded."""
        self.pool.close()


def create_app(
    models: Mapping[str, Source] | Sequence[Source] | Source = None,
    settings: Settings | None = None,
) -> Server:
    """Make the server's ASGI application.

    Parameters
    ----------
    models : mapping, sequence, or one of them, optional
        What ``tinyllm.load`` takes, or models that are loaded already, by name or in a list; the first is the
        default. Default: the model that comes with the package.
    settings : Settings, optional
        Keys, origins, limits.

    Returns
    -------
    Server
        A model is loaded when it is first asked for; where the server of the application has a lifespan, the
        default one at its start.

    Examples
    --------
    >>> from tinyllm.server import create_app
    >>> app = create_app({"tales": None})
    >>> "/v1/chat/completions" in app.openapi()["paths"]
    True
    >>> app.close()
    """
    app = Server(
        title="tinyllm",
        version=__version__,
        description="Language models from GGUF files, by the protocols of OpenAI, Anthropic and others.",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses=errors(ErrorShape),
    )
    app.openapi_version = "3.2.0"  # the first that describes a stream's events
    app.pool = app.state.pool = Pool(named(models), settings or Settings())
    app.state.metrics = Metrics()
    for routes in ROUTES:
        app.include_router(routes.router)
    app.add_api_route("/openapi.json", description, include_in_schema=False)
    app.add_exception_handler(RequestValidationError, on_wrong_field)
    app.add_exception_handler(HTTPException, on_http_error)
    for kind in (Refusal, TinyLLMError, OSError, MemoryError, Exception):
        app.add_exception_handler(kind, on_error)
    return app


def named(models: Mapping[str, Source] | Sequence[Source] | Source) -> dict[str, Source]:
    """Models by name; one without is named like its file."""
    if isinstance(models, Mapping):
        return dict(models)
    if models is None or isinstance(models, (str, Path, Model)):
        models = [models]
    found: dict[str, Source] = {}
    for source in models:
        path = source.path if isinstance(source, Model) else source or "bundled"
        found[Path(path).stem] = source
    return found


@asynccontextmanager
async def lifespan(app: Server) -> AsyncIterator[None]:
    """Load the default model beside the first requests; free all at the end."""
    app.pool.begin()
    try:
        yield
    finally:
        await asyncio.to_thread(app.close)


async def description(request: Request) -> Response:
    """What the server answers, as OpenAPI; written by a thread, as it takes half a second the first time."""
    written = await asyncio.to_thread(request.app.openapi)
    return Response(dumps(written), media_type="application/json")


def answer(refusal: Refusal, request: Request) -> Response:
    """A refusal in the form of the protocol that was spoken."""
    body = refusal.body(request.url.path)
    return Response(body, refusal.status, refusal.headers, "application/json")


async def on_error(request: Request, error: Exception) -> Response:
    """Any error of a route."""
    return answer(told(error), request)


async def on_http_error(request: Request, error: Exception) -> Response:
    """No such route, or another method."""
    assert isinstance(error, HTTPException)
    message, path = str(error.detail), request.url.path
    if error.status_code == 404:
        message = f"there is no {path:.200}"
    if error.status_code == 400:  # FastAPI's word for whatever its reader of JSON raises
        message = unreadable(error.__cause__)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow", "")
        message = f"{path} takes {allowed} requests, not {request.method}"
        return answer(
            Refusal(405, message, code="method_not_supported", headers=error.headers), request
        )
    return answer(Refusal(error.status_code, message, headers=error.headers), request)


async def on_wrong_field(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or has a field that is unknown or wrong."""
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type")
    media = (kind or "").partition(";")[0].strip().lower()
    read = error.body is not None and not JSON.fullmatch(media)
    if read:
        refusal = Refusal(400, f"Content-Type is {kind!r:.60}; expected 'application/json'")
    else:
        refusal = wrong_field(error.errors(), error.body)
    return answer(refusal, request)
