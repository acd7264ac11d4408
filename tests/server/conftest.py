"""The server's application with the bundled model, called without a port."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra [server]")
httpx = pytest.importorskip("httpx")

import tinyllm  # noqa: E402
from tinyllm.server import Settings, create_app  # noqa: E402

T = TypeVar("T")


class App:
    """An application, and calls of it that wait for the answer."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()

    def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """What ``work(client)`` returns."""

        async def inside() -> T:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await work(client)

        return self.loop.run_until_complete(inside())

    def call(self, method: str, path: str, **how: Any) -> Any:
        return self.run(lambda client: client.request(method, path, **how))

    def get(self, path: str, **how: Any) -> Any:
        return self.call("GET", path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> Any:
        return self.call("POST", path, json=body, **how)

    def events(self, path: str, body: Any) -> list[Any]:
        """The JSON of a stream's events; a last ``[DONE]`` is a text."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [s for s in answer.text.split("\n") if s.startswith("data: ")]
        return [s[6:] if s == "data: [DONE]" else json.loads(s[6:]) for s in lines]

    def close(self) -> None:
        self.app.close()
        self.loop.close()


@pytest.fixture(scope="session")
def model() -> Iterator[tinyllm.Model]:
    """The bundled model."""
    with tinyllm.load() as m:
        yield m


@pytest.fixture(scope="session")
def app(model: tinyllm.Model) -> Iterator[App]:
    """An application that serves the bundled model as "tales"."""
    found = App(create_app({"tales": model}))
    yield found
    found.close()


@pytest.fixture
def make_app(model: tinyllm.Model) -> Iterator[Callable[..., App]]:
    """make_app(models=None, **settings): an application of its own, closed at the end."""
    made: list[App] = []

    def make(models: Any = None, **settings: Any) -> App:
        given = {"tales": model} if models is None else models
        made.append(App(create_app(given, Settings(**settings))))
        return made[-1]

    yield make
    for found in made:
        found.close()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Any], str]]:
    """serve(application): the address of a server of it, which ends with the module's tests."""
    uvicorn = pytest.importorskip("uvicorn")
    servers: list[tuple[Any, threading.Thread]] = []

    def begin(app: Any) -> str:
        sock = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    yield begin
    for server, thread in servers:
        server.should_exit = True
        thread.join()
