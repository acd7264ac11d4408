"""Write tests/data/models: tiny models with random weights, and what their reference says about them.

    python tests/data/make_models.py [NAME ...]

The references are the classes of transformers, in float32 on the CPU, without a cache. Weights are drawn from a
seed per name, renamed as GGUF files name them and written with our writer. Needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tinyllm.gguf import write

HERE = Path(__file__).parent / "models"
V, E, F, H, K, D, L = 64, 32, 48, 4, 2, 8, 2
N_CTX, THETA = 256, 10000.0
Arrays = dict[str, np.ndarray]

# Names of a transformers state dict -> of a GGUF file; applied one after another.
NAMES = [
    (r"^(model|transformer|backbone)\.", ""),
    (r"^embed_tokens\.|^wte\.|^embeddings\.", "token_embd."),
    (r"^norm\.|^ln_f\.|^norm_f\.|^final_layernorm\.", "output_norm."),
    (r"^embedding_norm\.", "token_embd_norm."),
    (r"^lm_head\.", "output."),
    (r"^(layers|h)\.(\d+)\.", r"blk.\2."),
    (r"\.(input_layernorm|ln_1|operator_norm|attention_layernorm)\.", ".attn_norm."),
    (
        r"\.(post_attention_layernorm|pre_ff_layernorm|ffn_norm|feedforward_layernorm)\.",
        ".ffn_norm.",
    ),
    (r"\.(self_attn|attn)\.([qkv])_proj\.", r".attn_\2."),
    (r"\.(self_attn|attn)\.(o_proj|out_proj)\.", ".attn_output."),
    (r"\.self_attn\.(query|q)_(layernorm|norm)\.", ".attn_q_norm."),
    (r"\.self_attn\.(key|k)_(layernorm|norm)\.", ".attn_k_norm."),
    (
        r"\.(mlp|feed_forward|block_sparse_moe)\.(gate|router\.layer|gate\.wg)\.weight",
        ".ffn_gate_inp.weight",
    ),
    (
        r"\.(mlp|feed_forward)\.(gate\.e_score_correction_bias|expert_bias|gate\.moe_statics\.e_score_correction_bias)",
        ".exp_probs_b.bias",
    ),
    (r"\.mlp\.shared_(experts|mlp)\.(gate|up|down)_proj\.", r".ffn_\2_shexp."),
    (r"\.mlp\.shared_expert\.(gate|up|down)_proj\.", r".ffn_\1_shexp."),
    (r"\.mlp\.shared_expert_gate\.", ".ffn_gate_inp_shexp."),
    (r"\.(mlp|feed_forward)\.experts\.down_proj$", ".ffn_down_exps.weight"),
    (r"\.(mlp|feed_forward)\.experts\.gate_up_proj$", ".ffn_gate_up_exps.weight"),
    (r"\.(mlp|feed_forward)\.(gate|up|down)_proj\.", r".ffn_\2."),
    (r"\.feed_forward\.w1\.", ".ffn_gate."),
    (r"\.feed_forward\.w3\.", ".ffn_up."),
    (r"\.feed_forward\.w2\.", ".ffn_down."),
    (r"\.mlp\.fc_in\.", ".ffn_up."),
    (r"\.mlp\.fc_out\.", ".ffn_down."),
]


@dataclass(frozen=True)
class Golden:
    """One file: which class of transformers with which settings, and how its weights and keys are written."""

    arch: str
    model: str  # the class; its configuration's name follows
    settings: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)  # beyond the usual ones
    change: Callable[[Arrays, Any], Arrays] = lambda w, c: w
    names: tuple[tuple[str, str], ...] = ()  # tried before NAMES
    kind: str = "logits"  # or "rows", "score"


COMMON = {
    "vocab_size": V, "hidden_size": E, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "rms_norm_eps": 5e-3,
    "max_position_embeddings": N_CTX, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}  # fmt: skip
USUAL = {
    "block_count": L, "context_length": N_CTX, "embedding_length": E, "feed_forward_length": F,
    "attention.head_count": H, "attention.head_count_kv": K, "attention.key_length": D,
    "attention.value_length": D, "attention.layer_norm_rms_epsilon": 5e-3,
    "rope.dimension_count": D, "rope.freq_base": THETA, "vocab_size": V,
}  # fmt: skip


def adjacent(w: Arrays, c: Any) -> Arrays:
    """Reorder the rows of q and k so that pairs (i, i + D/2) become (2 i, 2 i + 1)."""

    def turn(x: np.ndarray) -> np.ndarray:
        heads = x.reshape(-1, 2, D // 2, *x.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(x.shape)

    return {n: turn(x) if re.search(r"attn_[qk]\.", n) else x for n, x in w.items()}


def split_experts(w: Arrays, c: Any = None) -> Arrays:
    """One matrix of gates and ups per expert becomes two."""
    out = {}
    for name, x in w.items():
        if "ffn_gate_up_exps" in name:
            gate, up = np.split(x, 2, 1)
            out[name.replace("gate_up", "gate")], out[name.replace("gate_up", "up")] = gate, up
        else:
            out[name] = x
    return out


def without_prefix(*prefixes: str) -> Callable[[Arrays, Any], Arrays]:
    return lambda w, c: {n: x for n, x in w.items() if not n.startswith(prefixes)}


def bert_names(w: Arrays, c: Any) -> Arrays:
    """BERT's own names, and position rows that begin behind the padding id."""
    first = c.pad_token_id + 1 if c.model_type.endswith("roberta") else 0
    return {n: x[first:] if n == "position_embd.weight" else x for n, x in w.items()}


BERT = (
    (r"^(bert|roberta)\.", ""),
    (r"^embeddings\.word_embeddings\.", "token_embd."),
    (r"^embeddings\.position_embeddings\.", "position_embd."),
    (r"^embeddings\.token_type_embeddings\.", "token_types."),
    (r"^embeddings\.LayerNorm\.", "token_embd_norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blk.\1."),
    (r"\.attention\.self\.(q|k|v)\w+\.", r".attn_\1."),
    (r"\.attention\.output\.dense\.", ".attn_output."),
    (r"\.attention\.output\.LayerNorm\.", ".attn_output_norm."),
    (r"\.intermediate\.dense\.", ".ffn_up."),
    (r"\.output\.dense\.", ".ffn_down."),
    (r"\.output\.LayerNorm\.", ".layer_output_norm."),
    (r"^pooler\.dense\.|^classifier\.dense\.", "cls."),
    (r"^classifier\.out_proj\.|^classifier\.(?=weight|bias)", "cls.output."),
)
MODERN = (
    (r"^model\.", ""),
    (r"^embeddings\.tok_embeddings\.", "token_embd."),
    (r"^embeddings\.norm\.", "token_embd_norm."),
    (r"^final_norm\.", "output_norm."),
    (r"^layers\.(\d+)\.", r"blk.\1."),
    (r"\.attn\.Wqkv\.", ".attn_qkv."),
    (r"\.attn\.Wo\.", ".attn_output."),
    (r"\.mlp_norm\.", ".ffn_norm."),
    (r"\.mlp\.Wi\.", ".ffn_up."),
    (r"\.mlp\.Wo\.", ".ffn_down."),
    (r"^head\.dense\.", "cls."),
    (r"^head\.norm\.", "cls.norm."),
    (r"^classifier\.", "cls.output."),
)
WORDS = "[PAD] [UNK] [CLS] [SEP] ▁what ▁is ▁a ▁cat ▁dog ▁the ▁animal ▁stone ▁? s".split()
WPM = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": WORDS + [f"[unused{i}]" for i in range(V - len(WORDS))],
    "tokenizer.ggml.token_type": np.array([3, 2, 3, 3] + [1] * (V - 4), np.int32),
    "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.seperator_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.token_type_count": 2,
}  # fmt: skip
ENCODER = {
    "attention.causal": False, "pooling_type": 4, "attention.layer_norm_epsilon": 5e-3,
    "attention.layer_norm_rms_epsilon": None, "attention.head_count_kv": H,
    "rope.dimension_count": None, "rope.freq_base": None,
}  # fmt: skip
BERT_SETTINGS = {
    "layer_norm_eps": 5e-3, "num_labels": 1, "type_vocab_size": 2, "hidden_act": "gelu",
    "max_position_embeddings": N_CTX,
}  # fmt: skip

ROOTED = (  # a mixer of its own keeps its tensors' names
    (r"\.(mamba|mixer|linear_attn)\.dt_bias$", ".ssm_dt.bias"),
    (r"\.(mamba|mixer|linear_attn)\.A_log$", ".ssm_a"),
    (r"\.(mamba|mixer)\.D$", ".ssm_d"),
    (r"\.(mamba|mixer|linear_attn)\.conv1d\.", ".ssm_conv1d."),
    (r"\.(mamba|mixer)\.in_proj\.", ".ssm_in."),
    (r"\.linear_attn\.in_proj_(ba|qkvz)\.", r".ssm_\1."),
    (r"\.(mamba|mixer|linear_attn)\.norm\.", ".ssm_norm."),
    (r"\.(mamba|mixer|linear_attn)\.out_proj\.", ".ssm_out."),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"blk.\1.attn_norm."),
    (r"\.conv\.conv\.", ".shortconv.conv."),
    (r"\.conv\.(in|out)_proj\.", r".shortconv.\1_proj."),
    (r"^(model\.)?(layers\.\d+)\.post_attention_layernorm\.", r"\2.post_attention_norm."),
)
AS_FFN_NORM = ROOTED[:-1]
GRANITE = (
    *AS_FFN_NORM,
    (r"\.block_sparse_moe\.router\.", ".ffn_gate_inp."),
    (r"\.block_sparse_moe\.experts", ".mlp.experts"),
)


def recurrent(w: Arrays, c: Any) -> Arrays:
    """Decays as they are multiplied, one value per head in a row of its own; convolutions as matrices."""
    groups = getattr(c, "mamba_n_groups", getattr(c, "n_groups", 1))
    out = {}
    for name, x in w.items():
        if name.endswith(".ssm_a"):
            x = -np.exp(x).reshape(-1, 1)
        elif name.endswith(".ssm_d"):
            x = x.reshape(-1, 1)
        elif name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
            x = x[:, 0]
        elif name.endswith("ssm_norm.weight"):
            x = x.reshape(groups, -1)
        out[name] = x
    return out


def granite_hybrid(w: Arrays, c: Any) -> Arrays:
    out = {}
    for name, x in split_experts(recurrent(w, c)).items():
        if ".shared_mlp.input_linear" in name:
            for part, half in zip(("gate", "up"), np.split(x, 2), strict=True):
                out[name.replace("shared_mlp.input_linear", f"ffn_{part}_shexp")] = half
        else:
            out[name.replace("shared_mlp.output_linear", "ffn_down_shexp")] = x
    return adjacent(out, c)


def falcon_h1(w: Arrays, c: Any) -> Arrays:
    """The multipliers of the configuration go into the weights."""
    z, n, g = c.ssm_multipliers, c.mamba_d_ssm, c.mamba_n_groups * c.mamba_d_state
    parts = np.repeat(z, [n, n, g, g, c.mamba_n_heads])[:, None] * c.ssm_in_multiplier
    scales = {
        "attn_q": c.attention_in_multiplier, "attn_k": c.attention_in_multiplier * c.key_multiplier,
        "attn_v": c.attention_in_multiplier, "attn_output": c.attention_out_multiplier,
        "ffn_gate": c.mlp_multipliers[0], "ffn_down": c.mlp_multipliers[1],
        "ssm_out": c.ssm_out_multiplier, "ssm_in": parts, "token_embd": c.embedding_multiplier,
        "output": c.lm_head_multiplier,
    }  # fmt: skip
    out = {n: x * scales.get(n.split(".")[-2], 1.0) for n, x in recurrent(w, c).items()}
    return {n.replace("ffn_norm.weight", "ffn_norm"): x for n, x in out.items()}


def qwen3next(w: Arrays, c: Any) -> Arrays:
    """Norms are written with their 1; q, k, v and z are laid out part by part instead of head by head."""
    hk, dk = c.linear_num_key_heads, c.linear_key_head_dim
    dv = c.linear_num_value_heads // hk * c.linear_value_head_dim
    out = {}
    for name, x in split_experts(w).items():
        if name.endswith("norm.weight") and "ssm_norm" not in name:
            x = x + 1
        elif name.endswith(".ssm_a"):
            x = -np.exp(x)
        elif "ssm_conv1d" in name:
            x = x[:, 0]
        elif "ffn_gate_inp_shexp" in name:
            x = x[0]
        if "ssm_qkvz" in name:
            heads = x.reshape(hk, -1, x.shape[1])
            q, k, v, z = np.split(heads, np.cumsum([dk, dk, dv]), 1)
            flat = [y.reshape(-1, x.shape[1]) for y in (q, k, v, z)]
            out[name.replace("ssm_qkvz", "attn_qkv")] = np.concatenate(flat[:3])
            out[name.replace("ssm_qkvz", "attn_gate")] = flat[3]
        else:
            out[name] = x
    return out


def apertus(w: Arrays, c: Any) -> Arrays:
    return {n: x for n, x in w.items() if ".act_fn." not in n}


def apertus_keys(state: Any) -> dict[str, Any]:
    """The activation's coefficients as they were learned; these keys have no prefix."""

    def column(name: str) -> np.ndarray:
        values = [state[f"model.layers.{i}.mlp.act_fn.{name}"].item() for i in range(L)]
        return np.array(values, np.float32)

    return {f"xielu.{n}": column(n) for n in ("alpha_p", "alpha_n", "beta", "eps")}


def gemma(w: Arrays, c: Any) -> Arrays:
    """Norms are written with their 1."""
    return {n: x + 1 if n.endswith("norm.weight") else x for n, x in w.items()}


def qwen35(w: Arrays, c: Any) -> Arrays:
    """Like qwen3next's, but value heads are reordered so that key heads repeat as a whole."""
    g, h, d = c.linear_num_key_heads, c.linear_num_value_heads, c.linear_value_head_dim

    def tiled(x: np.ndarray) -> np.ndarray:
        return x.reshape(g, h // g, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    out = {}
    for name, x in qwen3next(w, c).items():
        if name.endswith(
            ("ssm_a", "ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight", "attn_gate.weight")
        ):
            x = tiled(x)
        elif name.endswith(("attn_qkv.weight", "ssm_conv1d.weight")):
            x = np.concatenate([x[: -h * d], tiled(x[-h * d :])])
        elif name.endswith("ssm_out.weight"):
            x = tiled(x.T).T
        out[name] = x
    return out


QWEN35 = (
    *ROOTED,
    (r"\.linear_attn\.in_proj_qkv\.", ".attn_qkv."),
    (r"\.linear_attn\.in_proj_z\.", ".attn_gate."),
    (r"\.linear_attn\.in_proj_b\.", ".ssm_beta."),
    (r"\.linear_attn\.in_proj_a\.", ".ssm_alpha."),
)
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0], "mrope_interleaved": True,
    },
}  # fmt: skip
LINEAR_KEYS = {
    "rope.dimension_count": 4, "ssm.conv_kernel": 4, "ssm.state_size": 8, "ssm.group_count": 2,
    "ssm.time_step_rank": 4, "ssm.inner_size": 32, "full_attention_interval": 2,
    "rope.dimension_sections": [1, 1, 0, 0],
}  # fmt: skip
DBRX = (
    (r"^transformer\.blocks\.(\d+)\.norm_attn_norm\.norm_1\.", r"blk.\1.attn_norm."),
    (r"^transformer\.blocks\.(\d+)\.norm_attn_norm\.norm_2\.", r"blk.\1.attn_output_norm."),
    (r"^transformer\.blocks\.(\d+)\.norm_attn_norm\.attn\.Wqkv\.", r"blk.\1.attn_qkv."),
    (r"^transformer\.blocks\.(\d+)\.norm_attn_norm\.attn\.out_proj\.", r"blk.\1.attn_output."),
    (r"^transformer\.blocks\.(\d+)\.ffn\.router\.layer\.", r"blk.\1.ffn_gate_inp."),
    (r"^transformer\.blocks\.(\d+)\.ffn\.experts\.mlp\.w1$", r"blk.\1.ffn_gate_exps.weight"),
    (r"^transformer\.blocks\.(\d+)\.ffn\.experts\.mlp\.v1$", r"blk.\1.ffn_up_exps.weight"),
    (r"^transformer\.blocks\.(\d+)\.ffn\.experts\.mlp\.w2$", r"blk.\1.ffn_down_exps.weight"),
)


def dbrx(w: Arrays, c: Any) -> Arrays:
    """Experts' matrices are stacked, and the last is stored the other way round."""
    out = {}
    for name, x in w.items():
        if "_exps" in name:
            x = x.reshape(4, -1, E)
            x = x.swapaxes(1, 2) if "down" in name else x
        out[name] = x
    return out


GEMMA = (
    (r"^layers\.(\d+)\.post_attention_layernorm\.", r"blk.\1.post_attention_norm."),
    (r"^layers\.(\d+)\.pre_feedforward_layernorm\.", r"blk.\1.ffn_norm."),
    (r"^layers\.(\d+)\.post_feedforward_layernorm\.", r"blk.\1.post_ffw_norm."),
)
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}
SSM = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16, "ssm.time_step_rank": 8,
    "ssm.group_count": 1,
}  # fmt: skip
HYBRID = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_d_conv": 4,
}  # fmt: skip
NO_ATTENTION = {
    "attention.head_count": 0, "attention.head_count_kv": 0, "attention.key_length": None,
    "attention.value_length": None, "rope.dimension_count": None, "rope.freq_base": None,
    "feed_forward_length": 0,
}  # fmt: skip


GOLDEN = {
    "rank-bert": Golden(
        "bert", "BertForSequenceClassification", BERT_SETTINGS, {**ENCODER, **WPM}, bert_names, BERT, "score"),
    "rank-roberta": Golden(
        "bert", "XLMRobertaForSequenceClassification",
        {**BERT_SETTINGS, "pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": N_CTX + 2},
        {**ENCODER}, bert_names, BERT, "score"),
    "rank-modern-bert": Golden(
        "modern-bert", "ModernBertForSequenceClassification",
        {
            "norm_eps": 5e-3, "num_labels": 1, "classifier_pooling": "mean", "local_attention": 8,
            "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {
            **ENCODER, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2,
            "classifier.pooling_type": 1, "rope.freq_base": 160000.0, "rope.freq_base_swa": 10000.0,
            "rope.dimension_count": D,
        },
        names=MODERN, kind="score",
    ),
    "gptj": Golden(
        "gptj", "GPTJForCausalLM",
        {"n_embd": E, "n_layer": L, "n_head": H, "rotary_dim": 4, "n_inner": F, "n_positions": N_CTX,
         "layer_norm_epsilon": 5e-3},
        {"attention.head_count_kv": H, "rope.dimension_count": 4, "attention.layer_norm_epsilon": 5e-3,
         "attention.layer_norm_rms_epsilon": None}),
    "seed_oss": Golden("seed_oss", "SeedOssForCausalLM", {"attention_out_bias": False}, names=ROOTED),
    "arcee": Golden("arcee", "ArceeForCausalLM", {}, change=adjacent),
    "apertus": Golden("apertus", "ApertusForCausalLM", {}, change=apertus),
    "ernie4_5": Golden("ernie4_5", "Ernie4_5ForCausalLM", {}),
    "ernie4_5-moe": Golden(
        "ernie4_5-moe", "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 4,
            "num_hidden_layers": 3, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1,
         "moe_num_shared_experts": 1},
        {**EXPERTS,
            "block_count": 3, "leading_dense_block_count": 1, "interleave_moe_layer_step": 1,
         "expert_shared_count": 1, "expert_shared_feed_forward_length": 16},
        lambda w, c: {n: x[0] if "exp_probs_b" in n else x for n, x in split_experts(w).items()}),
    "hunyuan-dense": Golden("hunyuan-dense", "HunYuanDenseV1ForCausalLM", {}),
    "hunyuan-moe": Golden(
        "hunyuan-moe", "HunYuanMoEV1ForCausalLM",
        {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1, "intermediate_size": 16},
        {**EXPERTS, "feed_forward_length": 16}, split_experts),
    "dots1": Golden(
        "dots1", "Dots1ForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
         "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 1.5, "norm_topk_prob": True},
        {**EXPERTS, "leading_dense_block_count": 1, "expert_weights_scale": 1.5,
         "expert_weights_norm": True, "expert_gating_func": 2, "expert_shared_count": 1}, split_experts),
    "dbrx": Golden(
        "dbrx",
        "DbrxForCausalLM",
        {
            "d_model": E, "n_heads": H, "n_layers": L, "max_seq_len": N_CTX,
            "attn_config": {"clip_qkv": 1.0, "kv_n_heads": K, "rope_theta": THETA},
            "ffn_config": {"ffn_hidden_size": 16, "hidden_size": E, "moe_num_experts": 4, "moe_top_k": 2},
        },
        {
            **EXPERTS, "feed_forward_length": 16, "attention.clamp_kqv": 1.0,
            "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None,
        },
        dbrx,
        DBRX,
    ),
    "lfm2": Golden(
        "lfm2", "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "block_ff_dim": F, "norm_eps": 5e-3,
         "block_auto_adjust_ff_dim": False, "conv_L_cache": 3, "tie_word_embeddings": True},
        {"attention.head_count_kv": [0, K], "shortconv.l_cache": 3}, recurrent, AS_FFN_NORM),
    "lfm2moe": Golden(
        "lfm2moe", "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "num_dense_layers": 1, "norm_eps": 5e-3, "conv_L_cache": 3,
         "tie_word_embeddings": True, "norm_topk_prob": True, "use_expert_bias": True},
        {**EXPERTS, "attention.head_count_kv": [0, K], "shortconv.l_cache": 3,
         "leading_dense_block_count": 1, "expert_gating_func": 2},
        lambda w, c: split_experts(recurrent(w, c)), AS_FFN_NORM),
    "mamba2": Golden(
        "mamba2", "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "expand": 2, "conv_kernel": 4,
         "layer_norm_epsilon": 5e-3},
        {**NO_ATTENTION, **SSM}, recurrent, ROOTED),
    "granitehybrid": Golden(
        "granitehybrid", "GraniteMoeHybridForCausalLM",
        {**HYBRID, "layer_types": ["mamba", "attention", "mamba"],
            "num_hidden_layers": 3, "num_local_experts": 3,
         "num_experts_per_tok": 2, "intermediate_size": 8, "shared_intermediate_size": 16,
         "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25,
         "logits_scaling": 2.0, "position_embedding_type": None},
        {**SSM, **EXPERTS,
            "expert_count": 3, "attention.head_count_kv": [0, K, 0],
            "block_count": 3, "embedding_scale": 6.0,
         "residual_scale": 0.5, "attention.scale": 0.25, "logit_scale": 2.0, "feed_forward_length": 8,
         "rope.scaling.finetuned": False, "expert_shared_feed_forward_length": 16},
        granite_hybrid, GRANITE),
    "falcon-h1": Golden(
        "falcon-h1", "FalconH1ForCausalLM",
        {**HYBRID, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_rms_norm": False,
         "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7], "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.8,
         "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.1, "key_multiplier": 0.7,
         "mlp_multipliers": [0.9, 1.2], "embedding_multiplier": 1.5, "lm_head_multiplier": 0.5},
        {**SSM, "ssm.group_count": 2, "ssm.inner_size": 32, "ssm.time_step_rank": 4}, falcon_h1, AS_FFN_NORM),
    "qwen3next": Golden(
        "qwen3next", "Qwen3NextForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
         "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}},
        {**EXPERTS, "rope.dimension_count": 4, "ssm.conv_kernel": 4, "ssm.state_size": 8,
         "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 32,
         "full_attention_interval": 2, "expert_shared_feed_forward_length": 16}, qwen3next, ROOTED),
    "qwen35": Golden("qwen35", "Qwen3_5ForCausalLM", LINEAR, LINEAR_KEYS, qwen35, QWEN35),
    "qwen35moe": Golden(
        "qwen35moe", "Qwen3_5MoeForCausalLM",
        {**LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
        {**LINEAR_KEYS, **EXPERTS, "expert_shared_feed_forward_length": 16}, qwen35, QWEN35,
    ),
    "gemma-embedding": Golden(
        "gemma-embedding", "Gemma3TextModel",
        {"layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True,
         "sliding_window": 8, "query_pre_attn_scalar": D, "tie_word_embeddings": True,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                             "full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0, "attention.sliding_window": 8,
         "attention.sliding_window_pattern": [True, False], "pooling_type": 1}, gemma, GEMMA, "rows"),
}  # fmt: skip


def configured(g: Golden) -> tuple[Any, Any]:
    """The model of transformers with weights from a seed, and its configuration."""
    cls = getattr(transformers, g.model)
    known = {**COMMON, **g.settings}
    config = cls.config_class(**known)
    config._attn_implementation = "eager"
    seed = int(hashlib.sha256(g.arch.encode() + g.model.encode()).hexdigest()[:8], 16)
    torch.manual_seed(seed)
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw(name, p)
        for name, b in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                b.normal_(0, 0.1)
    return model, config


def draw(name: str, p: Any) -> None:
    """Weights of unit gain, norms near 1, small biases; decays stay as the class made them."""
    if name.endswith(("A_log", "dt_bias", ".beta", ".eps")):
        return
    if p.ndim >= 2:
        fan_in = p.shape[-1] if "conv" not in name else p[0].numel()
        gain = 1.0 if "embed" not in name and "wte" not in name else fan_in**0.5
        p.normal_(0, gain * (1.6 if re.search(r"[qk]_proj|query|key", name) else 1.3) / fan_in**0.5)
    elif name.endswith("bias"):
        p.normal_(0, 0.15)
    else:
        p.normal_(0, 0.2).add_(0.0 if getattr(p, "_zero_centred", False) else 1.0)


def renamed(name: str, rules: Any) -> str:
    for pattern, text in rules:
        name = re.sub(pattern, text, name)
    return name


def references(g: Golden, model: Any) -> Arrays:
    """Three sequences with what the model makes of them."""
    rng = np.random.default_rng(1)
    out: Arrays = {}
    for i, n in enumerate((24, 7)):
        ids = rng.integers(4, V, n)
        out[f"tokens_{i}"] = ids.astype(np.int32)
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids[None])}
        if g.kind == "score" and getattr(model.config, "type_vocab_size", 1) > 1:
            types = (np.arange(n) >= n // 2).astype(np.int32)
            out[f"types_{i}"] = types
            inputs["token_type_ids"] = torch.tensor(types[None].astype(np.int64))
        with torch.no_grad():
            y = model(**inputs)
        found = y.last_hidden_state if g.kind == "rows" else y.logits
        out[f"{ {'logits': 'logits', 'rows': 'emb_tok', 'score': 'score'}[g.kind] }_hf_{i}"] = (
            found[0].numpy()
        )
    return out


def make(name: str, g: Golden) -> None:
    model, config = configured(g)
    state = dict(model.state_dict())
    tied = bool(getattr(config, "tie_word_embeddings", False))
    raw = {renamed(n, (*g.names, *NAMES)): p.float().numpy() for n, p in state.items()}
    if tied:
        raw.pop("output.weight", None)
    weights = g.change(raw, config)
    learned = apertus_keys(state) if g.change is apertus else {}
    metadata: dict[str, Any] = {"general.architecture": g.arch, "general.name": f"{name}, random"}
    for key, value in {**USUAL, **g.keys, **learned}.items():
        if value is not None:
            metadata[key if key.startswith(("tokenizer.", "xielu.")) else f"{g.arch}.{key}"] = value
    HERE.mkdir(exist_ok=True)
    write(
        HERE / f"{name}.gguf",
        metadata,
        {n: np.ascontiguousarray(x, np.float32) for n, x in weights.items()},
    )
    np.savez_compressed(HERE / f"{name}.npz", **references(g, model))
    size = sum((HERE / f"{name}.{e}").stat().st_size for e in ("gguf", "npz"))
    print(f"{name:24} {len(weights):3} tensors {size:7} bytes")  # noqa: T201


if __name__ == "__main__":
    for wanted in sys.argv[1:] or GOLDEN:
        make(wanted, GOLDEN[wanted])
