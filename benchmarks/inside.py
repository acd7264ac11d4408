"""What looking costs: a pass that keeps activations beside a plain one, and a grid of patched runs.

    python benchmarks/inside.py model.gguf [--json FILE]

A model that was never looked into is measured, too: looking must leave nothing behind. Kept are the residual
stream (also between the halves), what the heads read, and the neurons of every layer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm

NAMES = ["embd", "resid_mid", "out", "attn_heads", "ffn_act"]
PROMPT = "It was a very warm and sunny day in the small town by the sea. When Mary and John went to the store, "
CLEAN, CORRUPTED = PROMPT + "John gave a drink to", PROMPT + "Mary gave a drink to"
EARLIER = CORRUPTED.replace("It was", "This was", 1)  # another first token: no run can be left out


def seconds(work: Callable[[], object]) -> np.ndarray:
    """Seconds that pass, and those of all processors together, which neighbours hardly change."""
    start = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - start


def measure(
    m: tinyllm.Model, untouched: tinyllm.Model, n_tokens: int = 512, rounds: int = 12
) -> dict[str, Any]:
    """Medians of interleaved rounds: times the plain pass, and seconds of a grid; each also of processors."""
    ids = np.random.default_rng(0).integers(0, m.network.n_vocab, n_tokens).tolist()
    passes: dict[str, Callable[[], object]] = {
        "plain": lambda: m.logits(ids),
        "never looked into": lambda: untouched.logits(ids),
        "kept": lambda: m.run_with_cache(ids, NAMES),
        "kept in float16": lambda: m.run_with_cache(ids, NAMES, dtype="float16"),
        "one row kept": lambda: m.run_with_cache(ids, "embd", positions=0),
    }
    times: dict[str, list[np.ndarray]] = {name: [] for name in passes}
    for work in passes.values():
        work()
    order, rng = list(passes), np.random.default_rng(0)
    for _ in range(rounds):
        rng.shuffle(order)  # what a pass leaves in memory costs the next one
        for name in order:
            times[name].append(seconds(passes[name]))
    middle = {name: np.median(t, 0) for name, t in times.items()}
    ratios = {name: (t / middle["plain"]).tolist() for name, t in middle.items()}
    pair = (" Mary", " John")
    grid = m.patch_grid(CLEAN, CORRUPTED, pair)
    grids = {
        "as it is": seconds(lambda: m.patch_grid(CLEAN, CORRUPTED, pair)).tolist(),
        "where the first token differs": seconds(
            lambda: m.patch_grid(CLEAN, EARLIER, pair)
        ).tolist(),
    }
    return {
        "plain seconds": middle["plain"].tolist(),
        "times plain": ratios,
        "runs of a grid": grid.values.size,
        "seconds of a grid": grids,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("--rounds", type=int, default=12, help="default %(default)s")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    with tinyllm.load(args.model) as m, tinyllm.load(args.model) as untouched:
        found = measure(m, untouched, rounds=args.rounds)
    print("  seconds processors'")
    rows = {"plain, in seconds": found["plain seconds"], **found["times plain"]}
    rows |= {f"a grid, {name}": x for name, x in found["seconds of a grid"].items()}
    for name, (passed, worked) in rows.items():
        print(f"{passed:9.2f} {worked:9.2f}  {name}")
    if args.json:
        about = {"machine": common.machine(), "model": Path(args.model).name}
        args.json.write_text(json.dumps({**about, "results": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
