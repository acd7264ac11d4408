"""Answers held to schemas: is each valid, does it end by itself or at the limit, and what does holding it cost?

    python benchmarks/constraints.py SmolLM2-135M-Instruct.Q4_1.gguf --suite jsonschema-4.26.0/json/tests

The schemas are those that people send, of tests/engine/schemas.py, and those of the JSON Schema test suite that
can be held, newest draft first (PyPI's source of jsonschema has it). Each is shown in a chat. The answer is as
the model would have it, without and with a penalty for repeating itself, and drawn evenly from the tokens that
are allowed, as random weights would.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import common
import jsonschema

sys.path.insert(0, str(common.ROOT))
sys.path.insert(0, str(common.ROOT / "tests" / "engine"))

from schemas import HELD

import tinyllm
from tinyllm.engine.constraint import Constraint
from tinyllm.errors import ArgumentError

DRAFTS = {
    "draft2020-12": jsonschema.Draft202012Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft7": jsonschema.Draft7Validator,
    "draft6": jsonschema.Draft6Validator,
    "draft4": jsonschema.Draft4Validator,
}
ASK = "Invent a short example of this JSON schema:"
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalised": {"temperature": 0, "repeat_penalty": 1.2, "repeat_last_n": 256},
    "drawn evenly": {"temperature": 1000, "top_k": 0, "top_p": 1, "seed": 1},
}


def suite(folder: Path) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Name, schema and validator of each schema of the suite, those of several drafts once."""
    seen = set()
    for draft, kind in DRAFTS.items():
        for path in sorted((folder / draft).rglob("*.json")):
            for i, group in enumerate(json.loads(path.read_text("utf-8"))):
                schema = group["schema"]
                key = json.dumps(schema, sort_keys=True).replace(f"{draft}", "")
                if isinstance(schema, dict) and key not in seen:
                    seen.add(key)
                    yield f"{draft}/{path.stem}/{i}", schema, kind


def held(m: tinyllm.Model, folder: Path, most: int) -> tuple[list[Any], Counter[str]]:
    """The schemas that the model can be held to, and why others cannot."""
    found: list[Any] = [
        (name, schema, jsonschema.Draft202012Validator) for name, schema in HELD.items()
    ]
    refused: Counter[str] = Counter()
    for name, schema, kind in suite(folder):
        if len(found) >= most:
            break
        try:
            m.grammar(json_schema=schema)
            found.append((name, schema, kind))
        except ArgumentError as e:
            refused[str(e)] += 1
    return found[:most], refused


def answers(m: tinyllm.Model, schemas: list[Any], tokens: int, how: str) -> dict[str, Any]:
    """Ask for all at once, and look at each answer; those to people's schemas are counted apart."""
    counts = {whose: Counter[str]() for whose in ("people's", "the suite's")}
    wrong, cut, errors = [], [], []
    begun = time.perf_counter()
    with tinyllm.Engine(m, max_texts=16) as engine:
        asked = [
            engine.submit(ask_for(m, schema), tokens, json_schema=schema, **HOW[how])
            for _, schema, _ in schemas
        ]
        for (name, schema, kind), request in zip(schemas, asked, strict=True):
            count = counts["people's" if name in HELD else "the suite's"]
            try:
                done = request.result()
            except ArgumentError as e:
                errors.append(f"{name}: {e}")
                count["errors"] += 1
                continue
            why = wrong_with(done.text, schema, kind)
            if done.finish_reason == "stop":
                count["ended by themselves"] += 1
            elif why and not is_json(done.text):
                count["cut"] += 1
                cut.append(name)
                continue
            else:
                count["ended whole at the limit"] += 1
            if why:
                wrong.append(f"{name}: {done.text!r:.200}: {why}")
    seconds = time.perf_counter() - begun
    return {"how": how, **counts, "of which wrong": wrong, "were cut": cut, "errors": errors,
            "seconds": seconds}  # fmt: skip


def ask_for(m: tinyllm.Model, schema: Any) -> Any:
    """What is asked, as a chat where the model knows chats."""
    question = f"{ASK}\n{json.dumps(schema)}"
    messages = [{"role": "user", "content": question}]
    try:
        m.turn(messages)
    except tinyllm.errors.TemplateError:
        return question
    return messages


def is_json(text: str) -> bool:
    """Whether a text was not cut."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def wrong_with(text: str, schema: Any, kind: Any) -> str:
    """What is wrong with an answer; nothing where it is valid, or Python cannot read its pattern or number."""
    try:
        with localcontext(prec=10000):  # numbers are as long as tokens allow
            schema = json.loads(json.dumps(schema), parse_float=exact)
            answer = json.loads(text, parse_float=exact)
            kind(schema, format_checker=kind.FORMAT_CHECKER).validate(answer)
    except (ValueError, jsonschema.ValidationError) as e:
        return str(e).split("\n")[0]
    except (re.error, ArithmeticError):  # such as 1e999999999
        return ""
    return ""


def exact(digits: str) -> int | Decimal:
    """A number as it is written; a whole one is an int, as 5.0 is an integer in JSON Schema."""
    number = Decimal(digits)
    short = number.adjusted() < 1000
    return int(number) if short and number == number.to_integral_value() else number


def overhead(m: tinyllm.Model, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a token, free and held, in turn; and those that holding it took by the clock."""
    spent = [0.0]
    parts = ("allowed", "forced", "take", "in_time")
    plain = {name: getattr(Constraint, name) for name in parts}

    def timed(name: str) -> Any:
        def call(self: Constraint, *args: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain[name](self, *args)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    kinds: dict[str, dict[str, Any]] = {
        "free": {"logit_bias": dict.fromkeys(m.tokenizer.eog, -1000.0)},
        "an expression": {"regex": "[a-z ]{1000}"},
        "a list of objects": {
            "json_schema": {"type": "array", "minItems": 99, "items": HELD["verdict"]}
        },
        "a record that ends in time": {"json_schema": HELD["steps"]},
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    own: dict[str, list[float]] = {kind: [] for kind in kinds}
    for name in parts:
        setattr(Constraint, name, timed(name))
    try:
        for _ in range(rounds + 1):
            for kind, options in kinds.items():
                spent[0] = 0.0
                done = m.generate("Once", tokens, temperature=0, **options)
                times[kind].append(1e3 * done.timings.generated_s / done.timings.n_generated)
                own[kind].append(1e3 * spent[0] / done.timings.n_generated)
    finally:
        for name in parts:
            setattr(Constraint, name, plain[name])
    free = statistics.median(times["free"][1:])
    return {"vocabulary": m.network.n_vocab} | {
        kind: {
            "ms": statistics.median(times[kind][1:]),
            "of which the constraint's": statistics.median(own[kind][1:]),
            "share of a free token": statistics.median(own[kind][1:]) / free,
        }
        for kind in kinds
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; default: the bundled model")
    parser.add_argument("--suite", type=Path, help="a folder with draft2020-12 and others")
    parser.add_argument("--schemas", type=int, default=300, help="at most so many")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--how", nargs="*", choices=HOW, default=list(HOW))
    parser.add_argument("--overhead", type=int, default=0, help="rounds of a timing instead")
    parser.add_argument("--json", help="a file for the numbers")
    a = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "constraints", "machine": common.machine()}
    with tinyllm.load(a.model) as m:
        report["model"] = Path(m.path).name
        if a.overhead:
            report["overhead"] = overhead(m, 48, a.overhead)
        else:
            schemas, refused = held(m, a.suite, a.schemas)
            report["people's"], report["refused"] = len(HELD), dict(refused)
            report["answers"] = []
            for how in a.how:
                report["answers"].append(answers(m, schemas, a.tokens, how))
                print(json.dumps(report["answers"][-1], indent=1), flush=True)
    print(json.dumps(report.get("overhead", {}), indent=1))
    if a.json:
        common.write_json(a.json, report)


if __name__ == "__main__":
    main()
