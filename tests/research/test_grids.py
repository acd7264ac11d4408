"""Grids of patches, paths and attributions: each equals what one run at a time says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError, UnsupportedModel
from tinyllm.research import Patch

CLEAN, CORRUPTED = "Lily had a red ball and a", "Tom saw a big dog and the"


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load(device="cpu") as m:
        yield m


def one_by_one(
    m: tinyllm.Model, patches: list[Patch], ids: list[int], pair: tuple[int, int]
) -> Any:
    found = []
    for patch in patches:
        with m.patched(patch):
            last = m.logits(ids)[-1]
        found.append(float(last[pair[0]]) - float(last[pair[1]]))
    return np.array(found)


@pytest.mark.parametrize("point", ["out", "resid_pre", "attn_out", "ffn_act"])
def test_a_grid_has_the_bits_of_its_runs_one_by_one(model: tinyllm.Model, point: str) -> None:
    clean, corrupted = ([0, *range(n, n + 9)] for n in (300, 600))
    grid = model.patch_grid(clean, corrupted, (40, 41), point)
    cache = model.run_with_cache(clean)
    for layer, line in zip(grid.layers, grid.values, strict=True):
        name = f"blk.{layer}.{point}"
        if point == "resid_pre":
            name = f"blk.{layer - 1}.out" if layer else "embd"
        patches = [Patch(name, cache[name], p) for p in range(len(clean))]
        assert np.array_equal(line, one_by_one(model, patches, corrupted, (40, 41)))
    assert grid.clean == float(cache.logits[-1, 40]) - float(cache.logits[-1, 41])
    if point == "out":
        assert grid.restored[-1, -1] == pytest.approx(1)
        assert grid.restored[-1, 0] == pytest.approx(0)


@pytest.mark.parametrize("over", ["positions", "heads"])
def test_where_prompts_begin_alike_a_grid_has_the_bits_of_its_runs(
    model: tinyllm.Model, over: Any
) -> None:
    clean, corrupted = ([0, 300, 301, n, 302, n, 303] for n in (400, 500))
    point, places = "attn_heads", [1, 2] if over == "heads" else [1, 2, 3, 6]
    grid = model.patch_grid(clean, corrupted, (40, 41), point, over, places)
    cache = model.run_with_cache(clean, point)
    for layer, line in zip(grid.layers, grid.values, strict=True):
        name = f"blk.{layer}.{point}"
        if over == "heads":
            patches = [Patch(name, cache[name], places, h) for h in range(len(line))]
        else:
            patches = [Patch(name, cache[name], p) for p in places]
        assert np.array_equal(line, one_by_one(model, patches, corrupted, (40, 41)))


def test_a_grid_within_a_context_steers_once(model: tinyllm.Model) -> None:
    clean, corrupted = ([0, *range(n, n + 5)] for n in (300, 600))
    vector = np.linspace(-1, 1, model.config.n_embd)
    with model.steered({1: vector}):
        grid = model.patch_grid(clean, corrupted, (40, 41))
        cache = model.run_with_cache(clean, "out")
        for layer, line in zip(grid.layers, grid.values, strict=True):
            name = f"blk.{layer}.out"
            patches = [Patch(name, cache[name], p) for p in range(len(clean))]
            assert np.array_equal(line, one_by_one(model, patches, corrupted, (40, 41)))


def test_a_grid_over_heads(model: tinyllm.Model) -> None:
    clean, corrupted = ([0, *range(n, n + 9)] for n in (300, 600))
    grid = model.patch_grid(clean, corrupted, lambda x: x.max(), "attn_heads", "heads", [3, 8])
    cache = model.run_with_cache(clean)
    assert grid.values.shape == (model.config.n_layer, model.config.n_head[0])
    with model.patched("blk.1.attn_heads", cache["blk.1.attn_heads"], [3, 8], heads=2):
        assert grid.values[1, 2] == float(model.logits(corrupted)[-1].max())


@pytest.mark.parametrize("name", ["mamba", "rwkv7", "gemma2"])
def test_a_grid_of_models_that_cannot_begin_in_the_middle(name: str, data: Path) -> None:
    with tinyllm.load(data / "golden" / "models" / f"{name}.gguf") as m:
        clean, corrupted = [5, 6, 7, 8, 9], [15, 16, 17, 18, 9]
        grid = m.patch_grid(clean, corrupted, (40, 41))
        cache = m.run_with_cache(clean, "out")
        patches = [Patch("blk.1.out", cache["blk.1.out"], p) for p in range(5)]
        assert np.array_equal(grid.values[1], one_by_one(m, patches, corrupted, (40, 41)))


def test_wrong_grids_are_told(model: tinyllm.Model) -> None:
    with pytest.raises(ArgumentError, match="equally many"):
        model.patch_grid([1, 2, 3], [1, 2], (5, 6))
    with pytest.raises(ArgumentError, match="two token ids"):
        model.patch_grid([1, 2], [1, 3], (5, 10**6))
    with pytest.raises(ArgumentError, match="has no heads"):
        model.patch_grid([1, 2], [1, 3], (5, 6), "out", "heads")


def test_a_path_to_the_end_is_the_whole_effect(model: tinyllm.Model) -> None:
    """To the last residual with nothing frozen, path patching is plain patching."""
    clean, corrupted = ([0, *range(n, n + 9)] for n in (300, 600))
    last = f"blk.{model.config.n_layer - 1}.out"
    sender = Patch("blk.0.attn_heads", 0, heads=1)
    found = model.path_patch(clean, corrupted, [sender], [last])
    value = model.run_with_cache(clean, "attn_heads")["blk.0.attn_heads"]
    with model.patched("blk.0.attn_heads", value, heads=1):
        want = model.logits(corrupted)
    assert np.array_equal(found, want)
    frozen = model.path_patch(clean, corrupted, [sender], [last], ["attn_out", "ffn_out"])
    assert np.array_equal(frozen, model.logits(corrupted))  # every path passes a point that is held
    other = Patch(("attn_heads", 0), 0, heads=1)
    assert np.array_equal(model.path_patch(clean, corrupted, [other], [last]), want)


@pytest.mark.parametrize("by", ["layers", "heads", "neurons"])
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_an_attribution_sums_to_the_logit(by: Any, device: str) -> None:
    with tinyllm.load(device=device, kv_type="f32") as m:
        ids = m.prompt_ids(CLEAN)
        logits = m.logits(ids)[-1]
        found = m.attribute(ids, 40, 41, by=by)
        want = float(logits[40]) - float(logits[41])
        near = (
            1e-3 if device == "reference" else float(0.05 * logits.std())
        )  # int8 in the head's product
        assert found.total == pytest.approx(want, abs=near)
        if by == "layers":
            assert abs(found.rest) < 1e-3
        assert found.top(3)[0][2] == max(np.nan_to_num(found.values).ravel(), key=abs)


@pytest.mark.parametrize(
    "name", ["llama-gqa-llama3rope", "gpt2", "gemma3", "gemma2", "qwen2", "granite", "olmo2"]
)
def test_all_parts_are_the_whole(name: str, data: Path) -> None:
    """Heads and neurons, with the biases, are what a layer's two halves add."""
    with tinyllm.load(data / "golden/models" / f"{name}.gguf", "reference", kv_type="f32") as m:
        ids = list(range(5, 15))
        heads, neurons = (m.attribute(ids, 40, by=by) for by in ("heads", "neurons"))
        layers = m.attribute(ids, 40)
        assert abs(layers.rest) < 1e-5 * max(1, np.abs(layers.values).max())
        scale = m.logits(ids).std()
        if name != "gpt2":  # it has biases, which no head and no neuron adds
            np.testing.assert_allclose(heads.values.sum(1), layers.values[:, 0], atol=2e-5 * scale)
            np.testing.assert_allclose(
                neurons.values.sum(1), layers.values[:, 1], atol=2e-5 * scale
            )


def test_what_does_not_add_up_is_told(data: Path) -> None:
    with tinyllm.load(data / "golden/models/gptneox.gguf", "reference") as m:
        with pytest.raises(UnsupportedModel, match="two halves"):
            m.attribute([1, 2, 3], 4)


def test_mean_ablation_puts_in_the_mean(model: tinyllm.Model) -> None:
    mean = model.means([CLEAN, CORRUPTED], "blk.1.attn_out")["blk.1.attn_out"]
    rows = [model.run_with_cache(t, "attn_out")["blk.1.attn_out"] for t in (CLEAN, CORRUPTED)]
    assert np.array_equal(mean, np.concatenate(rows).mean(0))
    with model.patched("blk.1.attn_out", mean):
        cache = model.run_with_cache(CLEAN, "attn_out")
    assert np.array_equal(cache["blk.1.attn_out"], np.tile(mean, (len(cache.ids), 1)))
