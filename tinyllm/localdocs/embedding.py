"""Texts to vectors: what stands before them, long texts in parts, and 8 bits a number in the store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..engine.tasks import SPEC_OF
from ..gguf import quants
from ..model import Model

KIND = "Q8_0"  # 32 numbers share a scale; the kernels multiply it as they do a model's weights
BLOCK = 32


class Embedder:
    """An embedding model, and what a store knows it by."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.name = str(model.metadata.get("general.name", "") or Path(model.path).stem)
        spec = SPEC_OF.get(self.name)
        self._document, self._query = (spec.document, spec.query) if spec else ("", "")
        self.width = int(model.config.n_embd)
        adapters = model.network.adapters
        beside = adapters.digest(
            adapters.scales
        )  # they make other vectors; "" where there are none
        self.identity = "-".join(filter(None, (file_digest(Path(model.path)), beside)))

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1 for texts that are to be found -> float32 [n, width]."""
        return self._embed(texts, self._document)

    def query(self, text: str) -> np.ndarray:
        """The vector of a question -> float32 [width]."""
        return np.asarray(self._embed([text], self._query)[0])

    def _embed(self, texts: Sequence[str], task: str) -> np.ndarray:
        """A text that is longer than the model reads is the mean of its parts."""
        encode = self.model.tokenizer.encode
        before = encode(f"{task}: ", add_special=False, parse_special=False) if task else []
        letter, whole = encode("a", add_special=False), encode("a")
        at = next(i for i in range(len(whole)) if whole[i : i + len(letter)] == letter)
        start, end = whole[:at], whole[at + len(letter) :]
        room = int(self.model.config.n_ctx_train) - len(start) - len(before) - len(end)
        parts: list[list[int]] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            ids = encode(text, add_special=False, parse_special=False)
            for at in range(0, max(len(ids), 1), room):
                inner = [*start, *before, *ids[at : at + room], *end]
                parts.append(inner or [self.model.tokenizer.bos or 0])
                owners.append(i)
        rows = np.asarray(self.model.embed_batch(parts), np.float32)
        if len(parts) == len(texts):
            return rows
        sums = np.zeros((len(texts), rows.shape[1]), np.float64)
        np.add.at(sums, owners, rows)
        return np.asarray(sums / np.linalg.norm(sums, axis=1, keepdims=True), np.float32)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def row_bytes(width: int) -> int:
    """Bytes of a stored vector of so many numbers."""
    return -(-width // BLOCK) * quants.FORMATS[KIND].type_size


def pack(vectors: np.ndarray) -> list[bytes]:
    """Vectors [n, width] as they are stored."""
    rows = quants.quantize(KIND, padded(vectors))
    return [row.tobytes() for row in rows]


def unpack(codes: Sequence[bytes], width: int) -> np.ndarray:
    """Stored vectors -> float32 [n, width]."""
    raw = np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), -1)
    return np.asarray(quants.dequantize(KIND, raw))[:, :width]


def padded(x: np.ndarray) -> np.ndarray:
    """Rows with zeros behind them, to whole blocks."""
    spare = -x.shape[-1] % BLOCK
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]) if spare else x
