"""One and two bits with a scale for every block, weights in order: Q1_0 and Q2_0.

Source: ggml, `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

import numpy as np

from .fit import divide, fit_scale, rounded
from .format import Array, Floats, Int8Form, fields, pack_fields, quantised

# weight = d if the bit is set, else -d; 1.125 bits per weight
Q1_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
# weight = d * (q - 1), q in 0..3; 2.25 bits per weight
Q2_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])


def _scale(blocks: Array) -> Floats:
    return blocks["d"].astype(np.float32)[:, None]


def _q1_0(blocks: Array) -> Int8Form:
    bits = fields(blocks["qs"], 1).reshape(-1, 128).view(np.int8)
    return bits * np.int8(2) - np.int8(1), _scale(blocks), None


def _q2_0(blocks: Array) -> Int8Form:
    codes = fields(blocks["qs"], 2).reshape(-1, 64).view(np.int8)
    return codes - np.int8(1), _scale(blocks), None


def _quantize_q1_0(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q1_0)
    size = np.abs(x)
    blocks["d"] = size.mean(-1) if w is None else (size * w).sum(-1) / w.sum(-1)
    blocks["qs"] = pack_fields((x >= 0).reshape(-1, 16, 8), 1)
    return blocks


def _quantize_q2_0(x: Floats, w: Floats | None = None) -> Array:
    snap = rounded(-1, 2)
    limits = [-1.2, -1, 1, 1.2, 1.5, 1.75, 2, 2.25]
    blocks = np.zeros(len(x), Q2_0)
    blocks["d"] = fit_scale(x, limits, snap, w)[:, 0]
    codes = snap(divide(x, _scale(blocks))) + 1
    blocks["qs"] = pack_fields(codes.reshape(-1, 16, 4), 2)
    return blocks


FORMATS = (
    quantised("Q1_0", Q1_0, _q1_0, 128, 128, _quantize_q1_0),
    quantised("Q2_0", Q2_0, _q2_0, 64, 64, _quantize_q2_0),
)
