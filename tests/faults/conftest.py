"""A server that sends a file slowly enough to be interrupted."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; ``starts`` are the first bytes that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = bytes(range(256)) * 40_000
        self.starts: list[int] = []
        self.pause = threading.Event()  # set it to stop sending half-way, until cleared
        self.half_way = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/model.gguf"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, n = int(asked[1]) if asked else 0, len(server.content)
        server.starts.append(start)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(n - start))
        self.send_header("ETag", '"v1"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{n - 1}/{n}")
        self.end_headers()
        try:
            self.wfile.write(server.content[start : max(start, n // 2)])
            server.half_way.set()
            while server.pause.is_set():
                time.sleep(0.01)
            self.wfile.write(server.content[max(start, n // 2) :])
        except OSError:  # nobody reads any more
            pass

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(serving: Callable[[Server], None]) -> Iterator[Server]:
    server = Server()
    serving(server)
    yield server
    server.pause.clear()
