"""The GGUF file format: a reader that trusts nothing, and a writer.

>>> import io
>>> import numpy as np
>>> from tinyllm import gguf
>>> files = gguf.write(io.BytesIO(), {"general.architecture": "llama"}, {"x": np.ones((2, 4), np.float32)})
"""

from __future__ import annotations

from . import types
from .reader import GGUFFile
from .reader import open_file as open  # noqa: A004  # the module is used as gguf.open
from .strings import StringArray
from .tensor import Tensor
from .types import GGMLType
from .writer import Deferred, RawTensor, write

__all__ = [
    "Deferred",
    "GGMLType",
    "GGUFFile",
    "RawTensor",
    "StringArray",
    "Tensor",
    "open",
    "types",
    "write",
]
