"""GPU kernels beside the device's own limits, and whole models with random weights.

    python benchmarks/gpu.py --device cuda                    # everything: benchmarks/results
    python benchmarks/gpu.py --device cuda --only kernels --matvec mine.c   # your matvec.c ranked beside ours
    python benchmarks/gpu.py --only registers                   # what NVRTC says, no GPU needed
    python benchmarks/gpu.py --device opencl --quick            # small sizes: does it run?

Weights are made up in place (speed does not depend on their values), so nothing but this repository is
needed. Every format's product is compared with NumPy's before it is timed. Kernels are timed through
recorded steps, over more weights than any cache holds; bandwidth counts the bytes of the weights as
they lie on the device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.errors import DeviceError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch, LayerCache, open_backend
from tinyllm.kernels.gpu import nvrtc, sources
from tinyllm.models.network import Network, build

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {  # n_embd, n_layer, n_head, n_head_kv, n_ff, n_vocab, head_dim, tied
    "tiny": (256, 2, 4, 2, 512, 1024, 64, True),
    "llama-1b": (2048, 16, 32, 8, 8192, 128256, 64, True),
    "llama-8b": (4096, 32, 32, 8, 14336, 128256, 128, False),
}
FORMATS = """F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ2_XXS IQ2_S IQ3_XXS IQ3_S
IQ4_NL IQ4_XS TQ2_0 MXFP4 NVFP4""".split()
ROWS = (1, 2, 4, 8, 16, 64, 512)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SCALES = {"d": 3e-3, "dmin": 3e-3, "m": -0.02, "s": 0.0}  # of made-up blocks


# ---- made-up weights


@dataclass(frozen=True)
class Synthetic:
    """A tensor of random codes: 64 different rows, again and again."""

    name: str
    type: str
    shape: tuple[int, ...]

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        rows = self.pattern()
        return rows[np.arange(start, stop) % len(rows)]

    def pattern(self) -> np.ndarray:
        f, rng = quants.FORMATS[self.type], np.random.default_rng(0)
        if f.int8_form is None:
            weights = rng.standard_normal((64, self.shape[-1]), dtype=np.float32) * np.float32(0.02)
            return quants.quantize(self.type, weights)
        n_blocks = 64 * self.shape[-1] // f.block_size
        blocks = np.frombuffer(rng.bytes(n_blocks * f.type_size), f.dtype).copy()
        for name in f.dtype.names or ():
            if name in SCALES and f.dtype[name].kind == "f":
                blocks[name] = SCALES[name]
        if self.type == "MXFP4":
            blocks["e"] = 120
        if self.type == "NVFP4":
            blocks["d"] = 0x20
        return blocks.view(np.uint8).reshape(64, -1)

    def dequantize(self) -> np.ndarray:
        """Norms are ones."""
        return np.ones(self.shape, np.float32)


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


def limits(be: Any, quick: bool) -> dict[str, float]:
    """Bytes per second of a copy (read and write), and half-precision operations per second of the library."""
    n = 1 << (22 if quick else 30)
    a, b = be.allocate(n), be.allocate(n)
    found = {"copy_gb_s": 2 * n / seconds(be, lambda: be.copy(b, a, n)) / 1e9}
    be.free(a)
    be.free(b)
    if hasattr(be, "gemm") and not quick:
        size = 8192
        x, y = be.empty((1, size, size), np.uint16), be.empty((size, size))
        w = be.array(np.zeros((size, size), np.uint16))
        t = seconds(be, lambda: be.gemm("F16", w.buffer, x, 0, y, 0, size, size))
        found["half_tflop_s"] = 2 * size**3 / t / 1e12
    return found


# ---- kernels


@dataclass(frozen=True)
class Product:
    """One format and number of rows."""

    format: str
    rows: int
    microseconds: float
    gb_s: float
    tflop_s: float
    error: float  # relative, root mean square, against NumPy


def products(be: Any, quick: bool, formats: list[str]) -> Iterator[Product]:
    """Each format times few and many rows: [n_out, n_in] as in an 8B model's feed-forward half."""
    n_out, n_in = (256, 512) if quick else (14336, 4096)
    for name in formats:
        source = Synthetic("w", name, (n_out, n_in))
        first = be.load(source)
        n_copies = 1 if quick else max(2, (1 << 29) // first.nbytes)
        ws = [first, *(be.load(source) for _ in range(n_copies - 1))]
        dense = quants.dequantize(name, source.read_rows(0, 64))
        for rows in (1, 20) if quick else ROWS:
            host = np.random.default_rng(1).standard_normal((rows, n_in), dtype=np.float32)
            x = be.array(host)
            got, want = be.numpy(be.matmul(ws[0], x))[:, :64], host @ dense.T
            error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
            replay = recorded(be, lambda ws=ws, x=x: [be.matmul(w, x) for w in ws])
            t = seconds(be, replay) / len(ws)
            flop = 2 * rows * n_out * n_in
            yield Product(name, rows, t * 1e6, first.nbytes / t / 1e9, flop / t / 1e12, error)
        for w in ws:
            be.free(w.buffer)
            w.buffer = None


def attention(be: Any, quick: bool) -> Iterator[dict[str, Any]]:
    """Decode of one layer of an 8B model at a depth, for one and many sequences."""
    heads, n_head, dim = 8, 32, 128
    for depth in (100,) if quick else (512, 4096, 32768):
        for n in (1,) if quick else (1, 8, 32):
            caches = [
                be.new_cache([LayerCache(heads, dim, dim)], depth + 1, "f16") for _ in range(n)
            ]
            batch = be.upload(Batch.of([[0]] * n, [depth] * n, [0], caches))
            q = be.array(np.zeros((n, n_head * dim), np.float32))
            replay = recorded(
                be, lambda b=batch, q=q: be.attention(b, 0, q, n_head, scale=dim**-0.5)
            )
            t = seconds(be, replay)
            nbytes = n * depth * heads * dim * 4
            row = {
                "depth": depth,
                "sequences": n,
                "microseconds": t * 1e6,
                "gb_s": nbytes / t / 1e9,
            }
            yield row


# ---- whole models


def prefill(be: Any, net: Network, n: int) -> float:
    """Tokens per second of n tokens from an empty state."""

    def run() -> None:
        state = net.new_state(n + 1)
        state.append([1] * n)
        while state.n_past < n:
            net.forward([(state, min(512, n - state.n_past), "last")])

    return n / seconds(be, run, 3)


def decode(net: Network, sequences: int, depth: int, n: int) -> float:
    """Tokens per second of n steps of several sequences that begin at a depth."""
    states = [net.new_state(depth + n + 4) for _ in range(sequences)]
    for state in states:
        state.append([1] * depth)
        while state.n_past < depth:
            net.forward([(state, min(512, depth - state.n_past), "last")])

    def step() -> None:
        for state in states:
            state.append([1])
        net.forward([(state, 1, "last") for state in states])

    for _ in range(3):  # as it is, recorded, replayed
        step()
    start = time.perf_counter()
    for _ in range(n):
        step()
    return sequences * n / (time.perf_counter() - start)


def models(device: str, quick: bool, wanted: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """pp512, tg128, decode at depth 4096 and batches."""
    for shape, type_name in wanted:
        be = open_backend(device)
        net = model(be, shape, type_name)
        n = 8 if quick else 128
        row: dict[str, Any] = {"model": shape, "format": type_name}
        row["pp512"] = prefill(be, net, 32 if quick else 512)
        row["tg128"] = decode(net, 1, 1, n)
        row["tg128@4096"] = decode(net, 1, 64 if quick else 4096, n)
        for b in BATCHES[1:3] if quick else BATCHES[1:]:
            row[f"tg x{b}"] = decode(net, b, 1, n // 2)
        net.close()
        yield row


# ---- report


def replaced(name: str, path: str) -> None:
    """Let a file of yours stand in for one of ``src``, in every program made from now on."""
    ours, mine = sources.read, Path(path).read_text(encoding="utf-8")
    sources.read = lambda n: mine if n == name else ours(n)  # type: ignore[assignment]
    opencl = sys.modules.get("tinyllm.kernels.gpu.opencl")
    if opencl is not None:
        opencl._build.cache_clear()


def show(rows: list[dict[str, Any]]) -> None:
    """A table."""
    if not rows:
        return
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    print(flush=True)


def registers(archs: list[str]) -> list[dict[str, Any]]:
    """What every kernel takes on these architectures."""
    rows = []
    for name, program in nvrtc.programs().items():
        for arch in archs:
            for usage in nvrtc.compile_program(program, arch)[1]:
                rows.append({"program": name, "arch": arch, **asdict(usage)})
    return rows


def plot(report: dict[str, Any], path: Path) -> None:
    """Bandwidth of each format with one row, and operations with many, as parts of the device's limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for axis, rows, key, limit in (
        (axes[0], min(ROWS), "gb_s", report["limits"]["copy_gb_s"]),
        (axes[1], max(ROWS), "tflop_s", report["limits"].get("half_tflop_s")),
    ):
        chosen = sorted((p for p in report["products"] if p["rows"] == rows), key=lambda p: p[key])
        axis.barh([p["format"] for p in chosen], [p[key] for p in chosen])
        if limit:
            axis.axvline(limit, color="black", linestyle="--", label="measured limit")
            axis.legend()
        axis.set_xlabel(key.replace("_s", "/s").replace("_", " "))
        axis.set_title(f"{rows} rows of activations")
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    be = open_backend(options.device)
    report: dict[str, Any] = {"device": be.name, "limits": limits(be, options.quick)}
    show([report["limits"]])
    if options.only in (None, "kernels"):
        report["products"] = [asdict(p) for p in products(be, options.quick, options.formats)]
        if options.matvec:
            replaced("matvec.c", options.matvec)
            other = open_backend(options.device)
            mine = [asdict(p) for p in products(other, options.quick, options.formats)]
            for p, q in zip(report["products"], mine, strict=True):
                p |= {
                    "yours_gb_s": q["gb_s"],
                    "gain": q["gb_s"] / p["gb_s"],
                    "yours_error": q["error"],
                }
            report["products"].sort(key=lambda p: -p["gain"])
        show(report["products"])
        report["attention"] = list(attention(be, options.quick))
        show(report["attention"])
    be.close()
    if options.only in (None, "models"):
        wanted = [("tiny", "Q4_0")] if options.quick else options.models
        report["models"] = list(models(options.device, options.quick, wanted))
        show(report["models"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="as load() takes it: cuda, cuda:1, opencl")
    parser.add_argument("--only", choices=["kernels", "models", "registers"])
    parser.add_argument("--formats", type=lambda s: s.split(","), default=FORMATS)
    parser.add_argument(
        "--models",
        type=lambda s: [tuple(m.split(":")) for m in s.split(",")],
        default=[("llama-8b", f) for f in ("Q4_0", "Q8_0", "F16")] + [("llama-1b", "Q4_0")],
        help="llama-8b:Q4_0,llama-1b:Q8_0",
    )
    parser.add_argument("--matvec", metavar="FILE", help="a file to rank beside src/matvec.c")
    parser.add_argument(
        "--archs",
        type=lambda s: s.split(","),
        default=list(nvrtc.ARCHITECTURES),
        help="with --only registers: sm_90,sm_100",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, as a check")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only == "registers":
        rows = registers(options.archs)
        lines = ",\n".join(json.dumps(row) for row in rows)
        (options.out / "gpu-registers.json").write_text(f"[\n{lines}\n]\n")
        show([r for r in rows if r["spills"] or r["stack"]] or rows[:20])
        return
    try:
        report = measure(options)
    except DeviceError as e:
        sys.exit(str(e))
    name = "gpu-" + "-".join(report["device"].lower().split()[1:4]).replace("/", "")
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1))
    if "products" in report:
        plot(report, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
