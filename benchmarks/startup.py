"""From the start of a process to the first token, and its memory, beside llama-cpp-python.

    python benchmarks/startup.py llama-1b-Q4_0.gguf -t 2 --python llamacpp=peers/bin/python \\
        --json benchmarks/results/startup.json

Each measurement is a new Python process that imports an engine, loads the file, reads eight tokens and
chooses the next. "cold" is ours with an empty cache of compiled kernels, "warm" with a full one. The file
itself is in the system's cache for all of them, and every package has its Python bytecode on disk, as an
installed one has. Processes of different kinds take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import ROOT, ratios, show, spread

IDS = [(i * 7919) % 1000 + 100 for i in range(8)]


def first_token(engine: str, model: str, threads: int) -> None:
    """What the measured process does; prints its steps' seconds as JSON when it has the token."""
    start = time.perf_counter()
    load = {"tinyllm": ours, "llamacpp": llamacpp}[engine]()
    imported = time.perf_counter()
    choose = load(model, threads)
    loaded = time.perf_counter()
    choose()
    steps = {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "token_s": time.perf_counter() - loaded,
    }
    print(json.dumps(steps | {"peak_rss_bytes": common.peak_rss()}), flush=True)


def ours() -> Any:
    import tinyllm

    def load(model: str, threads: int) -> Any:
        m = tinyllm.load(model, n_threads=threads, n_ctx=512)
        return lambda: m.generate(IDS, max_tokens=1, temperature=0)

    return load


def llamacpp() -> Any:
    import llama_cpp

    def load(model: str, threads: int) -> Any:
        m = llama_cpp.Llama(
            model, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        return lambda: next(iter(m.generate(IDS, temp=0.0)))

    return load


def timed(kind: str, o: argparse.Namespace, model: Path, cache: str) -> dict[str, float]:
    """One process: wall clock until its line arrives, and what the line says."""
    engine = "llamacpp" if kind == "llamacpp" else "tinyllm"
    command = [o.python.get(engine, sys.executable), __file__, "--first-token", engine]
    env = os.environ | {"TINYLLM_CACHE": cache, "PYTHONPATH": str(ROOT)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have their bytecode beside them
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, str(model), "-t", str(o.threads)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        total = time.perf_counter() - start
    if process.returncode or not line:
        raise RuntimeError(f"{engine} failed on {model.name}: exit status {process.returncode}")
    return {"total_s": total} | json.loads(line)


def compare(model: Path, o: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one file."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": [], "llamacpp": []}
    common.read_once(model)
    with tempfile.TemporaryDirectory() as warm:
        for _ in range(o.cold):
            with tempfile.TemporaryDirectory() as empty:
                found["cold"].append(timed("cold", o, model, empty))
        kinds = ["warm"] + ["llamacpp"] * ("llamacpp" in o.engines)
        for kind in kinds * (o.rounds + 1):
            found[kind].append(timed(kind, o, model, warm))
    for kind in kinds:
        del found[kind][0]  # it filled caches
    return {"model": model.stem, "file_bytes": model.stat().st_size} | summary(found)


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each kind's steps, and ours to theirs."""
    kinds = {
        kind: {step: spread(r[step] for r in runs) for step in runs[0]}
        for kind, runs in found.items()
        if runs
    }
    out: dict[str, Any] = {"kinds": kinds}
    if "llamacpp" in kinds:
        steps = ("total_s", "peak_rss_bytes")
        warm, theirs = kinds["warm"], kinds["llamacpp"]
        out["ours_to_theirs"] = {s: ratios(warm[s]["all"], theirs[s]["all"]) for s in steps}
    return out


def as_text(r: dict[str, Any]) -> str:
    """A table."""
    head = ["", "first token s", "import s", "load s", "token s", "peak MB", "peak / file"]
    rows = []
    for kind, steps in r["kinds"].items():
        seconds = [show(steps[s], 2) for s in ("total_s", "import_s", "load_s", "token_s")]
        peak = steps["peak_rss_bytes"]["median"]
        rows.append([kind, *seconds, f"{peak / 1e6:.0f}", f"{peak / r['file_bytes']:.2f}"])
    parts = [f"## {r['model']} ({r['file_bytes'] / 1e6:.0f} MB)", common.table(head, rows)]
    if both := r.get("ours_to_theirs"):
        time_, memory = show(both["total_s"], 2), show(both["peak_rss_bytes"], 2)
        parts.append(f"Warm to llama-cpp-python: {time_} x the time, {memory} x the memory.")
    return "\n\n".join(parts)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="+", type=common.existing, help="GGUF files")
    add("--engines", type=common.names, default=["tinyllm", "llamacpp"], help="tinyllm,llamacpp")
    add("-t", "--threads", type=int, default=os.cpu_count(), help="of each engine")
    add("--rounds", type=int, default=5, help="of warm starts, after one to fill caches")
    add("--cold", type=int, default=1, help="starts with an empty cache")
    common.add_peers(parser)
    add("--first-token", metavar="ENGINE", help="do the measured work in this process")
    o = parser.parse_args(argv)
    o.python = dict(o.python)
    return o


def main(argv: list[str] | None = None) -> None:
    """Compare, print tables, write JSON."""
    o = options(argv)
    if o.first_token:
        first_token(o.first_token, str(o.models[0]), o.threads)
        return
    settings = {"threads": o.threads, "rounds": o.rounds}
    report: dict[str, Any] = {"benchmark": "startup", "machine": common.machine()}
    common.each_model(report | {"settings": settings}, o, compare, as_text)


if __name__ == "__main__":
    main()
