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

from tinyllm.gguf import write  # noqa: E402

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

GOLDEN = {
    "rank-bert": Golden(
        "bert", "BertForSequenceClassification", BERT_SETTINGS, {**ENCODER, **WPM}, bert_names, BERT, "score"),
    "rank-roberta": Golden(
        "bert", "XLMRobertaForSequenceClassification",
        {**BERT_SETTINGS, "pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": N_CTX + 2},
        {**ENCODER}, bert_names, BERT, "score"),
    "rank-modern-bert": Golden(
        "modern-bert", "ModernBertForSequenceClassification",
        {"norm_eps": 5e-3, "num_labels": 1, "classifier_pooling": "mean", "local_attention": 8, "num_hidden_layers": 2,
         "global_attn_every_n_layers": 2, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 160000.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}, "cls_token_id": 2, "sep_token_id": 3},
        {**ENCODER, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2, "classifier.pooling_type": 1,
         "rope.freq_base": 160000.0, "rope.freq_base_swa": 10000.0, "rope.dimension_count": D},
        names=MODERN, kind="score"),
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
    state = {n: p for n, p in model.state_dict().items()}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    raw = {renamed(n, (*g.names, *NAMES)): p.float().numpy() for n, p in state.items()}
    if tied:
        raw.pop("output.weight", None)
    weights = g.change(raw, config)
    metadata: dict[str, Any] = {"general.architecture": g.arch, "general.name": f"{name}, random"}
    for key, value in {**USUAL, **g.keys}.items():
        if value is not None:
            metadata[key if key.startswith("tokenizer.") else f"{g.arch}.{key}"] = value
    HERE.mkdir(exist_ok=True)
    write(
        HERE / f"{name}.gguf",
        metadata,
        {n: np.ascontiguousarray(x, np.float32) for n, x in weights.items()},
    )
    np.savez_compressed(HERE / f"{name}.npz", **references(g, model))
    size = sum((HERE / f"{name}.{e}").stat().st_size for e in ("gguf", "npz"))
    print(f"{name:24} {len(weights):3} tensors {size:7} bytes")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or GOLDEN:
        make(wanted, GOLDEN[wanted])
