"""Values that are at hand, where a backend expects a tensor of a file."""

from __future__ import annotations

import numpy as np


class Row:
    """Host values as a tensor that a backend can load like a file's, of type F32."""

    type = "F32"

    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.shape = name, values.shape
        self.values = np.ascontiguousarray(values, np.float32)

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        raw = self.values.reshape(-1, self.shape[-1])[start:stop].view(np.uint8)
        if out is None:
            return raw
        out[...] = raw
        return out
