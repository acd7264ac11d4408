"""What config.json says becomes a key, changes nothing, or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert import IDS, MODELS, folder_of, write_safetensors

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, UnsupportedModel


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"parrots": 3}, "parrots = 3 may change what the model computes, and llama has no place"),
        ("llama", {"attention_multiplier": 0.5}, "attention_multiplier = 0.5 may change"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'; models of this kind have 'silu'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "long_factor": [2]}, "rope_parameters": None},
         "scaled by 'longrope', which llama has no tables for"),
        ("llama", {"rope_parameters": {"rope_type": "default", "parrots": 3}}, "rotation's parrots = 3"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "as a whole"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0; expected a number"),
        ("qwen2yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False,
                       "original_max_position_embeddings": 64}}, "truncate = False is none"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked", "a"]},
         "a, chunked; expected 2"),
        ("smollm3", {"no_rope_layers": [0, 1]}, r"no_rope_layers = \[0, 1\]; smollm3 has rotation in all"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True may change"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True may"),
        ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}, "'relu'; models of this kind"),
        ("olmoe", {"clip_qkv": 8}, "clip_qkv = 8 clips behind norms"),
        ("bert", {"is_decoder": True}, "is_decoder = True may change"),
        ("mamba", {"layer_norm_epsilon": 1e-5, "mixer_rms_eps": 1e-2}, "mixer_rms_eps = 0.01 beside"),
    ],
)  # fmt: skip
def test_what_changes_the_mathematics_and_has_no_key_is_refused_by_name(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    (folder / "config.json").write_text(json.dumps(MODELS[name]["config"] | change))
    with pytest.raises((ArgumentError, UnsupportedModel), match=message):
        tinyllm.convert(folder, tmp_path / "out.gguf")


PAIR = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("name", "change", "keys"),
    [
        ("mistral", {"sliding_window": 256}, {"sliding_window": None}),  # it hides nothing
        ("mistral", {"sliding_window": None}, {"sliding_window": None}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, {"sliding_window": None}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": PAIR},
         {"sliding_window": 8, "sliding_window_pattern": [False, True]}),
        ("phi3", {"sliding_window": 8}, {"sliding_window": 8, "sliding_window_pattern": [True, True]}),
        ("gemma2", {"layer_types": PAIR}, {"sliding_window_pattern": [False, True]}),
        ("gemma3", {"layer_types": PAIR}, {"sliding_window_pattern": [False, True]}),
        ("qwen2moe", {"norm_topk_prob": True}, {"expert_weights_norm": True}),
        ("qwen3moe", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
        ("olmoe", {"norm_topk_prob": True, "rms_norm_eps": 0.5},
         {"expert_weights_norm": True, "layer_norm_rms_epsilon": 0.5}),
        ("falcon7", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"freq_base": 5e5}),
        ("qwen2yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0,
                       "original_max_position_embeddings": 64}}, {"attn_factor": 2 / (1 + 0.1 * np.log(4))}),
    ],
)  # fmt: skip
def test_what_config_json_says_becomes_a_key(
    name: str, change: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    (folder / "config.json").write_text(json.dumps(MODELS[name]["config"] | change))
    tinyllm.convert(folder, tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as file:
        found = {k.rpartition(".")[2]: v for k, v in file.metadata.items()}
    for key, value in keys.items():
        assert np.all(found.get(key) == value) or found[key] == pytest.approx(value)
    with tinyllm.load(tmp_path / "out.gguf", "reference") as model:
        assert np.isfinite(model.logits(IDS)).all()


def test_few_bits_without_an_importance_matrix_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="IQ2_XXS without an importance matrix is poor"):
        tinyllm.convert(folder_of("qwen2", tmp_path), tmp_path / "out.gguf", "IQ2_XXS")


def test_another_form_of_gelu_is_told(tmp_path: Path) -> None:
    folder = folder_of("gptneox", tmp_path)
    change = {"hidden_act": "gelu_fast"}
    (folder / "config.json").write_text(json.dumps(MODELS["gptneox"]["config"] | change))
    with pytest.warns(UserWarning, match="'gelu_fast'; models of this kind have 'gelu', which is"):
        tinyllm.convert(folder, tmp_path / "out.gguf")


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    folder = folder_of("gemma2", tmp_path)
    shapes = MODELS["gemma2"]["shapes"]
    more = shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}
    write_safetensors(folder / "model.safetensors", more)
    for tied in (True, False):
        config = MODELS["gemma2"]["config"] | {"tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
        types = tinyllm.convert(folder, tmp_path / "out.gguf")
        assert ("output.weight" in types) is not tied
