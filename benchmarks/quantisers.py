"""How near our quantisers come to weights, beside ggml's: squared errors per tensor and format.

    python benchmarks/quantisers.py model.gguf --library libggml-base.so --imatrix model.imatrix.gguf \
        --json benchmarks/results/quantisers.json

Both quantise the values that the file's tensors stand for, with and without an importance matrix. An error is
the sum of squared differences, each weighed by the importance where there is one, of ``--rows`` rows of a
tensor that lie evenly. A ratio below 1 says that ours is smaller. ``--library`` is a ggml library that exports
``ggml_quantize_chunk``, such as llama-cpp-python's ``libggml-base.so``.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm import gguf
from tinyllm.gguf import quants
from tinyllm.gguf.imatrix import Importance, per_row, read_imatrix
from tinyllm.gguf.types import TYPES

NOT_THEIRS = ("F32", "F16", "BF16", "F64", "Q8_1", "Q8_K")  # plain numbers, and activations
NEEDS_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # ggml stops the process without one
Encode = Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]


def encoder(library: Path) -> Encode:
    """ggml's quantiser: type, x [rows, n], importance [n] or None -> uint8 [rows, row_bytes]."""
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    floats = ctypes.POINTER(ctypes.c_float)
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats
    ]  # fmt: skip

    def encode(kind: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        rows, n = x.shape
        out = np.zeros((rows, TYPES[kind].row_nbytes(n)), np.uint8)
        weights = None
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            weights = importance.ctypes.data_as(floats)
        chunk(TYPES[kind].id, x.ctypes.data_as(floats), out.ctypes.data, 0, rows, n, weights)
        return out

    return encode


def tensors(
    path: Path, match: str, n_rows: int, known: Importance | None
) -> Iterator[tuple[str, Any, Any]]:
    """Name, some rows x [rows, n], and the importance of their columns [n] or None of each matrix."""
    with gguf.open(path) as file:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) < 2 or not name.endswith(".weight") or not re.search(match, name):
                continue
            means = known.means(name) if known else None
            each = None if means is None else per_row(means, tensor.shape)
            n = tensor.shape[-2]  # in a stack of experts, the first one's
            some = np.unique(np.linspace(0, n - 1, min(n_rows, n)).astype(int))
            raw = np.concatenate([tensor.read_rows(i, i + 1) for i in some])
            x = quants.dequantize(tensor.type, raw)
            yield name, np.ascontiguousarray(x, np.float32), None if each is None else each[0]


def error(kind: str, raw: np.ndarray, x: np.ndarray, weights: np.ndarray | None) -> float:
    """Sum of weighed squared differences."""
    away = np.square(quants.dequantize(kind, raw).astype(np.float64) - x)
    return float((away if weights is None else away * weights).sum())


def compare(
    path: Path, match: str, encode: Encode, known: Importance | None, kinds: list[str], n_rows: int
) -> list[dict[str, Any]]:
    """A row per format and way: the ratios of our errors to theirs, over all tensors that fit."""
    found: dict[tuple[str, bool], dict[str, float]] = {}
    for name, x, importance in tensors(path, match, n_rows, known):
        for kind in kinds:
            if x.shape[1] % TYPES[kind].block_size:
                continue
            for weights in [None] if importance is None else [None, importance]:
                if weights is None and kind in NEEDS_IMPORTANCE:
                    continue
                ours = error(kind, quants.quantize(kind, x, weights), x, weights)
                theirs = error(kind, encode(kind, x, weights), x, weights)
                ratio = ours / theirs if theirs else float(ours > 0) + 1
                found.setdefault((kind, weights is not None), {})[name] = ratio
    return [summary(path.stem, kind, weighed, ratios) for (kind, weighed), ratios in found.items()]


def summary(model: str, kind: str, weighed: bool, ratios: dict[str, float]) -> dict[str, Any]:
    """The median and the largest ratio, and how many tensors are above 1."""
    worst = max(ratios, key=lambda n: ratios[n])
    row = {
        "model": model, "format": kind, "importance": weighed, "tensors": len(ratios),
        "median": round(statistics.median(ratios.values()), 4),
        "largest": round(ratios[worst], 4), "worst": worst,
        "above_1": sum(r > 1.00005 for r in ratios.values()),
    }  # fmt: skip
    print(*row.values(), flush=True)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=common.existing)
    parser.add_argument("--library", required=True, type=common.existing, help="ggml's")
    parser.add_argument("--imatrix", type=common.existing, help="of `tinyllm imatrix`")
    parser.add_argument("--formats", type=common.names, help="default: all that both write")
    parser.add_argument("--rows", type=int, default=128, help="of each tensor; default 128")
    parser.add_argument("--tensors", default="", metavar="REGEX", help="default: all")
    parser.add_argument("--json", help="a file")
    options = parser.parse_args()
    both = [k for k, f in quants.FORMATS.items() if f.quantize and k not in NOT_THEIRS]
    known = read_imatrix(options.imatrix) if options.imatrix else None
    rows = compare(
        options.model, options.tensors, encoder(options.library), known, options.formats or both,
        options.rows,
    )  # fmt: skip
    report = {"benchmark": "quantisers", "machine": common.machine(), "rows_of_each": options.rows}
    if options.json:
        common.write_json(options.json, report | {"rows": rows})


if __name__ == "__main__":
    main()
