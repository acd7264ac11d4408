"""The formats of 32 weights with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1.

d is the scale, m the minimum, qs the low four bits (weights 0..15 in the low nibbles,
16..31 in the high ones), qh the fifth bit of weight i in bit i.
Source: ggml, `ggml-common.h`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .fit import divide, fit_line, fit_ray, peak, rounded, settle
from .format import (
    Array,
    Floats,
    Int8Form,
    fields,
    pack_fields,
    pack_planes,
    planes,
    quantised,
)

# weight = d * (q - 8); 4.5 bits per weight
Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
# weight = d * q + m; 5 bits per weight
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
# weight = d * (q - 16); 5.5 bits per weight
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
# weight = d * q + m; 6 bits per weight
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
# weight = d * q; 8.5 bits per weight
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
# weight = d * q; s = d * sum(q) serves dot products; 9 bits per weight
Q8_1 = np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])


def _has(dtype: np.dtype[Any], field: str) -> bool:
    return field in (dtype.names or ())


def _codes(blocks: Array) -> Array:
    """Unsigned 4- or 5-bit codes uint8 [N, 32]."""
    low = planes(blocks["qs"], 4).reshape(-1, 32)
    if _has(blocks.dtype, "qh"):
        low |= fields(blocks["qh"], 1).reshape(-1, 32) << 4
    return low


def _column(field: Array) -> Floats:
    return field.astype(np.float32)[:, None]


def _centred(blocks: Array) -> Int8Form:
    middle = 16 if _has(blocks.dtype, "qh") else 8
    return _codes(blocks).view(np.int8) - np.int8(middle), _column(blocks["d"]), None


def _affine(blocks: Array) -> Int8Form:
    return _codes(blocks).view(np.int8), _column(blocks["d"]), _column(blocks["m"])


def _bytes(blocks: Array) -> Int8Form:
    return blocks["qs"], _column(blocks["d"]), None


def _store(blocks: Array, codes: Floats) -> Array:
    """Pack unsigned codes [N, 32] into the fields qs and qh."""
    q = codes.astype(np.uint8)
    blocks["qs"] = pack_planes((q & 15).reshape(-1, 2, 16), 4)
    if _has(blocks.dtype, "qh"):
        blocks["qh"] = pack_fields((q >> 4).reshape(-1, 4, 8), 1)
    return blocks


def _quantize_centred(dtype: np.dtype[Any], x: Floats, w: Floats | None) -> Array:
    middle = 16 if _has(dtype, "qh") else 8
    snap = rounded(-middle, middle - 1)
    blocks = np.zeros(len(x), dtype)
    blocks["d"] = fit_ray(x, -middle, w)
    return _store(blocks, snap(divide(x, _column(blocks["d"]))) + middle)


def _quantize_affine(dtype: np.dtype[Any], x: Floats, w: Floats | None) -> Array:
    high = 31 if _has(dtype, "qh") else 15
    blocks = np.zeros(len(x), dtype)
    blocks["d"], blocks["m"] = fit_line(x, high, False, w, 13 if w is None else 37)
    if w is not None:
        blocks["d"], blocks["m"] = settle(x, high, w, blocks["d"], blocks["m"])
    codes = divide(x - _column(blocks["m"]), _column(blocks["d"]))
    return _store(blocks, np.rint(codes).clip(0, high))


def _quantize_bytes(dtype: np.dtype[Any], x: Floats, w: Floats | None) -> Array:
    blocks = np.zeros(len(x), dtype)
    blocks["d"] = np.abs(peak(x))[:, 0] / 127
    blocks["qs"] = np.rint(divide(x, _column(blocks["d"]))).clip(-127, 127)
    if _has(dtype, "s"):
        blocks["s"] = blocks["d"] * blocks["qs"].sum(-1, dtype=np.float32)
    return blocks


FORMATS = (
    quantised("Q4_0", Q4_0, _centred, 32, 32, partial(_quantize_centred, Q4_0)),
    quantised("Q4_1", Q4_1, _affine, 32, 32, partial(_quantize_affine, Q4_1)),
    quantised("Q5_0", Q5_0, _centred, 32, 32, partial(_quantize_centred, Q5_0)),
    quantised("Q5_1", Q5_1, _affine, 32, 32, partial(_quantize_affine, Q5_1)),
    quantised("Q8_0", Q8_0, _bytes, 32, 32, partial(_quantize_bytes, Q8_0)),
    quantised("Q8_1", Q8_1, _bytes, 32, 32, partial(_quantize_bytes, Q8_1)),
)
