"""Make quants.npz: two blocks of every quantised type and the weights they mean.

    python tests/data/make_quants.py

The weights come from the `gguf` package where it knows the type; for Q8_1, Q8_K, Q1_0 and Q2_0
from the scalar loops below, which follow the structs of ggml-common.h. Bytes are random; the half
floats at the offsets of HALVES are random but finite, so that no weight is NaN.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf import quants as oracle

N_BLOCKS = 2
# type: bytes in a block, offsets of half floats
HALVES = {
    "Q4_0": (18, (0,)),
    "Q4_1": (20, (0, 2)),
    "Q5_0": (22, (0,)),
    "Q5_1": (24, (0, 2)),
    "Q8_0": (34, (0,)),
    "Q8_1": (36, (0, 2)),
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
    "Q8_K": (292, ()),
    "IQ1_S": (50, (0,)),
    "IQ1_M": (56, ()),
    "IQ2_XXS": (66, (0,)),
    "IQ2_XS": (74, (0,)),
    "IQ2_S": (82, (0,)),
    "IQ3_XXS": (98, (0,)),
    "IQ3_S": (110, (0,)),
    "IQ4_NL": (18, (0,)),
    "IQ4_XS": (136, (0,)),
    "TQ1_0": (54, (52,)),
    "TQ2_0": (66, (64,)),
    "MXFP4": (17, ()),
    "NVFP4": (36, ()),
    "Q1_0": (18, (0,)),
    "Q2_0": (18, (0,)),
}


def blocks(name: str, rng: np.random.Generator) -> np.ndarray:
    """Random blocks, uint8 [1, N_BLOCKS * bytes]."""
    size, offsets = HALVES[name]
    raw = rng.integers(0, 256, (N_BLOCKS, size), dtype=np.uint8)
    for at in offsets:
        raw[:, at : at + 2] = rng.normal(0, 0.1, N_BLOCKS).astype("<f2").view("u1").reshape(-1, 2)
    if name == "IQ1_M":  # the highest nibble of the hidden half float: exponents 2^-3 to 2^0
        raw[:, 55] = raw[:, 55] & 15 | 0x30
    if name == "MXFP4":
        raw[:, 0] = rng.integers(110, 130, N_BLOCKS)
    if name == "Q8_K":
        raw[:, :4] = rng.normal(0, 0.1, N_BLOCKS).astype("<f4").view("u1").reshape(-1, 4)
    return raw.reshape(1, -1)


def q8_1(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    return [d * q for q in struct.unpack_from("<32b", block, 4)]


def q8_k(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<f", block)
    return [d * q for q in struct.unpack_from("<256b", block, 4)]


def q1_0(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    return [d if block[2 + i // 8] >> i % 8 & 1 else -d for i in range(128)]


def q2_0(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<e", block)
    return [((block[2 + i // 4] >> 2 * (i % 4) & 3) - 1) * d for i in range(64)]


LOOPS: dict[str, Callable[[bytes], list[float]]] = {
    "Q8_1": q8_1,
    "Q8_K": q8_k,
    "Q1_0": q1_0,
    "Q2_0": q2_0,
}


def weights(name: str, raw: np.ndarray) -> np.ndarray:
    """Float32 [1, n]."""
    if name not in LOOPS:
        return oracle.dequantize(raw, GGMLQuantizationType[name])
    rows = [LOOPS[name](bytes(block)) for block in raw.reshape(N_BLOCKS, -1)]
    return np.array(rows, np.float32).reshape(1, -1)


def main() -> None:
    rng = np.random.default_rng(20)
    arrays = {}
    for name in HALVES:
        arrays[f"raw_{name}"] = raw = blocks(name, rng)
        arrays[f"weights_{name}"] = weights(name, raw)
    np.savez_compressed(Path(__file__).with_name("quants.npz"), **arrays)


if __name__ == "__main__":
    main()
