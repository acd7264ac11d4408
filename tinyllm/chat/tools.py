"""From an answer's text to a message: content, reasoning and calls of tools, whole or as it comes."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import regex

from ..errors import ArgumentError, TemplateError
from .forms import FORMS, THINK, THINKINGS, Form, Thinking
from .render import Message, render

_JSON = json.JSONDecoder()
_BRACKET, _STRING = regex.compile(r'["{}\[\]]'), regex.compile(r'["\\]')
_QUESTION = "which one is it?"


class FunctionCall(TypedDict):
    """A tool's name, and the JSON text of its arguments."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call as OpenAI's API spells it; ``type`` is "function"."""

    id: str
    type: str
    function: FunctionCall


class _Said(TypedDict):
    role: str
    content: str


class AnswerMessage(_Said, total=False):
    """An answer as a message of a conversation; ``tool_calls`` and ``reasoning`` where there are any."""

    tool_calls: list[ToolCall]
    reasoning: str


@dataclass(frozen=True)
class CallPart:
    """A piece of a call that is being written: the first has its id and name, each a piece of the arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds to a message: one of the four.

    Where they are asked for, and a call's arguments are written as JSON, its parts come before the whole
    ``call``, and make up its arguments. A call of which parts were told may be cut off: its text is
    content then.
    """

    content: str = ""
    reasoning: str = ""
    call: ToolCall | None = None
    part: CallPart | None = None


@dataclass(frozen=True)
class Habits:
    """What a template shows of how its model writes.

    ``form`` is None where the template shows no calls of a known form; ``as_text``: it wants a call's
    arguments as JSON text, not as a mapping; ``reasons``: it writes marks of reasoning.
    """

    form: Form | None
    thinking: Thinking = THINK
    as_text: bool = False
    reasons: bool = False


@dataclass
class Reader:
    """Reads one answer piece by piece.

    Parameters
    ----------
    habits : Habits
    tools : sequence of mapping
        The functions that were offered; their schemas say which arguments are texts.
    thinks : bool
        The prompt has opened the reasoning.
    n_before : int
        Calls that the conversation had before: later ones are numbered from there.
    tells_parts : bool
        Calls are told in parts, too.
    """

    habits: Habits
    tools: Sequence[Mapping[str, Any]] = ()
    thinks: bool = False
    n_before: int = 0
    tells_parts: bool = False
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    _held: str = ""
    _n_told: int = 0  # calls that a delta has told
    _calling: bool = False  # behind a call: another may follow, or the end of the calls
    _open: _Open | None = None  # the call whose beginning is read

    def feed(self, text: str) -> list[Delta]:
        """Add a piece, with control tokens as they are spelled, and return what is known by it."""
        self._held += text
        return list(self._read(False))

    def finish(self, cut: bool = False) -> list[Delta]:
        """End the answer: the rest.

        A call that was not finished is content; it is left out where the answer was ``cut`` off.
        """
        return list(self._read(True, cut))

    @property
    def message(self) -> AnswerMessage:
        """The message so far."""
        content, reasoning = "".join(self.content), "".join(self.reasoning).strip()
        if self.calls or reasoning:
            content = content.strip()
        message: AnswerMessage = {"role": "assistant", "content": content}
        if self.calls:
            message["tool_calls"] = self.calls
        if reasoning:
            message["reasoning"] = reasoning
        return message

    def _read(self, ends: bool, cut: bool = False) -> Iterator[Delta]:
        opens, shut, drop = self.habits.thinking.patterns
        form = self.habits.form
        drops = [drop, form.is_aside] if form and form.aside else [drop]
        while self._held:
            if self._calling:
                if not self._skip_between(ends and not cut):
                    self._held = "" if cut else self._held
                    return
                continue
            if self._open is not None:
                yield from self._parts(self._open)
                if not ends and not self._open.whole:
                    return
                call = self._call(self._open.head, ends, cut)
                if call is None and not ends:
                    return
                self._open = None
                if call is None:
                    if not cut:
                        yield self._show(self._held)
                    self._held = ""
                else:
                    yield from self._untold()
                continue
            if self.thinks:
                marks = [shut]
            else:
                begins = form is not None and not (form.alone and self._began)
                marks = [form.begin] if form and begins else []
                marks += [opens, *drops]
            at, mark, whole = first_of(marks, self._held)
            if not whole and ends:
                if cut and form and mark is form.begin and self._held[at:].strip():
                    self._held = self._held[:at]  # behind it a call begins
                at = len(self._held)
            if at:
                yield self._show(self._held[:at])
                self._held = self._held[at:]
            if mark is None or not self._held or not whole:
                return
            found = mark.match(self._held)
            assert found is not None
            if mark in (opens, shut, *drops):
                self._held = self._held[found.end() :]
                self.thinks = mark is opens
                continue
            if not ends and found.end() == len(self._held):  # it may go on
                return
            self._open = _Open(self.habits.form, found)

    def _parts(self, call: _Open) -> Iterator[Delta]:
        """What is known of the arguments since the last time."""
        told = call.told
        text = call.read(self._held)
        if not self.tells_parts:
            return
        if told is None and call.told is not None:
            index, name = len(self.calls), call.name
            yield Delta(part=CallPart(index, self._id(call.head), name, text))
        elif text:
            yield Delta(part=CallPart(len(self.calls), arguments=text))

    def _id(self, head: regex.Match[str]) -> str:
        """The call's own id, or a made one: nine letters and digits, as Mistral's templates ask for."""
        given = head.groupdict().get("id")
        made = f"call{self.n_before + len(self.calls):05d}"
        return given if given and len(given) == 9 else made

    def _untold(self) -> Iterator[Delta]:
        new, self._n_told = self.calls[self._n_told :], len(self.calls)
        yield from (Delta(call=call) for call in new)

    @property
    def _began(self) -> bool:
        return bool(self.calls) or any(piece.strip() for piece in self.content)

    def _show(self, text: str) -> Delta:
        (self.reasoning if self.thinks else self.content).append(text)
        return Delta(reasoning=text) if self.thinks else Delta(content=text)

    def _skip_between(self, ends: bool) -> bool:
        """Go to the next call or behind the end of all; False where more text must tell which."""
        form = self.habits.form
        assert form is not None
        for pattern in (form.following, form.ending):
            found = pattern.match(self._held, partial=not ends)
            if found is None:
                continue
            if found.partial or (not ends and found.end() == len(self._held)):
                return False
            if pattern is form.ending:
                self._held, self._calling = self._held[found.end() :], False
                return True
            if form.is_object and self._held[found.end() : found.end() + 1] != "{":
                continue
            self._open, self._calling = _Open(form, found), False
            return True
        self._calling = False
        return True

    def _call(self, head: regex.Match[str], ends: bool, cut: bool) -> ToolCall | None:
        """The call behind what ``head`` matched; None while it is not whole; its end may be ``cut`` off."""
        form = self.habits.form
        assert form is not None
        try:
            name, arguments, at = parse_call(form, self._held, head, self._schema)
        except ValueError:
            return None
        tail = form.tail.match(self._held, at, partial=cut or not ends)
        if tail is not None and tail.partial and not ends:
            return None
        assert self._open is not None
        written = self._open.arguments(self._held) or json.dumps(arguments, ensure_ascii=False)
        self._held = self._held[tail.end() if tail else at :]
        self._calling = True
        call: ToolCall = {
            "id": self._id(head),
            "type": "function",
            "function": {"name": name, "arguments": written},
        }
        self.calls.append(call)
        return call

    def _schema(self, name: str) -> Mapping[str, Any]:
        return next((parameters_of(t) for t in self.tools if t["name"] == name), {})


class _Brackets:
    """Where the JSON object that begins at a place of a growing text ends; each character is read once."""

    def __init__(self, start: int) -> None:
        self.start = self.at = start
        self.end: int | None = None
        self._depth, self._quoted = 0, False

    def read(self, text: str) -> None:
        """Read what the text has gained."""
        while self.end is None:
            found = (_STRING if self._quoted else _BRACKET).search(text, self.at)
            if found is None:
                self.at = len(text)
                return
            mark = found[0]
            if mark == "\\":  # what follows it is no mark
                if found.end() == len(text):
                    self.at = found.start()
                    return
                self.at = found.end() + 1
                continue
            self.at = found.end()
            if mark == '"':
                self._quoted = not self._quoted
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    self.end = self.at


class _Open:
    """A call whose beginning ``head`` was found, in a text that grows behind it.

    ``told`` is how far its arguments were told; None before the first part.
    """

    def __init__(self, form: Form | None, head: regex.Match[str]) -> None:
        assert form is not None
        self.head, self.name, self._form = head, "", form
        self.told: int | None = None
        is_json = not form.pair
        self._whole: _Brackets | None = _Brackets(head.end()) if is_json else None
        # an id behind the arguments is not known when they are told
        self._tells = is_json and not (form.is_object and "$id" in form.call)
        self._arguments: _Brackets | None = None

    @property
    def whole(self) -> bool:
        """Whether it may be whole."""
        return self._whole is None or self._whole.end is not None

    def read(self, text: str) -> str:
        """Read on; returns what the arguments have gained."""
        if self._whole is not None and text[self.head.end() : self.head.end() + 1] not in ("{", ""):
            self._whole, self._tells = None, False  # no object: the parser will say
        if self._whole is None:
            return ""
        self._whole.read(text)
        if self._tells and self._arguments is None:
            self._begin(text)
        if self._arguments is None:
            return ""
        self._arguments.read(text)
        before, self.told = self.told or self._arguments.start, self._arguments.at
        return text[before : self.told]

    def _begin(self, text: str) -> None:
        """Find where the arguments begin."""
        if not self._form.is_object:
            self.name, start = self.head["name"], self.head.end()
            if start == len(text):
                return
        else:
            found = self._form.object_head.match(text, self.head.end())
            if found is None:
                return
            self.name, start = found["name"], found.end()
        self._arguments = _Brackets(start)

    def arguments(self, text: str) -> str:
        """The arguments as they are written; "" where they are not told as such."""
        a = self._arguments
        return "" if a is None or a.end is None else text[a.start : a.end]


def parse_call(
    form: Form, text: str, head: regex.Match[str], schema_of: Any
) -> tuple[str, Any, int]:
    """(name, arguments, where it ends) of a call whose ``head`` was found; ValueError while it is not whole."""
    at = head.end()
    if form.is_object:
        made, at = _JSON.raw_decode(text, at)
        name, arguments = made.get(form.keys[0]), made.get(form.keys[1], {})
        if not isinstance(name, str):
            raise ValueError("a call without a name")
        return name, json.loads(arguments) if isinstance(arguments, str) else arguments, at
    name = head["name"]
    if not form.pair:
        arguments, at = _JSON.raw_decode(text, at)
        return name, arguments, at
    if form.quote:
        end = form.tail.search(text, at)
        if end is None:
            raise ValueError("no end")
        return name, _json_of_quoted(text[at : end.start()], form.quote), end.start()
    properties, arguments = schema_of(name).get("properties", {}), {}
    while form.tail.match(text, at) is None:
        found = form.argument.match(text, at)
        if found is None:
            raise ValueError("no end")
        told = found.groupdict().get("string")
        plain = told == "true" or is_text(properties, found["key"])
        arguments[found["key"]] = _value(found["value"], plain)
        at = found.end()
    return name, arguments, at


def is_text(properties: Mapping[str, Any], key: str) -> bool:
    """Whether a schema's property is a text, and nothing else."""
    schema = properties.get(key)
    if not isinstance(schema, Mapping):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return schema.get("type") == "string" or bool(
        values and all(isinstance(v, str) for v in values)
    )


def _value(text: str, plain: bool) -> Any:
    if plain:
        return text
    for parse in (
        json.loads,
        ast.literal_eval,
    ):  # some templates print lists and None as Python does
        try:
            return parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def _json_of_quoted(text: str, quote: str) -> Any:
    """Arguments whose texts stand in quotes of their own, and whose keys stand without any."""
    parts = text.split(quote)
    plain = [regex.sub(r'(?<![\w"-])([A-Za-z_][\w-]*)\s*:', r'"\1":', p) for p in parts[::2]]
    texts = [json.dumps(p) for p in parts[1::2]]
    pieces = [p for pair in zip(plain, [*texts, ""], strict=False) for p in pair]
    return json.loads("{" + "".join(pieces) + "}")


def first_of(
    marks: Sequence[regex.Pattern[str]], text: str
) -> tuple[int, regex.Pattern[str] | None, bool]:
    """(position, pattern, whether it is whole) of the first mark in a text, or of one that may be beginning."""
    best: tuple[int, regex.Pattern[str] | None, bool] = (len(text), None, True)
    for mark in marks:
        found = mark.search(text, partial=True)
        if found is not None and found.start() < best[0]:
            best = (found.start(), mark, not found.partial)
    return best


# ---- what a template does


def functions_of(tools: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The functions that tools describe.

    Raises
    ------
    ArgumentError
        A tool is neither ``{"type": "function", "function": {"name": ...}}`` nor such a function itself; or two
        have one name.
    """
    found: list[Mapping[str, Any]] = []
    for tool in tools:
        function: Any = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not regex.fullmatch(r"[\w.-]{1,128}", name):
            raise ArgumentError(
                f"tools has {tool!r:.60}; expected "
                "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
            )
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ArgumentError(
                f"tools: the parameters of {name} are {parameters!r:.40}; expected a JSON schema"
            )
        if any(other["name"] == name for other in found):
            raise ArgumentError(f"tools has two functions {name!r}; give each a name of its own")
        found.append(function)
    return found


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments; one without takes none."""
    schema = function.get("parameters")
    return schema if isinstance(schema, Mapping) else {"type": "object", "properties": {}}


_PROBE = {
    "name": "look_up",
    "description": "Look something up.",
    "parameters": {
        "type": "object",
        "properties": {"word": {"type": "string", "description": "What."}},
        "required": ["word"],
    },
}


def thinking_of(template: str) -> Thinking:
    """The marks of reasoning that a template writes; ``<think>`` where it writes none."""
    return next((t for t in THINKINGS if t.open.strip() in template), THINK)


@functools.lru_cache(maxsize=16)
def habits_of(template: str) -> Habits:
    """How a template's model writes, found by rendering a call and reading it back.

    A template that renders no calls (the turn is left out, or is text that the caller gives) may still name a
    form's marks.
    """
    thinking = thinking_of(template)
    reasons = thinking.open.strip() in template
    for as_text in (False, True):
        arguments: Any = {"word": "tulip"}
        call = {"name": "look_up", "arguments": json.dumps(arguments) if as_text else arguments}
        said: Message = {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call00000", "type": "function", "function": call}]}  # fmt: skip
        messages: list[Message] = [{"role": "user", "content": _QUESTION}, said]
        tools = [{"type": "function", "function": _PROBE}]
        try:
            text = render(template, messages, tools=tools, add_generation_prompt=False)
        except TemplateError:
            continue
        text = text[text.rfind(_QUESTION) + len(_QUESTION) :]
        for form in FORMS:
            if _reads(form, text, arguments):
                return Habits(form, thinking, as_text, reasons)
        if "look_up" in text:  # in a form that no row has
            return Habits(None, thinking, reasons=reasons)
    marks = ((f, f.first or f.call[: f.call.index("$")]) for f in FORMS if not f.alone)
    named = next((f for f, mark in marks if mark.strip().rstrip("[") in template), None)
    return Habits(named, thinking, reasons=reasons)


def _reads(form: Form, text: str, arguments: Any) -> bool:
    """Whether a form finds the probe's call in a rendered text."""
    if form.alone:
        start = text.find('{"name"')
        text = text[start:] if start >= 0 else ""
    found = form.begin.search(text)
    if found is None:
        return False
    try:
        name, read, at = parse_call(form, text, found, lambda name: _PROBE["parameters"])
    except ValueError:
        return False
    return (name, read) == ("look_up", arguments) and form.tail.match(text, at) is not None


def for_template(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Messages whose calls have their arguments as the template wants them: as a mapping, or as JSON text."""
    return [_with_arguments(m, habits.as_text) for m in messages]


def _with_arguments(message: Message, as_text: bool) -> Message:
    if not isinstance(message, Mapping) or not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function", {}))
        given = function.get("arguments", {})
        try:
            mapping = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            raise ArgumentError(f"a call has the arguments {given!r:.60}; expected JSON") from None
        function["arguments"] = json.dumps(mapping, ensure_ascii=False) if as_text else mapping
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}
