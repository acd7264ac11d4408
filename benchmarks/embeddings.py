"""Texts per second of an embedding model, beside GPT4All and torch in float32, in turn.

    python benchmarks/embeddings.py all-MiniLM-L6-v2.gguf2.f16.gguf -t 2 \\
        --engines tinyllm,tinyllm-bf16,gpt4all,torch --json benchmarks/results/embeddings.json

Two loads: 256 short texts, and 20 texts of 512 tokens. Tokenisation counts, the vectors of all engines are
compared, and the rates stand beside the arithmetic: a model of F16 weights computes in float32, so the
processor's float32 peak is the limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import common
import numpy as np
from common import HERE, Worker, ratios, show, spread

OURS = "tinyllm"
WORDS = "the quick brown fox jumps over the lazy dog and some more words to lengthen it".split()
PEAK_S = 0.5  # spent on measuring the peak, each round


def short_texts(n: int) -> list[str]:
    """Texts of 6 to 30 words."""
    return [
        f"{i}: " + " ".join(WORDS[j % len(WORDS)] for j in range(5 + i * 7 % 25)) for i in range(n)
    ]


def long_texts(n: int) -> list[str]:
    """Texts of 510 words, each of them one token; two more tokens enclose a text."""
    return [" ".join(WORDS[(i + j) % 9] for j in range(510)) for i in range(n)]


def compare(o: argparse.Namespace) -> dict[str, Any]:
    """All rounds of both loads."""
    loads = {"short": short_texts(o.short), "long": long_texts(o.long)}
    loads = {name: texts for name, texts in loads.items() if texts}
    with ExitStack() as stack:
        workers = {e: stack.enter_context(worker(e, o)) for e in o.engines}
        peak = stack.enter_context(worker("peak", o))
        args = {"model": str(o.model), "threads": o.threads}
        versions = {e: w.ask("load", **args) for e, w in workers.items()}
        rounds = []
        for i in range(-1, o.rounds):
            found = {
                load: {e: w.measure(texts=t) for e, w in workers.items()}
                for load, t in loads.items()
            }
            found["peak"] = peak.ask("gflops", threads=o.threads, seconds=PEAK_S)
            rounds.append(found)
            rate = {
                n: {e: round(len(t) / found[n][e], 1) for e in o.engines} for n, t in loads.items()
            }
            print(f"{'warm-up' if i < 0 else f'round {i + 1}'}: {rate}", file=sys.stderr)
        work = {load: workers[OURS].ask("work", texts=t) for load, t in loads.items()}
        apart = {load: differences(workers, t) for load, t in loads.items()}
    idle = {e: w.idle_share for e, w in workers.items()}
    return {
        "versions": versions,
        "idle_share": idle,
        "work": work,
        "cosine_distance": apart,
    } | summary(rounds[1:], work)


@contextmanager
def worker(name: str, o: argparse.Namespace) -> Iterator[Worker]:
    w = Worker(o.python.get(name, sys.executable), HERE / "encoders.py", name)
    try:
        yield w
    finally:
        w.close()


def differences(workers: dict[str, Worker], texts: list[str]) -> dict[str, float]:
    """1 - cosine of each engine's vectors with ours, at worst."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = {}
        for name, w in workers.items():
            path = os.path.join(folder, name + ".npy")
            w.ask("vectors", texts=texts, path=path)
            vectors[name] = np.load(path).astype(np.float64)
    unit = {n: v / np.linalg.norm(v, axis=1, keepdims=True) for n, v in vectors.items()}
    return {n: float(1 - (v * unit[OURS]).sum(1).min()) for n, v in unit.items() if n != OURS}


def summary(rounds: list[dict[str, Any]], work: dict[str, Any]) -> dict[str, Any]:
    """Rates, ratios and arithmetic of each load."""
    peak = [r["peak"] for r in rounds]
    out: dict[str, Any] = {"peak_gflop_per_s": spread(peak), "loads": {}}
    for load, job in work.items():
        rates = {e: [job["texts"] / r[load][e] for r in rounds] for e in rounds[0][load]}
        ours = rates[OURS]
        gflops = [job["gflop"] * x / job["texts"] for x in ours]
        out["loads"][load] = {
            "texts_per_s": {e: spread(x) for e, x in rates.items()},
            "ratios": {e: ratios(ours, x) for e, x in rates.items() if e != OURS},
            "gflop_per_s": spread(gflops),
            "fraction_of_peak": ratios(gflops, peak),
        }
    return out


def as_text(r: dict[str, Any]) -> str:
    """Tables."""
    parts = []
    for load, job in r["work"].items():
        found = r["loads"][load]
        head = f"{job['texts']} texts, {job['tokens']} tokens, {job['gflop']:.1f} GFLOP"
        rows = []
        for e, rate in found["texts_per_s"].items():
            ratio = show(found["ratios"][e], 2) + " x" if e != OURS else ""
            apart = f"{r['cosine_distance'][load][e]:.1e}" if e != OURS else ""
            rows.append([r["versions"][e], show(rate), ratio, apart])
        t = common.table(["engine", "texts/s", "ours / theirs", "1 - cosine, at worst"], rows)
        rate, part = show(found["gflop_per_s"]), show(found["fraction_of_peak"], 2)
        parts += [f"## {load}: {head}", t, f"Ours: {rate} GFLOP/s, {part} of the float32 peak."]
    parts.append(f"Peak on registers: {show(r['peak_gflop_per_s'])} GFLOP/s.")
    return "\n\n".join([*parts, *common.warnings(r["idle_share"])])


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=common.existing, help="a BERT in GGUF")
    add(
        "--engines",
        type=common.names,
        default=[OURS, "gpt4all", "torch"],
        help="tinyllm,tinyllm-bf16,gpt4all,torch",
    )
    add("-t", "--threads", type=int, default=os.cpu_count(), help="of each engine")
    add("--rounds", type=int, default=5, help="after one to warm up")
    add("--short", type=int, default=256, help="short texts; 0 leaves them out")
    add("--long", type=int, default=20, help="texts of 512 tokens; 0 leaves them out")
    common.add_peers(parser)
    o = parser.parse_args(argv)
    o.python = dict(o.python)
    if OURS not in o.engines:
        parser.error(f"--engines must hold {OURS}: the others are compared with it")
    return o


def main(argv: list[str] | None = None) -> None:
    """Compare, print tables, write JSON."""
    o = options(argv)
    report = {
        "benchmark": "embeddings",
        "machine": common.machine(),
        "settings": {"threads": o.threads, "rounds": o.rounds},
        "model": o.model.stem,
    } | compare(o)
    print(as_text(report))
    if o.json:
        common.write_json(o.json, report)


if __name__ == "__main__":
    main()
