"""Importance matrices: how large the inputs of each product are, column by column, on some text.

A quantiser that knows them spends its bits on the weights that large inputs meet. Files are those of
`llama-imatrix`: GGUF, and the older ``.dat``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import GGUFError
from ..files import replacing
from .reader import open_file
from .writer import write

Floats = npt.NDArray[np.float32]
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_ENTRIES, LONGEST_NAME = 1 << 20, 1 << 10


@dataclass
class Importance:
    """Sums of squared inputs, and over how many rows.

    Attributes
    ----------
    sums : dict
        Name of a matrix -> float64 [n, n_in]: one row, or one for each expert of a stack.
    counts : dict
        Name -> float64 [n]: rows that were seen.
    datasets : list of str
        The texts' names.
    chunks, chunk_size : int
        Pieces of text, and the tokens of each.
    """

    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = 512

    def add(
        self, name: str, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]
    ) -> None:
        """Add sums [n, n_in] over so many rows [n] to a matrix's."""
        if name in self.sums:
            self.sums[name] += sums
            self.counts[name] += counts
        else:
            self.sums[name], self.counts[name] = np.array(sums), np.array(counts)

    def means(self, name: str) -> Floats | None:
        """Mean squared input of each column, float32 [n, n_in]; 1 for experts without any; None: not known."""
        if name not in self.sums:
            return None
        counts = self.counts[name][:, None]
        means = np.divide(
            self.sums[name], counts, out=np.ones_like(self.sums[name]), where=counts > 0
        )
        return means.astype(np.float32)


def read_imatrix(path: str | os.PathLike[str]) -> Importance:
    """Read an importance matrix in either format; GGUFError if the file is damaged or none."""
    file = Path(os.path.expanduser(path))
    with file.open("rb") as f:
        magic = f.read(4)
    found = _read_gguf(file) if magic == b"GGUF" else _read_dat(file)
    for name, sums in found.sums.items():
        counts = found.counts[name]
        if len(counts) != len(sums) or not sums.size:
            raise GGUFError(
                f"has sums {sums.shape} and counts {counts.shape}", path=str(file), name=name
            )
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (counts >= 0).all()):
            raise GGUFError("a sum of squares is negative or no number", path=str(file), name=name)
    return found


def _read_gguf(path: Path) -> Importance:
    with open_file(path) as file:
        keys = file.metadata
        if keys.get("general.type") != "imatrix":
            raise GGUFError(
                f"general.type is {keys.get('general.type')!r}; expected an importance matrix, 'imatrix'",
                path=str(path),
            )
        found = Importance(
            datasets=[str(x) for x in keys.get("imatrix.datasets", ())],
            chunks=int(keys.get("imatrix.chunk_count", 0)),
            chunk_size=int(keys.get("imatrix.chunk_size", 512)),
        )
        for name, tensor in file.tensors.items():
            if not name.endswith(SUMS):
                continue
            stem = name.removesuffix(SUMS)
            if stem + COUNTS not in file.tensors:
                raise GGUFError("tensor is missing", path=str(path), name=stem + COUNTS)
            sums = tensor.dequantize().astype(np.float64)
            counts = file.tensors[stem + COUNTS].dequantize().astype(np.float64)
            found.add(stem, sums.reshape(-1, sums.shape[-1]), counts.reshape(-1))
    return found


def _read_dat(path: Path) -> Importance:
    """The older format: per matrix its name, calls, values; the values of all experts in one run."""
    data = memoryview(path.read_bytes())
    at = 0

    def take(n: int) -> memoryview:
        nonlocal at
        if n < 0 or at + n > len(data):
            raise GGUFError("the file ends too early, or is no imatrix", path=str(path), offset=at)
        at += n
        return data[at - n : at]

    def number(most: int) -> int:
        value: int = struct.unpack("<i", take(4))[0]
        if not 0 <= value <= most:
            raise GGUFError(
                f"a count is {value}: the file is damaged, or no imatrix",
                path=str(path),
                offset=at - 4,
            )
        return value

    found = Importance()
    for _ in range(number(MOST_ENTRIES)):
        name = bytes(take(number(LONGEST_NAME))).decode("utf-8", "replace")
        calls, n = number(2**31 - 1), number(2**31 - 1)
        values = np.frombuffer(take(4 * n), "<f4").astype(np.float64)
        found.add(name, values[None], np.array([float(calls)]))
    if at < len(data):
        found.chunks = number(2**31 - 1)
        found.datasets = [bytes(take(number(1 << 16))).decode("utf-8", "replace")]
    return found


def write_imatrix(path: str | os.PathLike[str], importance: Importance) -> None:
    """Write an importance matrix: in the older format if the name ends in ``.dat``, else as GGUF."""
    if os.fspath(path).endswith(".dat"):
        _write_dat(path, importance)
        return
    tensors: dict[str, Floats] = {}
    for name in sorted(importance.sums):
        tensors[name + SUMS] = importance.sums[name].astype(np.float32)
        tensors[name + COUNTS] = importance.counts[name].astype(np.float32)[:, None]
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": importance.datasets,
        "imatrix.chunk_count": np.uint32(importance.chunks),
        "imatrix.chunk_size": np.uint32(importance.chunk_size),
    }
    write(path, keys, tensors)


def _write_dat(path: str | os.PathLike[str], importance: Importance) -> None:
    """Means times calls, as readers divide by the calls: experts have rows of their own, and one count."""

    def text(s: str) -> bytes:
        data = s.encode()
        return struct.pack("<i", len(data)) + data

    parts = [struct.pack("<i", len(importance.sums))]
    for name in sorted(importance.sums):
        means = importance.means(name)
        assert means is not None
        calls = max(importance.chunks, 1)
        values = (means * np.float32(calls)).astype("<f4").tobytes()
        parts += [text(name), struct.pack("<ii", calls, means.size), values]
    parts += [struct.pack("<i", importance.chunks), text((importance.datasets or [""])[0])]
    with replacing(path) as file:
        file.write(b"".join(parts))


def per_row(means: Floats, shape: Sequence[int]) -> Floats | None:
    """Means as [n, n_in] for a tensor of this shape, whatever rows the file had; None if they do not fit."""
    n = shape[0] if len(shape) > 2 else 1
    if means.size == shape[-1] * n:
        return means.reshape(n, shape[-1])
    return means.reshape(1, -1) if means.size == shape[-1] else None


def check_covers(importance: Importance, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise GGUFError for a matrix of another shape than the model's, or if no name is the model's."""
    known = [name for name in importance.sums if name in shapes]
    if not known:
        raise GGUFError("the importance matrix names no tensor of this model")
    for name in known:
        means = importance.means(name)
        if means is not None and per_row(means, shapes[name]) is None:
            raise GGUFError(
                f"the importance matrix has {means.size} values; the tensor has shape {shapes[name]}",
                name=name,
            )
