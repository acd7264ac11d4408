"""How long each launch of a step takes on the device, and what the device could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Batch
from ..profile import Numbers, Profile, Work, attention_work
from . import sources
from .arrays import GPUArray, i32
from .sources import Program, Size
from .steps import NotRecordable
from .weights import PLAIN

if TYPE_CHECKING:
    from .backend import GPUBackend

GROUPS, THREADS = 2048, 256  # as in src/limits.c
CHAINS = 8
READ = 1 << 28  # bytes
DECODING = ("embed", "decode_rows")  # kernels that multiply nothing
FIRST_OUTPUT = {  # which argument of a product is its output; others are of the form of ``three_outputs``
    **dict.fromkeys(("matvec_gated", "matvec_add"), 5),
    **dict.fromkeys(("matmul", "matmul_experts", "matmul_tensor_experts", "matvec_experts"), 3),
}
ATTENTION = ("attention", "attention_tensor")
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@contextmanager
def profiled(be: GPUBackend) -> Iterator[Profile]:
    """Time the launches of a backend one by one; steps are not recorded meanwhile."""
    timing = _Timing(be)
    be.finish()
    be.forget()
    timing.begin()
    try:
        yield timing.profile
        be.finish()
    finally:
        timing.end()
        be.forget()


class _Timing:
    """Stands before the methods of a backend, and asks the device's clock around each launch."""

    def __init__(self, be: GPUBackend) -> None:
        self.profile = Profile()
        self._be, self._launch, self._attend = be, be.launch, be.attention
        self._gemm = be.library.gemm if be.library is not None else None
        self._attention: Work | None = None  # what the next launch of an attention has to do

    def begin(self) -> None:
        hooks = {"launch": self.launch, "record": self.record, "attention": self.attention}
        vars(self._be).update(hooks)
        if self._be.library is not None:
            self._be.library.gemm = self.gemm

    def end(self) -> None:
        for name in ("launch", "record", "attention"):
            del vars(self._be)[name]
        if self._be.library is not None and self._gemm is not None:
            self._be.library.gemm = self._gemm

    def launch(
        self, program: Program, kernel: str, groups: Size, threads: Size, *args: Any
    ) -> None:
        arrays = [a for a in args if isinstance(a, GPUArray)]
        for a in arrays:
            _ = a.buffer  # what is pending is a launch of its own
        work = self._work(kernel, args, arrays)
        queue = partial(self._launch, program, kernel, groups, threads, *args)
        self.profile.add(_named(program, kernel), self._be.timed(queue), work)

    def gemm(
        self,
        kind: str,
        w: tuple[Any, int],
        x: GPUArray,
        rows: range,
        y: GPUArray,
        columns: range,
        keep: bool = False,
    ) -> None:
        assert self._gemm is not None
        n, size = x.shape[-1], 2 if kind in ("F16", "BF16") else 4
        weights = size * n * len(columns)
        nbytes = weights + size * n * len(rows) + 4 * len(rows) * len(columns)
        work = Work(nbytes, weights, n * len(rows) * len(columns), "float", kind)
        queue = partial(self._gemm, kind, w, x, rows, y, columns, keep)
        self.profile.add(f"library_{kind}", self._be.timed(queue), work)

    def record(self, run: Callable[[], Any]) -> Any:
        raise NotRecordable

    def attention(self, batch: Batch, layer: int, q: GPUArray, n_head: int, **how: Any) -> GPUArray:
        host = getattr(batch, "host", batch)
        cache: Any = batch.caches[0]
        sides = cache.store.layout.sides[layer]
        tokens, past = np.diff(host.starts).tolist(), np.asarray(host.n_past).tolist()
        heads, dims = (n_head, sides["k"].n_head), (sides["k"].dim, sides["v"].dim)
        size, window = KV_BYTES[sides["k"].kv_type], how.get("window", 0)
        self._attention = attention_work(tokens, past, True, window, heads, dims, size)
        return self._attend(batch, layer, q, n_head, **how)

    def _work(self, kernel: str, args: tuple[Any, ...], arrays: list[GPUArray]) -> Work:
        if kernel in ATTENTION and self._attention is not None:
            work, self._attention = self._attention, None
            return work
        others = sum({id(a.raw_buffer): a.nbytes for a in arrays}.values())
        known = {id(w.buffer): w for w in self._be._weights}
        found = list({id(a): known[id(a)] for a in args if id(a) in known}.values())
        if not found:
            return Work(others)
        w = found[0]
        if kernel in DECODING:
            y = max(arrays, key=lambda a: a.nbytes)
            rows = w.nbytes * w.n_in // prod(w.shape) * (y.size // w.n_in)
            return Work(others + rows, rows, kind=w.kind)
        outside = (p.outside for p in self._be.outside.values() if p.outside.name == kernel)
        places = (k.parameters.index("y") for k in outside)
        n_rows = args[next(places, FIRST_OUTPUT.get(kernel, 4))].size // w.n_out
        share = min(n_rows, w.shape[0]) / w.shape[0] if len(w.shape) > 2 else 1
        stored = sum(int(w.nbytes * share) for w in found)
        macs = sum(w.n_out * w.n_in for w in found) * n_rows
        numbers: Numbers = "float" if w.kind in PLAIN else "int8"
        return Work(others + stored, stored, macs, numbers, w.kind)


def _named(program: sources.Program, kernel: str) -> str:
    """A kernel's name, with the format where it is compiled for one."""
    defines = dict(program[1])
    unpack = str(defines.get("UNPACK", ""))
    if unpack:
        return f"{kernel}_{unpack.removeprefix('unpack_').upper()}"
    if "WEIGHT_BYTES" in defines:
        kind = "BF16" if "BF16" in defines else {2: "F16", 4: "F32"}[int(defines["WEIGHT_BYTES"])]
        return f"{kernel}_{kind}"
    return kernel


def limits(be: GPUBackend, seconds: float) -> dict[str, float]:
    """Read bandwidth, products of bytes (four to an instruction), products of floats; no tensor cores."""
    out = be.array(np.ones(GROUPS * THREADS, np.float32))
    memory = be.empty((READ // 4,))

    def rate(kernel: str, n: int, most: int, amount: float, *args: Any) -> float:
        """``amount`` is done n times in a launch, n growing until it takes a while."""

        def launch(n: int) -> None:
            be.launch(sources.LIMITS, kernel, (GROUPS, 1, 1), (THREADS, 1, 1), *args, i32(n))

        end, best = time.perf_counter() + seconds, 0.0
        while best == 0.0 or time.perf_counter() < end:
            spent = be.timed(partial(launch, n))()
            best = max(best, n * amount / spent / 1e9)
            if spent < seconds / 4:
                n = min(4 * n, most)
        return best

    at_once, whole = GROUPS * THREADS * CHAINS, READ // 16  # less than all of it may lie in a cache
    return {
        "read GB/s": rate("read_memory", whole, whole, 16, memory, out),
        "dot GMAC/s": rate("byte_dots", 1, 1 << 16, 4 * at_once, out),
        "float GMAC/s": rate("float_adds", 1, 1 << 16, at_once, out),
    }
