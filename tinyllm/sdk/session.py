"""A chat session: its messages, and the tokens of them that the model has read."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError, TemplateError
from ..files import replacing
from .templates import MessageType, Template

if TYPE_CHECKING:
    from ..models.state import State
    from .llmodel import LLModel

MAX_HISTORY_BYTES = 64 << 20


@dataclass
class ChatSession:
    """Messages and the model's state after them; used by the thread that opened it."""

    template: Template
    history: list[MessageType]
    state: State | None = None
    stream: Generator[str, None, None] | None = None
    running: bool = False

    def begin(self, prompt: str, model: LLModel) -> str:
        """Add the user's message; the whole conversation's text.

        When the template refuses, or the message is too long, the history is as it was.
        """
        self.end_stream()
        prompt.encode()  # GPT4All's errors: AttributeError for what is no text, UnicodeEncodeError
        self.history.append({"role": "user", "content": prompt})
        try:
            whole = self.template.render(self.history, model.special_tokens_map)
            model.check_length(self._last_turn(model, whole))
            self.state = self.state or model.new_state()
        except BaseException:
            self.take_back()
            raise
        return whole

    def _last_turn(self, model: LLModel, whole: str) -> str:
        """The last message's text alone, or all of it where the template refuses to cut it short."""
        with suppress(TemplateError):
            return self.template.render(self.history[-1:], model.special_tokens_map)
        return whole

    def take_back(self) -> None:
        """Remove the user's message at the end: nothing was answered."""
        if self.history and self.history[-1]["role"] == "user":
            self.history.pop()

    @contextmanager
    def turn(self, parts: list[str]) -> Iterator[None]:
        """While an answer comes, its parts being collected; then it is a message.

        An answer that was interrupted is one too, as far as it came.
        """
        self.running = True
        try:
            yield
        except BaseException:
            if parts:
                self._add_answer(parts)
            else:
                self.take_back()
            raise
        else:
            self._add_answer(parts)
        finally:
            self.running = False

    def _add_answer(self, parts: list[str]) -> None:
        self.history.append({"role": "assistant", "content": "".join(parts)})

    def end_stream(self) -> None:
        """End the answer that is still being streamed, if there is one."""
        state = None if self.stream is None else inspect.getgeneratorstate(self.stream)
        if self.running and state != inspect.GEN_SUSPENDED:
            raise RuntimeError("this chat session is answering already; wait until it has")
        if state == inspect.GEN_CREATED:  # nobody began to read it
            self.take_back()
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    # files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and state to one file, atomically."""
        with (
            replacing(path) as whole,
            tempfile.TemporaryDirectory(dir=Path(path).resolve().parent) as folder,
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
        self.end_stream()
        try:
            history, state = self._read(Path(path), model)
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise StateError(f"{path}: not a saved session ({error})") from error
        self.history[:], self.state = history, state

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
