"""Requests that come and go: they join the steps of one model, share its memory, and leave.

A row of a step has the same bits alone and among others, so a text does not depend on what else is written, on
the pieces in which its prompt was read, or on having been set aside.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ..errors import ArgumentError, DeviceError, QueueFull, TinyLLMError
from ..models.memory import cache_bytes
from ..models.step import hook_of
from .completion import (
    Prompt,
    asked_of,
    begin,
    check_given,
    divided,
    ids_behind,
    room_for,
    split_prompts,
    unread,
)
from .generate import Run, check_fits, steps
from .pace import Pace
from .prefixes import WORTH_WAITING, n_same
from .request import Request, is_seconds
from .request import Usage as Usage

if TYPE_CHECKING:
    from ..chat.render import Message
    from ..model import Model
    from ..models.state import State

MOST_TEXTS = 64  # texts of a step, unless told otherwise
LIMITS = {  # the least value of each, and whether it may be None
    "max_rows": (1, True),
    "max_texts": (1, True),
    "max_bytes": (1, False),
    "max_queue": (1, False),
}
OF_CHATS = ("template", "tools", "tool_choice", "template_vars", "continue_final_message")
ROOM = 512  # tokens that a request has memory for when it joins, beyond those it has to read


class Engine:
    """Writes many texts of one model side by side, in a thread of its own.

    Requests join and leave between steps. Long prompts are read in pieces, so that the texts being written
    keep their pace. A request waits while there is no memory for it. What it writes is what ``Model.generate``
    writes for it alone: on ``cpu``, to the bit. Close it, or use it in a ``with`` block: until then its thread
    keeps it, and the model, in memory. A process that was forked needs an engine of its own.

    Parameters
    ----------
    model : Model
        It may be used by others meanwhile, who wait for the engine's steps and it for theirs.
    max_rows : int, optional
        Rows of a step at most: each text takes one, prompts share the others. Default: 64 texts, and the
        rows that a second allows.
    max_bytes : int, optional
        Bytes of keys and values at most; half of the memory that is free now. One request always runs. It may
        be changed at any time: where running requests no longer fit, the last ones are set aside, and read
        their text again later.
    max_queue : int
        Requests that may wait.
    max_texts : int, optional
        Texts that are written at a time at most; 64, or ``max_rows`` where that is given.
    prefix_bytes : int, optional
        Changes ``Model.prefix_bytes``: what is kept of texts is kept for all that write with the model, and
        stays when the engine is closed.

    Examples
    --------
    >>> import tinyllm
    >>> with tinyllm.load() as m, tinyllm.Engine(m) as engine:
    ...     requests = [engine.submit(p, max_tokens=4, temperature=0) for p in ("One", "Two")]
    ...     [len(r.result().ids) for r in requests]
    [4, 4]
    """

    def __init__(
        self,
        model: Model,
        max_rows: int | None = None,
        max_bytes: int | None = None,
        max_queue: int = 1024,
        prefix_bytes: int | None = None,
        max_texts: int | None = None,
    ) -> None:
        if not hasattr(model, "network"):
            raise ArgumentError(f"model is {type(model).__name__} {model!r:.40}; expected a Model")
        if not model.config.causal:
            raise ArgumentError(f"{model.arch} reads texts and writes none; use embed")
        self._model, self._net = model, model.network
        self._changed = threading.Condition()  # guards _waiting and _closed
        self.max_rows, self.max_queue, self.max_texts = max_rows, max_queue, max_texts
        free = min(stage.be.memory()[0] for stage in self._net.stages)
        self.max_bytes = free // 2 if max_bytes is None else max_bytes
        self._prefixes = model.prefixes
        if prefix_bytes is not None:
            self.prefix_bytes = prefix_bytes
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._runs: list[Run] = []  # theirs, which the loop looks at before each step
        self._most: int | None = None  # requests at a time, since memory ran out in a step
        self._pace = Pace()
        self._nbytes = 0
        self._closed, self._pid = False, os.getpid()
        self._died: BaseException | None = None  # what ended the thread, unless it was closed
        self._thread = threading.Thread(target=self._work, name="tinyllm-engine", daemon=True)
        self._thread.start()

    def __setattr__(self, name: str, value: object) -> None:
        if name in LIMITS:
            check_limit(name, value)
        super().__setattr__(name, value)

    def submit(
        self,
        prompt: Prompt | Sequence[Mapping[str, Any]],
        max_tokens: int = 256,
        *,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        template_vars: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        state: State | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Request:
        """Add a request, and return at once.

        Parameters
        ----------
        prompt : str, sequence of int, or messages
            What ``Model.generate`` or ``Model.chat`` takes; a single one.
        template, tools, tool_choice, template_vars, continue_final_message
            For messages, as ``Model.chat`` has them; the result has a ``message``.
        state : State, optional
            Continue this conversation; no other request may use it until this one is done.
        deadline : float, optional
            Seconds after which the text ends where it is, with the ``finish_reason`` "deadline".
        max_tokens, **options
            As ``Model.generate`` has them, without ``tap`` and ``stream``.

        Raises
        ------
        QueueFull
            ``max_queue`` requests are waiting.
        ArgumentError, ContextOverflow, TemplateError
            The request could not be run.
        StateError
            Another text goes on with the state.
        """
        refuse(self._net.number, options, deadline)
        check_given(state, None)
        turn = None
        if is_conversation(prompt):
            chat = (template, tools, tool_choice, template_vars, continue_final_message)
            turn = self._model.turn(cast("Sequence[Message]", prompt), *chat)
            options |= self._model.held_to_calls(turn, options)
        else:
            given = (template, tools, tool_choice != "auto", template_vars, continue_final_message)
            if wrong := [name for name, x in zip(OF_CHATS, given, strict=True) if x]:
                raise ArgumentError(f"{wrong[0]} belongs to messages, and the prompt is none")
        chosen = asked_of(self._model, max_tokens, state, options)
        if state is not None:
            self._net.check_own(state)
            state.check_free()
        ids, kept = (self._ids(prompt, state), None) if turn is None else unread(turn.ids, state)
        read, ids = divided(self._net, ids, state, self._model.n_ctx)
        n_ctx, n_before = room_for(ids, chosen, self._model.n_ctx), 0
        if state is not None:
            if kept != 0:
                state.check_whole()
            n_ctx, n_before = state.n_ctx, len(state.ids) if kept is None else kept
        check_fits(n_before + len(ids), n_ctx, chosen.overflow)
        self._net.check_ids([ids, read or []])
        request = Request(ids, chosen, n_ctx, state, deadline, read, kept)
        request.thread = self._thread
        if turn is not None:
            request.finished = partial(self._model.answered, turn)
            request.n_reasoning = partial(turn.n_reasoning, self._model.tokenizer)
        if state is not None:
            state.take(request)
        try:
            self._enqueue(request)
        except TinyLLMError as e:
            request.finish(e)  # the state is free again
            raise
        return request

    def _enqueue(self, request: Request) -> None:
        # a fork has none of the threads, and perhaps a lock that nobody leaves
        if os.getpid() != self._pid:
            raise TinyLLMError(
                f"the engine runs in the process {self._pid}, and this is its fork; make an Engine here"
            )
        with self._changed:
            if self._died is not None:
                raise TinyLLMError(f"the engine has ended by an error: {self._died!r}")
            if self._closed:
                raise TinyLLMError("the engine is closed")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, as many as may; try again later"
                )
            self._waiting.append(request)
            self._changed.notify_all()

    def _ids(self, prompt: Prompt | Sequence[Any], state: State | None) -> list[int]:
        prompts, many = split_prompts(prompt)
        if many:
            raise ArgumentError("prompt is a list of prompts; submit each by itself")
        return ids_behind(self._model, prompts[0], state)

    @property
    def prefix_bytes(self) -> int:
        """``Model.prefix_bytes``: bytes that are kept of texts at most."""
        return self._prefixes.max_bytes

    @prefix_bytes.setter
    def prefix_bytes(self, most: int) -> None:
        self._prefixes.max_bytes = most

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: those of running requests at the last step, and what is kept of texts."""
        return self._nbytes + self._prefixes.nbytes

    def close(self) -> None:
        """End all requests where they are, with the ``finish_reason`` "cancelled", and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # ---- the thread

    def _work(self) -> None:
        try:
            while self._wait():
                try:
                    self._run()
                except Exception as e:
                    self._step_failed(e)
        except BaseException as e:  # told to every request, and to who submits another
            self._died = e
        with self._changed:
            self._closed = True
        for request in (*self._running, *self._waiting):
            request.cancel()
            request.finish(self._died)

    def _wait(self) -> bool:
        """Wait for requests, and admit some; False once the engine is closed."""
        while True:
            self._admit()
            self._fit()
            with self._changed:
                if self._closed or self._running:
                    return not self._closed
                if not self._waiting:
                    self._changed.wait()

    def _run(self) -> None:
        """Take steps until no request is running."""
        start = time.perf_counter()
        for work in steps(
            self._net, self._runs, prompt_rows=self._rows_to_read, failed=self._choice_failed
        ):
            self._settle()
            if self._closed:
                return
            self._fit()
            self._admit()
            start, begun = time.perf_counter(), start
            self._pace.note(work, start - begun)

    def _settle(self) -> None:
        """Show what was written, and let those go that have ended."""
        for request in list(self._running):
            if request.job is not None and not request.done:
                request.job.keep()
            if request.ended:
                self._leave(request)
                request.finish()
                self._most = None  # it left memory to others
            else:
                request.show()

    def _leave(self, request: Request) -> None:
        at = self._running.index(request)
        with self._changed:
            del self._running[at]
        del self._runs[at]

    def _rows_to_read(self) -> int:
        """How many rows of prompts the next step may compute beside texts."""
        most = (self.max_rows or self._net.n_batch) - len(self._runs)
        return min(self._pace.rows(), max(most, 1))

    def _choice_failed(self, run: Run, error: BaseException) -> None:
        """End the one request whose token could not be chosen, such as by an error in its processor."""
        request = self._running[self._runs.index(run)]
        run.finish_reason = "cancelled"
        request.finish(error)

    def _step_failed(self, error: Exception) -> None:
        """A step as a whole failed. For want of memory, fewer go on; else it is the error of all."""
        scarce = isinstance(error, (DeviceError, MemoryError))
        if scarce and len(self._prefixes) and not any(map(spoilt, self._running)):
            self._prefixes.trim(0)
            return
        if scarce and self._set_last_aside():
            for request in list(filter(spoilt, self._running)):
                self._set_aside(request)
            self._prefixes.trim(0)
            self._most = max(1, len(self._running))
            return
        for request in list(self._running):
            self._leave(request)
            request.finish(error)

    # ---- memory

    @property
    def _held(self) -> int:
        """Bytes of keys and values of the running requests."""
        return sum(r.job.run.nbytes for r in self._running if r.job is not None)

    def _needs(self, request: Request) -> int:
        """Bytes that admitting a request takes, or soon will.

        What it goes on to write may take more: then the last requests are set aside.
        """
        given, drafting = request.given_state, request.options.drafting
        n = len(request.set_aside_ids or request.prompt_ids) + ROOM
        n = min(n + (0 if given is None else len(given.ids)), request.n_ctx)
        d, kv_type = self._net.decoder, self._net.kv_type
        needed = cache_bytes(d.caches, n, kv_type)
        needed += cache_bytes(d.source_caches, len(request.source or ()), kv_type)
        if given is not None:
            needed = max(needed, given.nbytes)
        return needed + (0 if drafting is None else drafting.nbytes(n))

    def _admit(self) -> None:
        """Let waiting requests join, in their order, while there is room for them."""
        usual = self.max_texts or MOST_TEXTS
        most = self._most or self.max_rows or min(usual, self._net.n_batch)
        with self._changed:
            ended = [r for r in self._waiting if r.ended]
            for r in ended:
                self._waiting.remove(r)
        for r in ended:
            r.finish()
        while len(self._running) < most and (request := self._next()) is not None:
            if self._running and self._held + self._needs(request) > self.max_bytes:
                return
            try:
                self._begin(request)
            except Exception as e:
                if self._running and isinstance(e, (DeviceError, MemoryError)):
                    return  # others hold the memory; it is tried again when they leave
                with self._changed:
                    self._waiting.remove(request)
                request.finish(e)
                continue
            with self._changed:
                self._waiting.remove(request)
                assert request.job is not None
                self._running.append(request)
            self._runs.append(request.job.run)
            if request.ended:  # no token was asked for
                self._leave(request)
                request.finish()

    def _next(self) -> Request | None:
        """The first waiting request that would not read what a running one is about to have read."""
        with self._changed:
            first = list(islice(self._waiting, MOST_TEXTS))
        return next((request for request in first if not self._is_being_read(request)), None)

    def _is_being_read(self, request: Request) -> bool:
        """Whether a running request is reading a beginning of this prompt, and will leave it in the tree."""
        if request.job is not None or not may_be_known(request) or not self._prefixes.max_bytes:
            return False
        for other in self._running:
            assert other.job is not None
            run = other.job.run
            alike = self._scales(other) == self._scales(request)
            if alike and run.reading and other.given_state is None and run.state.can_truncate:
                n = n_same(other.prompt_ids, request.prompt_ids)
                if run.state.n_past < n and n >= WORTH_WAITING:
                    other.job.due = min(other.job.due, n)
                    return True
        return False

    def _begin(self, request: Request) -> None:
        """Give a request a state: a first one, or a new one after it was set aside."""
        known = self._known(request)
        scales = self._scales(request)
        state = request.given_state or known
        state = state or self._net.new_state(request.n_ctx, scales, request.source)
        if request.job is None:
            t, n_read = self._model.tokenizer, known.n_past if known is not None else 0
            request.job = begin(
                t,
                self._net,
                state,
                request.prompt_ids,
                request.options,
                n_read,
                request.kept,
                request.given_state is not None,
                request,
            )
            if request.given_state is None:  # what the new state holds already was read for others
                request.n_cached = request.job.run.timings.n_reused
                request.job.keep_in(self._prefixes)
        else:
            request.job.run.resume(state, request.set_aside_ids[state.n_past :])
            request.set_aside_ids = []

    def _known(self, request: Request) -> State | None:
        """A state that has read the beginning of what a request has to read, if it may be used."""
        if not may_be_known(request):
            return None
        ids = request.set_aside_ids or request.prompt_ids
        return self._prefixes.find(ids, request.n_ctx, self._scales(request))

    def _scales(self, request: Request) -> tuple[float, ...]:
        """Each adapter's scale for a request."""
        scales = request.options.scales
        return self._net.adapters.scales if scales is None else scales

    def _fit(self) -> None:
        """Set the last requests aside while the running ones hold too much memory."""
        while (held := self._held) > self.max_bytes and self._set_last_aside():
            pass
        self._nbytes = held

    def _set_last_aside(self) -> bool:
        """Set the last request aside that can be; False if there is none, or only one is running."""
        can = [r for r in self._running if r.can_be_set_aside]
        if len(self._running) < 2 or not can:
            return False
        self._set_aside(can[-1])
        return True

    def _set_aside(self, request: Request) -> None:
        """Take a running request's memory; once there is room again, it goes on.

        What the tree of beginnings has room for is found there then, the rest is read again.
        """
        self._leave(request)
        assert request.job is not None
        self._prefixes.add(request.job.run.state)
        request.set_aside()
        with self._changed:
            self._waiting.appendleft(request)


def may_be_known(request: Request) -> bool:
    """Whether a request may go on from what was read for others."""
    begun = request.job is not None and request.job.run.n_generated > 0  # all is reported on
    return request.given_state is None and (begun or not request.options.reads_all)


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is messages; else a text, or ids."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def spoilt(request: Request) -> bool:
    """Whether a step ended in the middle of what a recurrent state sums up."""
    return request.job is not None and request.job.run.state.spoilt and request.can_be_set_aside


def refuse(number: int, options: Mapping[str, Any], deadline: float | None) -> None:
    """Raise ArgumentError for options of ``generate`` that have no meaning among other requests."""
    if options.get("tap") is not None or hook_of(number, None) is not None:
        raise ArgumentError("taps and patches see the rows of all requests; use Model.generate")
    if options.get("stream"):
        raise ArgumentError("stream: leave it out, and iterate over the request")
    if deadline is not None and not is_seconds(deadline):
        raise ArgumentError(f"deadline={deadline!r:.40}; expected seconds from now, or None")


def check_limit(name: str, value: object) -> None:
    """ArgumentError for a limit of an Engine that is no whole number, or too small."""
    least, may_be_none = LIMITS[name]
    if value is None and may_be_none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}={value!r:.40}; expected a whole number of at least {least}")
