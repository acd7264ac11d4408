"""The bits of models' logits on ``cpu``, a line for each: python bits.py FOLDER [NAME..]; no name: all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from tinyllm import gguf
from tinyllm.kernels.cpu import emit
from tinyllm.kernels.devices import open_backend
from tinyllm.models.build import build

PARTS = 20, 3, 1  # tokens of a step: panels, a few tokens, one


def digests(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """A line for each file: its name and a hash of the logits of a prompt read in parts."""
    be = open_backend("cpu", 2)
    for name in names:
        with gguf.open(folder / f"{name}.gguf") as f:
            net = build(f.metadata, f.tensors, be, "f32")
        ids = np.load(folder / f"{name}.npz")["tokens_0"].tolist()
        state, seen = net.new_state(64), hashlib.sha256()
        state.append((ids * sum(PARTS))[: sum(PARTS)])
        for n in PARTS:
            (rows,) = net.forward([(state, n, "all")])
            seen.update(np.ascontiguousarray(rows).tobytes())
        yield f"{name} {seen.hexdigest()[:32]}"


def main(folder: str, *names: str) -> None:
    print(emit.instructions(), flush=True)  # noqa: T201
    for line in digests(Path(folder), names or sorted(p.stem for p in Path(folder).glob("*.gguf"))):
        print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
