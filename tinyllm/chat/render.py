"""From messages to a prompt, by the Jinja template that a model's file carries."""

from __future__ import annotations

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ArgumentError, TemplateError
from .known import WELL_KNOWN

if TYPE_CHECKING:
    from jinja2 import Template

    from .sandbox import Environment

Message = Mapping[str, Any]
Clock = Callable[[], datetime]

DATE_FORMAT = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%]){0,200}", re.DOTALL)


TAKEN = {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "strftime_now"}
"""Variables of a template that have other ways in."""


class ChatTokenizer(Protocol):
    """What `encode_chat` needs of a tokenizer."""

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True
    ) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str: ...
    def is_control(self, i: int) -> bool: ...


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    clock: Clock | None = None,
    **extra: Any,
) -> str:
    """Render a chat template, in a sandbox bounded in work and in output.

    Parameters
    ----------
    template : str
        Jinja source, as in ``tokenizer.chat_template`` of a GGUF file or Hugging Face's tokenizer_config.json.
    messages : sequence of mappings
        Each with ``role`` and ``content``, and whatever else the template reads.
    add_generation_prompt : bool
        End with the opening of the assistant's turn.
    bos_token, eos_token : str
        Texts of the special tokens.
    tools, documents : sequence, optional
        Undefined in the template when not given.
    clock : callable, optional
        Returns the datetime that ``strftime_now`` formats; `datetime.now` when not given.
    **extra
        Further variables of the template, such as ``enable_thinking``.

    Returns
    -------
    str
        The prompt.

    Raises
    ------
    TemplateError
        The template is malformed, raises an error itself, or exceeds its limits: 1 MiB plus four characters
        of output for each of the input, and a number of steps that real templates stay far below.

    Examples
    --------
    >>> render("{{ messages[0].content }}!", [{"role": "user", "content": "Hi"}])
    'Hi!'
    """
    optional = {"tools": tools, "documents": documents}
    variables = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
        **{name: value for name, value in optional.items() if value is not None},
        **extra,
    }
    return _run(template, variables, clock or datetime.now)


def check(template: str) -> None:
    """Raise TemplateError if a template is malformed or larger than any real one."""
    try:
        _environment().meter.reset(0, 0)
        _compile(template)
    except Exception as error:
        raise TemplateError(_explain(error)) from error


def _run(template: str, variables: dict[str, Any], clock: Clock) -> str:
    from .metering import weight_of

    if not isinstance(template, str):
        raise TemplateError(f"a chat template is a text; found {type(template).__name__}")
    environment = _environment()
    try:
        size = weight_of([template, variables], 1 << 62, node=0)
        environment.meter.reset(size, weight_of(variables, 1 << 62))
        names = {**variables, "strftime_now": functools.partial(_strftime, clock)}
        return _collect(_compile(template), names, environment.meter.cap)
    except Exception as error:
        raise TemplateError(_explain(error)) from error


def _collect(template: Template, variables: dict[str, Any], cap: int) -> str:
    pieces: list[str] = []
    total = 0
    for piece in template.root_render_func(template.new_context(variables)):
        total += len(piece)
        if total > cap:
            raise TemplateError(f"it prints more than {cap} characters")
        pieces.append(piece)
    return "".join(pieces)


def _explain(error: Exception) -> str:
    """One line that says where a template failed, and why."""
    if isinstance(error, RecursionError):
        return "chat template: it calls itself without end, or nests too deeply"
    line = getattr(error, "lineno", None) or _template_line(error)
    where = "chat template" if line is None else f"chat template, line {line}"
    reason = str(error).split("\n")[0] or type(error).__name__
    return f"{where}: {reason}"


def _template_line(error: Exception) -> int | None:
    """The template's line of the innermost frame that runs generated code."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        template = frame.f_globals.get("__jinja_template__")
        if template is not None:
            return int(template.get_corresponding_lineno(line))
    return None


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    from .sandbox import Environment

    environment = Environment()
    environment.filters["tojson"] = functools.partial(_tojson, environment)
    environment.filters["regex_replace"] = functools.partial(_regex_replace, environment)
    environment.globals["raise_exception"] = _raise_exception
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = _environment()
    code = environment.compile(environment.parse_bounded(source))
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _raise_exception(message: object = "") -> None:
    from jinja2.exceptions import TemplateError as JinjaError

    raise JinjaError(str(message))


def _strftime(clock: Clock, format: str) -> str:  # noqa: A002 (the name templates may use)
    if not DATE_FORMAT.fullmatch(format):
        raise TemplateError(f"strftime_now cannot format {format[:40]!r}")
    return clock().strftime(format)


def _tojson(
    environment: Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a prompt: nothing escaped for HTML, keys in their order, as transformers writes it."""
    weight = environment.meter.weigh(value)
    spaces = len(indent) if isinstance(indent, str) else indent or 0
    if spaces > 16 or sum(map(len, separators or ())) > 16:
        raise TemplateError("tojson takes at most 16 characters of indent or separators")
    environment.meter.tick(weight * spaces // 64)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return str(environment.meter.made(text))


def _regex_replace(
    environment: Environment, value: Any, pattern: str, replacement: str = ""
) -> str:
    """Replace what a pattern matches: a filter that templates of GPT4All's list use.

    All calls of one rendering together get half a second.
    """
    import regex

    meter, text = environment.meter, str(value)
    meter.fits(len(text) + (len(text) + 1) * len(replacement) * (1 + replacement.count("\\")))
    meter.tick(100 + len(text) // 16)
    start = time.perf_counter()
    try:
        result = regex.sub(pattern, replacement, text, timeout=max(meter.regex_s, 1e-3))
    except TimeoutError:
        raise TemplateError("its regular expressions take too long") from None
    meter.regex_s -= time.perf_counter() - start
    return str(meter.made(result))


def pick_template(metadata: Mapping[str, Any], name: str | None = None) -> str | None:
    """The chat template in a model's metadata.

    Parameters
    ----------
    metadata : mapping
        A GGUF file's: ``tokenizer.chat_template`` and, for further ones, ``tokenizer.chat_template.NAME``
        listed in ``tokenizer.chat_templates``. A list of ``{"name": ..., "template": ...}`` is understood too.
    name : str, optional
        Which one, such as ``"tool_use"``; the default one when not given.

    Returns
    -------
    str or None
        The Jinja source; None when the file carries no template.

    Raises
    ------
    TemplateError
        There is no template of that name, or what is there is not a text.
    """
    found = dict(_templates(metadata))
    if name is None and not found:
        return None
    wanted = name or "default"
    if wanted not in found:
        known = ", ".join(sorted(map(str, found))) or "none"
        raise TemplateError(f"no chat template is named {wanted!r}; the file has: {known}")
    template = found[wanted]
    if not isinstance(template, str):
        raise TemplateError(
            f"tokenizer.chat_template is a {type(template).__name__}; expected a text"
        )
    if not template.strip():  # a converter wrote the key for a model that has none
        return None
    return template


def given_template(template: str) -> str:
    """The Jinja source that a caller means: a source, or one of the well-known names.

    Raises
    ------
    TemplateError
        It is neither.
    """
    if not isinstance(template, str):
        raise TemplateError(f"a chat template is a text; found {type(template).__name__}")
    if template in WELL_KNOWN:
        return WELL_KNOWN[template]
    if "{" not in template:
        names = ", ".join(WELL_KNOWN)
        raise TemplateError(
            f"{template!r:.60} shows no message: expected a Jinja template, or a name: {names}"
        )
    return template


def asked_last(given: str | Sequence[Message], question: str) -> list[Message]:
    """A conversation that ends with a question about a text or about the conversation itself.

    It joins the user's last message where that is the last: templates want roles to take turns.
    """
    messages = plain_messages(
        [{"role": "user", "content": given}] if isinstance(given, str) else given
    )
    last = messages[-1]
    if last.get("role") == "user" and isinstance(last.get("content"), str):
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{question}"}]
    return [*messages, {"role": "user", "content": question}]


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates read them: a content of several parts is one text.

    ArgumentError unless these are one message or more, each a mapping with a content, or a call of tools.
    """
    expected = 'expected a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise ArgumentError(f"messages is {type(messages).__name__} {messages!r:.40}; {expected}")
    if not messages:
        raise ArgumentError(f"there are no messages; {expected}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ArgumentError(
                f"messages has {type(message).__name__} {message!r:.40} in its list; {expected}"
            )
    return [_plain(n, message) for n, message in enumerate(messages)]


def _plain(n: int, message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("role") == "assistant"):
        return message
    parts: Sequence[Any] = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ArgumentError(
                f"messages[{n}] has the content {kind!r:.40}; expected a text, or parts such as "
                '{"type": "text", "text": "Hello"}'
            )
    return {**message, "content": "".join([str(part["text"]) for part in parts])}


def check_variables(variables: Mapping[str, Any]) -> None:
    """ArgumentError if a caller's variables of the template have names that are no names, or are taken."""
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            f"template_vars={variables!r:.40}; expected a mapping of names to values, or None"
        )
    for name in variables:
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise ArgumentError(
                f"template_vars has {name!r:.40}; expected names other than {', '.join(sorted(TAKEN))}"
            )


def check_shows(template: str, messages: Sequence[Message], text: str) -> None:
    """TemplateError if a rendered text lacks the last message: the model would answer something else."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str) and content.strip() and content.strip() not in text:
        raise TemplateError(
            f"the chat template {template!r:.40} does not show the last message, {content!r:.40}"
        )


def _templates(metadata: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    key = "tokenizer.chat_template"
    plain = metadata.get(key)
    if isinstance(plain, Sequence) and not isinstance(plain, str):
        entries = [entry for entry in plain if isinstance(entry, Mapping)]
        if len(entries) < len(plain):
            raise TemplateError(f"{key} is a list of something else than templates with names")
        yield from ((entry.get("name", "default"), entry.get("template")) for entry in entries)
    elif plain is not None:
        yield "default", plain
    prefix = key + "."
    yield from ((k[len(prefix) :], v) for k, v in metadata.items() if k.startswith(prefix))


def encode_chat(tokenizer: ChatTokenizer, text: str, bos_id: int | None = None) -> list[int]:
    """Token ids of a rendered prompt: special tokens parsed, the BOS token once.

    A template that writes the BOS token itself does not get a second one.
    """
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    if bos_id is not None and ids[:1] == [bos_id]:
        return ids
    return tokenizer.encode(text, add_special=True, parse_special=True)


def chat_ids(
    tokenizer: ChatTokenizer,
    template: str,
    messages: Sequence[Message],
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    continue_final: bool = False,
    must_show: bool = False,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation: `render`, then `encode_chat`; ``options`` go to `render`.

    With ``continue_final``, the text ends with the last message's content, which the model then continues;
    with ``must_show``, a template that leaves the last message out is refused.
    """
    bos, eos = ("" if i is None else tokenizer.decode([i]) for i in (bos_id, eos_id))
    if continue_final:
        options["add_generation_prompt"] = False
    text = render(template, messages, bos_token=bos, eos_token=eos, **options)
    if must_show:
        check_shows(template, messages, text)
    if continue_final:
        text = until_content(text, messages)
    return encode_chat(tokenizer, text, bos_id)


def until_content(text: str, messages: Sequence[Message]) -> str:
    """A rendered text up to the end of the last message's content."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str) or not content.strip():
        raise TemplateError("there is no text to continue: the last message has none")
    for shown in (content, content.rstrip(), content.strip()):  # templates may trim it
        if (start := text.rfind(shown)) >= 0:
            return text[: start + len(shown)]
    raise TemplateError(f"the chat template does not show the last message, {content!r:.40}")
