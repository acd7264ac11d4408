"""Every quantised format on the cpu: the bytes of the file, decoded to the bit, the same in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored import Stored

from tinyllm.gguf import quants
from tinyllm.kernels.cpu import formats_grid
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.cpu.formats import FORMATS

F32 = np.float32
QUANTISED = sorted(name for name, f in quants.FORMATS.items() if f.int8_form)
BACKEND = CPUBackend(2)


def random_bytes(type_name: str, rows: int, n: int) -> Stored:
    """Rows of random bytes, any code and sign; scales are of one size."""
    f, rng = quants.FORMATS[type_name], np.random.default_rng(7)
    raw = rng.integers(0, 256, (rows, n // f.block_size * f.type_size), np.uint8)
    blocks = raw.view(f.dtype)
    for field in f.dtype.names or ():
        if f.dtype[field].kind == "f":
            blocks[field] = rng.normal(0, 0.1, blocks.shape)
    if type_name == "IQ1_M":  # the highest nibble of its half float
        blocks["scales"][..., 3] &= 0xAFFF
    if type_name == "MXFP4":
        blocks["e"] = rng.integers(110, 130, blocks.shape)
    return Stored("w", type_name, (rows, n), raw)


def product(w: Any, x: np.ndarray) -> np.ndarray:
    return np.array(BACKEND.numpy(BACKEND.matmul(w, BACKEND.array(x))))


@pytest.mark.parametrize("name", QUANTISED)
def test_a_tile_has_exactly_the_bytes_of_the_file(name: str) -> None:
    ours, file_format = FORMATS[name], quants.FORMATS[name]
    places = sorted(i for start, size in ours.fields for i in range(start, start + size))
    assert places == list(range(file_format.type_size))
    assert ours.block == file_format.block_size
    assert (
        BACKEND.load(random_bytes(name, 32, 512)).nbytes == random_bytes(name, 32, 512).raw.nbytes
    )


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_are_decoded_to_the_bit(name: str) -> None:
    """Codes, scales and minima are those of ``gguf.quants``."""
    source, ids = random_bytes(name, 70, 512), np.arange(69, -1, -1, dtype=np.int32)
    got = BACKEND.numpy(BACKEND.embed(BACKEND.load(source), BACKEND.array(ids), 1.0))
    assert np.array_equal(got, quants.dequantize(name, source.raw)[::-1])


@pytest.mark.parametrize("name", QUANTISED)
def test_a_row_has_the_same_bits_in_any_batch(name: str) -> None:
    """With one token, few and many, whose kernels are also those of test_ops."""
    x = np.random.default_rng(0).standard_normal((37, 512), dtype=F32)
    w = BACKEND.load(random_bytes(name, 70, 512))
    singly = np.concatenate([product(w, row[None]) for row in x])
    assert np.isfinite(singly).all()
    for n in (3, 8, 20, 37):
        assert np.array_equal(product(w, x[:n]), singly[:n])


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("name", [n for n in QUANTISED if FORMATS[n].span == 256])
def test_sums_of_the_largest_codes_fit(name: str, byte: int) -> None:
    """All codes alike, and all activations the largest there are, of either sign."""
    f, source = quants.FORMATS[name], random_bytes(name, 16, 512)
    blocks = source.raw.view(f.dtype)
    for field in f.dtype.names or ():
        if f.dtype[field].base.kind != "f" and not field.startswith("scales"):
            blocks[field] = byte
    w, values = BACKEND.load(source), quants.dequantize(name, source.raw)
    x = np.ones((20, 512), F32) * np.resize([1, -1], (20, 1)).astype(F32)
    want = x @ values.T
    for n in (1, 3, 8, 20):
        assert np.allclose(product(w, x[:n]), want[:n], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["IQ1", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_a_codebook_is_its_table_of_nibbles(name: str) -> None:
    rows = formats_grid.codebook(name)
    table = np.array(formats_grid.table(name))
    codes = np.array(formats_grid.code_of_nibble(name))
    for j in range(rows.shape[1]):
        nibbles = table >> (8 * (j % 4) + 4 * (j // 4)) & 15
        plus, minus = codes[nibbles], codes[nibbles | 8]
        if name == "IQ1":
            assert np.array_equal(plus - 16, 8 * rows[:, j] + 1)
            assert np.array_equal(minus - 16, 8 * rows[:, j] - 1)
        else:
            assert np.array_equal(plus - 64, rows[:, j])
            assert np.array_equal(minus - 64, -rows[:, j])
    assert codes.max() < 128  # as dot products without VNNI want them


@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ3_S"])
def test_planes_of_rows_of_four_make_the_same_codes(name: str) -> None:
    """By the bits that a kernel puts together, with any in the others."""
    rows, codes = formats_grid.codebook(name), np.array(formats_grid.code_of_bits(name))
    two, third = (np.array(plane)[:, None] for plane in formats_grid.planes(name))
    j = np.arange(4)
    bits = (two >> 2 * j & 3) << 2 | (third >> j & 1) << 1
    for others in (0, 1, 16, 17):
        assert np.array_equal(codes[bits | others] - 64, rows)
        assert np.array_equal(codes[bits | others | 32] - 64, -rows)
