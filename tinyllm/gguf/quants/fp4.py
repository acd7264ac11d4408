"""Four-bit floats (1 sign, 2 exponent, 1 mantissa bit) with small float scales: MXFP4, NVFP4.

The codes are twice the float4 value, so that 0.5 becomes 1, and the scales are halved.
Source: OCP Microscaling Formats v1.0 (MXFP4); NVIDIA NVFP4, as laid out by ggml.
"""

from __future__ import annotations

import numpy as np

from .fit import divide, grouped, nearest_index
from .format import Array, Floats, Int8Form, look_up, nibble_pairs, pack_planes, quantised

# weight = 2^(e - 128) * E2M1[q]; 4.25 bits per weight
MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", 16)])
# weight = E4M3(d[g]) / 2 * E2M1[q], groups of 16; 4.5 bits per weight
NVFP4 = np.dtype([("d", "u1", 4), ("qs", "u1", (4, 8))])

_MAGNITUDES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = nibble_pairs(E2M1)


def _halved_e4m3() -> Floats:
    """Half of all 256 unsigned E4M3 values; bit 7 is ignored, 0x7F (NaN elsewhere) is 0."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    subnormal = mantissa * 2.0**-10
    normal = (8 + mantissa) * 2.0 ** (exponent - 11)
    values = np.where(exponent == 0, subnormal, normal)
    values[0x7F] = 0
    return values.astype(np.float32)


_POWERS = np.ldexp(np.float32(1), np.arange(256) - 128)  # the first two are subnormal
_E4M3 = _halved_e4m3()


def _mxfp4(blocks: Array) -> Int8Form:
    codes = look_up(_PAIRS, blocks["qs"]).reshape(-1, 32)
    return codes, _POWERS[blocks["e"]][:, None], None


def _nvfp4(blocks: Array) -> Int8Form:
    codes = look_up(_PAIRS, blocks["qs"]).reshape(-1, 64)
    return codes, _E4M3[blocks["d"]], None


def _nearest_e2m1(x: Floats) -> Array:
    """Index 0..15 of the nearest code."""
    index: Array = nearest_index(_MAGNITUDES, np.abs(x)) + 8 * (x < 0)
    return index


def _better(x: Floats, tries: list[Array], scales: Floats, w: Floats | None) -> tuple[Array, Array]:
    """Choose, for each group x [..., n], the index into scales whose codes lose less.

    tries: two of int [...] -> that index [...], and the codes' indices [..., n].
    """
    units = [scales[index][..., None] for index in tries]
    codes = [_nearest_e2m1(divide(x, unit)) for unit in units]
    losses = [np.square(E2M1[q] * u - x) for q, u in zip(codes, units, strict=True)]
    first, second = ((loss if w is None else loss * w).sum(-1) for loss in losses)
    swap = second < first
    return np.where(swap, *tries[::-1]), np.where(swap[..., None], *codes[::-1])


def _quantize_mxfp4(x: Floats, w: Floats | None = None) -> Array:
    """The exponent that keeps the largest value below 8, or the next: the one that loses less."""
    top = np.frexp(np.abs(x).max(-1))[1]
    tries = [(top + 124 + k).clip(0, 254) for k in (0, 1)]
    e, codes = _better(x, tries, _POWERS, w)
    blocks = np.zeros(len(x), MXFP4)
    blocks["e"] = e
    blocks["qs"] = pack_planes(codes.reshape(-1, 2, 16), 4)
    return blocks


def _quantize_nvfp4(x: Floats, w: Floats | None = None) -> Array:
    """Map the largest of 16 values to code 12, or to 8, whose neighbours are nearer: the better."""
    groups = x.reshape(-1, 4, 16)
    top = np.abs(groups).max(-1)
    finite = _E4M3[:0x7F]
    if top.max(initial=0) > 12 * finite[-1]:
        raise FloatingPointError("beyond the largest E4M3 scale")
    tries = [nearest_index(finite, top / code) for code in (12, 8)]
    d, codes = _better(groups, tries, _E4M3, grouped(w, 4))
    blocks = np.zeros(len(x), NVFP4)
    blocks["d"] = d
    blocks["qs"] = pack_planes(codes.reshape(-1, 4, 2, 8), 4)
    return blocks


FORMATS = (
    quantised("MXFP4", MXFP4, _mxfp4, 32, 32, _quantize_mxfp4),
    quantised("NVFP4", NVFP4, _nvfp4, 64, 16, _quantize_nvfp4),
)
