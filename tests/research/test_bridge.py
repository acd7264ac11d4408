"""TransformerLens' own tools on a GGUF file, against its own PyTorch model of the dequantised weights."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # its imports take long, and warn

CLEAN = "Lily had a red ball"
CORRUPTED = "Lily had a red cake"
TOOLS = """resid_pre resid_mid attn_out mlp_out
attn_head_out_by_pos attn_head_q_by_pos attn_head_k_by_pos attn_head_v_by_pos attn_head_pattern_by_pos
attn_head_out_all_pos attn_head_q_all_pos attn_head_k_all_pos attn_head_v_all_pos attn_head_pattern_all_pos
attn_head_pattern_dest_src_pos attn_head_all_pos_every attn_head_by_pos_every block_every""".split()
DIRECT = ["direct_path", "direct_path_all_sources"]


@pytest.fixture(scope="module")
def torch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "transformers", "transformer_lens"):
            pytest.importorskip(name)
        importlib.import_module("transformer_lens.patching")
        return importlib.import_module("torch")


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load(compute="exact", kv_type="f32") as m:
        yield m


@pytest.fixture(scope="module")
def ours(torch: Any, model: tinyllm.Model) -> Any:
    from tinyllm.research.bridge import Bridge

    return Bridge(model)


@pytest.fixture(scope="module")
def theirs(torch: Any, model: tinyllm.Model) -> Any:
    """TransformerLens' model of the dequantised weights, with the norms' weights folded as in ours."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from ioi import in_torch

    made = in_torch(torch, model)
    bridge = build_bridge_from_module(made, "LlamaForCausalLM", hf_config=made.config)
    bridge.enable_compatibility_mode(
        center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return bridge


def near(a: Any, b: Any, bound: float = 1e-3) -> bool:
    """Within a part of the second's standard deviation."""
    return bool((a - b).abs().max() <= bound * b.std())


def metric(torch: Any, logits: Any, pair: tuple[int, int]) -> Any:
    return logits[0, -1, pair[0]] - logits[0, -1, pair[1]]


def test_hooks_see_and_replace_what_is_computed(torch: Any, ours: Any, model: Any) -> None:
    logits, cache = ours.run_with_cache(CLEAN)
    plain = model.logits(model.prompt_ids(CLEAN))
    assert np.array_equal(logits[0].numpy(), plain)
    assert not any(p.fwd_hooks for p in ours._hook_registry.values())
    every = ours.run_with_hooks(CLEAN, fwd_hooks=[(lambda name: True, lambda x, hook: x)])
    assert np.array_equal(every[0].numpy(), plain)
    for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"):
        changed = ours.run_with_hooks(CLEAN, fwd_hooks=[(name, lambda x, hook: x * 0)])
        assert not torch.equal(changed, logits)
    with model.patched("blk.1.attn_heads", 0, heads=2):
        want = model.logits(model.prompt_ids(CLEAN))

    def without(z: Any, hook: Any) -> Any:
        z[:, :, 2] = 0
        return z

    with ours.hooks(fwd_hooks=[("blocks.1.attn.hook_z", without)]):
        assert np.array_equal(ours(CLEAN)[0].numpy(), want)
    assert np.array_equal(ours(CLEAN)[0].numpy(), plain)
    residual = ours(CLEAN, stop_at_layer=2)
    assert torch.equal(residual, cache["resid_post", 1])
    _, short = ours.run_with_cache(CLEAN, stop_at_layer=2)
    assert "blocks.1.hook_resid_post" in short.cache_dict
    assert "blocks.2.hook_resid_post" not in short.cache_dict


def test_several_prompts_at_once(torch: Any, ours: Any) -> None:
    texts = [CLEAN, CORRUPTED]
    logits, cache = ours.run_with_cache(texts)
    for i, text in enumerate(texts):
        alone, single = ours.run_with_cache(text)
        assert torch.equal(alone[0], logits[i])
        for name in ("pattern", "q", "resid_mid"):
            assert torch.equal(single[name, 2][0], cache[name, 2][i])
    with pytest.raises(NotImplementedError, match="one prompt at a time"):
        ours.run_with_hooks(
            texts, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.5)]
        )


def test_caches_are_those_of_torch(torch: Any, ours: Any, theirs: Any) -> None:
    tokens = ours.to_tokens(CLEAN)
    logits, cache = ours.run_with_cache(tokens)
    want, reference = theirs.run_with_cache(tokens)
    assert near(logits, want)
    for layer in range(ours.cfg.n_layers):
        for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "pattern", "z"):
            assert near(cache[name, layer], reference[name, layer]), (name, layer)


def test_the_lens_and_attribution_are_those_of_torch(torch: Any, ours: Any, theirs: Any) -> None:
    tokens = ours.to_tokens(CLEAN)
    found = []
    for bridge in (ours, theirs):
        _, cache = bridge.run_with_cache(tokens)
        lens = cache.accumulated_resid(layer=-1, apply_ln=True, pos_slice=-1) @ bridge.W_U
        heads = cache.stack_head_results(layer=-1, pos_slice=-1)
        of_heads = cache.logit_attrs(
            heads, tokens=torch.tensor([5]), incorrect_tokens=torch.tensor([6]), pos_slice=-1
        )
        parts = cache.decompose_resid(layer=-1)
        assert near(parts.sum(0), cache["resid_post", -1], 1e-4)
        found.append((lens, of_heads))
    for a, b in zip(*found, strict=True):
        assert near(a, b)


@pytest.mark.parametrize("name", TOOLS)
def test_patching_is_that_of_torch(torch: Any, ours: Any, theirs: Any, name: str) -> None:
    patching = importlib.import_module("transformer_lens.patching")
    clean, corrupted = ours.to_tokens(CLEAN), ours.to_tokens(CORRUPTED)
    pair = tuple(clean[0, [1, 3]].tolist())
    found = []
    for bridge in (ours, theirs):
        _, cache = bridge.run_with_cache(clean)
        with torch.no_grad():
            run = getattr(patching, f"get_act_patch_{name}")
            found.append(run(bridge, corrupted, cache, lambda logits: metric(torch, logits, pair)))
    assert found[0].shape == found[1].shape
    assert (found[0] - found[1]).abs().max() < 1e-5 * theirs(clean).std()
    assert found[1].std() > 1e-3 * theirs(clean).std()  # patches do something


def test_all_tools_that_patch_activations_are_met(torch: Any) -> None:
    patching = importlib.import_module("transformer_lens.patching")
    there = {n.removeprefix("get_act_patch_") for n in dir(patching) if "get_act_patch_" in n}
    assert there == {*TOOLS, *DIRECT}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_paths_are_refused_by_name(torch: Any, ours: Any, name: str) -> None:
    patching = importlib.import_module("transformer_lens.patching")
    tokens = ours.to_tokens(CLEAN)
    _, cache = ours.run_with_cache(tokens)
    source = (0, 0) if name == "direct_path" else ()
    with pytest.raises(NotImplementedError, match=r"Model\.path_patch"):
        getattr(patching, f"get_act_patch_{name}")(
            ours, tokens, cache, cache, lambda logits: logits.sum(), *source
        )
    assert not ours.cfg.use_split_qkv_input
