"""From the names of ``config.json`` to the keys of GGUF, family by family."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import ArgumentError, UnsupportedModel
from .changes import falcon_heads
from .settings import Settings

Config = Settings
Found = dict[str, Any]
Keys = Callable[[Config], Found]
MEAN, CLS, LAST = 1, 2, 3
POOLING = {"mean": MEAN, "cls": CLS, "lasttoken": LAST}
GATING = {"softmax": 1, "sigmoid": 2}

COMMON: tuple[tuple[str, type, tuple[str, ...]], ...] = (  # the first of these names that is there
    ("context_length", int, ("max_position_embeddings", "n_ctx", "n_positions", "max_length",
                             "max_sequence_length", "model_max_length")),
    ("embedding_length", int, ("hidden_size", "n_embd", "dim")),
    ("feed_forward_length", int, ("intermediate_size", "n_inner", "hidden_dim")),
    ("attention.head_count", int, ("num_attention_heads", "n_head", "n_heads")),
    ("attention.head_count_kv", int, ("num_key_value_heads", "n_kv_heads")),
    ("attention.layer_norm_rms_epsilon", float, ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", float, ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    ("expert_count", int, ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", int, ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("expert_group_count", int, ("n_group",)),
    ("expert_group_used_count", int, ("topk_group",)),
    ("attention.key_length", int, ("head_dim",)),
    ("attention.value_length", int, ("head_dim",)),
)  # fmt: skip


def first(c: Mapping[str, Any], *names: str) -> Any:
    """The value of the first name that has one."""
    values = [c.get(n) for n in names]  # all of them are read
    return next((v for v in values if v is not None), None)


def needed(c: Mapping[str, Any], *names: str) -> Any:
    """The value of the first name that has one; ArgumentError if none has."""
    value = first(c, *names)
    if value is None:
        raise ArgumentError(f"config.json lacks {' and '.join(names)}")
    return value


def n_layer(c: Config) -> int:
    return int(needed(c, "n_layers", "num_hidden_layers", "n_layer", "num_layers"))


def common(c: Config) -> Found:
    """What nearly all families have."""
    found: Found = {"block_count": n_layer(c)}
    for key, kind, names in COMMON:
        value = first(c, *names)
        if value is not None:
            found[key] = kind(value)
    if c.get("clip_qkv") is not None:
        found["attention.clamp_kqv"] = float(c["clip_qkv"])
    if c.get("is_causal") is False:
        found["attention.causal"] = False
    score = first(c, "score_function", "scoring_func", "score_func")
    if score is not None:
        if score not in GATING:
            raise ArgumentError(f"experts are scored by {score!r:.40}; we know softmax and sigmoid")
        found["expert_gating_func"] = GATING[score]
    return found | rotation(c)


def rope(c: Config) -> Found:
    """The rotation's parameters, those of layers that see everything, whatever the form of the file."""
    given = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    given = dict(given.get("full_attention") or given)
    for name, others in (
        ("rope_theta", ("global_rope_theta", "rope_theta", "rotary_emb_base")),
        ("rope_type", ("type",)),
        ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct", "rope_pct")),
        ("original_max_position_embeddings", ("original_max_position_embeddings",)),
    ):
        inside, outside = first(given, name, *others), first(c, *others)
        given[name] = outside if inside is None else inside
    return {k: v for k, v in given.items() if v is not None}


def local_theta(c: Config) -> float | None:
    """The base of the rotation of layers with a window, where it is another."""
    given = (c.get("rope_parameters") or {}).get("sliding_attention") or {}
    value = first(given, "rope_theta") or first(c, "local_rope_theta", "rope_local_base_freq")
    if (kind := given.get("rope_type") or "default") != "default":
        raise UnsupportedModel(
            f"config.json: the rotation of layers with a window is scaled by {kind!r:.40}; files have no "
            "scale for it"
        )
    return None if value is None else float(value)


def rotation(c: Config) -> Found:
    """The keys of rotary embedding."""
    given = rope(c)
    found: Found = {}
    kind = str(given.get("rope_type", "default")).lower()
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(needed(given, "factor"))
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(
            needed(given, "original_max_position_embeddings")
        )
        for key, names in (
            ("yarn_ext_factor", ("extrapolation_factor",)),
            ("yarn_beta_fast", ("beta_fast",)),
            ("yarn_beta_slow", ("beta_slow",)),
        ):
            if (value := first(given, *names)) is not None:
                found[f"rope.scaling.{key}"] = float(value)
        if (more := yarn_growth(given)) is not None:
            found["rope.scaling.attn_factor"] = more
    elif kind in ("su", "longrope"):
        found["rope.scaling.type"] = "longrope"
    elif kind not in ("default", "none", "linear", "llama3", "proportional"):
        raise ArgumentError(
            f"the rotation is scaled by {kind!r:.40}; we know linear, yarn, longrope, llama3 and proportional"
        )
    if given.get("rope_theta") is not None:
        found["rope.freq_base"] = float(given["rope_theta"])
    if (local := local_theta(c)) is not None:
        found["rope.freq_base_swa"] = float(local)
    return found


def yarn_growth(given: Mapping[str, Any]) -> float | None:
    """By how much more cos and sin grow than YaRN's usual 1 + ln(factor) / 10; None: as usual."""

    def growth(share: float) -> float:
        return 1 + 0.1 * share * math.log(float(given["factor"]))

    wanted, own, all_dim = (
        first(given, *names)
        for names in (("attention_factor", "attn_factor"), ("mscale",), ("mscale_all_dim",))
    )
    if wanted is None and own and all_dim:
        wanted = growth(float(own)) / growth(float(all_dim))
    if wanted is None or math.isclose(wanted, growth(1), rel_tol=1e-6):
        return None
    return float(wanted) / growth(1)


def pooling(c: Config) -> Found:
    """How rows become one vector, as sentence-transformers' files beside the model say."""
    how = c.get("pooling")  # put there by the reader of the folder
    if not how:
        return {}
    for name, value in (("mean_tokens", MEAN), ("cls_token", CLS), ("lasttoken", LAST)):
        if how.get(f"pooling_mode_{name}"):
            return {"pooling_type": value}
    if how.get("pooling_mode") in POOLING:
        return {"pooling_type": POOLING[how["pooling_mode"]]}
    raise ArgumentError("the pooling is none that we know: mean, cls or the last token")


def windows(c: Config, *, otherwise: Callable[[int], bool]) -> np.ndarray[Any, Any]:
    """Which layers have a window."""
    kinds = c.get("layer_types") or [
        "sliding_attention" if otherwise(i) else "full_attention" for i in range(n_layer(c))
    ]
    odd = sorted(set(map(str, kinds)) - {"sliding_attention", "full_attention"})
    if odd or len(kinds) != n_layer(c):
        raise UnsupportedModel(
            f"config.json: layer_types has {len(kinds)} layers{' of ' * bool(odd)}{', '.join(odd):.60}; "
            f"expected {n_layer(c)} of sliding_attention and full_attention"
        )
    return np.array([kind == "sliding_attention" for kind in kinds])


def head_size(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def unusual_windows(c: Config, every: int) -> Found:
    """Which layers have a window, where it is not all but the last of each ``every``, as readers know."""
    n = int(first(c, "sliding_window_pattern", "_sliding_window_pattern") or every)
    found = windows(c, otherwise=lambda i: (i + 1) % n != 0)
    usual = (np.arange(len(found)) + 1) % every != 0
    return {} if (found == usual).all() else {"attention.sliding_window_pattern": found}


def given_windows(c: Config, *, always: bool) -> Found:
    """The window that hides something within the context, and the layers that have it.

    ``always``: it is used unless ``use_sliding_window`` says otherwise.
    """
    size, begin = c.get("sliding_window"), int(c.get("max_window_layers") or 0)
    used, seen = c.get("use_sliding_window", always), windows(c, otherwise=lambda i: i >= begin)
    if not size or not used or size >= needed(c, "max_position_embeddings") or not seen.any():
        return {}
    return {"attention.sliding_window": int(size), "attention.sliding_window_pattern": seen}


def shares(c: Config, usual: bool) -> Found:
    """Whether the weights of the experts chosen sum to 1, where it is not as readers know."""
    value = bool(c.get("norm_topk_prob", False))
    return {} if value == usual else {"expert_weights_norm": value}


# ---- families


def llama_keys(c: Config) -> Found:
    return common(c) | {"vocab_size": needed(c, "vocab_size"), "rope.dimension_count": head_size(c)}


def pooled_keys(c: Config) -> Found:
    return common(c) | pooling(c) | given_windows(c, always=False)


def mistral_keys(c: Config) -> Found:
    return llama_keys(c) | given_windows(c, always=True)


def smollm3_keys(c: Config) -> Found:
    """Every fourth layer does not rotate, as readers know."""
    n, found = n_layer(c), c.get("no_rope_layers")
    every = int(c.get("no_rope_layer_interval") or 4)
    usual, found = ([int((i + 1) % k != 0) for i in range(n)] for k in (4, every)), found
    fourth, own = usual
    if (found or own) != fourth:
        raise UnsupportedModel(
            f"config.json: no_rope_layers = {found or own!r:.60}; smollm3 has rotation in all layers but "
            "every fourth"
        )
    if c.get("use_sliding_window") and not c.get("layer_types"):  # those without rotation have it
        c = c | {"layer_types": [("sliding", "full")[r] + "_attention" for r in fourth]}
    return llama_keys(c) | given_windows(c, always=False)


def granite_keys(c: Config) -> Found:
    found = llama_keys(c | {"head_dim": None})
    for key, name in (
        ("attention.scale", "attention_multiplier"),
        ("embedding_scale", "embedding_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        if c.get(name):
            found[key] = float(c[name])
    return found


def granitemoe_keys(c: Config) -> Found:
    shared = c.get("shared_intermediate_size")
    return granite_keys(c) | ({"expert_shared_feed_forward_length": shared} if shared else {})


def qwen_moe_keys(c: Config, normed: bool) -> Found:
    """``normed``: whether readers take the experts' weights to sum to 1."""
    found = common(c) | shares(c, normed) | given_windows(c, always=False)
    for key, name in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if c.get(name) is not None:
            found[key] = int(c[name])
    return found


def olmoe_keys(c: Config) -> Found:
    if c.get("clip_qkv") is not None:
        raise UnsupportedModel(
            f"config.json: clip_qkv = {c['clip_qkv']!r:.40} clips behind norms; olmoe has no key for it"
        )
    return {"attention.layer_norm_rms_epsilon": 1e-5} | common(c) | shares(c, False)


def olmo2_keys(c: Config) -> Found:
    found = common(c)
    if c.get("sliding_window") is not None:
        found["attention.sliding_window"] = int(c["sliding_window"])
        pattern = windows(c, otherwise=lambda i: (i + 1) % 4 != 0)
        found["attention.sliding_window_pattern"] = pattern
    return found


def gemma_keys(c: Config) -> Found:
    found = without_usual_base(common(c))
    found.setdefault("attention.head_count_kv", c["num_attention_heads"])
    return found


def without_usual_base(found: Found) -> Found:
    """Keys without the rotation's usual base, which readers know."""
    return {k: v for k, v in found.items() if k != "rope.freq_base" or v != 10000.0}


def scores_scale(c: Config, widest: int) -> Found:
    """The scale of scores, if it is neither that of the heads' size nor the 27B model's, which readers know."""
    scalar = c.get("query_pre_attn_scalar") or c["head_dim"]
    known = c["hidden_size"] / c["num_attention_heads"] if n_layer(c) == widest else c["head_dim"]
    return {} if scalar == known else {"attention.scale": float(scalar) ** -0.5}


def gemma2_keys(c: Config) -> Found:
    return gemma_keys(c) | {
        "attn_logit_softcapping": float(c["attn_logit_softcapping"]),
        "final_logit_softcapping": float(c["final_logit_softcapping"]),
        "attention.sliding_window": int(c["sliding_window"]),
        **unusual_windows(c, 2),
        **scores_scale(c, 46),
    }


def gemma3_keys(c: Config) -> Found:
    found = common(c)
    if c.get("attn_logit_softcapping") is not None:
        raise ArgumentError("config.json has attn_logit_softcapping, which Gemma 3 does not")
    if c.get("final_logit_softcapping"):
        found["final_logit_softcapping"] = float(c["final_logit_softcapping"])
    if c.get("sliding_window_pattern") != 1 and c.get("sliding_window"):
        found["attention.sliding_window"] = int(c["sliding_window"])
        found |= unusual_windows(c, 6)
    return found | scores_scale(c, 62)


def gemma4_keys(c: Config) -> Found:
    """Layers that see everything have heads of another size, and may have another number of them."""
    windowed, n_shared = (
        windows(c, otherwise=lambda i: (i + 1) % 6 != 0),
        needed(c, "num_kv_shared_layers"),
    )
    # the tensors do not say it: they have the width of all heads together
    full = of_full_layers(c, "global_head_dim", "head_dim") or int(needed(c, "global_head_dim"))
    d, given = int(needed(c, "head_dim")), rope(c)
    if given.get("rope_type") != "proportional":
        raise ArgumentError(
            f"the rotation of layers that see everything is {given.get('rope_type')!r:.40}; "
            "Gemma 4's is 'proportional'"
        )
    local = (c.get("rope_parameters") or {}).get("sliding_attention") or {}
    found = gemma3_keys(c | {"query_pre_attn_scalar": None}) | {
        "attention.shared_kv_layers": int(n_shared),
        "embedding_length_per_layer_input": int(c.get("hidden_size_per_layer_input") or 0),
        "attention.sliding_window_pattern": windowed,
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": d,
        "attention.value_length_swa": d,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": int(d * local.get("partial_rotary_factor", 1.0)),
    }
    if (n := first(c, "expert_intermediate_size", "moe_intermediate_size")) is not None:
        found["expert_feed_forward_length"] = int(n)
    if c.get("use_double_wide_mlp"):
        own = np.arange(len(windowed)) < len(windowed) - n_shared
        found["feed_forward_length"] = c["intermediate_size"] * np.where(own, 1, 2).astype(np.int32)
    if n := of_full_layers(c, "num_global_key_value_heads", "num_key_value_heads"):
        heads = np.where(windowed, c["num_key_value_heads"], n)
        found["attention.head_count_kv"] = heads.astype(np.int32)
    return found


def of_full_layers(c: Config, everywhere: str, name: str) -> int | None:
    """A number of the layers that see everything, where it is another: by its own name, or layer by layer."""
    if c.get(everywhere) is not None:
        return int(c[everywhere])
    layers = {int(i): layer for i, layer in (c.get("per_layer_config") or {}).items()}
    kinds = enumerate(c.get("layer_types") or ())
    own = (layers.get(i, {}).get(name) for i, kind in kinds if kind == "full_attention")
    return next((int(n) for n in own if n is not None), None)


def gemma_embedding_keys(c: Config) -> Found:
    if c.get("use_bidirectional_attention") is not True:
        raise UnsupportedModel(
            f"config.json: use_bidirectional_attention = {c.get('use_bidirectional_attention')!r:.40}; "
            "an embedding Gemma has true"
        )
    return gemma3_keys(c) | pooling(c)


def phi3_keys(c: Config) -> Found:
    given = rope(c)
    keep = ("block_count", "context_length", "embedding_length", "feed_forward_length",
            "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon")  # fmt: skip
    if (kind := given.get("rope_type", "default")) in ("linear", "yarn") and not given.get(
        "long_factor"
    ):
        raise UnsupportedModel(
            f"config.json: the rotation is scaled by {kind!r}; phi3 has longrope"
        )
    base = common(c | {"rope_scaling": None, "rope_parameters": None})
    trained = int(first(given, "original_max_position_embeddings") or c["max_position_embeddings"])
    found = {k: base[k] for k in keep if k in base} | {
        "rope.scaling.original_context_length": trained,
        "rope.dimension_count": int(given.get("partial_rotary_factor", 1.0) * c["hidden_size"])
        // c["num_attention_heads"],
        "rope.freq_base": float(given.get("rope_theta", 10000.0)),
        "attention.sliding_window": int(c.get("sliding_window") or 0),
        **given_windows(c, always=True),
    }
    if given.get("long_factor"):
        found["rope.scaling.attn_factor"] = longrope_factor(
            str(given.get("rope_type")).lower(), c["max_position_embeddings"] / trained, trained
        )
    return found


def longrope_factor(kind: str, stretch: float, trained: int) -> float:
    """By how much long rotations grow."""
    if kind not in ("su", "longrope", "yarn"):
        raise ArgumentError(
            f"the rotation is scaled by {kind!r:.40}; we know longrope and yarn here"
        )
    if stretch <= 1:
        return 1.0
    if kind == "yarn":
        return 0.1 * math.log(stretch) + 1
    return math.sqrt(1 + math.log(stretch) / math.log(trained))


def gpt2_keys(c: Config) -> Found:
    n_embd = c["n_embd"]
    return {
        "block_count": n_layer(c),
        "context_length": needed(c, "n_ctx", "n_positions"),
        "embedding_length": n_embd,
        "feed_forward_length": c.get("n_inner") or 4 * n_embd,
        "attention.head_count": c["n_head"],
        "attention.layer_norm_epsilon": float(c["layer_norm_epsilon"]),
    }


def neox_keys(c: Config) -> Found:
    part = rope(c).get("partial_rotary_factor", 0.25)
    return {
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "block_count": n_layer(c),
        "feed_forward_length": c["intermediate_size"],
        "rope.dimension_count": int(part * (c["hidden_size"] // c["num_attention_heads"])),
        "rope.freq_base": float(rope(c).get("rope_theta", 10000.0)),
        "attention.head_count": c["num_attention_heads"],
        "use_parallel_residual": bool(c.get("use_parallel_residual", True)),
        "attention.layer_norm_epsilon": float(c["layer_norm_eps"]),
        **rotation(c),
    }


def falcon_keys(c: Config) -> Found:
    n_head, n_kv = falcon_heads(c)
    if c.get("alibi"):
        raise ArgumentError(
            "config.json says alibi; Falcon's models with rotary embedding are read"
        )
    return {
        "context_length": c.get("max_position_embeddings") or 2048,
        "tensor_data_layout": "jploski",
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c.get("ffn_hidden_size") or 4 * c["hidden_size"],
        "block_count": n_layer(c),
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.layer_norm_epsilon": float(c["layer_norm_epsilon"]),
        **without_usual_base(rotation(c)),
    }


def mamba_keys(c: Config) -> Found:
    eps = float(first(c, "layer_norm_epsilon", "rms_norm_eps") or 1e-5)
    own = c.get("mixer_rms_eps")
    if own is not None and own != eps:
        message = (
            f"config.json: mixer_rms_eps = {own!r:.40} beside an epsilon of {eps}; files have one"
        )
        if abs(own - eps) > 1e-5:
            raise UnsupportedModel(message)
        warnings.warn(f"{message}, the latter: values differ by some ten-thousandths", stacklevel=5)
    width = int(needed(c, "hidden_size", "d_model"))
    return {
        "context_length": 1 << 20,  # there is no limit
        "embedding_length": width,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": n_layer(c),
        "ssm.conv_kernel": int(first(c, "conv_kernel", "d_conv") or 4),
        "ssm.inner_size": int(first(c, "intermediate_size", "d_inner") or 2 * width),
        "ssm.state_size": int(first(c, "state_size", "d_state") or 16),
        "ssm.time_step_rank": int(first(c, "time_step_rank", "dt_rank") or -(width // -16)),
        "attention.layer_norm_rms_epsilon": eps,
        "ssm.dt_b_c_rms": c.get("model_type") == "falcon_mamba",
    }


def bert_keys(c: Config) -> Found:
    found = common(c) | {"attention.causal": False} | pooling(c)
    if c.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        found["context_length"] -= int(c["pad_token_id"]) + 1
    return found


def nomic_keys(c: Config) -> Found:
    """Nomic's files were trained on fewer positions than they allow."""
    for name, expected in (("prenorm", False), ("causal", False), ("qkv_proj_bias", False),
                           ("activation_function", "swiglu"), ("rotary_emb_fraction", 1.0),
                           ("rotary_emb_interleaved", False)):  # fmt: skip
        if c.get(name, expected) != expected:
            raise ArgumentError(f"config.json says {name} = {c[name]!r:.40}; expected {expected!r}")
    trained = {8192: 2048, 2048: 512}.get(int(c["n_positions"]), int(c["n_positions"]))
    return common(c | {"n_positions": trained}) | {"attention.causal": False} | pooling(c)


def modern_bert_keys(c: Config) -> Found:
    found = bert_keys(c) | {
        "attention.sliding_window": int(c["local_attention"]),
        "rope.scaling.type": "none",
        "vocab_size": c["vocab_size"],
    }
    found["attention.layer_norm_epsilon"] = float(first(c, "norm_eps", "layer_norm_eps") or 1e-5)
    every = c.get("global_attn_every_n_layers")
    seen = windows(c, otherwise=lambda i: bool(i % int(every or 3)))
    if every is None:
        full = np.flatnonzero(~seen)
        every = int(full[1]) if len(full) > 1 else len(seen)
    usual = (np.arange(len(seen)) % int(every) != 0) == seen
    found["attention.sliding_window_pattern"] = int(every) if usual.all() else seen
    if c.get("classifier_pooling") in POOLING:
        found["classifier.pooling_type"] = POOLING[c["classifier_pooling"]]
    if c.get("hidden_activation"):
        found["hidden_activation"] = c["hidden_activation"]
    return found
