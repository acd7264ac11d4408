"""Serving the application on a port until a signal comes: the first lets running requests finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import system
from ..errors import TinyLLMError
from .app import Server

log = logging.getLogger("tinyllm.server")


class Process(uvicorn.Server):
    """Stops gracefully at the first signal, and at once at the second, whichever they are.

    uvicorn raises signals anew once all is closed; here that is the end of it, and the exit status is 0.
    uvicorn wakes ten times a second to see whether a signal has come; here an idle server sleeps until then.
    """

    _wake: Callable[[], object] | None = None

    async def main_loop(self) -> None:
        told = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, told.set)
        await self.on_tick(0)
        if not self.should_exit:
            await told.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self._wake is not None:
            with suppress(RuntimeError):  # the event loop was closed
                self._wake()


def dated(app: ASGIApp) -> ASGIApp:
    """An application whose answers have their date, which uvicorn renews only while it wakes."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = (b"date", formatdate(usegmt=True).encode())
                message = {**message, "headers": [date, *message.get("headers", ())]}
            await send(message)

        await app(scope, receive, tell if scope["type"] == "http" else send)

    return call


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises
    ------
    TinyLLMError
        The address is taken, or not of this machine.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], info[1])
        system.reuse_address(sock)
        sock.bind(info[4])
        sock.listen(512)
    except OSError as error:
        raise TinyLLMError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port"
        ) from error
    sock.setblocking(False)
    return sock


def serve(app: Server, sock: socket.socket, stop_s: float = 30.0) -> None:
    """Answer requests until a signal comes; then finish those that run, within ``stop_s`` seconds."""
    config = uvicorn.Config(
        dated(app),
        date_header=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(stop_s)),
        lifespan="on",
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    process = Process(config)
    try:
        process.run(sockets=[sock])
    finally:
        sock.close()


def address_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
