"""A conversation with a model: its messages, the model's state of them, and their file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.render import chat_ids
from ..engine.generate import Timings
from ..errors import ArgumentError, TinyLLMError
from ..files import read_text, replacing

if TYPE_CHECKING:
    from ..model import Model

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
ANSWER_SHARE = 4  # a prompt leaves at least 1 / 4 of the context to the answer


@dataclass
class Conversation:
    """Messages, and the model's state of them; turns of user and assistant alternate."""

    model: Model
    template: str
    max_tokens: int = -1
    seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    timings: list[Timings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = self.model.new_state()

    @property
    def first(self) -> int:
        """Where the turns begin: after the system message, if there is one."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    @property
    def system(self) -> str:
        return self.messages[0]["content"] if self.first else ""

    @system.setter
    def system(self, text: str) -> None:
        self.messages[: self.first] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        del self.messages[self.first :]

    def n_tokens(self) -> int:
        """Tokens of the prompt that the messages make."""
        t = self.model.tokenizer
        return len(chat_ids(t, self.template, self.messages, bos_id=t.bos, eos_id=t.eos))

    def fit(self) -> int:
        """Drop the oldest turns until an answer has room; returns how many went."""
        share = self.state.n_ctx // ANSWER_SHARE
        room = self.state.n_ctx - (share if self.max_tokens < 0 else min(share, self.max_tokens))
        dropped = 0
        while len(self.messages) > self.first + 2 and self.n_tokens() > room:
            del self.messages[self.first : self.first + 2]
            dropped += 1
        return dropped

    def say(self, text: str, show: Callable[[str], None]) -> bool:
        """Put a message and show its answer; False if Ctrl-C stopped it.

        What was shown stays in the conversation; a message without an answer does not.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            self._answer(pieces, show)
        except KeyboardInterrupt:
            return False
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()
        return True

    def _answer(self, pieces: list[str], show: Callable[[str], None]) -> None:
        """Stream the answer into ``pieces``; an answer, even a stopped one, adds its timings."""
        stream = self.model.chat(
            self.messages, self.template, state=self.state, stream=True,
            max_tokens=self.max_tokens, seed=self._next_seed(), **self.options,
        )  # fmt: skip
        try:
            with closing(stream):
                for piece in stream:
                    pieces.append(piece)
                    show(piece)
            pieces.append("")  # the model may end at once: an empty answer is an answer
        finally:
            if pieces:
                self.timings.append(stream.completion.timings)

    def _next_seed(self) -> int | None:
        """A seed of its own for each answer, so that one written again differs."""
        return None if self.seed is None else self.seed + len(self.timings)

    @property
    def full(self) -> bool:
        """Whether the last answer ended because the context had no room for another token."""
        return len(self.state.ids) >= self.state.n_ctx

    def again(self, answer: Callable[[str], None]) -> None:
        """Have ``answer`` say the last message again; the old answer stays if there is no new one."""
        turn = self.messages[max(self.first, len(self.messages) - 2) :]
        if not turn:
            raise ArgumentError("there is no answer yet to write again")
        del self.messages[-2:]
        n_answers = len(self.timings)
        try:
            answer(turn[0]["content"])
        finally:
            if len(self.timings) == n_answers:
                self.messages.extend(turn)


# ---- files


def save(messages: Sequence[Message], path: Path) -> None:
    """Write messages as JSON; an older file stays whole until the new one is written."""
    with replacing(path) as file:
        file.write((json.dumps(messages, ensure_ascii=False, indent=1) + "\n").encode())


def load(path: Path) -> list[Message]:
    """The messages that ``save`` wrote.

    Raises
    ------
    TinyLLMError
        The file is no list of messages in which user and assistant take turns.
    """
    try:
        messages = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise TinyLLMError(f"{path}: expected a conversation in JSON ({e})") from None
    if not isinstance(messages, list):
        raise TinyLLMError(f"{path}: {type(messages).__name__}; expected a list of messages")
    for i, message in enumerate(messages):
        check_message(message, f"{path}: message {i + 1}")
    check_turns([m["role"] for m in messages], path)
    return messages


def check_message(message: object, where: str) -> None:
    """Raise TinyLLMError unless a message has a role and a content, both texts that can be written."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise TinyLLMError(f'{where} is not {{"role": ..., "content": ...}}')
    if message["role"] not in ROLES:
        raise TinyLLMError(
            f"{where} has the role {message['role']!r:.40}; expected one of {', '.join(ROLES)}"
        )
    content = message["content"]
    if not isinstance(content, str) or any("\ud800" <= c <= "\udfff" for c in content):
        raise TinyLLMError(f"{where} has a content that is not a text")


def check_turns(roles: Sequence[str], path: Path) -> None:
    turns = list(roles[1:] if roles[:1] == ["system"] else roles)
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise TinyLLMError(
            f"{path}: expected a system message or none, then user and assistant in turns"
        )
