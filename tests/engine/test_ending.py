"""Texts under a constraint that end, whole, before their tokens do."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from schemas import HELD, WHOLE, record, some

import tinyllm
from tinyllm.engine.constraint import Constraint, compile_grammar
from tinyllm.errors import ArgumentError

EVENLY: dict[str, Any] = {"temperature": 1000.0, "top_k": 0, "top_p": 1.0}
PERSON = record(name={"type": "string"}, age=WHOLE)
OPEN = record(name={"type": "string"}, tags={"type": "array", "items": {"type": "string"}})
CHECK = jsonschema.Draft202012Validator.FORMAT_CHECKER


@cache
def bundled() -> tinyllm.Model:
    return tinyllm.load()


def begun(**held: Any) -> Constraint:
    compiled = compile_grammar(bundled().tokenizer, bundled().network.n_vocab, **held)
    assert compiled is not None
    return compiled.begin()


def is_valid(text: str, schema: Any) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema, format_checker=CHECK)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


KINDS = ["text", "whole", "number", "enum", "pattern", "either", "list", "record"]
VALUES = ["yes", "no", "Lily's", 7, 2.5, None, True, "a long answer"]


def invented(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the kind that people send; many have no limits."""
    kind = chance.choice(KINDS if depth < 3 else KINDS[:5])
    bounds = {"min": chance.randint(0, 3), "max": chance.randint(4, 30)}
    limits = {k: n for k, n in bounds.items() if chance.random() < 0.4}
    if kind == "text":
        return {"type": "string", **{f"{k}Length": n for k, n in limits.items()}}
    if kind == "whole":
        return {"type": "integer", **{f"{k}imum": n for k, n in limits.items()}}
    if kind == "enum":
        return {"enum": chance.sample(VALUES, 3)}
    if kind == "pattern":
        return {"type": "string", "pattern": "^20[0-9]{2}-[01]{2}$"}
    if kind == "either":
        return {"anyOf": [invented(chance, depth + 1), {"type": "null"}]}
    if kind == "list":
        n = limits.get("min", 0)
        return {"type": "array", "items": invented(chance, depth + 1), "minItems": n}
    if kind == "record":
        names = chance.sample("abcdefg", chance.randint(1, 4))
        made = record(**{name: invented(chance, depth + 1) for name in names})
        return {**made, "required": names[: chance.randint(0, 4)]}
    return {"type": "number"}


@pytest.mark.parametrize("seed", range(12))
def test_json_is_valid_at_every_limit_that_an_ending_fits(seed: int) -> None:
    schema = record(x=invented(random.Random(seed)), y={"type": "string"})
    ending = begun(json_schema=schema).ending(200)
    assert ending is not None
    n = len(ending)
    for most in (n // 2, *range(n, n + 8), n + 30):
        done = bundled().generate("A", most, seed=most, json_schema=schema, **EVENLY)
        assert is_valid(done.text, schema) or most < n, (most, n, done.text)
        assert len(done.ids) <= most


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
@pytest.mark.parametrize("how", [EVENLY, {"temperature": 0}], ids=["evenly", "greedy"])
def test_json_is_valid_at_all_limits(seed: int, how: Any) -> None:
    schema = invented(random.Random(seed))
    ending = begun(json_schema=schema).ending(200)
    assert ending is not None
    for most in range(len(ending), len(ending) + 60):
        done = bundled().generate("A", most, seed=most, json_schema=schema, **how)
        assert is_valid(done.text, schema), (most, done.text)


@pytest.mark.parametrize(
    ("held", "pattern"),
    [
        ({"regex": r"[a-z]+@[a-z]+\.(com|org)"}, None),
        ({"regex": r"([0-9]+ km, )*[0-9]+ km"}, None),
        ({"regex": r"'[^']*'"}, None),
        ({"regex": r"[a-z ]{30,}[.]"}, None),
        ({"grammar": 'root ::= "(" root ")" | [0-9]'}, r"(\()*\d\)*"),
        ({"grammar": 'start: "a" start "b" | "c"'}, "a*cb*"),
        (
            {"grammar": 'start: item ("; " item)*\nitem: /[A-Z][a-z]*/ "=" /[0-9]+/'},
            r"(.*=\d+(; )?)*",
        ),
        ({"grammar": 'start: "<b>" /[^<]*/ "</b>"'}, "<b>[^<]*</b>"),
    ],
)
def test_expressions_and_grammars_end_whole(held: Any, pattern: str | None) -> None:
    ending = begun(**held).ending(60)
    assert ending is not None
    n = len(ending)
    for most in (*range(n, n + 8), n + 30):
        done = bundled().generate("A", most, seed=most, **held)
        assert re.fullmatch(pattern or held["regex"], done.text), (most, n, done.text)


OPTIONAL = {**record(**{key: {"type": "string"} for key in "abcdef"}), "required": ["a", "f"]}
SEVENS = {"type": "integer", "multipleOf": 7, "minimum": 10}


@pytest.mark.parametrize("schema", [OPTIONAL, SEVENS, {"enum": [1, 2, "x"]}, {}])
@pytest.mark.parametrize("seed", range(3))
def test_the_shortest_ending_is_looked_for(schema: dict[str, Any], seed: int) -> None:
    n = next(n for n in range(1, 20) if len(begun(json_schema=schema).ending(n) or [0] * 20) <= n)
    assert n <= 15
    for most in (n, n + 1, n + 3, 40):
        done = bundled().generate("Once upon a time, ", most, seed=seed, json_schema=schema)
        assert is_valid(done.text, schema), (most, done.text)


@pytest.mark.parametrize("regex", ["[a-z ]*end", "[^a]*end", "[^a]{0,200}end"])
def test_what_a_loop_takes_too_ends_it(regex: str) -> None:
    for most in (3, 5, 30, 160):
        done = bundled().generate("Once upon a time, ", most, seed=most, regex=regex)
        assert re.fullmatch(regex, done.text), (most, done.text)


def test_the_shorter_of_two_ways_is_taken() -> None:
    long = "a very long alternative text that has many tokens"
    for most in (1, 2, 30):
        done = bundled().generate("A", most, seed=most, grammar=f'root ::= "x" | "{long}"')
        assert done.text in ("x", long)


def test_the_limit_says_that_it_ended_the_text() -> None:
    options: dict[str, Any] = {"json_schema": OPEN, "temperature": 0}
    long = bundled().generate("Once", 120, **options, whole=False)
    cut = bundled().generate("Once", 40, **options, whole=False)
    assert (cut.finish_reason, is_valid(cut.text, OPEN)) == ("length", False)
    assert long.ids[:40] == cut.ids
    done = bundled().generate("Once", 40, **options)
    assert (done.finish_reason, is_valid(done.text, OPEN)) == ("length", True)
    n_same = next(i for i, (a, b) in enumerate(zip(done.ids, cut.ids, strict=False)) if a != b)
    assert n_same >= 20  # as without a limit, until an ending just fits
    assert not set(done.ids) & bundled().tokenizer.eog


def test_what_ends_by_itself_in_time_is_as_without_a_limit() -> None:
    options: dict[str, Any] = {"json_schema": HELD["verdict"], "seed": 3}
    free = bundled().generate("Once", 300, whole=False, **options)
    assert free.finish_reason == "stop"
    n = len(free.ids) + 1  # and the end
    for most in (n, n + 1, n + 50, 300, -1):
        done = bundled().generate("Once", most, **options)
        assert (done.ids, done.finish_reason) == (free.ids, "stop")


def test_where_no_ending_fits_the_text_is_cut_as_it_was() -> None:
    options: dict[str, Any] = {"json_schema": some(PERSON, minItems=3), "temperature": 0}
    for most in (1, 12, 25):
        done, cut = (bundled().generate("A", most, **options, whole=w) for w in (True, False))
        assert (done.ids, done.finish_reason) == (cut.ids, "length")


def test_a_full_context_is_a_limit_too() -> None:
    state = bundled().new_state(64)
    done = bundled().generate("Once", -1, json_schema=OPEN, temperature=0, state=state)
    assert (done.finish_reason, is_valid(done.text, OPEN)) == ("context", True)
    shifted = bundled().generate(
        "Once", 100, json_schema=OPEN, seed=2, state=bundled().new_state(40), overflow="shift"
    )
    assert is_valid(shifted.text, OPEN)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("most", [24, 45])
def test_nothing_else_changes_what_is_written(most: int, temperature: float) -> None:
    options: dict[str, Any] = {"json_schema": OPEN, "temperature": temperature, "seed": 5}
    prompts = ["Once", "The dog said that he", "One day"]
    alone = [bundled().generate(p, most, **options) for p in prompts]
    assert all(is_valid(a.text, OPEN) for a in alone)
    expected = [(a.ids, a.finish_reason) for a in alone]
    for more in ({"logprobs": 1}, {"speculate": "lookup"}, {"speculate": bundled()}):
        again = [bundled().generate(p, most, **options, **more) for p in prompts]
        assert [(a.ids, a.finish_reason) for a in again] == expected
    pieces = bundled().generate(prompts[0], most, stream=True, **options)
    assert "".join(pieces) == alone[0].text

    def squeeze(ids: list[int], logits: Any) -> None:
        engine.max_bytes = 1 if len(ids) % 16 < 8 else 1 << 40

    with tinyllm.Engine(bundled()) as engine:
        asked = [engine.submit(p, most, **options) for p in prompts]
        engine.submit("A", 60, temperature=0, logits_processor=squeeze).result()
        assert [(d.ids, d.finish_reason) for d in (r.result() for r in asked)] == expected


def test_a_required_call_is_whole_at_the_limit() -> None:
    take = {
        "type": "function",
        "function": {"name": "take", "parameters": record(note={"type": "string"}, n=WHOLE)},
    }
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}\n{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
        "{% endfor %}\nassistant: "
    )
    asked = [{"role": "user", "content": "Take a long note."}]
    for most in (60, 70, 90):
        done = bundled().chat(asked, template, [take], "take", max_tokens=most, seed=1)
        assert isinstance(done.message, Mapping)
        (call, *_) = done.message["tool_calls"]
        assert is_valid(call["function"]["arguments"], take["function"]["parameters"])


def test_whole_is_true_or_false() -> None:
    with pytest.raises(ArgumentError, match="whole=1; expected True or False"):
        bundled().generate("A", 3, regex="a", whole=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "gpt-2"])
def test_every_vocabulary_finds_endings(name: str, data: Path) -> None:
    file = tinyllm.gguf.open(data / "tokenizers" / f"ggml-vocab-{name}.gguf")
    t = tinyllm.tokenizers.load(file.metadata)
    for schema in map(HELD.get, ("extracted", "recursion", "email", "keys by pattern", "steps")):
        compiled = compile_grammar(t, t.n_vocab, json_schema=schema)
        assert compiled is not None
        ending = compiled.begin().ending(100)
        assert ending is not None
        text = b"".join(map(t.token_bytes, ending)).decode()
        assert is_valid(text, schema), text
