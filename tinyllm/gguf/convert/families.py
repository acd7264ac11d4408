"""THE TABLE of conversions: Hugging Face's classes of models, and how their folders become GGUF files.

A family says the architecture's name in GGUF, how tensors are called, what is done to some of them, and
which keys it has beside the common ones. Tensors and keys are those that llama.cpp's converter writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .changes import (
    Change,
    above_table,
    falcon_qkv,
    gates,
    increased,
    minus_exp,
    neox_qkv,
    permuted,
    squeezed,
    transposed,
    ups,
)
from .keys import (
    Keys,
    bert_keys,
    common,
    falcon_keys,
    gemma2_keys,
    gemma3_keys,
    gemma4_keys,
    gemma_embedding_keys,
    gemma_keys,
    gpt2_keys,
    granite_keys,
    granitemoe_keys,
    llama_keys,
    mamba_keys,
    mistral_keys,
    modern_bert_keys,
    neox_keys,
    nomic_keys,
    olmo2_keys,
    olmoe_keys,
    phi3_keys,
    pooled_keys,
    qwen_moe_keys,
    smollm3_keys,
)

Names = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """How one kind of model is converted.

    Attributes
    ----------
    arch : str
        ``general.architecture``.
    names : Mapping
        Hugging Face's name of a module below its prefix -> ours; ``layers.N.`` is left out. ``*`` stands for
        an expert's number. An empty name: the tensor is not needed.
    changes : Mapping
        Our name -> what is done to the tensor's values.
    keys : callable
        Configuration -> the keys below ``<arch>.``.
    prefixes : tuple of str
        What names in the files begin with; the first that fits is taken off.
    prefer : tuple of str
        Pre-tokenizers that these models are known with.
    defaults : Mapping
        Values that the class has where ``config.json`` is silent.
    surround : tuple of str
        Roles of tokens that stand around a text, unless the tokenizer's files say otherwise.
    skip : tuple of str
        Beginnings of names, prefix included, that are left out.
    vocabulary : str
        ``tokenizer.ggml.model``, where the tokenizer's files do not tell it.
    uneven : tuple of str
        Our names of tensors that some layers may lack.
    act : str
        The activation, as ``config.json`` calls it; empty: the keys see to it.
    ignored : tuple of str
        Names in ``config.json`` that the class does not read, whatever their values.
    """

    arch: str
    names: Names
    keys: Keys = common
    changes: Mapping[str, Change] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("model.language_model.", "language_model.model.", "model.")
    prefer: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    surround: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    vocabulary: str = ""
    uneven: tuple[str, ...] = ()
    act: str = "silu"
    ignored: tuple[str, ...] = ()


HEAD = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "language_model.lm_head": "output"}  # fmt: skip
ATTENTION = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.rotary_emb.inv_freq": "",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
FFN = {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
LLAMA = HEAD | ATTENTION | NORMS | FFN
MIXTRAL = LLAMA | {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
}
QWEN_MOE = LLAMA | {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.experts.*.{x}_proj": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
    "mlp.experts.gate_up_proj": "ffn_gate_exps+ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
OWN_POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ROTATED = {"attn_q": permuted("num_attention_heads"), "attn_k": permuted("num_key_value_heads")}
GEMMA_NORMS = dict.fromkeys(
    ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm",
     "output_norm"),
    increased,
)  # fmt: skip
GATE_AND_UP = {"ffn_gate_exps": gates, "ffn_up_exps": ups}
GELU_TANH, TIED = "gelu_pytorch_tanh", {"tie_word_embeddings": True}
GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "vocab_size": 262208,
}
BERT = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "embeddings.position_ids": "",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "pooler.dense": "",
}
NOMIC = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "emb_ln": "token_embd_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm1": "attn_output_norm",
    "norm2": "layer_output_norm",
    "mlp.fc11": "ffn_up",
    "mlp.fc12": "ffn_gate",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
MODERN_BERT = {
    "embeddings.tok_embeddings": "token_embd",
    "embeddings.norm": "token_embd_norm",
    "attn_norm": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.Wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.Wi": "ffn_up",
    "mlp.Wo": "ffn_down",
    "final_norm": "output_norm",
}
GPT2 = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "attn.bias": "",
    "attn.masked_bias": "",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
NEOX = {
    "embed_in": "token_embd",
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "attention.bias": "",
    "attention.masked_bias": "",
    "attention.rotary_emb.inv_freq": "",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "final_layer_norm": "output_norm",
    "embed_out": "output",
    "lm_head": "output",
}
FALCON = {
    "word_embeddings": "token_embd",
    "input_layernorm": "attn_norm",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
MAMBA = {
    "embeddings": "token_embd",
    "embedding": "token_embd",
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj": "ssm_out",
    "norm_f": "output_norm",
    "lm_head": "output",
}

LLAMA_FAMILY = Family("llama", MIXTRAL | {
    "mlp.gate": "ffn_gate_inp",  # Mixtral, as newer versions of transformers name it
    "mlp.experts.gate_up_proj": "ffn_gate_exps+ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}, llama_keys, ROTATED | GATE_AND_UP, prefer=("llama-bpe", "smollm", "tekken"),
    ignored=("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))  # fmt: skip
MISTRAL = replace(LLAMA_FAMILY, keys=mistral_keys, ignored=())
GEMMA3 = Family(
    "gemma3", LLAMA | OWN_POST_NORMS, gemma3_keys,
    GEMMA_NORMS,
    defaults=GEMMA_DEFAULTS, act=GELU_TANH,
)  # fmt: skip
GEMMA4 = Family(
    "gemma4",
    LLAMA | OWN_POST_NORMS | {
        "embed_tokens_per_layer": "per_layer_token_embd",
        "per_layer_model_projection": "per_layer_model_proj",
        "per_layer_projection_norm": "per_layer_proj_norm",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
        "layer_scalar": "layer_output_scale",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps",
        "experts.down_proj": "ffn_down_exps",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
    },
    gemma4_keys, defaults=GEMMA_DEFAULTS, surround=("bos",),
    vocabulary="gemma4", act=GELU_TANH,
    uneven=("attn_k.weight", "attn_k_norm.weight", "attn_v.weight"),  # they read those of earlier layers
)  # fmt: skip
QWEN2 = Family("qwen2", LLAMA, pooled_keys, prefer=("qwen2",))
BERT_FAMILY = Family(
    "bert", BERT, bert_keys, prefixes=("bert.", "model."), act="gelu",
    skip=("cls.predictions", "cls.seq_relationship"),
)  # fmt: skip
MODERN = Family(
    "modern-bert", MODERN_BERT, modern_bert_keys, prefer=("modern-bert",), act="",
    surround=("bos", "eos", "sep"),
    skip=("head.", "decoder."), uneven=("attn_norm.weight",),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA_FAMILY,
    "LlamaModel": LLAMA_FAMILY,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MISTRAL,
    "SmolLM3ForCausalLM": Family("smollm3", LLAMA, smollm3_keys, ROTATED, prefer=("llama-bpe",)),
    "ArceeForCausalLM": Family("arcee", LLAMA, llama_keys, ROTATED, prefer=("llama-bpe",), act="relu2"),
    "GraniteForCausalLM": Family("granite", LLAMA, granite_keys, ROTATED, prefer=("refact",)),
    "GraniteMoeForCausalLM": Family(
        "granitemoe",
        LLAMA | {
            "block_sparse_moe.router.layer": "ffn_gate_inp",
            "block_sparse_moe.input_linear": "ffn_gate_exps+ffn_up_exps",
            "block_sparse_moe.output_linear": "ffn_down_exps",
        },
        granitemoe_keys, ROTATED | GATE_AND_UP, prefer=("refact",),
    ),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2Model": QWEN2,
    "Qwen2MoeForCausalLM": Family(
        "qwen2moe", QWEN_MOE, partial(qwen_moe_keys, normed=False), GATE_AND_UP, prefer=("qwen2",)
    ),
    "Qwen3ForCausalLM": Family("qwen3", LLAMA, pooled_keys, prefer=("qwen2",)),
    "Qwen3Model": Family("qwen3", LLAMA, pooled_keys, prefer=("qwen2",)),
    "Qwen3MoeForCausalLM": Family(
        "qwen3moe", QWEN_MOE, partial(qwen_moe_keys, normed=True), GATE_AND_UP, prefer=("qwen2",)
    ),
    "GemmaForCausalLM": Family("gemma", LLAMA, gemma_keys, GEMMA_NORMS, defaults=TIED, act=GELU_TANH),
    "Gemma2ForCausalLM": Family(
        "gemma2", LLAMA | OWN_POST_NORMS, gemma2_keys, GEMMA_NORMS, defaults=TIED, act=GELU_TANH
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4ForConditionalGeneration": GEMMA4,
    "Gemma3TextModel": Family(
        "gemma-embedding", LLAMA | OWN_POST_NORMS, gemma_embedding_keys,
        GEMMA_NORMS, defaults=GEMMA_DEFAULTS, act=GELU_TANH,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        LLAMA | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        phi3_keys, prefer=("gpt-4o",),
    ),
    "OlmoForCausalLM": Family(
        "olmo", LLAMA, lambda c: common(c) | {"attention.layer_norm_epsilon": 1e-5}, ROTATED, prefer=("olmo",),
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        LLAMA | {"post_attention_layernorm": "post_attention_norm",
                 "post_feedforward_layernorm": "post_ffw_norm"},
        olmo2_keys, prefer=("dbrx", "smaug-bpe", "olmo"),
    ),
    "OlmoeForCausalLM": Family("olmoe", QWEN_MOE, olmoe_keys, GATE_AND_UP, prefer=("olmo",)),
    "GPT2LMHeadModel": Family(
        "gpt2", GPT2, gpt2_keys,
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transposed),
        prefixes=("transformer.",), prefer=("gpt-2",), act=GELU_TANH,
    ),
    "GPTNeoXForCausalLM": Family(
        "gptneox", NEOX, neox_keys, {"attn_qkv": neox_qkv}, prefixes=("gpt_neox.",), prefer=("olmo",),
        act="gelu",
    ),
    "FalconForCausalLM": Family(
        "falcon", FALCON, falcon_keys, {"attn_qkv": falcon_qkv},
        prefixes=("transformer.",), prefer=("falcon", "falcon3"), act="gelu",
    ),
    "MambaForCausalLM": Family(
        "mamba", MAMBA, mamba_keys, {"ssm_a": minus_exp, "ssm_conv1d": squeezed},
        prefixes=("backbone.",), prefer=("olmo",),
    ),
    "BertModel": BERT_FAMILY,
    "BertForMaskedLM": BERT_FAMILY,
    "RobertaModel": Family(
        "bert", BERT, bert_keys, {"position_embd": above_table}, prefixes=("roberta.",),
        prefer=("roberta-bpe",), act="gelu",
    ),
    "XLMRobertaModel": Family(
        "bert", BERT, bert_keys, {"position_embd": above_table}, prefixes=("roberta.",), act="gelu",
    ),
    "NomicBertModel": Family("nomic-bert", NOMIC, nomic_keys, prefixes=("bert.",), skip=("cls.",), act=""),
    "ModernBertModel": MODERN,
    "ModernBertForMaskedLM": MODERN,
}  # fmt: skip
FAMILIES["Olmo3ForCausalLM"] = FAMILIES["Olmo2ForCausalLM"]
FAMILIES["FalconMambaForCausalLM"] = FAMILIES["MambaForCausalLM"]
FAMILIES["MambaLMHeadModel"] = FAMILIES["MambaForCausalLM"]
# parts of a model that are not its text
NOT_TEXT = (
    "vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.",
    "vision_model.", "model.vision_model.", "visual.", "model.visual.", "audio_tower.", "model.audio_tower.",
    "model.embed_vision.", "model.embed_audio.",
)  # fmt: skip
