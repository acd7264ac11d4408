"""A file's tensors, taken by name and checked: what is missing, misshapen or left over is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import GGUFError, UnsupportedModel
from ..gguf.types import TYPES
from ..kernels.backend import Array, Backend, Source, Weight
from .adapters import Adapters, Beside
from .config import Config
from .row import Row as Row

# Tensors that a file may carry although the model does not read them, each with its reason.
MAY_BE_LEFT = {
    "rope_freqs.weight": "written per file, used by the layers that rotate",
    "attn_rot_embd": "a table of angles that old converters stored",
    "rotary_emb.inv_freq": "a table of frequencies that old converters stored",
}
# Tensors without which a file is a whole model of its architecture too, each with its reason.
MAY_BE_ABSENT = {
    "output.weight": "the embedding is the head too (tied), unless the row says otherwise",
    "token_types.weight": "DistilBERT has none; where the vocabulary counts two types, it is needed",
    "cls.bias": "a ranking head has two to four parts; no key says which",
    "cls.norm.weight": "of ranking heads, only ModernBERT's has it",
    "cls.output.bias": "Qwen's ranking head has none",
    "rope_freqs.weight": "only some files of an architecture stretch the rotation; no key says which",
}
# Tensors that layers of one kind may have or lack; what the row and the keys say of them is checked elsewhere.
MAY_DIFFER = {
    "attn_norm.weight",  # ModernBERT's first layer has none
    "attn_norm.bias",
    "attn_k.weight",  # layers that read the keys of an earlier one
    "attn_v.weight",
    "attn_k_norm.weight",
    "attn_sinks.weight",  # layers with a window only
    "attn_rel_b.weight",  # the first layer's, which all use
}
BIAS_ALONE = ("exp_probs_b", "ssm_dt")  # names that have a bias and may have no weight
STREAM_NORMS = tuple(  # norms of the residual stream
    f"{name}.weight"
    for name in """attn_norm attn_norm_2 ffn_norm attn_output_norm layer_output_norm token_embd_norm
    output_norm""".split()
)
# Groups that have biases all or none, in models whose feed-forward half has no gate.
BIASED_TOGETHER = (
    ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output"),
    ("ffn_up", "ffn_down"),
)
NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}  # types of the format that hold no weights


@dataclass(frozen=True)
class Linear:
    """A matrix and its optional bias on the backend of its layer, with the adapters beside it, if any."""

    be: Backend
    weight: Weight
    bias: Array | None
    beside: Beside | None = None

    @property
    def plain(self) -> bool:
        """Whether the product is the matrix's alone in the present step."""
        return self.beside is None or self.beside.idle

    def __call__(self, x: Array) -> Array:
        """x [T, n_in] -> [T, n_out]."""
        y = self.be.matmul(self.weight, x, self.bias)
        return y if self.beside is None or self.beside.idle else self.beside.added(y, x)


def products(linears: Sequence[Linear], x: Array) -> list[Array]:
    """x [T, n_in] times several matrices."""
    if not all(p.plain for p in linears):
        return [p(x) for p in linears]
    return linears[0].be.matmuls([p.weight for p in linears], x, [p.bias for p in linears])


@dataclass(frozen=True)
class Norm:
    """Root-mean-square or layer norm, over a row or over runs of ``group`` values of it."""

    be: Backend
    kind: str
    eps: float
    weight: Array | None
    bias: Array | None
    group: int = 0

    def __call__(self, x: Array) -> Array:
        norm = self.be.rms_norm if self.kind == "rms" else self.be.layer_norm
        return norm(x, self.weight, self.eps, self.bias, self.group)

    def of_sum(self, x: Array, y: Array) -> Array:
        """The norm of x + y."""
        if self.kind == "rms" or self.group:
            return self(self.be.add(x, y))
        return self.be.add_layer_norm(x, y, self.weight, self.eps, self.bias)


class Stored(Source, Protocol):
    """A tensor of a file as a model reads it; ``tinyllm.gguf.Tensor`` is one."""

    @property
    def nbytes(self) -> int: ...

    def dequantize(self) -> np.ndarray:
        """The values, float32 [*shape]."""
        ...


class Part:
    """Some rows of a tensor, seen as [-1, shape[-1]], or some of its columns, as a tensor of its own."""

    def __init__(
        self,
        whole: Stored,
        shape: tuple[int, ...],
        rows: np.ndarray | None = None,
        columns: slice | None = None,
    ) -> None:
        self.whole, self.shape, self.rows = whole, shape, rows
        self.name, self.type, self.bytes = whole.name, whole.type, None
        if columns is not None:
            block = TYPES[whole.type]
            if columns.start % block.block_size or columns.stop % block.block_size:
                raise UnsupportedModel(
                    f"{whole.name}: columns {columns.start} to {columns.stop} divide a block of type "
                    f"{whole.type}, which has {block.block_size} values"
                )
            bounds = (columns.start, columns.stop)
            self.bytes = slice(*(n // block.block_size * block.type_size for n in bounds))

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        raw = self.picked(start, stop)
        raw = raw if self.bytes is None else raw[:, self.bytes]
        if out is None:
            return np.ascontiguousarray(raw)
        out[...] = raw
        return out

    def picked(self, start: int, stop: int) -> np.ndarray:
        """Raw bytes of rows, a run of neighbours at a time."""
        if self.rows is None:
            return self.whole.read_rows(start, stop)
        rows = self.rows[start:stop]
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = [r for r in np.split(rows, ends) if len(r)]
        parts = [self.whole.read_rows(int(r[0]), int(r[-1]) + 1) for r in runs]
        return np.concatenate(parts) if parts else self.whole.read_rows(0, 0)


class Tensors:
    """The tensors below one prefix (``blk.3.``), loaded to one backend as they are asked for."""

    def __init__(
        self,
        tensors: Mapping[str, Stored],
        be: Backend,
        c: Config,
        prefix: str = "",
        taken: set[str] | None = None,
        made: dict[tuple[int, str], Any] | None = None,
        adapters: Adapters | None = None,
        at: str = "",
    ) -> None:
        self.tensors, self.be, self.c, self.prefix = tensors, be, c, prefix
        self.at = at  # what the layer's points are named by: layers that share a block differ in it
        self.taken: set[str] = set() if taken is None else taken
        self.made = {} if made is None else made
        self.adapters = Adapters() if adapters is None else adapters

    @property
    def root(self) -> Tensors:
        """All tensors of the file, loaded to the same backend."""
        return Tensors(self.tensors, self.be, self.c, "", self.taken, self.made, self.adapters)

    def seen_as(self, c: Config) -> Tensors:
        """These tensors for another stack of layers of the file."""
        return Tensors(self.tensors, self.be, c, self.prefix, self.taken, self.made, self.adapters)

    def layer(self, i: int, be: Backend | None = None) -> Tensors:
        """The tensors of layer i: those of its block, which other layers may have too."""
        return self.below(f"{self.c.blocks_at}.{self.c.blocks[i]}.", be, f"blk.{i}.")

    def below(self, prefix: str, be: Backend | None = None, at: str = "") -> Tensors:
        """The tensors under a longer prefix, loaded to another backend if one is given."""
        return Tensors(
            self.tensors,
            be or self.be,
            self.c,
            self.prefix + prefix,
            self.taken,
            self.made,
            self.adapters,
            at or self.at,
        )

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, which all layers on this backend share under a name."""
        key = id(self.be), name
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def pass_over(self, *names: str) -> None:
        """Count tensors as used that may be there and that nothing reads."""
        self.taken.update(self.prefix + n for n in names if self.has(n))

    def has(self, *names: str) -> bool:
        """Whether one of these tensors is there."""
        return any(f"{self.prefix}{name}" in self.tensors for name in names)

    def source(self, name: str, *shape: int) -> Stored:
        """The tensor, with its shape checked where one is given, marked as used."""
        full = self.prefix + name
        if full not in self.tensors:
            raise GGUFError(f"tensor is missing; architecture {self.c.arch!r} needs it", name=full)
        tensor = self.tensors[full]
        if tensor.type in NO_WEIGHTS:
            raise GGUFError(f"is of type {tensor.type}, which holds no weights", name=full)
        if shape and tuple(tensor.shape) != shape:
            raise GGUFError(f"has shape {tuple(tensor.shape)}; expected {shape}", name=full)
        self.taken.add(full)
        return tensor

    def require(self, *names: str) -> None:
        """Raise GGUFError unless these tensors are there, although a model could be built without."""
        for name in names:
            if not self.has(name):
                self.source(name)

    def array(self, name: str, *shape: int) -> Array:
        """A small tensor of any type as float32 on the device."""
        return self.be.array(self.host(name, *shape))

    def host(self, name: str, *shape: int) -> np.ndarray:
        """A small tensor of any type as float32 on the host."""
        return np.asarray(self.source(name, *shape).dequantize())

    def optional(self, name: str, *shape: int) -> Array | None:
        return self.array(name, *shape) if self.has(name) else None

    def matrix(self, name: str, *shape: int, rows: slice | np.ndarray | None = None) -> Weight:
        """A matrix or a stack of them, [n_out, n_in] or [n, n_out, n_in], as the file stores it."""
        source = self.source(name, *shape)
        part = rows.tobytes().hex() if isinstance(rows, np.ndarray) else rows
        shared: Weight = self.once(f"{source.name} {part}", lambda: self.be.load(source, rows))
        return shared

    def stack(self, name: str, n: int, n_out: int, n_in: int, half: int | None = None) -> Weight:
        """A stack of matrices [n, n_out, n_in]; ``half`` 0 or 1 of one whose matrices are twice as tall."""
        if half is None:
            return self.matrix(name, n, n_out, n_in)
        whole = self.source(name, n, 2 * n_out, n_in)
        rows = np.arange(n)[:, None] * 2 * n_out + half * n_out + np.arange(n_out)
        return self.be.load(Part(whole, (n, n_out, n_in), rows.ravel()))

    def linear(
        self, name: str, n_out: int, n_in: int, rows: slice | np.ndarray | None = None
    ) -> Linear:
        """``name.weight`` [n_out, n_in] and, if there, ``name.bias``; ``rows`` keeps only those outputs."""
        bias = None
        if self.has(f"{name}.bias"):
            host = self.host(f"{name}.bias", n_out)
            bias = self.be.array(host if rows is None else host[rows])
        weight = self.matrix(f"{name}.weight", n_out, n_in, rows=rows)
        return Linear(self.be, weight, bias, self.beside(f"{name}.weight", rows))

    def beside(self, name: str, rows: slice | np.ndarray | None = None) -> Beside | None:
        """What stands beside a tensor's product, or beside that of some of its rows."""
        return self.adapters.beside(self.be, self.prefix + name, rows)

    def norm(self, name: str, size: int, kind: str | None = None) -> Norm:
        """``name.weight`` [size] and, if there, ``name.bias``."""
        kind = kind or self.c.norm
        bare = self.has(name)  # Falcon-H1's converter leaves the ending out
        weight = self.array(name if bare else f"{name}.weight", size)
        return Norm(self.be, kind, self.c.norm_eps, weight, self.optional(f"{name}.bias", size))

    def norm_if(self, name: str, size: int, kind: str | None = None) -> Norm | None:
        return self.norm(name, size, kind) if self.has(name, f"{name}.weight") else None

    def leftovers(self) -> list[str]:
        """Names of the tensors that nothing has asked for."""
        return sorted(
            n
            for n in self.tensors
            if n not in self.taken and not any(n.endswith(m) for m in MAY_BE_LEFT)
        )


def check_layers(tensors: Mapping[str, Stored], c: Config, gated: bool) -> None:
    """Check that layers of one kind have the same tensors, and that biases stand together.

    Raises
    ------
    UnsupportedModel
        A tensor belongs to a layer that is not there.
    GGUFError
        A tensor is missing; the message names it.
    """
    at, layers = c.blocks_at, by_layer(tensors, max(c.blocks) + 1, c.blocks_at)
    check_uniform(layers, at)
    check_biases(tensors)
    pairs = [] if c.kv_lora_rank else layers[: c.n_layer - c.n_kv_shared]
    for i, names in enumerate(pairs):
        check_pair(f"{at}.{i}.", names, "attn_q_norm.weight", "attn_k_norm.weight")
    if not gated:
        for i, names in enumerate(layers):
            for group in BIASED_TOGETHER:
                check_together(f"{at}.{i}.", names, group)


def by_layer(tensors: Mapping[str, Stored], n_layer: int, at: str) -> list[set[str]]:
    """The names of each layer's tensors below ``at`` and its number."""
    layers: list[set[str]] = [set() for _ in range(n_layer)]
    for name in tensors:
        if not name.startswith(f"{at}."):
            continue
        number, _, suffix = name.removeprefix(f"{at}.").partition(".")
        if not number.isdecimal() or len(number) > 4 or int(number) >= n_layer:
            raise UnsupportedModel(f"tensor {name!r:.80} belongs to no layer; there are {n_layer}")
        layers[int(number)].add(suffix)
    return layers


def check_uniform(layers: list[set[str]], at: str) -> None:
    """Raise GGUFError unless layers of one kind have the same tensors.

    All layers with experts have the same feed-forward tensors, all with attention the same others, and so on.
    """
    first: dict[tuple[bool, ...], tuple[int, set[str]]] = {}
    for i, names in enumerate(layers):
        for kind, part in parts(names).items():
            j, expected = first.setdefault(kind, (i, part))
            for suffix in sorted((expected ^ part) - MAY_DIFFER):
                there, absent = (j, i) if suffix not in names else (i, j)
                raise GGUFError(
                    f"tensor is missing; {at}.{there}.{suffix} is there, in a layer of the same kind",
                    name=f"{at}.{absent}.{suffix}",
                )


def parts(names: set[str]) -> dict[tuple[bool, ...], set[str]]:
    """A layer's names in two sets, its feed-forward half and the rest, each under the kind that it is."""
    ffn = {n for n in names if n.startswith(("ffn_", "exp_probs_b"))}
    mixer = tuple(
        any(n.startswith(p) for n in names)
        for p in ("attn_q.", "attn_output.", "ssm_", "shortconv.", "attn_kv_a_mqa.", "indexer.")
    )
    return {(has_experts(names), bool(ffn)): ffn, mixer: names - ffn}


def has_experts(names: Iterable[str]) -> bool:
    """Whether these are the names of a layer with a mixture of experts."""
    return any("_exps." in n or n.startswith("ffn_gate_inp.") for n in names)


def check_biases(tensors: Mapping[str, Stored]) -> None:
    """Raise GGUFError for a bias without its weight, or where only some norms of the stream have biases."""
    for name in tensors:
        base = name.removesuffix(".bias")
        if base != name and not base.endswith(BIAS_ALONE) and f"{base}.weight" not in tensors:
            raise GGUFError("tensor is missing, though its bias is there", name=f"{base}.weight")
    norms = [n.removesuffix(".weight") for n in tensors if n.endswith(STREAM_NORMS)]
    check_together("", set(tensors), norms)


def check_pair(prefix: str, names: set[str], first: str, second: str) -> None:
    """Raise GGUFError if only one of two tensors is there."""
    here = {first, second} & names
    if len(here) == 1:
        absent = ({first, second} - here).pop()
        raise GGUFError(f"tensor is missing; {prefix}{here.pop()} is there", name=prefix + absent)


def check_together(prefix: str, names: set[str], group: Sequence[str]) -> None:
    """Raise GGUFError if only some tensors of the group have biases."""
    here = [g for g in group if f"{g}.weight" in names]
    without = [g for g in here if f"{g}.bias" not in names]
    if 0 < len(without) < len(here):
        other = next(g for g in here if g not in without)
        raise GGUFError(
            f"tensor is missing; {prefix}{other}.bias is there, and they come all or none",
            name=f"{prefix}{without[0]}.bias",
        )
