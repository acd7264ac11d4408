# ruff: noqa: E501
"""Chat templates: real ones render exactly, hostile ones get an error."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tinyllm.chat.render import chat_ids, encode_chat, pick_template, render
from tinyllm.errors import TemplateError

HELLO = [{"role": "user", "content": "Hello there"}]
NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def expected(data: Path) -> dict:
    return json.loads((data / "chat_templates" / "expected.json").read_text(encoding="utf-8"))


def test_every_real_template_renders_exactly(data: Path, expected: dict) -> None:
    cases, wrong = 0, []
    for name, renderings in expected["rendered"].items():
        source = (data / "chat_templates" / "templates" / name).read_text(encoding="utf-8")
        for case, want in renderings.items():
            conversation, generation = case.split("|gen=")
            try:
                got = render(
                    source,
                    expected["conversations"][conversation],
                    add_generation_prompt=generation == "True",
                    bos_token=expected["bos_token"],
                    eos_token=expected["eos_token"],
                    clock=lambda: datetime.fromisoformat(expected["strftime_now"]),
                )
            except TemplateError as error:
                got = str(error)
            cases += 1
            reason = want.get("error", "").partition(": ")[2]
            if got != want.get("text") and not (reason and reason in got):
                wrong.append((name, case, got))
    assert cases == 560
    assert not wrong


RENDERS = {
    "{% for m in messages %}{{ m.role }}{% if not loop.last %},{% endif %}{% endfor %}": "user",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}": "013",
    "{% for i in range(6) if i is odd %}{{ i }}{% endfor %}": "135",
    "a{% generation %}b{{ messages[0].content }}{% endgeneration %}c": "abHello therec",
    "{{ {'a': '<é>\\'', 'b': [1, none]} | tojson }}": '{"a": "<é>\'", "b": [1, null]}',
    "{{ [1] | tojson(indent=2) }}": "[\n  1\n]",
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}": '{"a":2,"b":1}',
    "{{ strftime_now('%d %b %Y') }}": "02 Jan 2026",
    "{{ tools is defined }}{{ documents is defined }}": "FalseFalse",
    "{{ (messages + messages) | length }}": "2",
    "{{ messages[:0] }}{{ messages[0].content[1:4] }}": "[]ell",
    "{% set ns = namespace(n=0) %}{% for c in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "3",
    "{% if messages | selectattr('role', 'equalto', 'tool') %}yes{% endif %}": "yes",
    "{{ messages | map(attribute='role') | join('-') }}": "user",
    "{{ '%s is %d' % ('a', 2) }} {{ '{} and {x:>3}'.format(1, x=2) }}": "a is 2 1 and   2",
    "{{ 'a-b'.split('-') | reverse | join }}{{ ' x '.strip() }}": "bax",
    "{{ 'a' ~ 1 ~ none }}{{ 2 ** 10 }}{{ 'ab' * 2 }}": "a1None1024abab",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('y') }}": "[y]",
    "{{ missing }}|{{ messages[0].nothing }}": "|",
    "  {% if true %}\n  x\n  {% endif %}\n": "  x\n",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter lower %}QQ{% endfilter %}": "A1qq",
    "{{ 'a<think>b</think>c' | regex_replace('^[\\\\s\\\\S]*</think>', '') }}": "c",
    "{{ '3' | int + 1 }}{{ [3, 1] | sort | first }}{{ 'x' in 'xyz' }}{{ 'role' in messages[0] }}": "41TrueTrue",
}


@pytest.mark.parametrize("template", RENDERS)
def test_renders(template: str) -> None:
    assert render(template, HELLO, clock=lambda: NOW) == RENDERS[template]


ATTACKS = {
    "syntax error": "{% for %}",
    "unclosed": "{{ 'a'",
    "unknown tag": "{% frobnicate %}",
    "nested ranges": "{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested ranges, filtered": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "nested lists": "{% for i in [1]*9999 %}{% for j in [1]*9999 %}{% for k in [1]*9999 %}x{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "range as list": "{{ range(10**9) | list }}",
    "string product": "{{ 'a' * 10**9 }}",
    "constant product": "{% if 'a' * 1000000000 == 'b' %}{% endif %}",
    "list product": "{{ ([1] * 10**9) | length }}",
    "product doubling": "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a * 2 %}{% endfor %}{{ ns.a }}",
    "concatenation doubling": "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "wide concatenation": "{% set a = 'x' * 1000000 %}{{ " + "~".join(["a"] * 3000) + " }}",
    "sum doubling": "{% set ns = namespace(a='aa') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "straight doubling": "{% set a = 'aa' %}" + "{% set a = a ~ a %}" * 60,
    "join doubling": "{% set a = 'aa' %}" + "{% set a = [a, a] | join(a) %}" * 60,
    "replace doubling": "{% set a = 'aa' %}" + "{% set a = a | replace('a', a) %}" * 60,
    "replace method": "{% set a = 'aa' %}" + "{% set a = a.replace('a', a) %}" * 60,
    "method join": "{{ ('x' * 100000).join(['y'] * 100000) }}",
    "macro doubling": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set a = 'aa' %}" + "{% set a = f(a) %}" * 60,
    "block doubling": "{% set a = 'aa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "list doubling": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "list doubling, compared": "{% set a=[1] %}{% set b=[1] %}" + "{% set a=[a,a] %}{% set b=[b,b] %}" * 60 + "{{ a == b }}",
    "dict doubling": "{% set a = {} %}" + "{% set a = dict(a=a, b=a) %}" * 60 + "{{ a | tojson }}",
    "namespace doubling": "{% set a = 1 %}" + "{% set a = namespace(a=a, b=a) %}" * 60 + "{{ a }}",
    "batch doubling": "{% set a = [1] %}" + "{% set a = [1] | batch(999, a) | list %}" * 9 + "{{ a }}",
    "list into itself": "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1.5 }}",
    "percent many": "{{ '%(a)s' * 9999 % {'a': 'x' * 999999} }}",
    "percent unclosed": "{{ ('%(' * 99999) % {} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format long width": "{{ '{:99999999999999999999}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format repeated": "{{ ('{0}' * 9999).format('x' * 999999) }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map attribute": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**6) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9) }}",
    "huge power": "{{ 10 ** (10 ** 10) }}",
    "squaring": "{% set ns = namespace(a=99) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "huge int": "{{ ('9' * 4200) | int }}",
    "int method": "{{ (1).to_bytes(10**9, 'big') }}",
    "sum of lists": "{{ ([[1]] * 50000) | sum(start=[]) | length }}",
    "long comparison": "{% set a = 'x' * 999999 %}{% set b = a[1:] ~ 'x' %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "long comparisons": "{% set a = 'x' * 999999 %}{% set b = a[1:] ~ 'x' %}{{ " + " and ".join(["a == b"] * 4000) + " }}",
    "long search": "{% set a = 'x' * 999999 %}{% for i in range(99999) %}{% if 'y' in a %}{% endif %}{% endfor %}",
    "long slices": "{% set a = 'x' * 999999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "long tests": "{% set a = 'x' * 999999 %}{% for i in range(99999) %}{% if a is lower %}{% endif %}{% endfor %}",
    "many long strings": "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + ['x' * 999999] %}{% endfor %}",
    "many long printed": "{% set x %}{% for i in range(9999) %}{{ 'x' * 999999 }}{% endfor %}{% endset %}",
    "filter chain": "{{ range(99999)" + "| map(attribute='x')" * 500 + " | list | length }}",
    "filters in a loop": "{% for i in range(99999) %}{% if range(99999) | selectattr('x') | list %}{% endif %}{% endfor %}",
    "sort in a loop": "{% for i in range(99999) %}{% if range(9999) | sort(reverse=true) %}{% endif %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% set a = [1] %}{% for x in a recursive %}{{ loop(a) }}{% endfor %}",
    "self block": "{% block a %}{{ self.a() }}{% endblock %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 90 + "]" * 90 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for i in 'a' %}" * 30 + "{% endfor %}" * 30,
    "regular expression": "{{ ('a' * 5000 ~ 'c') | regex_replace('(a|aa|a.)+(a|aa)+$', '') }}",
    "regular expressions": "{% for i in range(9999) %}{{ ('a' * 20000) | regex_replace('a*a*a*b', '') }}{% endfor %}",
    "replacement doubling": "{% set a = 'aaaa' %}" + "{% set a = a | regex_replace('a', a) %}" * 60,
    "regular expression malformed": "{{ 'a' | regex_replace('(', '') }}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "class printed": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "attr filter": "{{ 'a' | attr('format') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "self": "{{ self._TemplateReference__context }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "lipsum called": "{{ lipsum(10**9) }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].system('true') }}",
    "function globals": "{{ raise_exception.__globals__ }}",
    "environment": "{{ strftime_now.func.__globals__ }}",
    "fromkeys": "{{ dict.fromkeys(range(99999), 'x' * 999999) }}",
    "mutate messages": "{{ messages.append(1) }}",
    "clear message": "{{ messages[0].clear() }}",
    "set attribute": "{% set messages.x = 1 %}",
    "include": "{% include 'x' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "autoescape": "{% autoescape true %}{{ 'a' }}{% endautoescape %}",
    "raise": "{{ raise_exception('no tools here') }}",
    "division by zero": "{{ 1 / 0 }}",
    "type error": "{{ 'a' + 1 }}",
    "undefined called": "{{ missing() }}",
    "undefined attribute": "{{ missing.x }}",
    "strftime width": "{{ strftime_now('%1000000000d') }}",
    "strftime long": "{{ strftime_now('%c' * 100000) }}",
    "not json": "{{ namespace() | tojson }}",
    "unknown filter": "{{ 'x' | frobnicate }}",
    "unknown test": "{{ 'x' is frobnicated }}",
    "ten megabytes": "x" * (10 << 20),
    "dense": "{{a}}" * 13_000,
    "dense statements": "{% set a = 1 %}" * 4_300,
    "output": "{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}",
    "literal output in a macro": "{% macro f() %}{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}{% endmacro %}{{ f() }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_template_gets_an_error(name: str) -> None:
    with pytest.raises(TemplateError, match=r"^chat template(, line \d+)?: ..") as caught:
        render(ATTACKS[name], HELLO, clock=lambda: NOW)
    assert len(str(caught.value)) < 300


def test_hostile_templates_take_a_bounded_number_of_steps() -> None:
    """The allowance, not the machine's speed, ends a rendering: two runs stop at the same place."""
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{{ raise_exception(i ~ '') if j == 7 and i == LIMIT }}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="too many steps"):
        render(template.replace("LIMIT", "99"), HELLO)
    with pytest.raises(TemplateError, match=r": 0$"):
        render(template.replace("LIMIT", "0"), HELLO)


def test_the_templates_own_message_and_line_are_told() -> None:
    with pytest.raises(TemplateError, match=r"^chat template, line 2: roles must alternate$"):
        render("x\n{{ raise_exception('roles must alternate') }}", HELLO)


def test_output_grows_with_the_input() -> None:
    long = [{"role": "user", "content": "x" * (3 << 20)}]
    assert len(render("{{ messages[0].content }}{{ messages[0].content }}", long)) == 6 << 20


def test_a_long_conversation_has_the_steps_it_needs(data: Path, expected: dict) -> None:
    source = (data / "chat_templates/templates/openai-gpt-oss-120b.jinja").read_text(
        encoding="utf-8"
    )
    turns = [
        {"role": r, "content": "word " * 40} for _ in range(500) for r in ("user", "assistant")
    ]
    text = render(source, turns, clock=lambda: NOW)
    assert text.count("word") == 40_000


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "a"}]
    render("{% set messages = messages + [{'role': 'x'}] %}{{ messages | length }}", messages)
    assert messages == [{"role": "user", "content": "a"}]


def test_tools_and_documents_are_defined_when_given() -> None:
    template = "{{ tools[0].name }}{{ documents | length }}{{ enable_thinking }}"
    assert (
        render(template, HELLO, tools=[{"name": "f"}], documents=[], enable_thinking=True)
        == "f0True"
    )


@pytest.mark.parametrize("value", [None, 3, ["x"]])
def test_a_template_that_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(TemplateError, match="is a text"):
        render(value, HELLO)  # type: ignore[arg-type]


def test_pick_template_knows_single_named_and_absent() -> None:
    key = "tokenizer.chat_template"
    named = {key: "a", key + "s": ["tool_use"], key + ".tool_use": "b"}
    listed = {key: [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}
    for metadata in (named, listed):
        assert pick_template(metadata) == "a"
        assert pick_template(metadata, "tool_use") == "b"
        with pytest.raises(TemplateError, match="the file has: default, tool_use"):
            pick_template(metadata, "rag")
    assert pick_template({}) is None


@pytest.mark.parametrize("value", [7, [{"name": "default"}]])
def test_pick_template_refuses_what_is_not_text(value: object) -> None:
    with pytest.raises(TemplateError):
        pick_template({"tokenizer.chat_template": value})


class Characters:
    """A tokenizer of one id per character, id 1 for BOS `<s>` and 2 for `</s>`."""

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        ids = [1] if add_special else []
        while text:
            special = parse_special and text.startswith("<s>")
            ids.append(1 if special else ord(text[0]))
            text = text[3 if special else 1 :]
        return ids

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return "".join({1: "<s>", 2: "</s>"}.get(i) or chr(i) for i in ids)


@pytest.mark.parametrize("text", ["<s>ab", "ab"])
def test_bos_is_added_once(text: str) -> None:
    assert encode_chat(Characters(), text, bos_id=1) == [1, 97, 98]


def test_chat_ids_render_and_encode() -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ids = chat_ids(Characters(), template, [{"role": "user", "content": "a"}], bos_id=1, eos_id=2)
    assert Characters().decode(ids) == "<s>a</s>"


def test_importing_chat_does_not_import_jinja2() -> None:
    code = "import sys, tinyllm.chat; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_templates_of_gpt4alls_list_render(data: Path) -> None:
    models = json.loads((data / "models3.json").read_text(encoding="utf-8"))
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": f"<think>hm</think>{r} text"} for r in roles]
    texts = [render(m["chatTemplate"], messages) for m in models if m["chatTemplate"]]
    assert len(texts) == 25
    assert (
        sum("user text" in text for text in texts) == 24
    )  # WizardLM's names a variable it never sets
