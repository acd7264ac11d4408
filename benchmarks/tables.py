"""Embeddings of a table: in this process, on one node of Ray, and on two, one thread each.

    python benchmarks/tables.py model.gguf --rounds 3 --json benchmarks/results/tables.json

The three take turns. A rate is that of the batches behind the first part of the rows, so that starting workers
and loading models are left out. Nodes are processes of this machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import machine, ratios, show, spread, write_json
from nodes import Nodes

import tinyllm
from tinyllm.mapping import Embed
from tinyllm.ray.data import map_rows

SKIPPED = 0.3  # part of the rows, in which workers start
PAUSE = 0.02  # seconds without a row, behind which another batch came


def rate(results: Iterable[tuple[int, Any]], n: int) -> float:
    """Rows a second, from the end of a batch behind the first part to the end of the last."""
    times = [time.perf_counter() for _ in results]
    first = next(i for i in range(int(SKIPPED * n), n) if times[i + 1] - times[i] > PAUSE)
    return (n - 1 - first) / (times[-1] - times[first])


def main() -> None:
    """Measure, and write what was found."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("model", metavar="MODEL")
    p.add_argument("-n", "--rows", type=int, default=1200, metavar="N")
    p.add_argument("--rounds", type=int, default=3, metavar="N")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args()
    rows = [(i, f"Once upon a time there were {i} cats in a garden.") for i in range(args.rows)]
    found: dict[str, list[float]] = {"plain": [], "1 node": [], "2 nodes": []}
    with tinyllm.load(args.model, n_threads=1) as model:
        for _ in range(args.rounds):
            found["plain"].append(rate(Embed(model).run(rows), args.rows))
            with Nodes() as cluster:
                for n, nodes in enumerate(("1 node", "2 nodes"), 1):
                    cluster.grow(n)
                    results = map_rows("auto", "embed", rows, args.model, {}, {})
                    found[nodes].append(rate(results, args.rows))
            print({name: round(rates[-1], 1) for name, rates in found.items()}, flush=True)
    one, two = ratios(found["1 node"], found["plain"]), ratios(found["2 nodes"], found["1 node"])
    print(f"one node beside none: {show(one, 2)} x; two beside one: {show(two, 2)} x")
    if args.json:
        report = {"machine": machine(), "rows": args.rows, "rows_per_s": {
            name: spread(rates) for name, rates in found.items()
        }, "one_to_plain": one, "two_to_one": two}  # fmt: skip
        write_json(args.json, report)


if __name__ == "__main__":
    main()
