"""THE TABLE: one row per architecture, with only what neither the tensors nor the keys of a file say.

The order of authority is: the tensors that are there, then the metadata keys, then the row. A fact
that needs the file's sizes is a function of Config in adjust.py, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, Literal

from ..errors import UnsupportedModel
from ..kernels.backend import Activation, Pairing
from . import adjust
from .altup import AltUpBlock, SparseFFN, Streams
from .attention import Attention, BareNormsBehindRope, NormsBehindRope
from .config import Config
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
    reader: str = ""  # the row of the stack that reads a text before this one writes about it
    tied_scale: bool = False  # logits by the embedding are multiplied by n_embd ** -0.5


FFN_NORM = {"ffn_norm": "post_attention_norm"}
LFM2_NORM = {"output_norm": "token_embd_norm"}


def relu_or_gated(c: Config, a: Arch, i: int, w: Tensors) -> FFN:
    """Make the feed-forward half: the first T5 has plain ones, with another activation, in all layers."""
    plain = replace(a, gated=False, act="relu")
    gated = any(name.endswith(".ffn_gate.weight") for name in w.tensors)
    return FFN(c, a if gated else plain, w, c.n_ff[i])


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
    Arch("baichuan", "arXiv:2309.10305", needs=HEAD, pairing="adjacent", adjust=adjust.baichuan),
    Arch("internlm2", "arXiv:2403.17297", needs=HEAD, pairing="adjacent"),
    Arch("xverse", "github.com/xverse-ai/XVERSE-13B", needs=HEAD, pairing="adjacent"),
    Arch("minicpm", "arXiv:2404.06395", pairing="adjacent", adjust=adjust.divided_logits),
    Arch("granite", "hf.co/ibm-granite", pairing="adjacent", adjust=adjust.divided_logits),
    Arch("granitemoe", "hf.co/ibm-granite", pairing="adjacent", adjust=adjust.divided_logits),
    Arch("smollm3", "hf.co/blog/smollm3", pairing="adjacent", adjust=adjust.smollm3),
    Arch("olmo", "arXiv:2402.00838", pairing="adjacent", norm_affine=False),
    Arch("olmo2", "arXiv:2501.00656", norm_at="post", adjust=adjust.olmo2),
    Arch("olmoe", "arXiv:2409.02060", needs=HEAD, renormalise=False),
    Arch("command-r", "hf.co/CohereForAI", pairing="adjacent", residual="parallel"),
    Arch("cohere2", "arXiv:2504.00698", pairing="adjacent", residual="parallel", adjust=adjust.cohere2),
    Arch("chatglm", "arXiv:2406.12793", pairing="adjacent"),
    Arch("glm4", "hf.co/THUDM/GLM-4-9B-0414", pairing="adjacent"),
    Arch("qwen", "arXiv:2309.16609", needs=HEAD, adjust=adjust.half_ff),
    Arch("qwen2", "arXiv:2407.10671"),
    Arch("qwen2moe", "arXiv:2407.10671", needs=HEAD, renormalise=False),
    Arch("qwen3", "arXiv:2505.09388"),
    Arch("qwen3moe", "arXiv:2505.09388"),
    Arch("grovemoe", "arXiv:2508.07785"),
    Arch("phi3", "arXiv:2404.14219", adjust=adjust.no_window),
    Arch("phimoe", "arXiv:2404.14219", needs=BIASED_HEAD, adjust=adjust.no_window),
    Arch(
        "phi2", "hf.co/microsoft/phi-2", needs=BIASED_HEAD, act="gelu_tanh", gated=False,
        residual="parallel",
    ),
    Arch("gemma", "arXiv:2403.08295", act="gelu_tanh", adjust=adjust.scaled_embedding),
    Arch("gemma2", "arXiv:2408.00118", act="gelu_tanh", adjust=adjust.gemma2),
    Arch("gemma3", "arXiv:2503.19786", act="gelu_tanh", adjust=adjust.gemma3),
    Arch(
        "gemma4", "hf.co/google/gemma-4-E2B-it", act="gelu_tanh", v_norm=True, values_from_keys=True,
        adjust=adjust.gemma3n,
    ),
    Arch(
        "gemma3n", "hf.co/google/gemma-3n-E2B-it", act="gelu_tanh", v_norm=True, ffn=SparseFFN,
        block=AltUpBlock, streams=Streams, adjust=adjust.gemma3n,
    ),
    Arch("stablelm", "arXiv:2402.17834", needs=HEAD, residual="norms"),
    Arch("orion", "arXiv:2401.12246", needs=HEAD),
    Arch("openelm", "arXiv:2404.14619"),
    Arch("exaone", "arXiv:2408.03541", norm="rms"),
    Arch("exaone4", "arXiv:2507.11407", norm_at="post", adjust=adjust.exaone4),
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
        gated=False, adjust=adjust.alibi,
    ),
    Arch("mpt", "hf.co/mosaicml/mpt-7b", position="alibi", act="gelu", gated=False),
    Arch("refact", "hf.co/smallcloudai", position="alibi", adjust=adjust.alibi),
    Arch("jais", "arXiv:2308.16149", needs=HEAD, position="alibi", adjust=adjust.jais),
    Arch(
        "gpt-oss", "arXiv:2508.10925", needs=HEAD, act="swiglu_oai", gating="softmax_selected",
        sinks="all", roles=FFN_NORM, adjust=lambda c: adjust.every(2, c),
    ),
    Arch("dbrx", "hf.co/databricks/dbrx-base", needs=HEAD, roles={"ffn_norm": "attn_output_norm"}),
    Arch("arctic", "hf.co/Snowflake/snowflake-arctic-instruct", pairing="adjacent"),
    Arch("deepseek2", "arXiv:2405.04434", pairing="adjacent", renormalise=False, mixer=LatentAttention),
    Arch(
        "mistral3", "hf.co/mistralai/Ministral-3-8B-Instruct-2512", pairing="adjacent",
        adjust=adjust.mistral3,
    ),
    Arch(
        "mistral4", "hf.co/mistralai/Mistral-Small-4-119B-2603", pairing="adjacent",
        mixer=LatentAttention,
    ),
    Arch(
        "llama4", "hf.co/meta-llama/Llama-4-Scout-17B-16E", pairing="adjacent", gating="sigmoid",
        renormalise=False, weigh_inputs=True, mixer=BareNormsBehindRope, adjust=adjust.llama4,
    ),
    Arch("glm4moe", "arXiv:2508.06471", gating="sigmoid", roles=FFN_NORM),
    Arch("qwen2vl", "arXiv:2409.12191"),
    Arch("qwen3vl", "hf.co/Qwen/Qwen3-VL-8B-Instruct"),
    Arch("qwen3vlmoe", "hf.co/Qwen/Qwen3-VL-30B-A3B-Instruct"),
    Arch("minimax-m2", "hf.co/MiniMaxAI/MiniMax-M2", needs=HEAD, gating="sigmoid"),
    Arch("exaone-moe", "hf.co/LGAI-EXAONE/K-EXAONE-236B-A23B", gating="sigmoid", adjust=adjust.exaone4),
    Arch("granite_swa", "hf.co/ibm-granite", pairing="adjacent", sinks="all", adjust=adjust.divided_logits),
    Arch("afmoe", "hf.co/arcee-ai/Trinity-Mini", gating="sigmoid", adjust=adjust.afmoe),
    Arch(
        "cohere2moe", "hf.co/CohereLabs", pairing="adjacent", residual="parallel", gating="sigmoid",
        choice_bias=False, experts_scale=0.5, adjust=adjust.cohere2moe,
    ),
    Arch("mellum", "hf.co/JetBrains", adjust=lambda c: adjust.unscaled_where_windowed(4, c)),
    Arch("jais2", "hf.co/inceptionai/Jais-2-8B-Chat", act="relu2", gated=False),
    Arch("laguna", "hf.co/poolside", gating="sigmoid", gate_act="softplus", adjust=adjust.laguna),
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
        adjust=adjust.bailingmoe,
    ),
    Arch("bailingmoe2", "arXiv:2510.22115", needs=HEAD, renormalise=False),
    Arch(
        "deci", "arXiv:2411.19146", pairing="adjacent", halves="file", mixer=attention_or_less,
    ),
    Arch(
        "smallthinker", "arXiv:2507.20984", act="relu", choice_bias=False, routed_by_input=True,
        adjust=adjust.smallthinker,
    ),
    Arch("plamo", "hf.co/pfnet/plamo-13b", needs=HEAD, residual="parallel"),
    Arch("plamo3", "hf.co/pfnet/plamo-3-nict-8b-base", adjust=adjust.plamo3),
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
        adjust=adjust.grok,
    ),
    Arch("llama-embed", "hf.co/nvidia/llama-embed-nemotron-8b", pairing="adjacent", adjust=adjust.both_ways),
    Arch(
        "neo-bert", "arXiv:2502.19587", pairing="adjacent", roles={"output_norm": "enc.output_norm"},
        adjust=adjust.both_ways,
    ),
    Arch(
        "jina-bert-v3", "arXiv:2409.10173", needs=EMBD_NORM, act="gelu", gated=False, norm_at="after",
        adjust=adjust.both_ways,
    ),
    Arch("eurobert", "arXiv:2503.05500"),
    Arch(
        "t5encoder", "arXiv:1910.10683", position="relative", act="gelu_tanh", ffn=relu_or_gated,
        roles={"output_norm": "enc.output_norm", "attn_output": "attn_o"}, blocks_at="enc.blk",
        adjust=adjust.t5_encoder,
    ),
    Arch(
        "t5", "arXiv:1910.10683", position="relative", act="gelu_tanh", ffn=relu_or_gated,
        roles={"output_norm": "dec.output_norm", "attn_output": "attn_o"}, blocks_at="dec.blk",
        reader="t5encoder", tied_scale=True, adjust=adjust.t5,
    ),
    Arch("nanbeige", "hf.co/Nanbeige", pairing="adjacent", block=LoopBlock, adjust=adjust.looped),
    Arch(
        "hrm_text", "arXiv:2506.21734", norm_affine=False, block=RoundsBlock, streams=Rounds,
        adjust=adjust.rounds,
    ),
    Arch(
        "mimo2", "hf.co/XiaomiMiMo/MiMo-V2-Flash", needs=HEAD, gating="sigmoid", sinks="file",
        adjust=adjust.plain_where_windowed,
    ),
    Arch(
        "step35", "hf.co/stepfun-ai/Step-3.5-Flash", needs=HEAD, gating="sigmoid", adjust=adjust.step35,
    ),
    Arch(
        "dots3note", "hf.co/dots-studio/dots3-note-prev", pairing="adjacent", gating="sigmoid",
        renormalise=False, mixer=LatentAttention, adjust=adjust.dots3note,
    ),
    Arch("minicpm3", "arXiv:2404.06395", mixer=LatentAttention, adjust=adjust.minicpm3),
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
        mixer=mamba2_or_attention, adjust=adjust.granitehybrid,
    ),
    Arch("falcon-h1", "arXiv:2507.22448", mixer=AttentionBesideMamba2),
    Arch(
        "qwen3next", "hf.co/Qwen/Qwen3-Next-80B-A3B-Instruct", roles=FFN_NORM,
        mixer=delta_or_attention,
    ),
    Arch("qwen35", "hf.co/Qwen/Qwen3.5-4B", roles=FFN_NORM, mixer=delta_or_attention),
    Arch("qwen35moe", "hf.co/Qwen/Qwen3.5-35B-A3B", roles=FFN_NORM, mixer=delta_or_attention),
    Arch("gemma-embedding", "arXiv:2509.20354", act="gelu_tanh", adjust=adjust.gemma_embedding),
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
        norm_at="after", adjust=adjust.alibi,
    ),
    Arch(
        "modern-bert", "arXiv:2412.13663", needs=EMBD_NORM, norm="layer", act="gelu", adjust=adjust.modern_bert,
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
