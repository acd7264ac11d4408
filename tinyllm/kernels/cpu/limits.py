"""What this machine can do: bytes read a second, products of bytes, products of floats.

Kernels are judged by these, measured in the same run: on a shared machine nothing else means anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

from ... import system
from . import emit, jit, program, simd

CHAINS = 12  # dot products under way
STRETCH = 1 << 25  # bytes
LEAST, MOST = 1 << 28, 1 << 30  # bytes that are read in turn


def read_memory(source, out, first, last, worker):
    """Add up a stretch of memory; a piece is 64 KiB."""
    for piece in range(first, last):
        a = b = c = d = simd.splat(np.float32(0))
        p = source + 65536 * piece
        for i in range(0, 65536, 256):
            a, b = a + simd.load(p + i), b + simd.load(p + i + 64)
            c, d = c + simd.load(p + i + 128), d + simd.load(p + i + 192)
        simd.store(out + 64 * worker, a + b + c + d)


def rounds_of(element: Any, step: Callable[[Any, Any, Any], Any]) -> Any:
    """rounds(p, n): n rounds of ``step(e, sum, v)`` on CHAINS sums in registers."""

    @simd.emitter(simd.types.void, simd.i64, simd.i64)
    def rounds(e, p, n):
        """Run n rounds of the step."""
        v = e.load(e.ptr(p), emit.V(element, emit.lanes()))
        out = e.loop(n, [v] * CHAINS, lambda _, sums: [step(e, x, v) for x in sums])
        for i, x in enumerate(out):  # each is stored: none is idle work
            e.store(x, e.ptr(p), 4 * emit.lanes() * i)

    return rounds


def byte_dots(e: Any, x: Any, v: Any) -> Any:
    """Four products of bytes to a lane, as the kernels add them up; of x, or LLVM would compute them once."""
    if emit.instruction_set() != "avx2":
        return e.dot(x, v, x)
    pairs = e.pairs(v, x)
    return e.b.bitcast(e.b.add(e.b.bitcast(x, pairs.type), pairs), x.type)


REGISTERS = {  # what is done at once, by the kernel's name
    "byte_dots": rounds_of(emit.I32, byte_dots),
    "float_adds": rounds_of(emit.F32, lambda e, x, v: e.fma(v, v, x)),
}
rounds: Any = None  # given by ``jit.kernel``


def on_registers(out, first, last, worker):
    """The processor's arithmetic, nothing else; a piece is 10,000 rounds."""
    for _ in range(first, last):
        rounds(out + 4096 * worker, 10000)


def best(run: Callable[[], Any], seconds: float, at_least: int = 3) -> float:
    """The shortest of several runs, in seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(threads: int, seconds: float) -> float:
    """Bytes per second of plain reading, as our own pool of threads reaches it.

    Stretches of 32 MiB are read in turn, twice as many bytes as the largest cache holds where there is room,
    so that each comes from memory, and the fastest one counts.
    """
    most = max(min(MOST, system.available_bytes() // 4), STRETCH)
    n_bytes = min(max(2 * system.cache_bytes(), LEAST), most) // STRETCH * STRETCH
    memory, out = program.huge(n_bytes), program.aligned(64 * 256)
    memory[:] = 1
    out[:] = 0
    tapes = []
    for start in range(0, memory.nbytes, STRETCH):
        tapes.append(program.Tape())
        places = {"source": memory.ctypes.data + start, "out": out.ctypes.data}
        tapes[-1].add(jit.kernel(read_memory), STRETCH >> 16, 1, False, **places)
    turns = cycle(tapes)
    return STRETCH / best(lambda: next(turns).run(threads), seconds, len(tapes))


def peak(what: str, threads: int, seconds: float) -> float:
    """Operations per second and lane of one of ``REGISTERS``."""
    out = program.aligned(4096 * 256)
    out[:] = 0
    tape = program.Tape()
    tape.add(jit.kernel(on_registers, what, rounds=REGISTERS[what]), 16, out=out.ctypes.data)
    return 16 * 10000 * CHAINS * emit.lanes() / best(lambda: tape.run(threads), seconds)


def float_peak(threads: int, seconds: float) -> float:
    """Float32 operations per second, two for each multiply-add."""
    return 2 * peak("float_adds", threads, seconds)


def limits(threads: int, seconds: float) -> dict[str, float]:
    """Read bandwidth, products of bytes (four to a lane), products of floats."""
    return {
        "read GB/s": read_bandwidth(threads, seconds) / 1e9,
        "dot GMAC/s": 4 * peak("byte_dots", threads, seconds) / 1e9,
        "float GMAC/s": peak("float_adds", threads, seconds) / 1e9,
    }
