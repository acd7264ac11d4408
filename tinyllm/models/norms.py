"""Which norms a layer and the end of a model have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Config
from .weights import Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


def norms_before(
    c: Config, a: Arch, i: int, w: Tensors, ffn: Any
) -> tuple[Norm | None, Norm | None]:
    """The norms that the mixer and the feed-forward half read through."""
    e = c.n_embd
    if a.norm_at != "before":
        return None, None
    if not a.norm_affine:
        bare = Norm(w.be, c.norm, c.norm_eps, None, None)
        return bare, bare
    name = a.roles.get("ffn_norm", "ffn_norm")
    if name == "ffn_norm" and w.has("attn_norm_2.weight"):
        # Falcon 40B: attn_norm is the feed-forward half's
        return w.norm("attn_norm_2", e), w.norm("attn_norm", e)
    # ModernBERT's first layer has no norm: the embeddings are normalised already
    first_of_encoder = i == 0 and not c.causal and c.norm == "layer"
    without = first_of_encoder or not (c.n_head[i] or a.halves == "both")
    attn_norm = w.norm_if("attn_norm", e) if without else w.norm("attn_norm", e)
    if ffn is None or getattr(ffn, "norms_itself", False):
        return attn_norm, None
    optional = a.residual in ("parallel", "norms")
    return attn_norm, (w.norm_if(name, e) if optional else w.norm(name, e))


def norms_after(c: Config, a: Arch, w: Tensors) -> tuple[Norm | None, Norm | None]:
    """The norms of the halves' outputs."""
    e = c.n_embd
    if a.norm_at == "after":
        return w.norm("attn_output_norm", e), w.norm("layer_output_norm", e)
    if a.norm_at == "post":
        return w.norm("post_attention_norm", e), w.norm("post_ffw_norm", e)
    taken = a.roles.get("ffn_norm") == "post_attention_norm"
    attn = (
        None if taken else w.norm_if(a.roles.get("post_attention_norm", "post_attention_norm"), e)
    )
    ffn = a.roles.get("post_ffw_norm", "post_ffw_norm")
    return attn, w.norm_if(ffn, e) or w.norm_if("post_ffw_norm", e)


def output_norm(c: Config, a: Arch, w: Tensors) -> Norm | None:
    """The last norm; post-norm encoders have none, OLMo's has no weights."""
    if a.norm_at == "after":
        return None
    if not a.norm_affine:
        return Norm(w.be, c.norm, c.norm_eps, None, None)
    return w.norm(a.roles.get("output_norm", "output_norm"), c.n_embd)
