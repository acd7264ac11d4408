"""A ``config.json`` that notes what was read of it: what is left and may change the mathematics is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...errors import ArgumentError, UnsupportedModel

# What decides how a model is trained, stored, run or named, or what its tensors show: sizes, biases, experts
HARMLESS = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|initiali[sz]er_.*|.*_token_(?:ids?|index)|use_cache|cache_implementation"
    r"|(?:torch_)?dtype|transformers(?:_|\.js_).*|model_type|architectures|auto_map|(?:id2label|label2id)"
    r"|num_labels|output_(?:attentions|hidden_states|router_logits|past|scores)|return_.*|.*_loss_coef"
    r"|router_jitter_noise|.*z_loss.*|pretraining_tp|summary_.*|task_specific_params|finetuning_task"
    r"|problem_type|tokenizer_class|prefix|torchscript|chunk_size_feed_forward|classifier_.*|pooler_.*"
    r"|directionality|gradient_checkpointing.*|.*flash_att.*|attn_implementation|reference_compile"
    r"|fused_.*|use_xentropy|dense_seq_output|pad_vocab_size_multiple|matryoshka.*|sparse_pred.*"
    r"|repad_logits.*|is_llama_config|unsloth_.*|use_mrope|text_config|.*vision.*|.*audio.*|mm_.*"
    r"|time_step_.*|rescale_prenorm_residual|residual_in_fp32|use_mambapy|use_associative_scan|ssm_cfg"
    r"|reorder_and_upcast_attn|(?:n|num)_(?:ctx|positions)|max_(?:length|position_embeddings|trained_positions)|vocab_size.*"
    r"|bias|use_(?:conv_)?bias|(?:attention|mlp|qkv|qkv_proj|norm|decoder|mlp_fc[12])_bias|expand"
    r"|num_.*|n_.*|.*(?:hidden|intermediate|vocab|state)_size|head_dim|attention_k_eq_v|enable_moe_block|mlp_only_layers"
    r"|decoder_sparse_step|global_head_dim|per_layer_config|d_.*|do_sample|temperature|top_[kp]|num_beams"
)
# Values with which a key that we do not read says what all models do
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "scale_attn_weights": (True,),
    "parallel_attn": (True,),
    "rms_norm": (True,),
    "position_embedding_type": ("absolute", "rope"),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": ("vision",),  # only places of an image see ahead
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
UNITS = re.compile(r".*(?:multiplier|factor|scale|scaling)")  # 1 multiplies nothing
ACTS = ("hidden_act", "hidden_activation", "activation_function", "activation")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")


class Settings(Mapping[str, Any]):
    """The values of a ``config.json``; the names that are asked for are noted, also in what is made of it."""

    def __init__(self, values: Mapping[str, Any], read: set[str] | None = None) -> None:
        self.values_by_name = dict(values)
        self.read: set[str] = set() if read is None else read
        self.last = ""  # the value that was asked for last, for errors about it

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        value = self.values_by_name[name]
        if value is not None:
            self.last = f"{name} = {value!r:.40}"
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __or__(self, changes: Mapping[str, Any]) -> Settings:
        """Make a copy with other values for some names."""
        return Settings({**self.values_by_name, **changes}, self.read)

    def check_read(self, arch: str, ignored: Collection[str] = ()) -> None:
        """UnsupportedModel for a key that was not asked for and may change what the model computes."""
        for name, value in self.values_by_name.items():
            if name in self.read or name in ignored or HARMLESS.fullmatch(name):
                continue
            if value in (None, False, "", [], {}, *NEUTRAL.get(name, ())):
                continue
            if UNITS.fullmatch(name) and value == 1:
                continue
            if name == "layer_types" and set(value) == {"full_attention"}:
                continue
            expected = " or ".join(repr(v) for v in (*NEUTRAL.get(name, ()), None))
            raise UnsupportedModel(
                f"config.json: {name} = {value!r:.60} may change what the model computes, and {arch} has no "
                f"place for it; expected {expected}. If it changes nothing, take it out of config.json"
            )


def check_activation(c: Settings, known: str) -> str | None:
    """Check that a model's activation is the one that its kind has.

    Returns
    -------
    str or None
        What to warn of: another form of the same function, which differs by a thousandth.

    Raises
    ------
    UnsupportedModel
        It is another one.
    """
    for name in ACTS:
        value = c.get(name)
        if value is None or value == known or {value, known} <= {"silu", "swish"}:
            continue
        if known in TANH and value in TANH:
            continue
        message = f"config.json: {name} = {value!r:.40}; models of this kind have {known!r}"
        if known.startswith("gelu") and str(value).startswith("gelu"):
            return f"{message}, which is computed: values differ by some thousandths"
        raise UnsupportedModel(f"{message}. No other is converted")
    return None


def check_rotation(given: Mapping[str, Any], arch: str) -> None:
    """Check that all that config.json says of the rotation is what we know.

    Raises
    ------
    UnsupportedModel
        A name is unknown, or its value is.
    """
    known = {
        "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
        "attn_factor", "beta_fast", "beta_slow", "extrapolation_factor", "low_freq_factor", "mscale",
        "high_freq_factor", "short_factor", "long_factor", "mscale_all_dim", "partial_rotary_factor",
        "max_position_embeddings", "finetuned",
    }  # fmt: skip
    kind = str(given.get("rope_type", given.get("type", "default"))).lower()
    turning = arch in ("phi3", "gptneox", "gemma4")
    for name, value in given.items():
        if name not in known and not (name == "truncate" and value) and value is not None:
            raise UnsupportedModel(
                f"config.json: the rotation's {name} = {value!r:.60} is none that we know"
            )
    if not turning and given.get("partial_rotary_factor", 1.0) != 1:
        raise UnsupportedModel(
            f"config.json: partial_rotary_factor = {given['partial_rotary_factor']!r:.40}; heads of {arch} "
            "turn as a whole"
        )
    if kind in ("su", "longrope") and not (arch == "phi3" and given.get("long_factor")):
        raise UnsupportedModel(
            f"config.json: the rotation is scaled by {kind!r}, which {arch} has no tables for; phi3 has"
        )
    factor = given.get("factor")
    if factor is not None and not (isinstance(factor, int | float) and factor >= 1):
        raise ArgumentError(
            f"config.json: the rotation's factor is {factor!r:.40}; expected a number from 1"
        )
