"""The operations that every device provides, their shapes and their contracts.

A model's mathematics is written once, in ``tinyllm.models``, as calls of these methods. Arrays are the
backend's own (NumPy, CuPy, OpenCL buffers); all that the caller may use of one is its ``shape``.
Activations are float32, dense, one row per token: ``x [T, n]``. Heads lie side by side in a row:
``q [T, H * D]``. Letters: T rows (tokens of all sequences of this step), S stored positions, H query heads,
K key/value heads, D head_dim, E n_embd, V n_vocab.

An operation may compute at once, record itself to be run when a result is asked for, or be captured
into a graph: a caller sees no difference, because only ``numpy``, ``top_k`` and ``picked`` return values.
Outputs belong to the step (they may be overwritten by the next one); what must outlive it is fetched with
``numpy``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from .. import system
from ..errors import ArgumentError, DeviceError
from .batch import Array as Array
from .batch import Batch as Batch
from .batch import Cache as Cache
from .batch import KVType as KVType
from .batch import LayerCache as LayerCache
from .batch import Pairing as Pairing
from .batch import RopeSpec as RopeSpec
from .choose import Best as Best
from .outside import Outside
from .profile import Profile

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "softplus", "swiglu_oai"
]
Compute = Literal["f32", "bf16", "exact"]


def check_n_threads(n: int | None) -> None:
    """ArgumentError for a number of threads that is no whole number of at least 1; None is right."""
    whole = isinstance(n, (int, np.integer)) and not isinstance(n, bool)
    if n is not None and (not whole or n < 1):
        raise ArgumentError(f"n_threads={n!r:.40}; expected a whole number of at least 1, or None")


class Source(Protocol):
    """A tensor of a file as ``Backend.load`` reads it; ``tinyllm.gguf.Tensor`` is one."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str:
        """The tensor type that the file names, such as "Q4_K"."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Raw bytes [stop - start, row_nbytes] of rows of the tensor seen as [-1, shape[-1]]."""
        ...


class Weight(Protocol):
    """A loaded matrix [n_out, n_in], or a stack of them [n, n_out, n_in] (experts, heads)."""

    @property
    def type(self) -> str:
        """The tensor type that the file names, such as "Q4_K"."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes on the device."""


Loaded: TypeAlias = Any  # a Weight of the backend's own: it is given only those that it loaded


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each head of queries and of keys, which ``Backend.rope_write`` may take along."""

    q: Array  # [D] weights
    k: Array  # [D]
    eps: float


@dataclass(frozen=True)
class Routing:
    """How a mixture of experts turns router logits into choices; ``Backend.route`` applies it."""

    n_used: int
    gating: Literal["softmax", "sigmoid", "softmax_selected"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    n_group: int = 1  # choose only among the best n_group_used groups of experts (DeepSeek-V3)
    n_group_used: int = 1


@dataclass(frozen=True)
class Device:
    """One device that models run on."""

    kind: str  # "cpu", "reference", "cuda" or "opencl"
    index: int = 0  # among the devices of its kind
    name: str = ""  # the maker's, "NVIDIA H200"
    memory: int = 0  # bytes in all; 0 where nobody asked
    on_cpu: bool = False  # an OpenCL driver that computes on the CPU, as PoCL and Intel's

    @property
    def id(self) -> str:
        """What ``load(device=...)`` calls it: "cpu", "cuda:0"."""
        return f"{self.kind}:{self.index}" if self.is_gpu else self.kind

    @property
    def is_gpu(self) -> bool:
        """Is it reached through CUDA or OpenCL?"""
        return self.kind in ("cuda", "opencl")

    @property
    def is_real_gpu(self) -> bool:
        """Is it a GPU, and not the CPU behind OpenCL?"""
        return self.is_gpu and not self.on_cpu

    def __str__(self) -> str:
        return f"{self.id} {self.name}" if self.is_gpu else self.id


class Backend(ABC):
    """One device. Methods raise DeviceError for what the device cannot do, when it is loaded, not later."""

    where: Device  # what really runs

    @property
    def name(self) -> str:
        """The device in words: "cpu", "reference", "cuda:0 NVIDIA H200"."""
        return str(self.where)

    # ---- weights and transfers

    @abstractmethod
    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> Weight:
        """Bring a matrix, or a stack of matrices, to the device, in its quantised form.

        ``rows`` selects and orders output rows (of a 2-D tensor), which splits fused projections. The bytes
        are read in pieces; the backend may store them in an order of its own, in about the same size.
        """

    @abstractmethod
    def array(self, x: np.ndarray) -> Array:
        """Host to device. float64 becomes float32, int64 int32. The result outlives the step."""

    @abstractmethod
    def numpy(self, x: Array) -> np.ndarray:
        """Device to host: a copy, or a view that the caller does not keep beyond the step."""

    def save(self, x: Array, first: int, out: np.ndarray) -> bool:
        """Have the step write rows of x, from ``first`` on, to ``out`` in host memory; False: it does not.

        ``out`` [n, ...] is contiguous, float32 or float16 (larger values become infinite), and outlives the
        step, whose end is when it is filled.
        """
        return False

    @abstractmethod
    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> Cache:
        """Room for one sequence of up to ``n_ctx`` positions."""

    def step(self, key: Hashable | None, fn: Callable[[Batch], Array], batch: Batch) -> Array:
        """Run ``fn`` on the batch with its arrays on the device, and return its result.

        A backend may record the operations under ``key`` and, when the key comes again with a batch of as many
        rows, sequences and results, replay them on it without calling ``fn``: fn must depend on nothing but the
        batch. ``None`` forbids that. The result is valid until the backend's next step.
        """
        return fn(self.upload(batch))

    def upload(self, batch: Batch) -> Batch:
        """Copy a batch's arrays to the device; what is not an array stays as it is."""
        return Batch(
            self.array(batch.ids),
            self.array(batch.positions),
            self.array(batch.starts),
            self.array(batch.n_past),
            self.array(batch.outputs),
            batch.caches,
            batch.n_rows,
            batch.n_seq,
            batch.n_out,
            scales=None if batch.scales is None else self.array(batch.scales),
            source=None if batch.source is None else self.upload(batch.source),
        )

    def replace_kernels(self, kernels: Sequence[Outside]) -> list[Outside]:
        """Use kernels from outside for weights loaded from now on, and return those that are for this device.

        Raises ArgumentError for one that does not compile or has other parameters than its operation.
        """
        return []

    def profiled(self) -> AbstractContextManager[Profile]:
        """Time every kernel of this thread's steps, with the same results, until the context ends."""
        raise DeviceError(f"{self.name} runs no kernels of its own: nothing to profile")

    def limits(self, seconds: float) -> dict[str, float]:
        """What the device can do, measured now for about so long each.

        "read GB/s" of memory, and multiply-adds on registers alone: "dot GMAC/s" of bytes, "float GMAC/s".
        """
        raise DeviceError(f"{self.name} runs no kernels of its own: nothing to measure")

    def memory(self) -> tuple[int, int]:
        """Bytes free, and bytes in all, of the memory that holds weights and caches."""
        return system.available_bytes(), system.memory_bytes()

    def close(self) -> None:  # noqa: B027 (most backends hold nothing but memory)
        """Free what the device holds; the backend is not used afterwards."""

    # ---- matrices

    @abstractmethod
    def embed(self, w: Loaded, ids: Array, scale: float = 1.0) -> Array:
        """Rows ``ids`` [T] of w [V, E], decoded and scaled -> [T, E]."""

    @abstractmethod
    def matmul(self, w: Loaded, x: Array, bias: Array | None = None) -> Array:
        """x [T, n_in] times w [n_out, n_in] transposed, plus bias [n_out] -> [T, n_out]."""

    def matmuls(
        self, ws: Sequence[Loaded], x: Array, biases: Sequence[Array | None]
    ) -> list[Array]:
        """Products of several matrices with the same x: q, k and v, or gate and up."""
        return [self.matmul(w, x, b) for w, b in zip(ws, biases, strict=True)]

    def matmul_act(self, w: Loaded, x: Array, bias: Array | None, kind: Activation) -> Array:
        """``act(matmul(w, x, bias), kind)``, perhaps without a pass of its own over the values."""
        return self.act(self.matmul(w, x, bias), kind)

    def matmul_gated(
        self,
        ws: Sequence[Loaded],
        x: Array,
        biases: Sequence[Array | None],
        kind: Activation,
    ) -> Array:
        """``act_mul`` of the products with a gate's and an up matrix."""
        gate, up = self.matmuls(ws, x, biases)
        return self.act_mul(gate, up, kind)

    def matmul_experts_gated(
        self,
        ws: Sequence[Loaded],
        x: Array,
        experts: Array,
        biases: Sequence[Array | None],
        kind: Activation,
    ) -> Array:
        """``act_mul`` of the products with a gate's and an up stack."""
        up = self.matmul_experts(ws[1], x, experts, biases[1])
        return self.act_mul(self.matmul_experts(ws[0], x, experts, biases[0]), up, kind)

    @abstractmethod
    def matmul_experts(
        self, w: Loaded, x: Array, experts: Array, bias: Array | None = None
    ) -> Array:
        """Multiply each (row, choice) by its own matrix of the stack w [n, n_out, n_in].

        x [T, n_in] (the same for all choices) or [T, k, n_in]; experts [T, k] int32; bias [n, n_out]
        -> [T, k, n_out].
        """

    def matmul_heads(self, w: Loaded, x: Array) -> Array:
        """Multiply each head of x [T, H * n_in] by its own matrix of w [H, n_out, n_in] -> [T, H * n_out]."""
        h, n_out, n_in = w.shape
        t = x.shape[0]
        heads = self.array(np.tile(np.arange(h, dtype=np.int32), (t, 1)))
        return self.matmul_experts(w, x.reshape(t, h, n_in), heads).reshape(t, h * n_out)

    # ---- elementwise and rows

    @abstractmethod
    def rms_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> Array:
        """x / sqrt(mean(x^2) + eps) * w + bias over each run of ``group`` values (0: the whole row).

        w and bias have ``group`` values or a row's, or are None. x is any [..., n].
        """

    @abstractmethod
    def layer_norm(
        self, x: Array, w: Array | None, eps: float, bias: Array | None = None, group: int = 0
    ) -> Array:
        """(x - mean) / sqrt(variance + eps) * w + bias; shapes as ``rms_norm``."""

    def add_layer_norm(
        self, x: Array, y: Array, w: Array | None, eps: float, bias: Array | None = None
    ) -> Array:
        """``layer_norm(add(x, y), w, eps, bias)``, perhaps without a pass of its own for the sum."""
        return self.layer_norm(self.add(x, y), w, eps, bias)

    @abstractmethod
    def rope(self, x: Array, positions: Array, spec: RopeSpec, head_dim: int) -> Array:
        """Turn pairs of each head of x [T, H * head_dim] by position * frequency.

        With p = len(freqs) pairs, values [first, first + 2 p) of a head turn, the others pass. Pairing "half":
        (i, i + p), "adjacent": (2 i, 2 i + 1). RoFormer, arXiv:2104.09864.
        """

    @abstractmethod
    def act(self, x: Array, kind: Activation) -> Array:
        """silu x/(1+e^-x); gelu with erf; gelu_tanh; relu; relu2 max(x,0)^2; sigmoid; tanh; exp;
        softplus log(1+e^x).
        """

    @abstractmethod
    def act_mul(self, gate: Array, up: Array, kind: Activation) -> Array:
        """act(gate) * up. "swiglu_oai": g = min(gate, 7), u = clip(up, -7, 7): g sigmoid(1.702 g) (u + 1)."""

    @abstractmethod
    def add(self, x: Array, *ys: Array, scale: float = 1.0) -> Array:
        """Sum x + scale * y1 + scale * y2 + ...; a y of shape [n] is added to every row."""

    @abstractmethod
    def mul(self, x: Array, y: Array) -> Array:
        """x [T, n] * y, with y [T, n], [T, 1] or [n]."""

    @abstractmethod
    def scale_softcap(self, x: Array, scale: float = 1.0, cap: float = 0.0) -> Array:
        """x * scale, then cap * tanh(x / cap) unless cap is 0."""

    @abstractmethod
    def clamp(self, x: Array, limit: float) -> Array:
        """min(max(x, -limit), limit)."""

    @abstractmethod
    def concat(self, xs: Sequence[Array], n_head: int = 1) -> Array:
        """Join [T, n_head * D_i] head by head -> [T, n_head * sum(D_i)]."""

    def repeat(self, x: Array, n: int) -> Array:
        """Repeat each row n times side by side: [T, D] -> [T, n * D]."""
        return self.concat([x] * n)

    @abstractmethod
    def take(self, x: Array, rows: Array) -> Array:
        """x[rows] for rows [n] int32."""

    # ---- attention

    @abstractmethod
    def cache_write(self, batch: Batch, layer: int, k: Array, v: Array) -> None:
        """Store the new rows' k [T, K * D] and v [T, K * Dv] at their positions in their sequences' caches."""

    def rope_write(
        self,
        batch: Batch,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        spec: RopeSpec,
        head_dim: int,
        norms: HeadNorms | None = None,
    ) -> Array:
        """Turn q and k to their positions, store k and v, return q.

        The result is that of ``rms_norm`` of each head of q and k (with ``norms``), ``rope`` and
        ``cache_write`` one after the other; a backend may do it in one pass.
        """
        if norms is not None:
            q = self.rms_norm(q, norms.q, norms.eps, None, head_dim)
            k = self.rms_norm(k, norms.k, norms.eps, None, head_dim)
        q, k = (self.rope(x, batch.positions, spec, head_dim) for x in (q, k))
        self.cache_write(batch, layer, k, v)
        return q

    @abstractmethod
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
    ) -> Array:
        """Causal attention of q [T, H * D] over the layer's stored past, the new rows included -> [T, H * Dv].

        score(i, j) = softcap(scale * q_i . k_j) + slopes[h] * (j - i), for j <= i and, with a window,
        i - j < window, or with one below 0 the same chunk, i // -window == j // -window; query head h reads
        key head h * K // H; sinks [H] are logits that only add to the softmax's denominator; bias is added as
        ``attention_full`` says. ALiBi: arXiv:2108.12409.
        """

    @abstractmethod
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
    ) -> Array:
        """Attention of each row over all rows of its sequence, before and after it; for encoders.

        Nothing is stored.

        With a window, |i - j| <= window // 2; slopes[h] * -|i - j| is added to the scores, and of bias
        [H, 2 M + 1] the value bias[h, M + j - i], or beyond M the outermost one; at each end the outermost 16
        are alike. T5: arXiv:1910.10683.
        """

    # ---- mixtures of experts

    @abstractmethod
    def route(
        self, logits: Array, routing: Routing, bias: Array | None = None
    ) -> tuple[Array, Array]:
        """Choose experts: logits [T, n_expert] -> experts [T, k] int32, weights [T, k].

        Scores are softmax or sigmoid of the logits ("softmax_selected": softmax over the chosen logits only);
        ``bias`` [n_expert] is added for the choice, not to the weights; ties go to the lower expert.
        """

    @abstractmethod
    def combine(self, x: Array, weights: Array) -> Array:
        """Sum over choices of x [T, k, n] * weights [T, k] -> [T, n]."""

    def stacked(self, xs: Sequence[Array]) -> Array:
        """Arrays [T, n] as choices of one: [T, len(xs), n]."""
        return self.concat(xs).reshape(xs[0].shape[0], len(xs), xs[0].shape[1])

    def weigh(self, x: Array, weights: Array) -> Array:
        """x [T, n] once for each choice, times weights [T, k] -> [T, k, n]."""
        t, k = weights.shape
        rows = self.repeat(x, k).reshape(t * k, x.shape[1])
        return self.mul(rows, weights.reshape(t * k, 1)).reshape(t, k, x.shape[1])

    def per_choice(self, w: Loaded, experts: Array) -> Array:
        """The number that w [n_expert, 1] has for each of the experts [T, k] -> [T, k]."""
        t, k = experts.shape
        return self.embed(w, experts.reshape(t * k)).reshape(t, k)

    def looked_up(self, table: Array, experts: Array) -> Array:
        """What table int32 [n_expert, 1] has for each of the experts [T, k] -> int32 [T, k]."""
        t, k = experts.shape
        return self.take(table, experts.reshape(t * k)).reshape(t, k)

    # ---- choosing

    @abstractmethod
    def top_k(self, logits: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of logits [n] (a device or host array): ids int32 and values, largest first.

        Equal values come in the order of their ids. NumericError if a NaN is among the logits or the
        largest is infinite.
        """

    picks: tuple[int, ...] = ()
    """Numbers of largest logits to ask ``pick`` for; none where a step leaves all with the host anyway."""

    def pick(self, logits: Array, k: int) -> tuple[Array, Array]:
        """Find the k largest of each row of logits [n, V] within a step, for ``picked`` behind it."""
        raise DeviceError(f"{self.name}: logits are not picked on the device")

    def picked(self, result: tuple[Array, Array]) -> list[Best]:
        """What ``pick`` found, row by row: at least the k largest of each."""
        raise DeviceError(f"{self.name}: logits are not picked on the device")

    def picked_later(self, result: tuple[Array, Array]) -> Callable[[], list[Best]]:
        """A call that waits for this step only and returns what ``picked`` does.

        Another step may run meanwhile; ``Best.all`` then gives the logits of that one.
        """
        raise DeviceError(f"{self.name}: logits are not picked on the device")

    @property
    def n_steps(self) -> int:
        """How many steps with a key were run; ``follow`` may use the result of the last one only."""
        return 0

    def follow(
        self,
        result: tuple[Array, Array],
        key: Hashable,
        fn: Callable[[Batch], Array],
        batch: Batch,
    ) -> Array:
        """Run ``step`` on a batch whose ids the device takes from ``result``: the largest logit of each row.

        The batch has one row for each row that was picked from; its own ids are ignored. Where several logits
        are the largest, the device takes any of them.
        """
        raise DeviceError(f"{self.name}: logits are not picked on the device")

    # ---- recurrent layers; a backend without them raises DeviceError when such a model is loaded

    def conv1d(
        self,
        batch: Batch,
        layer: int,
        x: Array,
        w: Array,
        bias: Array | None,
        name: str = "conv",
    ) -> Array:
        """Causal depthwise convolution of x [T, n] with w [n, width]; the last width - 1 rows are kept
        in the layer's array ``name`` [width - 1, n].
        """
        raise DeviceError(f"{self.name}: recurrent layers are not supported; use device='cpu'")

    def scan(
        self, batch: Batch, layer: int, x: Array, dt: Array, a: Array, b: Array, c: Array, d: Array
    ) -> Array:
        """Selective scan (Mamba): h = exp(dt a) h + dt x b; y = h c + d x; h is the layer's array "ssm".

        x, dt [T, n]; a [n, S], or [n, 1] where a channel decays as one; b, c [T, G * S], each for the next
        n / G channels; d [n]; h [n, S] -> [T, n]. arXiv:2312.00752, arXiv:2405.21060.
        """
        raise DeviceError(f"{self.name}: recurrent layers are not supported; use device='cpu'")

    def shift_rows(self, batch: Batch, layer: int, x: Array, name: str) -> Array:
        """Row t becomes the row before it in its sequence; the last row is kept in the layer's array ``name``
        [n] (RWKV token shift).
        """
        raise DeviceError(f"{self.name}: recurrent layers are not supported; use device='cpu'")

    def wkv6(
        self, batch: Batch, layer: int, r: Array, k: Array, v: Array, w: Array, u: Array
    ) -> Array:
        """RWKV-6 mixing per head: y = r (S + diag(u) k^T v); S = diag(w) S + k^T v; S is array "wkv".

        r, k, v, w [T, H * D]; u [H * D]; S [H, D, D] -> [T, H * D]. arXiv:2404.05892.
        """
        raise DeviceError(f"{self.name}: recurrent layers are not supported; use device='cpu'")

    def wkv7(
        self, batch: Batch, layer: int, r: Array, w: Array, k: Array, v: Array, a: Array, b: Array
    ) -> Array:
        """RWKV-7 mixing per head: S = S diag(w) + (S a) b^T + v k^T; y = S r; S is array "wkv" [H, D, D].

        All inputs [T, H * D], with D = S.shape[1] -> [T, H * D]. arXiv:2503.14456.
        """
        raise DeviceError(f"{self.name}: recurrent layers are not supported; use device='cpu'")
