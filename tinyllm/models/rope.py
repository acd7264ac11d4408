"""Rotary frequencies with every kind of scaling, and ALiBi slopes: what a backend then only applies.

A frequency is an angle per position. RoFormer arXiv:2104.09864; position interpolation arXiv:2306.15595;
YaRN arXiv:2309.00071; LongRoPE arXiv:2402.13753; ALiBi arXiv:2108.12409.
"""

from __future__ import annotations

import math

import numpy as np

from .config import Config, RopeScaling


def frequencies(
    dim: int, base: float, scaling: RopeScaling, factors: np.ndarray | None = None
) -> np.ndarray:
    """Radians per position of each of the dim / 2 pairs -> float32 [dim / 2].

    ``factors`` [dim / 2] divide the frequencies (Llama 3's and LongRoPE's tables in the file).
    """
    freqs = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if factors is not None:
        freqs = freqs / factors.astype(np.float64)
    if scaling.type == "linear":
        freqs = freqs / scaling.factor
    elif scaling.type == "yarn":
        keep = yarn_ramp(dim, base, scaling)
        freqs = freqs * keep + freqs / scaling.factor * (1 - keep)
    return freqs.astype(np.float32)


def yarn_ramp(dim: int, base: float, s: RopeScaling) -> np.ndarray:
    """1 for pairs that turn often within the trained length (kept), 0 for slow ones (interpolated)."""

    def pair(turns: float) -> float:
        return dim * math.log(s.n_ctx_original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(pair(s.beta_fast)))
    high = min(dim - 1.0, math.ceil(pair(s.beta_slow)))
    ramp = (np.arange(dim // 2) - low) / max(0.001, high - low)
    return np.asarray(1 - np.clip(ramp, 0, 1))


def magnitude(scaling: RopeScaling) -> float:
    """The factor of cos and sin. DeepSeek's log multiplier moves YaRN's share of it to the scores."""
    if scaling.type == "yarn" and not scaling.log_multiplier:
        return scaling.attn_factor * (1 + 0.1 * math.log(scaling.factor))
    return scaling.attn_factor


def attention_scale(c: Config) -> float:
    """The factor of q . k, with DeepSeek's YaRN correction."""
    s = c.rope_scaling
    if s.type == "yarn" and s.log_multiplier:
        return c.attn_scale * (1 + s.log_multiplier * math.log(s.factor)) ** 2
    return c.attn_scale


FARTHEST = 128  # from here on all distances are alike, in all of T5's models


def buckets(n: int, both_ways: bool) -> np.ndarray:
    """The bucket, of n, of each distance j - i from -M to M -> int [2 M + 1]. arXiv:1910.10683.

    Half of them are for positions behind i where rows look ``both_ways``; else all are for i and before. Of
    those on one side, half are for one distance each, and the others for ranges that widen up to 128; what is
    outermost is the same for 16 distances.
    """
    distance, half = np.arange(-FARTHEST - 16, FARTHEST + 17), n // 2 if both_ways else n
    far, exact = np.abs(distance if both_ways else np.minimum(distance, 0)), half // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    wide = exact + (ratio / np.float32(math.log(FARTHEST / exact)) * (half - exact)).astype(int)
    bucket = np.where(far < exact, far, np.minimum(wide, half - 1))
    return np.asarray(bucket + half * (distance > 0) if both_ways else bucket)


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """One slope per head; counts that are no power of two interleave the next power's -> float32 [H]."""
    n = 1 << (n_head.bit_length() - 1)
    first = [2 ** (-max_bias * (h + 1) / n) for h in range(n)]
    rest = [2 ** (-max_bias / 2 * (2 * h + 1) / n) for h in range(n_head - n)]
    return np.array(first + rest, np.float32)
