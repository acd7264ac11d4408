"""Serving the application on a port until a signal comes: the first lets running requests finish."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import system
from ..errors import TinyLLMError
from .app import Server

log = logging.getLogger("tinyllm.server")
END_S = 2.0  # that answers which are cut short have to tell their clients so


class Process(uvicorn.Server):
    """Stops gracefully at the first signal; ends all texts at the second, or ``stop_s`` seconds later.

    uvicorn raises signals anew once all is closed; here that is the end of it, and the exit status is 0.
    uvicorn wakes ten times a second to see whether a signal has come; here an idle server sleeps until then.
    """

    def __init__(self, config: uvicorn.Config, app: Server, stop_s: float) -> None:
        super().__init__(config)
        self._app, self._stop_s = app, stop_s
        self._call: Callable[[Callable[[], object]], object] | None = None
        self._told = asyncio.Event()

    async def main_loop(self) -> None:
        loop = asyncio.get_running_loop()
        self._call = loop.call_soon_threadsafe
        await self.on_tick(0)
        if not self.should_exit:
            await self._told.wait()
        loop.call_later(self._stop_s, self.end_texts)

    def end_texts(self) -> None:
        """End what is written, tell the clients, and exit soon even if one does not listen."""
        if n := self._app.pool.end_texts():
            log.warning("%d answers are cut short: the server stops", n)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it shows how it ends tasks
        asyncio.get_running_loop().call_later(END_S, self._leave)

    def _leave(self) -> None:
        """Exit with connections still open: since 3.12 Python waits for them unless they are cut."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        what = self.end_texts if self.should_exit else self._told.set
        self.should_exit = True
        if self._call is not None:
            with suppress(RuntimeError):  # the event loop was closed
                self._call(what)


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
        timeout_graceful_shutdown=math.ceil(min(stop_s, 1e9) + 2 * END_S),  # should a task not end
        lifespan="on",
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    process = Process(config, app, stop_s)
    try:
        process.run(sockets=[sock])
    finally:
        sock.close()


def address_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
