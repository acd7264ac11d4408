"""What a file's sizes and keys imply: functions of Config that rows of the table name, each with its reason."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

from ..errors import GGUFError
from .config import Config, Temperature, repeated

CHUNK = 8192  # positions that layers of Llama 4 see of their own chunk, in all its files


def scaled_embedding(c: Config) -> Config:
    """Scale embeddings by the root of their length, as Gemma does."""
    return replace(c, embedding_scale=sqrt(c.n_embd))


def every(n: int, c: Config, first: bool = False) -> Config:
    """Layers see a window, but the last (or ``first``) of n sees everything; the file's number comes first.

    Where the file says it of each layer, that stands; a number of 0 says that all see a window.
    """
    windowed = c.windowed
    if not c.window_listed:
        n = n if c.window_pattern < 0 else c.window_pattern
        full = {0 if first else n - 1} if n else set()
        windowed = tuple(not n or i % n not in full for i in range(c.n_layer))
    window = tuple(c.window_size if w else 0 for w in windowed)
    return replace(c, window=window, windowed=windowed, window_listed=True)


def every_dense_first(n: int, c: Config) -> Config:
    return every(n, c, first=True)


def scale_by_width(c: Config, n_layer: int) -> Config:
    """The 27B models scale scores by n_embd / n_head; the file does not say so, only its depth tells."""
    return replace(c, attn_scale=sqrt(c.n_head[0] / c.n_embd)) if c.n_layer == n_layer else c


def gemma2(c: Config) -> Config:
    """Windows are those of 4096 where the file does not say how wide."""
    if not c.window_size and not c.has_no_window:
        c = replace(c, window_size=4096)
    return scale_by_width(every(2, scaled_embedding(c)), 46)


def gemma3(c: Config) -> Config:
    return plain_where_windowed(scale_by_width(every(6, scaled_embedding(c)), 62))


def plain_where_windowed(c: Config) -> Config:
    """Layers with a window rotate unscaled, by a base of 10000 where the file gives them none."""
    return replace(c, rope_freq_base_swa=c.rope_freq_base_swa or 10000.0, rope_scaling_swa=False)


def rope_where_windowed(c: Config) -> Config:
    """Layers that see everything have no rotary embedding."""
    return replace(c, rope_on=c.windowed)


def cohere2(c: Config) -> Config:
    return rope_where_windowed(every(4, with_window(c)))


def exaone4(c: Config) -> Config:
    """Layers that see everything have no rotary embedding, in models that have windows at all."""
    c = every(4, c)
    return rope_where_windowed(c) if c.window_size else c


def with_window(c: Config) -> Config:
    """The file must say how wide a window is."""
    if not c.window_size and not c.has_no_window:
        raise GGUFError("required key is missing", name=f"{c.arch}.attention.sliding_window")
    return c


def olmo2(c: Config) -> Config:
    return replace(every(4, c), rope_scaling_swa=False)


def smollm3(c: Config) -> Config:
    """Leave the rotary embedding out of every fourth layer."""
    return replace(c, rope_on=tuple((i + 1) % 4 != 0 for i in range(c.n_layer)))


def no_window(c: Config) -> Config:
    """Drop the window, which files carry that do not mean it; those that list the layers with one do."""
    return c if c.window_listed else replace(c, window=(0,) * c.n_layer)


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
    """Every fourth layer does not rotate, and its queries grow; a window of 0 says otherwise.

    Layers see their own chunk of 8192 positions, but every fourth, or those that the file names, everything.
    """
    if c.has_no_window:
        return c
    still = tuple((i + 1) % 4 == 0 for i in range(c.n_layer))
    c = every(4, replace(c, window_size=-CHUNK))
    heat = Temperature(0.1, CHUNK, 1.0)
    return replace(c, rope_on=tuple(not s for s in still), heated=still, temperature=heat)


def afmoe(c: Config) -> Config:
    return rope_where_windowed(every(4, scaled_embedding(c)))


def cohere2moe(c: Config) -> Config:
    """Leading layers without experts rotate whatever they see."""
    c = rope_where_windowed(every_dense_first(4, with_window(c)))
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
    c = every_dense_first(4, c)
    return rope_where_windowed(c) if c.window_size else c


def plamo3(c: Config) -> Config:
    return plain_where_windowed(every(8, c))


def both_ways(c: Config) -> Config:
    return replace(c, causal=False)


def t5_encoder(c: Config) -> Config:
    """Scores are not scaled."""
    return replace(c, causal=False, attn_scale=1.0)


def t5(c: Config) -> Config:
    """Scores are not scaled; the layers that write are as those that read, but for their number."""
    if c.start_id < 0:
        raise GGUFError("required key is missing", name=f"{c.arch}.decoder_start_token_id")
    n = c.n_layer_written or c.n_layer
    c = repeated(c, tuple(i % c.n_layer for i in range(n)))
    return replace(c, attn_scale=1.0, blocks=tuple(range(n)))


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


def granitehybrid(c: Config) -> Config:
    """Let attention layers rotate only where the file says so."""
    return replace(divided_logits(c), rope_on=(c.rope_finetuned,) * c.n_layer)


def gemma_embedding(c: Config) -> Config:
    return replace(gemma3(c), causal=False)
