"""From a conversation to a prompt: Jinja templates, and the ``{0}``/``{1}`` format strings of GPT4All 2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..chat import render as chat

MessageType = dict[str, str]

DEFAULT_PROMPT_TEMPLATE = "### Human:\n{0}\n\n### Assistant:\n"
AFTER_ANSWER = "\n\n"  # between the turns of a format string that says nothing about it
JINJA = re.compile(r"\{\{|\{%|\{#")
FIELD = re.compile(r"\{0?[}!:]")  # the message in a format string
PERCENT = re.compile(r"%1(?![0-9])")  # the placeholder of GPT4All's list
ANSWER = "\ue000answer\ue000"  # stands where a format string puts the answer


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
    """The template that a text is: Jinja, unless it has only a format string's placeholder.

    Raises
    ------
    ValueError
        It is neither: the model would never see the message.
    """
    if JINJA.search(source):
        return JinjaTemplate(source)
    if FIELD.search(source) or PERCENT.search(source):
        return FormatTemplate(source)
    raise ValueError(
        f"chat template {source!r:.60}: expected Jinja, or a format string with {{0}} for the message"
    )


def default_source(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The model's own template: that of GPT4All's list, else that of the file.

    Raises
    ------
    ValueError
        There is none, or the list says that the model does not chat.
    """
    if config.get("chatTemplate"):
        return str(config["chatTemplate"])
    if config.get("promptTemplate"):
        return str(config["promptTemplate"])
    if "chatTemplate" in config:
        raise ValueError(f"The model {config.get('name')!r} does not support chat.")
    source = chat.pick_template(metadata)
    if source is None:
        raise ValueError(
            "For sideloaded models or with allow_download=False, you must specify a chat template."
        )
    return source


def from_percent(source: str) -> str:
    """Turn a template of GPT4All's list, with ``%1`` and ``%2``, into a format string."""
    escaped = source.replace("{", "{{").replace("}", "}}") if "{0}" not in source else source
    return escaped.replace("%1", "{0}", 1).replace("%2", "{1}", 1)
