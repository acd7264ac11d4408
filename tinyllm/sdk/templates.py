"""From a conversation to a prompt: Jinja templates, and the ``{0}``/``{1}`` format strings of GPT4All 2."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..chat import render as chat
from ..chat.known import WELL_KNOWN
from ..errors import ArgumentError, TemplateError

MessageType = dict[str, str]

DEFAULT_PROMPT_TEMPLATE = "### Human:\n{0}\n\n### Assistant:\n"
AFTER_ANSWER = "\n\n"  # between the turns of a format string that says nothing about it
JINJA = re.compile(r"\{\{|\{%|\{#")
PERCENT = re.compile(r"%1(?![0-9])")  # the placeholder of GPT4All's list
ANSWER = "\ue000answer\ue000"  # stands where a format string puts the answer
PROBE = "qzx message xzq"  # a message that no template holds itself
MARKUP = re.compile(  # what only a template writes around a message
    r"<\|[^|<>\s]{1,40}\|>|<</?SYS>>|\[/?INST\]|</?(?:start|end)_of_turn>|^###? ?(?:System|Instruction)\b",
    re.MULTILINE,
)


class Template(Protocol):
    """Turns messages into the text that the model reads."""

    @property
    def source(self) -> str: ...

    def render(self, messages: Sequence[MessageType], special_tokens: Mapping[str, str]) -> str: ...


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template as model files carry it.

    Raises TemplateError at once when it is malformed.
    """

    source: str

    def __post_init__(self) -> None:
        chat.check(self.source)

    @property
    def shows_messages(self) -> bool:
        """Does the model see what the user says? A template that demands other messages is believed to."""
        user = {"role": "user", "content": PROBE}
        for messages in ([user], [{"role": "system", "content": "system"}, user]):
            try:
                return PROBE in self.render(messages, {}).lower()
            except TemplateError:
                continue
        return True

    def render(self, messages: Sequence[MessageType], special_tokens: Mapping[str, str]) -> str:
        return chat.render(self.source, messages, **special_tokens)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FormatTemplate:
    """One turn as a format string: ``{0}`` is the user's message, ``{1}`` the answer."""

    source: str

    def __post_init__(self) -> None:
        if PERCENT.search(self.source):
            raise ValueError(
                "Prompt template containing a literal '%1' is not supported. "
                "For a prompt placeholder, please use '{0}' instead."
            )
        placed = placeholders(self.source)
        if placed is not None and placed not in (["0"], ["0", "1"]):
            raise ValueError(
                f"prompt template {self.source!r:.60}: expected {{0}} once for the message, and at most one"
                " {1} behind it for the answer"
            )

    def render(self, messages: Sequence[MessageType], special_tokens: Mapping[str, str]) -> str:
        return "".join(map(self._part, messages))

    def _part(self, message: MessageType) -> str:
        _, found, after = self.source.format("", ANSWER).partition(ANSWER)
        if message["role"] == "assistant":
            return message["content"] + (after if found else AFTER_ANSWER)
        if message["role"] == "user":
            return self.source.format(message["content"], ANSWER).partition(ANSWER)[0]
        return message["content"]


@dataclass(frozen=True)
class FormattingMethod:
    """A subclass's own ``_format_chat_prompt_template(messages, header)``, as GPT4All 1 called it."""

    format: Callable[[list[MessageType], str], str]
    source: str = "{0}"

    def render(self, messages: Sequence[MessageType], special_tokens: Mapping[str, str]) -> str:
        header, text = "", ""
        for message in messages:
            if message["role"] == "system":
                header = message["content"]
            elif message["role"] == "user":
                text += self.format([message], header)
                header = ""
            else:
                text += message["content"] + AFTER_ANSWER
        return text


def template_of(source: str) -> Template:
    """The template that a text is: Jinja, or a format string if it has only that one's placeholder.

    Raises
    ------
    TemplateError
        It is malformed Jinja.
    ValueError
        The model would never see the message.
    """
    if not isinstance(source, str):
        raise ArgumentError(f"chat template {source!r:.60}; expected a text")
    source = WELL_KNOWN.get(source, source)
    is_format = "0" in (placeholders(source) or ())
    if not JINJA.search(source) and (is_format or PERCENT.search(source) or "{0}" in source):
        return FormatTemplate(source)
    try:
        template = JinjaTemplate(source)
        if template.shows_messages:
            return template
    except TemplateError:
        if not is_format:
            raise
    if is_format:  # its doubled braces are a format string's
        return FormatTemplate(source)
    raise ValueError(
        f"chat template {source!r:.60} never shows the message: expected Jinja that prints it, or a format"
        f" string with {{0}} for it, or a name: {', '.join(WELL_KNOWN)}"
    )


def placeholders(source: str) -> list[str] | None:
    """A format string's places for the message ("0") and the answer ("1") in order; None: it is malformed."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(source) if name is not None]
    except ValueError:
        return None
    numbered = [name or str(i) for i, name in enumerate(names)]
    return [name for name in numbered if name in ("0", "1")]


def is_wrapped_twice(template: Template, system: str) -> bool:
    """Is a system message written out in a template's own markup, which a Jinja template adds again?"""
    return isinstance(template, JinjaTemplate) and MARKUP.search(system) is not None


def default_template(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Template:
    """The model's own template: that of GPT4All's list, else that of the file.

    Raises
    ------
    ValueError
        There is none, none shows the message, or the list says that the model does not chat.
    """
    listed = [config[key] for key in ("chatTemplate", "promptTemplate") if config.get(key)]
    if not listed and "chatTemplate" in config:
        raise ValueError(f"The model {config.get('name')!r} does not support chat.")
    problem: ValueError | None = None
    for source in listed:
        try:
            return template_of(str(source))
        except ValueError as error:
            problem = error
    if (own := chat.pick_template(metadata)) is not None:
        return template_of(own)
    raise problem or ValueError(
        "For sideloaded models or with allow_download=False, you must specify a chat template."
    )


def from_percent(source: str) -> str:
    """Turn a template of GPT4All's list, with ``%1`` and ``%2``, into a format string."""
    escaped = source.replace("{", "{{").replace("}", "}}") if "{0}" not in source else source
    return escaped.replace("%1", "{0}", 1).replace("%2", "{1}", 1)
