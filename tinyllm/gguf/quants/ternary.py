"""Ternary weights -1, 0, 1 times one scale for 256 of them: TQ1_0 and TQ2_0.

TQ1_0 keeps five weights in a byte as the base-3 fraction t0/3 + t1/9 + ..., scaled to 256 and
rounded up: multiplying by 3 carries the next digit out of the byte.
Source: ggml, `ggml-quants.c` (compilade, "TQ1_0 and TQ2_0", 2024).
"""

from __future__ import annotations

import numpy as np

from .fit import divide, fit_scale, rounded
from .format import Array, Floats, Int8Form, pack_planes, planes, quantised

# weight = d * (digit - 1): the first 32 bytes of qs hold 160 weights in 5 planes, the other 16
# bytes 80 weights in 5 planes, and qh 16 weights in 4 planes; 1.6875 bits per weight
TQ1_0 = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
# weight = d * (q - 1); q in four planes of 32 bytes, twice; 2.0625 bits per weight
TQ2_0 = np.dtype([("qs", "u1", 64), ("d", "<f2")])

_PARTS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # first byte, last, digits in each
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _scale(blocks: Array) -> Floats:
    return blocks["d"].astype(np.float32)[:, None]


def _digits(packed: Array, count: int) -> Array:
    """Bytes [N, n] -> base-3 digits [N, count * n]; the products wrap around on purpose."""
    fraction = packed[:, None, :] * _POWERS[:count]
    return ((fraction.astype(np.uint16) * 3) >> 8).reshape(len(packed), -1)


def _tq1_0(blocks: Array) -> Int8Form:
    packed = np.concatenate([blocks["qs"], blocks["qh"]], axis=1)
    digits = [_digits(packed[:, a:b], count) for a, b, count in _PARTS]
    return np.concatenate(digits, axis=1).astype(np.int8) - np.int8(1), _scale(blocks), None


def _tq2_0(blocks: Array) -> Int8Form:
    codes = planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return codes.view(np.int8) - np.int8(1), _scale(blocks), None


def _fit(x: Floats, w: Floats | None) -> tuple[Floats, Array]:
    """Scale [N, 1] and digits 0, 1, 2 [N, 256]; weights that are ternary stay exact."""
    snap = rounded(-1, 1)
    scale = fit_scale(x, np.linspace(1, 2.4, 15), snap, w).astype(np.float16).astype(np.float32)
    return scale, (snap(divide(x, scale)) + 1).astype(np.uint8)


def _quantize_tq1_0(x: Floats, w: Floats | None = None) -> Array:
    scale, digits = _fit(x, w)
    blocks = np.zeros(len(x), TQ1_0)
    blocks["d"] = scale[:, 0]
    packed, start = [], 0
    for a, b, count in _PARTS:
        part = digits[:, start : start + count * (b - a)].reshape(-1, count, b - a)
        number = (part * np.array([81, 27, 9, 3, 1], np.uint16)[:count, None]).sum(1)
        packed.append((number * 256 + 242) // 243)
        start += count * (b - a)
    blocks["qs"], blocks["qh"] = np.hsplit(np.concatenate(packed, axis=1), [48])
    return blocks


def _quantize_tq2_0(x: Floats, w: Floats | None = None) -> Array:
    scale, digits = _fit(x, w)
    blocks = np.zeros(len(x), TQ2_0)
    blocks["d"] = scale[:, 0]
    blocks["qs"] = pack_planes(digits.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return blocks


FORMATS = (
    quantised("TQ1_0", TQ1_0, _tq1_0, 256, 256, _quantize_tq1_0),
    quantised("TQ2_0", TQ2_0, _tq2_0, 256, 256, _quantize_tq2_0),
)
