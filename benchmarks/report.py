"""Plots and tables of the measurements in benchmarks/results, written beside them.

    pip install matplotlib
    python benchmarks/report.py                 # benchmarks/results
    python benchmarks/report.py FOLDER --png    # also as pixels

Every .json file there says which benchmark wrote it. Out come roofline.svg (each kernel beside the
machine's limits), prefill.svg and decode.svg (whole models beside other engines), embeddings.svg, and
README.md with the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import compare
import embeddings
import startup
from common import RESULTS

from tinyllm import plots

NAMES = {
    "tinyllm": "tinyllm",
    "llamacpp": "llama.cpp",
    "llamacpp-fa": "llama.cpp, flash attention",
    "llama-bench": "llama.cpp, llama-bench",
    "ik": "ik_llama.cpp",
    "ik-repacked": "ik_llama.cpp, repacked",
    "gpt4all": "GPT4All",
    "torch": "torch float32",
}
AT_ONCE = (1, 8, 512)  # tokens


# ---- reading


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reports by benchmark, files in the order of their names; other JSON files are left alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stem):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and "benchmark" in report:
            found.setdefault(report["benchmark"], []).append(report)
    return found


# ---- drawing


def roofline(report: dict[str, Any], path: Path) -> None:
    """Each format's kernels under the machine's roofs; names stand at the points of most tokens."""
    formats = sorted(report["formats"], key=lambda row: row["bits/weight"])
    points = [
        (row["format"] if m == AT_ONCE[-1] else "", tokens(m), *place(row, m))
        for m in AT_ONCE
        for row in formats
    ]
    title = f"Kernels and the machine's limits, {report['threads']} threads"
    plots.roofline(path, title, report["limits"], points)


def place(row: dict[str, Any], m: int) -> tuple[float, float]:
    """A format's point for m tokens: multiply-adds per byte of weights, and GMAC/s."""
    per_byte = 8 / row["bits/weight"]
    rate = row["M=1 GB/s"] * per_byte if m == 1 else row[f"M={m} GMAC/s"]
    return m * per_byte, rate


def tokens(m: int) -> str:
    return "1 token (weights from memory)" if m == 1 else f"{m} tokens (weights in cache)"


Bar = tuple[str, dict[str, Any], float | None]  # engine, rate, our ratio to the next best


def bars(groups: dict[str, list[Bar]], title: str, unit: str, path: Path) -> None:
    """A group of bars for each model, thin lines for the range; our ratio stands before the model's name."""
    engines = dict.fromkeys(engine for group in groups.values() for engine, _, _ in group)
    missing = {"median": math.nan, "min": math.nan, "max": math.nan}
    rates: dict[str, list[dict[str, Any]]] = {
        NAMES.get(engine, engine): [
            next((rate for e, rate, _ in group if e == engine), missing)
            for group in groups.values()
        ]
        for engine in engines
    }
    plots.bars(
        [headed(name, group) for name, group in groups.items()],
        {engine: [rate["median"] for rate in own] for engine, own in rates.items()},
        xlabel=unit,
        title=title,
        path=path,
        ranges={
            engine: [(rate["min"], rate["max"]) for rate in own] for engine, own in rates.items()
        },
    )


def headed(name: str, group: list[Bar]) -> str:
    """How many times as fast as the next best tinyllm is, and the model."""
    ratio = next((ratio for _, _, ratio in group if ratio), None)
    return f"{ratio:.2f} x  {name}" if ratio else name


# ---- which numbers


def peers(reports: list[dict[str, Any]], test: str) -> dict[str, list[Bar]]:
    """Rates of "pp" or "tg" by model and machine; the first report's for each, whose machine needs no name."""
    groups: dict[str, list[Bar]] = {}
    usual = reports[0]["machine"]["cpu"] if reports else ""
    for cpu, r in [(report["machine"]["cpu"], r) for report in reports for r in report["models"]]:
        rates = {e: one_test(ways, test) for e, ways in r["tokens_per_s"].items()}
        ratios = {e: one_test(ways, test) for e, ways in r["ratios"].items()}
        if found := group(
            {e: x for e, x in rates.items() if x}, list(filter(None, ratios.values()))
        ):
            groups.setdefault(label(r) + (f"\n{cpu}" if cpu != usual else ""), found)
    return groups


def one_test(ways: dict[str, Any], test: str) -> dict[str, Any] | None:
    """What a user's call gives, "generate"; where that was not measured, the bare steps."""
    tests = ways.get("generate") or ways.get("step") or {}
    return next((s for name, s in tests.items() if name.startswith(test)), None)


def group(rates: dict[str, Any], ratios: list[dict[str, Any]]) -> list[Bar]:
    """Ours gets its ratio to the best of the others."""
    best = min((s["median"] for s in ratios), default=None)
    return [(e, s, best if e == compare.OURS else None) for e, s in rates.items()]


def label(r: dict[str, Any]) -> str:
    """A model's name, how far in where that is far, and the instruction set where it was held back."""
    kernels = compare.instruction_set(r)
    held_back = f"\n{kernels}" if kernels in ("avx2", "avxvnni", "generic") else ""
    return r["model"] + (f"\nat {r['depth']}" if r["depth"] > 1024 else "") + held_back


def encoders(reports: list[dict[str, Any]]) -> dict[str, list[Bar]]:
    return {
        f"{r['work'][load]['texts']} {load} texts": group(
            x["texts_per_s"], list(x["ratios"].values())
        )
        for r in reports
        for load, x in r["loads"].items()
    }


def figures(found: dict[str, list[dict[str, Any]]], folder: Path, ending: str) -> list[str]:
    """Draw all that can be drawn -> the names of the figures."""
    drawn = []

    def path(name: str) -> Path:
        drawn.append(name)
        return folder / f"{name}{ending}"

    if ops := found.get("ops"):
        roofline(ops[-1], path("roofline"))
    for name, test, title in (("prefill", "pp", "Prefill"), ("decode", "tg", "Decoding")):
        if groups := peers(found.get("compare", []), test):
            bars(groups, title, "tokens/s", path(name))
    if groups := encoders(found.get("embeddings", [])):
        bars(groups, "Embeddings", "texts/s", path("embeddings"))
    return drawn


# ---- the page


def page(found: dict[str, list[dict[str, Any]]], drawn: list[str]) -> str:
    """README.md: plots, then each report's machine and tables."""
    parts = ["# Measurements", "Written by `python benchmarks/report.py`; do not edit."]
    parts += [f"![{name}]({name}.svg)" for name in drawn]
    writers: dict[str, Callable[[dict[str, Any]], str]] = {
        "compare": lambda r: "\n\n".join(compare.as_text(m) for m in r["models"]),
        "embeddings": embeddings.as_text,
        "startup": lambda r: "\n\n".join(startup.as_text(m) for m in r["models"]),
        "ops": kernels,
    }
    titles = {
        "compare": "Whole models",
        "embeddings": "Embeddings",
        "startup": "Start-up",
        "ops": "Kernels",
    }
    for name, write in writers.items():
        parts += [f"# {titles[name]}"] if name in found else []
        last = ""
        for report in found.get(name, []):
            parts += [facts(report)] if facts(report) != last else []
            last = facts(report)
            parts.append(write(report))
    return "\n\n".join(parts) + "\n"


def facts(report: dict[str, Any]) -> str:
    """What the numbers depend on, in a line."""
    m, settings = report["machine"], report.get("settings", {})
    packages = ", ".join(f"{k} {v}" for k, v in m["packages"].items())
    chosen = ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)
    features = " ".join(m["cpu_features"])
    return (
        f"{m['cpu']}, {m['cores']} cores ({features}); commit {m['commit']}, {m['date'][:10]}; "
        f"Python {m['python']}, {packages}." + (f" Settings: {chosen}." if chosen else "")
    )


def kernels(report: dict[str, Any]) -> str:
    """ops.json as a table."""
    names = list(report["formats"][0])
    rows = [
        [v if isinstance(v, str) else f"{v:.1f}" for v in r.values()] for r in report["formats"]
    ]
    top = ", ".join(f"{k} {v:.1f}" for k, v in report["limits"].items())
    return f"{report['threads']} threads; limits: {top}\n\n" + common.table(names, rows)


def main(argv: list[str] | None = None) -> None:
    """Draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of the .json files")
    parser.add_argument("--png", action="store_true", help="also write .png files")
    o = parser.parse_args(argv)
    found = read(o.folder)
    if not found:
        sys.exit(f"{o.folder} has no results; write some with --json, see benchmarks/README.md")
    drawn = figures(found, o.folder, ".svg")
    if o.png:
        figures(found, o.folder, ".png")
    (o.folder / "README.md").write_text(page(found, drawn))
    print(f"{', '.join(drawn)} and README.md are in {o.folder.name}/")


if __name__ == "__main__":
    main()
