"""How near each kernel comes to the machine: GB/s of weights for one token, GMAC/s for many.

    python benchmarks/ops.py                          # the common formats
    python benchmarks/ops.py Q4_0 F16 --threads 2 --json benchmarks/results/ops.json

One token is measured on more weights than caches hold, beside plain reading of memory; 8 and 512 tokens
on a 2048 x 2048 matrix, beside the processor's byte dot products on registers alone. Best of several runs:
on a shared machine only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch
from tinyllm.kernels.cpu import emit, jit, program, simd
from tinyllm.kernels.cpu.backend import CPUBackend

COMMON = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4", "F16", "F32"]
N = 2048
COPIES = 32  # copies of the matrix, so that one token's weights come from memory
CHAINS = 12  # dot products under way


class Random:
    """A tensor [rows, n] of random blocks with small scales."""

    name = "random"

    def __init__(self, type_name: str, rows: int, n: int) -> None:
        self.type, self.shape = type_name, (rows, n)
        block = quants.quantize(
            type_name, np.random.default_rng(0).normal(0, 0.02, (16, n)).astype("f")
        )
        self._block = block.reshape(16, -1)

    def read_rows(self, start: int, stop: int, out: Any = None) -> np.ndarray:
        """Rows that repeat one block of 16 rows."""
        return np.tile(self._block, (-(-(stop - start) // 16), 1))[: stop - start]


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
rounds = None  # given by ``jit.kernel``


def on_registers(out, first, last, worker):
    """The processor's arithmetic, nothing else; a piece is 10,000 rounds."""
    for _ in range(first, last):
        rounds(out + 4096 * worker, 10000)


def best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of several runs."""
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(threads: int, seconds: float) -> float:
    """Bytes per second of plain reading, as our own pool of threads reaches it."""
    memory, out = program.aligned(1 << 28), program.aligned(64 * 256)
    memory[:] = 1
    out[:] = 0
    tape = program.Tape()
    places = {"source": memory.ctypes.data, "out": out.ctypes.data}
    tape.add(jit.kernel(read_memory), 4096, 16, **places)
    return memory.nbytes / best(lambda: tape.run(threads), seconds)


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


def measure(be: CPUBackend, type_name: str, seconds: float) -> dict[str, Any]:
    """One format: M = 1 from memory, M = 8 and 512 in cache."""
    small, large = be.load(Random(type_name, N, N)), be.load(Random(type_name, COPIES * N, N))
    row = {"format": type_name, "bits/weight": 8 * small.nbytes / N / N}
    row["M=1 GB/s"] = large.nbytes / best(lambda: run(be, large, 1), seconds) / 1e9
    for m in (8, 512):
        row[f"M={m} GMAC/s"] = m * N * N / best(lambda m=m: run(be, small, m), seconds) / 1e9
    return row


def run(be: CPUBackend, w: Any, m: int) -> None:
    """One product with m tokens, its program recorded the first time."""
    x = be.array(np.ones((m, N), np.float32))
    batch = Batch.of([[0] * m], [0], [0])
    be.step((id(w), m) if m <= 32 else None, lambda _: be.matmul(w, x), batch)


def show(report: dict[str, Any]) -> None:
    """A table."""
    print(f"{report['instruction set']}, {report['threads']} threads; limits:", end=" ")
    print(", ".join(f"{k} {v:.1f}" for k, v in report["limits"].items()))
    names = list(report["formats"][0])
    print(" | ".join(f"{n:>13}" for n in names))
    for row in report["formats"]:
        print(
            " | ".join(f"{v:>13.2f}" if isinstance(v, float) else f"{v:>13}" for v in row.values())
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=COMMON, help="such as Q4_K F16")
    parser.add_argument("-t", "--threads", type=int, help="default: one per physical core")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each number")
    parser.add_argument("--json", nargs="?", const="-", help="a file; alone: one line of JSON")
    options = parser.parse_args()
    be = CPUBackend(options.threads)
    report = {
        "benchmark": "ops",
        "machine": common.machine(),
        "instruction set": emit.instruction_set(),
        "threads": be.n_threads,
        "limits": limits(be.n_threads, options.seconds),
        "formats": [measure(be, f, options.seconds) for f in options.formats],
    }
    print(json.dumps(report)) if options.json == "-" else show(report)
    if options.json not in (None, "-"):
        common.write_json(options.json, report)


if __name__ == "__main__":
    main()
