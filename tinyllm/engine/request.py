"""A request to an Engine, as its caller holds it: its text as it is written, from any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from ..errors import ArgumentError, TinyLLMError
from .completion import Completion, Job, Options
from .generate import FinishReason, Timings, Token

if TYPE_CHECKING:
    from ..models.state import State

AsyncWaiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, so far.

    ``cached_tokens`` of the prompt were found computed, and not read again; ``reasoning_tokens`` of a chat's
    answer are reasoning. ``first_token_s`` is how many seconds after ``submit`` the first token was there.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    first_token_s: float | None = None


class Request:
    """One text being written by an Engine; made by ``Engine.submit``. Any thread may call its methods.

    Iterating, with ``for`` or ``async for``, gives the text in pieces; ``await request`` gives its Completion.
    Leaving an iteration does not stop the work: ``cancel`` does.
    """

    def __init__(
        self,
        ids: list[int],
        options: Options,
        n_ctx: int,
        state: State | None,
        deadline: float | None,
        source: list[int] | None = None,
        kept: int | None = None,
    ) -> None:
        self.prompt_ids, self.options = ids, options
        self.source = source  # what is read before the text, where another stack of layers reads
        self.kept = kept  # how many tokens of the given state come before; None: all
        self.n_ctx = n_ctx  # tokens that its state has room for
        self.given_state = state
        self.job: Job | None = None  # once it was begun
        self.set_aside_ids: list[int] = []  # prompt and text, while another request has its memory
        self.n_cached = 0
        self._begun = time.monotonic()
        self._first_token_s: float | None = None
        self._ends_at = None if deadline is None else self._begun + deadline
        self._asked: FinishReason | None = None  # why a caller, or the clock, ends it
        self._pieces: list[str] = []
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._wrong: BaseException | None = None  # what its listener raised
        self.thread: threading.Thread | None = None  # which writes it
        self._changed = threading.Condition()
        self._waiters: list[AsyncWaiter] = []
        self._listener: Callable[[], object] | None = None
        self.finished: Callable[[Completion], Completion] = lambda done: done  # what a caller sees
        self.n_reasoning: Callable[[Sequence[int]], int] = lambda ids: 0

    # ---- for the caller

    @property
    def done(self) -> bool:
        """Whether the text has ended, or an error has ended it."""
        return self._completion is not None or self._error is not None

    @property
    def going_on(self) -> bool:
        """Whether it may still use the state that it was given."""
        return not self.done

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        n_prompt, job = len(self.source or self.prompt_ids), self.job
        if job is None:
            return Usage(n_prompt, 0, 0)
        n_reasoning = self.n_reasoning([t.id for t in job.tokens if t.id not in job.run.eog])
        first = self._first_token_s
        return Usage(n_prompt, job.run.n_generated, self.n_cached, n_reasoning, first)

    def cancel(self) -> None:
        """End the text where it is, before the next step; ``result`` then has what was written."""
        self._asked = self._asked or "cancelled"

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the text to end.

        Raises
        ------
        TimeoutError
            It has not ended within ``timeout`` seconds; it goes on.
        TinyLLMError
            The engine's own thread asks, as a logits processor would: it would wait for itself.
        BaseException
            What its own logits processor or listener raised, or what ended the step that computed it.
        """
        if timeout is not None and not is_seconds(timeout):
            raise ArgumentError(f"timeout={timeout!r:.40}; expected seconds, or None")
        self._check_may_wait()
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the text has not ended within {timeout} s; it goes on")
        return self._outcome()

    def listen(self, listener: Callable[[], object] | None) -> None:
        """Have ``listener`` called in the engine's thread whenever there is something new, and at the end.

        It must be quick. What it raises ends this request. ``since`` tells what is new.
        """
        self._listener = listener

    def since(self, n_pieces: int, n_tokens: int) -> tuple[list[str], list[Token]]:
        """The pieces of text and the tokens behind the first so many.

        A token may be here before its text: while that may belong to a stop string, or is half a character.
        """
        tokens = [] if self.job is None else self.job.tokens[n_tokens:]
        return self._pieces[n_pieces:], tokens

    def _check_may_wait(self) -> None:
        if self.thread is None or self.done:
            return
        if threading.current_thread() is self.thread:
            raise TinyLLMError(
                "the engine's thread would wait for itself: a processor or listener cannot wait for a request"
            )
        if not self.thread.is_alive() and not self.done:
            raise TinyLLMError("the engine's thread is in another process, of which this is a fork")

    def __iter__(self) -> Iterator[str]:
        seen = 0
        while True:
            self._check_may_wait()
            with self._changed:
                self._changed.wait_for(lambda n=seen: self.done or len(self._pieces) > n)  # type: ignore[misc]
            yield from self._pieces[seen : (seen := len(self._pieces))]
            if self.done and seen == len(self._pieces):
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[str]:
        seen = 0
        while True:
            await self._change(seen)
            pieces = self._pieces[seen:]
            seen += len(pieces)
            for piece in pieces:
                yield piece
            if self.done and seen == len(self._pieces):
                self._outcome()
                return

    def __await__(self) -> Generator[object, None, Completion]:
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        while not self.done:
            await self._change(len(self._pieces))
        return self._outcome()

    async def _change(self, seen: int) -> None:
        """Wait until there are more than ``seen`` pieces, or no more to come."""
        loop = asyncio.get_running_loop()
        self._check_may_wait()
        with self._changed:
            if self.done or len(self._pieces) > seen:
                return
            future = loop.create_future()
            self._waiters.append((loop, future))
        await future

    def _outcome(self) -> Completion:
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self.finished(self._completion)

    # ---- for the engine's thread

    @property
    def ended(self) -> bool:
        """Whether nothing is left to compute; a deadline that has passed, or ``cancel``, ends it here."""
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            self._asked = self._asked or "deadline"
        if self.job is None:
            return self._asked is not None
        run = self.job.run
        run.finish_reason = run.finish_reason or self._asked
        return run.finish_reason is not None

    @property
    def can_be_set_aside(self) -> bool:
        """Whether its state can be made anew: it is its own, and no context shift has turned its keys."""
        return self.given_state is None and self.job is not None and not self.job.run.shifted

    def set_aside(self) -> None:
        """Give up the state; what it holds is computed again in another one."""
        assert self.job is not None
        self.set_aside_ids = self.job.run.give_up()

    def show(self) -> None:
        """Hand what was written since the last call to those who wait for it."""
        if self._first_token_s is None and self.job is not None and self.job.tokens:
            self._first_token_s = time.monotonic() - self._begun
        if self.job is not None and (taken := self.job.take()):
            self._notify([piece for _, piece in taken])

    def finish(self, error: BaseException | None = None) -> None:
        """End the request, with an error or with the text so far."""
        if self.done:
            return
        if self.job is not None:
            run = self.job.run
            run.finish_reason = run.finish_reason or self._asked or "cancelled"
        self.show()
        error = error or self._wrong
        if error is not None:
            if self.job is not None:
                self.job.run.undo()
            self._notify(error=error)
        elif self.job is not None:
            self._notify(completion=self.job.completion())
        else:
            self._notify(completion=self._unwritten())
        if self.job is not None and not self.set_aside_ids:
            self.job.run.give_up()

    def _unwritten(self) -> Completion:
        wanted: list[Token] | None = [] if self.options.logprobs is not None else None
        echoed = wanted if self.options.echo else None
        read = self.source or self.prompt_ids
        return Completion("", [], self._asked or "cancelled", read, wanted, echoed, Timings())

    def _notify(
        self,
        pieces: list[str] | None = None,
        completion: Completion | None = None,
        error: BaseException | None = None,
    ) -> None:
        with self._changed:
            self._pieces.extend(pieces or ())
            self._completion, self._error = completion, error
            waiters, self._waiters = self._waiters, []
            self._changed.notify_all()
        for loop, future in waiters:
            with suppress(RuntimeError):  # its event loop was closed
                loop.call_soon_threadsafe(wake, future)
        if (listener := self._listener) is not None:  # another thread may take it away at any time
            try:
                listener()
            except BaseException as e:  # the caller's: no other request ends by it
                self._listener, self._wrong = None, e
                self.cancel()
                if self.done:
                    self._error = e


def is_seconds(x: object) -> bool:
    """Whether this is a time from now on."""
    return isinstance(x, Real) and not isinstance(x, bool) and float(x) >= 0


def wake(future: asyncio.Future[None]) -> None:
    """Let a coroutine go on that waits for a future, unless it was cancelled."""
    if not future.done():
        future.set_result(None)
