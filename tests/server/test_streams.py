"""Streams: pings, clients that go or do not read, and a server that stops."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

URL = "/v1/chat/completions"
RERANKER = Path(__file__).resolve().parent.parent / "data/models/rank-bert.gguf"
LONG = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 400, "seed": 1, "ignore_eos": True, "stream": True,
}  # fmt: skip


def scope(path: str) -> dict:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
    }  # fmt: skip


def talk(app, body, leaves, path=URL, reads=None):
    """Call the application as a client that goes once ``leaves(chunks)``; returns the scope and the chunks."""
    chunks: list[bytes] = []
    asked = scope(path)

    async def inside():
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                chunks.append(message["body"])
            if leaves(chunks):
                gone.set()
            if reads is not None:
                await reads()

        if leaves(chunks):
            gone.set()
        await app.app(asked, receive, send)

    app.loop.run_until_complete(inside())
    return asked["state"]["tinyllm_asked"], chunks


def test_a_client_that_goes_ends_its_text(app):
    asked, _ = talk(app, LONG, lambda chunks: len(chunks) > 3)
    (request,) = asked.requests
    assert request.result(60).finish_reason == "cancelled"
    assert asked.usage["completion_tokens"] < 400
    assert asked.served.n_texts == 0
    assert asked.served.in_use == 0


@pytest.mark.parametrize("path", [URL, "/v1/completions"])
def test_a_client_that_does_not_wait_ends_its_text(app, path):
    body = {k: v for k, v in LONG.items() if k != "stream"}
    if path != URL:
        body["prompt"] = body.pop("messages")[0]["content"]
    asked, _ = talk(app, body, lambda chunks: True, path)
    assert asked.requests[0].result(60).finish_reason == "cancelled"
    assert asked.served.n_texts == 0


def test_all_texts_of_a_request_end(app):
    asked, _ = talk(app, {**LONG, "n": 5}, lambda chunks: len(chunks) > 8)
    assert [r.result(60).finish_reason for r in asked.requests] == ["cancelled"] * 5
    assert asked.served.n_texts == 0


LONG_WORK = [
    ("/v1/embeddings", {"input": ["One two " * 40] * 100}, "hidden"),
    ("/v1/rerank", {"query": "a", "documents": ["word " * 20] * 200}, "hidden"),
    ("/v1/decisions", {"input": "A text.", "questions": [
        {"type": "predicate", "instructions": f"It has {i}."} for i in range(400)]}, "forward"),
    ("/v1/systemone", {"state": "A text.", "questions": {
        str(i): {"type": "noul", "instructions": f"It has {i}."} for i in range(400)}}, "forward"),
]  # fmt: skip


def leave(app, path, body, goes):
    """Call a route as a client that goes when ``goes(go)`` calls what it is given; returns the status.

    ``go`` may be called in any thread, and returns once the server knows.
    """
    statuses = []

    async def inside():
        loop, gone, noticed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            loop.call_soon(noticed.set)
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        def go():
            loop.call_soon_threadsafe(gone.set)
            assert noticed.wait(60)

        goes(go)
        await app.app(scope(path), receive, send)

    app.loop.run_until_complete(inside())
    served = app.app.pool.find(None)
    assert (served.n_texts, served.in_use) == (0, 0)
    return statuses[0]


@pytest.mark.parametrize(("path", "body", "step"), LONG_WORK)
def test_a_client_that_goes_ends_what_writes_no_text(make_app, monkeypatch, path, body, step):
    app = make_app([RERANKER] if path == "/v1/rerank" else None)
    assert app.post("/tokenize", {"content": "One"}).status_code == 200
    net = app.app.pool.find(None).model.network
    whole, steps = getattr(net, step), []

    def goes(go):
        def first(*args, **how):
            steps.append(step)
            if len(steps) == 1:
                go()
            return whole(*args, **how)

        monkeypatch.setattr(net, step, first)

    assert leave(app, path, body, goes) == 499
    assert len(steps) == 1
    assert app.post(path, body).status_code == 200
    assert len(steps) > 2  # it would have gone on


def test_a_client_that_goes_while_its_work_waits_frees_its_slot(make_app):
    app, end = make_app(), threading.Event()
    workers = app.app.pool.workers
    busy = [workers.submit(end.wait, 60) for _ in range(workers._max_workers)]

    def goes(go):
        asyncio.get_running_loop().run_in_executor(None, go)

    assert leave(app, "/v1/embeddings", {"input": "One"}, goes) == 499
    assert not any(job.done() for job in busy)
    end.set()


def test_a_client_that_does_not_read_is_given_up(make_app):
    app = make_app(ping_s=0.01, send_s=0.02)

    async def never():
        await asyncio.sleep(3600)

    asked, _ = talk(app, LONG, lambda chunks: False, reads=never)
    assert asked.requests[0].result(60).finish_reason == "cancelled"
    assert asked.served.n_texts == 0


def test_a_silent_stream_says_that_it_is_alive(make_app):
    app = make_app(ping_s=1e-5)  # sooner than any token
    text = app.post(URL, {**LONG, "max_tokens": 100}).text
    assert ": ping\n\n" in text
    events = [e for e in text.split("\n\n") if e and e != ": ping"]
    assert all(e.startswith("data: ") for e in events)
    assert events[-1] == "data: [DONE]"
    claude = app.post("/v1/messages", {**LONG, "max_tokens": 100}).text
    assert claude.rstrip().endswith('data: {"type":"message_stop"}')


def start(stack: ExitStack, *options: str) -> tuple[subprocess.Popen, str]:
    """A server of its own process, and its address."""
    command = [sys.executable, "-m", "tinyllm", "serve", "--port", "0", "--quiet", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = stack.enter_context(subprocess.Popen(command, **pipes))
    stack.callback(process.kill)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://[\d.:]+", line)
    assert found, line
    return process, found[0]


def begin(stack: ExitStack, url: str) -> Iterator[str]:
    """The lines of a stream that has begun."""
    client = stack.enter_context(httpx.Client(timeout=300, trust_env=False))
    answer = stack.enter_context(client.stream("POST", url + URL, json=LONG))
    assert answer.status_code == 200
    lines = answer.iter_lines()
    for _ in range(2):  # the role, and a first piece; there may be pings between
        next(line for line in lines if line.startswith("data: "))
    return lines


def test_a_server_that_is_told_to_stop_finishes_its_texts():
    with ExitStack() as stack:
        process, url = start(stack)
        lines = begin(stack, url)
        process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            begin(stack, url)


def test_an_idle_server_sleeps():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("how often a process wakes is read from /proc")

    def n_wakes(process: subprocess.Popen) -> int:
        found = Path(f"/proc/{process.pid}/task").glob("*/status")
        return sum(
            int(re.search(r"\nvoluntary_ctxt_switches:\s+(\d+)", p.read_text())[1]) for p in found
        )

    with ExitStack() as stack:
        process, url = start(stack)
        client = stack.enter_context(httpx.Client(trust_env=False))
        body = {**LONG, "stream": False, "max_tokens": 3}
        answer = client.post(url + URL, json=body, timeout=300)
        assert answer.status_code == 200
        assert parsedate_to_datetime(answer.headers["date"]).year >= 2025
        time.sleep(1)  # what the request left is done
        before = n_wakes(process)
        time.sleep(2)
        assert n_wakes(process) - before < 5  # uvicorn by itself wakes 20 times
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("n_signals", [1, 2])
def test_texts_that_a_stop_ends_say_so(n_signals):
    """By a second signal, or when the time is over: each stream has an error, and the log no traceback."""
    with ExitStack() as stack:
        process, url = start(stack, "--stop-seconds", "1000" if n_signals == 2 else "0.1")
        texts = [begin(stack, url) for _ in range(8)]
        for sent in (signal.SIGINT, signal.SIGTERM)[:n_signals]:
            process.send_signal(sent)
            time.sleep(0.2)
        ends = ["".join(lines) for lines in texts]
        assert process.wait(60) == 0
        cut = [end for end in ends if "the server stops, and has ended this" in end]
        assert len(cut) + sum("data: [DONE]" in end for end in ends) == 8
        assert cut
        told = process.stderr.read()
        assert f"{len(cut)} answers are cut short: the server stops" in told
        assert "Traceback" not in told


def test_a_server_that_stops_begins_nothing(make_app):
    app = make_app()
    chat = {**LONG, "stream": False, "max_tokens": 2}
    for path, body in ((URL, chat), ("/v1/embeddings", {"input": "a"})):
        app.app.pool.stops = False
        assert app.post(path, body).status_code == 200
        app.app.pool.stops = True
        answer = app.post(path, body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "the server stops" in answer.json()["error"]["message"]
    assert not app.app.pool.running
