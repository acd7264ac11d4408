"""Speculation by lookup: tokens per second with and without, where texts repeat their input and in free prose.

python benchmarks/speculation.py [MODEL.gguf] [--tokens 100] [--rounds 3] [--draft MODEL.gguf]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import tinyllm
from tinyllm.engine import generate, speculate

ARTICLE = (
    "The harbour of the old town was build in 1732 by merchants who traded with salt, timber and fish. "
    "Every spring, ships from the north arived with barrels of herring, and in autumn they left with grain. "
    "When the railway came, the trade moved away, and the warehouses stood empty for thirty years."
)
CODE = """def total(items):
    result = 0
    for item in items:
        if item.price is not None:
            result = result + item.price * item.count
    return result


def average(items):
    if len(items) == 0:
        return 0
    return total(items) / len(items)
"""
TABLE = """name,city,age
Maria Lopez,Madrid,34
John Smith,London,41
Aiko Tanaka,Osaka,29
Peter Novak,Prague,57
"""
TASKS = {
    "correct a text": f"Repeat this text and correct its spelling. Answer with the text only.\n\n{ARTICLE}",
    "edit code": f"Rename the variable result to sum in this code. Answer with the code only.\n\n{CODE}",
    "JSON from a table": f"Turn this table into a JSON list of objects. Answer with JSON only.\n\n{TABLE}",
    "free prose": "Tell a story about a lighthouse keeper who finds a letter in a bottle.",
}


def measure(m: tinyllm.Model, ids: list[int], tokens: int, how: Any) -> tuple[float, float, str]:
    """Tokens per second of writing, tokens per step, and the text."""
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
    return (len(c.ids) - 1) / (times[-1] - times[0]), len(c.ids) / len(steps), c.text


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft", help="guess by this model, at most 7 tokens a step")
    a = parser.parse_args()
    how: Any = "lookup"
    m = tinyllm.load(a.model)
    if a.draft:
        how = tinyllm.load(a.draft)
        speculate.best_length = lambda p, most, *rest: min(most, 7)
    print("| task | tokens/s | with speculation | x | tokens per step |\n|---|---|---|---|---|")
    for name, task in TASKS.items():
        try:
            ids = m.turn([{"role": "user", "content": task}]).ids
        except tinyllm.errors.TemplateError:
            ids = m.prompt_ids(task)
        best, each, texts = {False: 0.0, True: 0.0}, 0.0, set()
        for _ in range(a.rounds):
            for on in (False, True):
                speed, per_step, text = measure(m, ids, a.tokens, how if on else None)
                best[on] = max(best[on], speed)
                each = per_step if on else each
                texts.add(text)
        assert len(texts) == 1, "speculation changed the text"
        print(
            f"| {name} | {best[False]:.1f} | {best[True]:.1f} | {best[True] / best[False]:.2f} "
            f"| {each:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
