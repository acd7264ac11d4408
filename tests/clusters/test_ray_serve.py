"""The server in replicas: how an answer is passed on, where requests go, and what a replica's end does."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from spelled import HERMES

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.ray import application
from tinyllm.ray.prefixes import FIRST, prefix_of, ranked

pytest.importorskip("fastapi", reason="the server needs tinyllm[server]")
httpx = pytest.importorskip("httpx")

from starlette.requests import Request  # noqa: E402

from tinyllm.ray.serve import Front, Passed, answers  # noqa: E402
from tinyllm.server import Settings, create_app  # noqa: E402

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray[serve]")


# ---- where requests go


def digest(**fields: Any) -> bytes | None:
    return prefix_of(json.dumps(fields).encode())


def said(*texts: str) -> list[dict[str, str]]:
    roles = ["system", "user", "assistant", "user", "assistant"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def test_a_conversation_keeps_its_prefix_from_turn_to_turn() -> None:
    first = digest(messages=said("Be brief.", "Hello!"))
    assert digest(messages=said("Be brief.", "Hello!", "Yes?", "Why?"), temperature=1) == first
    assert digest(messages=said("Be brief.", "Hi!")) != first
    assert digest(messages=said("Be long.", "Hello!")) != first
    assert digest(messages=said("Be brief.", "Hello!"), model="other") != first
    assert digest(messages=said("Be brief.", "Hello!"), system="s") != first


def test_texts_that_begin_alike_have_one_prefix() -> None:
    beginning = "x" * FIRST
    assert digest(prompt=beginning + "a") == digest(prompt=beginning + "b")
    assert digest(prompt=[beginning + "a", "c"]) == digest(prompt=[beginning + "b"])
    ids = list(range(FIRST))
    assert digest(prompt=[*ids, 1]) == digest(prompt=[*ids, 2]) != digest(prompt=ids[1:])
    assert digest(prompt=[[*ids, 1], [5]]) == digest(prompt=[[*ids, 2]])
    assert digest(prompt="a") != digest(prompt="b")
    assert digest(input=["a"]) != digest(input=["b"])
    assert digest(prompt=[1, 2, 3]) != digest(prompt=[1, 2, 4])


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"[]", b"{}", b'{"prompt": 5}', b'{"messages": []}', b"\xff", b"[" * 10**5],
)
def test_a_request_without_a_beginning_has_none(body: bytes) -> None:
    assert prefix_of(body) is None


def test_only_prefixes_of_a_replica_that_comes_or_goes_move() -> None:
    prefixes = [str(i).encode() for i in range(2000)]
    before = [ranked(p, ["a", "b", "c"])[0] for p in prefixes]
    assert min(before.count(i) for i in range(3)) > 550
    after = [ranked(p, ["a", "b", "c", "d"])[0] for p in prefixes]
    assert {(b, a) for b, a in zip(before, after, strict=True) if b != a} == {
        (0, 3),
        (1, 3),
        (2, 3),
    }
    assert sorted(ranked(b"x", ["a", "b", "c"])) == [0, 1, 2]


# ---- how an answer is passed on


class Died(Exception):
    """What a dead replica raises."""


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    with tinyllm.load() as model:
        app = create_app({"tales": model})
        yield app
        app.close()


def front(call: Any) -> Any:
    """An ASGI application that passes requests to workers."""

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await Passed(call, body, Died)(scope, receive, send)

    return inside


def ask(application: Any, **fields: Any) -> httpx.Response:
    asked = {"model": "tales", "prompt": "Once", "max_tokens": 6, "seed": 1, **fields}

    async def inside() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(application), base_url="http://localhost"
        ) as client:
            return await client.post("/v1/completions", json=asked)

    return asyncio.run(inside())


def texts(answer: httpx.Response) -> str:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def test_an_answer_and_a_stream_are_the_applications(app: Any) -> None:
    passed = front(lambda prefix, scope, body: answers(app, scope, body))
    expected = ask(app).json()["choices"][0]["text"]
    assert ask(passed).json()["choices"][0]["text"] == expected
    stream = ask(passed, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert texts(stream) == expected
    assert ask(passed, nonsense=1).status_code == 400


class Dying:
    """Workers of which the first few die after so many messages."""

    def __init__(self, app: Any, deaths: int, after: int) -> None:
        self.app, self.deaths, self.after, self.calls = app, deaths, after, 0

    async def __call__(self, prefix: Any, scope: Any, body: bytes) -> AsyncIterator[Any]:
        self.calls += 1
        dies, n = self.calls <= self.deaths, 0
        async for message in answers(self.app, scope, body):
            if dies and n == self.after:
                raise Died
            n += 1
            yield message


def test_a_worker_that_dies_before_the_first_byte_is_followed_by_another(app: Any) -> None:
    workers = Dying(app, deaths=2, after=0)
    assert ask(front(workers)).json()["choices"][0]["text"] == ask(app).json()["choices"][0]["text"]
    assert workers.calls == 3


def test_when_all_die_the_client_is_told(app: Any) -> None:
    answer = ask(front(Dying(app, deaths=9, after=0)))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "has ended; ask again" in answer.json()["error"]["message"]


def test_a_stream_that_is_cut_ends_with_an_error(app: Any) -> None:
    workers = Dying(app, deaths=9, after=3)
    answer = ask(front(workers), stream=True)
    assert workers.calls == 1
    *_, event, end = answer.text.split("\n\n")
    assert event.startswith("event: error\ndata: ")
    assert "has ended" in json.loads(event.partition("data: ")[2])["error"]["message"]
    assert end == ""


def test_half_of_an_answer_closes_the_connection(app: Any) -> None:
    with pytest.raises(Exception, match="has ended"):
        ask(front(Dying(app, deaths=9, after=1)))


def test_an_error_of_the_front_itself_is_json() -> None:
    def fails(*request: Any) -> Any:
        raise OSError("no way to a worker")

    answer = ask(front(fails))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed; its log says how"


@pytest.mark.parametrize(
    ("headers", "status", "told"),
    [
        ({"content-length": "101"}, 413, "larger than 100 bytes"),
        ({"x-api-key": "other"}, 401, "the key is wrong"),
        ({}, 401, "a key is needed"),
        ({"x-api-key": "secret"}, 413, "larger than 100 bytes"),  # found while it is read
    ],
)
def test_the_front_refuses_before_it_has_read_too_much(
    headers: dict[str, str], status: int, told: str
) -> None:
    n_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal n_read
        n_read += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def inside() -> None:
        settings = Settings(max_body=100, api_keys=("secret",))
        worker = SimpleNamespace(options=lambda stream: None)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"host", b"localhost"), *raw],
        }  # fmt: skip
        answer = await Front(worker, settings)(Request(scope, receive))
        await answer(scope, receive, send)

    asyncio.run(inside())
    assert sent[0]["status"] == status
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]
    assert told in json.loads(sent[1]["body"])["error"]["message"]
    assert n_read == (2 if "secret" in headers.values() else 0)


def test_a_client_that_goes_ends_the_text(app: Any) -> None:
    """The worker's iteration is left, and the application is told."""
    served = app.pool.find(None)

    async def inside() -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "root_path": "", "client": None, "server": ("localhost", 80),
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        }  # fmt: skip
        asked = {"prompt": "Once", "max_tokens": 400, "stream": True, "logit_bias": {"2": -100}}
        messages = answers(app, scope, json.dumps(asked).encode())
        assert (await anext(messages))["status"] == 200
        await anext(messages)
        assert served.n_texts == 1
        await messages.aclose()
        for _ in range(200):
            if served.n_texts == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the text goes on")

    asyncio.run(inside())


# ---- what the routing finds


def cached_tokens(apps: list[Any], choose: Callable[[dict[str, Any]], int]) -> tuple[int, int]:
    """Tokens of prompts of 50 conversations of four turns, and how many of them a replica had computed."""

    async def inside() -> tuple[int, int]:
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
            for app in apps
        ]
        talks = [said("You tell stories.", f"Tell me of animal {i}.") for i in range(50)]
        whole = cached = 0
        for turn in range(4):
            for talk in talks:
                asked = {"model": "tales", "messages": talk, "max_tokens": 8, "seed": turn}
                answer = await clients[choose(asked)].post("/v1/chat/completions", json=asked)
                found = answer.json()
                whole += found["usage"]["prompt_tokens"]
                cached += found["usage"]["prompt_tokens_details"]["cached_tokens"]
                text = found["choices"][0]["message"]["content"]
                talk += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": "What happened then?"},
                ]
        for client in clients:
            await client.aclose()
        return whole, cached

    return asyncio.run(inside())


@pytest.mark.slow
def test_equal_beginnings_find_more_computed_than_chance() -> None:
    """Two replicas, each with a model of its own."""
    chance = random.Random(0)

    def by_beginning(asked: dict[str, Any]) -> int:
        prefix = prefix_of(json.dumps(asked).encode())
        assert prefix is not None
        return ranked(prefix, ["a", "b"])[0]

    found = []
    for choose in (by_beginning, lambda _: chance.randrange(2)):
        with tinyllm.load() as one, tinyllm.load() as two:
            apps = [create_app({"tales": model}) for model in (one, two)]
            found.append(cached_tokens(apps, choose))
            for app in apps:
                app.close()
    assert found[0][1] >= 1.3 * found[1][1], found


# ---- on a cluster

SERVE = """
import ast, json, sys, ray
from ray import serve
from tinyllm.ray import application
from tinyllm.server import Settings
port, idle_s, settings = map(json.loads, sys.argv[1:])
ray.init("local", num_cpus=2, include_dashboard=False)
serve.start(http_options={"port": port})
for line in sys.stdin:
    replicas = ast.literal_eval(line)
    serve.run(application({"tales": None}, Settings(**settings), replicas, idle_s=idle_s))
    print("ready", flush=True)
serve.shutdown()
"""


class Served:
    """Replicas behind one port, in a process of their own."""

    def __init__(
        self, port: int, replicas: int | tuple[int, int], idle_s: int = 600, **settings: Any
    ) -> None:
        command = [sys.executable, "-c", SERVE, str(port), str(idle_s), json.dumps(settings)]
        self.url = f"http://127.0.0.1:{port}"
        patient = {  # else a busy machine's proxy is taken for dead
            "RAY_SERVE_PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD": "100",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **patient}, **pipes)
        self.deploy(replicas)

    def deploy(self, replicas: int | tuple[int, int]) -> None:
        """Let Serve have so many; those that are there are replaced."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{replicas}\n")
        self.process.stdin.flush()
        assert any(line == "ready\n" for line in self.process.stdout)

    def replicas(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-f", r"^ray::(SERVE_REPLICA::.*:)?ServeReplica:default:tinyllm(\.|$)"],
            capture_output=True,
            text=True,
        )
        return [int(line) for line in found.stdout.split()]

    def close(self) -> None:
        self.process.communicate(timeout=300)


@pytest.fixture
def serving_replicas() -> Iterator[Callable[..., Served]]:
    """``Served``, which is closed when the test ends."""
    with ExitStack() as stack:

        def start(*args: Any, **settings: Any) -> Served:
            served = Served(*args, **settings)
            stack.callback(served.close)
            return served

        yield start


WHOLE = {"stop", "length"}
NO_END = {"1": -100}  # else stories end before a fast machine's replica is killed


def streams(url: str, n: int, meanwhile: Callable[[], object] = lambda: None) -> list[str]:
    """How n streams end that begin together; ``meanwhile`` is called once nearly all have begun."""
    openai = pytest.importorskip("openai")
    ended: list[str] = []
    begun = threading.Semaphore(0)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

        def ask(i: int) -> None:
            messages = [{"role": "user", "content": f"Tell me story {i}."}]
            reason, n_chunks = None, 0
            try:
                for chunk in client.chat.completions.create(
                    model="tales", messages=messages, max_tokens=400, seed=i, stream=True,
                    logit_bias=NO_END,
                ):  # fmt: skip
                    n_chunks += 1
                    if n_chunks == 3:
                        begun.release()
                    reason = chunk.choices[0].finish_reason if chunk.choices else reason
                ended.append(reason or "cut")
            except openai.APIError:
                ended.append("error")
            finally:
                if n_chunks < 3:
                    begun.release()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(n)]
        for thread in threads:
            thread.start()
        for _ in range(n - n // 8):
            begun.acquire()
        meanwhile()
        for thread in threads:
            thread.join()
    return ended


@needs_ray
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"replicas": 0}, "replicas=0; expected at least 1"),
        ({"replicas": (3, 2)}, "replicas=(3, 2); expected"),
        ({"replicas": "2"}, "replicas='2'; expected at least 1"),
        ({"replicas": (1, 2, 3)}, "replicas=(1, 2, 3); expected"),
        ({"replicas": 1.5}, "replicas=1.5; expected"),
        ({"replicas": True}, "replicas=True; expected"),
        ({"idle_s": -1}, "idle_s=-1; expected seconds"),
        ({"idle_s": "x"}, "idle_s='x'; expected seconds"),
        ({"cpus": 0}, "cpus=0; expected a whole number"),
        ({"cpus": 0.5}, "cpus=0.5; expected a whole number"),
        ({"settings": {"slots": 2}}, "settings={'slots': 2}; expected tinyllm.server.Settings"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(told)):
        application(**options)


@needs_ray
@pytest.mark.slow
def test_a_replica_killed_under_load_loses_no_request_without_an_error(
    serving_replicas: Callable[..., Served],
) -> None:
    served = serving_replicas(4987, 2)
    assert set(streams(served.url, 24)) <= WHOLE
    ended = streams(served.url, 24, lambda: os.kill(served.replicas()[0], signal.SIGKILL))
    assert len(ended) == 24
    assert set(ended) <= {*WHOLE, "error"}
    assert "error" in ended  # it had begun some


@needs_ray
@pytest.mark.slow
def test_the_clients_tests_pass_against_two_replicas(
    serving_replicas: Callable[..., Served],
) -> None:
    served = serving_replicas(4990, 2, api_keys=["secret"], template=HERMES)
    tests = Path(__file__).parent.parent / "server" / "test_server_clients.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TINYLLM_SERVER_URL": served.url}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@needs_ray
@pytest.mark.slow
def test_replicas_that_go_finish_what_they_have_begun(
    serving_replicas: Callable[..., Served],
) -> None:
    served = serving_replicas(4988, 2)
    before = served.replicas()
    assert len(before) == 2
    ended = streams(served.url, 24, lambda: served.deploy(1))
    assert len(ended) == 24
    assert set(ended) <= WHOLE
    assert len(served.replicas()) == 1
    assert not {*before} & {*served.replicas()}


@needs_ray
@pytest.mark.slow
def test_a_replica_comes_where_requests_are_many_and_goes_where_they_are_few(
    serving_replicas: Callable[..., Served],
) -> None:
    served = serving_replicas(4989, (1, 2), 5, slots=2)
    assert len(served.replicas()) == 1
    rounds = 0
    while len(served.replicas()) < 2:
        assert set(streams(served.url, 8)) <= WHOLE
        rounds += 1
        assert rounds < 1000
    while len(served.replicas()) > 1:
        assert set(streams(served.url, 1)) <= WHOLE
        rounds += 1
        assert rounds < 1000
