"""Calls of tools that a model writes: in every form, under the tools' schemas, read back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from spelled import call

import tinyllm
from tinyllm.chat.calling import grammar_of_calls
from tinyllm.chat.forms import FORMS, THINK, THINKINGS, Form
from tinyllm.chat.tools import Habits, Reader
from tinyllm.engine.constraint import Constraint, compile_grammar
from tinyllm.errors import ArgumentError, TemplateError

SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "sure": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["place", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
TIME = {"name": "get-time", "description": "The time."}
TOOLS = [{"type": "function", "function": f} for f in (WEATHER, TIME)]
HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "user", "content": "How is the weather in Rome?"}]
HARMONY = THINKINGS[1]


@cache
def bundled() -> tinyllm.Model:
    return tinyllm.load()


@cache
def tokenizer(path: Path) -> Any:
    return tinyllm.tokenizers.load(tinyllm.gguf.open(path).metadata)


def habits(form: Form) -> Habits:
    return Habits(form, HARMONY if form.name == "harmony" else THINK)


def accepted(place: Constraint, t: Any, text: str) -> int:
    """How many characters of a text the constraint takes; -1: all, and the text may end there."""
    done, whole = 0, text.encode()
    while done < len(whole):
        rest = whole[done:]
        allowed = place.allowed()
        # forced text comes in tokens of its own, which may end within a character
        usual = t.encode_inside(rest.decode("utf-8", "replace"))[:1]
        some = [*usual, *allowed.nonzero()[0][:256].tolist()]
        token = next(
            (i for i in some if allowed[i] and (b := t.token_bytes(i)) and rest.startswith(b)), None
        )
        if token is None:
            return done
        place.take(token)
        done += len(t.token_bytes(token))
    return -1 if place.allowed()[t.eos] else done


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_row_is_what_its_grammar_accepts(form: Form, required: bool, data: Path) -> None:
    t = tokenizer(data / "tokenizers" / "ggml-vocab-qwen2.gguf")
    grammar = grammar_of_calls(
        habits(form), [WEATHER, TIME], t.special_tokens, t.eog, required=required
    )
    compiled = compile_grammar(t, t.n_vocab, grammar=grammar)
    assert compiled is not None
    good = {"place": "Rome", "days": 3, "note": "a b"}
    assert accepted(compiled.begin(), t, call(form, "get_weather", good) + form.last) == -1
    bare = call(form, "get-time", {}) + form.last
    assert accepted(compiled.begin(), t, bare) == -1
    if not form.one:
        two = call(form, "get_weather", good) + call(form, "get-time", {}, first=False) + form.last
        assert accepted(compiled.begin(), t, two) == -1
    for name, wrong in (("get_wether", good), ("get_weather", {**good, "place": "Bonn"})):
        assert accepted(compiled.begin(), t, call(form, name, wrong) + form.last) >= 0
    plain = accepted(compiled.begin(), t, "It is [warm], <b>I</b> think.\n")
    assert (plain == -1) is not required


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_required_call_is_valid_whenever_the_answer_ends(form: Form) -> None:
    model = bundled()
    t = model.tokenizer
    grammar = grammar_of_calls(
        habits(form), [WEATHER, TIME], t.special_tokens, t.eog, required=True, thinks=False
    )
    ended = 0
    for seed in range(3):
        done = model.generate("Once", 150, seed=seed, grammar=grammar, temperature=0.6)
        reader = Reader(habits(form), [WEATHER, TIME])
        reader.feed(done.text)
        reader.finish()
        ended += bool(reader.calls)
        if done.finish_reason == "stop":
            assert reader.calls, done.text
            assert "".join(reader.content).strip() == "", done.text
        for made in reader.calls:
            arguments = json.loads(made["function"]["arguments"])
            if made["function"]["name"] == "get_weather":
                jsonschema.validate(arguments, SCHEMA)
    assert ended  # some go on with more calls


def test_control_tokens_are_written_as_tokens(data: Path) -> None:
    t = tokenizer(data / "tokenizers" / "ggml-vocab-llama-bpe.gguf")
    form = next(f for f in FORMS if f.name == "solar")
    spelled = {"<|tool_calls|>": 128002, "<|tool_call:end|>": 128003}
    for required in (True, False):
        grammar = grammar_of_calls(habits(form), [TIME], spelled, frozenset(), required=required)
        compiled = compile_grammar(t, t.n_vocab, grammar=grammar)
        assert compiled is not None
        place = compiled.begin()
        assert place.allowed()[128002]
        place.take(128002)
        assert not place.allowed()[t.eos]
        grammar = grammar_of_calls(
            habits(form), [TIME], spelled, frozenset({128003}), required=required
        )
        assert "128003" not in grammar.split("plain")[0]


# ---- chats


@pytest.mark.parametrize("choice", ["required", "get-time", "get_weather"])
def test_a_chat_gives_the_calls_that_are_asked_for(choice: str, smollm2: Path) -> None:
    with tinyllm.load(smollm2) as model:
        done = model.chat(QUESTION, HERMES, TOOLS, choice, max_tokens=150, temperature=0)
        assert done.finish_reason == "stop", done.text
        assert done.message is not None
        made = done.message["tool_calls"]
        names = {c["function"]["name"] for c in made}
        assert names <= ({choice} if choice != "required" else {"get_weather", "get-time"})
        for c in made:
            if c["function"]["name"] == "get_weather":
                jsonschema.validate(json.loads(c["function"]["arguments"]), SCHEMA)
        pieces = model.chat(
            QUESTION, HERMES, TOOLS, choice, max_tokens=150, temperature=0, stream=True,
        )  # fmt: skip
        assert "".join(pieces) == done.text
        assert pieces.completion.message == done.message
        # the answer goes back into the conversation
        told = [*QUESTION, done.message, {"role": "tool", "content": "Sunny."}]
        after = model.chat(told, HERMES, TOOLS, "none", max_tokens=4)
        assert after.message == {"role": "assistant", "content": after.text}


def test_an_answer_may_be_free_of_calls() -> None:
    done = bundled().chat(QUESTION, HERMES, TOOLS, max_tokens=20, seed=1)
    assert done.message == {"role": "assistant", "content": done.text}
    assert "tool_calls" not in done.message


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, "get_wether", "tool_choice='get_wether'; expected one of 'auto', .*'get_weather'"),
        (TOOLS, {"function": 3}, "tool_choice=None; expected"),
        (None, "required", "but there are no tools"),
        (["f"], "auto", "tools has 'f'; expected"),
        (
            [{"name": "f", "parameters": {"not": {}}}],
            "auto",
            r"tools\[0\]: the parameters of f: .*keyword not",
        ),
    ],
)
def test_wrong_tools_are_refused(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bundled().chat(QUESTION, HERMES, tools, choice)


def test_a_constraint_beside_tools_is_refused() -> None:
    with pytest.raises(ArgumentError, match="regex and tools are given"):
        bundled().chat(QUESTION, HERMES, TOOLS, regex="a")
    done = bundled().chat(QUESTION, HERMES, TOOLS, "none", regex="[0-9]{2}")
    assert len(done.text) == 2


def test_templates_that_show_no_tools_are_refused() -> None:
    with pytest.raises(TemplateError, match="template shows none"):
        bundled().chat(QUESTION, "chatml", TOOLS)
    odd = "{{ tools }}{{ messages[0].content }}"
    with pytest.raises(TemplateError, match="is not known"):
        bundled().chat(QUESTION, odd, TOOLS, "required")
    done = bundled().chat(QUESTION, odd, TOOLS, max_tokens=3)
    assert done.message == {"role": "assistant", "content": done.text}


@pytest.mark.parametrize("choice", ["required", "get_weather", "auto", "none"])
def test_a_request_writes_what_chat_writes(choice: str) -> None:
    m = bundled()
    options: dict[str, Any] = {"max_tokens": 60, "seed": 3, "template": HERMES, "tools": TOOLS}
    options["tool_choice"] = choice
    alone = m.chat(QUESTION, **options)
    with tinyllm.Engine(m) as engine:
        requests = [engine.submit(QUESTION, **options) for _ in range(3)]
        found = [r.result() for r in requests]
    for done in found:
        assert (done.text, done.ids, done.message) == (alone.text, alone.ids, alone.message)
        assert done.message["role"] == "assistant"


def test_a_request_with_tools_and_a_schema_is_refused() -> None:
    with tinyllm.Engine(bundled()) as engine, pytest.raises(ArgumentError, match="tools are given"):
        engine.submit(QUESTION, template=HERMES, tools=TOOLS, json_schema={})
