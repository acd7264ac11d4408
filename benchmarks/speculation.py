"""Speculation: tokens per second with and without, where texts repeat their input and in free prose.

    python benchmarks/speculation.py [MODEL.gguf] [--tokens 100] [--prompts 6]
    python benchmarks/speculation.py MODEL.gguf --draft SMALLER.gguf [--right 1 0.8 0.6] [--lengths 1 3 7 11]

By lookup, each prompt shows a worked example of its task, so that small models do it too. Medians over the
prompts; every text must be equal with and without.

With a draft model, a table by the number of guesses in a step, which is held fixed. ``--right`` is for models
of random weights, which never agree: so often the draft model's guess, once it is computed, is put right.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.engine import generate, speculate

WORDS = {
    "name": ["Maria Lopez", "John Smith", "Aiko Tanaka", "Peter Novak", "Anna Berg", "Mei Chen"],
    "city": ["Madrid", "London", "Osaka", "Prague", "Oslo", "Lima", "Taipei", "Cairo"],
    "thing": ["harbour", "market", "library", "bridge", "station", "garden", "school", "mill"],
    "verb": ["opened", "closed", "burnt down", "was sold", "was painted", "moved"],
}  # fmt: skip
SENTENCES = [
    "The old {thing} of {city} {verb} in {year}, when {name} was mayor.",
    "{name} wrote in {year} that the {thing} near {city} was the finest of its time.",
    "Every spring, visitors from {city} came to see the {thing}, which {verb} in {year}.",
    "In {year} the railway reached {city}, and the {thing} {verb} soon after.",
    "People still tell how {name} saved the {thing} from the flood of {year}.",
]
CODE = """def {f}(items):
    {v} = 0
    for item in items:
        if item.{a} is not None:
            {v} = {v} + item.{a} * item.{b}
    return {v}


def mean_{f}(items):
    if len(items) == 0:
        return 0
    return {f}(items) / len(items)
"""
STORIES = "Tell a story about a {thing} in {city} and a person called {name}."


def drawn(rng: random.Random, form: str) -> str:
    """A sentence with its blanks filled."""
    words = {key: rng.choice(values) for key, values in WORDS.items()}
    return form.format(**words, year=rng.randrange(1700, 2000))


def correction(rng: random.Random) -> tuple[str, str]:
    """A text with two words misspelt, and as it should be."""
    right = " ".join(drawn(rng, form) for form in rng.sample(SENTENCES, 3))
    words = right.split(" ")
    for i in rng.sample([i for i, w in enumerate(words) if len(w) > 4], 2):
        at = rng.randrange(1, len(words[i]) - 2)
        words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return f"Correct the spelling of this text.\n\n{' '.join(words)}", right


def edit(rng: random.Random) -> tuple[str, str]:
    """A variable to be renamed, and the code with another name."""
    names = {
        "f": rng.choice(["total", "amount", "value"]),
        "a": rng.choice(["price", "weight", "size"]),
    }
    names["b"] = rng.choice(["count", "number", "pieces"])
    old, new = rng.sample(["result", "s", "answer", "found"], 2)
    ask = f"Rename the variable {old} to {new} in this code.\n\n{CODE.format(v=old, **names)}"
    return ask, CODE.format(v=new, **names)


def table(rng: random.Random) -> tuple[str, str]:
    """A table, and its rows in JSON."""
    rows = [
        (rng.choice(WORDS["name"]), rng.choice(WORDS["city"]), rng.randrange(20, 70))
        for _ in range(4)
    ]
    lines = "\n".join(f"{n},{c},{a}" for n, c, a in rows)
    found = json.dumps([{"name": n, "city": c, "age": a} for n, c, a in rows])
    return f"Turn this table into JSON.\n\nname,city,age\n{lines}", found


def story(rng: random.Random) -> tuple[str, str]:
    """A request for prose, which repeats nothing."""
    return drawn(rng, STORIES), drawn(rng, " ".join(SENTENCES))


TASKS = {
    "correct a text": correction,
    "edit code": edit,
    "JSON from a table": table,
    "free prose": story,
}


def conversation(
    kind: Callable[[random.Random], tuple[str, str]], seed: int
) -> list[dict[str, str]]:
    """A worked example, so that small models do the task too, and the task."""
    rng = random.Random(seed)
    (ask, done), (then, _) = kind(rng), kind(rng)
    return [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": done},
        {"role": "user", "content": then},
    ]


def measure(
    m: tinyllm.Model, ids: list[int], tokens: int, how: Any
) -> tuple[float, float, list[int]]:
    """Tokens per second of writing, tokens per step, and the ids of the text."""
    steps: list[int] = []
    verify_time = speculate.time_step

    def counted(net: Any, work: Any, seconds: float) -> None:
        steps.append(1)
        verify_time(net, work, seconds)

    generate.time_step = counted
    try:
        times: list[float] = []
        state = m.new_state(len(ids) + tokens)
        pieces = m.generate(
            ids, tokens, temperature=0, logit_bias=dict.fromkeys(m.tokenizer.eog, -100.0),
            state=state, speculate=how, stream=True,
        )  # fmt: skip
        for _ in pieces:
            times.append(time.perf_counter())
    finally:
        generate.time_step = verify_time
    c = pieces.completion
    return (len(c.ids) - 1) / (times[-1] - times[0]), len(c.ids) / len(steps), c.ids


def put_right(known: list[int], share: float) -> Callable[..., Any]:
    """What a draft model computes, with the known text's token the likeliest that often, and else never."""
    compute, rng = speculate.DraftModel._next_logits, random.Random(0)

    def logits(drafter: Any, state: Any) -> Any:
        found = compute(drafter, state)
        if (at := len(state.ids)) < len(known):
            found[known[at]] = np.inf if rng.random() < share else -np.inf
        return np.nan_to_num(found)

    return logits


def by_length(m: tinyllm.Model, a: argparse.Namespace) -> list[dict[str, float]]:
    """Speed and tokens per step of a draft model, by the number of guesses in a step."""
    rows = []
    print(
        "| guesses right | guesses a step | tokens a step | tokens/s | x |\n|---|---|---|---|---|"
    )
    prompts = [m.prompt_ids(story(random.Random(seed))[0]) for seed in range(a.prompts)]
    with tinyllm.load(a.draft) as draft:
        plain = [measure(m, ids, a.tokens, None) for ids in prompts]
        for share in a.right or [None]:
            for n in a.lengths:
                fast, each, ratios = [], [], []
                speculate.best_length = lambda chances, *rest, n=n: min(len(chances), n)
                for ids, (slow, _, text) in zip(prompts, plain, strict=True):
                    compute = speculate.DraftModel._next_logits
                    if share is not None:
                        speculate.DraftModel._next_logits = put_right([*ids, *text], share)
                    if not fast:  # the first steps of a size are recorded
                        measure(m, ids, 2 * n + 4, draft)
                    speed, per_step, same = measure(m, ids, a.tokens, draft)
                    speculate.DraftModel._next_logits = compute
                    assert text == same, "speculation changed the text"
                    fast.append(speed)
                    each.append(per_step)
                    ratios.append(speed / slow)
                row = {
                    "guesses right": share, "guesses a step": n,
                    "tokens a step": statistics.median(each), "tokens/s": statistics.median(fast),
                    "plain": statistics.median(slow for slow, _, _ in plain),
                    "x": statistics.median(ratios),
                }  # fmt: skip
                rows.append(row)
                right = "its own" if share is None else f"{share:.0%}"
                numbers = f"{row['tokens a step']:.2f} | {row['tokens/s']:.1f} | {row['x']:.2f}"
                print(f"| {right} | {n} | {numbers} |", flush=True)
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=6, help="of each kind")
    parser.add_argument("--draft", help="guess by this model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 3, 7, 11], help="of guesses")
    parser.add_argument("--right", type=float, nargs="+", help="so often a guess is put right")
    parser.add_argument("--json", help="a file for the numbers")
    a = parser.parse_args()
    how: Any = "lookup"
    m = tinyllm.load(a.model)
    report: dict[str, Any] = {"benchmark": "speculation", "machine": common.machine()}
    report |= {
        "model": Path(m.path).name,
        "by": Path(a.draft).name if a.draft else how,
    }
    if a.draft:
        report["lengths"] = by_length(m, a)
        if a.json:
            common.write_json(a.json, report)
        return
    report["tasks"] = {}
    print("| task | tokens/s | with speculation | x | tokens per step |\n|---|---|---|---|---|")
    for name, kind in TASKS.items():
        plain, fast, each = [], [], []
        for seed in range(a.prompts):
            messages = conversation(kind, seed)
            try:
                ids = m.turn(messages).ids
            except tinyllm.errors.TemplateError:
                ids = m.prompt_ids("\n\n".join(x["content"] for x in messages) + "\n\n")
            slow, _, text = measure(m, ids, a.tokens, None)
            speed, per_step, same = measure(m, ids, a.tokens, how)
            assert text == same, "speculation changed the text"
            plain.append(slow)
            fast.append(speed)
            each.append(per_step)
        ratios = [f / p for f, p in zip(fast, plain, strict=True)]
        found = {
            "plain": statistics.median(plain),
            "speculating": statistics.median(fast),
            "ratio": statistics.median(ratios),
            "tokens per step": statistics.median(each),
            "texts that are equal": len(each),
        }
        report["tasks"][name] = found
        p, f, x, n, _ = found.values()
        print(f"| {name} | {p:.1f} | {f:.1f} | {x:.2f} | {n:.2f} |", flush=True)
    if a.json:
        common.write_json(a.json, report)


if __name__ == "__main__":
    main()
