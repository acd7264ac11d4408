"""What a model does with each text of a table. A result depends on its own text, not on those beside it."""

from __future__ import annotations

import json
import queue
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal, TypeVar

from ..engine.completion import options_of
from ..engine.request import Request
from ..engine.scheduler import MOST_TEXTS, Engine
from ..engine.scoring import logprobs
from ..errors import ArgumentError, ContextOverflow
from ..model import Model

Tag = TypeVar("Tag")
Kind = Literal["text", "integer", "number", "vector"]
Result = dict[str, Any]
ERROR = "error"
OF_THE_MODEL = ("json_schema", "regex", "grammar", "speculate", "lora")  # checked with it
STEPS = 2  # about so many seconds of work are done between two reports


def pairs(texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, str]]:
    """Tags and texts as they come; ArgumentError for anything else."""
    for pair in texts:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], str)):
            raise ArgumentError(f"run got {pair!r:.60}; expected pairs of a tag and a text")
        yield pair


class Task(ABC):
    """Work on texts by one model. Each result has the ``columns``, whose values are None beside an ``error``.

    Parameters
    ----------
    model : Model
        It stays the caller's, to close.
    """

    columns: ClassVar[Mapping[str, Kind]]

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def check(cls, *args: Any, **options: Any) -> None:
        """Raise ArgumentError, or TypeError for an unknown name, for options that it has with no model."""
        if args or options:
            raise TypeError(f"{cls.__name__} takes no options, but got {args or options!r:.60}")

    @abstractmethod
    def run(self, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, Result]]:
        """The result of each text, with the tag that came with it, in the order in which they are done.

        A text that does not fit into the model's context gets an ``error``; other errors end the work:
        ArgumentError where something else than a pair of a tag and a text is given.
        """

    def _failed(self, error: Exception | str) -> Result:
        """The result of a text that could not be worked on."""
        return {**dict.fromkeys(self.columns), ERROR: " ".join(str(error).split())}

    def _batches(
        self, texts: Iterable[tuple[Tag, str]], parse_special: bool, limit: int
    ) -> Iterator[tuple[list[tuple[Tag, list[int]]], list[tuple[Tag, Result]]]]:
        """Texts as ids, about ``STEPS`` seconds' work together, and the results of those that do not fit."""
        batch: list[tuple[Tag, list[int]]] = []
        wrong: list[tuple[Tag, Result]] = []
        n = 0
        for tag, text in pairs(texts):
            ids = self.model.tokenizer.encode(text, parse_special=parse_special)
            if 0 < len(ids) <= limit:
                batch.append((tag, ids))
                n += len(ids)
            else:
                message = f"the text has {len(ids)} tokens; the model takes 1 to {limit}"
                wrong.append((tag, self._failed(message)))
            if n >= STEPS * self.model.network.n_batch:
                yield batch, wrong
                batch, wrong, n = [], [], 0
        if batch or wrong:
            yield batch, wrong


class Embed(Task):
    """Embeddings: ``embedding``, float32 [n_embd], as ``Model.embed`` has it."""

    columns: ClassVar[Mapping[str, Kind]] = {"embedding": "vector", ERROR: "text"}

    def __init__(self, model: Model, pooling: str | None = None, normalize: bool = True) -> None:
        super().__init__(model)
        self.check(pooling, normalize)
        self.pooling, self.normalize = pooling, normalize

    @classmethod
    def check(cls, pooling: str | None = None, normalize: bool = True) -> None:
        if pooling not in (None, "mean", "cls", "last"):
            raise ArgumentError(f"pooling={pooling!r:.40}; expected 'mean', 'cls' or 'last'")

    def run(self, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, Result]]:
        for batch, wrong in self._batches(texts, True, self.model.config.n_ctx_train):
            yield from wrong
            ids = [ids for _, ids in batch]
            found = self.model.embed_batch(ids, self.pooling, self.normalize)
            for (tag, _), vector in zip(batch, found, strict=True):
                yield tag, {"embedding": vector, ERROR: None}


class Score(Task):
    """How likely the model finds a text: ``logprob``, the sum over its ``n_scored`` tokens of ln(probability).

    A text is encoded as ``perplexity`` does it: special tokens in it are just text. Its first token has none
    before it, so it is not scored; where the vocabulary puts one for the beginning there, all of the text is.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "logprob": "number",
        "n_scored": "integer",
        ERROR: "text",
    }

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        if not model.config.causal:
            raise ArgumentError(f"{model.arch} is an encoder and scores no text; embed it")

    def run(self, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, Result]]:
        n_ctx = self.model.n_ctx
        for batch, wrong in self._batches(texts, False, n_ctx):
            yield from wrong
            found = logprobs(self.model.network, [ids for _, ids in batch], n_ctx)
            for (tag, _), each in zip(batch, found, strict=True):
                yield tag, {"logprob": float(each.sum()), "n_scored": len(each), ERROR: None}


class Generate(Task):
    """Texts that go on from each text, or answer it: ``completion`` and ``finish_reason``.

    Parameters
    ----------
    model : Model
        A decoder.
    chat : bool
        Answer the text as a user's message, in the model's chat template.
    system : str, optional
        A message before it; it implies ``chat``.
    max_tokens, **options
        What ``Engine.submit`` takes. ``seed`` is 0 unless given: each text draws from random numbers of its
        own, so that its result is the one it has alone.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "completion": "text", "finish_reason": "text", "n_prompt": "integer",
        "n_completion": "integer", ERROR: "text",
    }  # fmt: skip

    def __init__(
        self,
        model: Model,
        max_tokens: int = 256,
        chat: bool = False,
        system: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model)
        self.check(max_tokens, chat, system, **options)
        self.options = {"seed": 0, **options, "max_tokens": max_tokens}
        self.chat, self.system = chat or system is not None, system

    @classmethod
    def check(
        cls, max_tokens: int = 256, chat: bool = False, system: str | None = None, **options: Any
    ) -> None:
        others = {*signature(Engine.submit).parameters, *OF_THE_MODEL}
        options_of(max_tokens, **{n: x for n, x in options.items() if n not in others})

    def run(self, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, Result]]:
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        running: dict[int, tuple[Tag, Request]] = {}
        with Engine(self.model) as engine:
            for number, (tag, text) in enumerate(pairs(texts)):
                try:
                    request = engine.submit(self._prompt(text), **self.options)
                except ContextOverflow as error:
                    yield tag, self._failed(error)
                    continue
                running[number] = tag, request
                request.listen(partial(tell, request, number, ended))
                tell(request, number, ended)  # it may have ended before
                while len(running) >= 2 * MOST_TEXTS or not ended.empty():
                    yield from self._take(ended.get(), running)
            while running:
                yield from self._take(ended.get(), running)

    def _take(
        self, number: int, running: dict[int, tuple[Tag, Request]]
    ) -> Iterator[tuple[Tag, Result]]:
        """The result of a request that has ended, once."""
        if number not in running:
            return
        tag, request = running.pop(number)
        done = request.result()
        yield tag, {
            "completion": done.text, "finish_reason": done.finish_reason,
            "n_prompt": len(done.prompt_ids), "n_completion": len(done.ids), ERROR: None,
        }  # fmt: skip

    def _prompt(self, text: str) -> str | list[dict[str, str]]:
        """What the engine is given for a text."""
        if not self.chat:
            return text
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": text}]


def tell(request: Request, number: int, ended: queue.SimpleQueue[int]) -> None:
    """Name a request that has ended."""
    if request.done:
        ended.put(number)


class Decide(Task):
    """Answers to questions about each text, as ``Model.decide`` has them.

    ``answers`` is JSON: a list of objects in the order of the questions, each with the ``mass`` of its options.
    """

    columns: ClassVar[Mapping[str, Kind]] = {"answers": "text", ERROR: "text"}

    def __init__(self, model: Model, questions: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(model)
        self.check(questions)
        self.questions = questions

    @classmethod
    def check(cls, questions: Sequence[Mapping[str, Any]]) -> None:
        from ..chat.questions import questions_of

        questions_of(questions)

    def run(self, texts: Iterable[tuple[Tag, str]]) -> Iterator[tuple[Tag, Result]]:
        for tag, text in pairs(texts):
            try:
                found = self.model.decide(text, self.questions)
            except ContextOverflow as error:
                yield tag, self._failed(error)
                continue
            answers = [
                {**answer, "mass": mass}
                for answer, mass in zip(found.answers, found.mass, strict=True)
            ]
            yield tag, {"answers": json.dumps(answers, ensure_ascii=False), ERROR: None}
