"""Models of modelling.py that make_rows.py writes: their keys, and the shapes of their tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import modelling
from make_models import THETA, V

Settings = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A file that we write: the model's keys, its tensors' shapes, and what modelling.py must know."""

    arch: str
    keys: Settings
    layer: dict[str, tuple[int, ...]]  # in every layer
    facts: modelling.Facts = field(default_factory=modelling.Facts)
    some: dict[int, dict[str, tuple[int, ...]]] = field(
        default_factory=dict
    )  # in place of ``layer``
    root: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kind: str = "logits"


E, F, H, K, D, L = 32, 48, 4, 2, 8, 2
USUAL = {
    "block_count": L, "context_length": 256, "embedding_length": E, "feed_forward_length": F,
    "attention.head_count": H, "attention.head_count_kv": K, "attention.key_length": D,
    "attention.value_length": D, "attention.layer_norm_rms_epsilon": 5e-3,
    "rope.dimension_count": D, "rope.freq_base": THETA, "vocab_size": V,
}  # fmt: skip
NORMS = {"attn_norm.weight": (E,), "ffn_norm.weight": (E,)}
ATTENTION = {
    "attn_q.weight": (H * D, E), "attn_k.weight": (K * D, E), "attn_v.weight": (K * D, E),
    "attn_output.weight": (E, H * D),
}  # fmt: skip
QKV_BIASES = {"attn_q.bias": (H * D,), "attn_k.bias": (K * D,), "attn_v.bias": (K * D,)}
FUSED = {"attn_qkv.weight": ((H + 2 * K) * D, E), "attn_output.weight": (E, H * D)}
HEAD_NORMS = {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
GATED = {"ffn_gate.weight": (F, E), "ffn_up.weight": (F, E), "ffn_down.weight": (E, F)}
ROUTED = {
    "ffn_gate_inp.weight": (4, E), "ffn_gate_exps.weight": (4, 16, E), "ffn_up_exps.weight": (4, 16, E),
    "ffn_down_exps.weight": (4, E, 16),
}  # fmt: skip
SHARED = {
    "ffn_gate_shexp.weight": (16, E),
    "ffn_up_shexp.weight": (16, E),
    "ffn_down_shexp.weight": (E, 16),
}
MOE_KEYS = {
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16, "expert_shared_count": 1,
}  # fmt: skip
TOPS = {"output_norm.weight": (E,), "output.weight": (V, E)}
PLAIN_LAYER = {**NORMS, **ATTENTION, **GATED}
Facts = modelling.Facts
PLAMO2 = {
    **NORMS, "ffn_up.weight": (2 * F, E), "ffn_down.weight": (E, F), "post_attention_norm": (E,),
    "post_ffw_norm": (E,),
}  # fmt: skip
RECURRENT = {
    "attention.head_count": 0, "wkv.head_size": D, "token_shift_count": 1, "attention.key_length": None,
    "attention.value_length": None, "rope.dimension_count": None, "rope.freq_base": None,
}  # fmt: skip
LOW_RANKS = {
    "attention.decay_lora_rank": 6, "attention.iclr_lora_rank": 6,
    "attention.value_residual_mix_lora_rank": 6,
}  # fmt: skip
TIME_MIX_7 = {
    **NORMS, **GATED, **{f"time_mix_{n}0.weight": (E,) for n in "wav"},
    **{f"time_mix_{n}1.weight": (6, E) for n in "wav"}, **{f"time_mix_{n}2.weight": (E, 6) for n in "wav"},
    **{f"time_mix_{n}.weight": (E,) for n in ("k_k", "k_a", "r_k")},
    **{f"time_mix_{n}.weight": (E, E) for n in ("key", "value", "receptance", "output")},
}  # fmt: skip

WRITTEN: dict[str, Written] = {
    "deepseek": Written(
        "deepseek",
        {**MOE_KEYS, "block_count": 3, "leading_dense_block_count": 1, "expert_weights_scale": 1.5},
        {**NORMS, **ATTENTION, **ROUTED, **SHARED}, Facts(adjacent=True, renormalise=False),
        {0: PLAIN_LAYER}, TOPS),
    "bailingmoe": Written(
        "bailingmoe",
        {**MOE_KEYS, "expert_weights_scale": 1.0, "expert_weights_norm": True, "leading_dense_block_count": 0},
        {**NORMS, **ATTENTION, **ROUTED, **SHARED}, Facts(adjacent=True), root=TOPS),
    "bailingmoe2": Written(
        "bailingmoe2",
        {**MOE_KEYS, "block_count": 3, "rope.dimension_count": 4, "leading_dense_block_count": 1,
         "expert_weights_scale": 2.5, "expert_weights_norm": True, "expert_gating_func": 2,
         "expert_group_count": 2, "expert_group_used_count": 1, "nextn_predict_layers": 0,
         "expert_shared_feed_forward_length": 16},
        {**NORMS, **FUSED, **HEAD_NORMS, **ROUTED, **SHARED, "exp_probs_b.bias": (4,)}, Facts(sigmoid=True),
        {0: {**NORMS, **FUSED, **HEAD_NORMS, **GATED}}, TOPS),
    "deci": Written(
        "deci",
        {"block_count": 5, "attention.head_count": [H, H, 0, H, H], "attention.head_count_kv": [K, 0, 0, 1, K],
         "feed_forward_length": [F, 32, F, 0, 64]},
        PLAIN_LAYER, Facts(adjacent=True),
        {1: {**NORMS, "attn_output.weight": (E, E), "ffn_gate.weight": (32, E), "ffn_up.weight": (32, E),
             "ffn_down.weight": (E, 32)},
         2: {"ffn_norm.weight": (E,), **GATED},
         3: {"attn_norm.weight": (E,), **ATTENTION, "attn_k.weight": (D, E), "attn_v.weight": (D, E)},
         4: {**NORMS, **ATTENTION, "ffn_gate.weight": (64, E), "ffn_up.weight": (64, E),
             "ffn_down.weight": (E, 64)}}, TOPS),
    "smallthinker": Written(
        "smallthinker",
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16, "block_count": 4,
         "expert_gating_func": 2, "attention.sliding_window": 8},
        {**NORMS, **ATTENTION, **ROUTED},
        Facts(act="relu", sigmoid=True, rotates="windowed", windows=(0, 8, 8, 8), routed_by_input=True),
        root=TOPS),
    "grovemoe": Written(
        "grovemoe",
        {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 16,
         "expert_chunk_feed_forward_length": 8, "experts_per_group": 2, "expert_group_scale": 0.5},
        {**NORMS, **ATTENTION, **HEAD_NORMS, "ffn_gate_inp.weight": (6, E),
         "ffn_gate_exps.weight": (6, 16, E), "ffn_up_exps.weight": (6, 16, E), "ffn_down_exps.weight": (6, E, 16),
         "ffn_gate_chexps.weight": (3, 8, E), "ffn_up_chexps.weight": (3, 8, E),
         "ffn_down_chexps.weight": (3, E, 8)},
        root=TOPS),
    "plamo": Written(
        "plamo", {}, {"attn_norm.weight": (E,), **ATTENTION, **GATED}, Facts(parallel=True), root=TOPS),
    "plamo3": Written(
        "plamo3",
        {"block_count": 8, "attention.sliding_window": 8, "attention.sliding_window_pattern": 8,
         "rope.freq_base": 1e5, "rope.freq_base_swa": THETA, "vocab_size": V},
        {**NORMS, **FUSED, **HEAD_NORMS, "ffn_up.weight": (2 * F, E), "ffn_down.weight": (E, F),
         "post_attention_norm.weight": (E,), "post_ffw_norm.weight": (E,)},
        Facts(windows=(8,) * 7 + (0,)), root=TOPS),
    "plamo2": Written(
        "plamo2",
        {"block_count": 3, "attention.head_count": [0, H, 0], "attention.head_count_kv": [0, K, 0],
         "rope.dimension_count": None, "ssm.conv_kernel": 4, "ssm.inner_size": 48, "ssm.state_size": 12,
         "ssm.time_step_rank": 6, "ssm.group_count": 0},
        {**PLAMO2, "ssm_in.weight": (96, E), "ssm_conv1d.weight": (48, 4), "ssm_x.weight": (34, 48),
         "ssm_dt.weight": (6, 10), "ssm_dt.bias": (6,), "ssm_a": (6,), "ssm_d": (6,), "ssm_out.weight": (E, 48),
         "ssm_dt_norm": (10,), "ssm_b_norm": (12,), "ssm_c_norm": (12,)},
        some={1: {**PLAMO2, **FUSED, "attn_q_norm.weight": (H, D), "attn_k_norm.weight": (K, D)}},
        root={"output_norm.weight": (E,)}),
    "rwkv6qwen2": Written(
        "rwkv6qwen2",
        {**RECURRENT, "attention.head_count_kv": K, "time_mix_extra_dim": 6, "time_decay_extra_dim": 8},
        {**NORMS, **GATED, "time_mix_w1.weight": (30, E), "time_mix_w2.weight": (5, E, 6),
         "time_mix_lerp_x.weight": (E,), "time_mix_lerp_fused.weight": (5, 1, 1, E), "time_mix_decay.weight": (E,),
         "time_mix_decay_w1.weight": (8, E), "time_mix_decay_w2.weight": (E, 8), "time_mix_key.weight": (K * D, E),
         "time_mix_key.bias": (K * D,), "time_mix_value.weight": (K * D, E), "time_mix_value.bias": (K * D,),
         "time_mix_receptance.weight": (E, E), "time_mix_receptance.bias": (E,), "time_mix_gate.weight": (E, E),
         "time_mix_output.weight": (E, E)},
        root=TOPS),
    "arwkv7": Written(
        "arwkv7",
        {**RECURRENT, "attention.head_count_kv": None, **LOW_RANKS, "attention.gate_lora_rank": 10},
        {**TIME_MIX_7, "time_mix_lerp_fused.weight": (6, 1, 1, E), "time_mix_g1.weight": (10, E),
         "time_mix_g2.weight": (E, 10), "time_mix_ln.weight": (E,), "time_mix_ln.bias": (E,)}, root=TOPS),
    "arwkv7-bare": Written(
        "arwkv7",
        {**RECURRENT, "attention.head_count_kv": None, **LOW_RANKS, "attention.gate_lora_rank": 0},
        {**TIME_MIX_7, "time_mix_lerp_fused.weight": (5, 1, 1, E)}, root=TOPS),
    "maincoder": Written(
        "maincoder", {}, {**PLAIN_LAYER, **HEAD_NORMS}, Facts(adjacent=True, norms_behind_rope=True),
        root={"output_norm.weight": (E,)}),
    "nanbeige": Written(
        "nanbeige", {"num_loops": 2, "skip_loop_final_norm": False}, PLAIN_LAYER, Facts(adjacent=True), root=TOPS),
    "nanbeige-bare": Written(
        "nanbeige", {"num_loops": 3, "skip_loop_final_norm": True}, PLAIN_LAYER, Facts(adjacent=True), root=TOPS),
    "pangu-embedded": Written(
        "pangu-embedded", {}, {**PLAIN_LAYER, **QKV_BIASES, "attn_output.bias": (E,)}, root=TOPS),
    "plm": Written(
        "plm",
        {"attention.key_length": 12, "attention.value_length": 8, "attention.kv_lora_rank": 16,
         "rope.dimension_count": 4, "attention.head_count_kv": H},
        {**NORMS, "attn_q.weight": (H * 12, E), "attn_kv_a_mqa.weight": (20, E), "attn_kv_a_norm.weight": (16,),
         "attn_kv_b.weight": (H * 16, 16), "attn_output.weight": (E, H * 8), "ffn_up.weight": (F, E),
         "ffn_down.weight": (E, F)},
        Facts(adjacent=True, latent=True, act="relu2"), root={"output_norm.weight": (E,)}),
    "bitnet": Written(
        "bitnet", {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {**PLAIN_LAYER, "attn_sub_norm.weight": (E,), "ffn_sub_norm.weight": (F,)},
        root={"output_norm.weight": (E,)}),
    "grok": Written(
        "grok",
        {**MOE_KEYS, "expert_shared_count": None, "embedding_scale": 6.0, "logit_scale": 0.5,
         "attention.output_scale": 0.2, "attn_logit_softcapping": 3.0, "router_logit_softcapping": 30.0},
        {**NORMS, **ATTENTION, **GATED, **ROUTED, "attn_output_norm.weight": (E,), "post_ffw_norm.weight": (E,)},
        Facts(act="gelu_tanh", scale=0.2, softcap=3.0, embedding=6.0, logits=0.5, beside=0.5**0.5,
              post=("attn_output_norm", "post_ffw_norm")), root=TOPS),
    "grok-1": Written(
        "grok",
        {**MOE_KEYS, "expert_shared_count": None},
        {**NORMS, **ATTENTION, **ROUTED, "attn_output_norm.weight": (E,), "layer_output_norm.weight": (E,)},
        Facts(act="gelu_tanh", scale=0.08838834764831845, softcap=30.0, embedding=78.38367176906169,
              logits=0.5773502691896257, post=("attn_output_norm", "layer_output_norm")), root=TOPS),
    "llama-embed": Written(
        "llama-embed", {"attention.causal": False}, PLAIN_LAYER, Facts(adjacent=True, causal=False),
        root={"output_norm.weight": (E,)}, kind="emb_tok"),
    "neo-bert": Written(
        "neo-bert", {"attention.causal": False, "attention.head_count_kv": H, "pooling_type": 2},
        {**NORMS, "attn_qkv.weight": (3 * H * D, E), "attn_output.weight": (E, H * D),
         "ffn_up.weight": (2 * F, E), "ffn_down.weight": (E, F)},
        Facts(adjacent=True, causal=False, last_norm="enc.output_norm"),
        root={"enc.output_norm.weight": (E,)}, kind="emb_tok"),
    "jina-bert-v3": Written(
        "jina-bert-v3",
        {"attention.causal": False, "attention.head_count_kv": H, "pooling_type": 1,
         "attention.layer_norm_epsilon": 5e-3, "attention.layer_norm_rms_epsilon": None},
        {"attn_qkv.weight": (3 * H * D, E), "attn_qkv.bias": (3 * H * D,), "attn_output.weight": (E, H * D),
         "attn_output.bias": (E,), "attn_output_norm.weight": (E,), "attn_output_norm.bias": (E,),
         "ffn_up.weight": (F, E), "ffn_up.bias": (F,), "ffn_down.weight": (E, F), "ffn_down.bias": (E,),
         "layer_output_norm.weight": (E,), "layer_output_norm.bias": (E,)},
        Facts(causal=False, after=True, act="gelu"),
        root={"token_types.weight": (1, E), "token_embd_norm.weight": (E,), "token_embd_norm.bias": (E,)},
        kind="emb_tok"),
}  # fmt: skip
