"""GPU kernels beside the device's own limits, and whole models with random weights.

    python benchmarks/gpu.py --device cuda                    # everything: benchmarks/results
    python benchmarks/gpu.py --device cuda --only kernels --matvec mine.c   # your matvec.c ranked beside ours
    python benchmarks/gpu.py --device opencl --quick --formats Q4_0         # small sizes: does it run?

Each part (a format, a depth, a model) runs in a process of its own (gpu_measure.py), because one wrong kernel
makes a CUDA device useless to its process. The report is written after each part; a part that fails is noted
with its reason, what it had measured by then is kept, and the others follow. A run that was cut short goes on
where it was, as long as the kernels are the same; what failed is tried again. What tells most comes first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tinyllm import plots

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
FIRST = ["Q4_0", "Q8_0", "F16"]  # measured before the other formats
FORMATS = [
    *FIRST,
    *"""Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ2_XXS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ2_0 MXFP4
    NVFP4 BF16""".split(),
]
MODELS = ["llama-1b:Q4_0", "llama-8b:Q4_0", "llama-8b:Q8_0", "llama-8b:F16"]
DEPTHS = ["4096", "512", "32768"]
MOST_SECONDS = 240  # a part may take so long


def parts(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is to be measured, the most telling first."""
    first = [("product", f) for f in options.formats if f in FIRST]
    rest = [("product", f) for f in options.formats if f not in FIRST]
    models = [("model", m) for m in (["tiny:Q4_0"] if options.quick else options.models)]
    depths = [("attention", d) for d in (["100"] if options.quick else DEPTHS)]
    chosen = {"kernels": first + depths + rest, "models": models}
    others = [("pick", ""), ("startup", "first"), ("startup", "again")]
    every = models[:2] + first + models[2:] + depths[:1] + others + depths[1:] + rest
    return [("limits", ""), *(chosen[options.only] if options.only else every)]


def measure(
    part: tuple[str, str], options: argparse.Namespace, limit: float
) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a part, and, if it failed, one line that says why there are no more."""
    command = [sys.executable, str(HERE / "gpu_measure.py"), *part, "--device", options.device]
    command += ["--quick"] if options.quick else []
    command += ["--matvec", options.matvec] if options.matvec else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as e:
        return rows_of(e.stdout or b""), f"took more than {limit:.0f} seconds"
    rows = rows_of(done.stdout)
    if done.returncode == 0:
        return rows, None
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return rows, (said or [f"ended with code {done.returncode}"])[-1]


def rows_of(printed: bytes) -> list[dict[str, Any]]:
    """The whole lines of a part's output that are rows."""
    lines = printed.decode("utf-8", "replace").split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith("{")]


def sources_hash() -> str:
    """Names the kernels that a report is about."""
    files = sorted((HERE.parent / "tinyllm" / "kernels" / "gpu").rglob("*.[pch]*"))
    text = b"".join(f.read_bytes() for f in files if f.suffix in (".py", ".c", ".h"))
    return hashlib.sha256(text).hexdigest()[:16]


def opened(path: Path) -> dict[str, Any]:
    """The report so far, if it is about these kernels."""
    report = json.loads(path.read_text()) if path.exists() else {}
    same = report.get("sources") == sources_hash()
    return report if same else {"sources": sources_hash(), "parts": {}, "failed": {}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure part after part until all are there or time is up."""
    start, path = time.monotonic(), options.out / f"{options.name}.json"
    report = opened(path)
    for part in parts(options):
        name, left = " ".join(part).strip(), options.seconds - (time.monotonic() - start)
        if name in report["parts"] and name not in report["failed"]:
            continue
        if left < 10:
            print(f"time is up before {name}; the same command goes on from there")
            break
        rows, reason = measure(part, options, min(MOST_SECONDS, left))
        if name == "limits" and reason is not None:
            sys.exit(reason)
        report["failed"].pop(name, None)
        report["parts"].pop(name, None)
        report["parts"] |= {name: rows} if rows else {}
        report["failed"] |= {} if reason is None else {name: reason}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"== {name}")
        limits = report["parts"]["limits"][0]
        show([row | shares(row, limits) for row in rows])
        show([] if reason is None else [{"failed": reason}])
    return report


def shares(row: dict[str, Any], limits: dict[str, Any]) -> dict[str, float]:
    """What a kernel reaches of the device's copies and of its library's half-precision product."""
    pairs = (("gb_s", "copy_gb_s", "of copy"), ("tflop_s", "half_tflop_s", "of half"))
    return {to: row[own] / limits[of] for own, of, to in pairs if own in row and of in limits}


def show(rows: list[dict[str, Any]]) -> None:
    """A table."""
    said = None
    for row in rows:
        if list(row) != said:
            print(" | ".join(row))
        said = list(row)
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    print(flush=True)


def plot(report: dict[str, Any], folder: Path, name: str) -> None:
    """Bandwidth of each format with few rows, and operations with many, under the device's limits."""
    limits = report["parts"]["limits"][0]
    products = [row for part, rows in report["parts"].items() if "product" in part for row in rows]
    for pick, key, limit in ((min, "gb_s", "copy_gb_s"), (max, "tflop_s", "half_tflop_s")):
        rows = pick((product["rows"] for product in products), default=0)
        chosen = sorted((p for p in products if p["rows"] == rows), key=lambda p: -p[key])
        names, values = [p["format"] for p in chosen], [p[key] for p in chosen]
        if limit in limits and chosen:
            names, values = ["measured limit", *names], [limits[limit], *values]
        if chosen:
            plots.bars(
                names,
                {"": values},
                xlabel=key.replace("_s", "/s").replace("_", " "),
                title=f"{limits['device']}, {rows} rows of activations",
                path=folder / f"{name}-{rows}.png",
            )


def listed(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="as load() takes it: cuda, cuda:1, opencl")
    parser.add_argument("--only", choices=["kernels", "models"])
    parser.add_argument("--formats", type=listed, default=FORMATS, help="Q4_0,Q6_K")
    parser.add_argument("--models", type=listed, default=MODELS, help="llama-8b:Q4_0,llama-1b:Q8_0")
    parser.add_argument("--matvec", metavar="FILE", help="a file to rank beside src/matvec.c")
    parser.add_argument("--quick", action="store_true", help="small sizes, as a check")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no part after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the report; default: gpu- and the device as given")
    options = parser.parse_args()
    said = options.device.replace(":", "-") + ("-yours" if options.matvec else "")
    options.name = options.name or f"gpu-{said}"
    options.out.mkdir(parents=True, exist_ok=True)
    report = run(options)
    plot(report, options.out, options.name)
    wrong = [f"{r['format']} x {r['rows']}" for rows in report["parts"].values() for r in rows
             if r.get("right") is False]  # fmt: skip
    for what, found in (("failed", list(report["failed"])), ("gave wrong numbers", wrong)):
        if found:
            print(f"{what}: {', '.join(found)}")
    sys.exit(bool(report["failed"] or wrong))


if __name__ == "__main__":
    main()
