"""How near each kernel comes to the machine: GB/s of weights for one token, GMAC/s for many.

    python benchmarks/ops.py                          # the common formats
    python benchmarks/ops.py Q4_0 F16 --threads 2 --json benchmarks/results/ops.json

One token is measured on more weights than caches hold, beside plain reading of memory; 8 and 512 tokens
on a 2048 x 2048 matrix, beside the processor's byte dot products on registers alone. Best of several runs:
on a shared machine only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch
from tinyllm.kernels.cpu import emit
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.cpu.limits import best, limits

COMMON = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4", "F16", "F32"]
N = 2048
COPIES = 32  # copies of the matrix, so that one token's weights come from memory


class Random:
    """A tensor [rows, n] of random blocks with small scales."""

    name = "random"

    def __init__(self, type_name: str, rows: int, n: int) -> None:
        self.type, self.shape = type_name, (rows, n)
        block = quants.quantize(
            type_name, np.random.default_rng(0).normal(0, 0.02, (16, n)).astype("f")
        )
        self._block = block.reshape(16, -1)

    def read_rows(self, start: int, stop: int, out: Any = None) -> np.ndarray:
        """Rows that repeat one block of 16 rows."""
        return np.tile(self._block, (-(-(stop - start) // 16), 1))[: stop - start]


def measure(be: CPUBackend, type_name: str, seconds: float) -> dict[str, Any]:
    """One format: M = 1 from memory, M = 8 and 512 in cache."""
    small, large = be.load(Random(type_name, N, N)), be.load(Random(type_name, COPIES * N, N))
    row = {"format": type_name, "bits/weight": 8 * small.nbytes / N / N}
    row["M=1 GB/s"] = large.nbytes / best(lambda: run(be, large, 1), seconds) / 1e9
    for m in (8, 512):
        row[f"M={m} GMAC/s"] = m * N * N / best(lambda m=m: run(be, small, m), seconds) / 1e9
    return row


def run(be: CPUBackend, w: Any, m: int) -> None:
    """One product with m tokens, its program recorded the first time."""
    x = be.array(np.ones((m, N), np.float32))
    batch = Batch.of([[0] * m], [0], [0])
    be.step((id(w), m) if m <= 32 else None, lambda _: be.matmul(w, x), batch)


def show(report: dict[str, Any]) -> None:
    """A table."""
    print(f"{report['instruction set']}, {report['threads']} threads; limits:", end=" ")
    print(", ".join(f"{k} {v:.1f}" for k, v in report["limits"].items()))
    names = list(report["formats"][0])
    print(" | ".join(f"{n:>13}" for n in names))
    for row in report["formats"]:
        print(
            " | ".join(f"{v:>13.2f}" if isinstance(v, float) else f"{v:>13}" for v in row.values())
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=COMMON, help="such as Q4_K F16")
    parser.add_argument("-t", "--threads", type=int, help="default: one per physical core")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each number")
    parser.add_argument("--json", nargs="?", const="-", help="a file; alone: one line of JSON")
    options = parser.parse_args()
    be = CPUBackend(options.threads)
    report = {
        "benchmark": "ops",
        "machine": common.machine(),
        "instruction set": emit.instruction_set(),
        "threads": be.n_threads,
        "limits": limits(be.n_threads, options.seconds),
        "formats": [measure(be, f, options.seconds) for f in options.formats],
    }
    print(json.dumps(report)) if options.json == "-" else show(report)
    if options.json not in (None, "-"):
        common.write_json(options.json, report)


if __name__ == "__main__":
    main()
