#!/usr/bin/env python3
"""Write docs/architectures.md and tinyllm/models/outlines.json from the table and the golden files.

    python scripts/architectures.py            # measures every file on the reference backend: a minute
    python scripts/architectures.py dbrx       # only this one's; the other rows stay as they are
    python scripts/architectures.py --check    # fails if the table has a row that the page does not

The golden files of test data (``$TINYLLM_TESTDATA``, ``../shared/data``) and of tests/data/models are read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from packed import PACKED, unpacked  # noqa: E402

from tinyllm import gguf  # noqa: E402
from tinyllm.cli.info import row as said  # noqa: E402
from tinyllm.kernels.devices import open_backend  # noqa: E402
from tinyllm.models.archs import ARCHS, NOT_RUN  # noqa: E402
from tinyllm.models.build import build  # noqa: E402
from tinyllm.models.explain import OUTLINES  # noqa: E402
from tinyllm.models.network import Network  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
SHARED = (
    Path(os.environ.get("TINYLLM_TESTDATA", ROOT.parent / "shared" / "data")) / "golden" / "models"
)
OURS = ROOT / "tests" / "data" / "models"
REFERENCES = {"hf": "transformers", "np": "float64 NumPy", "lcpp": "llama.cpp"}
N_CTX = 256
HEAD = """# Architectures

Written by `scripts/architectures.py` from the table in `tinyllm/models/archs.py`; do not edit by hand.

Each row was compared with another implementation of the same model, in float32, on tiny models with
random weights. The difference is the largest of any logit (or embedding value), in standard deviations of
the reference's, measured on the `reference` backend; tests allow 1e-4 there, and 1e-3 on `cpu` and on GPUs.
`tinyllm explain NAME` shows what a layer does.

| architecture | source | what its files do not say | reference | test files | largest difference |
|---|---|---|---|---|---|
"""
TAIL = """
The tests are `test_equals_the_reference` and the two after it in `tests/models/test_golden.py`, and
`test_scores_equal_the_reference` in `tests/models/test_rank.py`.

## A second opinion

llama.cpp b11434 computed the golden files too, in float32 (`benchmarks/results/second-opinion.json`). Of 146 files it
opens 136. In 102 of them no logit is more than 1e-4 standard deviations from ours; 25 more have GELU, which ggml looks up in
a table of halves: up to 3.2e-3. In the others one of the two reads the file otherwise, and ours is as transformers, or the
publisher's code, has it:

| architecture | llama.cpp | once that is set aside |
|---|---|---|
| arwkv7 | computes heads of 16 values, or a multiple of it, right; the file's have 8 | 2.5e-6 |
| deci | drops the attention of a layer that has no feed-forward half | 2.2e-6 |
| gemma4 with experts | caps logits at 30 where the file has no key for it | 2.6e-4 (GELU) |
| qwen2vl | takes another epsilon than the file's; real files have 1e-6 | 9.7e-6 |
| qwen35, qwen35moe, qwen3next | normalise keys of linear attention with the file's epsilon, not with 1e-6; real files have 1e-6 | 3.8e-5 |
| grovemoe | small experts read what the large ones have made, and weigh it by a number of another expert | not compared |
| smallthinker | a window of 4096 whatever the file says; every layer rotates in a model of four | 4.5e-6 |
| dots1, jina-bert-v3, nemotron_h, plamo3 | open the files with other shapes, keys or names | 1.6e-6, 1.0e-3 (GELU), 4.9e-6, 4.1e-6 |
| gemma3n, plamo2, deepseek32, glm-dsa, dots3note | have fixed sizes, or stop at sizes this small | not compared |
| gptj | is not known there | not compared |

## Known, and refused by name

| architecture | why |
|---|---|
"""  # noqa: E501  # a table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    options = parser.parse_args()
    if options.check:
        missing = unmentioned(PAGE.read_text("utf-8"))
        sys.exit(f"docs/architectures.md lacks {', '.join(missing)}" if missing else 0)
    files = by_architecture()
    OUTLINES.write_text(json.dumps({n: outline(ps) for n, ps in files.items()}, indent=0) + "\n")
    names = set(options.names or ARCHS)
    written = PAGE.read_text("utf-8").split("\n## ")[0].splitlines(keepends=True)
    lines = {line.split("|")[1].strip(): line for line in written if line.startswith("| ")}
    rows = [table_row(n, files[n]) if n in names else lines[n] for n in sorted(ARCHS)]
    refused = [f"| {name} | {why} |\n" for name, why in sorted(NOT_RUN.items())]
    PAGE.write_text(HEAD + "".join(rows) + TAIL + "".join(refused), "utf-8")


def unmentioned(page: str) -> list[str]:
    """Rows that the page does not have as the table has them, and names it does not refuse."""
    rows = [n for n, a in ARCHS.items() if f"| {n} | {a.source} | {said(a)} |" not in page]
    return rows + [n for n, why in NOT_RUN.items() if f"| {n} | {why} |" not in page]


def by_architecture() -> dict[str, list[Path]]:
    """The golden files of each row, the smallest first."""
    found = defaultdict(list)
    for path in sorted([*SHARED.glob("*.gguf"), *OURS.glob("*.gguf"), *map(unpacked, PACKED)]):
        with gguf.open(path) as f:
            found[f.metadata["general.architecture"]].append(path)
    return {n: sorted(found[n], key=lambda p: p.stat().st_size) for n in sorted(ARCHS)}


def outline(paths: list[Path]) -> dict[str, Any]:
    """Keys and shapes of the smallest file that is no reranker; layers with equal tensors together."""
    path = next(p for p in paths if not p.stem.startswith("rank-"))
    with gguf.open(path) as f:
        name = f.metadata["general.architecture"]
        keys = {k: plain(v) for k, v in f.metadata.items() if k.startswith((f"{name}.", "xielu."))}
        groups: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
        at = f"{ARCHS[name].blocks_at}."
        for tensor in f.tensors.values():
            number, _, suffix = tensor.name.removeprefix(at).partition(".")
            layered = tensor.name.startswith(at)
            groups[suffix if layered else tensor.name, tensor.shape].append(
                number if layered else ""
            )
    tensors = {
        f"{','.join(layers)} {key}" if layers != [""] else key: list(shape)
        for (key, shape), layers in groups.items()
    }
    return {"metadata": {"general.architecture": name, **keys}, "tensors": tensors}


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def table_row(name: str, paths: list[Path]) -> str:
    arch = ARCHS[name]
    measured = [measure(p) for p in paths if not p.stem.startswith("rank-")]
    worst, reference = max(measured)
    files = ", ".join(p.stem for p in paths)
    return f"| {name} | {arch.source} | {said(arch)} | {reference} | {files} | {worst:.0e} |\n"


def measure(path: Path) -> tuple[float, str]:
    """The largest difference to the most trusted reference, and which that is."""
    with gguf.open(path) as f:
        net = build(f.metadata, f.tensors, open_backend("reference"), "f32")
    npz = np.load(path.with_suffix(".npz"))
    kind = "logits" if net.config.causal else "emb_tok"
    which = next(r for r in REFERENCES if f"{kind}_{r}_0" in npz)
    worst = 0.0
    for i in range(3):
        if f"tokens_{i}" in npz:
            want = npz[f"{kind}_{which}_{i}"]
            source = npz[f"source_{i}"] if f"source_{i}" in npz else None
            away = np.abs(computed(net, npz[f"tokens_{i}"], source) - want)
            worst = max(worst, float(away.max() / want.std()))
    return worst, REFERENCES[which]


def computed(net: Network, ids: np.ndarray, source: np.ndarray | None) -> np.ndarray:
    if not net.config.causal:
        return net.hidden([ids.tolist()])[0]
    state = net.new_state(N_CTX, source=None if source is None else source.tolist())
    state.append(ids.tolist())
    return np.array(net.forward([(state, len(ids), "all")])[0])


if __name__ == "__main__":
    main()
