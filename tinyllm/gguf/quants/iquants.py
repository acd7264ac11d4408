"""I-quants: groups of weights as entries of a codebook; IQ4 has a table of 16 uneven steps.

Weights come in runs of 8 (IQ1, IQ2) or 4 (IQ3), each a row of a codebook (`iq_tables`).
IQ2 and IQ3 rows hold magnitudes; eight signs are a byte, or seven bits of which an eighth
follows: the number of minus signs is even. IQ1 rows hold -1, 0, 1, shifted by +1/8 or -1/8:
8 * row + 1 or 8 * row - 1 keeps the codes whole. A scale for 16 or 32 weights is a small
integer times d.
Source: ggml, `ggml-common.h` and `ggml-quants.c` (ikawrakow, llama.cpp pull requests 4773 to
6302).
"""

from __future__ import annotations

import numpy as np

from .fit import divide, fit_scale, grouped, nearest_index, peak
from .format import (
    Array,
    Codes,
    Floats,
    Format,
    Int8Form,
    fields,
    look_up,
    nibble_pairs,
    pack_planes,
    quantised,
)
from .iq_tables import IQ4_STEPS, codebook

# weight = d * (2 s + 1) / 8 * sign * grid[index]: per 32 weights four indices, then in one
# word four times seven sign bits and four bits of s; 2.0625 bits per weight
IQ2_XXS = np.dtype([("d", "<f2"), ("qs", [("index", "u1", 4), ("signs", "<u4")], 8)])
# weight as in IQ2_XXS: qs has nine bits of index and seven of signs, scales s for 16 weights; 2.3125 bits
IQ2_XS = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
# weight as in IQ2_XXS: the index is qs and two bits of qh, all eight signs are stored; 2.5625 bits
IQ2_S = np.dtype(
    [("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)]
)
# weight = d * (2 s + 1) / 4 * sign * grid[qs]; signs and s as in IQ2_XXS; 3.0625 bits
IQ3_XXS = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8)])
# weight = d * (2 s + 1) * sign * grid[index]: qs and one bit of qh; 3.4375 bits
IQ3_S = np.dtype(
    [("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)]
)
# weight = d * (2 s + 1) / 8 * (8 * grid[index] +- 1): per 32 weights qh has three upper index
# bits for each of four runs, three bits of s, and the minus on top; 1.5625 bits
IQ1_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
# weight as in IQ1_S: a nibble of qh has three index bits and the minus of one run; a word of scales
# has three bits of s for 16 weights, four times, and above them a nibble of the half float d; 1.75 bits
IQ1_M = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
# weight = d * steps[q]; 4.5 bits
IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
# weight = d * (s - 32) * steps[q], six bits of s for 32 weights; 4.25 bits
IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])


_QUARTER, _EIGHTH = np.float32(0.25), np.float32(0.125)


def _d(blocks: Array) -> Floats:
    return blocks["d"].astype(np.float32)[:, None]


def _odd(s: Array) -> Floats:
    """Four-bit s -> 2 s + 1."""
    return (2 * s + 1).astype(np.float32)


# for each byte of sign bits, -1 where the sign is minus: int8 [256, 8]
_MINUS = -fields(np.arange(256, dtype=np.uint8), 1).view(np.int8)


def _rows(table: Codes, index: Array) -> Codes:
    """Gather rows of 4 or 8 bytes as one integer each, which is twice as fast: -> [N, 256]."""
    words = table.view(f"u{table.shape[1]}")[:, 0]
    return np.take(words, index).view(np.int8).reshape(len(index), 256)


def _even_signs(seven: Array) -> Array:
    """Complete seven sign bits to a byte with an even number of ones."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    signs: Array = seven | (parity & 1) << 7
    return signs.astype(np.uint8)


def _signed_rows(name: str, index: Array, minus: Array) -> Codes:
    """Rows of the codebook with the signs of eight values in each byte of minus [N, 32]."""
    mask = _rows(_MINUS, minus.reshape(-1, 32))
    magnitudes = _rows(codebook(name), index.reshape(len(mask), -1))
    signed: Codes = (magnitudes ^ mask) - mask  # x ^ -1 is -x - 1
    return signed


def _iq2_xxs(blocks: Array) -> Int8Form:
    words = blocks["qs"]["signs"]
    minus = _even_signs(fields(words, 7, 4))
    codes = _signed_rows("IQ2_XXS", blocks["qs"]["index"], minus)
    return codes, _d(blocks) * _EIGHTH * _odd(words >> 28), None


def _iq2_xs(blocks: Array) -> Int8Form:
    codes = _signed_rows("IQ2_XS", blocks["qs"] & 511, _even_signs(blocks["qs"] >> 9))
    return codes, _d(blocks) * _EIGHTH * _odd(fields(blocks["scales"], 4).reshape(-1, 16)), None


def _iq2_s(blocks: Array) -> Int8Form:
    index = blocks["qs"] | fields(blocks["qh"], 2).reshape(-1, 32).astype(np.uint16) << 8
    codes = _signed_rows("IQ2_S", index, blocks["signs"])
    return codes, _d(blocks) * _EIGHTH * _odd(fields(blocks["scales"], 4).reshape(-1, 16)), None


def _iq3_xxs(blocks: Array) -> Int8Form:
    minus = _even_signs(fields(blocks["signs"], 7, 4))
    codes = _signed_rows("IQ3_XXS", blocks["qs"], minus)
    return codes, _d(blocks) * _QUARTER * _odd(blocks["signs"] >> 28), None


def _iq3_s(blocks: Array) -> Int8Form:
    index = blocks["qs"] | fields(blocks["qh"], 1).reshape(-1, 64).astype(np.uint16) << 8
    codes = _signed_rows("IQ3_S", index, blocks["signs"])
    return codes, _d(blocks) * _odd(fields(blocks["scales"], 4).reshape(-1, 8)), None


def _shifted_rows(index: Array, minus: Array) -> Codes:
    """Rows of the IQ1 codebook as 8 * value + 1, or - 1; index [N, 32], minus [N, 32]."""
    shift = np.where(minus, np.int8(-1), np.int8(1))
    codes: Codes = _rows(codebook("IQ1"), index) * np.int8(8) + np.repeat(shift, 8, axis=-1)
    return codes


def _iq1_s(blocks: Array) -> Int8Form:
    qh = blocks["qh"]
    index = blocks["qs"] | fields(qh, 3, 4).reshape(-1, 32) << 8
    codes = _shifted_rows(index, np.repeat(qh >> 15, 4, axis=-1))
    return codes, _d(blocks) * _EIGHTH * _odd(qh >> 12 & 7), None


def _iq1_m(blocks: Array) -> Int8Form:
    nibbles = fields(blocks["qh"], 4).reshape(-1, 32)
    index = blocks["qs"] | (nibbles & 7).astype(np.uint16) << 8
    codes = _shifted_rows(index, nibbles >> 3)
    parts = (blocks["scales"] >> 12) << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(parts, axis=-1).view(np.float16).astype(np.float32)[:, None]
    return codes, d * _EIGHTH * _odd(fields(blocks["scales"], 3, 4).reshape(-1, 16)), None


_IQ4_PAIRS = nibble_pairs(IQ4_STEPS)


def _iq4_nl(blocks: Array) -> Int8Form:
    return look_up(_IQ4_PAIRS, blocks["qs"]).reshape(-1, 32), _d(blocks), None


def _iq4_xs(blocks: Array) -> Int8Form:
    codes = look_up(_IQ4_PAIRS, blocks["qs"].reshape(-1, 8, 16)).reshape(-1, 256)
    low = fields(blocks["scales_l"], 4).reshape(-1, 8)
    high = fields(blocks["scales_h"], 2)
    scales = (low | high << 4).astype(np.float32) - 32
    return codes, _d(blocks) * scales, None


_LIMITS = (-200, -165, -145, -136, -130, -127, -123, -118, -112, -104, 104, 112, 120, 140)
_STEPS = IQ4_STEPS.astype(np.float32)


def _snap(x: Floats) -> Floats:
    return _STEPS[nearest_index(_STEPS, x)]


def _quantize_iq4_nl(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ4_NL)
    blocks["d"] = fit_scale(x, _LIMITS, _snap, w)[:, 0]
    codes = nearest_index(_STEPS, divide(x, _d(blocks)))
    blocks["qs"] = pack_planes(codes.reshape(-1, 2, 16), 4)
    return blocks


def _quantize_iq4_xs(x: Floats, w: Floats | None = None) -> Array:
    groups = x.reshape(-1, 8, 32)
    scale = fit_scale(groups, _LIMITS, _snap, grouped(w, 8))[..., 0]
    blocks = np.zeros(len(x), IQ4_XS)
    blocks["d"] = peak(scale)[:, 0] / -32
    s = np.rint(divide(scale, _d(blocks))).clip(-32, 31)
    codes = nearest_index(_STEPS, divide(groups, (_d(blocks) * s)[..., None]))
    blocks["qs"] = pack_planes(codes.reshape(-1, 8, 2, 16), 4).reshape(-1, 128)
    stored = (s + 32).astype(np.uint16)
    blocks["scales_l"] = pack_planes((stored & 15).reshape(-1, 4, 2).swapaxes(1, 2), 4)
    high = (stored >> 4) << np.arange(0, 16, 2, dtype=np.uint16)
    blocks["scales_h"] = np.bitwise_or.reduce(high, axis=-1)
    return blocks


FORMATS: tuple[Format, ...] = (
    quantised("IQ1_S", IQ1_S, _iq1_s, 256, 32),
    quantised("IQ1_M", IQ1_M, _iq1_m, 256, 16),
    quantised("IQ2_XXS", IQ2_XXS, _iq2_xxs, 256, 32),
    quantised("IQ2_XS", IQ2_XS, _iq2_xs, 256, 16),
    quantised("IQ2_S", IQ2_S, _iq2_s, 256, 16),
    quantised("IQ3_XXS", IQ3_XXS, _iq3_xxs, 256, 32),
    quantised("IQ3_S", IQ3_S, _iq3_s, 256, 32),
    quantised("IQ4_NL", IQ4_NL, _iq4_nl, 32, 32, _quantize_iq4_nl),
    quantised("IQ4_XS", IQ4_XS, _iq4_xs, 256, 32, _quantize_iq4_xs),
)
