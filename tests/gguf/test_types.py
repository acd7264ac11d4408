"""The table of tensor types against ggml's facts."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllm.gguf.types import BY_ID, REMOVED, TYPES, swap_words

gguf = pytest.importorskip("gguf")
KNOWN = [t.name for t in gguf.GGMLQuantizationType]


@pytest.mark.parametrize("name", KNOWN)
def test_type_equals_the_reference_package(name):
    reference = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[reference]
    if name == "Q8_1":
        size = 36  # ggml's struct: two halves and 32 bytes; the package counts two floats
    ours = TYPES[name]
    assert (ours.id, ours.block_size, ours.type_size) == (reference.value, block, size)


def test_every_id_is_live_or_removed():
    assert sorted([*BY_ID, *REMOVED]) == list(range(43))
    assert set(TYPES) - set(KNOWN) <= {"Q2_0", "NVFP4", "Q1_0"}
    q2_0 = TYPES["Q2_0"]
    assert (q2_0.id, q2_0.block_size, q2_0.type_size) == (42, 64, 18)


@pytest.mark.parametrize("name", TYPES)
def test_words_lie_in_the_block_and_turn_back(name):
    kind = TYPES[name]
    taken = [at + i for at, width, count in kind.words for i in range(width * count)]
    assert len(set(taken)) == len(taken)
    assert all(0 <= i < kind.type_size for i in taken)
    raw = np.arange(kind.type_size * 3, dtype=np.uint8)
    turned = swap_words(kind, raw)
    assert np.array_equal(swap_words(kind, turned), raw)
    assert np.array_equal(turned, raw) == (not kind.words)
