"""Chat sessions: their messages, what the model has read of them, and which code is inside which session."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import system
from ..errors import StateError, TemplateError
from ..files import replacing
from .answering import room_for_prompt
from .templates import MessageType, Template

if TYPE_CHECKING:
    from threading import RLock

    from ..localdocs.answering import Quoting
    from ..models.state import State
    from .llmodel import LLModel
    from .names import ResponseCallbackType

MAX_HISTORY_BYTES = 64 << 20
ANSWERING = "this chat session is answering already; wait until it has"
OVERTAKEN = (
    "this answer was ended by a later message of its chat session; read an answer to its end, or close it,"
    " before the next message"
)


@dataclass
class Turn:
    """A text to be answered, the state that goes on with it if there is one, and the answer's parts so far."""

    text: str
    state: State | None = None
    parts: list[str] = field(default_factory=list)

    def noting(self, callback: ResponseCallbackType) -> ResponseCallbackType:
        """Wrap a callback so that each part of the answer is noted before it is called."""

        def note(token_id: int, response: str) -> bool:
            self.parts.append(response)
            return callback(token_id, response)

        return note


@contextmanager
def alone(prompt: str, model: LLModel) -> Iterator[Turn]:
    """A text to be continued outside of any session."""
    model.check_length(prompt)
    yield Turn(prompt)


@dataclass
class ChatSession:
    """Messages, and the model's state after them; any thread may use it, one answer at a time.

    ``read`` is what the messages were when the model last answered: whatever differs from it is still to be
    read.
    """

    template: Template
    history: list[MessageType]
    documents: Quoting | None = None
    references: list[dict[str, Any]] = field(default_factory=list)
    state: State | None = None
    read: list[MessageType] = field(default_factory=list)
    _stream: Generator[str, None, None] | None = None
    _lock: RLock = field(default_factory=threading.RLock)
    _answering: bool = False
    _warned: bool = False

    # ---- answers

    @contextmanager
    def turn(self, prompt: str, model: LLModel) -> Iterator[Turn]:
        """Add the user's message and, when the block ends, the answer whose parts it noted.

        What was written of an interrupted answer counts as the answer. Without any, the message is taken out
        again, or the next call would fail too.
        """
        with self._alone():
            self._end_stream()
            with self._turn(prompt, model) as turn:
                yield turn

    def stream(
        self, prompt: str, model: LLModel, write: Callable[[Turn], Iterator[str]]
    ) -> Generator[str, None, None]:
        """Give the pieces that ``write`` gives of an answer; the turn begins when the first is asked for.

        Other threads may use the session between two pieces. If they send a message of their own, this answer
        has ended, and asking for its next piece is an error.
        """
        pieces = self._pieces(prompt, model, write)
        with self._alone():
            self._end_stream()
            self._stream = pieces
        try:
            while True:
                with self._alone():
                    if self._stream is not pieces:
                        raise RuntimeError(OVERTAKEN)
                    try:
                        piece = next(pieces)
                    except BaseException as error:
                        self._stream = None
                        if isinstance(error, StopIteration):
                            return
                        raise
                yield piece
        finally:
            if self._stream is pieces:
                with self._alone():
                    self._end_stream()

    def _pieces(
        self, prompt: str, model: LLModel, write: Callable[[Turn], Iterator[str]]
    ) -> Generator[str, None, None]:
        with self._turn(prompt, model) as turn:
            yield from write(turn)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the answer that another thread is computing; refuse one inside of its own callback."""
        with self._lock:
            if self._answering:
                raise RuntimeError(ANSWERING)
            self._answering = True
            try:
                yield
            finally:
                self._answering = False

    def _end_stream(self) -> None:
        """End the answer that is still being streamed, if there is one; it stays as far as it came."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @contextmanager
    def _turn(self, prompt: str, model: LLModel) -> Iterator[Turn]:
        message = {"role": "user", "content": prompt}
        text = self.check(prompt, model)
        self.history.append(message)
        parts: list[str] = []
        try:
            self.state = self.state or model.new_state()
            yield Turn(text, self.state, parts)
        except BaseException:
            if parts:
                self._add_answer(parts)
            elif self.history[-1:] == [message]:
                self.history.pop()
            raise
        self._add_answer(parts)
        self._warn_if_forgotten(text, model)

    def _add_answer(self, parts: list[str]) -> None:
        self.history.append({"role": "assistant", "content": "".join(parts)})
        self.read = [dict(m) for m in self.history]

    # ---- what the model reads

    def check(self, prompt: str, model: LLModel) -> str:
        """The conversation's text with the user's next message; nothing is changed.

        Raises
        ------
        TemplateError
            The template refuses the messages.
        ValueError
            What the model has not read yet is longer than the context.
        """
        prompt.encode()  # GPT4All's errors: AttributeError for what is no text, UnicodeEncodeError
        messages = [*self.history, {"role": "user", "content": prompt}]
        tokens = model.special_tokens_map
        text = self.template.render(messages, tokens)
        model.check_length(self._rendered(messages[-1:], text, tokens))
        same = (m == r for m, r in zip(messages, self.read, strict=False))
        n_read = sum(itertools.takewhile(bool, same))
        if n_read < len(messages) - 1:
            self._check_unread(self._rendered(messages[n_read:], text, tokens), model)
        return text

    @staticmethod
    def _check_unread(text: str, model: LLModel) -> None:
        n, limit = model.count_prompt_tokens(text), room_for_prompt(model.n_ctx)
        if n > limit:
            raise ValueError(
                f"the chat session has {n} tokens that the model has not read yet, system message and history"
                f" included; the context has room for {limit}: {n - limit} too many. Shorten them, or load the"
                " model with a larger n_ctx"
            )

    def _rendered(self, messages: list[MessageType], text: str, tokens: dict[str, str]) -> str:
        """These messages' text alone, or the whole where the template refuses to cut it short."""
        with suppress(TemplateError):
            return self.template.render(messages, tokens)
        return text

    def _warn_if_forgotten(self, text: str, model: LLModel) -> None:
        """Say once that the context was full, when the system message was among what it lost."""
        if self._warned or self.state is None or self.history[0]["role"] != "system":
            return
        ids, kept = model.prompt_ids(text), self.state.ids
        n = min(len(ids), len(kept))
        if ids[:n] != kept[:n]:
            self._warned = True
            warnings.warn(
                f"the conversation has outgrown the context of {self.state.n_ctx} tokens: its beginning,"
                " the system message included, is forgotten. Load the model with a larger n_ctx",
                stacklevel=2,
            )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and state to one file, atomically."""
        with (
            self._alone(),
            replacing(path) as whole,
            tempfile.TemporaryDirectory(dir=system.expanded(path).resolve().parent) as folder,
            zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr("history.json", json.dumps(self.history))
            if self.state is not None:
                self.state.save(Path(folder) / "state.npz")
                archive.write(Path(folder) / "state.npz", "state.npz")

    def load(self, path: str | os.PathLike[str], model: LLModel) -> None:
        """Take over the conversation that `save` wrote, under the template in use here.

        Raises
        ------
        StateError
            The file is no saved session, is damaged, or belongs to another model.
        """
        with self._alone():
            try:
                history, state = self._read(system.expanded(path), model)
            except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
                raise StateError(f"{path}: not a saved session ({error})") from error
            self._end_stream()
            self.history[:], self.state = history, state
            self.read = [dict(m) for m in history]

    def _read(self, path: Path, model: LLModel) -> tuple[list[MessageType], State | None]:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            stored = {info.filename: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in stored.values()):
                raise ValueError("compressed entries")
            if stored["history.json"].file_size > MAX_HISTORY_BYTES:
                raise ValueError(f"a history of {stored['history.json'].file_size} bytes")
            history = checked_history(json.loads(archive.read("history.json")))
            if "state.npz" not in stored:
                return history, None
            state = model.new_state()
            state.restore(archive.extract("state.npz", folder))
            return history, state


def checked_history(messages: Any) -> list[MessageType]:
    """Messages of a file, if they are a list of texts by role."""
    good = isinstance(messages, list) and all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    if not good:
        raise ValueError("its history is not a list of messages")
    return [dict(m) for m in messages]


# ---- which session the running code is in


@dataclass(frozen=True)
class _Place:
    """The sessions that a thread or asyncio task entered; none with a number up to ``before`` is its own."""

    entered: tuple[int, ...] = ()
    before: int = 0


_places: ContextVar[dict[int, _Place]] = ContextVar("tinyllm.sdk.sessions", default={})  # noqa: B039
_numbers = itertools.count(1)  # numbers that models and sessions get


class Sessions:
    """A model's open chat sessions.

    Code is in the session that its thread or asyncio task entered last, and in none entered by another while
    it had one. Code that never entered one, such as a worker thread, is in the session that is open, as
    with GPT4All; with several to choose from it has to say which, and `current` raises.

    Parameters
    ----------
    private : bool
        Code is only ever in sessions that it entered itself.
    """

    def __init__(self, private: bool = False) -> None:
        self._private, self._number = private, next(_numbers)
        self._open: dict[int, tuple[ChatSession, _Place]] = {}

    def begin(self, session: ChatSession) -> int:
        """Open a session, and enter it; the number with which to `end` it."""
        number, place = next(_numbers), self._place
        self._open[number] = session, place
        self._set_place(_Place((*place.entered, number), place.before))
        return number

    def end(self, number: int) -> None:
        """Close exactly this session, wherever it was opened; closing it again does nothing."""
        self._open.pop(number, None)
        place = self._place
        if number in place.entered:
            rest = tuple(n for n in place.entered if n != number)
            others = _Place(rest, next(_numbers)) if rest or self._open else None
            self._set_place(others)

    @property
    def current_number(self) -> int | None:
        """The number of the session that the running code is in.

        Raises
        ------
        RuntimeError
            Several are open, and the running code entered none of them.
        """
        place, sessions = self._place, dict(self._open)
        for number in reversed(place.entered):
            if number in sessions:
                return number
        outer = {n for _, p in sessions.values() for n in p.entered}
        others = [n for n in sessions if n > place.before and n not in outer]
        if self._private or not others:
            return None
        if len(others) > 1:
            raise RuntimeError(
                f"{len(others)} chat sessions of this model are open, and this thread or task entered none of"
                " them. Carry the context over (asyncio.to_thread does, contextvars.copy_context().run too),"
                " or load the model with private_sessions=True to be in none"
            )
        return others[0]

    @property
    def current(self) -> ChatSession | None:
        """The session that the running code is in, or None; RuntimeError if that is not clear."""
        number = self.current_number
        found = None if number is None else self._open.get(number)
        return None if found is None else found[0]

    @property
    def _place(self) -> _Place:
        return _places.get().get(self._number, _Place())

    def _set_place(self, place: _Place | None) -> None:
        places = {number: p for number, p in _places.get().items() if number != self._number}
        _places.set(places if place is None else {**places, self._number: place})
