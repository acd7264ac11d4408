"""Texts that a request asked for: submitted to the engine, and followed while they are written."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from ..engine.completion import Completion
from ..engine.generate import Token
from ..engine.request import Request
from ..errors import TinyLLMError
from .pool import Pool, Served
from .wording import in_words

Submit = Callable[[Served], Iterable[Request]]  # runs in a thread


@dataclass
class News:
    """What was written since the last look: ``index`` says in which text; ``whole`` once it has ended."""

    index: int
    piece: str
    tokens: Sequence[Token]
    whole: Completion | None = None


@dataclass
class Asked:
    """The texts of one request, and the model that writes them, which is held until ``free``."""

    pool: Pool
    served: Served
    n_texts: int
    n_prompts: int = 1  # the texts of a prompt follow each other
    fields: Mapping[str, str] = field(default_factory=dict)  # by what the engine's errors call them
    counts_written: bool = True  # whether what is written is shown
    requests: list[Request] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    first_at: float | None = None
    left: bool = False  # whether the client has gone before the end
    _held: bool = True

    def __post_init__(self) -> None:
        self.pool.running.add(self.cancel)

    def cancel(self) -> None:
        """End all texts where they are."""
        for request in self.requests:
            request.cancel()

    def free(self) -> None:
        """Let the model go; texts that are still written are ended."""
        if self._held:
            self._held = False
            self.pool.running.discard(self.cancel)
            self.cancel()
            self.served.n_texts -= self.n_texts
            self.pool.release(self.served)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them: each prompt once."""
        used = [request.usage for request in self.requests]
        prompts = used[:: max(1, self.n_texts // self.n_prompts)]
        n_prompt = sum([u.prompt_tokens for u in prompts])
        written = sum([u.completion_tokens for u in used]) if self.counts_written else 0
        cached = sum([u.cached_tokens for u in prompts])
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": written,
            "total_tokens": n_prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    async def follow(self) -> AsyncIterator[News]:
        """What is written, as it is written; an error ends it.

        A text's last news has its Completion.
        """
        loop = asyncio.get_running_loop()
        waker = Waker.of(loop)
        sleeper = Sleeper(loop)
        told = [[0, 0] for _ in self.requests]
        open_ = list(range(len(self.requests)))
        for request in self.requests:
            request.listen(lambda: waker.wake(sleeper))
        try:
            while open_:
                sleeper.arm()
                found = False
                for i in list(open_):
                    request, seen = self.requests[i], told[i]
                    done = request.done  # before the look: what was written until then is seen
                    pieces, tokens = request.since(*seen)
                    if not pieces and not tokens and not done:
                        continue
                    found = True
                    self.first_at = self.first_at or time.perf_counter()
                    seen[0] += len(pieces)
                    seen[1] += len(tokens)
                    whole = self._result(request) if done else None
                    if whole and whole.finish_reason == "cancelled":
                        self.pool.refuse_if_it_stops()
                    if done:
                        open_.remove(i)
                    yield News(i, "".join(pieces), tokens, whole)
                if not found:
                    await sleeper.sleep()
        finally:
            for request in self.requests:
                request.listen(None)

    def _result(self, request: Request) -> Completion:
        try:
            return request.result()
        except TinyLLMError as error:
            raise in_words(error, self.fields) from error

    async def whole(self) -> list[Completion]:
        """The finished texts; an error of one is raised."""
        ends: list[Completion | None] = [None] * len(self.requests)
        async for news in self.follow():
            ends[news.index] = news.whole or ends[news.index]
        return [end for end in ends if end is not None]


async def ask(
    pool: Pool,
    name: str | None,
    submit: Submit,
    n_texts: int = 1,
    n_prompts: int = 1,
    fields: Mapping[str, str] | None = None,
) -> Asked:
    """Have a model write texts; ``submit`` gives the requests to its engine, in a thread.

    ``fields`` are the request's names for what the engine's errors name.

    Raises
    ------
    Refusal
        The request is wrong, there is no such model, or too many texts wait.
    """
    served = await pool.hold(name)
    try:
        pool.refuse_if_it_stops()
        served.engine  # noqa: B018 (an encoder is refused)
        served.admit(n_texts, "n" if n_texts > n_prompts else "prompt")
    except BaseException:
        pool.release(served)
        raise
    asked = Asked(pool, served, n_texts, n_prompts, fields or {})

    def work() -> None:
        for request in submit(served):
            asked.requests.append(request)
            if pool.stops:
                request.cancel()

    done = asyncio.get_running_loop().run_in_executor(pool.workers, work)
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:  # the client has gone; what the thread still submits is ended
        done.add_done_callback(lambda _: asked.free())
        raise
    except BaseException as error:
        asked.free()
        if isinstance(error, TinyLLMError):
            raise in_words(error, fields or {}) from error
        raise
    return asked


class Sleeper:
    """A coroutine's sleep until it is woken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    def arm(self) -> None:
        """Begin to look: whoever wakes from here on ends the next sleep."""
        self._woken = False

    def go(self) -> None:
        """Wake, in the loop's thread."""
        self._woken = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def sleep(self) -> None:
        if not self._woken:
            self._future = self._loop.create_future()
            await self._future
            self._future = None


class Waker:
    """Wakes coroutines of one event loop from other threads: all that a step has news for by one call."""

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Waker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call = loop.call_soon_threadsafe
        self._due: deque[Sleeper] = deque()
        self._called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Waker:
        """The one of a loop."""
        if loop not in cls._all:
            cls._all[loop] = cls(loop)
        return cls._all[loop]

    def wake(self, sleeper: Sleeper) -> None:
        """Wake a coroutine soon; any thread may call it."""
        self._due.append(sleeper)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the event loop was closed
                self._call(self._run)

    def _run(self) -> None:
        self._called = False
        while self._due:
            self._due.popleft().go()
