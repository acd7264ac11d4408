"""Formats: bytes become exactly the weights that ggml makes of them, and weights small errors."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import ArgumentError, NumericError
from tinyllm.gguf import quants
from tinyllm.gguf.quants import FORMATS

STORED = Path(__file__).resolve().parent.parent / "data" / "quants.npz"
QUANTISED = [name for name, f in FORMATS.items() if f.int8_form]
WRITABLE = [name for name, f in FORMATS.items() if f.quantize]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view("u4"), b.view("u4"))


def finite_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any half float but infinities and NaN: both zeros, subnormals and the largest included."""
    sign = rng.integers(0, 2, shape, np.uint16) << 15
    return (rng.integers(0, 0x7C00, shape, np.uint16) | sign).view(np.float16)


def random_rows(name: str, rng: np.random.Generator, n_rows: int, n_blocks: int) -> np.ndarray:
    """Rows of random bytes whose scales are finite."""
    fmt = FORMATS[name]
    raw = rng.integers(0, 256, (n_rows, n_blocks * fmt.type_size), np.uint8)
    blocks = raw.view(fmt.dtype)
    for field in fmt.dtype.names or ():
        if fmt.dtype[field].kind == "f":
            blocks[field] = finite_halves(rng, blocks.shape)
    if name == "IQ1_M":
        top = blocks["scales"][..., 3]
        blocks["scales"][..., 3] = np.where(top >> 12 & 7 == 7, top & 0xBFFF, top)
    return raw


# --- dequantize ---


@pytest.mark.parametrize("name", QUANTISED)
def test_dequantize_equals_the_stored_weights(name: str) -> None:
    with np.load(STORED) as stored:
        assert same_bits(quants.dequantize(name, stored[f"raw_{name}"]), stored[f"weights_{name}"])


NOT_IN_GGUF = ("Q8_1", "Q8_K", "Q1_0", "Q2_0")  # its decoders lack these


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n in QUANTISED if n not in NOT_IN_GGUF])
def test_dequantize_equals_gguf_on_random_blocks(name: str, seed: int) -> None:
    package = pytest.importorskip("gguf.quants")  # not the folder of this file
    raw = random_rows(name, np.random.default_rng(seed), 40, 8)
    with np.errstate(all="ignore"):
        expected = package.dequantize(raw, package.GGMLQuantizationType[name])
    assert same_bits(quants.dequantize(name, raw), expected)


GOLDEN = [*QUANTISED, "F16", "BF16"]


@pytest.mark.parametrize("name", [n for n in GOLDEN if n not in ("Q8_1", "Q8_K")])
def test_dequantize_equals_llama_cpp_on_model_files(name: str, data: Path) -> None:
    base = data / "golden" / "quants" / f"llama-h256-{name}"
    with np.load(f"{base}.npz") as golden, gguf.open(f"{base}.gguf") as file:
        expected = {k.removeprefix("deq32_"): golden[k] for k in golden if k.startswith("deq32_")}
        assert len(expected) == 2
        for tensor, rows in expected.items():
            assert file.tensors[tensor].type == name
            raw = file.tensors[tensor].raw[: len(rows)]
            assert same_bits(quants.dequantize(name, raw), rows)


def test_bf16_is_the_upper_half_of_a_float32() -> None:
    upper = np.arange(65536, dtype="<u2")
    weights = quants.dequantize("BF16", upper.view(np.uint8))
    assert np.array_equal(weights.view("u4"), upper.astype("u4") << 16)


def test_f16_decodes_every_finite_half() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    expected = np.array([float(h) for h in halves], np.float32)
    assert same_bits(quants.dequantize("F16", halves.view(np.uint8)), expected)


@pytest.mark.parametrize("name", ["F64", "F32", "I8", "I16", "I32", "I64"])
def test_plain_numbers_are_converted(name: str) -> None:
    values = np.array([[-7, 0, 1], [100, -100, 3]]).astype(FORMATS[name].dtype)
    weights = quants.dequantize(name, values.view(np.uint8))
    assert same_bits(weights, values.astype(np.float32))


def test_a_large_tensor_decodes_as_its_rows_do_in_little_memory() -> None:
    fmt = FORMATS["IQ2_S"]
    raw = random_rows("IQ2_S", np.random.default_rng(0), 1000, 13)
    tracemalloc.start()
    whole = quants.dequantize("IQ2_S", raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole.nbytes + 4e6
    for row in (0, 39, 40, 999):
        assert same_bits(whole[row], quants.dequantize("IQ2_S", raw[row]))
    assert whole.shape == (1000, 13 * fmt.block_size)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0, 4)])
def test_leading_axes_are_kept(lead: tuple[int, ...]) -> None:
    raw = np.zeros((*lead, 2 * 34), np.uint8)
    assert quants.dequantize("Q8_0", raw).shape == (*lead, 64)
    codes, scales, minima, group = quants.int8_form("Q8_0", raw)
    assert (codes.shape, scales.shape, minima, group) == ((*lead, 64), (*lead, 2), None, 32)
    assert quants.quantize("Q8_0", np.zeros((*lead, 64), np.float32)).shape == raw.shape


def test_every_other_row_of_a_tensor_decodes() -> None:
    raw = random_rows("Q6_K", np.random.default_rng(1), 6, 2)
    assert same_bits(quants.dequantize("Q6_K", raw[::2]), quants.dequantize("Q6_K", raw)[::2])


def test_infinite_scales_decode_without_a_warning() -> None:
    raw = np.full((1, 34), 1, np.uint8)
    raw[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    assert np.isinf(quants.dequantize("Q8_0", raw)).all()


# --- the table ---


def test_formats_are_the_types_of_the_file_format() -> None:
    sizes = {name: (t.block_size, t.type_size) for name, t in gguf.types.TYPES.items()}
    assert {name: (f.block_size, f.type_size) for name, f in FORMATS.items()} == sizes


def test_bits_per_weight_count_the_scales() -> None:
    assert FORMATS["Q4_K"].bits_per_weight == 4.5
    assert FORMATS["IQ1_S"].bits_per_weight == 1.5625
    assert FORMATS["BF16"].bits_per_weight == 16


# --- int8_form ---


@pytest.mark.parametrize("name", QUANTISED)
def test_int8_form_times_scales_is_dequantize(name: str) -> None:
    raw = random_rows(name, np.random.default_rng(11), 5, 6)
    codes, scales, minima, group = quants.int8_form(name, raw)
    assert codes.dtype == np.int8
    assert codes.shape[-1] == scales.shape[-1] * group
    with np.errstate(over="ignore"):
        weights = codes.astype(np.float32) * np.repeat(scales, group, axis=-1)
    if minima is not None:
        weights += np.repeat(minima, group, axis=-1)
    assert same_bits(weights, quants.dequantize(name, raw))


RANGES = {  # the integers that kernels must reckon with, beyond -8..7 and the like
    "Q8_0": (-128, 127),
    "Q5_K": (0, 31),
    "Q6_K": (-32, 31),
    "IQ1_S": (-9, 9),
    "IQ2_S": (-43, 43),
    "IQ3_XXS": (-62, 62),
    "IQ3_S": (-15, 15),
    "IQ4_XS": (-127, 113),
    "MXFP4": (-12, 12),
    "TQ1_0": (-1, 1),
    "Q2_0": (-1, 2),
}


@pytest.mark.parametrize("name", RANGES)
def test_codes_span_their_range(name: str) -> None:
    codes = quants.int8_form(name, random_rows(name, np.random.default_rng(3), 50, 8))[0]
    assert (codes.min(), codes.max()) == RANGES[name]


# --- quantize ---

# RMS error relative to the standard deviation of normal weights: at most 2 % above what the
# quantisers here reach, which is within 1 % of ggml's or better
ERRORS = {
    "F64": 1e-7,
    "F32": 1e-7,
    "F16": 2.2e-4,
    "BF16": 1.7e-3,
    "Q4_0": 0.083,
    "Q4_1": 0.0725,
    "Q5_0": 0.0412,
    "Q5_1": 0.0352,
    "Q8_0": 0.0055,
    "Q8_1": 0.0055,
    "Q2_K": 0.278,
    "Q3_K": 0.147,
    "Q4_K": 0.0738,
    "Q5_K": 0.0372,
    "Q6_K": 0.0177,
    "Q8_K": 0.0072,
    "IQ4_NL": 0.0751,
    "IQ4_XS": 0.0759,
    "TQ1_0": 0.446,
    "TQ2_0": 0.446,
    "MXFP4": 0.1138,
    "NVFP4": 0.1057,
    "Q1_0": 0.613,
    "Q2_0": 0.369,
    "IQ1_S": 0.4526,
    "IQ1_M": 0.4172,
    "IQ2_XXS": 0.3300,
    "IQ2_XS": 0.2881,
    "IQ2_S": 0.2414,
    "IQ3_XXS": 0.1789,
    "IQ3_S": 0.1305,
}


def test_every_writable_format_has_a_bound() -> None:
    assert sorted(ERRORS) == sorted(WRITABLE)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("scale", [0.02, 30.0])
def test_quantize_loses_little(name: str, scale: float) -> None:
    x = np.random.default_rng(5).normal(size=(16, 2048)).astype(np.float32) * np.float32(scale)
    back = quants.dequantize(name, quants.quantize(name, x))
    assert np.sqrt(np.square(back - x).mean()) < ERRORS[name] * scale


@pytest.mark.parametrize("name", WRITABLE)
def test_quantize_keeps_zeros(name: str) -> None:
    zeros = np.zeros((2, 256), np.float32)
    assert not quants.dequantize(name, quants.quantize(name, zeros)).any()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "F16", "BF16"])
def test_ternary_weights_are_exact(name: str) -> None:
    x = np.random.default_rng(8).integers(-1, 2, (4, 512)).astype(np.float32) * 0.375
    assert np.array_equal(quants.dequantize(name, quants.quantize(name, x)), x)


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0x7F800001], np.uint32)
    stored = quants.quantize("BF16", bits.view(np.float32)).view("<u2")
    assert stored.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0]


# --- errors ---


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"'Q9_9'.*Q4_K"):
        quants.dequantize("Q9_9", np.zeros(18, np.uint8))


@pytest.mark.parametrize("raw", [np.zeros(17, np.uint8), np.zeros(18, np.int8), np.uint8(3)])
def test_a_part_of_a_block_is_refused(raw: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="18-byte blocks"):
        quants.dequantize("Q4_0", raw)


def test_plain_numbers_have_no_codes() -> None:
    with pytest.raises(ArgumentError, match="F16 is not quantised"):
        quants.int8_form("F16", np.zeros(2, np.uint8))


@pytest.mark.parametrize("name", ["I8", "I32"])
def test_a_format_without_a_quantiser_says_which_have_one(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"cannot write {name}; .*Q4_K"):
        quants.quantize(name, np.zeros(256, np.float32))


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ArgumentError, match=r"whole 256s, not \(2, 300\)"):
        quants.quantize("Q4_K", np.zeros((2, 300), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_finite_weights_are_quantised(bad: float) -> None:
    x = np.zeros(256, np.float32)
    x[3] = bad
    with pytest.raises(NumericError, match="Q4_0"):
        quants.quantize("Q4_0", x)


@pytest.mark.parametrize(
    ("name", "value"), [("F16", 70000.0), ("Q8_0", 1e8), ("Q4_K", 1e12), ("NVFP4", 2700.0)]
)
def test_a_value_beyond_the_format_is_refused(name: str, value: float) -> None:
    with pytest.raises(NumericError, match=f"too large for {name}"):
        quants.quantize(name, np.full(256, value, np.float32))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ3_S"])
def test_knowing_the_importance_never_costs(name: str) -> None:
    """By the error that it weighs, of weights that lie on the format's grid and of others."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        free = rng.standard_normal((4, 512), dtype=np.float32)
        w = np.exp(4 * rng.standard_normal(512)).astype(np.float32)
        for x in (free, quants.dequantize(name, quants.quantize(name, free))):
            weighed, plain = (
                float(
                    (np.square(quants.dequantize(name, quants.quantize(name, x, v)) - x) * w).sum()
                )
                for v in (w, None)
            )
            assert weighed <= plain * (1 + 1e-6)


WRITTEN = """
import hashlib
import numpy as np
from tinyllm.gguf import quants

x = np.random.default_rng(1).standard_normal((16, 512), dtype=np.float32)
w = np.abs(np.random.default_rng(2).standard_normal(512, dtype=np.float32))
for name in ("Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
    for importance in (None, w):
        print(name, hashlib.sha256(quants.quantize(name, x, importance).tobytes()).hexdigest())
"""


def test_another_processor_writes_the_same_bytes(tmp_path: Path) -> None:
    """Wide registers would add up a group in another order, were the compiler free to."""
    found = []
    for more in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        env = {**os.environ, "TINYLLM_CACHE": str(tmp_path / str(len(found))), **more}
        run = subprocess.run(
            [sys.executable, "-c", WRITTEN], env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout)
    assert found[0].count("\n") == 16
    assert found[0] == found[1]
