"""GGUF metadata -> Config: sizes, scales and choices of one model. The only reader of ``<arch>.*`` keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import GGUFError, UnsupportedModel
from ..kernels.backend import Activation
from .keys import CONTEXT, LAYERS, Keys, numbers

POOLING = ("none", "mean", "cls", "last", "rank")
GATING = ("", "softmax", "sigmoid", "softmax_selected")  # "": the row says

OTHER_FILES = {  # what general.type says of files that are no models
    "adapter": "an adapter for lora=, --lora or merge",
    "imatrix": "an importance matrix for quantize",
    "mmproj": "the part of a model that sees or hears",
}
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "geglu": "gelu", "silu": "silu", "swish": "silu", "swiglu": "silu", "relu": "relu",
    "reglu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length."""

    type: str = "none"  # "none" | "linear" | "yarn" | "longrope"
    factor: float = 1.0
    n_ctx_original: int = 0
    attn_factor: float = 1.0  # multiplies cos and sin
    log_multiplier: float = 0.0  # DeepSeek: 0.1 * mscale_all_dim
    beta_fast: float = 32.0  # turns within the trained length that bound YaRN's ramp
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position: by scale * log(floor((position + offset) / length) + 1) + 1."""

    scale: float
    length: int
    offset: float = 0.0


@dataclass(frozen=True)
class Config:
    """One model's sizes and scales. Tuples have one value per layer."""

    arch: str
    n_layer: int
    n_ctx_train: int
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_ff: tuple[int, ...]
    head_dim: int
    head_dim_v: int
    head_dim_swa: int  # in layers with a window
    head_dim_v_swa: int
    norm: str  # "rms" | "layer"
    norm_eps: float
    rope_dim: int
    rope_dim_swa: int
    rope_freq_base: float
    rope_freq_base_swa: float
    rope_scaling: RopeScaling
    rope_scaling_swa: bool  # do sliding-window layers use the scaling too?
    rope_on: tuple[bool, ...]  # layers whose queries and keys are rotated
    heated: tuple[
        bool, ...
    ]  # layers whose queries grow with their position, where there is a temperature
    window: tuple[int, ...]  # 0: the layer sees everything
    attn_scale: float
    attn_out_scale: float  # Grok's name for attn_scale; 0: the file does not say
    attn_softcap: float
    attn_clamp: float
    attn_value_scale: float
    temperature: Temperature | None
    n_kv_shared: int  # the last layers, which have no keys of their own
    n_embd_per_layer: int  # 0: the layers get no embedding of their own
    n_stream: int  # streams of activations that lie side by side
    altup_active: int  # the stream that layers compute
    sparsity: tuple[float, ...]  # deviations above the mean from which a gate acts; -inf: all of it
    logit_softcap: float
    logit_scale: float
    embedding_scale: float
    residual_scale: float
    max_alibi_bias: float
    causal: bool
    pooling: str
    rank_pooling: (
        str  # the row that a reranker's head reads: "cls" or "mean"; "": the file does not say
    )
    parallel_residual: bool
    n_expert: int
    n_expert_used: int
    expert_gating: str  # "" when the file does not say
    expert_renormalise: bool | None
    expert_weights_scale: float
    n_expert_group: int
    n_expert_group_used: int
    n_experts_sharing: int  # neighbouring experts that have a small one in common; 0: none have
    small_experts_scale: float
    q_lora_rank: int  # 0: no low-rank queries
    kv_lora_rank: int  # 0: not a latent-attention model
    ssm_conv: int
    ssm_inner: int
    ssm_state: int
    ssm_dt_rank: int
    ssm_group: int
    ssm_norm: bool
    wkv_head_dim: int
    kda_head_dim: int
    rope_finetuned: bool  # Granite's hybrid: do attention layers rotate?
    xielu: tuple[tuple[float, float, float], ...]  # per layer: above 0, below 0, linear
    n_dense: int  # leading layers without experts
    has_no_window: bool  # the file says that nothing is hidden
    n_ctx_most: int  # positions up to which sparse attention is the plain one; 0: it is not sparse
    window_size: int
    window_pattern: int  # the file's, where it is one number for all layers; -1: there is none
    windowed: tuple[bool, ...]  # layers that are said to have a window, however wide it is
    window_listed: bool  # is it said of each layer whether it has a window?
    n_skipped: int  # layers behind the others, which guess more than one token ahead
    blocks: tuple[int, ...]  # the file's ``blk.N`` of each layer; layers may share one
    n_loop: int  # how often the file's layers run
    loop_norm: bool  # is the last norm also between two runs?
    n_stack: int  # layers of each of two stacks that run in turns; 0: there is but one
    n_cycles: tuple[int, int]  # how often all is done, and the first stack in each
    kv_lora_rank_swa: int
    expert_limits: tuple[float, ...]  # bounds of experts' activations; 0: none
    ffn_limits: tuple[float, ...]  # those of the plain halves and the shared expert
    act: Activation | None  # the activation of feed-forward halves; None: the row says
    n_bucket: int  # ranges of distances that have a learned bias of their own
    n_layer_written: (
        int  # layers of the stack that writes, in files where another one reads; 0: as many
    )
    start_id: (
        int  # where another stack reads, the token that texts begin with; -1: the file does not say
    )
    blocks_at: str = "blk"  # what the names of the layers' tensors begin with

    def at(self, i: int) -> Config:
        """The configuration as layer i sees it: layers with a window may have heads of their own size."""
        if not self.window[i]:
            return self
        usual = self.head_dim and self.head_dim_swa and self.attn_scale == self.head_dim**-0.5
        return replace(
            self,
            attn_scale=self.head_dim_swa**-0.5 if usual else self.attn_scale,
            head_dim=self.head_dim_swa,
            head_dim_v=self.head_dim_v_swa,
            rope_dim=self.rope_dim_swa,
            kv_lora_rank=self.kv_lora_rank_swa,
        )


def architecture(metadata: Mapping[str, Any]) -> str:
    """The name in ``general.architecture``."""
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if isinstance(kind, str) and kind in OTHER_FILES:
        raise GGUFError(f"is {kind!r}: {OTHER_FILES[kind]}, no model", name="general.type")
    if not isinstance(name, str) or not 0 < len(name) <= 64:
        raise GGUFError(f"is {name!r:.60}; expected a short name", name="general.architecture")
    return name


def read_config(keys: Keys) -> Config:
    """Everything the file says, with the format's own defaults; a row of ARCHS may then adjust it."""
    k = keys
    n_all = k.whole("block_count", low=1, high=LAYERS)
    n_skipped = k.whole("nextn_predict_layers", 0, high=n_all - 1)
    n_layer, k.n_skipped = n_all - n_skipped, n_skipped
    n_embd = k.whole("embedding_length", low=1)
    n_head = k.per_layer("attention.head_count", n_layer, None, 0, 1 << 16)
    n_head_kv = k.per_layer("attention.head_count_kv", n_layer, list(n_head), 0, 1 << 16)
    check_heads(k, n_embd, n_head, n_head_kv)
    widest = max(n_head)
    head_dim = k.whole("attention.key_length", n_embd // widest if widest else 0)
    head_dim_v = k.whole("attention.value_length", n_embd // widest if widest else 0)
    head_dim_swa = k.whole("attention.key_length_swa", head_dim)
    rope_dim = read_rope_dim(k, "rope.dimension_count", head_dim)
    kv_lora_rank = k.whole("attention.kv_lora_rank", 0)
    norm, norm_eps = read_norm(k)
    head_dim_mla = k.whole("attention.key_length_mla", head_dim)
    head_dim_v_mla = k.whole("attention.value_length_mla", head_dim_v)
    mla_swa = k.whole("attention.key_length_mla_swa", 0)
    if not mla_swa:
        mla_swa = head_dim_swa if k.has("attention.key_length_swa") else head_dim_mla
    head_dim_v_swa = k.whole("attention.value_length_swa", head_dim_v_mla)
    v_mla_swa = k.whole("attention.value_length_mla_swa", head_dim_v_swa)
    n_ctx_train = k.whole("context_length", low=1, high=CONTEXT)
    n_ctx_most = k.whole("attention.indexer.top_k", 0, high=CONTEXT)
    pattern = k.get("attention.sliding_window_pattern", -1)
    n_expert = k.whole("expert_count", 0, high=4096)
    size, windowed = k.whole("attention.sliding_window", 0, high=CONTEXT), read_windowed(k, n_layer)
    return Config(
        arch=k.arch,
        n_layer=n_layer,
        n_ctx_train=min(n_ctx_train, n_ctx_most or n_ctx_train),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_ff=k.per_layer("feed_forward_length", n_layer, 0, 0),
        head_dim=head_dim_mla,
        head_dim_v=head_dim_v_mla,
        head_dim_swa=mla_swa,
        head_dim_v_swa=v_mla_swa,
        norm=norm,
        norm_eps=norm_eps,
        rope_dim=rope_dim,
        rope_dim_swa=read_rope_dim(k, "rope.dimension_count_swa", head_dim_swa, rope_dim),
        rope_freq_base=k.number("rope.freq_base", 10000.0, low=1.001),
        rope_freq_base_swa=k.number("rope.freq_base_swa", 0.0, low=0.0),
        rope_scaling=read_scaling(k),
        rope_scaling_swa=True,
        rope_on=tuple(
            map(bool, k.per_layer("attention.rope_pattern", n_layer, [True] * n_layer, 0, 1))
        ),
        heated=(True,) * n_layer,
        window=tuple(size if w else 0 for w in windowed),
        windowed=windowed,
        attn_scale=k.number("attention.scale", 0.0)
        or (head_dim_mla**-0.5 if head_dim_mla else 0.0),
        attn_out_scale=k.number("attention.output_scale", 0.0),
        attn_softcap=k.number("attn_logit_softcapping", 0.0, low=0.0),
        attn_clamp=k.number("attention.clamp_kqv", 0.0, low=0.0),
        attn_value_scale=k.number("attention.value_scale", 1.0),
        temperature=read_temperature(k),
        n_kv_shared=k.whole("attention.shared_kv_layers", 0, high=n_layer - 1),
        n_embd_per_layer=k.whole("embedding_length_per_layer_input", 0),
        n_stream=k.whole("altup.num_inputs", 1, 1, 64),
        altup_active=k.whole("altup.active_idx", 0),
        sparsity=read_sparsity(k, n_layer),
        logit_softcap=k.number("final_logit_softcapping", 0.0, low=0.0),
        logit_scale=k.number("logit_scale", 1.0, positive=True),
        embedding_scale=k.number("embedding_scale", 1.0),
        residual_scale=k.number("residual_scale", 1.0),
        max_alibi_bias=k.number("attention.max_alibi_bias", 0.0, low=0.0),
        causal=k.flag("attention.causal", True),
        pooling=read_pooling(k, "pooling_type"),
        rank_pooling=read_pooling(k, "classifier.pooling_type"),
        parallel_residual=k.flag("use_parallel_residual", False),
        n_expert=n_expert,
        n_expert_used=read_experts_used(k, n_expert),
        expert_gating=GATING[k.whole("expert_gating_func", 0, high=len(GATING) - 1)],
        expert_renormalise=k.flag("expert_weights_norm", False)
        if k.has("expert_weights_norm")
        else None,
        expert_weights_scale=k.number("expert_weights_scale", 1.0),
        n_expert_group=read_groups(k, n_expert),
        n_expert_group_used=read_groups_used(k, read_groups(k, n_expert)),
        n_experts_sharing=read_sharing(k, n_expert),
        small_experts_scale=k.number("expert_group_scale", 1.0),
        q_lora_rank=k.whole("attention.q_lora_rank", 0),
        kv_lora_rank=kv_lora_rank,
        ssm_conv=k.whole("ssm.conv_kernel", k.whole("shortconv.l_cache", 0, high=64), high=64),
        ssm_inner=k.whole("ssm.inner_size", 0),
        ssm_state=k.whole("ssm.state_size", 0, high=1 << 16),
        ssm_dt_rank=k.whole("ssm.time_step_rank", 0),
        ssm_group=k.whole("ssm.group_count", 1),
        ssm_norm=k.flag("ssm.dt_b_c_rms", False),
        wkv_head_dim=k.whole("wkv.head_size", 0, high=4096),
        kda_head_dim=k.whole("kda.head_dim", 0, high=4096),
        rope_finetuned=k.flag("rope.scaling.finetuned", False),
        xielu=read_xielu(k, n_layer),
        n_dense=k.whole("leading_dense_block_count", 0, high=LAYERS),
        has_no_window=k.has("attention.sliding_window") and not size,
        n_ctx_most=n_ctx_most,
        window_size=size,
        window_pattern=k.whole("attention.sliding_window_pattern", -1, -1, LAYERS)
        if isinstance(pattern, int)
        else -1,
        window_listed=not isinstance(pattern, int),
        n_skipped=n_skipped,
        blocks=tuple(range(n_layer)),
        n_loop=k.whole("num_loops", 1, 1, LAYERS),
        loop_norm=not k.flag("skip_loop_final_norm", False),
        n_stack=k.whole("hrm.layers_per_stack", 0, high=LAYERS),
        n_cycles=(k.whole("hrm.h_cycles", 1, 1, LAYERS), k.whole("hrm.l_cycles", 1, 1, LAYERS)),
        kv_lora_rank_swa=k.whole("attention.kv_lora_rank_swa", kv_lora_rank),
        expert_limits=read_limits(k, "swiglu_clamp_exp", n_layer),
        ffn_limits=read_limits(k, "swiglu_clamp_shexp", n_layer),
        act=read_activation(k),
        n_bucket=k.whole("attention.relative_buckets_count", 0, high=256),
        n_layer_written=k.whole("decoder_block_count", 0, high=LAYERS),
        start_id=k.whole("decoder_start_token_id", -1, -1, CONTEXT),
    )


def repeated(c: Config, blocks: tuple[int, ...]) -> Config:
    """The configuration of layers that are, one after another, these blocks of the file."""
    if len(blocks) > LAYERS:
        raise GGUFError(f"{len(blocks)} layers run; expected at most {LAYERS}", name=c.arch)
    per_layer = (
        "n_head n_head_kv n_ff rope_on heated window windowed expert_limits ffn_limits".split()
    )
    found: dict[str, Any] = {name: tuple(getattr(c, name)[b] for b in blocks) for name in per_layer}
    return replace(c, n_layer=len(blocks), blocks=blocks, **found)


def read_limits(k: Keys, key: str, n_layer: int) -> tuple[float, ...]:
    """Each layer's bound of what goes through an activation; 0 where there is none."""
    if not k.has(key):
        return (0.0,) * n_layer
    k.read.add(key)
    return numbers(k.metadata, k.prefix + key, n_layer, k.n_skipped, lowest=0.0)


def read_experts_used(k: Keys, n_expert: int) -> int:
    """How many experts each row goes through."""
    used = k.whole("expert_used_count", 0 if not n_expert else None)
    if used > n_expert or (n_expert and not used):
        raise GGUFError(
            f"is {used}; expected 1 to {n_expert}, which is {k.prefix}expert_count",
            name=k.prefix + "expert_used_count",
        )
    return used


def read_groups(k: Keys, n_expert: int) -> int:
    """Into how many groups of the same size the experts are divided."""
    n = k.whole("expert_group_count", 1, 1)
    if n_expert % n:
        raise GGUFError(
            f"is {n}, which does not divide {k.prefix}expert_count {n_expert}",
            name=k.prefix + "expert_group_count",
        )
    return n


def read_sharing(k: Keys, n_expert: int) -> int:
    """How many experts have a small one in common; 0 without such."""
    n = k.whole("experts_per_group", 0, high=4096)
    if n and n_expert % n:
        raise GGUFError(
            f"is {n}, which does not divide {k.prefix}expert_count {n_expert}",
            name=k.prefix + "experts_per_group",
        )
    return n


def read_groups_used(k: Keys, n_group: int) -> int:
    """From how many of the groups experts are chosen."""
    used = k.whole("expert_group_used_count", 1, 1)
    if used > n_group:
        raise GGUFError(
            f"is {used}; expected 1 to {n_group}, which is {k.prefix}expert_group_count",
            name=k.prefix + "expert_group_used_count",
        )
    return used


def check_heads(k: Keys, n_embd: int, n_head: tuple[int, ...], n_head_kv: tuple[int, ...]) -> None:
    """Raise GGUFError unless the query heads are a multiple of the key heads."""
    for h, kv in zip(n_head, n_head_kv, strict=True):
        if h and kv and h % kv:  # a layer without key heads is no attention layer
            raise GGUFError(
                f"is {kv}; expected a divisor of the {h} query heads",
                name=k.prefix + "attention.head_count_kv",
            )
        if h and n_embd % h and not k.has("attention.key_length"):
            raise GGUFError(
                f"is {h}, which does not divide embedding_length {n_embd}, "
                f"and there is no {k.prefix}attention.key_length",
                name=k.prefix + "attention.head_count",
            )


def read_norm(k: Keys) -> tuple[str, float]:
    """The name of the epsilon's key says which norm; a row decides where both are given."""
    found = [
        (kind, k.number(key, positive=True))
        for kind, key in (
            ("rms", "attention.layer_norm_rms_epsilon"),
            ("layer", "attention.layer_norm_epsilon"),
        )
        if k.has(key)
    ]
    if not found:
        raise GGUFError(
            f"neither it nor {k.prefix}attention.layer_norm_epsilon is given",
            name=k.prefix + "attention.layer_norm_rms_epsilon",
        )
    return found[0]


def read_rope_dim(k: Keys, key: str, head_dim: int, default: int | None = None) -> int:
    """How many of a head's values turn."""
    dim = k.whole(key, head_dim // 2 * 2 if default is None else default)
    if dim % 2 or dim > head_dim > 0:
        raise GGUFError(
            f"is {dim}; expected an even number, at most the {head_dim} values of a head "
            f"({k.prefix}attention.key_length, or embedding_length / head_count)",
            name=k.prefix + key,
        )
    return dim


def read_temperature(k: Keys) -> Temperature | None:
    """How queries grow with their position; None where the file does not say."""
    scale = k.number("attention.temperature_scale", 0.0)
    trained = k.whole(
        "rope.scaling.original_context_length", k.whole("context_length", high=CONTEXT), 1, CONTEXT
    )
    length = k.whole("attention.temperature_length", trained, 1, CONTEXT)
    return Temperature(scale, length) if scale else None


def read_scaling(k: Keys) -> RopeScaling:
    """How positions are scaled, from the keys ``rope.scaling.*``."""
    kind = k.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModel(
            f"{k.prefix}rope.scaling.type is {kind!r:.60}; we know linear, yarn, longrope"
        )
    old = k.number("rope.scale_linear", 1.0, positive=True)  # the key's name before scaling.factor
    return RopeScaling(
        type="linear" if kind == "none" and old != 1 else kind,
        factor=k.number("rope.scaling.factor", old, positive=True),
        n_ctx_original=k.whole(
            "rope.scaling.original_context_length",
            k.whole("context_length", high=CONTEXT),
            low=1,
            high=CONTEXT,
        ),
        attn_factor=k.number("rope.scaling.attn_factor", 1.0, positive=True),
        log_multiplier=k.number("rope.scaling.yarn_log_multiplier", 0.0),
        beta_fast=k.number("rope.scaling.yarn_beta_fast", 32.0, positive=True),
        beta_slow=k.number("rope.scaling.yarn_beta_slow", 1.0, positive=True),
    )


def read_windowed(k: Keys, n_layer: int) -> tuple[bool, ...]:
    """Which layers see a window; unless the file says it of each, all, and a row may take it from some."""
    if isinstance(k.get("attention.sliding_window_pattern", -1), int):
        return (True,) * n_layer
    return tuple(map(bool, k.per_layer("attention.sliding_window_pattern", n_layer, None, 0, 1)))


def read_activation(k: Keys) -> Activation | None:
    """The activation that the file names, if it names one."""
    name = k.text("hidden_activation", "")
    if name and name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{k.prefix}hidden_activation is {name!r:.40}; we know {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name] if name else None


def read_xielu(k: Keys, n_layer: int) -> tuple[tuple[float, float, float], ...]:
    """Each layer's coefficients: quadratic above 0, exponential below, linear. () without such keys.

    The file has them as they were learned, before a softplus; its keys do not begin with the architecture.
    ``xielu.eps`` keeps the reference's exponential away from 0, where it changes nothing.
    """
    if "xielu.alpha_p" not in k.metadata:
        return ()
    above, below, linear = (
        numbers(k.metadata, f"xielu.{name}", n_layer) for name in ("alpha_p", "alpha_n", "beta")
    )
    return tuple(
        (softplus(p), b + softplus(n), b) for p, n, b in zip(above, below, linear, strict=True)
    )


def read_sparsity(k: Keys, n_layer: int) -> tuple[float, ...]:
    """How far above the mean a layer's gate acts, in standard deviations; () without such a key."""
    key = "activation_sparsity_scale"
    if not k.has(key):
        return ()
    k.read.add(key)
    return numbers(k.metadata, k.prefix + key, n_layer, k.n_skipped, lowest=-math.inf)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def read_pooling(k: Keys, key: str) -> str:
    """How rows become one vector; "" when the file does not say."""
    return POOLING[k.whole(key, 0, high=len(POOLING) - 1)] if k.has(key) else ""
