"""What both GPU backends do: operations as launches of kernels.

A front end (``opencl``, ``cuda``) adds the primitives of ``Device``: memory, and ``launch``. Nothing is
computed in Python but the number of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from math import prod

import numpy as np

from ...errors import ArgumentError, DeviceError
from ..backend import Activation, Batch, HeadNorms, KVType, LayerCache, RopeSpec, Routing
from ..profile import Profile
from . import batch as batches
from . import profile, sources
from .arrays import GPUArray, Pending, Sum
from .attention import cache_program
from .batch import DeviceBatch
from .choosing import Picking
from .device import f32, i32, u64
from .kvcache import GPUCache
from .matmul import EXPERTS, MATVEC_CHOICES, MAX_EXPERTS, ROWWISE
from .recurrent import Recurrent
from .steps import MOST_ROWS, Recording, Steps
from .weights import GPUWeight

ACTIVATIONS = (
    *("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "softplus"),
    "swiglu_oai",
)
GATINGS = ("softmax", "sigmoid", "softmax_selected")
ELEMENTWISE = sources.plain("activations.h", "elementwise.c")
MOST_THREADS = 512  # as in src/rows.c
NORM_QUADS = 4  # fours of a run that each thread keeps, as in src/rows.c
MOST_DIM = 1024  # of a head, as in src/cache.c


class GPUBackend(Picking, Recurrent, Recording):
    """The operations of ``Backend`` on a GPU; see there for what each promises."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = Steps(self)

    def step(self, key: Hashable | None, fn: Callable[[Batch], GPUArray], batch: Batch) -> GPUArray:
        if key is None or batch.n_rows > MOST_ROWS:
            return fn(self.upload(batch))
        return self._steps.run(key, fn, batch)

    def profiled(self) -> AbstractContextManager[Profile]:
        return profile.profiled(self)

    def limits(self, seconds: float) -> dict[str, float]:
        return profile.limits(self, seconds)

    @property
    def n_steps(self) -> int:
        return self._steps.count

    def follow(
        self,
        result: tuple[GPUArray, GPUArray],
        key: Hashable,
        fn: Callable[[Batch], GPUArray],
        batch: Batch,
    ) -> GPUArray:
        return self._steps.run(key, fn, batch, result[1])

    def forget(self) -> None:
        self._steps.forget()

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> GPUCache:
        return GPUCache(self, self.store(layers, kv_type), n_ctx)

    def upload(self, batch: Batch) -> DeviceBatch:
        return batches.upload(self, batch)

    # ---- elementwise and rows

    def rms_norm(
        self,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None = None,
        group: int = 0,
    ) -> GPUArray:
        return self._norm(x, w, eps, bias, group, centre=0)

    def layer_norm(
        self,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None = None,
        group: int = 0,
    ) -> GPUArray:
        return self._norm(x, w, eps, bias, group, centre=1)

    def _norm(
        self,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None,
        group: int,
        centre: int,
    ) -> GPUArray:
        """The norm, in the launch of the product before it where that can make it."""
        y = self.empty(x.shape)
        whole = w is not None and w.size == x.size == (group or x.size)
        early = whole and not centre and bias is None and self.norm_early(x, w, eps, y)
        if not early:
            self._norm_into(y, x, w, eps, bias, group, centre)
            return y

        def late(y: GPUArray) -> None:
            self._norm_into(y, x, w, eps, bias, group, centre)

        y.pending = Pending(late)
        return y

    def _norm_into(
        self,
        y: GPUArray,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None,
        group: int,
        centre: int,
    ) -> None:
        """The norm; a pending sum before it and the int8 form behind it are made in the same launch."""
        n = group or x.shape[-1]
        before = x.pending if isinstance(x.pending, Sum) else None
        inputs: tuple[object, ...] = x, None, None
        if before is not None:
            x.pending = None
            inputs = before.x, before.y, x
        threads = self._norm_threads(n)
        kept = n % 4 == 0 and n <= 4 * NORM_QUADS * threads
        if kept and n == x.shape[-1] and self.wants_int8(y):
            y.int8 = self.new_int8(y.size)
        sizes = (0 if p is None else p.size for p in (w, bias))
        shape = (i32(v) for v in (n, *sizes, n // 4 if y.int8 else 0, centre))
        outputs = y, *(y.int8 or (None, None, None))
        numbers = f32(eps), f32(1.0 if before is None else before.scale)
        args = *inputs, w, bias, *outputs, *shape, *numbers
        kernel = ("norm_rows_centred" if centre else "norm_rows") if kept else "norm_runs"
        self.launch(ROWWISE, kernel, (x.size // n, 1, 1), (threads, 1, 1), *args)

    def _norm_threads(self, n: int) -> int:
        """A thread for each four values of a run, a power of two."""
        quads = 1 << (-(-n // 4) - 1).bit_length()
        return max(32, min(quads, MOST_THREADS, self.max_threads))

    def rope(self, x: GPUArray, positions: GPUArray, spec: RopeSpec, head_dim: int) -> GPUArray:
        y = self.empty(x.shape)
        shape = (i32(v) for v in (x.shape[-1], head_dim, spec.first, spec.freqs.size))
        how = i32(spec.pairing == "adjacent"), f32(spec.scale)
        self.each(ELEMENTWISE, "rope", x.size, x, positions, spec.freqs, y, *shape, *how)
        return y

    def rope_write(
        self,
        batch: Batch,
        layer: int,
        q: GPUArray,
        k: GPUArray,
        v: GPUArray,
        spec: RopeSpec,
        head_dim: int,
        norms: HeadNorms | None = None,
    ) -> GPUArray:
        if head_dim > MOST_DIM:
            return super().rope_write(batch, layer, q, k, v, spec, head_dim, norms)
        b = self.on_device(batch)
        store = self.shared_store(b)
        ks, vs = (store.layout.sides[layer][name] for name in ("k", "v"))
        y, n_head = self.empty(q.shape), q.shape[-1] // head_dim
        where = y, store.pages.buffer, b.pages, b.seqs, b.positions, spec.freqs
        weights = (None, None) if norms is None else (norms.q, norms.k)
        offsets = (u64(n) for n in (store.pages.nbytes, ks.offset, vs.offset))
        dims = b.n_pages, n_head, ks.n_head, ks.dim, vs.dim, ks.width, vs.width
        turn = spec.first, spec.freqs.size, spec.pairing == "adjacent"
        numbers = f32(spec.scale), f32(0.0 if norms is None else norms.eps)
        args = q, k, v, *where, *weights, *offsets, *(i32(n) for n in (*dims, *turn)), *numbers
        kernel = "rope_write" if norms is None else "norm_rope_write"
        groups = n_head + 2 * ks.n_head, b.n_rows, 1
        self.launch(cache_program(ks), kernel, groups, (128, 1, 1), *args)
        return y

    def act(self, x: GPUArray, kind: Activation) -> GPUArray:
        y, code = self.empty(x.shape), _code(ACTIVATIONS[:-1], kind)
        if self.wants_int8(y):
            self._act_int8(y, x, None, code)
        else:
            self.each(ELEMENTWISE, "act", x.size, x, y, code)
        return y

    def _act_int8(self, y: GPUArray, x: GPUArray, up: GPUArray | None, code: np.int32) -> None:
        """Y = act(x), or act(x) * up, in both forms."""
        y.int8 = self.new_int8(y.size)
        groups, args = (-(-y.size // 512), 1, 1), (x, up, y, *y.int8, code, i32(y.size // 4))
        self.launch(ROWWISE, "act_mul_int8", groups, (128, 1, 1), *args)

    def matmul_gated(  # type: ignore[override]
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        biases: Sequence[GPUArray | None],
        kind: Activation,
    ) -> GPUArray:
        if x.size > x.shape[-1] or not self.fits_gated(ws, x):
            return super().matmul_gated(ws, x, biases, kind)
        y = self.empty((*x.shape[:-1], ws[0].n_out))
        self.few_gated(ws, x, biases, _code(ACTIVATIONS, kind), y, None)
        return y

    def matmul_experts_gated(  # type: ignore[override]
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        experts: GPUArray,
        biases: Sequence[GPUArray | None],
        kind: Activation,
    ) -> GPUArray:
        if experts.size > MATVEC_CHOICES or not self.fits_gated(ws, x):
            return super().matmul_experts_gated(ws, x, experts, biases, kind)
        y = self.empty((*experts.shape, ws[0].n_out))
        self.few_gated(ws, x, biases, _code(ACTIVATIONS, kind), y, experts)
        return y

    def act_mul(self, gate: GPUArray, up: GPUArray, kind: Activation) -> GPUArray:
        y, code = self.empty(gate.shape), _code(ACTIVATIONS, kind)
        if self.wants_int8(y):
            self._act_int8(y, gate, up, code)
        else:
            self.each(ELEMENTWISE, "act_mul", y.size, gate, up, y, code)
        return y

    def add(self, x: GPUArray, *ys: GPUArray, scale: float = 1.0) -> GPUArray:
        for y in ys:
            x = (
                self._sum(x, y, scale)
                if y.size == x.size
                else self._pairwise(x, y, scale, product=0)
            )
        return x

    def _sum(self, x: GPUArray, y: GPUArray, scale: float) -> GPUArray:
        """A sum that is computed when it is read."""
        out = self.empty(x.shape)
        out.pending = Sum(lambda out: self._pairwise_into(out, x, y, scale, product=0), x, y, scale)
        return out

    def mul(self, x: GPUArray, y: GPUArray) -> GPUArray:
        return self._pairwise(x, y, 1.0, product=1)

    def _pairwise(self, x: GPUArray, b: GPUArray, scale: float, product: int) -> GPUArray:
        y = self.empty(x.shape)
        self._pairwise_into(y, x, b, scale, product)
        return y

    def _pairwise_into(
        self, y: GPUArray, x: GPUArray, b: GPUArray, scale: float, product: int
    ) -> None:
        """Y = x with b [T, n], [T, 1] or [n]."""
        n = x.shape[-1]
        if b.size == x.size:
            row, column = n, 1
        elif b.shape[-1] == 1:
            row, column = 1, 0
        elif b.size == n:
            row, column = 0, 1
        else:
            raise ArgumentError(f"{b.shape} does not match {x.shape}")
        strides, how = (i32(n), i32(row), i32(column)), (f32(scale), i32(product))
        program, count = ELEMENTWISE, i32(x.size)
        groups = (-(-x.size // 256), 1, 1)
        out = y.raw_buffer
        self.launch(program, "combine_two", groups, (256, 1, 1), x, b, out, *strides, *how, count)

    def scale_softcap(self, x: GPUArray, scale: float = 1.0, cap: float = 0.0) -> GPUArray:
        y = self.empty(x.shape)
        self.each(ELEMENTWISE, "scale_softcap", x.size, x, y, f32(scale), f32(cap))
        return y

    def clamp(self, x: GPUArray, limit: float) -> GPUArray:
        y = self.empty(x.shape)
        self.each(ELEMENTWISE, "clamp_all", x.size, x, y, f32(limit))
        return y

    def concat(self, xs: Sequence[GPUArray], n_head: int = 1) -> GPUArray:
        t = xs[0].shape[0]
        widths = [x.size // (t * n_head) for x in xs]
        y = self.empty((t, n_head * sum(widths)))
        first = 0
        for x, d in zip(xs, widths, strict=True):
            shape = (i32(v) for v in (n_head, n_head, d, first, sum(widths)))
            self.each(ELEMENTWISE, "join", t * n_head * d, x, y, *shape)
            first += d
        return y

    def repeat(self, x: GPUArray, n: int) -> GPUArray:
        t, d = x.shape
        y = self.empty((t, n * d))
        shape = (i32(v) for v in (n, 1, d, 0, d))
        self.each(ELEMENTWISE, "join", y.size, x, y, *shape)
        return y

    def take(self, x: GPUArray, rows: GPUArray) -> GPUArray:
        if len(x) == rows.size == 1:  # there is but one to take
            return x
        y = self.empty((rows.size, *x.shape[1:]))
        self.each(ELEMENTWISE, "take", y.size, x, rows, y, i32(prod(x.shape[1:])))
        return y

    # ---- mixtures of experts

    def route(
        self, logits: GPUArray, routing: Routing, bias: GPUArray | None = None
    ) -> tuple[GPUArray, GPUArray]:
        t, n = logits.shape
        if n > MAX_EXPERTS:
            raise DeviceError(f"{n} experts; at most {MAX_EXPERTS} run on a GPU")
        experts = self.empty((t, routing.n_used), np.int32)
        weights = self.empty((t, routing.n_used))
        self.launch(
            EXPERTS,
            "route",
            (t, 1, 1),
            (64, 1, 1),
            *(logits, bias, experts, weights, i32(n), i32(routing.n_used)),
            *(_code(GATINGS, routing.gating), i32(routing.renormalise), f32(routing.scale)),
            *(i32(routing.n_group), i32(routing.n_group_used)),
        )
        return experts, weights

    def combine(self, x: GPUArray, weights: GPUArray) -> GPUArray:
        t, k, n = x.shape
        y = self.empty((t, n))
        self.each(EXPERTS, "combine_experts", y.size, x, weights, y, i32(k), i32(n))
        return y


def _code(names: tuple[str, ...], name: str) -> np.int32:
    if name not in names:
        raise ArgumentError(f"unknown {name!r}; expected one of {', '.join(names)}")
    return i32(names.index(name))
