"""The points of a pass at which activations can be seen and replaced, and the names people give them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import ArgumentError
from ..models.step import ACTIVE, Hook

if TYPE_CHECKING:
    from ..models.network import Network

Names: TypeAlias = (
    "str | tuple[str, int] | Iterable[str | tuple[str, int]] | Callable[[str], bool] | None"
)

SQUARE = frozenset({"attn_scores", "attn_probs"})  # [H, T, S], for each sequence in turn
# only rows whose logits are wanted
BEHIND = frozenset({"output_norm_scale", "output_norm", "logits"})
COSTLY = SQUARE | {"attn_result", "logits"}  # not kept unless named
READ = 3  # tokens that are read to learn the points of a model

MEANINGS = {
    "embd": "the residual stream before the first layer",
    "attn_norm": "what attention, or the recurrence, reads",
    "attn_norm_scale": "the magnitude that the norm before it divides each row by",
    "q_proj": "queries as they are projected, before norms and rotation; heads side by side",
    "k_proj": "keys as they are projected",
    "q": "queries as they are compared with keys",
    "k": "keys as they are stored",
    "v": "values as they are stored",
    "attn_scores": "products of queries and keys before the softmax, S positions for each of T rows",
    "attn_probs": "the softmax of the scores: how much each of T rows takes of each of S positions",
    "attn_heads": "what the heads read, side by side, before the output matrix",
    "attn_result": "what each head adds to the attention's output",
    "attn_out": "the output of attention, or of the recurrence",
    "attn_post": "that output behind its norm: what is added to the residual stream",
    "resid_mid": "the residual stream between the two halves of the layer",
    "ffn_norm": "what the feed-forward half reads",
    "ffn_norm_scale": "the magnitude that the norm before it divides each row by",
    "ffn_act": "the feed-forward neurons: what the down projection reads",
    "ffn_act_exps": "the neurons of each chosen expert",
    "ffn_act_chexps": "the neurons of the small expert that each chosen one has in common with others",
    "ffn_act_shexp": "the neurons of the expert that all tokens share",
    "ffn_out": "the output of the feed-forward half",
    "ffn_post": "that output behind its norm: what is added to the residual stream",
    "router_logits": "the router's logit of each expert",
    "router_probs": "the weight of each expert in the sum; 0 for those not chosen",
    "rate": "how much of a row goes into the recurrent state",
    "decay": "what share of the recurrent state stays from row to row",
    "state": "the recurrent state after the last row",
    "gate": "what the recurrence's output is multiplied by, before its activation function",
    "per_layer": "what the layer's own embedding of each token adds, or adds to the other streams",
    "out": "the residual stream after the layer",
    "output_norm": "what the head reads",
    "output_norm_scale": "the magnitude that the last norm divides each row by",
    "logits": "the logits",
}
# TransformerLens' names below "blocks.{i}."; the first of ours that a model has
LENS_NAMES = {
    "hook_resid_mid": ("resid_mid",),
    "hook_resid_post": ("out",),
    "ln1.hook_scale": ("attn_norm_scale",),
    "attn.hook_q": ("q_proj",),
    "attn.hook_k": ("k_proj",),
    "attn.hook_v": ("v",),
    "attn.hook_rot_q": ("q",),
    "attn.hook_rot_k": ("k",),
    "attn.hook_attn_scores": ("attn_scores",),
    "attn.hook_pattern": ("attn_probs",),
    "attn.hook_z": ("attn_heads",),
    "attn.hook_result": ("attn_result",),
    "hook_attn_out": ("attn_post", "attn_out"),
    "ln2.hook_scale": ("ffn_norm_scale",),
    "mlp.hook_post": ("ffn_act",),
    "hook_mlp_out": ("ffn_post", "ffn_out"),
}


class Point(NamedTuple):
    """A point of a model: its name, the shape of its values ("T": one for each row), what they are."""

    name: str
    shape: tuple[int | str, ...]
    meaning: str


class Shapes(Hook):
    """Notes the shape of every point."""

    def __init__(self, squares: bool) -> None:
        self.squares, self.found = squares, dict[str, tuple[int, ...]]()

    def keeps(self, name: str) -> bool:
        return self.squares or kind_of(name) not in SQUARE

    def kept(self, name: str, x: np.ndarray) -> None:
        self.found[name] = x.shape


_known: WeakKeyDictionary[Network, dict[str, Point]] = WeakKeyDictionary()


def points(net: Network) -> dict[str, Point]:
    """A network's points by name, in the order of a pass; the first call reads three tokens."""
    if net not in _known:
        shapes = Shapes(squares=net.kv_type != "q8_0")
        token = ACTIVE.set(())
        try:
            if net.config.causal:
                state = net.new_state(32)
                state.append([0] * READ)
                net.forward([(state, READ, "all")], shapes)
            else:
                net.hidden([[0] * READ], shapes)
        finally:
            ACTIVE.reset(token)
        _known[net] = {n: point(n, shape) for n, shape in shapes.found.items()}
    return _known[net]


def point(name: str, shape: tuple[int, ...]) -> Point:
    """A point whose values for some rows have this shape."""
    kind = kind_of(name)
    sizes: tuple[int | str, ...] = ("T", *shape[1:])
    if kind in SQUARE:
        sizes = (shape[0], "T", "S")
    elif kind == "state":
        sizes = shape[1:]
    return Point(name, sizes, MEANINGS[kind])


def kind_of(name: str) -> str:
    """The last part of a name: "out" of "blk.3.out"."""
    return name.rpartition(".")[2]


def lens_names(net: Network) -> dict[str, str]:
    """TransformerLens' names for points of this network, each with ours."""
    own = points(net)
    found = {"hook_embed": "embd", "ln_final.hook_scale": "output_norm_scale"}
    for i in range(net.config.n_layer):
        at = f"blocks.{i}."
        found[f"{at}hook_resid_pre"] = f"blk.{i - 1}.out" if i else "embd"
        for theirs, ours in LENS_NAMES.items():
            found[at + theirs] = next((f"blk.{i}.{n}" for n in ours if f"blk.{i}.{n}" in own), "")
    return {theirs: ours for theirs, ours in found.items() if ours in own}


def name_of(net: Network, name: str | tuple[str, int]) -> str:
    """Our name of a point.

    Parameters
    ----------
    net : Network
        Whose points.
    name : str, or (str, int)
        Ours, TransformerLens', or a kind and a layer: ("out", 3), ("resid_post", 3).

    Raises
    ------
    ArgumentError
        The model has no such point.
    """
    own = points(net)
    if not isinstance(name, str):
        if not is_pair(name):
            raise ArgumentError(
                f"{name!r:.60} names no point; expected a text, or a kind and a layer: ('out', 3)"
            )
        kind, layer = name
        names = f"blk.{layer}.{kind}", f"blocks.{layer}.{kind}", f"blocks.{layer}.hook_{kind}"
        tries = [*names, *(f"blocks.{layer}.{half}.hook_{kind}" for half in ("attn", "mlp"))]
    else:
        tries = [name]
    theirs = lens_names(net)
    for n in tries:
        if n in own or n in theirs:
            return n if n in own else theirs[n]
    raise unknown(net, tries[0])


def is_pair(name: object) -> bool:
    """Whether it may be a kind and the number of a layer."""
    pair = isinstance(name, tuple) and len(name) == 2
    return pair and isinstance(name[0], str) and not isinstance(name[1], str | bool)  # type: ignore[index]


def short_names(theirs: str) -> set[str]:
    """What people call TransformerLens' point: "attn.hook_z", "hook_z" and "z" of "blocks.0.attn.hook_z"."""
    below = theirs.split(".", 2)[-1] if theirs.startswith("blocks.") else theirs
    last = kind_of(below)
    return {below, last, last.removeprefix("hook_")}


def unknown(net: Network, name: str) -> ArgumentError:
    """What to say of a name that is none."""
    near = difflib.get_close_matches(name, [*points(net), *lens_names(net)], 3, 0.3)
    return ArgumentError(
        f"{name!r:.80} is no point of this {net.arch.name}; near it: {', '.join(near)}. "
        "Model.points() lists all"
    )


def select(net: Network, names: Names) -> list[str]:
    """The points that names mean, in the order of a pass.

    Parameters
    ----------
    net : Network
        Whose points.
    names : str, sequence of str or (str, int), or callable
        A point, also as ("out", 3), a kind such as "out" for those of all layers, a pattern such as
        "blk.*.out"; TransformerLens' names, patterns of them and kinds ("resid_post", "hook_z"), where ours has
        none that is called so; or a function that is given each name, ours
        and theirs, and says which. None: all but attention's scores and probabilities, the results
        of single heads, and the logits.
    """
    own = points(net)
    if names is None:
        return [n for n in own if kind_of(n) not in COSTLY]
    theirs = lens_names(net)
    if callable(names):
        found = {n for n in own if names(n)} | {o for t, o in theirs.items() if names(t)}
        return [n for n in own if n in found]
    found = set()
    single = isinstance(names, str) or is_pair(names) or not isinstance(names, Iterable)
    some_names: Any = [names] if single else names
    for name in some_names:
        if not isinstance(name, str):
            found.add(name_of(net, name))
            continue
        fits = pattern(name)
        some = {n for n in own if fits(n) or kind_of(n) == name}
        some |= {o for t, o in theirs.items() if fits(t)}
        some = some or {o for t, o in theirs.items() if name in short_names(t)}
        if not some:
            raise unknown(net, name)
        found |= some
    return [n for n in own if n in found]


def select_one(net: Network, name: str) -> list[str]:
    """The points that a name means, of which no layer may have two; ArgumentError where one has."""
    found = select(net, name)
    if len({*map(layer_of, found)}) < len(found):
        raise ArgumentError(
            f"{name!r:.60} means several points of a layer: {', '.join(found)[:60]}; give one kind"
        )
    return found


def pattern(name: str) -> Callable[[str], bool]:
    """Whether a name fits a pattern with ``*``, ``?`` and ``[...]``."""
    if not re.search(r"[*?\[]", name):
        return name.__eq__
    return lambda other: fnmatchcase(other, name)


def floats(x: Any, what: str, dtype: Any = np.float32) -> np.ndarray:
    """Numbers as float32, or another type; torch tensors, too. ArgumentError for what is none."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()  # whatever type torch has, numpy has this one
    try:
        given = np.asarray(x)
        if given.dtype.kind in "USOcMm":  # texts that look like numbers, None
            raise TypeError
        return np.asarray(given, dtype)
    except (TypeError, ValueError):
        raise ArgumentError(f"{what} is {x!r:.60}; expected numbers") from None


def whole(x: Any, what: str) -> int:
    """A whole number, numpy's too, as Python's; ArgumentError for what is none."""
    try:
        if isinstance(x, bool | np.bool_):
            raise TypeError
        return index(x)
    except TypeError:
        raise ArgumentError(f"{what}={x!r:.40}; expected a whole number") from None


def layer_of(name: str) -> int:
    """The layer of a point; -1 for those of none."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def heads_of(net: Network, name: str) -> int:
    """How many heads lie side by side in the rows of a point, or along an axis of it.

    Raises ArgumentError for a point that has no heads.
    """
    layer, kind, shape = layer_of(name), kind_of(name), points(net)[name].shape
    if kind in SQUARE or (kind == "state" and len(shape) == 3):
        return int(shape[0])
    if kind == "attn_result":
        return int(shape[1])
    if kind in ("q", "q_proj", "attn_heads", "k", "k_proj", "v"):
        mixer: Any = net.decoder.blocks[layer].mixer
        mixer = getattr(mixer, "attention", mixer)
        of_queries = kind not in ("k", "k_proj", "v")
        return int(mixer.n_head if of_queries else mixer.cache.n_head_kv or mixer.n_head_kv)
    raise ArgumentError(f"{name} has no heads; leave heads out")


def positions_of(
    positions: int | slice | Sequence[int] | None, length: int, inside: bool = True
) -> np.ndarray:
    """Positions as indices from 0; negative ones count from the end of ``length``.

    Raises ArgumentError for what are none, and where they must be ``inside`` also for those beyond the ends.
    """
    if positions is None:
        return np.arange(length)
    try:
        if isinstance(positions, slice):
            return np.arange(*positions.indices(length))
        some = np.atleast_1d(np.asarray(positions))
        if some.dtype.kind not in "iu" or some.ndim != 1:
            raise TypeError
    except (TypeError, ValueError):  # a slice of texts or with step 0, a ragged list
        raise ArgumentError(
            f"positions={positions!r:.60}; expected whole numbers or a slice"
        ) from None
    if inside and len(some) and not -length <= some.min() <= some.max() < length:
        raise ArgumentError(f"positions={positions!r:.60}; the sequence has {length} tokens")
    return np.where(some < 0, some + length, some)
