"""A deployment for Ray Serve: the application of ``tinyllm serve`` in many replicas behind one address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ArgumentError
from ..server import Settings, create_app
from ..server.errors import Refusal, refusal_of
from ..server.guard import Body, Guard, headers_of, log
from ..server.metrics import Metrics
from ..server.reply import send_whole
from .data import ray, threads
from .prefixes import prefix_of

Source = str | Path | None
PLAIN = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
    "headers", "client", "server",
)  # fmt: skip  # what an application needs of a request, and a process can send to another
TRIES = 3  # replicas that get a request before its client is told of their ends
FRONTS = 2  # where one ends, the other takes its requests at once
DRAIN_S = 60.0
Call = Callable[[bytes | None, dict[str, Any], bytes], AsyncIterator[Message]]


def application(
    models: Mapping[str, Source] | Sequence[Source] | Source = None,
    settings: Settings | None = None,
    replicas: int | tuple[int, int] = 1,
    cpus: int = 1,
    prefixes: bool = True,
    idle_s: float = 600.0,
) -> Any:
    """Make an application for ``ray.serve.run``.

    Parameters
    ----------
    models : mapping, sequence, or one of them, optional
        What ``create_app`` takes, found on the machines of the replicas; no loaded models.
    settings : Settings, optional
        Keys, origins, limits, of each replica: ``slots`` texts are written by one at a time.
    replicas : int or (int, int)
        How many; or the fewest and the most: one comes when those that are there have more requests than
        half of their slots for half a minute, and one goes after ``idle_s`` with fewer, when it has finished
        what it has begun.
    cpus : int
        CPUs, and so threads, of a replica.
    prefixes : bool
        Send requests whose prompts begin alike to one replica, which has read that beginning already.
    idle_s : float
        Seconds that a replica too many stays.

    Returns
    -------
    ray.serve.Application

    Raises
    ------
    ArgumentError
        Ray is not installed, or a number is out of range.

    Examples
    --------
    >>> from ray import serve  # doctest: +SKIP
    >>> serve.run(application("model.gguf", replicas=(1, 8), cpus=4))  # doctest: +SKIP
    """
    ray()
    settings = Settings() if settings is None else settings
    counts = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not (
        isinstance(counts, tuple) and len(counts) == 2 and all(map(is_count, counts))
        and counts[0] <= counts[1]
    ):  # fmt: skip
        raise ArgumentError(
            f"replicas={replicas!r:.60}; expected at least 1, or the fewest and the most"
        )
    if not is_count(cpus):
        raise ArgumentError(f"cpus={cpus!r:.60}; expected a whole number, at least 1")
    if not (isinstance(idle_s, int | float) and 0 <= idle_s < float("inf")):
        raise ArgumentError(f"idle_s={idle_s!r:.60}; expected seconds, at least 0")
    if not isinstance(settings, Settings):
        raise ArgumentError(f"settings={settings!r:.60}; expected tinyllm.server.Settings")
    fewest, most = counts
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    how: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": cpus},
        "max_ongoing_requests": settings.slots + settings.queue,
        "graceful_shutdown_timeout_s": DRAIN_S,
    }
    if prefixes:
        router: Any = (
            "tinyllm.ray.routing:PrefixRouter"  # Ray takes a name, though its types deny it
        )
        how["request_router_config"] = RequestRouterConfig(request_router_class=router)
    if fewest == most:
        how["num_replicas"] = most
    else:
        how["autoscaling_config"] = {
            "min_replicas": fewest, "max_replicas": most,
            "target_ongoing_requests": max(1, settings.slots // 2), "downscale_delay_s": idle_s,
        }  # fmt: skip
    worker = serve.deployment(name="tinyllm", **how)(Worker).bind(models, settings)
    front = serve.deployment(
        name="tinyllm-front", num_replicas=FRONTS, ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000, graceful_shutdown_timeout_s=DRAIN_S,
    )(Front)  # fmt: skip
    return front.bind(worker, settings)


def is_count(n: object) -> bool:
    """Whether it is a whole number, at least 1."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


class Worker:
    """One replica: the application of ``create_app``, its default model loaded for the CPUs it was given."""

    def __init__(self, models: Any, settings: Settings) -> None:
        n_threads = settings.load.get("n_threads") or threads()
        load = {**settings.load, "n_threads": n_threads}
        self.app = create_app(models, replace(settings, load=load))
        self.app.pool.find(None).load()

    async def __call__(
        self, prefix: bytes | None, scope: dict[str, Any], body: bytes
    ) -> AsyncIterator[Message]:
        """The messages that answer a request; leaving them early tells the application that the client went."""
        async for message in answers(self.app, scope, body):
            yield message


async def answers(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
    """What an application sends for a request, message by message."""
    gone = asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue(16)  # an application waits for its reader
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(given, None)) is not None:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app({**scope, "state": {}}, receive, sent.put)
        finally:
            if not gone.is_set():
                await sent.put(None)

    task = asyncio.ensure_future(work())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        gone.set()
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class Front:
    """Takes requests at Serve's address, and hands each that may come in to a worker."""

    def __init__(self, worker: Any, settings: Settings) -> None:
        stream = worker.options(stream=True)
        self.call: Call = lambda *request: stream.remote(*request)
        self.settings = settings

    async def __call__(self, request: Request) -> Response:
        """The answer to a request, passed on as it comes, or a refusal, before the body where it can be."""
        try:
            body = await body_of(request, self.settings)
        except Refusal as refused:
            added = guard(self.settings).added(headers_of(request.scope))
            more = {k.decode(): v.decode("latin-1") for k, v in added}
            return Response(
                refused.body(request.url.path), refused.status, {**more, **refused.headers},
                "application/json",
            )  # fmt: skip
        return Passed(self.call, body, ray().exceptions.RayError)


def guard(settings: Settings) -> Guard:
    """What refuses requests in each replica, without the replica behind it."""

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None: ...

    return Guard(nothing, settings, Metrics())


async def body_of(request: Request, settings: Settings) -> bytes:
    """A request's body, for a worker; Refusal where the worker would not let it in, or it is too large."""
    if (refused := guard(settings).refusal(request.scope, headers_of(request.scope))) is not None:
        raise refused
    parts = Body(request.receive, settings)
    body, more = bytearray(), True
    try:
        while more:
            message = await parts.receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the client left before its request was whole")
            body += message.get("body", b"")
            more = message.get("more_body", False)
    except HTTPException as error:
        raise Refusal(error.status_code, error.detail) from None
    return bytes(body)


class Passed(Response):
    """An answer that a worker writes; another worker is asked where it dies before the first byte.

    A client whose answer has begun gets an error as the stream's last event.
    """

    def __init__(self, call: Call, body: bytes, died: type[Exception]) -> None:
        super().__init__()
        self.call, self.asked, self.died = call, body, died

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the messages on until they end, or the client goes."""
        work = asyncio.ensure_future(self._pass(scope, send))
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await work

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _pass(self, scope: Scope, send: Send) -> None:
        plain = {name: scope[name] for name in PLAIN if name in scope}
        prefix, began, is_stream = prefix_of(self.asked), False, False
        lost = Refusal(503, "the replica that worked on this has ended; ask again",
                       headers={"Retry-After": "1"})  # fmt: skip
        for _ in range(TRIES):
            messages: Any = None
            try:
                messages = self.call(prefix, plain, self.asked)
                async for message in messages:
                    began = True
                    if message["type"] == "http.response.start":
                        is_stream = any(
                            v.startswith(b"text/event-stream") for _, v in message["headers"]
                        )
                    await send(message)
                return
            except self.died:
                if began:
                    break
            except Exception as error:  # Serve would answer in plain text
                log.exception("a request could not be passed on")
                lost = refusal_of(error)
                break
            finally:
                if (cancel := getattr(messages, "cancel", None)) is not None:
                    cancel()
        if not began:
            await send_whole(send, lost.status, lost.body(scope["path"]), lost.headers)
        elif is_stream:
            event = b"event: error\ndata: " + lost.body(scope["path"]) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise lost  # half of an answer: the connection is closed before its end
