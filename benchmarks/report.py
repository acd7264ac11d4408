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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import compare
import embeddings
import startup
from common import RESULTS

INK, SOFT, GRID = "#24292f", "#6e7781", "#d8dee4"
COLOURS = {  # safe for colour-blind eyes
    "tinyllm": "#0072b2",
    "llamacpp": "#e69f00",
    "llamacpp-fa": "#cc79a7",
    "llama-bench": "#56b4e9",
    "ik": "#f0e442",
    "gpt4all": "#009e73",
    "torch": "#d55e00",
}
NAMES = {
    "llamacpp": "llama.cpp",
    "llamacpp-fa": "llama.cpp, flash attention",
    "llama-bench": "llama.cpp, llama-bench",
    "ik": "ik_llama.cpp",
    "gpt4all": "GPT4All",
    "torch": "torch float32",
}
MARKS = {1: "o", 8: "^", 512: "s"}  # by tokens at a time


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


def pyplot() -> Any:
    """matplotlib without a window, in our style."""
    try:
        import matplotlib as mpl
    except ImportError:
        sys.exit("plots need matplotlib: pip install matplotlib")
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
        "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 12,
        "axes.edgecolor": SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "grid.color": GRID, "xtick.color": SOFT, "ytick.color": INK, "legend.frameon": False,
        "figure.constrained_layout.use": True, "svg.fonttype": "path", "svg.hashsalt": "tinyllm",
    })  # fmt: skip
    return plt


def roofline(plt: Any, report: dict[str, Any]) -> Any:
    """Multiply-adds per second over multiply-adds per byte of weights: a line of points for each format."""
    figure, ax = plt.subplots(figsize=(8.5, 5.2))
    formats = sorted(report["formats"], key=lambda row: row["bits/weight"])
    shades = plt.get_cmap("viridis")(
        [0.9 * i / max(len(formats) - 1, 1) for i in range(len(formats))]
    )
    lines = {row["format"]: [place(row, m) for m in MARKS] for row in formats}
    for points, colour in zip(lines.values(), shades, strict=True):
        ax.plot(*zip(*points, strict=True), color=colour, lw=0.8, alpha=0.6)
        for point, marker in zip(points, MARKS.values(), strict=True):
            ax.plot(*point, marker=marker, ms=6, color=colour, ls="none")
    lowest = min(y for points in lines.values() for _, y in points)
    ax.set(xscale="log", yscale="log", xlim=(0.15, 3000))
    ax.set_ylim(lowest / 2, 2 * max(report["limits"].values()))
    roofs(ax, report["limits"])
    name_lines(ax, {name: points[-1] for name, points in lines.items()}, shades)
    for m, marker in MARKS.items():
        ax.plot([], [], marker=marker, ms=6, color=SOFT, ls="none", label=tokens(m))
    ax.set(xlabel="multiply-adds per byte of weights", ylabel="GMAC/s")
    ax.set_title(f"Kernels and the machine's limits, {report['threads']} threads")
    ax.grid(True, which="major", lw=0.6)
    ax.legend(loc="lower right", fontsize=9)
    return figure


def place(row: dict[str, Any], m: int) -> tuple[float, float]:
    """A format's point for m tokens."""
    per_byte = 8 / row["bits/weight"]
    rate = row["M=1 GB/s"] * per_byte if m == 1 else row[f"M={m} GMAC/s"]
    return m * per_byte, rate


def tokens(m: int) -> str:
    return "1 token (weights from memory)" if m == 1 else f"{m} tokens (weights in cache)"


def roofs(ax: Any, limits: dict[str, float]) -> None:
    """Slanted: reading memory. Flat: arithmetic on registers."""
    bandwidth, x = limits["read GB/s"], ax.get_xlim()
    ax.plot(x, [bandwidth * v for v in x], color=SOFT, lw=1.2, zorder=1)
    top = 1.3 * max(limits.values())
    note(ax, f"reading memory, {bandwidth:.0f} GB/s", (top / bandwidth, top), (-10, -3), "right")
    for key, what in {"dot GMAC/s": "byte dot products", "float GMAC/s": "float32"}.items():
        if key in limits:
            ax.axhline(limits[key], color=SOFT, lw=1.2, ls=(0, (5, 3)), zorder=1)
            note(ax, f"{what}, {limits[key]:.0f} GMAC/s", (x[0], limits[key]), (6, 4), "left")


def note(ax: Any, text: str, at: tuple[float, float], offset: tuple[int, int], side: str) -> None:
    ax.annotate(
        text, at, xytext=offset, textcoords="offset points", ha=side, color=SOFT, fontsize=9
    )


def name_lines(ax: Any, ends: dict[str, tuple[float, float]], colours: Any) -> None:
    """Names in a column on the right, as high as their lines end where there is room."""
    low, high = (math.log(y) for y in ax.get_ylim())
    wanted = {name: (math.log(y) - low) / (high - low) for name, (_, y) in ends.items()}
    places = spaced(wanted)
    for name, colour in zip(ends, colours, strict=True):
        ax.annotate(
            name, ends[name], xytext=(1.03, places[name]), textcoords="axes fraction",
            va="center", fontsize=9, color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": colour, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spaced(wanted: dict[str, float], gap: float = 0.047) -> dict[str, float]:
    """Heights at least ``gap`` apart: names that crowd stand around the middle of what they want."""
    crowds: list[list[str]] = []
    for name in sorted(wanted, key=wanted.__getitem__):
        crowd = [name]
        while (
            crowds and heights(crowds[-1], wanted, gap)[-1] + gap > heights(crowd, wanted, gap)[0]
        ):
            crowd = crowds.pop() + crowd
        crowds.append(crowd)
    return {
        name: h
        for crowd in crowds
        for name, h in zip(crowd, heights(crowd, wanted, gap), strict=True)
    }


def heights(crowd: list[str], wanted: dict[str, float], gap: float) -> list[float]:
    middle, half = sum(wanted[name] for name in crowd) / len(crowd), gap * (len(crowd) - 1) / 2
    bottom = min(middle, 1 - half) - half
    return [bottom + gap * i for i in range(len(crowd))]


Bar = tuple[str, dict[str, Any], float | None]  # engine, rate, our ratio to the next best


def bars(plt: Any, groups: dict[str, list[Bar]], title: str, unit: str) -> Any:
    """Horizontal bars, a group for each model, thin lines for the range, our ratio written behind ours."""
    n = sum(len(g) for g in groups.values())
    figure, ax = plt.subplots(figsize=(8.5, 0.9 + 0.3 * n + 0.25 * len(groups)))
    longest = max(s["max"] for g in groups.values() for _, s, _ in g)
    ticks, y = [], 0.0
    for name, group in groups.items():
        ticks.append((y - (len(group) - 1) / 2, name))
        for bar in group:
            draw_bar(ax, y, bar, longest)
            y -= 1
        y -= 0.7
    ax.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel=unit, xlim=(0, longest * 1.25), ylim=(y + 0.9, 0.8))
    ax.set_title(title)
    ax.grid(True, axis="x", lw=0.6)
    ax.spines["left"].set_visible(False)
    legend(ax, groups)
    return figure


def draw_bar(ax: Any, y: float, bar: Bar, longest: float) -> None:
    engine, s, ratio = bar
    ax.barh(y, s["median"], 0.86, color=COLOURS.get(engine, SOFT), zorder=2)
    ax.plot([s["min"], s["max"]], [y, y], color=INK, lw=1, alpha=0.7, zorder=3)
    x = s["max"] + 0.01 * longest
    text = f"{s['median']:.{0 if s['median'] >= 100 else 1}f}"
    ax.text(x, y, text, va="center", fontsize=8.5, color=INK)
    if ratio:
        x += 0.065 * longest
        ax.text(x, y, f"{ratio:.2f} x", va="center", fontsize=8.5, color=INK, weight="bold")


def legend(ax: Any, groups: dict[str, list[Bar]]) -> None:
    """Each engine once."""
    engines = dict.fromkeys(engine for g in groups.values() for engine, _, _ in g)
    for engine in engines:
        ax.barh(0, 0, color=COLOURS.get(engine, SOFT), label=NAMES.get(engine, engine))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


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


def figures(plt: Any, found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Name and drawing of all that can be drawn."""
    if ops := found.get("ops"):
        yield "roofline", roofline(plt, ops[-1])
    for name, test, title in (("prefill", "pp", "Prefill"), ("decode", "tg", "Decoding")):
        if groups := peers(found.get("compare", []), test):
            yield name, bars(plt, groups, title, "tokens/s")
    if groups := encoders(found.get("embeddings", [])):
        yield "embeddings", bars(plt, groups, "Embeddings", "texts/s")


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
    found, drawn = read(o.folder), []
    if not found:
        sys.exit(f"{o.folder} has no results; write some with --json, see benchmarks/README.md")
    for name, figure in figures(pyplot(), found):
        figure.savefig(o.folder / f"{name}.svg", metadata={"Date": None})
        if o.png:
            figure.savefig(o.folder / f"{name}.png", dpi=110)
        drawn.append(name)
    (o.folder / "README.md").write_text(page(found, drawn))
    print(f"{', '.join(drawn)} and README.md are in {o.folder.name}/")


if __name__ == "__main__":
    main()
