"""What a step of a few rows costs, beside the least it could: guesses, short prompts, many sequences.

    python benchmarks/few_rows.py llama-1b-Q4_0.gguf llama-1b-Q4_K_M.gguf -t 2 --rounds 3 --json few-rows.json

Each step has n rows behind ``--depth`` tokens of past, and logits for all of them: rows of one sequence, or one
row of each of n sequences. The bound is the larger of two times, both measured in the round: reading the
weights and each sequence's past once, and n rows at the pace of 512 rows that want as many logits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import common
from common import show, spread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.cli import bench
from tinyllm.kernels.cpu.limits import read_bandwidth

ROWS = [1, 2, 4, 8, 12, 16, 24, 32, 64]
MANY = 512
TIMES = 3  # a step is timed so often in a round; the fastest counts


def measure(path: Path, o: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one file."""
    m = tinyllm.load(str(path), n_ctx=o.depth + MANY + 16, n_threads=o.threads)
    states = [m.new_state() for _ in range(max(o.rows))]
    past = [100 + i * 7919 % 30000 % (m.network.n_vocab // 2) for i in range(o.depth)]
    for state in states:
        bench.read_prompt(m.network, state, past)
    weights = bench.describe(m)["bytes_per_token"]
    rounds = [one_round(m, states, weights, o) for _ in range(o.rounds + 1)][1:]
    found: dict[str, Any] = {"model": path.stem, "weights_bytes": weights}
    for what in ("read_gb_per_s", "many_tokens_per_s"):
        found[what] = spread(r[what] for r in rounds)
    for kind in ("rows", "sequences"):
        for what in ("ms", "to_bound", "to_many"):
            found[f"{kind}_{what}"] = {
                str(n): spread(r[kind][n][what] for r in rounds) for n in o.rows
            }
    return found


def one_round(
    m: tinyllm.Model, states: list[Any], weights: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Every number of rows once, both ways, after the limits of this minute."""
    bandwidth = read_bandwidth(o.threads, 0.3)
    many = step(m, states[:1], MANY, o.depth, "all")
    out: dict[str, Any] = {"read_gb_per_s": bandwidth / 1e9, "many_tokens_per_s": MANY / many}
    for kind in ("rows", "sequences"):
        out[kind] = {}
        for n in o.rows:
            some, each = (states[:1], n) if kind == "rows" else (states[:n], 1)
            seconds = step(m, some, each, o.depth, "all")
            read = weights + sum(state.nbytes for state in some)
            bound = max(read / bandwidth, n * many / MANY)
            share = n / seconds / (MANY / many)
            out[kind][n] = {"ms": 1e3 * seconds, "to_bound": seconds / bound, "to_many": share}
    return out


def step(m: tinyllm.Model, states: list[Any], each: int, depth: int, wanted: Any) -> float:
    """Seconds of a step of so many rows of each state, which is as before afterwards."""
    seconds = []
    for _ in range(TIMES):
        for state in states:
            state.append([100 + i for i in range(each)])
        start = time.perf_counter()
        m.network.forward([(state, each, wanted) for state in states])
        seconds.append(time.perf_counter() - start)
        for state in states:
            state.truncate(depth)
    return min(seconds)


def as_text(r: dict[str, Any]) -> str:
    """One file's results as a table."""
    head = [
        "rows",
        "ms",
        "of the bound",
        "of 512's pace",
        "sequences: ms",
        "of the bound",
        "of 512's pace",
    ]
    table = [
        [n, *(show(r[f"{kind}_{what}"][n], 1 if what == "ms" else 2)
              for kind in ("rows", "sequences") for what in ("ms", "to_bound", "to_many"))]
        for n in r["rows_ms"]
    ]  # fmt: skip
    said = (
        f"reading {show(r['read_gb_per_s'])} GB/s, 512 rows {show(r['many_tokens_per_s'])} tokens/s"
    )
    return f"## {r['model']} ({said})\n\n{common.table(head, table)}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", type=common.existing, help="GGUF files")
    add("-t", "--threads", type=int, default=os.cpu_count())
    add("-d", "--depth", type=int, default=500, help="tokens of past; 256 fill a page")
    add("--rows", type=common.counts, default=ROWS, help="such as 1,8,16")
    add("--rounds", type=int, default=3, help="after one to warm up")
    add("--json", type=Path, help="file for the results")
    o = parser.parse_args()
    report: dict[str, Any] = {"benchmark": "few rows", "machine": common.machine()}
    report["settings"] = {"threads": o.threads, "depth": o.depth, "rounds": o.rounds}
    common.each_model(report, o, measure, as_text)


if __name__ == "__main__":
    main()
