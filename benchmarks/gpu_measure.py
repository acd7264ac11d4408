"""One part of what ``gpu.py`` measures, in a process of its own: a row of JSON as soon as it is known.

    python benchmarks/gpu_measure.py product Q4_0 --device cuda
    python benchmarks/gpu_measure.py attention 4096 --device opencl --quick
    python benchmarks/gpu_measure.py model llama-8b:Q4_0 --device cuda

Weights are made up in place (speed does not depend on their values), so nothing but this repository is
needed. A product is compared with NumPy's before it is timed. Kernels are timed through recorded steps,
over more weights than any cache holds; bandwidth counts the bytes of the weights as they lie on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import distributions
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.engine.generate import Run, steps
from tinyllm.errors import DeviceError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch, LayerCache
from tinyllm.kernels.devices import open_backend, resolve
from tinyllm.kernels.gpu import sources
from tinyllm.models.build import build
from tinyllm.models.network import Network
from tinyllm.sampling import Sampler, SamplingParams

SHAPES = {  # n_embd, n_layer, n_head, n_head_kv, n_ff, n_vocab, head_dim, tied
    "tiny": (256, 2, 4, 2, 512, 1024, 64, True),
    "llama-1b": (2048, 16, 32, 8, 8192, 128256, 64, True),
    "llama-8b": (4096, 32, 32, 8, 14336, 128256, 128, False),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCHES = (64, 8, 16, 32, 2, 4)  # sequences decoded together
WARM = 3  # steps of decoding until it is replayed: as it is, recorded, replayed
MOST_ERROR = 0.03  # relative, of products with int8 activations; more is a wrong kernel
SCALES = {"d": 3e-3, "dmin": 3e-3, "m": -0.02, "s": 0.0}  # fields of made-up blocks


# ---- made-up weights


@dataclass(frozen=True)
class Synthetic:
    """A tensor of random codes: 64 different rows, again and again."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * pattern(self.type, self.shape[-1]).shape[1]

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        rows = pattern(self.type, self.shape[-1])
        return rows[np.arange(start, stop) % len(rows)]

    def dequantize(self) -> np.ndarray:
        """Norms are ones."""
        return np.ones(self.shape, np.float32)


@cache
def pattern(type_name: str, n_in: int) -> np.ndarray:
    """64 rows of a format, uint8 [64, row_nbytes]."""
    f, rng = quants.FORMATS[type_name], np.random.default_rng(0)
    if f.int8_form is None:
        weights = rng.standard_normal((64, n_in), dtype=np.float32) * np.float32(0.02)
        return quants.quantize(type_name, weights)
    blocks = np.frombuffer(rng.bytes(64 * n_in // f.block_size * f.type_size), f.dtype).copy()
    for name in f.dtype.names or ():
        if name in SCALES and f.dtype[name].kind == "f":
            blocks[name] = SCALES[name]
    if type_name == "MXFP4":
        blocks["e"] = 120
    if type_name == "NVFP4":
        blocks["d"] = 0x20
    return blocks.view(np.uint8).reshape(64, -1)


def model(be: Any, shape: str, type_name: str) -> Network:
    """A LLaMA of a real model's shape."""
    e, n_layer, h, k, f, v, d, tied = SHAPES[shape]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 8192,
        "llama.embedding_length": e,
        "llama.block_count": n_layer,
        "llama.feed_forward_length": f,
        "llama.attention.head_count": h,
        "llama.attention.head_count_kv": k,
        "llama.attention.key_length": d,
        "llama.attention.value_length": d,
        "llama.rope.dimension_count": d,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": v,
    }
    head = type_name if type_name in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
    matrices = {"token_embd": (head, v, e)} | ({} if tied else {"output": (head, v, e)})
    norms = ["output_norm"]
    for i in range(n_layer):
        b = f"blk.{i}."
        shapes = {
            "attn_q": (h * d, e),
            "attn_k": (k * d, e),
            "attn_v": (k * d, e),
            "attn_output": (e, h * d),
            "ffn_gate": (f, e),
            "ffn_up": (f, e),
            "ffn_down": (e, f),
        }
        matrices |= {b + name: (type_name, *shape) for name, shape in shapes.items()}
        norms += [b + "attn_norm", b + "ffn_norm"]
    tensors = {f"{n}.weight": Synthetic(n, kind, shape) for n, (kind, *shape) in matrices.items()}
    tensors |= {f"{n}.weight": Synthetic(n, "F32", (e,)) for n in norms}
    fixed = {n: Synthetic(t.name, t.type, tuple(t.shape)) for n, t in tensors.items()}
    return build(metadata, fixed, be, "f16")


# ---- timing


def wait(be: Any) -> None:
    """Until all that was launched has run."""
    be.numpy(be.array(np.zeros(1, np.float32)))


def seconds(be: Any, run: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call, after one to warm up, enough calls at a time to fill 20 ms."""
    run()
    wait(be)
    start = time.perf_counter()
    run()
    wait(be)
    calls = max(1, min(200, int(0.02 / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait(be)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def recorded(be: Any, run: Callable[[], Any]) -> Callable[[], None]:
    """The launches of ``run`` without Python between them."""
    run()  # compiles, and takes memory
    replay, kept = be.record(run)
    replay.kept = kept  # type: ignore[attr-defined]
    return replay


def packages() -> dict[str, str]:
    """Versions of what takes part."""
    names = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cublas", "pyopencl")
    installed = {d.name: d.version for d in distributions()}
    return {name: installed[name] for name in names if name in installed}


def limits(be: Any, quick: bool) -> Iterator[dict[str, Any]]:
    """The device, the speed of a copy (read and written), and of the library's half-precision product."""
    n = 1 << (22 if quick else 30)
    a, b = be.allocate(n), be.allocate(n)
    found: dict[str, Any] = {"device": be.name, "packages": packages()}
    found["copy_gb_s"] = 2 * n / seconds(be, lambda: be.copy(b, a, n)) / 1e9
    be.free(a)
    be.free(b)
    if be.library is not None and not quick:
        size = 8192
        host = np.random.default_rng(0).standard_normal((1, size, size), np.float32)
        x, y = be.array(host.astype(np.float16)), be.empty((size, size))
        w = be.array(host[0].astype(np.float16))
        everything = range(size)
        t = seconds(
            be, lambda: be.library.gemm("F16", (w.buffer, size), x, everything, y, everything)
        )
        found["half_tflop_s"] = 2 * size**3 / t / 1e12
    yield found


# ---- kernels


def products(be: Any, name: str, quick: bool) -> Iterator[dict[str, Any]]:
    """One format times few and many rows: [n_out, n_in] as in an 8B model's feed-forward half."""
    n_out, n_in = (256, 512) if quick else (14336, 4096)
    source = Synthetic("w", name, (n_out, n_in))
    n_copies = 1 if quick else max(2, (1 << 29) // source.nbytes)
    ws = [be.load(source) for _ in range(n_copies)]
    dense = quants.dequantize(name, source.read_rows(0, 64))
    for rows in (1, 20) if quick else ROWS:
        host = np.random.default_rng(1).standard_normal((rows, n_in), dtype=np.float32)
        x = be.array(host)
        got, want = be.numpy(be.matmul(ws[0], x))[:, :64], host @ dense.T
        error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        t = seconds(be, recorded(be, lambda x=x: [be.matmul(w, x).buffer for w in ws])) / len(ws)
        yield {
            "format": name,
            "rows": rows,
            "microseconds": t * 1e6,
            "gb_s": ws[0].nbytes / t / 1e9,
            "tflop_s": 2 * rows * n_out * n_in / t / 1e12,
            "error": error,
            "right": error < MOST_ERROR,
        }


def ranked(device: str, name: str, quick: bool, path: str) -> Iterator[dict[str, Any]]:
    """The format with our matvec.c and with another file in its place."""
    ours = list(products(open_backend(device), name, quick))
    replaced("matvec.c", path)
    yours = products(open_backend(device), name, quick)
    for p, q in zip(ours, yours, strict=True):
        gain = {"yours_gb_s": q["gb_s"], "gain": q["gb_s"] / p["gb_s"], "yours_right": q["right"]}
        yield p | gain


def attention(be: Any, depth: int, quick: bool) -> Iterator[dict[str, Any]]:
    """One layer of an 8B model at a depth: decode of one and many sequences, and 512 rows of a prompt."""
    heads, n_head, dim = 8, 32, 128
    for n, rows in ((1, 1), (1, 20)) if quick else ((1, 1), (8, 1), (64, 1), (1, 512)):
        layers = [LayerCache(heads, dim, dim)]
        caches = [be.new_cache(layers, depth + rows, "f16") for _ in range(n)]
        batch = be.upload(Batch.of([[0] * rows] * n, [depth] * n, [0], caches))
        q = be.array(np.zeros((n * rows, n_head * dim), np.float32))
        run = recorded(be, lambda b=batch, q=q: be.attention(b, 0, q, n_head, scale=dim**-0.5))
        t = seconds(be, run)
        yield {
            "depth": depth,
            "sequences": n,
            "rows": rows,
            "microseconds": t * 1e6,
            "gb_s": n * (depth + rows) * heads * dim * 4 / t / 1e9,
            "tflop_s": 4 * n * rows * (depth + (rows + 1) / 2) * n_head * dim / t / 1e12,
        }


def picking(be: Any, quick: bool) -> Iterator[dict[str, Any]]:
    """Finding the largest of a LLaMA's logits, for greedy and for drawn tokens."""
    n_vocab = SHAPES["tiny" if quick else "llama-8b"][5]
    for rows in (1, 2) if quick else (1, 8, 64):
        x = np.random.default_rng(0).standard_normal((rows, n_vocab), dtype=np.float32)
        for k in be.picks:
            logits = be.array(x)
            t = seconds(be, recorded(be, lambda x=logits, k=k: be.pick(x, k)))
            yield {"rows": rows, "k": k, "microseconds": t * 1e6, "gb_s": x.nbytes / t / 1e9}


# ---- whole models


def prefill(be: Any, net: Network, n: int) -> float:
    """Tokens per second of n tokens from an empty state."""

    def run() -> None:
        state = net.new_state(n + 1)
        state.append([1] * n)
        while state.n_past < n:
            net.forward([(state, min(512, n - state.n_past), "last")])

    return n / seconds(be, run, 3)


def decode(net: Network, sequences: int, depth: int, n: int, **how: Any) -> float:
    """Tokens per second of n steps of several sequences from a depth on, chosen as ``generate`` does."""
    runs = []
    for _ in range(sequences):
        state = net.new_state(depth + n + WARM)
        state.append([1] * depth)
        sampler = Sampler(SamplingParams(**how), net.n_vocab, net.be.top_k)
        runs.append(Run(state, sampler, n + WARM))
    work = steps(net, runs)
    for _ in range(WARM):
        next(work)
    start = time.perf_counter()
    count = sum(sequences for _ in work)
    return count / (time.perf_counter() - start)


def whole(be: Any, shape: str, type_name: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Start, memory, prompts, decode alone, drawn, together with others and at depth 4096."""
    free, start = be.memory()[0], time.perf_counter()
    net = model(be, shape, type_name)
    wait(be)
    named = {"model": shape, "format": type_name}
    yield named | {"what": "load", "seconds": time.perf_counter() - start}
    yield named | {"what": "weights", "mib": (free - be.memory()[0]) / 2**20}
    start = time.perf_counter()
    decode(net, 1, 5, 1, temperature=0)
    yield named | {"what": f"first {1 + WARM} tokens", "seconds": time.perf_counter() - start}
    n, prompt, depth = (8, 32, 64) if quick else (128, 512, 4096)
    batches = BATCHES[-2:] if quick else BATCHES
    speeds: dict[str, Callable[[], float]] = {
        f"tg{n}": lambda: decode(net, 1, 1, n, temperature=0),
        f"pp{prompt}": lambda: prefill(be, net, prompt),
        **{f"tg x{b}": partial(decode, net, b, 1, n // 2, temperature=0) for b in batches},
        f"tg{n} drawn": lambda: decode(net, 1, 1, n, seed=1),
        f"tg{n}@{depth}": lambda: decode(net, 1, depth, n, temperature=0),
        f"pp{depth}": lambda: prefill(be, net, depth),
    }
    for what, run in speeds.items():
        yield named | {"what": what} | tried(run)
    yield named | {"what": "all at the end", "mib": (free - be.memory()[0]) / 2**20}


def tried(run: Callable[[], float]) -> dict[str, Any]:
    """A speed, or why there is none: the others are measured all the same."""
    try:
        return {"tokens_s": run()}
    except Exception as e:
        return {"failed": (str(e).splitlines() or [type(e).__name__])[0]}


def startup(device: str, what: str) -> Iterator[dict[str, Any]]:
    """The model that comes with the package, from nothing to its first token."""
    start = time.perf_counter()
    with tinyllm.load(device=device) as m:
        loaded = time.perf_counter()
        m.generate("Once upon a time", max_tokens=1, temperature=0)
        first = time.perf_counter()
    yield {"run": what, "load_s": loaded - start, "first_token_s": first - loaded}


def replaced(name: str, path: str) -> None:
    """Let a file of yours stand in for one of ``src``, in every program made from now on."""
    ours, mine = sources.read, Path(path).read_text(encoding="utf-8")
    sources.read = lambda n: mine if n == name else ours(n)  # type: ignore[assignment]
    opencl = sys.modules.get("tinyllm.kernels.gpu.opencl")
    if opencl is not None:
        opencl._build.cache_clear()


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a part."""
    device, what, quick = resolve(options.device), options.what, options.quick
    if options.part == "product" and options.matvec:
        return ranked(device, what, quick, options.matvec)
    if options.part == "startup":
        return startup(device, what)
    be = open_backend(device)
    if options.part == "limits":
        return limits(be, quick)
    if options.part == "product":
        return products(be, what, quick)
    if options.part == "attention":
        return attention(be, int(what), quick)
    if options.part == "pick":
        return picking(be, quick)
    return whole(be, *what.split(":"), quick)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "part", choices=["limits", "product", "attention", "pick", "model", "startup"]
    )
    parser.add_argument("what", nargs="?", default="", help="a format, a depth, a model:format")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--matvec", metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    try:
        failed = None
        for row in measure(options):
            print(json.dumps(row), flush=True)
            failed = row.get("failed", failed)
        sys.exit(failed)
    except DeviceError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
