"""Answers of the server: whole or as a stream of events, ended when the client goes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import Refusal, refusal_of
from .texts import Asked

log = logging.getLogger("tinyllm.server")
PING = b": ping\n\n"


class Writer(Protocol):
    """How a protocol tells texts."""

    def events(self) -> AsyncIterator[bytes]:
        """The stream's events, as bytes ready to send."""
        ...

    async def whole(self) -> Any:
        """The answer in one piece, ready for JSON."""
        ...

    def failed(self, refusal: Refusal) -> bytes:
        """The event of an error after the stream began."""
        ...


class Reply(Response):
    """An answer that is written while it is sent; when the client goes, the texts are ended."""

    def __init__(self, asked: Asked, writer: Writer, stream: bool) -> None:
        super().__init__()
        self.asked, self.writer, self.stream = asked, writer, stream
        self.sent_at = time.monotonic()
        self.sending = True  # until the answer has begun
        self._task: asyncio.Task[Any] | None = None
        self._gave_up = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            if self.stream:
                await self._stream(send)
            else:
                await self._whole(scope, send)
        finally:
            watch.cancel()
            self.asked.free()
            scope.setdefault("state", {})["tinyllm_asked"] = self.asked

    async def _watch(self, receive: Receive) -> None:
        """End the texts when the client goes."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.asked.left = True
        self.asked.cancel()

    async def _whole(self, scope: Scope, send: Send) -> None:
        try:
            status, body, more = 200, dumps(await self.writer.whole()), {}
        except Exception as error:
            refusal = told(error)
            status, body, more = refusal.status, refusal.body(scope["path"]), refusal.headers
        await send_whole(send, status, body, more)

    async def _stream(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        pulse, self._task = None, asyncio.current_task()
        try:
            pulse = asyncio.ensure_future(self._pulse(send))
            await self._send(
                send, {"type": "http.response.start", "status": 200, "headers": headers}
            )
            async with aclosing(self.writer.events()) as events:  # type: ignore[type-var]
                try:
                    async for event in events:
                        await self._send(send, part(event))
                except OSError:
                    raise
                except Exception as error:
                    await self._send(send, part(self.writer.failed(told(error))))
            await self._send(send, part(b"", more=False))
        except OSError:  # the client has gone
            pass
        except asyncio.CancelledError:
            if not self._gave_up:
                raise
        finally:
            if pulse is not None:
                pulse.cancel()

    async def _send(self, send: Send, message: Message) -> None:
        self.sent_at, self.sending = time.monotonic(), True
        await send(message)
        self.sending = False

    async def _pulse(self, send: Send) -> None:
        """Say from time to time that the stream is alive; give a client up that does not read."""
        settings = self.asked.pool.settings
        with suppress(OSError):
            while True:
                await asyncio.sleep(settings.ping_s)
                silent = time.monotonic() - self.sent_at
                if self.sending and silent > settings.send_s:
                    self._gave_up = True
                    assert self._task is not None
                    self._task.cancel()
                    return
                if not self.sending and silent >= settings.ping_s:
                    await self._send(send, part(PING))


def part(data: bytes, more: bool = True) -> Message:
    """A part of an answer's body."""
    return {"type": "http.response.body", "body": data, "more_body": more}


def told(error: BaseException) -> Refusal:
    """What a client is told of an error; one that is the server's own is logged."""
    refusal = refusal_of(error)
    if refusal.status >= 500 and not isinstance(error, Refusal):
        log.error("%s", refusal.message, exc_info=error)
    return refusal


async def send_whole(
    send: Send, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """Send an answer of JSON."""
    found = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((k.lower().encode(), v.encode()) for k, v in (headers or {}).items()),
    ]
    with suppress(OSError):
        await send({"type": "http.response.start", "status": status, "headers": found})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def quoted(text: str) -> bytes:
    """A text as JSON."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")


def event(value: Any, name: str | None = None) -> bytes:
    """One event of a stream."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(value) + b"\n\n"
