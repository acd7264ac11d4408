"""Which tensor of a model gets which type when a file is quantised.

A mixture has a type for most matrices and a better one for those that suffer most: the output,
the value projections, the last matrix of a feed-forward network, and all of these in the first
and last layers. The rules are those of llama.cpp's `llama-quant.cpp`, less its exceptions for
the Falcon architecture and for 70B models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import ArgumentError
from .quants import FORMATS


class Place(NamedTuple):
    """Where a tensor stands in its model; rules choose a type by this."""

    layer: int  # for a value projection, its number among them
    n_layer: int
    n_gqa: int  # query heads that share a key head
    n_expert: int
    important: bool = False  # is there an importance matrix?


Rule = Callable[[Place], str | None]  # -> a type, or None for the mixture's base


def _always(kind: str) -> Rule:
    return lambda at: kind


def _often(kind: str) -> Rule:
    """A rule for the first and the last eighth of the layers, and for every third one between."""

    def rule(at: Place) -> str | None:
        first = at.n_layer // 8
        ends = at.layer < first or at.layer >= 7 * at.n_layer // 8
        return kind if ends or (at.layer - first) % 3 == 2 else None

    return rule


def _first(count: int, kind: str, then: str | None = None) -> Rule:
    return lambda at: kind if at.layer < count else then


def _first_part(divisor: int, kind: str, then: str | None = None) -> Rule:
    """A rule for the first n_layer / divisor layers."""
    return lambda at: kind if at.layer < at.n_layer // divisor else then


def _shared(kind: str, otherwise: str | None = None) -> Rule:
    """A rule for four or more query heads to a value head, which makes it small and precious."""
    return lambda at: kind if at.n_gqa >= 4 else otherwise


def _unless_important(rule: Rule) -> Rule:
    """A rule for files that are made without an importance matrix."""
    return lambda at: None if at.important else rule(at)


def _for_experts(kind: str, otherwise: str | None = None) -> Rule:
    """A rule for models of eight experts, beside which attention is small."""
    return lambda at: kind if at.n_expert == 8 else otherwise


def _value(otherwise: str) -> Rule:
    """The smallest mixtures' rule for value projections."""
    return lambda at: "Q4_K" if at.n_gqa >= 4 or at.n_expert >= 4 else otherwise


def _middle(kind: str) -> Rule:
    """A rule for all layers but the first and the last eighth."""
    return lambda at: kind if at.n_layer // 8 <= at.layer < 7 * at.n_layer // 8 else None


def _smallest(small: str, embedding: str, output: str | None) -> dict[str, Rule]:
    """The rules of the mixtures of one and two bits."""
    return {
        "attn_v": _value(small),
        "attn_k": _for_experts("Q4_K"),
        "ffn_down": _first_part(8, small),
        "attn_output": _for_experts("Q5_K", output),
        "token_embd": _always(embedding),
        "output": _always("Q5_K"),
    }


def _down_iq3_m(at: Place) -> str | None:
    often = at.n_expert == 8 and _often("Q4_K")(at)
    return "Q4_K" if at.layer < at.n_layer // 8 or often else None


@dataclass(frozen=True)
class Mixture:
    """A recipe for a whole file.

    Attributes
    ----------
    base : str
        The type of all matrices without a rule.
    file_type : int
        What ``general.file_type`` says.
    rules : Mapping
        By role, as `_role` names them.
    """

    base: str
    file_type: int
    rules: Mapping[str, Rule] = field(default_factory=dict)


MIXTURES: dict[str, Mixture] = {
    "F32": Mixture("F32", 0),
    "F16": Mixture("F16", 1),
    "BF16": Mixture("BF16", 32),
    "Q4_0": Mixture("Q4_0", 2, {"ffn_down": lambda at: _first_part(8, "Q4_1")(at) if at.important else None}),
    "Q4_1": Mixture("Q4_1", 3),
    "Q5_0": Mixture("Q5_0", 8, {"ffn_down": lambda at: _first_part(8, "Q5_1")(at) if at.important else None}),
    "Q5_1": Mixture("Q5_1", 9),
    "Q8_0": Mixture("Q8_0", 7),
    "Q2_K": Mixture(
        "Q2_K",
        10,
        {
            "attn_v": _shared("Q4_K", otherwise="Q3_K"),
            "ffn_down": _always("Q3_K"),
            "attn_output": _always("Q3_K"),
        },
    ),
    "Q2_K_S": Mixture(
        "Q2_K", 21, {"attn_v": _shared("Q4_K"), "ffn_down": _first_part(8, "Q4_K")}
    ),
    "Q3_K_S": Mixture("Q3_K", 11),
    "Q3_K_M": Mixture(
        "Q3_K",
        12,
        {
            "attn_v": _first(2, "Q5_K", then="Q4_K"),
            "ffn_down": _first_part(16, "Q5_K", then="Q4_K"),
            "attn_output": _always("Q4_K"),
        },
    ),
    "Q3_K_L": Mixture(
        "Q3_K", 13, dict.fromkeys(("attn_v", "ffn_down", "attn_output"), _always("Q5_K"))
    ),
    "Q4_K_S": Mixture(
        "Q4_K", 14, {"attn_v": _first(4, "Q5_K"), "ffn_down": _first_part(8, "Q5_K")}
    ),
    "Q4_K_M": Mixture("Q4_K", 15, {"attn_v": _often("Q6_K"), "ffn_down": _often("Q6_K")}),
    "Q5_K_S": Mixture("Q5_K", 16),
    "Q5_K_M": Mixture("Q5_K", 17, {"attn_v": _often("Q6_K"), "ffn_down": _often("Q6_K")}),
    "Q6_K": Mixture("Q6_K", 18),
    "IQ1_S": Mixture("IQ1_S", 24, _smallest("Q2_K", "Q2_K", "IQ2_XXS")),
    "IQ1_M": Mixture("IQ1_M", 31, _smallest("Q2_K", "Q2_K", "IQ2_XXS")),
    "IQ2_XXS": Mixture("IQ2_XXS", 19, _smallest("Q2_K", "Q2_K", None)),
    "IQ2_XS": Mixture("IQ2_XS", 20, _smallest("Q2_K", "Q2_K", None)),
    "IQ2_S": Mixture("IQ2_XS", 28, _smallest("IQ3_S", "IQ3_S", "IQ3_S")),
    "IQ2_M": Mixture("IQ2_S", 29, _smallest("IQ3_S", "IQ3_S", "IQ3_S")),
    "IQ3_XXS": Mixture("IQ3_XXS", 23, {
        "attn_v": lambda at: "Q4_K" if at.n_gqa >= 4 else None if at.important else "IQ3_S",
        "attn_q": _always("IQ2_S"),
        "attn_k": _always("IQ2_S"),
        "ffn_down": _unless_important(_first_part(8, "Q4_K", then="Q3_K")),
        "attn_output": _always("IQ3_S"),
        "token_embd": _always("IQ3_S"),
        "output": _always("Q5_K"),
    }),
    "IQ3_XS": Mixture("IQ3_S", 22, {
        "attn_v": _shared("Q4_K"), "attn_q": _always("IQ3_XXS"), "attn_k": _always("IQ3_XXS"),
        "ffn_gate": _middle("IQ3_XXS"), "ffn_up": _middle("IQ3_XXS"),
    }),
    "IQ3_S": Mixture("IQ3_S", 26, {"attn_v": _shared("Q4_K")}),
    "IQ3_M": Mixture("IQ3_S", 27, {
        "attn_v": _always("Q4_K"), "ffn_down": _down_iq3_m, "attn_output": _always("Q4_K"),
    }),
    **{
        kind: Mixture(kind, number, {
            "attn_v": _shared("Q5_K"), "ffn_down": _unless_important(_first_part(8, "Q5_K")),
        })
        for kind, number in (("IQ4_NL", 25), ("IQ4_XS", 30))
    },
    "TQ1_0": Mixture("TQ1_0", 36, {"token_embd": _always("Q4_K")}),
    "TQ2_0": Mixture("TQ2_0", 37, {"token_embd": _always("Q4_K")}),
    "MXFP4_MOE": Mixture("Q8_0", 38, {"experts": _always("MXFP4")}),
    "NVFP4": Mixture("NVFP4", 39),
    "Q1_0": Mixture("Q1_0", 40),
    "Q2_0": Mixture("Q2_0", 41, {"token_embd": _always("Q4_K")}),
}  # fmt: skip

# for rows that are no whole blocks of the type: one of similar size with smaller blocks
SMALLER_BLOCKS = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "NVFP4"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

_SMALL = ("Q2_K", "Q3_K", "Q4_K", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS")
_SMALLEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")

# names that hold one of these stay as they are: small, or used as tables and filters
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "position_embd",
    "token_types",
    "ssm_conv1d",
    "shortconv.conv",
    "attn_rel_b",
    *("altup", "laurel", "per_layer_model_proj"),
    *(f"time_mix_{x}.weight" for x in ("first", "decay_w1", "decay_w2", "lerp_fused")),
    *(f"time_mix_{x}.weight" for x in "w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2".split()),
)

_ROLES = {  # part of a name -> role; the first that fits
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_down": "ffn_down",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
}


def plan(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    mixture: str,
    important: bool = False,
) -> dict[str, str]:
    """Choose the type of every matrix of a model.

    Parameters
    ----------
    metadata : Mapping
        The file's: its architecture, and its numbers of layers, heads and experts, are read.
    shapes : Mapping
        The shape in NumPy order of each tensor, by name, in the order of the file.
    mixture : str
        A key of `MIXTURES`.
    important : bool
        Whether an importance matrix is there, with which some matrices do with fewer bits.

    Returns
    -------
    dict
        Name -> type. Tensors that are not mentioned keep theirs: vectors, norms, routers and
        the like.

    Raises
    ------
    ArgumentError
        For an unknown mixture.
    """
    if mixture not in MIXTURES:
        raise ArgumentError(f"no mixture {mixture!r}; there are {', '.join(MIXTURES)}")
    recipe = MIXTURES[mixture]
    matrices = {name: shape for name, shape in shapes.items() if is_matrix(name, shape)}
    if FORMATS[recipe.base].int8_form is None:
        return dict.fromkeys(matrices, recipe.base)
    values = sorted((n for n in matrices if _role(n, shapes) == "attn_v"), key=_layer)
    model = _model(metadata)._replace(important=important)
    types = {}
    for name, shape in matrices.items():
        at = model._replace(layer=_layer(name))
        if name in values:
            at = model._replace(layer=values.index(name), n_layer=len(values))
        types[name] = _fitting(_chosen(recipe, _role(name, shapes), at, shape), shape[-1])
    return types


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantised at all."""
    kept = any(part in name for part in _KEPT)
    return math.prod(shape[:-1]) > 1 and name.endswith("weight") and not kept


def _layer(name: str) -> int:
    """The number in ``blk.3.attn_v.weight``; 0 for tensors outside of layers."""
    parts = name.removeprefix("enc.").split(".")
    return int(parts[1]) if len(parts) > 2 and parts[1].isdecimal() else 0


def _model(metadata: Mapping[str, Any]) -> Place:
    def number(key: str, default: int) -> int:
        value = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
        return int(value[0] if hasattr(value, "__len__") else value)

    n_head = number("attention.head_count", 1)
    n_gqa = n_head // max(number("attention.head_count_kv", n_head), 1)
    return Place(0, number("block_count", 1), n_gqa, number("expert_count", 0))


def _role(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a tensor does; embeddings without an output of their own are the output too."""
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd" if "output.weight" in shapes else "output"
    if name == "output.weight":
        return "output"
    return next((role for part, role in _ROLES.items() if part in name), "other")


def _chosen(recipe: Mixture, role: str, at: Place, shape: tuple[int, ...]) -> str:
    if role == "output":
        whole = shape[-1] % FORMATS[recipe.base].block_size == 0
        rule = recipe.rules.get("output")
        return ((rule and rule(at)) or "Q6_K") if whole and recipe.base != "Q8_0" else "Q8_0"
    small = recipe.base in _SMALLEST
    if at.n_expert == 8 and role in ("attn_v", "attn_k") and not small:  # small beside the experts
        return "Q8_0"
    if at.n_expert == 8 and role == "attn_output" and recipe.base in _SMALL:
        return "Q5_K"
    if len(shape) > 2 and "experts" in recipe.rules:
        role = "experts"
    rule = recipe.rules.get(role)
    return (rule and rule(at)) or recipe.base


def _fitting(kind: str, n: int) -> str:
    """The type, or one that can hold rows of n weights."""
    for fit in (kind, SMALLER_BLOCKS.get(kind, kind)):
        if n % FORMATS[fit].block_size == 0:
            return fit
    return "F16"
