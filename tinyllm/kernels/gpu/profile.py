"""How long each launch of a step takes on the device, and what the device could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backend import Batch
from ..profile import Numbers, Profile, Work, attention_work
from . import sources
from .arrays import GPUArray
from .device import i32
from .steps import NotRecordable
from .weights import PLAIN, GPUWeight

if TYPE_CHECKING:
    from .backend import GPUBackend

LIMITS = sources.plain("limits.c")
GROUPS, THREADS = 2048, 256  # as in src/limits.c
CHAINS = 8
READ = 1 << 28  # bytes
HOOKS = ("launch", "record", "operand", "_early_operand", "attention", "gemm")
ATTENTION = ("attention", "attention_tensor")
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@contextmanager
def profiled(be: GPUBackend) -> Iterator[Profile]:
    """Time the launches of a backend one by one; steps are not recorded meanwhile."""
    timing = _Timing(be)
    be.finish()
    be.forget()
    vars(be).update(timing.hooks)
    try:
        yield timing.profile
        be.finish()
    finally:
        for name in timing.hooks:
            del vars(be)[name]
        be.forget()


class _Timing:
    """Stands before the methods of a backend, and asks the device's clock around each launch."""

    def __init__(self, be: GPUBackend) -> None:
        self.profile = Profile()
        self._own = {name: getattr(be, name) for name in HOOKS if hasattr(be, name)}
        self.hooks = {name: getattr(self, name) for name in self._own}
        self._be = be
        self._rows: dict[int, int] = {}  # of activations, by the matrix that multiplies them
        self._attention: Work | None = None

    def launch(self, program: Any, kernel: str, groups: Any, threads: Any, *args: Any) -> None:
        arrays = [a for a in args if isinstance(a, GPUArray)]
        for a in arrays:
            _ = a.buffer  # what is pending is a launch of its own
        work = self._work(kernel, args, arrays)
        own = self._own["launch"]
        seconds = self._be.timed(lambda: own(program, kernel, groups, threads, *args))
        self.profile.add(_named(program, kernel), seconds, work)

    def gemm(self, kind: str, w: Any, x: GPUArray, rows: range, y: Any, columns: range, *rest: Any,
             **more: Any) -> None:  # fmt: skip
        size = 2 if kind in ("F16", "BF16") else 4
        n = x.shape[-1]
        read = size * n * (len(columns) + len(rows)) + 4 * len(rows) * len(columns)
        work = Work(read, size * n * len(columns), n * len(rows) * len(columns), "float")
        own = self._own["gemm"]
        seconds = self._be.timed(lambda: own(kind, w, x, rows, y, columns, *rest, **more))
        self.profile.add(f"cublas_{kind}", seconds, work)

    def record(self, run: Callable[[], Any]) -> Any:
        raise NotRecordable

    def operand(self, w: GPUWeight, x: GPUArray) -> Any:
        self._rows[id(w.buffer)] = x.size // w.n_in
        return self._own["operand"](w, x)

    def _early_operand(self, w: GPUWeight, x: GPUArray) -> Any:
        self._rows[id(w.buffer)] = x.size // w.n_in
        return self._own["_early_operand"](w, x)

    def attention(self, batch: Batch, layer: int, q: GPUArray, n_head: int, **how: Any) -> GPUArray:
        host = getattr(batch, "host", batch)
        cache: Any = batch.caches[0]
        sides = cache.store.layout.sides[layer]
        tokens, past = np.diff(host.starts).tolist(), np.asarray(host.n_past).tolist()
        heads, dims = (n_head, sides["k"].n_head), (sides["k"].dim, sides["v"].dim)
        size = KV_BYTES[sides["k"].kv_type]
        window = how.get("window", 0)
        self._attention = attention_work(tokens, past, True, window, heads, dims, size)
        return self._own["attention"](batch, layer, q, n_head, **how)

    def _work(self, kernel: str, args: tuple[Any, ...], arrays: list[GPUArray]) -> Work:
        if kernel in ATTENTION and self._attention is not None:
            work, self._attention = self._attention, None
            return work
        others = sum({id(a.raw_buffer): a.nbytes for a in arrays}.values())
        known = {id(w.buffer): w for w in self._be._weights}
        found = {id(a): known[id(a)] for a in args if id(a) in known}
        if kernel == "embed":
            y = max(arrays, key=lambda a: a.nbytes)
            (w,) = found.values()
            rows = w.nbytes // w.n_out * (y.size // w.n_in)
            return Work(others + rows, rows)
        stored, macs = 0, 0
        numbers: Numbers = ""
        rows = next((self._rows[place] for place in found if place in self._rows), 0)  # for all
        for w in found.values():
            numbers = "float" if w.kind in PLAIN else "int8"
            matrix = w.n_out * w.n_in
            if len(w.shape) == 2:
                stored, macs = stored + w.nbytes, macs + matrix * rows
                continue
            choices = next((a.size for a in arrays if a.dtype == np.int32), 1)
            share = min(choices, w.shape[0]) / w.shape[0]
            stored, macs = stored + int(w.nbytes * share), macs + matrix * choices
        return Work(others + stored, stored, macs, numbers)


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

    def rate(kernel: str, most: int, amount: float, *args: Any) -> float:
        """``amount`` is done n times in a launch, n growing until it takes a while."""

        def launch(n: int) -> None:
            be.launch(LIMITS, kernel, (GROUPS, 1, 1), (THREADS, 1, 1), *args, i32(n))

        n, end, best = 1, time.perf_counter() + seconds, 0.0
        while best == 0.0 or time.perf_counter() < end:
            spent = be.timed(partial(launch, n))()
            best = max(best, n * amount / spent / 1e9)
            if spent < seconds / 4:
                n = min(4 * n, most)
        return best

    at_once = GROUPS * THREADS * CHAINS
    return {
        "read GB/s": rate("read_memory", READ // 16, 16, memory, out),
        "dot GMAC/s": rate("byte_dots", 1 << 16, 4 * at_once, out),
        "float GMAC/s": rate("float_adds", 1 << 16, at_once, out),
    }
