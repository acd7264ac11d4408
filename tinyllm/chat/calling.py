"""The grammar that holds an answer to the form of calls and to the tools' schemas, in llguidance's Lark.

A control token of the vocabulary is written ``<[id]>``; other text is a literal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

from .forms import Form
from .tools import Habits, is_text, parameters_of

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY = r"(.|\n)*"


def grammar_of_calls(
    habits: Habits,
    functions: Sequence[Mapping[str, Any]],
    control: Mapping[str, int],
    eog: frozenset[int],
    *,
    required: bool,
    one: bool = False,
    thinks: bool = False,
    said: str = "",
) -> str:
    """A Lark grammar of answers that call functions, each under its schema.

    Parameters
    ----------
    habits : Habits
        With a form.
    functions : sequence of mapping
        What may be called.
    control : mapping of str to int
        The vocabulary's control tokens, by how they are spelled.
    eog : frozenset of int
        Those of them that end an answer.
    required : bool
        The answer has at least one call, with nothing but reasoning before it. Otherwise it is free until it
        begins a call.
    one : bool
        The answer has one call at most.
    thinks : bool
        The prompt has opened the reasoning.
    said : str
        What of the first call's text the prompt has written already.
    """
    form = habits.form
    assert form is not None
    g = _Lark(control, eog)
    g.ruled("pause", g.until(habits.thinking.close))
    calls = [form.call.replace("$name", f["name"]) for f in functions]
    arguments = [g.arguments(form, f, n) for n, f in enumerate(functions)]
    trigger = "" if required or form.alone else _trigger(form)
    skipped = len(said) if not trigger else (form.first + form.call).index(trigger) + len(trigger)
    firsts, later = [], []
    for call, a in zip(calls, arguments, strict=True):
        firsts.append(g.literal((form.first + call)[skipped:], a))
        later.append(g.literal(form.between + call, a))
    more = "" if form.one or one else "later* "
    g.ruled("later", " | ".join(later))
    calls_rule = f"({' | '.join(firsts)}) {more}{g.literal(form.last)}"
    g.ruled("calls", calls_rule)
    reasoning = "pause" if thinks else ""
    if habits.reasons and not thinks:
        reasoning = f"({g.literal(habits.thinking.open)} pause)?"
    if required:
        return g.text(f"{reasoning} calls")
    if form.alone:
        g.ruled("plain", f"/[^{{]{ANY}/ | {g.others()}")
        return g.text(f"{reasoning} (plain free | calls)?")
    if trigger in control:
        g.ruled("free", f"(TEXT | {g.others(trigger)})*")
        return g.text(f"free (<[{control[trigger]}]> calls)?", f"TEXT: /{ANY}/")
    mark = _pattern(trigger)
    return g.text(
        "free (begin calls)?", f"TEXT: /{ANY}/ & ~/{ANY}{mark}{ANY}/", f"begin[lazy]: /{ANY}{mark}/"
    )


def _trigger(form: Form) -> str:
    """The text from which on an answer must be a call."""
    text = form.first + form.call
    found = regex.match(r"\s*(?:<\|[^>]*\|>|<｜[^>]*｜>|\[[A-Z_]+\]|[^\s$]+)", text)
    return form.trigger or (found[0] if found else text[:1])


def _pattern(text: str) -> str:
    """A text as a regular expression between slashes."""
    return regex.sub(r"[\\.+*?()|\[\]{}^$/]", r"\\\g<0>", text).replace("\n", "\\n")


@dataclass
class _Lark:
    control: Mapping[str, int]
    eog: frozenset[int]
    rules: dict[str, str] = field(default_factory=dict)

    def ruled(self, name: str, body: str) -> str:
        """Add a rule, and return its name."""
        self.rules[name] = body.strip() or '""'
        return name

    def text(self, start: str, *terminals: str) -> str:
        """The grammar, with only rules that it reaches."""
        self.rules.setdefault("free", f"(TEXT | {self.others()})*")
        terminals = terminals or (f"TEXT: /{ANY}/",)
        lines = [f"start: {start}", *(f"{n}: {b}" for n, b in self.rules.items()), *terminals]
        return "\n".join(lines) + "\n"

    def others(self, *but: str) -> str:
        """Any control token that neither ends the answer nor is one of these; never one if there is none."""
        left = sorted({i for s, i in self.control.items() if s not in but} - self.eog)
        return f"<[{','.join(map(str, left))}]>" if left else "TEXT"

    def literal(self, text: str, arguments: str = "") -> str:
        """A row's text, with ``$args`` and ``$id`` as rules; a token that ends the answer ends it."""
        parts = []
        for part in self._split(text):
            if part in self.control:
                if self.control[part] in self.eog:
                    break
                parts.append(f"<[{self.control[part]}]>")
            elif part == "$args":
                parts.append(arguments)
            elif part == "$id":
                parts.append("/[a-zA-Z0-9]{9}/")
            elif part:
                parts.append(json.dumps(part))
        return " ".join(parts)

    def _split(self, text: str) -> list[str]:
        marks = [s for s in self.control if s and s in text] + ["$args", "$id"]
        marks.sort(key=len, reverse=True)
        found: list[str] = regex.split("(" + "|".join(map(regex.escape, marks)) + ")", text)
        return found

    def until(self, close: str) -> str:
        """Any text up to, and with, what closes it."""
        head, *rest = [part for part in self._split(close) if part]
        after = self.literal(close[len(head) :]) if rest else ""
        if head in self.control:
            return f"ANYTHING {self.literal(close)}" if self._anything() else ""
        name = f"until{len(self.rules)}"
        self.ruled(f"{name}[lazy]", f"/{ANY}{_pattern(head)}/")
        return f"{name} {after}"

    def _anything(self) -> str:
        return self.ruled("ANYTHING", f"/{ANY}/")

    def arguments(self, form: Form, function: Mapping[str, Any], n: int) -> str:
        """The rule of a function's arguments."""
        schema = parameters_of(function)
        if not form.pair:
            whole = {"type": "object", **schema}
            if "properties" in whole and not {"$ref", "allOf", "anyOf", "oneOf"} & set(whole):
                whole.setdefault("additionalProperties", False)  # none but those that are described
            return self.ruled(f"args{n}", self.json(whole, schema))
        needed: list[str] = []
        others: list[str] = []
        for key, value in schema.get("properties", {}).items():
            pair = self.pair(form, key, value, schema, f"args{n}x{len(needed) + len(others)}")
            (needed if key in schema.get("required", ()) else others).append(pair)
        if not form.join:
            return self.ruled(f"args{n}", " ".join([*needed, *(f"{p}?" for p in others)]))
        join = json.dumps(form.join)
        more = f"({join} ({' | '.join(others)}))*" if others else ""
        if needed:
            return self.ruled(f"args{n}", f" {join} ".join(needed) + f" {more}")
        return self.ruled(f"args{n}", f"(({' | '.join(others)}) {more})?" if others else "")

    def pair(self, form: Form, key: str, value: Any, schema: Mapping[str, Any], name: str) -> str:
        """The rule of one argument."""
        plain = is_text(schema.get("properties", {}), key)
        pair = form.pair.replace("$key", key).replace("$string", "true" if plain else "false")
        before, after = pair.split("$value")
        before, after = before + form.quote * plain, form.quote * plain + after
        values = value.get("enum", [value["const"]] if "const" in value else []) if plain else []
        if values:
            body = f"({' | '.join(map(json.dumps, values))}) {self.literal(after)}"
        elif plain:
            body = self.until(after)
        else:
            body = f"{self.ruled(f'{name}v', self.json(value, schema))} {self.literal(after)}"
        return self.ruled(name, f"{self.literal(before)} {body}")

    def json(self, schema: Any, root: Mapping[str, Any]) -> str:
        """A value of JSON; what a schema refers to comes with it."""
        shared = {k: root[k] for k in ("$defs", "definitions") if k in root}
        made = {**shared, **(schema if isinstance(schema, Mapping) else {})}
        text = json.dumps({"x-guidance": JSON_STYLE, **made})
        return "%json " + text.replace("::=", "\\u003a:=")  # which would make it a grammar in GBNF
