"""What stands before every route: names and origins that may call, keys, the size of a body, the log."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal
from .metrics import Metrics
from .reply import send_whole
from .settings import Settings

log = logging.getLogger("tinyllm.server")
PUBLIC = ("/", "/docs", "/openapi.json", "/health", "/v1/health", "/favicon.ico")
ALLOWED = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
TOO_LARGE = "the body is larger than {} bytes"
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """Refuses what may not come in, and counts and logs what does; nothing of a body is logged unless asked."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        headers = headers_of(scope)
        more = self.added(headers)
        body = Body(receive, self.settings)

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        self.metrics.began()
        try:
            if (refusal := self.refusal(scope, headers)) is not None:
                path = scope["path"]
                await send_whole(tell, refusal.status, refusal.body(path), refusal.headers)
            elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await tell({"type": "http.response.start", "status": 204, "headers": []})
                await tell({"type": "http.response.body", "body": b""})
            else:
                await self.app(scope, body.receive, tell)
        finally:
            asked = scope.get("state", {}).get("tinyllm_asked")
            seconds = time.perf_counter() - began
            self.metrics.ended(scope, status, seconds, asked)
            self._log(scope, status, seconds, asked, body)

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request may not come in, before its body is read; None where it may."""
        settings = self.settings
        host = host_of(headers.get("host", ""))
        if settings.hosts and host not in settings.hosts:
            return Refusal(
                403, f"this server is not {host!r:.80}; start it with --allow-host to be"
            )
        origin = headers.get("origin")
        if origin is not None and not self._may(origin) and host_of(origin) != host:
            return Refusal(
                403, f"pages of {origin:.80} may not call; start with --cors to let them"
            )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > settings.max_body:
            return Refusal(413, TOO_LARGE.format(settings.max_body))
        if self._keys and scope["method"] != "OPTIONS" and not is_public(scope["path"]):
            return self._unknown(headers)
        return None

    def _unknown(self, headers: Mapping[str, str]) -> Refusal | None:
        """401 unless a request brings a key; all keys are compared, each in constant time."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        found = given.strip().encode("latin-1", "replace")
        found_in = [hmac.compare_digest(found, key) for key in self._keys]  # all of them
        if any(found_in):
            return None
        text = "a key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
        return Refusal(
            401, text if not given else "the key is wrong", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip

    def _may(self, origin: str) -> bool:
        return "*" in self.settings.origins or origin in self.settings.origins

    def added(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """What every answer to a request with such headers has beside its own."""
        return [*SAFE, *self._cors(headers)]

    def _cors(self, headers: Mapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or not self._may(origin):
            return
        shown = "*" if "*" in self.settings.origins else origin
        yield b"access-control-allow-origin", shown.encode("latin-1")
        yield b"vary", b"origin"
        if "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers", ALLOWED)
            yield b"access-control-allow-methods", b"GET, POST, OPTIONS"
            yield b"access-control-allow-headers", asked.encode("latin-1")
            yield b"access-control-max-age", b"600"

    def _log(self, scope: Scope, status: int, seconds: float, asked: Any, body: Body) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        client = (scope.get("client") or ("-",))[0]
        tokens = ""
        if asked is not None:
            usage = asked.usage
            tokens = f", {usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
            tokens += ", its client left" * asked.left
        path = scope["path"].encode("unicode_escape").decode()
        log.info("%s %s %s %d, %.3f s%s", client, scope["method"], path, status, seconds, tokens)
        if self.settings.log_prompts and body.seen:
            log.info("body %s", b"".join(body.seen).decode("utf-8", "replace"))


class Body:
    """Counts what comes in."""

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive, self._settings = receive, settings
        self._n_bytes = 0
        self.seen: list[bytes] = []

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            part = message.get("body", b"")
            self._n_bytes += len(part)
            if self._n_bytes > self._settings.max_body:
                raise HTTPException(413, TOO_LARGE.format(self._settings.max_body))
            if self._settings.log_prompts:
                self.seen.append(part)
        return message


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers as texts."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}


def host_of(address: str) -> str:
    """The name in a Host header or an origin, without scheme and port."""
    name = address.rpartition("://")[2].lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def is_public(path: str) -> bool:
    """Whether a path needs no key: the page itself has no secrets, and asks for the key."""
    return path in PUBLIC or path.startswith("/page/")
