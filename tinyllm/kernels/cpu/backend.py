"""The cpu backend: each operation becomes an instruction of a program that all threads run.

Nothing is computed when an operation is called: it is recorded on the thread's tape (``program``). The tape
runs when ``numpy`` or ``top_k`` asks for values, and at the end of ``step``. A step under a key is recorded
once; when the key comes again, only its inputs are copied and the program runs: one native call.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ..backend import (
    Activation,
    Array,
    Backend,
    Batch,
    Compute,
    KVType,
    LayerCache,
    RopeSpec,
    Routing,
    Source,
)
from . import attention, bfloat, choosing, elementwise, jit, matmul, recurrent
from .attention import padded
from .experts import record_experts
from .kvcache import CPUCache
from .program import CPUArray, Tape, aligned, float_bits
from .threads import pool
from .weights import CPUWeight, load_weight

NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
KEPT_STEPS = 8  # recorded steps
REPLAYED_ROWS = 32  # longer steps take long enough to be recorded anew each time
ACT_PIECE = 1024  # values


INPUTS = ("ids", "positions", "starts", "n_past", "outputs")


@dataclass
class Growing:
    """An instruction whose amount of work depends on how many positions are stored."""

    row: int
    tiles: np.ndarray  # [n_seq]: pieces for each block of a sequence's past


@dataclass
class Recorded:
    """A step's program, its inputs' places and its result."""

    tape: Tape
    batch: Batch
    inputs: list[np.ndarray]  # views of the batch's arrays
    caches: np.ndarray  # [n_seq] int64: addresses of the caches' tables
    growing: list[Growing] = field(default_factory=list)
    blocks: list[int] | None = None  # [n_seq] of the past, for which ``growing`` rows are set
    result: Array = None
    replayable: bool = True


class CPUBackend(Backend):
    """Runs on the processor; see ``Backend`` for what each method promises.

    Parameters
    ----------
    n_threads : int, optional
        Threads asked for; more than there are cores are not started. Default: one per physical core.
    compute : {"f32", "bf16"}
        In what numbers matrices of floats are multiplied with more than one token.

    Raises
    ------
    DeviceError
        The processor does not multiply bfloat16.
    """

    name = "cpu"

    def __init__(self, n_threads: int | None = None, compute: Compute = "f32") -> None:
        if compute == "bf16":
            bfloat.check_available()
        self.compute = compute
        self._local = threading.local()
        self._steps: OrderedDict[Hashable, Recorded] = OrderedDict()
        self.set_threads(pool().size if n_threads is None else n_threads)

    def set_threads(self, n_threads: int) -> None:
        """Use up to so many threads from the next step on; call it between steps."""
        whole = isinstance(n_threads, int) and not isinstance(n_threads, bool)
        if not whole or n_threads < 1:
            raise ArgumentError(
                f"n_threads={n_threads!r}; expected a whole number of at least 1, or None"
            )
        self.n_threads = n_threads  # as asked
        self._workers = min(n_threads, pool().size)
        self._steps.clear()  # recorded steps have room for the old number of workers

    # ---- the tape

    @property
    def _tape(self) -> Tape:
        if not hasattr(self._local, "tape"):
            self._local.tape, self._local.step = Tape(), None
        return self._local.tape

    @property
    def _step(self) -> Recorded | None:
        """The step being recorded."""
        return self._local.step if hasattr(self._local, "step") else None

    def _settle(self) -> None:
        """Run what is recorded and has not run."""
        tape = self._tape
        tape.run(self._workers)
        tape.clear()

    def _op(
        self, body: Callable, pieces: int, args: Sequence[int], keep: Sequence[Any], chunk: int = 0
    ) -> None:
        """Record a kernel without micro-kernels."""
        chunk = chunk or max(1, pieces // 16)
        self._tape.add(jit.kernel(body), pieces, args, chunk)
        self._tape.keep(*keep)

    def _new(self, shape: Sequence[int], dtype: Any = np.float32) -> CPUArray:
        return self._tape.array(shape, dtype)

    # ---- weights and transfers

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> CPUWeight:
        weight = load_weight(source, rows, self._workers)
        if self.compute == "bf16" and weight.format is None:
            return bfloat.RoundedWeight(**vars(weight))
        return weight

    def array(self, x: np.ndarray) -> CPUArray:
        x = np.asarray(x)
        dtype = NARROW.get(x.dtype, x.dtype)
        memory = aligned(x.size * np.dtype(dtype).itemsize + 64)  # kernels may read whole vectors
        out = CPUArray(x.shape, dtype, memory.ctypes.data, memory)
        out.view()[...] = x
        return out

    def numpy(self, x: Array) -> np.ndarray:
        if isinstance(x, np.ndarray):
            return x
        if self._step is not None or self._tape.n:
            self._settle_within_step()
        return x.view()

    def _settle_within_step(self) -> None:
        """Values are asked for while a step is recorded: it cannot be replayed."""
        if self._step is not None:
            self._step.replayable = False
        self._settle()

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> CPUCache:
        return CPUCache(layers, n_ctx, kv_type, self._settle)

    # ---- steps

    def step(self, key: Hashable | None, fn: Callable[[Batch], Array], batch: Batch) -> Array:
        self._settle()
        if key is None or batch.n_rows > REPLAYED_ROWS:
            try:
                return self._record(fn, batch, self._tape).result
            finally:
                self._tape.clear()
        key = (key, batch.starts.tobytes(), tuple((c.kv_type, c.n_ctx) for c in batch.caches))
        known = self._steps.pop(key, None)
        if known is None:
            known = self._first_time(key, fn, batch)
        else:
            self._replay(known, batch)
        if known.replayable:
            self._steps[key] = known
        return known.result

    def _first_time(self, key: Hashable, fn: Callable[[Batch], Array], batch: Batch) -> Recorded:
        mine = self._tape
        self._local.tape = Tape()
        try:
            recorded = self._record(fn, batch, self._local.tape)
        finally:
            self._local.tape = mine
        while len(self._steps) >= KEPT_STEPS:
            self._steps.popitem(last=False)
        return recorded

    def _record(self, fn: Callable[[Batch], Array], batch: Batch, tape: Tape) -> Recorded:
        """Call fn on the batch's device form, and run what it recorded."""
        outer = self._step
        tables = np.array([c.address for c in batch.caches] or [0], np.int64)
        uploaded = self.upload(batch)
        inputs = [getattr(uploaded, name).view() for name in INPUTS]
        recorded = Recorded(tape, uploaded, inputs, tables)
        self._local.step = recorded
        try:
            recorded.result = fn(recorded.batch)
            tape.run(self._workers)
        finally:
            self._local.step = outer
        return recorded

    def _replay(self, known: Recorded, batch: Batch) -> None:
        """Put a batch in the place of the recorded one, and run."""
        for view, name in zip(known.inputs, INPUTS, strict=True):
            view[...] = getattr(batch, name)
        known.caches[:] = [c.address for c in batch.caches] or [0]
        blocks = attention.blocks_after(batch.n_past).tolist()
        if known.growing and blocks != known.blocks:
            for g in known.growing:
                known.tape.set_pieces(g.row, int((g.tiles * blocks).sum()))
            known.blocks = blocks
        known.tape.run(self._workers)

    def close(self) -> None:
        self._steps.clear()

    # ---- matrices

    def embed(self, w: CPUWeight, ids: Array, scale: float = 1.0) -> CPUArray:
        return matmul.record_embed(self._tape, w, ids, scale, self._workers)

    def matmul(self, w: CPUWeight, x: Array, bias: Array | None = None) -> CPUArray:
        return matmul.record_matmul(self._tape, w, x, bias, self._workers, joins=False)

    def matmuls(
        self, ws: Sequence[CPUWeight], x: Array, biases: Sequence[Array | None]
    ) -> list[Array]:
        out = []
        for w in ws:
            matmul.prepare(self._tape, w, x)
        with self._tape.one_stage():
            for i, (w, b) in enumerate(zip(ws, biases, strict=True)):
                out.append(matmul.record_matmul(self._tape, w, x, b, self._workers, i > 0))
        return out

    def matmul_act(self, w: CPUWeight, x: Array, bias: Array | None, kind: Activation) -> CPUArray:
        if w.format is not None or x.shape[0] == 1 or elementwise.ACTIVATIONS.get(kind) is None:
            return super().matmul_act(w, x, bias, kind)
        return matmul.record_matmul(self._tape, w, x, bias, self._workers, False, kind)

    def matmul_experts(
        self, w: CPUWeight, x: Array, experts: Array, bias: Array | None = None
    ) -> CPUArray:
        return record_experts(self._tape, w, x, experts, bias, self._workers)

    # ---- elementwise and rows

    def rms_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> CPUArray:
        return self._norm(elementwise.rms_norm, x, w, eps, bias, group)

    def layer_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> CPUArray:
        return self._norm(elementwise.layer_norm, x, w, eps, bias, group)

    def add_layer_norm(
        self, x: Array, y: Array, w: Array | None, eps: float, bias: Array | None = None
    ) -> CPUArray:
        return self._norm(elementwise.layer_norm, x, w, eps, bias, 0, y)

    def _norm(
        self,
        body: Callable,
        x: CPUArray,
        w: CPUArray | None,
        eps: float,
        bias: CPUArray | None,
        group: int,
        more: CPUArray | None = None,
    ) -> CPUArray:
        n = group or x.shape[-1]
        y = self._new(x.shape)
        args = [x.address, y.address, *(p.address if p is not None else 0 for p in (w, bias))]
        args += [n, float_bits(eps), *(p.size // n if p is not None else 1 for p in (w, bias))]
        args.append(more.address if more is not None else 0)
        self._op(body, x.size // n, args, [x, y, w, bias, more])
        return y

    def rope(self, x: Array, positions: Array, spec: RopeSpec, head_dim: int) -> CPUArray:
        t, n = x.shape
        pairs = len(spec.freqs)
        table = self._rope_table(positions, spec, t, pairs)
        y = self._new(x.shape)
        step, apart = (1, pairs) if spec.pairing == "half" else (2, 1)
        args = [x.address, y.address, table.address, n // head_dim, head_dim, pairs]
        self._op(elementwise.rope, t, [*args, spec.first, step, apart], [x, y, table])
        return y

    def _rope_table(self, positions: CPUArray, spec: RopeSpec, t: int, pairs: int) -> CPUArray:
        """Cosines and sines, once for all layers that turn the same positions alike."""
        key = (spec.freqs.view().tobytes(), spec.scale)  # layers hold equal copies
        if key not in positions.derived:
            table = self._new((t, 2, pairs))
            args = [positions.address, spec.freqs.address, table.address, pairs]
            keep = [positions, spec.freqs, table]
            self._op(elementwise.rope_table, t, [*args, float_bits(spec.scale)], keep)
            positions.derived[key] = table
        return positions.derived[key]

    def act(self, x: Array, kind: Activation) -> CPUArray:
        return self._activate(x, None, kind)

    def act_mul(self, gate: Array, up: Array, kind: Activation) -> CPUArray:
        return self._activate(gate, up, kind)

    def _activate(self, x: CPUArray, up: CPUArray | None, kind: Activation) -> CPUArray:
        if kind not in elementwise.ACTIVATIONS:
            known = ", ".join(elementwise.ACTIVATIONS)
            raise ArgumentError(f"unknown activation {kind!r}; expected one of {known}")
        y = self._new(x.shape)
        args = [x.address, up.address if up is not None else 0, y.address, x.size]
        pieces = -(-x.size // ACT_PIECE)
        self._tape.add(elementwise.act_kernel(kind), pieces, args, max(1, pieces // 16))
        self._tape.keep(x, up)
        return y

    def add(self, x: Array, *ys: Array, scale: float = 1.0) -> CPUArray:
        for y in ys:
            x = self._add(x, y, scale)
        return x

    def _add(self, x: CPUArray, y: CPUArray, scale: float) -> CPUArray:
        n = x.shape[-1]
        out = self._new(x.shape)
        step = 4 * n if y.size == x.size else 0
        args = [x.address, y.address, out.address, n, step, float_bits(scale)]
        self._op(elementwise.add, x.size // n, args, [x, y, out])
        return out

    def mul(self, x: Array, y: Array) -> CPUArray:
        n = x.shape[-1]
        out = self._new(x.shape)
        single = len(y.shape) == len(x.shape) and y.shape[-1] == 1 and n != 1
        step = 4 if single else 4 * n if y.size == x.size else 0
        args = [x.address, y.address, out.address, n, step, single]
        self._op(elementwise.mul, x.size // n, args, [x, y, out])
        return out

    def scale_softcap(self, x: Array, scale: float = 1.0, cap: float = 0.0) -> CPUArray:
        return self._scaled(x, scale, cap, 0.0)

    def clamp(self, x: Array, limit: float) -> CPUArray:
        return self._scaled(x, 1.0, 0.0, limit)

    def _scaled(self, x: CPUArray, scale: float, cap: float, limit: float) -> CPUArray:
        y = self._new(x.shape)
        args = [x.address, y.address, x.size, *(float_bits(v) for v in (scale, cap, limit))]
        self._op(elementwise.scale_softcap, -(-x.size // ACT_PIECE), args, [x, y])
        return y

    def concat(self, xs: Sequence[Array], n_head: int = 1) -> CPUArray:
        t = xs[0].shape[0]
        widths = [4 * x.shape[1] // n_head for x in xs]
        total = sum(widths)
        out = self._new((t, n_head * total // 4))
        offset = 0
        for x, width in zip(xs, widths, strict=True):
            args = [x.address, out.address, width, total, offset]
            self._op(elementwise.concat, t * n_head, args, [x, out])
            offset += width
        return out

    def take(self, x: Array, rows: Array) -> CPUArray:
        n_bytes = x.dtype.itemsize * math.prod(x.shape[1:])
        out = self._new((len(rows), *x.shape[1:]), x.dtype)
        args = [x.address, rows.address, out.address, n_bytes]
        self._op(elementwise.take, len(rows), args, [x, rows, out])
        return out

    # ---- attention

    def cache_write(self, batch: Batch, layer: int, k: Array, v: Array) -> None:
        cache = batch.caches[0]
        c = cache.layers[layer]
        args = [k.address, v.address, *self._past(batch), layer]
        args += [c.n_head_kv, c.head_dim, c.head_dim_v]
        self._write(cache.kv_type, batch.n_rows, args, [k, v, batch])

    def _write(self, kv: KVType, rows: int, args: list[int], keep: list[Any]) -> None:
        self._tape.add(attention.write_kernel(kv), rows, args, max(1, rows // 16))
        self._tape.keep(*keep)

    def _past(self, batch: Batch) -> list[int]:
        """Addresses: the caches' tables, where sequences begin, how much each has stored."""
        return [self._step.caches.ctypes.data, batch.starts.address, batch.n_past.address]

    def attention(
        self,
        batch: Batch,
        layer: int,
        q: Array,
        n_head: int,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: Array | None = None,
        sinks: Array | None = None,
    ) -> CPUArray:
        cache = batch.caches[0]
        heads = (n_head, cache.layers[layer].n_head_kv)
        dims = (cache.layers[layer].head_dim, cache.layers[layer].head_dim_v)
        how = [float_bits(scale), window, float_bits(softcap)]
        how += [a.address if a is not None else 0 for a in (slopes, sinks)] + [True]
        self._tape.keep(slopes, sinks, batch)
        past = [*self._past(batch), batch.n_seq, layer]
        return self._attend(batch, q, heads, dims, cache.kv_type, past, how)

    def attention_full(
        self,
        batch: Batch,
        q: Array,
        k: Array,
        v: Array,
        n_head: int,
        n_head_kv: int,
        *,
        scale: float,
        window: int = 0,
        slopes: Array | None = None,
    ) -> CPUArray:
        dims = (k.shape[1] // n_head_kv, v.shape[1] // n_head_kv)
        stored, _places = self._stored_once(batch, k, v, n_head_kv, dims)  # held until recorded
        past = [*stored, batch.n_seq, 0]
        how = [float_bits(scale), window, 0, slopes.address if slopes is not None else 0, 0, False]
        self._tape.keep(slopes, batch)
        return self._attend(batch, q, (n_head, n_head_kv), dims, "f32", past, how)

    def _stored_once(
        self, batch: Batch, k: CPUArray, v: CPUArray, n_head_kv: int, dims: tuple[int, int]
    ) -> tuple[list[int], list[Any]]:
        """Keys and values of an encoder's rows, laid out as in a cache, for this step only."""
        lengths = np.diff(batch.starts.view())
        tables = np.zeros((batch.n_seq, attention.LAYER // 8), np.int64)
        none_past = self.array(np.zeros(batch.n_seq, np.int32))
        kept: list[Any] = [tables, none_past, k, v, batch]
        rows = padded(lengths).astype(np.int64)
        first = n_head_kv * (
            rows.cumsum() - rows
        )  # of each sequence, all heads of those before it passed
        for i, width in enumerate((dims[0], padded(dims[1]))):
            room = self._new((n_head_kv * int(rows.sum()), width))
            tables[:, i] = room.address + 4 * width * first
            tables[:, i + 2] = 4 * width * rows
            kept.append(room)
        caches = tables.ctypes.data + attention.LAYER * np.arange(batch.n_seq, dtype=np.int64)
        past = [caches.ctypes.data, batch.starts.address, none_past.address]
        args = [k.address, v.address, *past, 0, n_head_kv, *dims]
        self._write("f32", batch.n_rows, args, [*kept, caches])
        return past, kept

    def _attend(
        self,
        batch: Batch,
        q: CPUArray,
        heads: tuple[int, int],
        dims: tuple[int, int],
        kv_type: KVType,
        past: list[int],
        how: list[int],
    ) -> CPUArray:
        """One token a sequence: blocks in parallel, then merged. More: row tiles in parallel."""
        group = heads[0] // heads[1]
        lengths = np.diff(batch.starts.view())
        single = bool((lengths == 1).all()) and how[-1] is True
        m = attention.rows_of(group * int(lengths.max()))
        tiles = -(-lengths * group // m) * heads[1]
        y = self._new((batch.n_rows, heads[0] * dims[1]))
        scratch = self._new((self._workers, attention.scratch_bytes(m, *dims, kv_type)), "u1")
        parts_at = 0
        if single:
            most = tiles * -(-np.array([c.n_ctx for c in batch.caches]) // attention.BLOCK)
            parts = self._new((int(most.sum()), attention.part_bytes(m, dims[1])), "u1")
            parts_at = parts.address
        args = [q.address, y.address, *past, *heads, *dims, *how]
        args += [parts_at, scratch.address, scratch.shape[1]]
        address = attention.attend_kernel(kv_type, m)
        if not single:
            self._tape.add(address, int(tiles.sum()), args)
            self._tape.keep(q, y, scratch)
            return y

        blocks = attention.blocks_after(batch.n_past.view())
        row = self._tape.add(address, int((tiles * blocks).sum()), args)
        if self._step is not None:
            self._step.growing.append(Growing(row, tiles))
        merged = [y.address, *past[1:4], *heads, dims[1], how[4], parts_at]
        merged += [scratch.address, scratch.shape[1]]
        self._tape.add(attention.merge_kernel(m), int(tiles.sum()), merged)
        self._tape.keep(q, y, scratch, parts)
        return y

    # ---- mixtures of experts

    def route(
        self, logits: Array, routing: Routing, bias: Array | None = None
    ) -> tuple[CPUArray, CPUArray]:
        t, n = logits.shape
        r, k = routing, routing.n_used
        experts, weights = self._new((t, k), np.int32), self._new((t, k))
        scratch = self._new((self._workers, 2 * n + 2 * r.n_group))
        gating = ("softmax", "sigmoid", "softmax_selected").index(r.gating)
        args = [logits.address, bias.address if bias is not None else 0]
        args += [experts.address, weights.address, n, k, gating, r.renormalise]
        args += [float_bits(r.scale), r.n_group, r.n_group_used]
        args += [scratch.address, 4 * scratch.shape[1]]
        self._op(elementwise.route, t, args, [logits, bias, experts, weights, scratch])
        return experts, weights

    def combine(self, x: Array, weights: Array) -> CPUArray:
        t, k, n = x.shape
        y = self._new((t, n))
        args = [x.address, weights.address, y.address, k, n]
        self._op(elementwise.combine, t, args, [x, weights, y])
        return y

    # ---- choosing

    def top_k(self, logits: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        return choosing.top_k(self.numpy(logits).reshape(-1), k)

    # ---- recurrent layers

    def conv1d(
        self,
        batch: Batch,
        layer: int,
        x: Array,
        w: Array,
        bias: Array | None,
        name: str = "conv",
    ) -> CPUArray:
        n, width = w.shape
        more = [w.address, bias.address if bias is not None else 0]
        keep = [w, bias]
        return self._carry(recurrent.conv1d, batch, layer, name, x, n, [n, width, *more], keep)

    def scan(
        self, batch: Batch, layer: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array
    ) -> CPUArray:
        n, size = batch.caches[0].arrays[layer]["ssm"].shape
        more = [dt, a, b, c, d]
        args = [n, size, *(m.address for m in more), a.shape[1], b.shape[1] // size]
        return self._carry(recurrent.scan, batch, layer, "ssm", x, n, args, more)

    def shift_rows(self, batch: Batch, layer: int, x: Array, name: str) -> CPUArray:
        args = [4 * x.shape[1]]
        return self._carry(recurrent.shift_rows, batch, layer, name, x, 1, args, [])

    def wkv6(
        self, batch: Batch, layer: int, r: Array, k: Array, v: Array, w: Array, u: Array
    ) -> CPUArray:
        return self._mix(recurrent.wkv6, batch, layer, r, [k, v, w, u])

    def wkv7(
        self, batch: Batch, layer: int, r: Array, w: Array, k: Array, v: Array, a: Array, b: Array
    ) -> CPUArray:
        return self._mix(recurrent.wkv7, batch, layer, r, [w, k, v, a, b])

    def _mix(
        self, body: Callable, batch: Batch, layer: int, r: CPUArray, more: list[CPUArray]
    ) -> CPUArray:
        n_head, dim = batch.caches[0].arrays[layer]["wkv"].shape[:2]
        args = [n_head, dim, *(m.address for m in more)]
        return self._carry(body, batch, layer, "wkv", r, n_head, args, more)

    def _carry(
        self,
        body: Callable,
        batch: Batch,
        layer: int,
        name: str,
        x: CPUArray,
        parts: int,
        args: list[int],
        keep: list[Any],
    ) -> CPUArray:
        """A kernel that goes through each sequence's rows, ``parts`` pieces a sequence."""
        y = self._new(x.shape)
        field_ = batch.caches[0].index(layer, name)
        caches, starts, _ = self._past(batch)
        common = [x.address, y.address, caches, starts, layer, field_]
        self._op(body, parts * batch.n_seq, [*common, *args], [x, batch, *keep])
        return y
