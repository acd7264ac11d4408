"""The cpu backend: each operation becomes an instruction of a program that all threads run.

Nothing is computed when an operation is called: it is recorded on the thread's tape (``program``). The tape
runs when ``numpy`` or ``top_k`` asks for values, and at the end of ``step`` (``steps``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ..backend import (
    Activation,
    Array,
    Backend,
    Batch,
    Compute,
    Device,
    KVType,
    LayerCache,
    RopeSpec,
    Routing,
    Source,
    check_n_threads,
)
from ..outside import Outside
from ..profile import Profile
from . import attention, bfloat, choosing, elementwise, jit, kvwrite, matmul, outside, recurrent
from .attention import padded
from .experts import record_experts
from .fitting import Of, Pieces, Stored, rows_of_heads
from .kvcache import CPUCache
from .limits import limits
from .outside import Replacement
from .program import CPUArray, Tape, aligned, wrapped
from .steps import Steps, blocks_of, lengths_of
from .threads import pool
from .translate import PyFunction
from .weights import CPUWeight, load_weight

NARROW = {np.dtype(np.float64): np.dtype(np.float32), np.dtype(np.int64): np.dtype(np.int32)}
ACT_PIECE = 1024  # values
FEW_ROWS = 32  # rows whose tiles are too few to keep threads busy
CLAIMED = 1 << 15  # positions times columns of pieces of attention that a thread claims at once


class CPUBackend(Backend):
    """Runs on the processor: operations are recorded, and all threads run them when values are needed.

    Parameters
    ----------
    n_threads : int, optional
        Threads asked for; more than there are cores are not started. Default: one per physical core.
    compute : {"f32", "bf16", "exact"}
        "bf16": matrices of floats are multiplied in bfloat16 with more than one token; "exact": quantised ones
        with three times 8 bits of an activation, which is what float32 has of it.

    Raises
    ------
    DeviceError
        The processor does not multiply bfloat16.
    """

    where = Device("cpu")

    def __init__(self, n_threads: int | None = None, compute: Compute = "f32") -> None:
        if compute == "bf16":
            bfloat.check_available()
        self.compute = compute
        pool()  # if it cannot be made, there is no tape whose end would ask for it again
        self._steps = Steps(self.upload)
        self._outside: dict[tuple[str, str], Replacement] = {}
        self._plans: dict[
            Hashable, dict[Any, Any]
        ] = {}  # products with weights of a shape and kind
        self.set_threads(pool().size if n_threads is None else n_threads)

    def set_threads(self, n_threads: int) -> None:
        """Use up to so many threads from the next step on; call it between steps."""
        check_n_threads(n_threads)
        self.n_threads = int(n_threads)  # what the caller asked for
        self._workers = min(self.n_threads, pool().size)
        self._steps.set_workers(self._workers)

    # ---- the tape

    @property
    def _tape(self) -> Tape:
        return self._steps.tape

    def replace_kernels(self, kernels: Sequence[Outside]) -> list[Outside]:
        found = outside.compiled(kernels)
        for k in found.values():
            if k.wants_records and self.compute == "exact":
                raise ArgumentError(f"{k.outside}: compute='exact' makes no records; read x")
        self._outside |= found
        self._steps.forget()
        return [found.outside for found in self._outside.values()]

    def profiled(self) -> AbstractContextManager[Profile]:
        return self._steps.profiled()

    def limits(self, seconds: float) -> dict[str, float]:
        return limits(self._workers, seconds)

    def _op(self, body: PyFunction, pieces: int, /, **args: Any) -> None:
        """Record a kernel without micro-kernels."""
        self._tape.add(jit.kernel(body), pieces, max(1, pieces // 16), **args)

    def _new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> CPUArray:
        return self._tape.array(shape, dtype)

    # ---- weights and transfers

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> CPUWeight:
        weight = load_weight(source, rows, self._workers, self.compute == "exact")
        weight.plans = self._plans.setdefault((weight.shape, weight.kind), {})
        for operation in ("matvec", "matmul"):
            if found := self._outside.get((operation, weight.kind)):
                weight.outside[operation] = found
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
        self._steps.settle_for_values()
        return x.view()

    def save(self, x: CPUArray, first: int, out: np.ndarray) -> bool:
        fits = x.shape[1:] == out.shape[1:] and first + len(out) <= x.shape[0]
        if not fits or x.dtype != np.float32:
            return False
        body = elementwise.save_half if out.dtype == np.float16 else elementwise.save
        n = math.prod(x.shape[1:])
        self._op(body, len(out), x=x, y=wrapped(out), n=n, begin=first)
        return True

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> CPUCache:
        return CPUCache(layers, n_ctx, kv_type, self._steps.settle)

    # ---- steps

    def step(self, key: Hashable | None, fn: Callable[[Batch], Array], batch: Batch) -> Array:
        return self._steps.run(key, fn, batch)

    def close(self) -> None:
        self._steps.forget()

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
        plain = w.reader and x.shape[0] > 1 and "matmul" not in w.outside
        if not plain or elementwise.ACTIVATIONS.get(kind) is None:
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
        return self._norm(elementwise.layer_norm, x, w, eps, bias, group, more=None)

    def add_layer_norm(
        self, x: Array, y: Array, w: Array | None, eps: float, bias: Array | None = None
    ) -> CPUArray:
        return self._norm(elementwise.layer_norm, x, w, eps, bias, 0, more=y)

    def _norm(
        self,
        body: PyFunction,
        x: CPUArray,
        w: CPUArray | None,
        eps: float,
        bias: CPUArray | None,
        group: int,
        **more: CPUArray | None,
    ) -> CPUArray:
        n = group or x.shape[-1]
        y = self._new(x.shape)
        w_period, b_period = (p.size // n if p is not None else 0 for p in (w, bias))
        periods = {"w_period": w_period, "b_period": b_period}
        kernel = jit.kernel(body)
        if body is elementwise.rms_norm and (found := self._outside.get(("rms_norm", ""))):
            kernel = found.kernel
        pieces = x.size // n
        args = {"x": x, "y": y, "w": w, "bias": bias, "n": n, "eps": eps, **periods, **more}
        self._tape.add(kernel, pieces, max(1, pieces // 16), False, **args)
        return y

    def rope(self, x: Array, positions: Array, spec: RopeSpec, head_dim: int) -> CPUArray:
        t, n = x.shape
        pairs = len(spec.freqs)
        table = self._rope_table(positions, spec, t, pairs)
        y = self._new(x.shape)
        step, apart = (1, pairs) if spec.pairing == "half" else (2, 1)
        heads = {"n_head": n // head_dim, "head_dim": head_dim}
        places = {"pairs": pairs, "start": spec.first, "step": step, "apart": apart}
        self._op(elementwise.rope, t, x=x, y=y, table=table, **heads, **places)
        return y

    def _rope_table(self, positions: CPUArray, spec: RopeSpec, t: int, pairs: int) -> CPUArray:
        """Cosines and sines, once for all layers that turn the same positions alike."""
        made = self._tape.made_of(positions)
        key = (spec.freqs.view().tobytes(), spec.scale)  # layers hold equal copies
        if key not in made:
            made[key] = table = self._new((t, 2, pairs))
            args = {"positions": positions, "freqs": spec.freqs, "scale": spec.scale}
            self._op(elementwise.rope_table, t, table=table, pairs=pairs, **args)
        return made[key]

    def act(self, x: Array, kind: Activation) -> CPUArray:
        return self._activate(x, None, kind)

    def act_mul(self, gate: Array, up: Array, kind: Activation) -> CPUArray:
        return self._activate(gate, up, kind)

    def _activate(self, x: CPUArray, up: CPUArray | None, kind: Activation) -> CPUArray:
        if kind not in elementwise.ACTIVATIONS:
            known = ", ".join(elementwise.ACTIVATIONS)
            raise ArgumentError(f"unknown activation {kind!r}; expected one of {known}")
        y = self._new(x.shape)
        pieces = -(-x.size // ACT_PIECE)
        found = self._outside.get(("act", kind))
        kernel = found.kernel if found else elementwise.act_kernel(kind)
        self._tape.add(kernel, pieces, max(1, pieces // 16), x=x, up=up, y=y, n=x.size)
        return y

    def add(self, x: Array, *ys: Array, scale: float = 1.0) -> CPUArray:
        for y in ys:
            x = self._add(x, y, scale)
        return x

    def _add(self, x: CPUArray, y: CPUArray, scale: float) -> CPUArray:
        n = x.shape[-1]
        out = self._new(x.shape)
        step = 4 * n if y.size == x.size else 0
        self._op(elementwise.add, x.size // n, x=x, y=y, out=out, n=n, y_step=step, scale=scale)
        return out

    def mul(self, x: Array, y: Array) -> CPUArray:
        n = x.shape[-1]
        out = self._new(x.shape)
        single = len(y.shape) == len(x.shape) and y.shape[-1] == 1 and n != 1
        step = 4 if single else 4 * n if y.size == x.size else 0
        self._op(elementwise.mul, x.size // n, x=x, y=y, out=out, n=n, y_step=step, single=single)
        return out

    def scale_softcap(self, x: Array, scale: float = 1.0, cap: float = 0.0) -> CPUArray:
        return self._scaled(x, scale, cap, 0.0)

    def clamp(self, x: Array, limit: float) -> CPUArray:
        return self._scaled(x, 1.0, 0.0, limit)

    def _scaled(self, x: CPUArray, scale: float, cap: float, limit: float) -> CPUArray:
        y = self._new(x.shape)
        how = {"scale": scale, "cap": cap, "limit": limit}
        self._op(elementwise.scale_softcap, -(-x.size // ACT_PIECE), x=x, y=y, n=x.size, **how)
        return y

    def concat(self, xs: Sequence[Array], n_head: int = 1) -> CPUArray:
        t = xs[0].shape[0]
        widths = [4 * x.shape[1] // n_head for x in xs]
        total = sum(widths)
        out = self._new((t, n_head * total // 4))
        offset = 0
        for x, width in zip(xs, widths, strict=True):
            place = {"n_bytes": width, "y_bytes": total, "offset": offset}
            self._op(elementwise.concat, t * n_head, x=x, y=out, **place)
            offset += width
        return out

    def take(self, x: Array, rows: Array) -> CPUArray:
        n_bytes = x.dtype.itemsize * math.prod(x.shape[1:])
        out = self._new((len(rows), *x.shape[1:]), x.dtype)
        self._op(elementwise.take, len(rows), x=x, rows=rows, y=out, n_bytes=n_bytes)
        return out

    # ---- attention

    def cache_write(self, batch: Batch, layer: int, k: Array, v: Array) -> None:
        cache = batch.caches[0]
        c = cache.layers[layer]
        dims = {"n_head": c.n_head_kv, "dim": c.head_dim, "dim_v": c.head_dim_v}
        past = {**self._sequences(batch), "n_past": batch.n_past, "layer": layer}
        kernel, rows = kvwrite.write_kernel(cache.kv_type), batch.n_rows
        self._tape.add(kernel, rows, max(1, rows // 16), k=k, v=v, **past, **dims)

    def _sequences(self, batch: Batch) -> dict[str, Any]:
        """The caches' tables, and where sequences begin."""
        step = self._steps.now
        assert step is not None, "caches are used within a step only"
        caches = step.caches if step.batch.source is not batch else step.sources
        return {"caches": caches, "starts": batch.starts}

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
        bias: Array | None = None,
    ) -> CPUArray:
        cache = batch.caches[0]
        c = cache.layers[layer]
        dims = {"n_head_kv": c.n_head_kv, "dim": c.head_dim, "dim_v": c.head_dim_v}
        past = {**self._sequences(batch), "n_past": batch.n_past, "layer": layer}
        how = {"scale": scale, "window": window, "cap": softcap, "slopes": slopes, "sinks": sinks}
        how |= {"bias": bias, "n_bias": 0 if bias is None else bias.shape[1]}
        return self._attend(batch, q, n_head, cache.kv_type, causal=True, **dims, **past, **how)

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
        bias: Array | None = None,
    ) -> CPUArray:
        dims = {"dim": k.shape[1] // n_head_kv, "dim_v": v.shape[1] // n_head_kv}
        stored = {**self._stored_once(batch, n_head_kv, **dims), "starts": batch.starts}
        places = {"caches": stored["caches"], "starts": batch.starts, "n_head": n_head_kv}
        tiles, kernel = self._pieces(batch, 1, 16, 1, "tile"), kvwrite.write_whole_kernel()
        tiles.rows.append(self._tape.add(kernel, tiles.n, 4, k=k, v=v, **places, **dims))
        how = {"scale": scale, "window": window, "cap": 0.0, "slopes": slopes, "sinks": None}
        how |= {"bias": bias, "n_bias": 0 if bias is None else bias.shape[1]}
        dims["n_head_kv"] = n_head_kv
        how |= {"causal": False, "layer": 0}
        return self._attend(batch, q, n_head, "f32", **dims, **stored, **how)

    def _stored_once(self, batch: Batch, n_head_kv: int, dim: int, dim_v: int) -> dict[str, Any]:
        """Where an encoder's layers store the keys and values of this step's rows, one after the other."""
        made, key = self._tape.made_of(batch.starts), ("stored", n_head_kv, dim, dim_v)
        if key not in made:
            rows = rows_of_heads(batch.n_rows, batch.n_seq, n_head_kv)
            places = [self._new((rows, width)) for width in (dim, padded(dim_v))]
            stored = Stored(places, batch.n_rows, batch.n_seq, n_head_kv)
            stored.keep(self._tape)
            stored.fit(self._tape, *self._lengths(batch))
            self._steps.follow(stored)
            n_past = self.array(np.zeros(batch.n_seq, np.int32))
            made[key] = {"caches": stored.caches, "n_past": n_past}, places  # held until recorded
        return made[key][0]

    def _lengths(self, batch: Batch) -> tuple[list[int], list[int]]:
        """How many rows each sequence has, and how many blocks they see."""
        made = self._tape.made_of(batch.starts)
        if "lengths" not in made:
            lengths = lengths_of(batch.starts.view())
            made["lengths"] = lengths, blocks_of(lengths, batch.n_past.view().tolist())
        return made["lengths"]

    def _pieces(self, batch: Batch, group: int, rows: int, n_head_kv: int, of: Of) -> Pieces:
        """The pieces of all layers whose heads are grouped alike."""
        made, sizes = self._tape.made_of(batch.starts), (group, rows, n_head_kv, of)
        if sizes not in made:
            made[sizes] = Pieces(*sizes, *self._lengths(batch))
            self._steps.follow(made[sizes])
        return made[sizes]

    def _attend(
        self,
        batch: Batch,
        q: CPUArray,
        n_head: int,
        kv_type: KVType,
        **args: Any,
    ) -> CPUArray:
        """One token a sequence, or few rows: blocks in parallel, then merged. More: row tiles in parallel."""
        dim_v, n_head_kv = args["dim_v"], args["n_head_kv"]
        lengths, _ = self._lengths(batch)
        group, most = n_head // n_head_kv, max(lengths)
        few = args["causal"] and (most == 1 or batch.n_rows <= FEW_ROWS)
        rows = attention.rows_of(group, most)
        y = self._new((batch.n_rows, n_head * dim_v))
        scratch = self._tape.scratch(self._workers, attention.scratch_bytes(rows, dim_v))
        args |= {"q": q, "y": y, "n_head": n_head, "n_seq": batch.n_seq, "parts": None}
        args |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
        kernel = attention.attend_kernel(kv_type, rows)
        if not few:
            tiles = self._pieces(batch, group, rows, n_head_kv, "tile")
            chunk = max(1, min(8, CLAIMED // (most * args["dim"])))
            tiles.rows.append(self._tape.add(kernel, tiles.n, chunk, **args))
            return y

        blocks = self._pieces(batch, group, rows, n_head_kv, "block")
        args["parts"] = self._new((blocks.room, attention.part_bytes(rows, dim_v)), "u1")
        chunk = max(1, blocks.n // (16 * self._workers))
        blocks.rows.append(self._tape.add(kernel, blocks.n, chunk, **args))
        merge = attention.merge_kernel(rows)
        merged = {name: args[name] for name in merge.parameters}
        merges = self._pieces(batch, group, rows, n_head_kv, "merge")
        merges.rows.append(self._tape.add(merge, merges.n, **merged))
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
        args = {"logits": logits, "bias": bias, "experts": experts, "weights": weights}
        args |= {"n": n, "k": k, "gating": gating, "renormalise": r.renormalise, "scale": r.scale}
        args |= {"n_group": r.n_group, "n_group_used": r.n_group_used}
        args |= {"scratch": scratch, "scratch_bytes": 4 * scratch.shape[1]}
        self._op(elementwise.route, t, **args)
        return experts, weights

    def combine(self, x: Array, weights: Array) -> CPUArray:
        t, k, n = x.shape
        y = self._new((t, n))
        self._op(elementwise.combine, t, x=x, weights=weights, y=y, k=k, n=n)
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
        y, args = self._carried(batch, layer, name, x.shape)
        more = {"n": n, "width": width, "w": w, "bias": bias}
        self._op(recurrent.conv1d, n * batch.n_seq, x=x, **args, **more)
        return y

    def scan(
        self, batch: Batch, layer: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array
    ) -> CPUArray:
        n, size = batch.caches[0].arrays[layer]["ssm"].shape
        y, args = self._carried(batch, layer, "ssm", x.shape)
        args |= {"n": n, "size": size, "n_decay": a.shape[1], "n_group": b.shape[1] // size}
        self._op(recurrent.scan, n * batch.n_seq, x=x, dt=dt, a=a, b=b, c=c, d=d, **args)
        return y

    def shift_rows(self, batch: Batch, layer: int, x: Array, name: str) -> CPUArray:
        y, args = self._carried(batch, layer, name, x.shape)
        self._op(recurrent.shift_rows, batch.n_seq, x=x, n_bytes=4 * x.shape[1], **args)
        return y

    def wkv6(
        self, batch: Batch, layer: int, r: Array, k: Array, v: Array, w: Array, u: Array
    ) -> CPUArray:
        return self._mix(recurrent.wkv6, batch, layer, r=r, k=k, v=v, w=w, u=u)

    def wkv7(
        self, batch: Batch, layer: int, r: Array, w: Array, k: Array, v: Array, a: Array, b: Array
    ) -> CPUArray:
        return self._mix(recurrent.wkv7, batch, layer, r=r, w=w, k=k, v=v, a=a, b=b)

    def _mix(self, body: PyFunction, batch: Batch, layer: int, **arrays: CPUArray) -> CPUArray:
        n_head, dim = batch.caches[0].arrays[layer]["wkv"].shape[:2]
        y, args = self._carried(batch, layer, "wkv", arrays["r"].shape)
        self._op(body, n_head * batch.n_seq, n_head=n_head, dim=dim, **args, **arrays)
        return y

    def _carried(
        self, batch: Batch, layer: int, name: str, shape: tuple[int, ...]
    ) -> tuple[CPUArray, dict[str, Any]]:
        """The output, and what kernels that go through each sequence's rows are given."""
        y, place = self._new(shape), batch.caches[0].index(layer, name)
        return y, {"y": y, **self._sequences(batch), "layer": layer, "field": place}
