"""Texts that keep to a schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from schemas import HELD, REFUSED

import tinyllm
from tinyllm.engine.constraint import compile_grammar
from tinyllm.errors import ArgumentError, NumericError, UnsupportedModel
from tinyllm.sampling import Sampler, SamplingParams

DRAFT = jsonschema.Draft202012Validator
PLAIN = {"json_schema": HELD["list of objects"], "max_tokens": 60}


@cache
def bundled(device: str = "cpu") -> tinyllm.Model:
    return tinyllm.load(device=device)


@cache
def loaded(path: Path) -> tinyllm.Model:
    return tinyllm.load(path)


def check(done: tinyllm.Completion, schema: Any) -> bool:
    """Whether the text ended by itself; one that did is valid."""
    if done.finish_reason == "stop":
        jsonschema.validate(json.loads(str(done)), schema, format_checker=DRAFT.FORMAT_CHECKER)
    return done.finish_reason == "stop"


# ---- schemas


@pytest.mark.parametrize("name", HELD)
def test_a_text_keeps_to_its_schema(name: str) -> None:
    model, schema = bundled(), HELD[name]
    texts = [model.generate("A", 200, seed=s, json_schema=schema) for s in (1, 2)]
    ended = [check(t, schema) for t in texts]
    # these may go on for ever, and a model of stories writes no "@" by itself
    assert any(ended) or name in ("linked list", "recursion", "number", "email")


@pytest.mark.parametrize("name", ["nested", "union", "pydantic"])
def test_a_chat_keeps_to_its_schema(name: str, smollm2: Path) -> None:
    messages = [{"role": "user", "content": "Answer in JSON."}]
    done = loaded(smollm2).chat(messages, max_tokens=150, temperature=0, json_schema=HELD[name])
    assert check(done, HELD[name])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chats_keep_to_all_schemas(temperature: float, smollm2: Path) -> None:
    messages = [{"role": "user", "content": "Invent an example, in JSON."}]
    options: Any = {"max_tokens": 512, "temperature": temperature, "seed": 0}
    ended = {
        name: check(loaded(smollm2).chat(messages, json_schema=schema, **options), schema)
        for name, schema in HELD.items()
    }
    # how deep a recursive answer goes is the model's choice: this one goes on
    assert (
        np.mean([e for name, e in ended.items() if name not in ("recursion", "linked list")])
        >= 0.95
    )


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_schema_that_cannot_be_held_is_refused_by_keyword(keyword: str) -> None:
    state = bundled().new_state()
    with pytest.raises(ArgumentError, match=rf"^json_schema: .*{re.escape(keyword)}\b") as e:
        bundled().generate("A", json_schema=REFUSED[keyword], state=state)
    assert "\n" not in str(e.value)
    assert not state.ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema is no JSON"),
        ({"json_schema": {"enum": [object()]}}, "json_schema is no JSON"),
        ({"json_schema": [1]}, r"expected an object"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": 3}, "regex=3; expected a text"),
        ({"grammar": ""}, "grammar=''; expected a text"),
        ({"grammar": 'root ::= "a" c'}, "grammar: .*'c' not found"),
        ({"grammar": 'start: "a'}, "grammar: .*lexer error"),
        ({"grammar": "start: a", "regex": "a"}, "regex and grammar are given"),
    ],
)
def test_what_is_no_constraint_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as e:
        bundled().generate("A", 3, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grammar": r'root ::= "\u00e9\U0001f600" [\u00e8]'}, "é😀è"),
        ({"grammar": r'root ::= "\u0041\u0022\\u0042"'}, r'A"\u0042'),
        ({"regex": " "}, " "),
    ],
)
def test_escapes_and_spaces_are_what_they_say(options: Any, text: str) -> None:
    assert bundled().generate("A", 30, **options).text == text


def test_what_grows_too_large_names_its_argument() -> None:
    constraint = compile_grammar(bundled().tokenizer, bundled().network.n_vocab, regex="a+").begin()
    with pytest.raises(ArgumentError, match="regex cannot be kept to any longer"):
        constraint.take(bundled().tokenizer.encode_inside("b")[0])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ArgumentError, match=r"regex needs llguidance: pip install 'tinyllm\[json\]'"
    ):
        bundled().generate("A", 3, regex="a")


def test_a_model_without_a_vocabulary_has_no_constraints() -> None:
    with pytest.raises(UnsupportedModel, match="regex needs a vocabulary"):
        compile_grammar(None, 10, regex="a")


# ---- expressions and grammars


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, r"\d{4}-\d{2}"),
        ({"regex": "(yes|no), [a-z]{1,9}[.]"}, r"(yes|no), [a-z]{1,9}\."),
        ({"grammar": 'root ::= "(" root ")" | [0-9]'}, r"\(*\d\)*"),
        ({"grammar": 'start: "a" b~2\nb: "x" | "y"'}, "a[xy][xy]"),
        ({"json_schema": '{"enum": ["one", "two"]}'}, '"(one|two)"'),
    ],
)
def test_a_text_keeps_to_its_grammar(options: Any, pattern: str) -> None:
    done = [bundled().generate("A", 100, seed=s, **options) for s in range(3)]
    assert [d.finish_reason for d in done] == ["stop"] * 3
    assert [d.text for d in done if not re.fullmatch(pattern, d.text)] == []


def test_every_json_is_allowed_by_an_empty_schema() -> None:
    done = bundled().generate("A", 60, seed=1, json_schema={})
    if done.finish_reason == "stop":
        json.loads(str(done))


# ---- beside everything else


def test_alone_and_in_a_batch_texts_are_the_same() -> None:
    prompts = ["Once", "The dog said that he", "One day"]
    batch = bundled().generate(prompts, seed=None, temperature=0, **PLAIN)
    alone = [bundled().generate(p, temperature=0, **PLAIN) for p in prompts]
    assert [b.ids for b in batch] == [a.ids for a in alone]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_log_probabilities_change_nothing(temperature: float) -> None:
    options: Any = {**PLAIN, "temperature": temperature, "seed": 3, "repeat_penalty": 1.2}
    plain = bundled().generate("Once", **options)
    told = bundled().generate("Once", logprobs=2, echo=True, **options)
    assert told.ids == plain.ids
    assert told.logprobs is not None
    assert [t.id for t in told.logprobs][: len(told.ids)] == told.ids
    state = bundled().new_state()
    logits = bundled().logits([*told.prompt_ids, *told.ids], state)
    for t, row in zip(told.logprobs, logits[len(told.prompt_ids) - 1 :], strict=False):
        sampler = Sampler(SamplingParams(), len(row), bundled().network.be.top_k)
        assert (t.logprob, t.top) == sampler.logprobs(row, t.id, 2)


def test_devices_write_the_same() -> None:
    texts = [bundled(d).generate("Once", temperature=0, **PLAIN).ids for d in ("cpu", "reference")]
    assert texts[0] == texts[1]


def test_forced_text_takes_no_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = bundled(), []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda *a, **k: steps.append(a[0][0][1]) or forward(*a, **k)
    )
    done = model.generate("Once", 50, json_schema={"const": {"name": "Lily", "friends": ["Tom"]}})
    assert str(done) == '{"name": "Lily", "friends": ["Tom"]}'
    told = model.generate("Once", 50, json_schema={"const": {"name": "Lily"}}, stream=True)
    assert "".join(told) == '{"name": "Lily"}'
    assert steps == []  # all of it is forced
    done = model.generate("Once", 50, json_schema=HELD["boolean"])
    assert check(done, HELD["boolean"])
    assert (
        len(steps) <= 4 < len(done.ids) / 2
    )  # two choices; what stands between is read with the second
    assert done.timings.n_prompt + done.timings.n_reused == len(done.prompt_ids)
    assert done.timings.n_generated == len(done.ids) + 1  # and the end


def test_a_stream_is_the_text_in_pieces() -> None:
    whole = bundled().generate("Once", seed=5, **PLAIN)
    pieces = bundled().generate("Once", seed=5, stream=True, **PLAIN)
    assert "".join(pieces) == str(whole)
    assert pieces.completion.ids == whole.ids


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_stop_string_ends_forced_text(logprobs: int | None) -> None:
    schema, state = {"const": "one two three four"}, bundled().new_state()
    done = bundled().generate(
        "A", 50, json_schema=schema, stop=" three", state=state, logprobs=logprobs
    )
    assert (done.text, done.finish_reason) == ('"one two', "stop")
    assert state.ids == [*done.prompt_ids, *done.ids]  # nothing behind the stop


@pytest.mark.parametrize("logprobs", [None, 0])
def test_max_tokens_and_the_context_end_forced_text(logprobs: int | None) -> None:
    schema = {"const": "one two three four five six seven eight"}
    done = bundled().generate("A", 3, json_schema=schema, logprobs=logprobs)
    assert (len(done.ids), done.finish_reason) == (3, "length")
    state = bundled().new_state(8)
    done = bundled().generate("A", 50, json_schema=schema, state=state, logprobs=logprobs)
    assert done.finish_reason == "context"
    assert len(done.prompt_ids + done.ids) == 9


def test_bias_and_processors_choose_among_what_is_allowed() -> None:
    model = bundled()
    yes = model.tokenizer.encode("yes", add_special=False)[0]
    processed = model.generate(
        "A", 9, regex="[0-9]{3}", logits_processor=lambda ids, x: np.zeros_like(x)
    )
    assert re.fullmatch("[0-9]{3}", str(processed))
    assert re.fullmatch(
        "[0-9]{3}", str(model.generate("A", 9, regex="[0-9]{3}", logit_bias={yes: 99.0}))
    )


def test_a_bias_against_all_that_is_allowed_is_an_error() -> None:
    model = bundled()
    digits = {i: -float("inf") for i in range(model.tokenizer.n_vocab)}
    with pytest.raises(NumericError):
        model.generate("A", 9, regex="[0-9]{3}", logit_bias=digits)


# ---- vocabularies


@pytest.mark.parametrize(
    "name", ["llama-spm", "llama-bpe", "qwen2", "phi-3", "deepseek-llm", "gpt-2", "falcon"]
)
def test_vocabularies_write_forced_text_to_the_byte(name: str, data: Path) -> None:
    file = tinyllm.gguf.open(data / "tokenizers" / f"ggml-vocab-{name}.gguf")
    t = tinyllm.tokenizers.load(file.metadata)
    text = ' x<tool_call>\n{"name": "é日本 🙂", "n": 1}'
    compiled = compile_grammar(t, t.n_vocab, grammar=f"start: {json.dumps(text)}")
    assert compiled is not None
    place, ids = compiled.begin(), []
    while (only := place.forced()) is not None and only not in t.eog:
        ids.append(only)
        place.take(only)
    assert b"".join(map(t.token_bytes, ids)).decode() == text
    allowed = compiled.begin().allowed()
    assert allowed.shape == (t.n_vocab,)
    assert not allowed[list(t.eog)].any()
