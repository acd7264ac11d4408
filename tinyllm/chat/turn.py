"""One turn of a conversation with tools: what the template is shown, what may be written, what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ArgumentError, TemplateError
from .calling import grammar_of_calls
from .render import ChatTokenizer, Message, chat_ids, render
from .tools import Habits, Reader, for_template, functions_of, habits_of, thinking_of

CHOICES = ("auto", "none", "required")


class Turn:
    """The answer that a conversation asks for.

    Parameters
    ----------
    template : str
        Jinja source.
    given : sequence of mapping
        The conversation's messages.
    tools : sequence
        OpenAI's descriptions of functions.
    tool_choice : str or mapping
        "auto", "none", "required", a function's name, or OpenAI's mapping
        ``{"type": "function", "function": {"name": ...}}``.
    variables : mapping
        Further variables of the template.

    Raises
    ------
    ArgumentError
        A tool or the choice is malformed, or the choice names no tool.
    TemplateError
        The template shows no tools, or not the conversation's calls or their results; or a call is required and
        the form of its calls is not known.
    """

    def __init__(
        self,
        template: str,
        given: Sequence[Message],
        tools: Sequence[Any],
        tool_choice: str | Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> None:
        self.ids: list[int] = []  # the prompt
        self.end = ""  # the text of its last tokens
        self._template, self._variables = template, variables
        self._offered = offered = functions_of(tools)
        self.choice = _name_of(tool_choice, [f["name"] for f in offered])
        self.functions = [] if self.choice == "none" else offered
        self.shown = list(tools) if self.functions else None
        past = [c for m in given if isinstance(m, Mapping) for c in m.get("tool_calls") or ()]
        self.n_before = len(past)
        self.habits = Habits(None, thinking_of(template))
        if self.functions or past:
            self.habits = habits_of(template)
        self.messages = for_template(given, self.habits)
        if self.habits.form is None:
            self._check_past()
            if self.functions:
                self._check_shown()
        if not self.functions:
            self.habits = Habits(None, self.habits.thinking)
        elif self.choice not in CHOICES:
            self.functions = [f for f in offered if f["name"] == self.choice]

    def read(
        self, tokenizer: ChatTokenizer, bos_id: int | None, eos_id: int | None, **how: bool
    ) -> list[int]:
        """The prompt's tokens; ``how`` goes to `chat_ids`."""
        return chat_ids(
            tokenizer, self._template, self.messages, bos_id=bos_id, eos_id=eos_id,
            **{**how, "tools": self.shown, **self._variables},
        )  # fmt: skip

    def _check_past(self) -> None:
        """TemplateError where the template leaves out the first call of the messages, or the first result."""
        for what, found in (
            ("calls of tools", [bool(m.get("tool_calls")) for m in self.messages]),
            ("results of tools", [m.get("role") == "tool" for m in self.messages]),
        ):
            if not any(found):
                continue
            n = found.index(True)
            other: dict[str, Any] = {**self.messages[n], "tool_calls": []}
            if what == "results of tools":
                other["content"] = f"{other.get('content')}?"
            if not self._tells_apart(
                [*self.messages[:n], other, *self.messages[n + 1 :]], self.shown
            ):
                raise TemplateError(
                    f"messages has {what}, and the chat template shows none; leave them out, or give a "
                    "template that does"
                )

    def _check_shown(self) -> None:
        if not self._tells_apart(self.messages, None):
            raise TemplateError(
                "tools: the chat template shows none; leave them out, or give a template that does"
            )
        if self.choice != "auto":
            raise TemplateError(
                f"tool_choice={self.choice!r}, but how the chat template's model writes calls is not known; "
                "use 'auto'"
            )

    def _tells_apart(self, others: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        """Whether other messages or tools make another prompt, or one that the template refuses."""
        shown = {"tools": self.shown} if self.shown is not None else {}
        other = {"tools": tools} if tools is not None else {}
        text = render(self._template, self.messages, **{**self._variables, **shown})
        try:
            return text != render(self._template, others, **{**self._variables, **other})
        except TemplateError:
            return True

    def places(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The functions that may be called, each with its place among the tools."""
        return ((n, f) for n, f in enumerate(self._offered) if f in self.functions)

    def thinks(self) -> bool:
        """Whether the prompt has opened the reasoning."""
        return self.end.rstrip().endswith(self.habits.thinking.open.strip())

    def said(self) -> str:
        """What of a call's beginning the prompt has written already."""
        form = self.habits.form
        text = "" if form is None else (form.first + form.call).split("$")[0]
        return next((text[:n] for n in range(len(text), 1, -1) if self.end.endswith(text[:n])), "")

    def grammar(
        self,
        control: Mapping[str, int],
        eog: frozenset[int],
        functions: Sequence[Mapping[str, Any]] | None = None,
    ) -> str | None:
        """What the answer is held to, in Lark; None where the form of calls is not known.

        With ``functions``, only these may be called.
        """
        form = self.habits.form
        if form is None or not self.functions or (self.choice == "auto" and form.aside):
            return None
        return grammar_of_calls(
            self.habits, functions or self.functions, control, eog, required=self.choice != "auto",
            one=self.choice not in CHOICES, thinks=self.thinks(), said=self.said(),
        )  # fmt: skip

    def reader(self, tells_parts: bool = False) -> Reader:
        """What reads the answer; ``tells_parts`` as `Reader` has it."""
        reader = Reader(self.habits, self.functions, self.thinks(), self.n_before, tells_parts)
        reader.feed(self.said())
        return reader

    def n_reasoning(self, tokenizer: ChatTokenizer, ids: Sequence[int]) -> int:
        """How many tokens of an answer are reasoning, with the marks that open it."""
        reader, n = self.reader(), 0
        for i in ids:
            reader.feed(tokenizer.decode([i]))
            n += reader.thinks
        return n

    def message(
        self, tokenizer: ChatTokenizer, ids: Sequence[int], text: str, cut: bool = False
    ) -> dict[str, Any]:
        """The whole answer as a message; control tokens, which ``text`` lacks, may spell a call.

        Of an answer that was ``cut`` off, a call that was not finished is left out.
        """
        hidden = any(map(tokenizer.is_control, ids))
        reader = self.reader()
        reader.feed(tokenizer.decode(ids) if hidden else text)
        reader.finish(cut)
        return dict(reader.message)


def _name_of(choice: Any, names: Sequence[str]) -> str:
    known: Sequence[str] = (*CHOICES, *names)
    if isinstance(choice, Mapping):
        function, known = choice.get("function"), names
        choice = function.get("name") if isinstance(function, Mapping) else None
    if not names and (choice == "required" or known is names):
        raise ArgumentError(f"tool_choice={choice!r:.40}, but there are no tools")
    if not isinstance(choice, str) or choice not in known:
        expected = ", ".join(map(repr, known))
        raise ArgumentError(f"tool_choice={choice!r:.40}; expected one of {expected}")
    return choice
