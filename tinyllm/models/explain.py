"""A model as a program, line by line with shapes: what its operations are called with, recorded.

The network is built on a backend that computes nothing and writes down what it is asked for. So the
program is the one that runs, for a file's own tensors and keys; for the name of an architecture, for those of
a small example (``outlines.json``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NoReturn

import numpy as np

from ..errors import DeviceError
from ..kernels.backend import (
    Backend,
    Batch,
    Device,
    KVType,
    LayerCache,
    RopeSpec,
    Routing,
    Source,
)
from .archs import find
from .build import build
from .network import Network
from .step import Step

SOURCE = object()  # where a batch's sequences begin, in the one of rows that read a source
OUTLINES: Any = resources.files(__package__) / "outlines.json"
Shape = tuple[Any, ...]


@dataclass(eq=False)
class Value:
    """An array of the program: its shape, with "T" for rows, and the name it gets."""

    shape: Shape
    name: str = ""
    type: str = "F32"
    nbytes: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Line:
    """A line of the program, ``result = text``; operands are filled in when all have names."""

    result: Value | None
    text: str
    operands: tuple[Any, ...]

    def __str__(self) -> str:
        text = self.text.format(*self.operands)
        if self.result is None:
            return text
        shape = ", ".join(map(str, self.result.shape))
        return f"{self.result.name:<12} = {text:<66} [{shape}]"


@dataclass
class Outlined:
    """A tensor of which only the name and shape are known."""

    name: str
    shape: tuple[int, ...]
    type: str = "F32"
    known: dict[int, tuple[Any, str]] = field(default_factory=dict)
    nbytes = 0  # nothing is loaded

    def dequantize(self) -> np.ndarray:
        ones = np.ones(self.shape, np.float32)
        self.known[id(ones)] = ones, short(self.name)
        return ones

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError("an outline has no data")


def short(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``attn_q``; other endings stay."""
    parts = name.removeprefix("enc.").removeprefix("dec.").split(".")
    if parts[0] == "blk":
        parts = parts[2:]
    return ".".join(parts).removesuffix(".weight")


class Recorder(Backend):
    """A backend that computes nothing, and writes down each operation that it is asked for."""

    where = Device("recorder")

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.asked: set[tuple[str, str]] = set()  # rms_norm and act, the latter with its name
        self.known: dict[int, tuple[Any, str]] = {}

    def new(self, shape: Shape, text: str, *operands: Any) -> Value:
        value = Value(tuple(shape))
        self.lines.append(Line(value, text, operands))
        return value

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> Value:
        shape, name = tuple(source.shape), short(source.name)
        if rows is not None:
            n = len(range(*rows.indices(shape[0]))) if isinstance(rows, slice) else len(rows)
            where = f"{rows.start}:{rows.stop}" if isinstance(rows, slice) else f"{n} rows"
            shape, name = (n, *shape[1:]), f"{name}[{where}]"
        return Value(shape, name, source.type)

    def array(self, x: np.ndarray) -> Value:
        for held in (x, getattr(x, "base", None)):
            if id(held) in self.known:
                return Value(x.shape, self.known[id(held)][1])
        latest = next(reversed(self.known.values()), (None, "constants"))[1]  # x was made of it
        return Value(x.shape, latest)

    def numpy(self, x: Value) -> NoReturn:
        raise DeviceError("the recorder computes nothing")

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> NoReturn:
        raise DeviceError("the recorder keeps nothing")

    def top_k(self, logits: Value, k: int) -> NoReturn:
        raise DeviceError("the recorder computes nothing")

    # ---- matrices

    def embed(self, w: Value, ids: Value, scale: float = 1.0) -> Value:
        return self.new(("T", w.shape[-1]), "rows {} of {}" + times(scale), ids, w)

    def matmul(self, w: Value, x: Value, bias: Value | None = None) -> Value:
        more = (bias,) if bias is not None else ()
        text = "{} · {}ᵀ" + (" + {}" if more else "")
        return self.new((*x.shape[:-1], w.shape[-2]), text, x, w, *more)

    def matmul_experts(
        self, w: Value, x: Value, experts: Value, bias: Value | None = None
    ) -> Value:
        more = (bias,) if bias is not None else ()
        text = "{} · {}[{}]ᵀ" + (" + {}" if more else "")
        return self.new((*experts.shape, w.shape[1]), text, x, w, experts, *more)

    def matmul_heads(self, w: Value, x: Value) -> Value:
        shape = ("T", w.shape[0] * w.shape[1])
        return self.new(shape, "each head of {} · its matrix of {}ᵀ", x, w)

    # ---- elementwise and rows

    def rms_norm(
        self, x: Value, w: Value | None, eps: float, bias: Value | None = None, group: int = 0
    ) -> Value:
        self.asked.add(("rms_norm", ""))
        return self.norm("rms_norm", x, w, bias, group)

    def layer_norm(
        self, x: Value, w: Value | None, eps: float, bias: Value | None = None, group: int = 0
    ) -> Value:
        return self.norm("layer_norm", x, w, bias, group)

    def norm(self, kind: str, x: Value, w: Value | None, bias: Value | None, group: int) -> Value:
        given = [p for p in (w, bias) if p is not None]
        each = f", each {group} values" if group else ""
        text = kind + "({}" + each + ")" + (" * {}" if w is not None else "")
        return self.new(x.shape, text + (" + {}" if bias is not None else ""), x, *given)

    def rope(self, x: Value, positions: Value, spec: RopeSpec, head_dim: int) -> Value:
        pairs = 2 * spec.freqs.shape[0]
        what = f"{pairs} of each {head_dim} values, {spec.pairing} pairs"
        return self.new(x.shape, f"turn {{}} to its position: {what}", x)

    def act(self, x: Value, kind: str) -> Value:
        self.asked.add(("act", kind))
        return self.new(x.shape, kind + "({})", x)

    def act_mul(self, gate: Value, up: Value, kind: str) -> Value:
        self.asked.add(("act", kind))
        return self.new(up.shape, kind + "({}) * {}", gate, up)

    def add(self, x: Value, *ys: Value, scale: float = 1.0) -> Value:
        factor = "" if scale == 1 else f"{scale:g} * "
        return self.new(x.shape, "{}" + f" + {factor}{{}}" * len(ys), x, *ys)

    def mul(self, x: Value, y: Value) -> Value:
        return self.new(x.shape, "{} * {}", x, y)

    def scale_softcap(self, x: Value, scale: float = 1.0, cap: float = 0.0) -> Value:
        inner = "{}" + times(scale)
        return self.new(x.shape, f"{cap:g} * tanh({inner} / {cap:g})" if cap else inner, x)

    def clamp(self, x: Value, limit: float) -> Value:
        return self.new(x.shape, f"{{}} between -{limit:g} and {limit:g}", x)

    def concat(self, xs: Sequence[Value], n_head: int = 1) -> Value:
        if len({id(x) for x in xs}) == 1:
            return self.new(
                ("T", len(xs) * xs[0].shape[1]), f"each part of {{}} {len(xs)} times", xs[0]
            )
        width = sum(x.shape[1] for x in xs)
        return self.new(("T", width), "beside each other: " + ", ".join(["{}"] * len(xs)), *xs)

    def take(self, x: Value, rows: Value) -> Value:
        return self.new(x.shape, "the rows of {} that are asked for", x)

    # ---- attention

    def cache_write(self, batch: Batch, layer: int, k: Value, v: Value) -> None:
        self.lines.append(Line(None, f"{'':<14} keep {{}} and {{}}", (k, v)))

    def attention(self, batch: Batch, layer: int, q: Value, n_head: int, **how: Any) -> Value:
        if batch.starts is SOURCE:
            text = f"attend({{}}, what is kept of the source; {said(n_head, how)})"
            return self.new(q.shape, text, q)
        kept = [line for line in self.lines if line.result is None][-1].operands
        per_head = kept[1].shape[1] * q.shape[1] // kept[0].shape[1]
        return self.new(
            ("T", per_head), f"attend({{}}, all {{}}, {{}}; {said(n_head, how)})", q, *kept
        )

    def attention_full(
        self, batch: Batch, q: Value, k: Value, v: Value, n_head: int, n_head_kv: int, **how: Any
    ) -> Value:
        text = f"attend({{}}, {{}}, {{}}; both ways, {said(n_head, how)})"
        return self.new(q.shape, text, q, k, v)

    # ---- mixtures of experts

    def route(
        self, logits: Value, routing: Routing, bias: Value | None = None
    ) -> tuple[Value, Value]:
        how = f"best {routing.n_used} by {routing.gating}" + (" + {}" if bias is not None else "")
        more = (bias,) if bias is not None else ()
        experts = self.new(("T", routing.n_used), f"{how} of {{}}", *more, logits)
        rest = ", summing to 1" if routing.renormalise else ""
        weights = self.new(experts.shape, f"their weights{rest}" + times(routing.scale))
        return experts, weights

    def combine(self, x: Value, weights: Value) -> Value:
        return self.new(("T", x.shape[-1]), "sum over experts of {} * {}", x, weights)

    def stacked(self, xs: Sequence[Value]) -> Value:
        shape = ("T", len(xs), xs[0].shape[1])
        return self.new(shape, "beside each other: " + ", ".join(["{}"] * len(xs)), *xs)

    def weigh(self, x: Value, weights: Value) -> Value:
        return self.new((*weights.shape, x.shape[1]), "{} for each expert * {}", x, weights)

    def per_choice(self, w: Value, experts: Value) -> Value:
        return self.new(experts.shape, "{} of {}", w, experts)

    def looked_up(self, table: Value, experts: Value) -> Value:
        return self.new(experts.shape, "the small one that each of {} has in common", experts)

    # ---- recurrent layers

    def conv1d(
        self, batch: Batch, layer: int, x: Value, w: Value, bias: Value | None, name: str = "conv"
    ) -> Value:
        more = (bias,) if bias is not None else ()
        text = f"convolve {{}} with {{}}, {w.shape[1]} rows" + (" + {}" if more else "")
        return self.new(x.shape, text, x, w, *more)

    def scan(self, batch: Batch, layer: int, x: Value, *more: Value) -> Value:
        dt, a, b, c, d = more
        text = "S = exp({1} {2}) S + {1} {0} {3};  S {4} + {5} {0}"
        return self.new(x.shape, text, x, dt, a, b, c, d)

    def shift_rows(self, batch: Batch, layer: int, x: Value, name: str) -> Value:
        return self.new(x.shape, "the row before each of {}", x)

    def wkv6(self, batch: Batch, layer: int, *parts: Value) -> Value:
        text = "{0} (S + {4} {1}ᵀ {2});  S = {3} S + {1}ᵀ {2}"
        return self.new(parts[0].shape, text, *parts)

    def wkv7(self, batch: Batch, layer: int, *parts: Value) -> Value:
        text = "S = S {1} + (S {4}) {5}ᵀ + {3} {2}ᵀ;  S {0}"
        return self.new(parts[0].shape, text, *parts)


def times(scale: float) -> str:
    return "" if scale == 1 else f" * {scale:g}"


def said(n_head: int, how: Mapping[str, Any]) -> str:
    """How an attention is computed, in words: heads, scale, window and the like."""
    words = [f"{n_head} heads", f"scale {how['scale']:.4g}"]
    window = how.get("window", 0)
    words += [f"window {window}" if window > 0 else f"chunks of {-window}"] if window else []
    words += [f"soft cap {how['softcap']:g}"] if how.get("softcap") else []
    words += ["ALiBi"] if how.get("slopes") is not None else []
    words += ["a bias for each distance"] if how.get("bias") is not None else []
    words += ["sinks"] if how.get("sinks") is not None else []
    return ", ".join(words)


@dataclass(frozen=True)
class Naming(Step):
    """A step that names values as taps do, and remembers where blocks end."""

    marks: dict[str, int] = field(default_factory=dict)

    def tap(self, name: str, x: Any) -> Any:
        assert isinstance(self.be, Recorder)
        x.name = x.name or name.rpartition(".")[2]
        self.marks[name] = len(self.be.lines)
        return x


def asked(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], strict: bool
) -> set[tuple[str, str]]:
    """Which of the operations "rms_norm" and "act" a model has, the latter with the activation's name."""
    be = Recorder()
    recorded(metadata, tensors, strict, be)
    return be.asked


def recorded(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    strict: bool = True,
    be: Recorder | None = None,
) -> tuple[Network, list[Line], dict[str, int]]:
    """The network of a file, its whole program, and where in it each tap stands."""
    be = be or Recorder()
    outlined = {n: Outlined(n, tuple(t.shape), t.type, be.known) for n, t in tensors.items()}
    net = build(metadata, outlined, be, "f32", strict)
    be.lines.clear()
    ids, rows = Value(("T",), "ids"), Value(("T",), "positions")
    source = Batch(None, None, SOURCE, None, None, (), 1, 1, 1)
    batch = Batch(ids, rows, None, None, rows, (), 1, 1, 1, source=source)
    step = Naming(be, batch, net.config.n_ctx_train)
    d = net.decoder
    x = d.through(step, d.embed(step), range(net.config.n_layer))
    (d.hidden if d.output is None else d.logits)(step, x)
    return net, be.lines, step.marks


def explain(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    """The program of a model: what comes before its layers, each kind of layer once, what comes after."""
    net, lines, marks = recorded(metadata, tensors)
    ends = [marks[f"blk.{i}.out"] for i in range(net.config.n_layer)]
    starts = [marks["embd"], *ends[:-1]]
    yield f"{net.arch.name}  ({net.arch.source}); T rows, {net.config.n_layer} layers"
    if net.reader is not None:
        reader = net.reader.config.n_layer, net.reader.arch.name
        yield "its source is read before, by {} layers as {} has them".format(*reader)
    yield from part("before the layers", lines[: starts[0]])
    programs: dict[str, list[int]] = {}
    for i, (a, b) in enumerate(zip(starts, ends, strict=True)):
        x = lines[a - 1].result
        assert x is not None
        x.name = "x"
        programs.setdefault("\n".join(part("", lines[a:b])), []).append(i)
    for text, layers in programs.items():
        yield f"\n{'layer' if len(layers) == 1 else 'layers'} {runs(layers)}"
        yield text.strip("\n")
    yield from part("after the layers", lines[ends[-1] :])


def part(title: str, lines: Sequence[Line]) -> Iterator[str]:
    """Lines with names for the values that have none yet: t1, t2 and so on."""
    if title:
        yield f"\n{title}"
    nameless = (v for v in (line.result for line in lines) if v is not None and not v.name)
    for i, value in enumerate(nameless, 1):
        value.name = f"t{i}"
    yield from (f"  {line}" for line in lines)


def runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][-1] == n - 1:
            out[-1].append(n)
        else:
            out.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in out)


def example(name: str) -> tuple[dict[str, Any], dict[str, Outlined]]:
    """The keys and tensors of a small model of an architecture."""
    entry = json.loads(OUTLINES.read_text("utf-8"))[name]
    tensors = {}
    at = find(name).blocks_at
    for group, shape in entry["tensors"].items():
        layers, _, suffix = group.partition(" ")
        names = [f"{at}.{i}.{suffix}" for i in json.loads(f"[{layers}]")] if suffix else [group]
        tensors.update({n: Outlined(n, tuple(shape)) for n in names})
    return entry["metadata"], tensors
