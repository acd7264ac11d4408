"""A conversation as the protocols mean it, on its way to the engine; and its answers, told part by part."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat.tools import Delta, Reader
from ..chat.turn import Turn
from ..engine.completion import Completion
from ..engine.generate import Token
from ..engine.request import Request
from ..localdocs.answering import Quoting
from ..model import Model
from ..tokenizers import Tokenizer
from .errors import Refusal
from .fields import check_ids, check_size
from .pool import Pool, Served
from .texts import Asked, News, ask


@dataclass(kw_only=True)
class Conversation:
    """What is to be answered, and how."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True  # more than one call in an answer
    variables: Mapping[str, Any] = field(default_factory=dict)
    go_on: bool = False  # with the last message, which is the assistant's
    prefix_ids: Sequence[int] = ()
    max_tokens: int = -1
    n: int = 1
    streams: bool = False  # calls are told in parts, too
    documents: Quoting | None = None  # what may be quoted before the last message
    references: list[dict[str, Any]] | None = None  # to what was quoted, once `turn` has looked
    options: Callable[[Tokenizer], dict[str, Any]]
    fields: Mapping[str, str]  # the request's, by what the engine's errors call them

    def turn(self, model: Model, template: str | None) -> Turn:
        """The answer's turn, with the prompt's tokens; it may quote documents."""
        messages = self.messages
        if self.documents is not None:
            messages, self.references = self.documents.quote(
                messages, model, self.max_tokens, template
            )
        return model.turn(
            messages, template, self.tools, self.tool_choice, self.variables, self.go_on
        )


@dataclass
class Told:
    """News of an answer: what it adds to the message, and how the answer ended."""

    index: int
    deltas: list[Delta]
    tokens: Sequence[Token]
    whole: Completion | None = None


@dataclass
class Answers:
    """The answers to a conversation, being written."""

    asked: Asked
    conversation: Conversation
    voices: list[Voice]

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them, those of reasoning by themselves."""
        found = self.asked.usage
        found["completion_tokens_details"]["reasoning_tokens"] = sum(
            v.n_reasoning for v in self.voices
        )
        return found

    async def follow(self) -> AsyncIterator[Told]:
        """What is written, as it is written."""
        async for news in self.asked.follow():
            voice = self.voices[news.index]
            deltas = voice.hear(news)
            if not self.conversation.parallel and voice.reader.calls:
                self.asked.requests[news.index].cancel()
            yield Told(news.index, deltas, news.tokens, news.whole)

    async def whole(self) -> list[Completion]:
        """The finished answers, with their messages."""
        ends: dict[int, Completion] = {}
        async for told in self.follow():
            if told.whole is not None:
                ends[told.index] = replace(told.whole, message=self.voices[told.index].message)
        return [ends[i] for i in sorted(ends)]

    def finish(self, index: int, whole: Completion) -> str:
        """Why an answer ended, in OpenAI's words; one that was cut off may lack further calls."""
        reason = finish_of(whole)
        called = bool(self.voices[index].calls)
        return (
            "tool_calls"
            if called and not (reason == "length" and self.conversation.parallel)
            else reason
        )


async def answer(pool: Pool, name: str | None, c: Conversation) -> Answers:
    """Have a model answer a conversation.

    Raises
    ------
    Refusal, TinyLLMError
        It cannot be answered.
    """
    settings = pool.settings
    if len(c.messages) > settings.max_messages:
        most = settings.max_messages
        raise Refusal(
            400, f"{len(c.messages)} messages; at most {most}", param=c.fields["messages"]
        )
    check_size(c.tools, settings, "tools")
    voices: list[Voice] = []

    def submit(served: Served) -> Iterator[Request]:
        model = served.model
        turn = c.turn(model, settings.template)
        options = c.options(model.tokenizer)
        check_size(options.get("json_schema"), settings, c.fields["json_schema"])
        check_ids(list(options["logit_bias"] or ()), model, "logit_bias")
        check_ids(c.prefix_ids, model, "prefix_ids")
        options |= model.held_to_calls(turn, options)
        spells = bool(turn.functions) and not options.get("stop")
        for i in range(c.n):
            reader = turn.reader(tells_parts=c.streams)
            voices.append(Voice(reader, model.tokenizer, spells, c.parallel))
            yield served.engine.submit(
                [*turn.ids, *c.prefix_ids], c.max_tokens, **seeded(options, i)
            )

    asked = await ask(pool, name, submit, c.n, fields=c.fields)
    return Answers(asked, c, voices)


def seeded(options: dict[str, Any], i: int) -> dict[str, Any]:
    """The options of choice i: it draws from a seed of its own."""
    seed = options["seed"]
    return options if seed is None else {**options, "seed": (seed + i) % (1 << 64)}


FINISH = {"context": "length", "deadline": "length", "cancelled": "stop"}


def finish_of(end: Completion) -> str:
    """Why a text ended, in OpenAI's words."""
    return FINISH.get(end.finish_reason, end.finish_reason)


class Voice:
    """Hears one answer: splits its text into content, reasoning and calls.

    Parameters
    ----------
    reader : Reader
        What knows the model's marks.
    tokenizer : Tokenizer
        Spells control tokens, which may be marks, where ``spells``.
    spells : bool
        The text is made of the tokens, control tokens among them, not of the pieces.
    parallel : bool
        Whether more calls than the first count.
    """

    def __init__(self, reader: Reader, tokenizer: Tokenizer, spells: bool, parallel: bool) -> None:
        self.reader, self.tokenizer, self.spells = reader, tokenizer, spells
        self.parallel = parallel
        self.n_reasoning = 0
        self._n_begun = 0  # calls of which parts were told
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def hear(self, news: News) -> list[Delta]:
        """What the message gains."""
        text = self._spelled(news.tokens) if self.spells else news.piece
        thought = self.reader.thinks
        deltas = self.reader.feed(text) if text else []
        if self.reader.thinks:
            self.n_reasoning += len(news.tokens)
        elif thought:
            self.n_reasoning += self._n_before(news.tokens, "".join(d.content for d in deltas))
        self._n_begun = max([self._n_begun, *(d.part.index + 1 for d in deltas if d.part)])
        if news.whole is not None:
            deltas += self._last(cut=news.whole.finish_reason != "stop")
        if self.parallel:
            return deltas
        return [d for d in deltas if not self._is_further(d)]

    def _last(self, cut: bool) -> list[Delta]:
        """What the end adds; a call that was told in parts and is not whole is not told again as a text."""
        found = self.reader.finish(cut)
        cut_off = self._n_begun > len(self.reader.calls)
        return [d for d in found if not (cut_off and d.content)]

    def _is_further(self, delta: Delta) -> bool:
        """Whether it belongs to a call behind the first."""
        if delta.part is not None:
            return delta.part.index > 0
        return delta.call is not None and delta.call is not self.reader.calls[0]

    def _n_before(self, tokens: Sequence[Token], content: str) -> int:
        """How many tokens there are before the last ones, which spell a text."""
        left, n = len(content.encode()), len(tokens)
        while left > 0 and n > 0:
            n -= 1
            left -= len(self.tokenizer.token_bytes(tokens[n].id))
        return n

    def _spelled(self, tokens: Sequence[Token]) -> str:
        t, found = self.tokenizer, b""
        for token in tokens:
            if token.id not in t.eog:
                found += (
                    t.token_text(token.id).encode("utf-8", "replace")
                    if t.is_control(token.id)
                    else t.token_bytes(token.id)
                )
        return self._decoder.decode(found)

    @property
    def calls(self) -> list[Any]:
        """The calls so far."""
        return list(self.reader.calls) if self.parallel else list(self.reader.calls[:1])

    @property
    def message(self) -> dict[str, Any]:
        """The message so far."""
        message = dict(self.reader.message)
        if self.calls:
            message["tool_calls"] = self.calls
        return message
