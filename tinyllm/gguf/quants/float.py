"""Plain numbers: a block is one weight, and dequantising is a conversion.

Source: IEEE 754; bfloat16 is the upper half of a float32.
"""

from __future__ import annotations

import numpy as np

from .format import Array, Floats, Format


def _widen(blocks: Array) -> Floats:
    return blocks.astype(np.float32)[:, None]


def _from_bf16(blocks: Array) -> Floats:
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


def _to_bf16(x: Floats, w: Floats | None = None) -> Array:
    """Round to nearest, ties to even; a NaN stays a NaN even if only low bits were set."""
    bits = x.reshape(-1).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    quiet = bits | 0x400000
    return (np.where(np.isnan(x.reshape(-1)), quiet, rounded) >> 16).astype("<u2")


def _number(name: str, code: str, writable: bool = False) -> Format:
    dtype = np.dtype(code)
    narrow = (lambda x, w=None: x[:, 0].astype(dtype)) if writable else None
    return Format(name, dtype, _widen, narrow)


FORMATS = (
    _number("F64", "<f8", writable=True),
    _number("F32", "<f4", writable=True),
    _number("F16", "<f2", writable=True),
    Format("BF16", np.dtype("<u2"), _from_bf16, _to_bf16),
    _number("I8", "i1"),
    _number("I16", "<i2"),
    _number("I32", "<i4"),
    _number("I64", "<i8"),
)
