"""Serving the application on a port until a signal comes: the first lets running requests finish."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import uvicorn

from .. import system
from ..errors import TinyLLMError
from .app import Server

log = logging.getLogger("tinyllm.server")


class Process(uvicorn.Server):
    """Stops gracefully at the first signal, and at once at the second, whichever they are.

    uvicorn raises signals anew once all is closed; here that is the end of it, and the exit status is 0.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


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
        app,
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
