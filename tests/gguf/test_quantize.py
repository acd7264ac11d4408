"""Whole files in other types: the same choices as llama.cpp's, and errors as small."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import ArgumentError, NumericError
from tinyllm.gguf.mixtures import MIXTURES, plan
from tinyllm.gguf.quantize import quantize

STORED = json.loads((Path(__file__).parent.parent / "data" / "mixtures.json").read_text())
# a choice of our own: more bits for the small output projections beside eight experts
BETTER = ("experts", "Q3_K_L")
CASES = [(m, x) for m in STORED for x in STORED[m]["types"] if (m, x) != BETTER]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def expand(patterns: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """``blk.*.x`` -> a name for each layer, with its own value if there is one for each."""
    out = {}
    for pattern, value in patterns.items():
        for i in range(n_layer if "*" in pattern else 1):
            several = isinstance(value, list) and isinstance(value[0], str)
            out[pattern.replace("*", str(i))] = value[i] if several else value
    return out


@pytest.mark.parametrize(("model", "mixture"), CASES)
def test_plan_chooses_what_llama_cpp_chooses(model: str, mixture: str) -> None:
    metadata, n_layer = STORED[model]["metadata"], STORED[model]["metadata"]["llama.block_count"]
    shapes = expand(STORED[model]["shapes"], n_layer)
    expected = expand(STORED[model]["types"][mixture], n_layer)
    assert plan(metadata, {n: tuple(s) for n, s in shapes.items()}, mixture) == expected


def described(file: gguf.GGUFFile) -> dict[str, tuple[str, str]]:
    """Metadata as types and texts, which are easy to compare."""
    return {
        k: (type(v).__name__, str(list(v) if np.ndim(v) else v))
        for k, v in file.exact_metadata.items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model file of random F32 weights: metadata of three kinds, a norm, four matrices."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (64, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_v.weight": (128, 256),
        "blk.0.ffn_down.weight": (256, 512),
        "blk.0.ffn_up.weight": (512, 256),
    }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": np.uint32(8),
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": ["a", "b", "ü"],
    }
    path = tmp_path / "source.gguf"
    gguf.write(
        path, metadata, {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    )
    return path


def test_quantize_writes_the_planned_types(source: Path, tmp_path: Path) -> None:
    calls = []
    report = lambda *call: calls.append(call)  # noqa: E731
    types = quantize(source, tmp_path / "q.gguf", "Q4_K_M", report=report)
    assert types == {
        "token_embd.weight": "Q6_K",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_v.weight": "Q6_K",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.0.ffn_up.weight": "Q4_K",
    }
    assert calls == [(name, "F32", kind) for name, kind in types.items()]
    with gguf.open(source) as old, gguf.open(tmp_path / "q.gguf") as new:
        assert {name: t.type for name, t in new.tensors.items()} == types
        assert [t.shape for t in new.tensors.values()] == [t.shape for t in old.tensors.values()]
        assert new.metadata["general.file_type"] == 15
        assert new.metadata["general.quantization_version"] == 2
        assert described(new).items() >= described(old).items()
        norm = "blk.0.attn_norm.weight"
        assert np.array_equal(new.tensors[norm].raw, old.tensors[norm].raw)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_mixture_keeps_the_weights(source: Path, tmp_path: Path, mixture: str) -> None:
    types = quantize(source, tmp_path / "q.gguf", mixture, n_threads=2)
    worst = {"Q1_0": 0.62, "TQ1_0": 0.45, "TQ2_0": 0.45, "Q2_0": 0.37, "Q2_K": 0.28, "Q3_K": 0.15}
    worst |= {"IQ1_S": 0.46, "IQ1_M": 0.43, "IQ2_XXS": 0.34, "IQ2_XS": 0.3, "IQ2_S": 0.25}
    worst |= {"IQ3_XXS": 0.185, "IQ3_S": 0.14}
    with gguf.open(source) as old, gguf.open(tmp_path / "q.gguf") as new:
        for name, kind in types.items():
            weights = old.tensors[name].dequantize()
            error = rms(new.tensors[name].dequantize() - weights) / rms(weights)
            assert error < worst.get(kind, 0.12), (name, kind)


@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q3_K_M"])
def test_a_real_mixture_is_as_good_as_llama_cpps(data: Path, tmp_path: Path, mixture: str) -> None:
    folder = data / "golden" / "quants"
    types = quantize(folder / "llama-h256-F16.gguf", tmp_path / "q.gguf", mixture)
    with (
        gguf.open(folder / "llama-h256-F16.gguf") as exact,
        gguf.open(folder / f"llama-h256-{mixture}.gguf") as theirs,
        gguf.open(tmp_path / "q.gguf") as ours,
    ):
        assert types == {name: t.type for name, t in theirs.tensors.items()}
        for name, tensor in exact.tensors.items():
            weights = tensor.dequantize()
            allowed = rms(theirs.tensors[name].dequantize() - weights)
            assert rms(ours.tensors[name].dequantize() - weights) <= 1.02 * allowed, name


def test_narrow_rows_get_types_with_smaller_blocks(stories260k: Path, tmp_path: Path) -> None:
    types = quantize(stories260k, tmp_path / "q.gguf", "Q4_K_M")
    with gguf.open(tmp_path / "q.gguf") as new:
        assert {t.type for t in new.tensors.values()} == set(types.values())
        assert new.tensors["blk.0.attn_q.weight"].type == "Q5_0"


def test_a_quantised_source_needs_consent(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    quantize(source, once, "Q8_0")
    with pytest.raises(ArgumentError, match=r"token_embd\.weight is Q8_0 already"):
        quantize(once, twice, "Q4_0")
    assert not twice.exists()
    assert quantize(once, twice, "Q4_0", requantize=True)["blk.0.ffn_up.weight"] == "Q4_0"
    quantize(once, twice, "F16")  # loses nothing more
    with gguf.open(twice) as file:
        assert "general.quantization_version" in file.metadata


def test_a_split_source_becomes_one_file(tmp_path: Path) -> None:
    for i in range(2):
        head = {"general.architecture": "llama"} if i == 0 else {}
        split = {"split.no": np.uint16(i), "split.count": np.uint16(2)}
        weights = np.full((2, 256), i + 1, np.float32)
        gguf.write(
            tmp_path / f"m-0000{i + 1}-of-00002.gguf",
            {**head, **split, "split.tensors.count": np.int32(2)},
            {f"blk.{i}.ffn_up.weight": weights},
        )
    quantize(tmp_path / "m-00001-of-00002.gguf", tmp_path / "q.gguf", "Q8_0")
    with gguf.open(tmp_path / "q.gguf") as file:
        assert not any(key.startswith("split.") for key in file.metadata)
        means = [float(t.dequantize().mean()) for t in file.tensors.values()]
    np.testing.assert_allclose(means, [1, 2], rtol=1e-3)


def test_a_bad_weight_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    weights = np.ones((3, 256), np.float32)
    weights[2, 7] = np.nan
    gguf.write(tmp_path / "bad.gguf", {}, {"blk.0.ffn_up.weight": weights})
    with pytest.raises(NumericError, match=r"blk\.0\.ffn_up\.weight.*Q8_0"):
        quantize(tmp_path / "bad.gguf", tmp_path / "q.gguf", "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def test_the_source_is_not_overwritten(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(ArgumentError, match="is the source itself"):
        quantize(source, source, "Q8_0")
    assert source.read_bytes() == before


def test_no_part_of_a_split_source_is_overwritten(source: Path, tmp_path: Path) -> None:
    parts = [Path(p) for p in _in_parts(source, tmp_path / "m.gguf", 1 << 16)]
    before = [p.read_bytes() for p in parts]
    assert len(parts) > 2
    for how in (
        {"dst": parts[2]},
        {"dst": tmp_path / "m.gguf", "mixture": "F32", "part_bytes": 1 << 16},  # equal names
    ):
        with pytest.raises(ArgumentError, match="is the source itself; give another name"):
            quantize(parts[0], **how)
    assert [p.read_bytes() for p in parts] == before


def _in_parts(source: Path, to: Path, size: int) -> list[str]:
    with gguf.open(source) as file:
        return gguf.write(to, file.exact_metadata, file.tensors, part_bytes=size)


def test_an_unknown_mixture_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no mixture 'Q4_K'; there are .*Q4_K_M"):
        quantize(source, tmp_path / "q.gguf", "Q4_K")


def test_a_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    n_rows, n = 16384, 2048
    piece = np.ones(1 << 22, np.float32).view(np.uint8)
    tensor = gguf.Deferred("F32", (n_rows, n), lambda: [piece] * (n_rows * n // (1 << 22)))
    gguf.write(tmp_path / "f32.gguf", {"general.architecture": "llama"}, {"output.weight": tensor})
    whole = (tmp_path / "f32.gguf").stat().st_size
    tracemalloc.start()
    try:
        quantize(tmp_path / "f32.gguf", tmp_path / "q8.gguf", "Q8_0", n_threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "q8.gguf").stat().st_size > whole / 4
    assert peak < whole / 4
