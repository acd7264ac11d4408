"""How models write calls of tools and their reasoning: one row for each form.

A row spells one call as the model's template does, with ``$name``, ``$args`` and, in some, ``$id`` in it. What
parses calls (`tools`) and the grammar that holds a model to them (`calling`) are both made from the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import regex

NAME, ID = r"(?P<name>[\w.-]+)", r"(?P<id>[\w.:-]*)"


@dataclass(frozen=True)
class Form:
    """How calls are spelled.

    ``first`` stands before the first call, ``between`` two, ``last`` behind the last. ``pair`` spells one
    argument, where arguments are no JSON object, ``join`` stands between two of them, and ``quote`` around a
    text. ``alone``: a call is a JSON object that begins the answer, without any mark. ``one``: an answer has
    one call at most. ``head`` is the pattern of what stands before the arguments, where models vary it.
    ``trigger`` is the text from which on an answer is held to the form, where it is not the first mark.
    ``aside`` stands before content that is no call, in the form's place of a name.
    """

    name: str
    call: str
    first: str = ""
    between: str = ""
    last: str = ""
    pair: str = ""
    join: str = ""
    quote: str = ""
    alone: bool = False
    one: bool = False
    head: str = ""
    trigger: str = ""
    aside: str = ""

    @property
    def is_object(self) -> bool:
        """Whether the name is a value of a JSON object that is the call."""
        return '": "$name"' in self.call

    @cached_property
    def keys(self) -> tuple[str, str]:
        """The object's keys of the name and of the arguments."""
        found = regex.findall(r'"(\w+)": "?\$(?:name|args)', self.call)
        return found[0], found[1]

    @cached_property
    def object_head(self) -> regex.Pattern[str]:
        """What stands in the object before the arguments, themselves an object."""
        name, arguments = self.keys
        return regex.compile(rf'\{{\s*"{name}"\s*:\s*"{NAME}"\s*,\s*"{arguments}"\s*:\s*(?=\{{)')

    @cached_property
    def begin(self) -> regex.Pattern[str]:
        """What stands before the first call's object or arguments."""
        mark = r"^\s*(?:<\|python_tag\|>)?\s*" if self.alone else loose(self.first)
        look = rf'(?=\{{\s*"{self.keys[0]}")' if self.alone else ""
        return regex.compile(mark + look + self._head)

    @cached_property
    def following(self) -> regex.Pattern[str]:
        """What stands before a later call's object or arguments."""
        return regex.compile(rf"\s*{loose(self.between)}\s*{self._head}")

    @cached_property
    def ending(self) -> regex.Pattern[str]:
        """What stands behind the last call."""
        return regex.compile(rf"\s*{loose(self.last)}")

    @cached_property
    def tail(self) -> regex.Pattern[str]:
        """What stands behind a call's object or arguments."""
        end = self.call.rindex("}") + 1 if self.is_object else self.call.index("$args") + 5
        return regex.compile(rf"\s*{loose(self.call[end:])}")

    @cached_property
    def argument(self) -> regex.Pattern[str]:
        """One argument that is no JSON."""
        key, value = r"(?P<key>[\w.-]+)", r"(?P<value>(?:.|\n)*?)"
        text = r"\n?".join(regex.escape(x, special_only=True) for x in self.pair.split("\n"))
        text = text.replace(r"\$key", key).replace(r"\$string", "(?P<string>true|false)")
        return regex.compile(r"\s*" + text.replace(r"\$value", value))

    @cached_property
    def is_aside(self) -> regex.Pattern[str]:
        """What stands before content."""
        return regex.compile(regex.escape(self.aside))

    @property
    def _head(self) -> str:
        if self.head:
            return self.head
        end = self.call.index("{") if self.is_object else self.call.index("$args")
        return loose(self.call[:end])


@dataclass(frozen=True)
class Thinking:
    """How reasoning is marked; ``shut`` is the pattern of its end, ``drop`` of marks that are no content."""

    open: str
    close: str
    opens: str = ""
    shut: str = ""
    drop: str = ""
    patterns: tuple[regex.Pattern[str], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        found = (
            self.opens or loose(self.open),
            self.shut or loose(self.close),
            self.drop or r"(?!)",
        )
        object.__setattr__(self, "patterns", tuple(map(regex.compile, found)))


def loose(text: str) -> str:
    """A pattern of a row's text in which whitespace may vary."""
    parts = regex.split(r"\s+", text)
    found = r"\s*".join(regex.escape(part, special_only=True) for part in parts)
    return found.replace(r"\$name", NAME, 1).replace(r"\$id", ID, 1)


_OBJECT = '{"name": "$name", "arguments": $args}'
_CALLS, _CALLED = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_INVOKE = '<｜DSML｜invoke name="$name">\n$args</｜DSML｜invoke>\n'
_PARAMETER = '<｜DSML｜parameter name="$key" string="$string">$value</｜DSML｜parameter>\n'
_FUNCTION = "<function=$name>\n$args</function>\n"

FORMS = (
    Form("hermes", f"<tool_call>\n{_OBJECT}\n</tool_call>", between="\n"),
    Form("mistral list", '{"name": "$name", "arguments": $args, "id": "$id"}',
         "[TOOL_CALLS][", ", ", "]"),
    Form("mistral ids", "[TOOL_CALLS]$name[CALL_ID]$id[ARGS]$args"),
    Form("mistral", "[TOOL_CALLS]$name[ARGS]$args"),
    Form("deepseek r1", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>$name\n```json\n$args\n```"
         "<｜tool▁call▁end｜>", first=_CALLS, between="\n", last=_CALLED),
    Form("deepseek v3.1", "<｜tool▁call▁begin｜>$name<｜tool▁sep｜>$args<｜tool▁call▁end｜>",
         _CALLS, "", _CALLED),
    Form("deepseek v3.2", _INVOKE, "<｜DSML｜function_calls>\n", "", "</｜DSML｜function_calls>",
         _PARAMETER),
    Form("deepseek v4", _INVOKE, "<｜DSML｜tool_calls>\n", "", "</｜DSML｜tool_calls>", _PARAMETER),
    Form("command r", '{"tool_call_id": "$id", "tool_name": "$name", "parameters": $args}',
         "<|START_ACTION|>[\n    ", ",\n    ", "\n]<|END_ACTION|>"),
    Form("command r+", '{\n        "tool_name": "$name",\n        "parameters": $args\n    }',
         "Action: ```json\n[\n    ", ",\n    ", "\n]```"),
    Form("granite", _OBJECT, "<|tool_call|>[", ", ", "]"),
    Form("nemotron", _OBJECT, "<TOOLCALL>[", ", ", "]</TOOLCALL>"),
    Form("apriel", _OBJECT, "<tool_calls>[", ", ", "]</tool_calls>"),
    Form("minimax m1", _OBJECT, "<tool_calls>\n", "\n", "\n</tool_calls>"),
    Form("apertus", '{"$name": $args}', "<|tools_prefix|>[", ", ", "]<|tools_suffix|>"),
    Form("firefunction", _OBJECT, " functools[", ", ", "]"),
    Form("kimi", "<|tool_call_begin|>functions.$name:$id<|tool_call_argument_begin|>$args<|tool_call_end|>",
         "<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>"),
    Form("solar", "<|tool_call:begin|>$id<|tool_call:name|>$name<|tool_call:args|>$args<|tool_call:end|>",
         "<|tool_calls|>"),
    Form("glm", "<tool_call>$name\n$args</tool_call>", between="\n",
         pair="<arg_key>$key</arg_key>\n<arg_value>$value</arg_value>\n"),
    Form("qwen coder", f"<tool_call>\n{_FUNCTION}</tool_call>", between="\n",
         pair="<parameter=$key>\n$value\n</parameter>\n"),
    Form("seed", f"<seed:tool_call>\n{_FUNCTION}</seed:tool_call>", between="\n",
         pair="<parameter=$key>$value</parameter>\n"),
    Form("minimax", '<invoke name="$name">\n$args</invoke>\n', "<minimax:tool_call>\n", "",
         "</minimax:tool_call>", '<parameter name="$key">$value</parameter>\n'),
    Form("minicpm", '<function name="$name">$args</function>', between="\n",
         pair='<param name="$key">$value</param>'),
    Form("gemma", "<|tool_call>call:$name{$args}<tool_call|>", pair="$key:$value", join=",",
         quote='<|"|>'),
    Form("functionary v3.1", "<function=$name>$args</function>"),
    Form("functionary v3.2", ">>>$name\n$args", aside=">>>all\n",
         head=r">>>(?!all\n)" + NAME + r"\s*"),
    Form("harmony", "<|channel|>commentary to=functions.$name <|constrain|>json<|message|>$args<|call|>",
         one=True, trigger=" to=functions.",
         head=r"(?:<\|start\|>assistant)?(?:<\|channel\|>(?:commentary|analysis))?\s*to=functions\." + NAME
         + r"(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>"),
    Form("llama", '{"name": "$name", "parameters": $args}', alone=True, one=True),
)  # fmt: skip
"""The forms, what is more special first: a template is of the first that reads its calls."""

_ASSISTANT = r"(?:<\|start\|>assistant)?"
THINK = Thinking("<think>\n", "\n</think>\n\n")
THINKINGS = (
    Thinking("<|START_THINKING|>", "<|END_THINKING|>", drop=r"<\|(?:START|END)_RESPONSE\|>"),
    Thinking("<|channel|>analysis<|message|>", "<|end|><|start|>assistant",
             rf"{_ASSISTANT}<\|channel\|>analysis<\|message\|>", r"<\|end\|>",
             rf"{_ASSISTANT}<\|channel\|>(?:final|commentary)(?: <\|constrain\|>\w+)?<\|message\|>|<\|end\|>"),
    Thinking("[THINK]", "[/THINK]"),
    Thinking("<|channel>thought\n", "<channel|>"),
    Thinking("<seed:think>", "</seed:think>"),
    Thinking("<think:opensource>", "</think:opensource>"),
    THINK,
)  # fmt: skip
"""The marks of reasoning; a template has those of the first whose opening it writes."""
