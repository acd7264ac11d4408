"""What a model does with a conversation: answer it, and decide questions about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, overload

from .engine.completion import (
    Completion,
    GenerateOptions,
    Options,
    Pieces,
    asked_of,
    check_given,
    unread,
    without_end,
)
from .engine.embedding import BeforeStep, no_matter
from .errors import ArgumentError, ContextOverflow, TemplateError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .chat.render import Message
    from .chat.turn import Turn
    from .engine.constraint import Grammar, Schema
    from .engine.deciding import Decisions
    from .engine.prefixes import Prefixes
    from .models.network import Network
    from .models.state import State
    from .models.step import Tap
    from .tokenizers import Tokenizer


class Chatting(ABC):
    """The part of a ``Model`` that speaks in messages."""

    metadata: Mapping[str, Any]
    n_ctx: int
    prefixes: Prefixes  # what was read, for texts that begin alike

    @property
    @abstractmethod
    def network(self) -> Network:
        """The weights and their mathematics."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""

    @abstractmethod
    def grammar(
        self,
        json_schema: Schema | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Grammar | None:
        """What a text is held to."""

    @abstractmethod
    def _check_writes(self) -> None:
        """ArgumentError unless the model continues texts."""

    @abstractmethod
    def _write(
        self,
        prompts: Sequence[list[int]],
        asked: Options,
        state: State | None,
        tap: Tap | None,
        stream: bool,
        kept: int | None = None,
    ) -> list[Completion] | Pieces:
        """Continue prompts."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = ...,
        tools: Sequence[Any] | None = ...,
        tool_choice: str | Mapping[str, Any] = ...,
        template_vars: Mapping[str, Any] | None = ...,
        continue_final_message: bool = ...,
        *,
        max_tokens: int = ...,
        stream: Literal[False] = ...,
        **options: Unpack[GenerateOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = ...,
        tools: Sequence[Any] | None = ...,
        tool_choice: str | Mapping[str, Any] = ...,
        template_vars: Mapping[str, Any] | None = ...,
        continue_final_message: bool = ...,
        *,
        max_tokens: int = ...,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> Pieces: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = ...,
        tools: Sequence[Any] | None = ...,
        tool_choice: str | Mapping[str, Any] = ...,
        template_vars: Mapping[str, Any] | None = ...,
        continue_final_message: bool = ...,
        *,
        max_tokens: int = ...,
        stream: bool,
        **options: Unpack[GenerateOptions],
    ) -> Completion | Pieces: ...
    def chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        template_vars: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        *,
        max_tokens: int = 256,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Completion | Pieces:
        """Answer a conversation, in the form that the file's own chat template gives it.

        Parameters
        ----------
        messages : sequence of mapping
            ``{"role": "user" | "assistant" | "system" | ..., "content": str}``, oldest first. A content may
            also be parts, ``{"type": "text", "text": str}``, which are joined. Control tokens that a content
            spells are obeyed: take them out of what you do not trust.
        template : str, optional
            A Jinja template to use instead of the file's, or the name of a well-known one: "chatml", "llama2",
            "llama3", "mistral", "gemma", "phi3", "zephyr", "vicuna".
        tools : sequence, optional
            Functions that the model may call: ``{"type": "function", "function": {"name": ...,
            "description": ..., "parameters": a JSON schema}}``. The template must show them.
        tool_choice : str or mapping
            "auto": the model chooses; "none": no calls; "required": one or more; a function's name: that one.
            Calls keep to the functions' schemas, for which the extra ``[json]`` is needed; without it "auto"
            reads whatever the model writes. The ``message`` of the completion has the calls and the reasoning.
        template_vars : mapping, optional
            Further variables of the template, such as ``{"enable_thinking": False}``.
        continue_final_message : bool
            Go on with the last message, usually the assistant's, instead of opening a new turn.
        max_tokens, stream, **options
            What ``generate`` takes under these names. What a ``state`` holds already is not read again.

        Returns
        -------
        Completion, or Pieces (an iterator of str) with ``stream=True``

        Raises
        ------
        TemplateError
            The file has no template, or it refuses these messages.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> answer = m.chat([{"role": "user", "content": "Hello!"}], max_tokens=8, seed=1)
        """
        turn = self.turn(
            messages, template, tools, tool_choice, template_vars, continue_final_message
        )
        given: dict[str, Any] = {**options, **self.held_to_calls(turn, options)}
        state, tap = given.pop("state", None), given.pop("tap", None)
        self._check_writes()
        check_given(state, tap)
        asked = asked_of(self, max_tokens, state, given)  # type: ignore[arg-type]
        ids, kept = unread(turn.ids, state)
        answer = self._write([ids], asked, state, tap, stream, kept)
        if not isinstance(answer, Pieces):
            return self.answered(turn, answer[0])
        answer.finished = partial(self.answered, turn)
        return answer

    def answered(self, turn: Turn, done: Completion) -> Completion:
        """A turn's completion, with the answer as a ``message``."""
        cut = done.finish_reason != "stop"
        return replace(done, message=turn.message(self.tokenizer, done.ids, done.text, cut))

    def turn(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        template_vars: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> Turn:
        """What ``chat`` reads for a conversation, and how it understands the answer; its arguments."""
        from .chat.render import (
            check_variables,
            given_template,
            pick_template,
            plain_messages,
        )
        from .chat.turn import Turn

        messages = plain_messages(messages)
        check_variables({} if template_vars is None else template_vars)
        given = template is not None
        chosen = pick_template(self.metadata) if template is None else given_template(template)
        if chosen is None:
            raise TemplateError(
                "the file has no chat template; give one: template=, or --chat-template"
            )
        turn = Turn(chosen, messages, tools or (), tool_choice, template_vars or {})
        t = self.tokenizer
        ids = turn.read(t, t.bos, t.eos, must_show=given, continue_final=continue_final_message)
        turn.ids = without_end(t, ids)
        turn.end = t.decode(turn.ids[-24:])
        return turn

    def decide(
        self,
        given: str | Sequence[Message],
        questions: Sequence[Mapping[str, Any]],
        template: str | None = None,
        template_vars: Mapping[str, Any] | None = None,
        before_step: BeforeStep = no_matter,
    ) -> Decisions:
        """Answer questions about a text or a conversation with probabilities, without writing a word.

        The input is read once, and all questions together behind it, each as if it were asked alone: on
        ``cpu``, to the bit.

        Parameters
        ----------
        given : str or sequence of mapping
            A text, or messages as ``chat`` takes them.
        questions : sequence of mapping
            1 to 400, each with "instructions" and perhaps a "name".
            {"type": "predicate"}: a statement; perhaps with "criteria" {"true": ..., "false": ...}.
            {"type": "choice", "choices": [...]}: 2 to 255 values, or {"value": ..., "description": ...}.
            {"type": "score", "levels": [...]}: 2 to 10 labels from low to high, or {"label": ...,
            "description": ...}.
        template, template_vars
            As ``chat`` has them; ``enable_thinking`` is off unless given. A model without a template reads
            the text and the question one after the other.
        before_step : callable
            Called before each step; what it raises ends the work.

        Returns
        -------
        Decisions
            Its ``answers`` are in the order of the questions.

        Raises
        ------
        ArgumentError
            A question is malformed, or has more options than the vocabulary tells apart.
        TemplateError
            The template opens the model's reasoning, so that no option can come next.
        ContextOverflow
            The input and a question are longer than the context.

        Examples
        --------
        >>> import tinyllm
        >>> m = tinyllm.load()
        >>> complains = {"type": "predicate", "instructions": "It is a complaint."}
        >>> found = m.decide("I was charged twice.", [complains])
        >>> 0 < found.answers[0]["probability"] < 1
        True
        """
        from .chat.questions import labels_of, questions_of
        from .engine.deciding import Decisions, shares
        from .engine.request import Usage

        self._check_writes()
        if isinstance(given, (bytes, Mapping)) or not isinstance(given, Sequence):
            raise ArgumentError(
                f"given is {type(given).__name__} {given!r:.40}; expected a text, or a chat's messages"
            )
        asked = questions_of(questions)
        labels, spelled = labels_of(self.tokenizer, max(len(q.options) for q in asked))
        texts = [self._question_ids(given, q.text(labels), template, template_vars) for q in asked]
        options = [spelled[: len(q.options)] for q in asked]
        try:
            found, mass, n, n_known = shares(
                self.network, texts, options, self.n_ctx, self.prefixes, before_step
            )
        except ContextOverflow as e:
            raise ContextOverflow(e.found, "Load with a larger n_ctx, or ask about less") from None
        answers = [q.answer(p) for q, p in zip(asked, found, strict=True)]
        return Decisions(answers, mass, Usage(n, 0, n_known))

    def _question_ids(
        self,
        given: str | Sequence[Message],
        question: str,
        template: str | None,
        template_vars: Mapping[str, Any] | None,
    ) -> list[int]:
        """What is read before the answer to one question."""
        from .chat.render import asked_last, pick_template

        if template is None and pick_template(self.metadata) is None:
            if not isinstance(given, str):
                raise TemplateError(
                    "the file has no chat template; give a text, or a template: template=, or --chat-template"
                )
            return without_end(
                self.tokenizer, self.tokenizer.encode(f"{given}\n\n{question}\nAnswer:")
            )
        variables = {"enable_thinking": False, **(template_vars or {})}
        turn = self.turn(asked_last(given, question), template, template_vars=variables)
        if turn.thinks():
            raise TemplateError(
                "the template opens the model's reasoning; turn it off with template_vars"
            )
        return turn.ids

    def held_to_calls(self, turn: Turn, options: Mapping[str, Any]) -> GenerateOptions:
        """The constraint under which a turn's calls are written; none where nothing may be called."""
        from .chat.tools import parameters_of

        if not turn.functions or (turn.choice == "auto" and find_spec("llguidance") is None):
            return {}
        held = [k for k in ("json_schema", "regex", "grammar") if options.get(k) is not None]
        if held:
            raise ArgumentError(
                f"{held[0]} and tools are given; with tool_choice='none' one may be"
            )
        marks = self.tokenizer.special_tokens, self.tokenizer.eog
        grammar, wrong = turn.grammar(*marks), ""
        if grammar is not None:
            try:
                self.grammar(grammar=grammar)
                return {"grammar": grammar}
            except ArgumentError as error:
                wrong = str(error).removeprefix("grammar: ")
        for place, function in turn.places():  # which tool is it
            try:
                self.grammar(json_schema=parameters_of(function))
                if wrong:  # calls are held to more: no arguments but those that are named
                    self.grammar(grammar=turn.grammar(*marks, [function]))
            except ArgumentError as error:
                reason = str(error).removeprefix("json_schema: ").removeprefix("grammar: ")
                raise ArgumentError(
                    f"tools[{place}]: the parameters of {function['name']}: {reason}"
                ) from None
        if wrong:
            raise ArgumentError(f"tools: {wrong}")
        return {}
