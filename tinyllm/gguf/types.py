"""The tensor types and metadata value types of GGUF: ids, sizes, and which bytes turn with the byte order.

Source: ``enum ggml_type``, the block structs of ``ggml-common.h``, and the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 16  # pages of 64 KiB exist, larger ones do not
MAX_TENSOR_NAME = 63  # bytes; ggml keeps 64 with the closing zero
# what general.architecture may say
ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}\Z")
MAX_KEY = 65535  # bytes, by the specification
Order = Literal["<", ">"]
FILE_ORDER: dict[str, Order] = {"little": "<", "big": ">"}


@dataclass(frozen=True, slots=True)
class GGMLType:
    """How one block of a tensor is stored.

    Attributes
    ----------
    name : str
        ggml's name, such as ``"Q4_K"``.
    id : int
        The number that stands in the file.
    block_size : int
        Elements in a block; a row holds whole blocks.
    type_size : int
        Bytes in a block.
    words : tuple of (offset, width, count)
        The fields of more than one byte, which a big-endian file stores reversed.
    """

    name: str
    id: int
    block_size: int
    type_size: int
    words: tuple[tuple[int, int, int], ...] = ()

    def row_nbytes(self, n: int) -> int:
        """Bytes of a row of `n` elements, which must be whole blocks."""
        return n // self.block_size * self.type_size


_TYPES = (
    GGMLType("F32", 0, 1, 4, ((0, 4, 1),)),
    GGMLType("F16", 1, 1, 2, ((0, 2, 1),)),
    GGMLType("Q4_0", 2, 32, 18, ((0, 2, 1),)),
    GGMLType("Q4_1", 3, 32, 20, ((0, 2, 2),)),
    GGMLType("Q5_0", 6, 32, 22, ((0, 2, 1),)),
    GGMLType("Q5_1", 7, 32, 24, ((0, 2, 2),)),
    GGMLType("Q8_0", 8, 32, 34, ((0, 2, 1),)),
    GGMLType("Q8_1", 9, 32, 36, ((0, 2, 2),)),
    GGMLType("Q2_K", 10, 256, 84, ((80, 2, 2),)),
    GGMLType("Q3_K", 11, 256, 110, ((108, 2, 1),)),
    GGMLType("Q4_K", 12, 256, 144, ((0, 2, 2),)),
    GGMLType("Q5_K", 13, 256, 176, ((0, 2, 2),)),
    GGMLType("Q6_K", 14, 256, 210, ((208, 2, 1),)),
    GGMLType("Q8_K", 15, 256, 292, ((0, 4, 1), (260, 2, 16))),
    GGMLType("IQ2_XXS", 16, 256, 66, ((0, 2, 33),)),
    GGMLType("IQ2_XS", 17, 256, 74, ((0, 2, 33),)),
    GGMLType("IQ3_XXS", 18, 256, 98, ((0, 2, 1),)),
    GGMLType("IQ1_S", 19, 256, 50, ((0, 2, 1), (34, 2, 8))),
    GGMLType("IQ4_NL", 20, 32, 18, ((0, 2, 1),)),
    GGMLType("IQ3_S", 21, 256, 110, ((0, 2, 1),)),
    GGMLType("IQ2_S", 22, 256, 82, ((0, 2, 1),)),
    GGMLType("IQ4_XS", 23, 256, 136, ((0, 2, 2),)),
    GGMLType("I8", 24, 1, 1),
    GGMLType("I16", 25, 1, 2, ((0, 2, 1),)),
    GGMLType("I32", 26, 1, 4, ((0, 4, 1),)),
    GGMLType("I64", 27, 1, 8, ((0, 8, 1),)),
    GGMLType("F64", 28, 1, 8, ((0, 8, 1),)),
    GGMLType("IQ1_M", 29, 256, 56, ((48, 2, 4),)),
    GGMLType("BF16", 30, 1, 2, ((0, 2, 1),)),
    GGMLType("TQ1_0", 34, 256, 54, ((52, 2, 1),)),
    GGMLType("TQ2_0", 35, 256, 66, ((64, 2, 1),)),
    GGMLType("MXFP4", 39, 32, 17),
    GGMLType("NVFP4", 40, 64, 36),
    GGMLType("Q1_0", 41, 128, 18, ((0, 2, 1),)),
    GGMLType("Q2_0", 42, 64, 18, ((0, 2, 1),)),
)
TYPES: dict[str, GGMLType] = {t.name: t for t in _TYPES}
BY_ID: dict[int, GGMLType] = {t.id: t for t in _TYPES}
REMOVED: dict[int, str] = {  # ids that ggml once wrote and no longer reads
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

NUMPY_TYPES: dict[str, str] = {  # NumPy's dtype name -> the tensor type that stores it unchanged
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}

# Metadata values: a u32 of the file says which.
VALUE_NAMES = (
    *("U8", "I8", "U16", "I16", "U32", "I32", "F32", "BOOL"),
    *("STRING", "ARRAY", "U64", "I64", "F64"),
)
VALUE_IDS: dict[str, int] = {name: i for i, name in enumerate(VALUE_NAMES)}
VALUE_DTYPES: dict[str, np.dtype[np.generic]] = {
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("u2"),
    "I16": np.dtype("i2"),
    "U32": np.dtype("u4"),
    "I32": np.dtype("i4"),
    "F32": np.dtype("f4"),
    "BOOL": np.dtype("?"),
    "U64": np.dtype("u8"),
    "I64": np.dtype("i8"),
    "F64": np.dtype("f8"),
}
DTYPE_VALUES: dict[str, str] = {dtype.name: name for name, dtype in VALUE_DTYPES.items()}


def swap_words(kind: GGMLType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Turn big-endian blocks into little-endian ones, or back.

    raw uint8 [n_bytes], whole blocks -> a copy of the same shape. ggml stores the fields declared wider than
    a byte in the machine's order and everything packed into bytes as it is.
    """
    out: npt.NDArray[np.uint8] = raw.copy()
    blocks = out.reshape(-1, kind.type_size)
    for offset, width, count in kind.words:
        field = blocks[:, offset : offset + width * count]
        turned = field.reshape(-1, count, width)[:, :, ::-1]
        field[...] = turned.reshape(len(blocks), width * count)
    return out
