"""A GPU as a ``Backend``: memory, the choice of kernels, and operations as launches of kernels.

``cuda`` and ``opencl`` add memory and launches. The operations live in modules of their own, by subject;
``choose_product`` and ``choose_attention`` decide here which kernels a product or an attention takes.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import numpy as np

from ...errors import ArgumentError, DeviceError
from ..backend import (
    Activation,
    Backend,
    Batch,
    HeadNorms,
    KVType,
    LayerCache,
    RopeSpec,
    Routing,
    Source,
)
from ..choose import Best
from ..outside import Outside
from ..profile import Profile
from . import (
    attention_tensor,
    choosing,
    elementwise,
    kvcache,
    profile,
    recurrent,
    weights,
)
from . import (
    batch as batches,
)
from . import (
    experts as expert_rows,
)
from .arrays import Buffer, GPUArray, Pool, i32
from .attention import PlainAttention, Query
from .attention_tensor import TensorAttention
from .batch import DeviceBatch
from .kvcache import GPUCache, Side, Store
from .matmul import Job, Matvec, Tiles, runs
from .matmul_library import Library
from .matmul_tensor import TensorTiles
from .outside import OutsideProduct
from .sources import Program, Size
from .steps import MOST_ROWS, NotRecordable, Steps
from .weights import LAYOUTS, PLAIN, GPUWeight

Product = Matvec | Tiles | TensorTiles | Library | OutsideProduct
MATVEC_ROWS = 16  # rows of activations up to which matvec.c is the fastest
MATVEC_ROWS_BESIDE_TENSOR_CORES = {"plain": 8, "quantised": 4}
LIBRARY_ROWS = (
    256  # rows of activations from which it pays to decode a whole quantised matrix first
)
MATVEC_CHOICES = 32  # (row, expert) pairs; with more, rows are sorted by expert
_NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


class GPUBackend(Backend):
    """One GPU. ``Backend`` says what each operation promises."""

    n_cores: int  # multiprocessors, compute units
    max_threads = 512  # that a group may have; a power of two
    n_counters = 1024  # groups of a launch that can find out which of them is the last
    tensor_cores = False  # whether the device runs kernels that include src/tensor.h
    library: Library | None = None  # where a library's matrix product is installed
    any_quantised = False  # whether a quantised matrix was loaded
    recording = False  # launches are kept, to be carried out later
    closed = False

    def __init__(self) -> None:
        self.pool = Pool(self.allocate, self.free)  # holds arrays that belong to a step
        self.kept = Pool(self.allocate, self.free)  # holds arrays that outlive it
        self._weights: weakref.WeakSet[GPUWeight] = weakref.WeakSet()
        self._codebooks: dict[str, GPUArray] = {}
        self._stores: dict[tuple[tuple[LayerCache, ...], KVType], Store] = {}
        self._heads: dict[tuple[int, int], GPUArray] = {}
        self._counters: GPUArray | None = None
        self.outside: dict[tuple[str, str], OutsideProduct] = {}  # by operation and format
        self._steps = Steps(self)
        self.matvec, self.tiles, self.tensor_tiles = Matvec(self), Tiles(self), TensorTiles(self)
        self.plain_attention, self.tensor_attention = PlainAttention(self), TensorAttention(self)

    # ---- which kernels

    def choose_product(self, w: GPUWeight, n_rows: int) -> Product:
        """The kernels that multiply ``n_rows`` rows of activations with w in the least time.

        A few rows go through matvec.c, which reads each weight once; more through tensor cores, or through
        tiles in local memory where there are none. From LIBRARY_ROWS on a library is faster still, although
        quantised weights have to be decoded for it; plain ones are used as they lie, and so at any number of
        rows.
        """
        if found := self.outside.get(("matvec" if n_rows == 1 else "matmul", w.kind)):
            return found
        plain = w.kind in PLAIN
        few = MATVEC_ROWS
        if self.tensor_cores:
            few = MATVEC_ROWS_BESIDE_TENSOR_CORES["plain" if plain else "quantised"]
        if n_rows <= few:
            return self.matvec
        if self.library is not None and self.library.takes(w) and (plain or n_rows >= LIBRARY_ROWS):
            return self.library
        if self.tensor_cores and not plain:
            return self.tensor_tiles
        return self.tiles

    def choose_expert_product(self, w: GPUWeight, n_choices: int) -> Matvec | Tiles | TensorTiles:
        """The kernels for a stack of experts' matrices and so many (row, expert) pairs."""
        if n_choices <= MATVEC_CHOICES:
            return self.matvec
        if self.tensor_cores and w.kind not in PLAIN:
            return self.tensor_tiles
        return self.tiles

    def choose_attention(self, query: Query) -> PlainAttention | TensorAttention:
        """The kernels for queries over what is stored: tensor cores where they can."""
        fits = self.tensor_cores and attention_tensor.takes(query)
        return self.tensor_attention if fits else self.plain_attention

    # ---- what a front end provides

    @abstractmethod
    def _allocate(self, nbytes: int) -> Buffer:
        """Take device memory, or raise MemoryError."""

    @abstractmethod
    def free(self, buffer: Buffer) -> None:
        """Give memory back to the driver; kernels already queued may still read it."""

    @abstractmethod
    def put(self, buffer: Buffer, offset: int, x: np.ndarray) -> None:
        """Copy a host array to ``offset`` bytes into the buffer; x may change afterwards."""

    @abstractmethod
    def get(self, buffer: Buffer, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of a buffer, uint8, when all that was launched before has run."""

    @abstractmethod
    def fetch(self, buffer: Buffer, nbytes: int) -> Callable[[], np.ndarray]:
        """Queue a copy of a buffer's first bytes to the host; the call that is returned waits for just that."""

    @abstractmethod
    def copy(
        self, target: Buffer, source: Buffer, nbytes: int, start: int = 0, to: int = 0
    ) -> None:
        """Queue a copy of bytes of a buffer, from ``start`` on, to ``to`` in another, or elsewhere in it."""

    @abstractmethod
    def finish(self) -> None:
        """Return when all that was queued is done."""

    @abstractmethod
    def timed(self, queue: Callable[[], None]) -> Callable[[], float]:
        """Call what queues work; what is returned waits for it, and says how many seconds the device took."""

    @abstractmethod
    def view(self, buffer: Buffer, offset: int, nbytes: int) -> Buffer:
        """A part of a buffer, which must outlive it."""

    @abstractmethod
    def launch(
        self, program: Program, kernel: str, groups: Size, threads: Size, *args: Any
    ) -> None:
        """Queue a kernel. Arguments: arrays, buffers, None for no buffer, NumPy scalars."""

    @abstractmethod
    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record the launches of ``run`` without carrying them out: how to replay them, and its result.

        Raises NotRecordable if ``run`` copies between host and device.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""

    # ---- memory

    def allocate(self, nbytes: int) -> Buffer:
        """Take device memory; spare buffers are freed first if there is too little, then DeviceError."""
        try:
            return self._allocate(max(nbytes, 256))
        except MemoryError:
            self._free_spare()
        try:
            return self._allocate(max(nbytes, 256))
        except MemoryError as e:
            free, total = self.memory()
            raise DeviceError(
                f"{self.name}: {nbytes >> 20} MiB more do not fit, {free >> 20} of "
                f"{total >> 20} MiB are free; use a smaller n_ctx or n_gpu_layers"
            ) from e

    def _free_spare(self) -> None:
        self.refuse_recording()
        self.forget()
        self.pool.trim()
        self.kept.trim()
        for store in list(self._stores.values()):
            store.trim()

    def idle(self) -> int:
        """Bytes of the stores that are freed when something else needs them."""
        return sum(int(store.idle) for store in list(self._stores.values()))

    def close(self) -> None:
        """Free the weights, the stores and the spare buffers."""
        if self.closed:
            return
        self.closed = True
        self.forget()
        for w in list(self._weights):
            self.free(w.buffer)
            w.buffer = None
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self._codebooks.clear()
        self._heads.clear()
        self._counters = None
        self.pool.close()
        self.kept.close()

    # ---- arrays

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> GPUArray:
        """An array of this step, its values undefined."""
        return self._new(shape, dtype, self.pool)

    def _new(self, shape: tuple[int, ...], dtype: Any, pool: Pool) -> GPUArray:
        buffer, room = pool.take(prod(shape) * np.dtype(dtype).itemsize)
        return GPUArray(shape, dtype, buffer, pool, room=room)

    def array(self, x: np.ndarray) -> GPUArray:
        # never a buffer of `pool`: recorded steps write to those although they are spare
        x = np.asarray(x)
        x = np.ascontiguousarray(x, _NARROW.get(x.dtype, x.dtype)).reshape(x.shape)
        y = self._new(x.shape, x.dtype, self.kept)
        if x.size:
            self.put(y.buffer, 0, x)
        return y

    def numpy(self, x: GPUArray | np.ndarray) -> np.ndarray:
        if isinstance(x, np.ndarray):
            return x
        if not x.size:
            return np.empty(x.shape, x.dtype)
        return self.get(x.buffer, 0, x.nbytes).view(x.dtype).reshape(x.shape)

    def counters(self) -> GPUArray:
        """Zeros, int32 [n_counters], by which a launch finds its last group; it leaves zeros behind."""
        if self._counters is None:
            self._counters = self.array(np.zeros(self.n_counters, np.int32))
        return self._counters

    def codebook(self, kind: str) -> Buffer | None:
        """The codebook of a format on the device, or None."""
        name = None if kind in PLAIN else LAYOUTS[kind].grid
        if name is None:
            return None
        if name not in self._codebooks:
            self._codebooks[name] = self.array(weights.codebook_words(name))
        return self._codebooks[name].buffer

    def each(self, program: Program, kernel: str, count: int, *args: Any) -> None:
        """Launch one thread for each of ``count`` values; the kernel's last argument is the count."""
        self.launch(program, kernel, (-(-count // 256), 1, 1), (256, 1, 1), *args, i32(count))

    # ---- steps

    def step(self, key: Hashable | None, fn: Callable[[Batch], GPUArray], batch: Batch) -> GPUArray:
        if key is None or batch.n_rows > MOST_ROWS:
            return fn(self.upload(batch))
        return self._steps.run(key, fn, batch)

    def replace_kernels(self, kernels: Sequence[Outside]) -> list[Outside]:
        mine = [k for k in kernels if k.language in (self.where.kind, "both")]
        self.outside |= {k.key: OutsideProduct(self, k) for k in mine}
        self.forget()
        return mine

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

    def upload(self, batch: Batch) -> DeviceBatch:
        return batches.upload(self, batch)

    def forget(self) -> None:
        """Drop the recorded steps, which hold on to spare buffers."""
        self._steps.forget()

    def refuse_recording(self) -> None:
        """Give a recording up: what comes now is done at once, or frees memory that the recording refers to."""
        if self.recording:
            raise NotRecordable

    # ---- matrices

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> GPUWeight:
        w = weights.load(self, source, rows)
        self.any_quantised |= w.kind not in PLAIN
        self._weights.add(w)
        return w

    def embed(self, w: GPUWeight, ids: GPUArray, scale: float = 1.0) -> GPUArray:
        return self.matvec.embed(w, ids, scale)

    def matmul(self, w: GPUWeight, x: GPUArray, bias: GPUArray | None = None) -> GPUArray:
        y = self.matvec.pending(w, x, bias)
        return self.matmuls([w], x, [bias])[0] if y is None else y

    def matmuls(
        self, ws: Sequence[GPUWeight], x: GPUArray, biases: Sequence[GPUArray | None]
    ) -> list[GPUArray]:
        n_x = x.size // x.shape[-1]
        ys = [self.empty((*x.shape[:-1], w.n_out)) for w in ws]
        for w in ws:
            if x.shape[-1] != w.n_in:
                raise ArgumentError(f"x {x.shape} does not fit a matrix of {w.shape}")
        for run in runs(map(Job, ws, biases, ys)):
            self.choose_product(run[0].w, n_x).multiply(run, x, n_x)
        return ys

    def matmul_gated(
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        biases: Sequence[GPUArray | None],
        kind: Activation,
    ) -> GPUArray:
        if x.size > x.shape[-1] or not self.matvec.fits_gated(ws, x):
            return super().matmul_gated(ws, x, biases, kind)
        code = elementwise.code_of(elementwise.ACTIVATIONS, kind)
        return self.matvec.multiply_gated(ws, x, biases, code)

    def matmul_experts_gated(
        self,
        ws: Sequence[GPUWeight],
        x: GPUArray,
        experts: GPUArray,
        biases: Sequence[GPUArray | None],
        kind: Activation,
    ) -> GPUArray:
        if experts.size > MATVEC_CHOICES or not self.matvec.fits_gated(ws, x):
            return super().matmul_experts_gated(ws, x, experts, biases, kind)
        code = elementwise.code_of(elementwise.ACTIVATIONS, kind)
        return self.matvec.multiply_gated(ws, x, biases, code, experts)

    def matmul_experts(
        self, w: GPUWeight, x: GPUArray, experts: GPUArray, bias: GPUArray | None = None
    ) -> GPUArray:
        y = self.empty((*experts.shape, w.n_out))
        product = self.choose_expert_product(w, experts.size)
        product.multiply_choices(Job(w, bias, y), x, experts)
        return y

    def matmul_heads(self, w: GPUWeight, x: GPUArray) -> GPUArray:
        h, n_out, n_in = w.shape
        t = x.shape[0]
        if (t, h) not in self._heads:
            self._heads[t, h] = self.array(np.tile(np.arange(h, dtype=np.int32), (t, 1)))
        y = self.matmul_experts(w, x.reshape(t, h, n_in), self._heads[t, h])
        return y.reshape(t, h * n_out)

    # ---- elementwise and rows

    def rms_norm(
        self,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None = None,
        group: int = 0,
    ) -> GPUArray:
        return elementwise.norm(self, x, w, eps, bias, group, centre=False)

    def layer_norm(
        self,
        x: GPUArray,
        w: GPUArray | None,
        eps: float,
        bias: GPUArray | None = None,
        group: int = 0,
    ) -> GPUArray:
        return elementwise.norm(self, x, w, eps, bias, group, centre=True)

    def rope(self, x: GPUArray, positions: GPUArray, spec: RopeSpec, head_dim: int) -> GPUArray:
        return elementwise.rope(self, x, positions, spec, head_dim)

    def act(self, x: GPUArray, kind: Activation) -> GPUArray:
        return elementwise.act(self, x, None, kind)

    def act_mul(self, gate: GPUArray, up: GPUArray, kind: Activation) -> GPUArray:
        return elementwise.act(self, gate, up, kind)

    def add(self, x: GPUArray, *ys: GPUArray, scale: float = 1.0) -> GPUArray:
        for y in ys:
            x = elementwise.add(self, x, y, scale)
        return x

    def mul(self, x: GPUArray, y: GPUArray) -> GPUArray:
        return elementwise.combine_two(self, x, y, product=True)

    def scale_softcap(self, x: GPUArray, scale: float = 1.0, cap: float = 0.0) -> GPUArray:
        return elementwise.scale_softcap(self, x, scale, cap)

    def clamp(self, x: GPUArray, limit: float) -> GPUArray:
        return elementwise.clamp(self, x, limit)

    def concat(self, xs: Sequence[GPUArray], n_head: int = 1) -> GPUArray:
        return elementwise.concat(self, xs, n_head)

    def repeat(self, x: GPUArray, n: int) -> GPUArray:
        return elementwise.repeat(self, x, n)

    def take(self, x: GPUArray, rows: GPUArray) -> GPUArray:
        return elementwise.take(self, x, rows)

    # ---- attention

    def store(self, layers: Sequence[LayerCache], kv_type: KVType) -> Store:
        """The pages of all sequences with these layers."""
        key = tuple(layers), kv_type
        if key not in self._stores:
            self._stores[key] = Store(self, layers, kv_type)
        return self._stores[key]

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> GPUCache:
        return GPUCache(self, self.store(layers, kv_type), n_ctx)

    def cache_write(self, batch: Batch, layer: int, k: GPUArray, v: GPUArray) -> None:
        b = batches.on_device(self, batch)
        kvcache.write_batch(self, b, batches.shared_store(b), layer, k, v)

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
        if head_dim > kvcache.MOST_DIM:
            return super().rope_write(batch, layer, q, k, v, spec, head_dim, norms)
        b = batches.on_device(self, batch)
        store = batches.shared_store(b)
        return kvcache.rope_write(self, b, store, layer, q, k, v, spec, head_dim, norms)

    def attention(
        self,
        batch: Batch,
        layer: int,
        q: GPUArray,
        n_head: int,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        slopes: GPUArray | None = None,
        sinks: GPUArray | None = None,
        bias: GPUArray | None = None,
    ) -> GPUArray:
        b = batches.on_device(self, batch)
        store = batches.shared_store(b)
        k, v = (store.layout.sides[layer][name] for name in ("k", "v"))
        query = Query(q, n_head, k, v, scale, window, softcap, slopes, sinks, bias)
        return self.choose_attention(query).attend(b, query, store)

    def attention_full(
        self,
        batch: Batch,
        q: GPUArray,
        k: GPUArray,
        v: GPUArray,
        n_head: int,
        n_head_kv: int,
        *,
        scale: float,
        window: int = 0,
        slopes: GPUArray | None = None,
        bias: GPUArray | None = None,
    ) -> GPUArray:
        b = batches.on_device(self, batch)
        k_side, v_side = (Side(0, n_head_kv, x.shape[-1] // n_head_kv, 0, "f32") for x in (k, v))
        query = Query(q, n_head, k_side, v_side, scale, window, slopes=slopes, bias=bias)
        return self.plain_attention.attend_rows(b, query, k, v)

    # ---- mixtures of experts

    def route(
        self, logits: GPUArray, routing: Routing, bias: GPUArray | None = None
    ) -> tuple[GPUArray, GPUArray]:
        return expert_rows.route(self, logits, routing, bias)

    def combine(self, x: GPUArray, weights: GPUArray) -> GPUArray:
        return expert_rows.combine(self, x, weights)

    # ---- choosing

    picks = choosing.PICKS

    def pick(self, logits: GPUArray, k: int) -> tuple[GPUArray, GPUArray]:
        return choosing.pick(self, logits, k)

    def picked(self, result: tuple[GPUArray, GPUArray]) -> list[Best]:
        return choosing.read(self, result[0], self.numpy(result[1]))

    def picked_later(self, result: tuple[GPUArray, GPUArray]) -> Callable[[], list[Best]]:
        logits, found = result
        fetched = self.fetch(found.buffer, found.nbytes)
        return lambda: choosing.read(self, logits, fetched().view(np.int32).reshape(found.shape))

    def top_k(self, logits: GPUArray | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return choosing.top_k(self, logits, k)

    # ---- recurrent layers

    def conv1d(
        self,
        batch: Batch,
        layer: int,
        x: GPUArray,
        w: GPUArray,
        bias: GPUArray | None,
        name: str = "conv",
    ) -> GPUArray:
        return recurrent.conv1d(self, batch, layer, x, w, bias, name)

    def scan(
        self,
        batch: Batch,
        layer: int,
        x: GPUArray,
        dt: GPUArray,
        a: GPUArray,
        b: GPUArray,
        c: GPUArray,
        d: GPUArray,
    ) -> GPUArray:
        return recurrent.scan(self, batch, layer, x, dt, a, b, c, d)

    def shift_rows(self, batch: Batch, layer: int, x: GPUArray, name: str) -> GPUArray:
        return recurrent.shift_rows(self, batch, layer, x, name)

    def wkv6(
        self,
        batch: Batch,
        layer: int,
        r: GPUArray,
        k: GPUArray,
        v: GPUArray,
        w: GPUArray,
        u: GPUArray,
    ) -> GPUArray:
        return recurrent.wkv(self, "wkv6", batch, layer, r, k, v, w, u)

    def wkv7(
        self,
        batch: Batch,
        layer: int,
        r: GPUArray,
        w: GPUArray,
        k: GPUArray,
        v: GPUArray,
        a: GPUArray,
        b: GPUArray,
    ) -> GPUArray:
        return recurrent.wkv(self, "wkv7", batch, layer, r, w, k, v, a, b)
