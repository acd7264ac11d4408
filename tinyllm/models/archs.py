"""THE TABLE: one row per architecture, with only what neither the tensors nor the keys of a file say.

The order of authority is: the tensors that are there, then the metadata keys, then the row. A fact
that needs the file's sizes is a function of Config beside the row (``adjust``), with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log, sqrt
from typing import Any, Literal

from ..errors import GGUFError, UnsupportedModel
from ..kernels.backend import Activation, Pairing
from .altup import AltUpBlock, SparseFFN, Streams
from .attention import Attention, BareNormsBehindRope, NormsBehindRope
from .config import Config, Temperature, repeated
from .deltanet import delta_or_attention
from .ffn import FFN, XIELU, FeedForwardAlone
from .kda import delta_or_latent
from .loops import LoopBlock, Rounds, RoundsBlock
from .mamba import Mamba
from .mamba2 import AttentionBesideMamba2, Mamba2, MambaByHead
from .mixer import LinearMixer, Mixer, NoMixer
from .mla import LatentAttention
from .refused import NOT_RUN as NOT_RUN
from .rwkv import ChannelMix, GatedTimeMix6, OptionalTimeMix7, TimeMix6, TimeMix7
from .shortconv import ShortConv
from .weights import Tensors


@dataclass(frozen=True)
class Arch:
    """What distinguishes one architecture, beyond sizes."""

    name: str
    source: str  # paper or reference implementation
    pairing: Pairing = "half"  # which two values of a head turn together
    position: Literal["rope", "learned", "alibi", "relative", "none"] = "rope"
    act: Activation = "silu"
    gated: bool = True  # the feed-forward part has a gate
    # "norms": parallel in layers without ffn_norm
    residual: Literal["serial", "parallel", "file", "norms"] = "serial"
    norm: Literal["", "rms", "layer"] = ""  # "": as the file's key says
    # "post": only the output of each half is normalised (OLMo 2)
    norm_at: Literal["before", "after", "post"] = "before"
    norm_affine: bool = True  # False: normalised, but without weights (OLMo)
    gating: Literal["softmax", "sigmoid", "softmax_selected"] = "softmax"
    renormalise: bool = True  # the chosen experts' weights sum to 1
    choice_bias: bool = True  # experts that sigmoids choose have a bias for the choice
    routed_by_input: bool = False  # experts are chosen by the block's input
    experts_beside: float = 1.0  # multiplies the sum of experts and a plain half beside them
    halves: Literal["both", "file"] = (
        "both"  # "file": a layer may lack a half, where its sizes are 0
    )
    weigh_inputs: bool = False  # experts' weights multiply what goes in, not what comes out
    experts_scale: float = 1.0  # multiplies the sum of all experts, the shared one included
    # layers whose softmax has a sink; "file": of those with a window and of the others, all or none
    sinks: Literal["", "all", "file"] = ""
    v_norm: bool = False  # values are normalised, without weights
    values_from_keys: bool = False  # layers without a matrix for values take what makes their keys
    gate_act: Activation = (
        "sigmoid"  # what the gate of the outputs of heads goes through, where there is one
    )
    roles: dict[str, str] = field(default_factory=dict)  # our name of a tensor -> this file's
    needs: tuple[str, ...] = ()  # tensors that a model could be built without, but these files have
    mixer: Callable[[Config, Arch, int, Tensors], Mixer] = Attention
    # "file": FFN or MoE, as the tensors say; None: the block has no such half
    ffn: Literal["file"] | Callable[[Config, Arch, int, Tensors], Any] | None = "file"
    block: Any = None  # a layer of another make than decoder.Block
    streams: Any = None  # how several streams of activations begin and end
    adjust: Callable[[Config], Config] = lambda c: c
    blocks_at: str = "blk"  # what the names of the layers' tensors begin with


def scaled_embedding(c: Config) -> Config:
    """Scale embeddings by the root of their length, as Gemma does."""
    return replace(c, embedding_scale=sqrt(c.n_embd))


def every(n: int, c: Config, first: bool = False) -> Config:
    """Layers see a window, but the last (or ``first``) of n sees everything; the file's number comes first.

    Where the file says it of each layer, that stands; a number of 0 says that all see a window.
    """
    if c.window_listed:
        return c
    n = n if c.window_pattern < 0 else c.window_pattern
    full = {0 if first else n - 1} if n else set()
    window = tuple(0 if n and i % n in full else s for i, s in enumerate(c.window))
    return replace(c, window=window, window_listed=True)


def every_dense_first(n: int, c: Config) -> Config:
    return every(n, c, first=True)


def scale_by_width(c: Config, n_layer: int) -> Config:
    """The 27B models scale scores by n_embd / n_head; the file does not say so, only its depth tells."""
    return replace(c, attn_scale=sqrt(c.n_head[0] / c.n_embd)) if c.n_layer == n_layer else c


def gemma2(c: Config) -> Config:
    """A file that does not speak of windows means those of 4096."""
    if not any(c.window) and not c.has_no_window and not c.window_listed:
        c = replace(c, window=(4096,) * c.n_layer)
    return scale_by_width(every(2, scaled_embedding(c)), 46)


def gemma3(c: Config) -> Config:
    return plain_where_windowed(scale_by_width(every(6, scaled_embedding(c)), 62))


def plain_where_windowed(c: Config) -> Config:
    """Layers with a window rotate unscaled, by a base of 10000 where the file gives them none."""
    return replace(c, rope_freq_base_swa=c.rope_freq_base_swa or 10000.0, rope_scaling_swa=False)


def rope_where_windowed(c: Config) -> Config:
    """Layers that see everything have no rotary embedding, if there are others."""
    return replace(c, rope_on=tuple(bool(s) for s in c.window)) if any(c.window) else c


def cohere2(c: Config) -> Config:
    return rope_where_windowed(every(4, c))


def olmo2(c: Config) -> Config:
    return replace(every(4, c), rope_scaling_swa=False)


def smollm3(c: Config) -> Config:
    """Leave the rotary embedding out of every fourth layer."""
    return replace(c, rope_on=tuple((i + 1) % 4 != 0 for i in range(c.n_layer)))


def no_window(c: Config) -> Config:
    """Drop the window, which the files carry and the reference does not apply."""
    return replace(c, window=(0,) * c.n_layer)


def alibi(c: Config) -> Config:
    """Set the largest ALiBi bias to the paper's 8, which the files do not repeat."""
    return replace(c, max_alibi_bias=c.max_alibi_bias or 8.0)


def baichuan(c: Config) -> Config:
    """7B rotates, 13B uses ALiBi; the file does not say so, only its 40 layers tell."""
    return replace(alibi(c), rope_on=(False,) * 40) if c.n_layer == 40 else c


def jais(c: Config) -> Config:
    return replace(c, attn_scale=1 / max(1, c.head_dim))


def divided_logits(c: Config) -> Config:
    return replace(c, logit_scale=1 / c.logit_scale)


def half_ff(c: Config) -> Config:
    """Qwen 1 counts both halves of its gated part in feed_forward_length."""
    return replace(c, n_ff=tuple(n // 2 for n in c.n_ff))


def minicpm3(c: Config) -> Config:
    """The three scales of the reference's configuration, which the file does not carry."""
    return replace(
        c, embedding_scale=12.0, residual_scale=1.4 / sqrt(c.n_layer), logit_scale=256 / c.n_embd
    )


def mistral3(c: Config) -> Config:
    """YaRN's share in cos and sin is divided by what the file's multiplier makes of it."""
    s = c.rope_scaling
    if s.type != "yarn" or not s.log_multiplier:
        return c
    less = 1 + 0.1 * s.log_multiplier * log(s.factor)
    return replace(c, rope_scaling=replace(s, attn_factor=s.attn_factor / less, log_multiplier=0.0))


def gemma3n(c: Config) -> Config:
    """Scores are not scaled; windows as the file says."""
    return plain_where_windowed(replace(every(5, scaled_embedding(c)), attn_scale=1.0))


def llama4(c: Config) -> Config:
    """Every fourth layer sees everything, does not rotate, and its queries grow; a window of 0 says otherwise.

    The others see their own chunk of 8192 positions.
    """
    if c.has_no_window:
        return c
    full = tuple((i + 1) % 4 == 0 for i in range(c.n_layer))
    return replace(
        c,
        window=tuple(0 if f else -CHUNK for f in full),
        rope_on=tuple(not f for f in full),
        heated=full,
        temperature=Temperature(0.1, CHUNK, 1.0),
    )


def afmoe(c: Config) -> Config:
    return rope_where_windowed(every(4, scaled_embedding(c)))


def cohere2moe(c: Config) -> Config:
    """Leading layers without experts rotate whatever they see."""
    c = rope_where_windowed(every_dense_first(4, c))
    return replace(c, rope_on=tuple(r or i < c.n_dense for i, r in enumerate(c.rope_on)))


def unscaled_where_windowed(n: int, c: Config) -> Config:
    return replace(every(n, c), rope_scaling_swa=False)


def laguna(c: Config) -> Config:
    return replace(every_dense_first(4, c), rope_scaling_swa=False)


def grok(c: Config) -> Config:
    """The constants of the first Grok, whose files have no keys for them."""
    return replace(
        c,
        attn_scale=c.attn_out_scale or 0.08838834764831845,
        attn_softcap=c.attn_softcap or 30.0,
        embedding_scale=78.38367176906169 if c.embedding_scale == 1 else c.embedding_scale,
        logit_scale=0.5773502691896257 if c.logit_scale == 1 else c.logit_scale,
    )


def bailingmoe(c: Config) -> Config:
    """Scores are scaled by what turns of a head."""
    return replace(c, attn_scale=c.rope_dim**-0.5) if c.rope_dim else c


def smallthinker(c: Config) -> Config:
    return rope_where_windowed(every_dense_first(4, c))


def both_ways(c: Config) -> Config:
    return replace(c, causal=False)


def t5_encoder(c: Config) -> Config:
    """Scores are not scaled."""
    return replace(c, causal=False, attn_scale=1.0)


def modern_bert(c: Config) -> Config:
    """Where the file does not say it, rerankers read the mean of the rows."""
    c = plain_where_windowed(every_dense_first(3, c))
    return replace(c, rank_pooling=c.rank_pooling or "mean")


def looped(c: Config) -> Config:
    """The file's layers run as often as it says, each time over a past of their own."""
    return repeated(c, tuple(range(c.n_layer)) * c.n_loop)


def rounds(c: Config) -> Config:
    """Two stacks: the first so many times, then the second; and that over again."""
    n, (high, low) = c.n_stack, c.n_cycles
    first, second = tuple(range(n)), tuple(range(n, 2 * n))
    order = (first * low + second) * high
    if not n or len(order) != c.n_layer:
        raise GGUFError(
            f"is {c.n_layer}; expected {len(order)}, by {c.arch}.hrm.layers_per_stack, "
            f"{c.arch}.hrm.h_cycles and {c.arch}.hrm.l_cycles",
            name=f"{c.arch}.block_count",
        )
    return replace(c, blocks=order)


def step35(c: Config) -> Config:
    """Half as many values of a head turn in layers that see everything; factors are theirs alone."""
    return plain_where_windowed(replace(c, rope_dim=c.rope_dim // 2))


def dots3note(c: Config) -> Config:
    """The file must give layers with a window their base; they share the scaling."""
    if not c.rope_freq_base_swa:
        raise GGUFError("required key is missing", name=f"{c.arch}.rope.freq_base_swa")
    return c


CHUNK = 8192  # positions that layers of Llama 4 see of their own chunk, in all its files
FFN_NORM = {"ffn_norm": "post_attention_norm"}
LFM2_NORM = {"output_norm": "token_embd_norm"}


def granitehybrid(c: Config) -> Config:
    """Let attention layers rotate only where the file says so."""
    return replace(divided_logits(c), rope_on=(c.rope_finetuned,) * c.n_layer)


def gemma_embedding(c: Config) -> Config:
    return replace(gemma3(c), causal=False)


def relu_or_gated(c: Config, a: Arch, i: int, w: Tensors) -> FFN:
    """Make the feed-forward half: the first T5 has a plain one, with another activation."""
    plain = replace(a, gated=False, act="relu")
    return FFN(c, a if w.has("ffn_gate.weight") else plain, w, c.n_ff[i])


def mamba2_or_attention(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads it is recurrent."""
    return (Attention if c.n_head_kv[i] else Mamba2)(c, a, i, w)


def mamba_or_attention(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads it is recurrent."""
    return (Attention if c.n_head_kv[i] else Mamba)(c, a, i, w)


def heads_of_mamba_or_attention(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads it is recurrent; both have norms behind their halves."""
    for name in ("post_attention_norm", "post_ffw_norm"):
        w.norm(name, c.n_embd)
    if not c.n_head_kv[i]:
        return MambaByHead(c, a, i, w)
    w.require("attn_qkv.weight")
    return Attention(c, a, i, w)


def mixer_alone(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the one half that a layer has: without key heads it is recurrent, or feeds forward."""
    if c.n_head_kv[i]:
        return Attention(c, a, i, w)
    recurrent = w.has("ssm_in.weight", "ssm_out.weight", "ssm_a", "ssm_d", "ssm_conv1d.weight")
    return Mamba2(c, a, i, w) if recurrent else FeedForwardAlone(c, a, i, w)


def attention_or_less(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads one matrix, without any heads nothing."""
    if not c.n_head[i]:
        return NoMixer()
    return (Attention if c.n_head_kv[i] else LinearMixer)(c, a, i, w)


def conv_or_attention(c: Config, a: Arch, i: int, w: Tensors) -> Mixer:
    """Make the mixer of a layer: without key heads it is a convolution."""
    return (Attention if c.n_head_kv[i] else ShortConv)(c, a, i, w)


HEAD = ("output.weight",)  # the head is not the embedding ("tied")
BIASED_HEAD = ("output.weight", "output.bias")
EMBD_NORM = ("token_embd_norm.weight",)

ROWS = (
    Arch("llama", "arXiv:2302.13971", pairing="adjacent"),  # also Mistral, Mixtral, Llama 2 and 3
    Arch("baichuan", "arXiv:2309.10305", needs=HEAD, pairing="adjacent", adjust=baichuan),
    Arch("internlm2", "arXiv:2403.17297", needs=HEAD, pairing="adjacent"),
    Arch("xverse", "github.com/xverse-ai/XVERSE-13B", needs=HEAD, pairing="adjacent"),
    Arch("minicpm", "arXiv:2404.06395", pairing="adjacent", adjust=divided_logits),
    Arch("granite", "hf.co/ibm-granite", pairing="adjacent", adjust=divided_logits),
    Arch("granitemoe", "hf.co/ibm-granite", pairing="adjacent", adjust=divided_logits),
    Arch("smollm3", "hf.co/blog/smollm3", pairing="adjacent", adjust=smollm3),
    Arch("olmo", "arXiv:2402.00838", pairing="adjacent", norm_affine=False),
    Arch("olmo2", "arXiv:2501.00656", norm_at="post", adjust=olmo2),
    Arch("olmoe", "arXiv:2409.02060", needs=HEAD, renormalise=False),
    Arch("command-r", "hf.co/CohereForAI", pairing="adjacent", residual="parallel"),
    Arch("cohere2", "arXiv:2504.00698", pairing="adjacent", residual="parallel", adjust=cohere2),
    Arch("chatglm", "arXiv:2406.12793", pairing="adjacent"),
    Arch("glm4", "hf.co/THUDM/GLM-4-9B-0414", pairing="adjacent"),
    Arch("qwen", "arXiv:2309.16609", needs=HEAD, adjust=half_ff),
    Arch("qwen2", "arXiv:2407.10671"),
    Arch("qwen2moe", "arXiv:2407.10671", needs=HEAD, renormalise=False),
    Arch("qwen3", "arXiv:2505.09388"),
    Arch("qwen3moe", "arXiv:2505.09388"),
    Arch("phi3", "arXiv:2404.14219", adjust=no_window),
    Arch("phimoe", "arXiv:2404.14219", needs=BIASED_HEAD, adjust=no_window),
    Arch(
        "phi2", "hf.co/microsoft/phi-2", needs=BIASED_HEAD, act="gelu_tanh", gated=False,
        residual="parallel",
    ),
    Arch("gemma", "arXiv:2403.08295", act="gelu_tanh", adjust=scaled_embedding),
    Arch("gemma2", "arXiv:2408.00118", act="gelu_tanh", adjust=gemma2),
    Arch("gemma3", "arXiv:2503.19786", act="gelu_tanh", adjust=gemma3),
    Arch(
        "gemma4", "hf.co/google/gemma-4-E2B-it", act="gelu_tanh", v_norm=True, values_from_keys=True,
        adjust=gemma3n,
    ),
    Arch(
        "gemma3n", "hf.co/google/gemma-3n-E2B-it", act="gelu_tanh", v_norm=True, ffn=SparseFFN,
        block=AltUpBlock, streams=Streams, adjust=gemma3n,
    ),
    Arch("stablelm", "arXiv:2402.17834", needs=HEAD, residual="norms"),
    Arch("orion", "arXiv:2401.12246", needs=HEAD),
    Arch("openelm", "arXiv:2404.14619"),
    Arch("exaone", "arXiv:2408.03541", norm="rms"),
    Arch("exaone4", "arXiv:2507.11407", norm_at="post", adjust=cohere2),
    Arch("nemotron", "arXiv:2402.16819", needs=HEAD, norm="layer", act="relu2", gated=False),
    Arch("starcoder2", "arXiv:2402.19173", act="gelu_tanh", gated=False),
    Arch("codeshell", "arXiv:2403.15747", act="gelu_tanh", gated=False),
    Arch("gptneox", "arXiv:2204.06745", needs=HEAD, act="gelu", gated=False, residual="file"),
    Arch("falcon", "arXiv:2311.16867", act="gelu", gated=False, residual="parallel"),
    Arch(
        "gpt2", "openai.com/index/better-language-models", position="learned", act="gelu_tanh",
        gated=False,
    ),
    Arch("starcoder", "arXiv:2305.06161", position="learned", act="gelu_tanh", gated=False),
    Arch(
        "bloom", "arXiv:2211.05100", needs=EMBD_NORM, position="alibi", act="gelu_tanh",
        gated=False, adjust=alibi,
    ),
    Arch("mpt", "hf.co/mosaicml/mpt-7b", position="alibi", act="gelu", gated=False),
    Arch("refact", "hf.co/smallcloudai", position="alibi", adjust=alibi),
    Arch("jais", "arXiv:2308.16149", needs=HEAD, position="alibi", adjust=jais),
    Arch(
        "gpt-oss", "arXiv:2508.10925", needs=HEAD, act="swiglu_oai", gating="softmax_selected",
        sinks="all", roles=FFN_NORM, adjust=lambda c: every(2, c),
    ),
    Arch("dbrx", "hf.co/databricks/dbrx-base", needs=HEAD, roles={"ffn_norm": "attn_output_norm"}),
    Arch("arctic", "hf.co/Snowflake/snowflake-arctic-instruct", pairing="adjacent"),
    Arch("deepseek2", "arXiv:2405.04434", pairing="adjacent", renormalise=False, mixer=LatentAttention),
    Arch("mistral3", "hf.co/mistralai/Ministral-3-8B-Instruct-2512", pairing="adjacent", adjust=mistral3),
    Arch(
        "mistral4", "hf.co/mistralai/Mistral-Small-4-119B-2603", pairing="adjacent",
        mixer=LatentAttention,
    ),
    Arch(
        "llama4", "hf.co/meta-llama/Llama-4-Scout-17B-16E", pairing="adjacent", gating="sigmoid",
        renormalise=False, weigh_inputs=True, mixer=BareNormsBehindRope, adjust=llama4,
    ),
    Arch("glm4moe", "arXiv:2508.06471", gating="sigmoid", roles=FFN_NORM),
    Arch("qwen2vl", "arXiv:2409.12191"),
    Arch("qwen3vl", "hf.co/Qwen/Qwen3-VL-8B-Instruct"),
    Arch("qwen3vlmoe", "hf.co/Qwen/Qwen3-VL-30B-A3B-Instruct"),
    Arch("minimax-m2", "hf.co/MiniMaxAI/MiniMax-M2", needs=HEAD, gating="sigmoid"),
    Arch("exaone-moe", "hf.co/LGAI-EXAONE/K-EXAONE-236B-A23B", gating="sigmoid", adjust=cohere2),
    Arch("granite_swa", "hf.co/ibm-granite", pairing="adjacent", sinks="all", adjust=divided_logits),
    Arch("afmoe", "hf.co/arcee-ai/Trinity-Mini", gating="sigmoid", adjust=afmoe),
    Arch(
        "cohere2moe", "hf.co/CohereLabs", pairing="adjacent", residual="parallel", gating="sigmoid",
        choice_bias=False, experts_scale=0.5, adjust=cohere2moe,
    ),
    Arch("mellum", "hf.co/JetBrains", adjust=lambda c: unscaled_where_windowed(4, c)),
    Arch("jais2", "hf.co/inceptionai/Jais-2-8B-Chat", act="relu2", gated=False),
    Arch("laguna", "hf.co/poolside", gating="sigmoid", gate_act="softplus", adjust=laguna),
    Arch(
        "jamba", "arXiv:2403.19887", position="none", renormalise=False, mixer=mamba_or_attention,
    ),
    Arch(
        "nemotron_h", "arXiv:2504.03624", position="none", act="relu2", gated=False, ffn=None,
        mixer=mixer_alone,
    ),
    Arch(
        "nemotron_h_moe", "arXiv:2512.20848", position="none", act="relu2", gated=False,
        gating="sigmoid", ffn=None, mixer=mixer_alone,
    ),
    Arch(
        "kimi-linear", "arXiv:2510.26692", needs=HEAD, position="none", mixer=delta_or_latent,
    ),
    Arch(
        "deepseek32", "arXiv:2512.02556", pairing="adjacent", gating="sigmoid",
        renormalise=False, mixer=LatentAttention,
    ),
    Arch(
        "glm-dsa", "hf.co/zai-org/GLM-5", pairing="adjacent", gating="sigmoid",
        renormalise=False, mixer=LatentAttention,
    ),
    Arch("deepseek", "arXiv:2401.06066", pairing="adjacent", renormalise=False),
    Arch(
        "bailingmoe", "arXiv:2503.05139", needs=HEAD, pairing="adjacent", renormalise=False,
        adjust=bailingmoe,
    ),
    Arch("bailingmoe2", "arXiv:2510.22115", needs=HEAD, renormalise=False),
    Arch(
        "deci", "arXiv:2411.19146", pairing="adjacent", halves="file", mixer=attention_or_less,
    ),
    Arch(
        "smallthinker", "arXiv:2507.20984", act="relu", choice_bias=False, routed_by_input=True,
        adjust=smallthinker,
    ),
    Arch("plamo", "hf.co/pfnet/plamo-13b", needs=HEAD, residual="parallel"),
    Arch("plamo3", "hf.co/pfnet/plamo-3-nict-8b-base", adjust=lambda c: plain_where_windowed(every(8, c))),
    Arch("maincoder", "hf.co/Maincode/Maincoder-1B", pairing="adjacent", mixer=NormsBehindRope),
    Arch("pangu-embedded", "arXiv:2505.22375"),
    Arch(
        "plm", "arXiv:2503.12167", pairing="adjacent", act="relu2", gated=False,
        mixer=LatentAttention,
    ),
    Arch("bitnet", "arXiv:2402.17764"),
    Arch(
        "grok", "github.com/xai-org/grok-1", act="gelu_tanh", experts_beside=sqrt(0.5),
        roles={"post_attention_norm": "attn_output_norm", "post_ffw_norm": "layer_output_norm"},
        adjust=grok,
    ),
    Arch("llama-embed", "hf.co/nvidia/llama-embed-nemotron-8b", pairing="adjacent", adjust=both_ways),
    Arch(
        "neo-bert", "arXiv:2502.19587", pairing="adjacent", roles={"output_norm": "enc.output_norm"},
        adjust=both_ways,
    ),
    Arch(
        "jina-bert-v3", "arXiv:2409.10173", needs=EMBD_NORM, act="gelu", gated=False, norm_at="after",
        adjust=both_ways,
    ),
    Arch("eurobert", "arXiv:2503.05500"),
    Arch(
        "t5encoder", "arXiv:1910.10683", position="relative", act="gelu_tanh", ffn=relu_or_gated,
        roles={"output_norm": "enc.output_norm", "attn_output": "attn_o"}, blocks_at="enc.blk",
        adjust=t5_encoder,
    ),
    Arch("nanbeige", "hf.co/Nanbeige", pairing="adjacent", block=LoopBlock, adjust=looped),
    Arch(
        "hrm_text", "arXiv:2506.21734", norm_affine=False, block=RoundsBlock, streams=Rounds,
        adjust=rounds,
    ),
    Arch(
        "mimo2", "hf.co/XiaomiMiMo/MiMo-V2-Flash", needs=HEAD, gating="sigmoid", sinks="file",
        adjust=plain_where_windowed,
    ),
    Arch(
        "step35", "hf.co/stepfun-ai/Step-3.5-Flash", needs=HEAD, gating="sigmoid", adjust=step35,
    ),
    Arch(
        "dots3note", "hf.co/dots-studio/dots3-note-prev", pairing="adjacent", gating="sigmoid",
        renormalise=False, mixer=LatentAttention, adjust=dots3note,
    ),
    Arch("minicpm3", "arXiv:2404.06395", mixer=LatentAttention, adjust=minicpm3),
    Arch(
        "gptj", "github.com/kingoflolz/mesh-transformer-jax", needs=BIASED_HEAD, pairing="adjacent",
        act="gelu_tanh", gated=False, residual="parallel",
    ),
    Arch("seed_oss", "hf.co/ByteDance-Seed/Seed-OSS-36B-Instruct", roles=FFN_NORM),
    Arch("arcee", "hf.co/arcee-ai/AFM-4.5B", pairing="adjacent", act="relu2", gated=False),
    Arch("apertus", "arXiv:2509.14233", gated=False, ffn=XIELU),
    Arch("ernie4_5", "hf.co/baidu/ERNIE-4.5-0.3B-PT", pairing="adjacent"),
    Arch("ernie4_5-moe", "hf.co/baidu/ERNIE-4.5-21B-A3B-PT", pairing="adjacent"),
    Arch("hunyuan-dense", "hf.co/tencent/Hunyuan-7B-Instruct", mixer=NormsBehindRope),
    Arch("hunyuan-moe", "hf.co/tencent/Hunyuan-A13B-Instruct", mixer=NormsBehindRope),
    Arch("dots1", "arXiv:2506.05767", renormalise=False),
    Arch("lfm2", "hf.co/LiquidAI/LFM2-1.2B", roles=LFM2_NORM, mixer=conv_or_attention),
    Arch(
        "lfm2moe", "hf.co/LiquidAI/LFM2-8B-A1B", gating="sigmoid", roles=LFM2_NORM,
        mixer=conv_or_attention,
    ),
    Arch("mamba2", "arXiv:2405.21060", position="none", ffn=None, mixer=Mamba2),
    Arch(
        "granitehybrid", "hf.co/ibm-granite/granite-4.0-h-small", pairing="adjacent",
        mixer=mamba2_or_attention, adjust=granitehybrid,
    ),
    Arch("falcon-h1", "arXiv:2507.22448", mixer=AttentionBesideMamba2),
    Arch(
        "qwen3next", "hf.co/Qwen/Qwen3-Next-80B-A3B-Instruct", roles=FFN_NORM,
        mixer=delta_or_attention,
    ),
    Arch("qwen35", "hf.co/Qwen/Qwen3.5-4B", roles=FFN_NORM, mixer=delta_or_attention),
    Arch("qwen35moe", "hf.co/Qwen/Qwen3.5-35B-A3B", roles=FFN_NORM, mixer=delta_or_attention),
    Arch("gemma-embedding", "arXiv:2509.20354", act="gelu_tanh", adjust=gemma_embedding),
    Arch("mamba", "arXiv:2312.00752", position="none", ffn=None, mixer=Mamba),
    Arch(
        "rwkv6", "arXiv:2404.05892", needs=HEAD + EMBD_NORM, position="none",
        roles={"ffn_norm": "attn_norm_2"}, mixer=TimeMix6, ffn=ChannelMix,
    ),
    Arch(
        "rwkv7", "arXiv:2503.14456", needs=HEAD + EMBD_NORM, position="none",
        roles={"ffn_norm": "attn_norm_2"}, mixer=TimeMix7, ffn=ChannelMix,
    ),
    Arch(
        "rwkv6qwen2", "hf.co/recursal/QRWKV6-32B-Instruct-Preview-v0.1", needs=HEAD, position="none",
        mixer=GatedTimeMix6,
    ),
    Arch(
        "arwkv7", "arXiv:2501.15570", needs=HEAD, position="none", mixer=OptionalTimeMix7,
    ),
    Arch("plamo2", "hf.co/pfnet/plamo-2-8b", mixer=heads_of_mamba_or_attention),
    Arch(
        "bert", "arXiv:1810.04805", needs=EMBD_NORM, position="learned", act="gelu", gated=False,
        norm_at="after",
    ),
    Arch("nomic-bert", "arXiv:2402.01613", needs=EMBD_NORM, norm_at="after"),
    Arch(
        "nomic-bert-moe", "arXiv:2502.07972", needs=EMBD_NORM, act="gelu_tanh", gated=False,
        norm_at="after", renormalise=False,
    ),
    Arch(
        "jina-bert-v2", "arXiv:2310.19923", needs=EMBD_NORM, position="alibi", act="gelu_tanh",
        norm_at="after", adjust=alibi,
    ),
    Arch(
        "modern-bert", "arXiv:2412.13663", needs=EMBD_NORM, norm="layer", act="gelu", adjust=modern_bert,
    ),
)  # fmt: skip
ARCHS = {row.name: row for row in ROWS}


def find(name: str) -> Arch:
    """The row of an architecture's name, as ``general.architecture`` spells it."""
    if name not in ARCHS:
        why = f": {NOT_RUN[name]}" if name in NOT_RUN else ""
        raise UnsupportedModel(
            f"architecture {name!r:.60} is not supported{why}; we run: {', '.join(sorted(ARCHS))}"
        )
    return ARCHS[name]
