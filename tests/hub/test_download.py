# ruff: noqa: E501
"""Downloads, against a server on this machine that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tinyllm.hub import download
from tinyllm.hub.download import fetch, safe_name
from tinyllm.hub.locks import locked

CONTENT = bytes(range(256)) * 1200  # 307,200 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the server's next scripted answer, and with the whole file when there is none."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(dict(self.headers))
        answer = server.script.pop(0) if server.script else whole
        answer(self)

    def start(self) -> int:
        """First byte asked for."""
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), "ETag": '"v1"', **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.requests: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/m.gguf"


def whole(h: Handler, content: bytes = CONTENT) -> None:
    start = h.start()
    if start >= len(content):
        h.send(416, b"", Content_Range=f"bytes */{len(content)}")
    elif start:
        rest = content[start:]
        h.send(206, rest, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        h.send(200, content)


def cut(n: int) -> Answer:
    """Promise the rest, send n bytes of it, hang up."""

    def answer(h: Handler) -> None:
        start = h.start()
        status, end = (206 if start else 200), len(CONTENT)
        ranged = f"bytes {start}-{end - 1}/{end}" if start else ""
        h.send(
            status,
            CONTENT[start : start + n],
            Content_Length=str(end - start),
            Content_Range=ranged,
        )
        h.connection.shutdown(socket.SHUT_RDWR)

    return answer


def no_ranges(h: Handler) -> None:
    h.send(200, CONTENT)


def status(code: int, **headers: str) -> Answer:
    return lambda h: h.send(code, b"sorry", **headers)


def other(content: bytes, **headers: str) -> Answer:
    return lambda h: h.send(200, content, **headers)


@pytest.fixture
def server(serving: Callable[[Server], None]) -> Server:
    server = Server()
    serving(server)
    return server


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses asked for, none of which is waited."""
    asked: list[float] = []
    monkeypatch.setattr(download, "_sleep", asked.append)
    return asked


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def get(server: Server, tmp_path: Path, **checks: object) -> Path:
    return fetch(server.url, tmp_path / "m.gguf", **checks)  # type: ignore[arg-type]


def test_a_whole_file_arrives_verified_and_alone(server: Server, tmp_path: Path, capsys) -> None:
    path = get(server, tmp_path, size=len(CONTENT), md5=MD5.upper(), sha256=SHA)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["m.gguf"]
    err = capsys.readouterr().err
    assert "Downloading" in err
    assert "Verifying" in err
    assert f"Model downloaded to {str(path)!r}" in err


def test_a_file_that_is_there_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"mine")
    assert get(server, tmp_path, md5=MD5).read_bytes() == b"mine"
    assert not server.requests


RECOVERED: dict[str, list[Answer]] = {
    "cut once": [cut(100_000)],
    "cut often": [cut(1000), cut(1000), cut(50_000), cut(1), cut(1), cut(1), cut(1), cut(1)],
    "cut before the first byte": [cut(0), cut(0)],
    "busy": [status(429, Retry_After="7"), status(503), status(500)],
    "cut, then busy": [cut(5000), status(502)],
    "cut, then ranges ignored": [cut(5000), no_ranges],
    "length too long": [other(CONTENT, Content_Length=str(len(CONTENT) + 99))],
    "no length": [other(CONTENT, Content_Length="")],
}


@pytest.mark.parametrize("case", RECOVERED)
def test_recovers(case: str, server: Server, tmp_path: Path) -> None:
    server.script = list(RECOVERED[case])
    path = get(server, tmp_path, size=len(CONTENT), md5=MD5)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["m.gguf"]
    assert not server.script


def test_it_continues_at_the_first_missing_byte_of_the_same_file(
    server: Server, tmp_path: Path, capsys
) -> None:
    server.script = [cut(5000)]
    get(server, tmp_path)
    assert server.requests[1]["Range"] == "bytes=5000-"
    assert server.requests[1]["If-Range"] == '"v1"'
    assert all(r["Accept-Encoding"] == "identity" for r in server.requests)
    assert "\nDownload interrupted, resuming from byte position 5000" in capsys.readouterr().err


def test_the_pause_grows_and_follows_the_server(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    server.script = [
        status(500),
        status(500),
        status(429, Retry_After="7"),
        status(429, Retry_After="9999"),
    ]
    get(server, tmp_path)
    assert waits == [0.5, 1.0, 7.0, 30.0]


FAILED: dict[str, tuple[list[Answer], type[Exception], str]] = {
    "not found": ([status(404)], ValueError, "Request failed: HTTP 404 Not Found"),
    "always busy": ([status(503)] * 9, ValueError, "Request failed: HTTP 503 Service Unavailable"),
    "wrong content": ([other(CONTENT[::-1])], ValueError, f"Expected MD5 hash of '{MD5}', got '"),
    "too short": ([other(b"x"), status(416, Content_Range="bytes */1")], ValueError, r"Expected file size of 307200 bytes, got 1$"),
    "too long": ([other(CONTENT + b"x", Content_Length="")], ValueError, "Expected file size of 307200 bytes, got"),
    "compressed": ([other(CONTENT, Content_Encoding="gzip")], ValueError, "Expected identity Content-Encoding, got gzip"),
    "no progress": ([cut(99)] + [cut(0)] * 9, RuntimeError, r"^Download not making progress, aborting\.$"),
    "wrong range": ([cut(99), lambda h: h.send(206, b"", Content_Range="bytes 7-8/9")], ValueError, "position 99"),
    "no range": ([cut(99), lambda h: h.send(206, b"")], ValueError, "does not support range requests"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILED)
def test_fails_and_leaves_no_file_of_that_name(case: str, server: Server, tmp_path: Path) -> None:
    server.script, error, message = list(FAILED[case][0]), *FAILED[case][1:]
    with pytest.raises(error, match=message):
        get(server, tmp_path, size=len(CONTENT), md5=MD5)
    assert not (tmp_path / "m.gguf").exists()
    assert not (tmp_path / "m.gguf.lock").exists()


def test_a_wrong_file_is_removed_a_partial_one_is_kept(server: Server, tmp_path: Path) -> None:
    server.script = [other(CONTENT[::-1])]
    with pytest.raises(ValueError, match="MD5"):
        get(server, tmp_path, md5=MD5)
    assert names(tmp_path) == []
    server.script = [cut(5000), status(404)]
    with pytest.raises(ValueError, match="404"):
        get(server, tmp_path, md5=MD5)
    assert (tmp_path / "m.gguf.part").read_bytes() == CONTENT[:5000]


def interrupted(server: Server, tmp_path: Path, n: int = 5000) -> None:
    """A download that another process gave up after n bytes."""
    server.script = [cut(n), status(404)]
    with pytest.raises(ValueError, match="404"):
        get(server, tmp_path)
    server.requests.clear()


def test_a_later_call_continues(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT
    assert [r["Range"] for r in server.requests] == ["bytes=5000-"]


def test_a_later_call_needs_nothing_when_all_had_come(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    (tmp_path / "m.gguf.part").write_bytes(CONTENT)
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [b"x" * 5000, CONTENT + b"x" * 9], ids=["damaged", "too long"])
def test_damaged_bytes_are_fetched_again(kept: bytes, server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    (tmp_path / "m.gguf.part").write_bytes(kept)
    assert get(server, tmp_path, md5=MD5).read_bytes() == CONTENT


def test_bytes_of_another_address_are_not_continued(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    assert fetch(server.url + "?v=2", tmp_path / "m.gguf").read_bytes() == CONTENT
    assert "Range" not in server.requests[0]


def test_a_changed_file_is_fetched_whole(server: Server, tmp_path: Path) -> None:
    interrupted(server, tmp_path)
    changed = CONTENT[::-1]
    server.script = [lambda h: h.send(200, changed, ETag='"v2"')]  # what If-Range makes a server do
    assert get(server, tmp_path).read_bytes() == changed


def test_the_digest_a_hub_states_is_checked(server: Server, tmp_path: Path) -> None:
    server.script = [other(CONTENT[::-1], X_Linked_ETag=f'"{SHA}"')]
    with pytest.raises(ValueError, match=f"Expected SHA256 hash of '{SHA}'"):
        get(server, tmp_path)


def test_too_little_space_is_said_before(server: Server, tmp_path: Path) -> None:
    server.script = [other(CONTENT, Content_Length=str(1 << 60))]
    with pytest.raises(OSError, match="needs 1152921504606846976 more bytes"):
        get(server, tmp_path)


def test_an_unreachable_server_raises_what_requests_raises(
    tmp_path: Path, waits: list[float]
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(
        requests.exceptions.ConnectionError,
        match=r"^m.gguf cannot be downloaded: no connection to 127.0.0.1:\d+ \(ConnectionError\)$",
    ):
        fetch(f"http://127.0.0.1:{port}/m", tmp_path / "m.gguf")
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert names(tmp_path) == []


def test_an_unknown_host_is_told_at_once(
    tmp_path: Path, waits: list[float], capfd, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    with pytest.raises(
        requests.exceptions.ConnectionError, match=r"no connection to nowhere\.invalid"
    ):
        fetch("http://nowhere.invalid/m", tmp_path / "m.gguf")
    assert (waits, names(tmp_path), capfd.readouterr().err) == ([], [], "")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd", ""])
def test_only_http_is_spoken(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a http or https address"):
        fetch(url, tmp_path / "m")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x.gguf", "/etc/passwd", "a/b.gguf", "a\\b.gguf", "C:x.gguf", "a\0.gguf", "a\n.gguf", " x", "x "],
)  # fmt: skip
def test_names_that_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        safe_name(name)


def test_ordinary_names_pass() -> None:
    for name in ("Meta-Llama-3-8B-Instruct.Q4_0.gguf", "a..b.gguf", "ä 1.gguf", ".x"):
        assert safe_name(name) == name


def test_threads_download_once(server: Server, tmp_path: Path) -> None:
    server.script = [cut(5000)]
    threads = [threading.Thread(target=get, args=(server, tmp_path)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 2
    assert names(tmp_path) == ["m.gguf"]


def _fetch_in_process(url: str, path: str) -> None:
    fetch(url, path, verbose=False)


def test_processes_download_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_fetch_in_process, args=(server.url, str(tmp_path / "m.gguf")))
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len(server.requests) == 1
    assert (tmp_path / "m.gguf").read_bytes() == CONTENT


def test_the_lock_excludes_and_vanishes(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(30):
            with locked(tmp_path / "x.lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert names(tmp_path) == []
