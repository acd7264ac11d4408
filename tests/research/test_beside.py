"""Heads, attributions and comparisons of a model with an adapter count what the adapter adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.research.cache import read
from tinyllm.research.compare import with_tensors

TEXT = "Once upon a time, there was a little girl"


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Makes adapters of the bundled model that change some tensors a good deal."""

    def make(*names: str) -> Path:
        rng = np.random.default_rng(5)
        with tinyllm.load() as m:
            arch, shapes = m.arch, {n: t.shape for n, t in m._file.tensors.items()}
        tensors = {}
        for name in names:
            n_out, n_in = shapes.get(name, shapes["token_embd.weight"])  # the head is tied
            tensors[f"{name}.lora_a"] = rng.normal(size=(3, n_in)).astype(np.float32)
            tensors[f"{name}.lora_b"] = rng.normal(size=(n_out, 3)).astype(np.float32) / n_in
        keys: dict[str, Any] = {"general.type": "adapter", "general.architecture": arch}
        keys |= {"adapter.type": "lora", "adapter.lora.alpha": np.float32(3)}
        gguf.write(tmp_path / "some.gguf", keys, tensors)
        return tmp_path / "some.gguf"

    return make


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_the_results_of_heads_are_with_the_adapter(adapter: Any, device: str) -> None:
    lora = adapter("blk.1.attn_output.weight")
    with tinyllm.load(device=device, lora=[(lora, 0.5)]) as m:
        batch = m.run_with_cache([TEXT, "The cat"], ["attn_result", "attn_out"])
        for cache in batch:
            want = cache["blk.1.attn_out"]
            near = 1e-5 if device == "reference" else 0.03 * want.std()
            assert np.abs(cache["blk.1.attn_result"].sum(1) - want).max() < near


def test_neurons_are_attributed_with_the_adapter(adapter: Any) -> None:
    lora = adapter("blk.1.ffn_down.weight")
    with tinyllm.load(device="reference", kv_type="f32", lora=lora) as m:
        neurons, layers = (m.attribute(TEXT, 5, by=by) for by in ("neurons", "layers"))
        assert np.nansum(neurons.values[1]) == pytest.approx(layers.values[1, 1], abs=1e-3)


def test_the_head_is_attributed_with_the_adapter(adapter: Any) -> None:
    with tinyllm.load(device="reference", kv_type="f32", lora=adapter("output.weight")) as m:
        want = m.logits(m.prompt_ids(TEXT))[-1, 5]
        assert m.attribute(TEXT, 5).total == pytest.approx(want, abs=1e-3)


def test_layers_with_other_tensors_keep_the_adapter(adapter: Any) -> None:
    lora = adapter("blk.1.ffn_down.weight")
    with tinyllm.load(lora=lora) as m:
        ids = m.prompt_ids(TEXT)
        for prefix in ("blk.1.", "token_embd."):
            own = {n: t for n, t in m._file.tensors.items() if n.startswith(prefix)}
            (found,) = read(with_tensors(m, own), [ids], None)
            assert np.array_equal(found, m.logits(ids))
