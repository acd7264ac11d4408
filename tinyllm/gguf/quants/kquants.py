"""K-quants: blocks of 256 weights, whose 8 or 16 groups have small integer scales of their own.

The group scales (and minima) are integers times the block's half-float d (and dmin). Two to
six bits of each weight are stored in bit planes: one pair of bits of bytes 0..31 holds 32
neighbouring weights, the next pair the 32 weights after them.
Source: ggml, `ggml-common.h` (ikawrakow, llama.cpp pull request 1684).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .fit import divide, fit_line, fit_ray, fit_unit, grouped, peak
from .fit_kernels import place, run
from .format import Array, Floats, Format, Int8Form, pack_planes, planes, quantised

# weight = d * (scales[g] & 15) * q - dmin * (scales[g] >> 4), 16 groups; 2.625 bits per weight
Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
# weight = d * (scale[g] - 32) * (q - 4), hmask has the third bit of q, 16 groups of six-bit
# scales; 3.4375 bits per weight
Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
# weight = d * scale[g] * q - dmin * min[g], 8 groups of six-bit scales and minima;
# 4.5 bits per weight
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
# weight as in Q4_K, with qh as the fifth bit of q; 5.5 bits per weight
Q5_K = np.dtype(
    [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
)
# weight = d * scales[g] * (q - 32), 16 groups; 6.5625 bits per weight
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
# weight = d * q, with the sums of groups of 16 for dot products; 9.125 bits per weight
Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])


def _times(d: Array, integers: Array) -> Floats:
    """Half d [N] times integers [N, groups]; exact in float32."""
    return d.astype(np.float32)[:, None] * integers.astype(np.float32)


# --- decoding: blocks [N] -> codes int8 [N, 256], scales and minima float32 [N, groups] ---


def _q2_k(blocks: Array) -> Int8Form:
    codes = planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    low, high = np.moveaxis(planes(blocks["scales"], 4), 1, 0)
    return codes.view(np.int8), _times(blocks["d"], low), -_times(blocks["dmin"], high)


def _q3_k(blocks: Array) -> Int8Form:
    low = planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = planes(blocks["hmask"], 1).reshape(-1, 256)
    codes = (low | high << 2).view(np.int8) - np.int8(4)
    return codes, _times(blocks["d"], _scales_q3_k(blocks["scales"])), None


def _q4_k(blocks: Array) -> Int8Form:
    codes = planes(blocks["qs"].reshape(-1, 4, 32), 4).reshape(-1, 256)
    scale, minimum = _scales_q4_k(blocks["scales"])
    return codes.view(np.int8), _times(blocks["d"], scale), -_times(blocks["dmin"], minimum)


def _q5_k(blocks: Array) -> Int8Form:
    low, scales, minima = _q4_k(blocks)
    high = planes(blocks["qh"], 1).reshape(-1, 256).view(np.int8)
    return low | high << 4, scales, minima


def _q6_k(blocks: Array) -> Int8Form:
    low = planes(blocks["ql"].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = planes(blocks["qh"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    return codes, _times(blocks["d"], blocks["scales"]), None


def _q8_k(blocks: Array) -> Int8Form:
    return blocks["qs"], blocks["d"].astype(np.float32)[:, None], None


def _scales_q3_k(packed: Array) -> Array:
    """12 bytes -> 16 scales -32..31: low nibbles in bytes 0..7, upper pairs in bytes 8..11."""
    low = planes(packed[:, :8], 4).reshape(-1, 16)
    high = planes(packed[:, 8:], 2).reshape(-1, 16)
    scales: Array = (low | high << 4).view(np.int8) - np.int8(32)
    return scales


def _scales_q4_k(packed: Array) -> tuple[Array, Array]:
    """12 bytes -> 8 scales and 8 minima of six bits.

    Groups 0..3 have theirs in the low bits of bytes 0..3 and 4..7; groups 4..7 have the low
    nibbles in bytes 8..11 and the upper pairs on top of bytes 0..7.
    """
    first, rest = packed[:, :8].reshape(-1, 2, 4), planes(packed[:, 8:], 4)
    both = np.concatenate([first & 63, rest | (first >> 6) << 4], axis=-1)
    return both[:, 0], both[:, 1]


# --- encoding: float32 [N, 256] -> blocks [N] ---


Start = tuple[Floats, Floats, Floats]  # units [N, 2], scales and minima [N, groups]


def _placed(
    x: Floats, w: Floats, codes: tuple[int, int], bounds: tuple[int, int, int], starts: list[Start]
) -> tuple[Array, Array, Array, Array]:
    """Whole scales, minima and codes for x, w [N, groups, n] that fit the units of their blocks.

    -> units as halves [N, 2], s, m [N, groups], codes [N, 256]. Given the codes, better units have a closed
    form; of all that is tried from all starts, each block keeps what errs least.
    """
    best: list[Any] = []
    limits = np.array(bounds, np.float32)
    for units, scale, minimum in starts:
        d = units.astype(np.float16).astype(np.float32)
        s = np.rint(divide(scale, d[:, :1])).clip(bounds[0], bounds[1])
        m = np.rint(divide(minimum, d[:, 1:])).clip(0, bounds[2])
        for _ in range(2):  # the second begins where the first ended, with better units
            half = units.astype(np.float16)
            d, s, m = half.astype(np.float32), s.astype(np.float32), m.astype(np.float32)
            q, error, fresh = np.empty_like(x), np.empty((len(x), 1), np.float32), np.empty_like(d)
            run(place, x, w, *map(float, codes), limits, d, s, m, q, error[:, 0], fresh)
            now: list[Any] = [error, half, s.copy(), m.copy(), q.reshape(-1, 256)]
            if best:
                better = error < best[0]
                now = [np.where(better, a, b) for a, b in zip(now, best, strict=True)]
            best, units = now, fresh
    _, half, s, m, q = best
    return half, s, m, q


def _weights_to_fit(x: Floats, w: Floats | None) -> list[Floats]:
    """The weights that scales are fitted with: those given, and equal ones.

    Fitted to a few that outweigh all others, a scale may stand where rounding it costs more than it gained.
    """
    return [np.ones_like(x)] if w is None else [w, np.ones_like(x)]


def _quantize_signed(
    x: Floats, groups: int, low: int, scale_low: int, w: Floats | None
) -> tuple[Array, Array, Array]:
    """-> d [N], integer scales [N, groups], codes low..-low-1 [N, 256]."""
    x, w = grouped(x, groups), grouped(w, groups)
    starts, weights = [], _weights_to_fit(x, w)
    for each in weights:
        scale = fit_ray(x, low, each)
        units = np.zeros((len(x), 2), np.float32)
        units[:, 0] = fit_unit(scale, each.sum(-1), scale_low)
        starts.append((units, scale, np.zeros_like(scale)))
    bounds = scale_low, -scale_low - 1, 0
    half, s, _, q = _placed(x, weights[0], (low, -low - 1), bounds, starts)
    return half[:, 0], s.astype(np.int8), q.astype(np.int8)


def _quantize_affine(
    x: Floats, groups: int, high: int, scale_high: int, w: Floats | None
) -> tuple[Array, Array, Array, Array, Array]:
    """-> d, dmin [N], integer scales and minima [N, groups], codes 0..high [N, 256]."""
    x, w = grouped(x, groups), grouped(w, groups)
    starts, weights = [], _weights_to_fit(x, w)
    for each in weights:
        scale, minimum = fit_line(x, high, True, each)
        heavy = each.sum(-1)
        units = np.stack([fit_unit(v, heavy, scale_high) for v in (scale, -minimum)], -1)
        starts.append((units, scale, -minimum))
    bounds = 0, scale_high, scale_high
    half, s, m, q = _placed(x, weights[0], (0, high), bounds, starts)
    integers = s.astype(np.uint8), m.astype(np.uint8)
    return half[:, 0], half[:, 1], *integers, q.astype(np.uint8)


def _quantize_q2_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q2_K)
    blocks["d"], blocks["dmin"], scales, minima, codes = _quantize_affine(x, 16, 3, 15, w)
    blocks["scales"] = scales | minima << 4
    blocks["qs"] = pack_planes(codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return blocks


def _quantize_q3_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q3_K)
    blocks["d"], scales, codes = _quantize_signed(x, 16, -4, -32, w)
    q, s = (codes + 4).view(np.uint8), (scales + 32).view(np.uint8)
    blocks["qs"] = pack_planes((q & 3).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    blocks["hmask"] = pack_planes((q >> 2).reshape(-1, 8, 32), 1)
    low = pack_planes((s & 15).reshape(-1, 2, 8), 4)
    high = pack_planes((s >> 4).reshape(-1, 4, 4), 2)
    blocks["scales"] = np.concatenate([low, high], axis=-1)
    return blocks


def _store_scales_q4_k(scales: Array, minima: Array) -> Array:
    both = np.stack([scales, minima], axis=1)  # [N, 2, 8]
    first = (both[..., :4] | (both[..., 4:] >> 4) << 6).reshape(-1, 8)
    return np.concatenate([first, pack_planes(both[..., 4:] & 15, 4)], axis=-1)


def _quantize_q4_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q4_K)
    blocks["d"], blocks["dmin"], scales, minima, codes = _quantize_affine(x, 8, 15, 63, w)
    blocks["scales"] = _store_scales_q4_k(scales, minima)
    blocks["qs"] = pack_planes(codes.reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
    return blocks


def _quantize_q5_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q5_K)
    blocks["d"], blocks["dmin"], scales, minima, codes = _quantize_affine(x, 8, 31, 63, w)
    blocks["scales"] = _store_scales_q4_k(scales, minima)
    blocks["qs"] = pack_planes((codes & 15).reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
    blocks["qh"] = pack_planes((codes >> 4).reshape(-1, 8, 32), 1)
    return blocks


def _quantize_q6_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q6_K)
    blocks["d"], blocks["scales"], codes = _quantize_signed(x, 16, -32, -128, w)
    q = (codes + 32).view(np.uint8)
    blocks["ql"] = pack_planes((q & 15).reshape(-1, 2, 2, 64), 4).reshape(-1, 128)
    blocks["qh"] = pack_planes((q >> 4).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return blocks


def _quantize_q8_k(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), Q8_K)
    blocks["d"] = np.abs(peak(x))[:, 0] / 127
    blocks["qs"] = np.rint(divide(x, blocks["d"][:, None])).clip(-127, 127)
    blocks["bsums"] = blocks["qs"].reshape(-1, 16, 16).sum(-1)
    return blocks


FORMATS: tuple[Format, ...] = (
    quantised("Q2_K", Q2_K, _q2_k, 256, 16, _quantize_q2_k),
    quantised("Q3_K", Q3_K, _q3_k, 256, 16, _quantize_q3_k),
    quantised("Q4_K", Q4_K, _q4_k, 256, 32, _quantize_q4_k),
    quantised("Q5_K", Q5_K, _q5_k, 256, 32, _quantize_q5_k),
    quantised("Q6_K", Q6_K, _q6_k, 256, 16, _quantize_q6_k),
    quantised("Q8_K", Q8_K, _q8_k, 256, 256, _quantize_q8_k),
)
