"""What ``compute="exact"`` costs: the same model with int8 activations of one digit and of three, turn by turn.

    python benchmarks/exact_products.py model-Q4_0.gguf model-Q4_K_M.gguf --json benchmarks/results/exact.json

Seconds of one thread are those that it had the processor, so neighbours disturb little; of more, those that
passed. Prompts and tokens: the fastest of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.cli.bench import read_prompt, write_tokens

WAYS = ("f32", "exact")  # quantised weights meet int8 activations unless exact


def seconds(model: Any, n_prompt: int, n_tokens: int, clock: Any) -> tuple[float, float]:
    """Time of a prompt, and of the fastest of some tokens behind it."""
    state, ids = model.new_state(n_prompt + n_tokens), [1 + i % 100 for i in range(n_prompt)]
    start = clock()
    read_prompt(model.network, state, ids)
    times = [clock()]
    for i in ids[:n_tokens]:
        write_tokens(model.network, state, [i])
        times.append(clock())
    tokens = (b - a for a, b in itertools.pairwise(times))
    return times[0] - start, min(tokens)


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both ways, and their ratios."""
    n, clock = options.threads, time.process_time if options.threads == 1 else time.perf_counter
    models = {way: tinyllm.load(path, n_threads=n, compute=way) for way in WAYS}  # type: ignore[arg-type]
    best = {way: [float("inf")] * 2 for way in WAYS}
    for i in range(options.rounds + 1):
        for way, model in models.items():
            found = seconds(model, options.prompt, options.tokens, clock)
            if i:  # the first compiles
                best[way] = [min(pair) for pair in zip(best[way], found, strict=True)]
    for model in models.values():
        model.close()
    row: dict[str, Any] = {"model": path.stem}
    for k, (name, n) in enumerate((("prompt", options.prompt), ("decoding", 1))):
        row |= {f"{name} {way}": round(n / best[way][k], 2) for way in WAYS}
        row[f"{name} ratio"] = round(best["f32"][k] / best["exact"][k], 3)
    print(row, flush=True)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=256)
    parser.add_argument("-n", "--tokens", type=int, default=16)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file")
    options = parser.parse_args()
    rows = [measure(path, options) for path in options.models]
    report = {
        "benchmark": "exact_products",
        "machine": common.machine(),
        "threads": options.threads,
    }
    report |= {"prompt": options.prompt, "tokens": options.tokens, "rows": rows}
    if options.json:
        common.write_json(options.json, report)


if __name__ == "__main__":
    main()
