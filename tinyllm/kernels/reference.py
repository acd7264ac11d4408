"""Every operation in plain NumPy: the oracle in tests, and the place to read what an operation means.

Weights are dequantised to float32 when loaded, so results are those of the dequantised product. Nothing
here is fast; everything is as short as the definition allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import erf

import numpy as np

from ..errors import ArgumentError
from ..gguf import quants
from .backend import (
    Activation,
    Array,
    Backend,
    Batch,
    Device,
    KVType,
    LayerCache,
    RopeSpec,
    Routing,
    Source,
    Weight,
)
from .choose import check_largest
from .pages import Page, PagedCache, check_saved

F32 = np.float32
_erf = np.vectorize(erf, otypes=[F32])


@dataclass(frozen=True)
class DenseWeight:
    """A matrix, or a stack of them, in float32."""

    type: str
    data: np.ndarray  # [n_out, n_in] or [n, n_out, n_in]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class ReferenceCache(PagedCache):
    """Keys and values in float32, float16 or as rounded to q8_0: a page has a pair of arrays for each layer."""

    page_size = 64

    def __init__(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> None:
        super().__init__(layers, n_ctx)
        self.kv_type, self.type = kv_type, np.dtype(np.float16 if kv_type == "f16" else F32)
        self.arrays = [{name: np.zeros(shape, F32) for name, shape in c.arrays} for c in layers]

    def empty(self, n_ctx: int) -> ReferenceCache:
        return ReferenceCache(self.layers, n_ctx, self.kv_type)

    def take(self, group: int) -> Page:
        layers = [self.layers[i] for i in self.groups[group]]
        dims = [[(c.n_head_kv, d) for d in (c.head_dim, c.head_dim_v)] for c in layers]
        return Page([[np.zeros((self.page_size, *d), self.type) for d in kv] for kv in dims])

    def copy(self, group: int, to: Page, source: Page) -> None:
        to.memory = [[x.copy() for x in pair] for pair in source.memory]

    def copy_arrays(self, source: ReferenceCache) -> None:
        self.arrays = [{name: a.copy() for name, a in layer.items()} for layer in source.arrays]

    def page_bytes(self, group: int) -> int:
        layers = [self.layers[i] for i in self.groups[group]]
        values = sum(c.n_head_kv * (c.head_dim + c.head_dim_v) for c in layers)
        return self.page_size * values * self.type.itemsize

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """x as the cache stores it."""
        return round_q8_0(x) if self.kv_type == "q8_0" else x

    def read(self, layer: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n keys [n, K, D] and values [n, K, Dv] of a layer; zeros where they were dropped."""
        c = self.layers[layer]
        k, v = (np.zeros((n, c.n_head_kv, d), self.type) for d in (c.head_dim, c.head_dim_v))
        for x, stored, here, there in self._places(layer, 0, k, v):
            x[here] = stored[there]
        return k, v

    def write(self, layer: int, first: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store keys [n, K, D] and values [n, K, Dv] from position ``first`` on."""
        for x, stored, here, there in self._places(layer, first, k, v):
            stored[there] = x[here]

    def _places(
        self, layer: int, first: int, *xs: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, slice, slice]]:
        """For each page: keys, then values, from ``first`` on, the page's array, and what is where in both."""
        group = next(g for g, layers in enumerate(self.groups) if layer in layers)
        size, end = self.page_size, first + len(xs[0])
        for block, page in enumerate(self.pages[group]):
            start, stop = max(first, block * size), min(end, (block + 1) * size)
            if page is not None and start < stop:
                pair = page.memory[self.groups[group].index(layer)]
                for x, stored in zip(xs, pair, strict=True):
                    there = slice(start - block * size, stop - block * size)
                    yield x, stored, slice(start - first, stop - first), there

    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        k, v = (x[keep + discard :] for x in self.read(layer, n_past))
        if rope is not None:
            back = np.full(len(k), -discard, np.int32)
            turned = rotate(k.astype(F32), back, RopeSpec(rope.freqs, rope.pairing, rope.first))
            k = self.rounded(turned)
        self.reserve(keep, n_past - discard)
        self.write(layer, keep, k, v)

    def export(self, n_past: int) -> dict[str, np.ndarray]:
        out = {}
        for i, layer in enumerate(self.layers):
            if layer.n_head_kv:
                out[f"{i}.k"], out[f"{i}.v"] = self.read(i, n_past)
            out |= {f"{i}.{name}": a.copy() for name, a in self.arrays[i].items()}
        return out

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.begin_anew(check_saved(self.export(0), arrays, self.n_ctx))
        for i, layer in enumerate(self.layers):
            if layer.n_head_kv:
                self.write(i, 0, arrays[f"{i}.k"], arrays[f"{i}.v"])
            for name, a in self.arrays[i].items():
                a[...] = arrays[f"{i}.{name}"]


def round_q8_0(x: np.ndarray) -> np.ndarray:
    """x [.., D] after a round trip through int8 blocks of 32 values with a half-precision scale."""
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-n // 32) * 32), F32)
    padded[..., :n] = x
    blocks = padded.reshape(*x.shape[:-1], -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / F32(127)
    codes = np.rint(blocks * np.divide(1, d, out=np.zeros_like(d), where=d != 0))
    return (codes * d.astype(np.float16).astype(F32)).reshape(padded.shape)[..., :n]


def rotate(x: np.ndarray, positions: np.ndarray, spec: RopeSpec) -> np.ndarray:
    """Rotary embedding of x [T, H, D]: pairs of values turn by position * frequency."""
    p = len(spec.freqs)
    angle = positions[:, None].astype(F32) * spec.freqs  # [T, p]
    cos, sin = (f(angle)[:, None].astype(F32) * F32(spec.scale) for f in (np.cos, np.sin))
    out = x.copy()
    if spec.pairing == "half":
        a, b = slice(spec.first, spec.first + p), slice(spec.first + p, spec.first + 2 * p)
    else:
        a = slice(spec.first, spec.first + 2 * p, 2)
        b = slice(spec.first + 1, spec.first + 2 * p, 2)
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., a] * sin + x[..., b] * cos
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, shifted by the largest value so that exp cannot overflow."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def activate(x: np.ndarray, kind: Activation) -> np.ndarray:
    """The activation functions, elementwise."""
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "gelu":
        return F32(0.5) * x * (1 + _erf(x / F32(np.sqrt(2))))
    if kind == "gelu_tanh":
        return F32(0.5) * x * (1 + np.tanh(F32(np.sqrt(2 / np.pi)) * (x + F32(0.044715) * x**3)))
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "relu2":
        return np.maximum(x, 0) ** 2
    if kind == "sigmoid":
        return sigmoid(x)
    if kind == "tanh":
        return np.tanh(x)
    if kind == "exp":
        return np.exp(x)
    if kind == "softplus":
        return np.logaddexp(x, F32(0))
    raise ArgumentError(f"unknown activation {kind!r}")


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), written so that exp cannot overflow."""
    return F32(0.5) * (1 + np.tanh(F32(0.5) * x))


def repeat_heads(x: np.ndarray, n_head: int) -> np.ndarray:
    """[S, K, D] -> [S, H, D]: each key head serves H / K query heads."""
    return x if x.shape[1] == n_head else np.repeat(x, n_head // x.shape[1], axis=1)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [T, n_in] times w [n_out, n_in] transposed, summed in float64 so that T does not matter."""
    return (x.astype(np.float64) @ w.T.astype(np.float64)).astype(F32)


class ReferenceBackend(Backend):
    """The NumPy backend: each method does what ``Backend`` promises, in the plainest way."""

    where = Device("reference")

    def step(self, key: Hashable | None, fn: Callable[[Batch], Array], batch: Batch) -> Array:
        with np.errstate(all="ignore"):  # what is not finite is found in the logits
            return super().step(key, fn, batch)

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> Weight:
        n_rows = int(np.prod(source.shape[:-1]))
        dense = quants.dequantize(source.type, source.read_rows(0, n_rows)).reshape(source.shape)
        return DenseWeight(
            source.type, dense if rows is None else np.ascontiguousarray(dense[rows])
        )

    def array(self, x: np.ndarray) -> np.ndarray:
        narrow = {np.dtype(np.float64): F32, np.dtype(np.int64): np.int32}
        return np.array(x, narrow.get(x.dtype, x.dtype))

    def numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def new_cache(
        self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType
    ) -> ReferenceCache:
        return ReferenceCache(layers, n_ctx, kv_type)

    # ---- matrices

    def embed(self, w: DenseWeight, ids: np.ndarray, scale: float = 1.0) -> np.ndarray:
        return w.data[ids] * F32(scale)

    def matmul(self, w: DenseWeight, x: np.ndarray, bias: Array | None = None) -> np.ndarray:
        y = product(x, w.data)
        return y if bias is None else y + bias

    def matmul_experts(
        self, w: DenseWeight, x: np.ndarray, experts: np.ndarray, bias: Array | None = None
    ) -> np.ndarray:
        if x.ndim == 2:
            x = np.repeat(x[:, None], experts.shape[1], axis=1)
        y = np.empty((*experts.shape, w.shape[1]), F32)
        for e in np.unique(experts):
            y[experts == e] = product(x[experts == e], w.data[e])
        return y if bias is None else y + bias[experts]

    # ---- elementwise and rows

    def rms_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> np.ndarray:
        g = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
        y = g / np.sqrt(np.mean(g * g, -1, keepdims=True, dtype=F32) + F32(eps))
        return self._affine(y, x.shape, w, bias)

    def layer_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> np.ndarray:
        g = x.reshape(*x.shape[:-1], -1, group or x.shape[-1])
        g = g - g.mean(-1, keepdims=True, dtype=F32)
        y = g / np.sqrt(np.mean(g * g, -1, keepdims=True, dtype=F32) + F32(eps))
        return self._affine(y, x.shape, w, bias)

    def _affine(
        self, y: np.ndarray, shape: tuple[int, ...], w: Array | None, bias: Array | None
    ) -> np.ndarray:
        """y [.., groups, group] * w + bias, where w and bias have a group's or a row's values."""
        for f, p in ((np.multiply, w), (np.add, bias)):
            if p is not None:
                y = f(y, p if p.size == y.shape[-1] else p.reshape(y.shape[-2:]))
        return y.reshape(shape)

    def rope(
        self, x: np.ndarray, positions: np.ndarray, spec: RopeSpec, head_dim: int
    ) -> np.ndarray:
        return rotate(x.reshape(len(x), -1, head_dim), positions, spec).reshape(x.shape)

    def act(self, x: np.ndarray, kind: Activation) -> np.ndarray:
        return activate(x, kind)

    def act_mul(self, gate: np.ndarray, up: np.ndarray, kind: Activation) -> np.ndarray:
        if kind == "swiglu_oai":
            g, u = np.minimum(gate, F32(7)), np.clip(up, F32(-7), F32(7))
            return g * sigmoid(F32(1.702) * g) * (u + 1)
        return activate(gate, kind) * up

    def add(self, x: np.ndarray, *ys: np.ndarray, scale: float = 1.0) -> np.ndarray:
        for y in ys:
            x = x + F32(scale) * y
        return x

    def mul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x * y

    def scale_softcap(self, x: np.ndarray, scale: float = 1.0, cap: float = 0.0) -> np.ndarray:
        x = x * F32(scale)
        return F32(cap) * np.tanh(x / F32(cap)) if cap else x

    def clamp(self, x: np.ndarray, limit: float) -> np.ndarray:
        return np.clip(x, F32(-limit), F32(limit))

    def concat(self, xs: Sequence[np.ndarray], n_head: int = 1) -> np.ndarray:
        t = len(xs[0])
        return np.concatenate([x.reshape(t, n_head, -1) for x in xs], -1).reshape(t, -1)

    def take(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return x[rows]

    # ---- attention

    def cache_write(self, batch: Batch, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        for cache, rows, past in sequences(batch):
            n_head, n = cache.layers[layer].n_head_kv, rows.stop - rows.start
            new = (cache.rounded(x[rows].reshape(n, n_head, -1)) for x in (k, v))
            cache.reserve(past, past + n)
            cache.write(layer, past, *new)

    def attention(
        self,
        batch: Batch,
        layer: int,
        q: np.ndarray,
        n_head: int,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: Array | None = None,
        sinks: Array | None = None,
        bias: Array | None = None,
    ) -> np.ndarray:
        out = []
        for cache, rows, past in sequences(batch):
            here = q[rows].reshape(-1, n_head, q.shape[1] // n_head)
            stop = past + len(here)
            k, v = (repeat_heads(x.astype(F32), n_head) for x in cache.read(layer, stop))
            distance = np.arange(past, stop)[:, None] - np.arange(stop)  # [T, S], i - j
            reach = window if window >= 0 else np.arange(past, stop)[:, None] % -window + 1
            hidden = (distance < 0) | ((distance >= reach) if window else False)
            more = None if bias is None else by_distance(bias, -distance)
            out.append(attend(here, k, v, distance, hidden, scale, softcap, slopes, sinks, more))
        return np.concatenate(out)

    def attention_full(
        self,
        batch: Batch,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        n_head: int,
        n_head_kv: int,
        *,
        scale: float,
        window: int = 0,
        slopes: Array | None = None,
        bias: Array | None = None,
    ) -> np.ndarray:
        out = []
        for start, stop in zip(batch.starts[:-1], batch.starts[1:], strict=True):
            t = stop - start
            here = q[start:stop].reshape(t, n_head, -1)
            keys = repeat_heads(k[start:stop].reshape(t, n_head_kv, -1), n_head)
            values = repeat_heads(v[start:stop].reshape(t, n_head_kv, -1), n_head)
            back = np.arange(t)[:, None] - np.arange(t)
            distance, more = np.abs(back), None if bias is None else by_distance(bias, -back)
            hidden = distance > window // 2 if window else np.zeros((t, t), bool)
            out.append(attend(here, keys, values, distance, hidden, scale, 0.0, slopes, None, more))
        return np.concatenate(out)

    # ---- mixtures of experts

    def route(
        self, logits: np.ndarray, routing: Routing, bias: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = logits
        if routing.gating == "softmax":
            scores = softmax(logits)
        elif routing.gating == "sigmoid":
            scores = sigmoid(logits)
        choice = scores if bias is None else scores + bias
        if routing.n_group > 1:
            choice = mask_groups(choice, routing)
        experts = np.argsort(-choice, -1, kind="stable")[:, : routing.n_used].astype(np.int32)
        weights = np.take_along_axis(scores, experts, -1)
        if routing.gating == "softmax_selected":
            weights = softmax(weights)
        elif routing.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return experts, weights * F32(routing.scale)

    def combine(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.einsum("tkn,tk->tn", x, weights)

    # ---- choosing

    def top_k(self, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        check_largest(float(logits.max()))
        ids = np.argsort(-logits, kind="stable")[:k].astype(np.int32)
        return ids, logits[ids]

    # ---- recurrent layers

    def conv1d(
        self,
        batch: Batch,
        layer: int,
        x: np.ndarray,
        w: np.ndarray,
        bias: Array | None,
        name: str = "conv",
    ) -> np.ndarray:
        width, out = w.shape[1], np.empty_like(x)
        for cache, rows, _ in sequences(batch):
            kept = cache.arrays[layer][name]  # [width - 1, n]
            line = np.concatenate([kept, x[rows]])
            t = len(line) - width + 1
            out[rows] = sum(line[i : i + t] * w[:, i] for i in range(width))
            kept[...] = line[t:]
        return out if bias is None else out + bias

    def scan(
        self, batch: Batch, layer: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array
    ) -> np.ndarray:
        y = np.empty_like(x)
        for cache, rows, _ in sequences(batch):
            h = cache.arrays[layer]["ssm"]  # [n, S]
            n, size = h.shape
            for t in range(rows.start, rows.stop):
                bt, ct = (
                    np.repeat(z[t].reshape(-1, size), n * size // z[t].size, 0) for z in (b, c)
                )
                h *= np.exp(dt[t][:, None] * a)
                h += (dt[t] * x[t])[:, None] * bt
                y[t] = (h * ct).sum(1) + d * x[t]
        return y

    def shift_rows(self, batch: Batch, layer: int, x: np.ndarray, name: str) -> np.ndarray:
        out = np.empty_like(x)
        for cache, rows, _ in sequences(batch):
            kept = cache.arrays[layer][name]
            out[rows] = np.concatenate([kept[None], x[rows][:-1]])
            kept[...] = x[rows][-1]
        return out

    def wkv6(
        self, batch: Batch, layer: int, r: Array, k: Array, v: Array, w: Array, u: Array
    ) -> np.ndarray:
        y = np.empty_like(r)
        for cache, rows, _ in sequences(batch):
            s = cache.arrays[layer]["wkv"]  # [H, D, D]: key row, value column
            n_head, dim = s.shape[:2]
            first = u.reshape(n_head, dim, 1)
            for t in range(rows.start, rows.stop):
                rt, kt, vt, wt = (a[t].reshape(n_head, dim) for a in (r, k, v, w))
                kv = kt[:, :, None] * vt[:, None]
                y[t] = np.einsum("hi,hij->hj", rt, s + first * kv).reshape(-1)
                s[...] = wt[:, :, None] * s + kv
        return y

    def wkv7(
        self, batch: Batch, layer: int, r: Array, w: Array, k: Array, v: Array, a: Array, b: Array
    ) -> np.ndarray:
        y = np.empty_like(r)
        for cache, rows, _ in sequences(batch):
            s = cache.arrays[layer]["wkv"]  # [H, D, D]: value row, key column
            n_head, dim = s.shape[:2]
            for t in range(rows.start, rows.stop):
                rt, wt, kt, vt, at, bt = (z[t].reshape(n_head, dim) for z in (r, w, k, v, a, b))
                removed = np.einsum("hij,hj->hi", s, at)
                s[...] = (
                    s * wt[:, None] + removed[..., None] * bt[:, None] + vt[..., None] * kt[:, None]
                )
                y[t] = np.einsum("hij,hj->hi", s, rt).reshape(-1)
        return y


def sequences(batch: Batch) -> Iterator[tuple[ReferenceCache, slice, int]]:
    """Each sequence's cache, its rows, and how many positions it had stored."""
    bounds = zip(batch.starts[:-1], batch.starts[1:], strict=True)
    for cache, (start, stop), past in zip(batch.caches, bounds, batch.n_past, strict=True):
        yield cache, slice(int(start), int(stop)), int(past)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    distance: np.ndarray,
    hidden: np.ndarray,
    scale: float,
    softcap: float,
    slopes: np.ndarray | None,
    sinks: np.ndarray | None,
    more: np.ndarray | None = None,
) -> np.ndarray:
    """softmax(scores) v for q [T, H, D], k and v [S, H, .]; distance, hidden [T, S] -> [T, H * Dv].

    ``more`` [H, T, S] is added to the scores.
    """
    scores = np.einsum("thd,shd->hts", q, k) * F32(scale)
    if softcap:
        scores = F32(softcap) * np.tanh(scores / F32(softcap))
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.astype(F32)
    if more is not None:
        scores = scores + more
    scores = np.where(hidden, F32(-np.inf), scores)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, column], -1)
    p = softmax(scores)[..., : len(k)]
    return np.einsum("hts,shd->thd", p, v).reshape(len(q), -1)


def by_distance(bias: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The values of bias [H, 2 M + 1] for distances j - i [T, S], beyond M the outermost -> [H, T, S]."""
    most = bias.shape[1] // 2
    return bias[:, np.clip(distance, -most, most) + most]


def mask_groups(choice: np.ndarray, routing: Routing) -> np.ndarray:
    """Leave only the experts of the groups whose two best scores sum highest (DeepSeek-V3)."""
    groups = choice.reshape(len(choice), routing.n_group, -1)
    best = np.sort(groups, -1)[..., -2:].sum(-1)
    kept = np.argsort(-best, -1, kind="stable")[:, : routing.n_group_used]
    mask = np.zeros(best.shape, bool)
    np.put_along_axis(mask, kept, True, -1)
    return np.where(mask[..., None], groups, F32(-np.inf)).reshape(choice.shape)
