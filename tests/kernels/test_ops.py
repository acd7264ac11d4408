"""The contract: every operation, shape and format, on every backend present, against NumPy's reference.

The error of a result is its root mean square difference from the reference, relative to the reference's root
mean square. Operations in floats must stay below FLOAT; products with quantised weights below QUANTISED,
which is what rounding activations to int8 costs: a block of 32 normal values has a largest of about 2.4
sigma, so the step is 2.4 / 127 and the error step / sqrt(12) = 0.0055 sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from stored import normal, stored

from tinyllm.errors import DeviceError, NumericError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Backend, Batch, HeadNorms, LayerCache, RopeSpec, Routing
from tinyllm.kernels.devices import open_backend
from tinyllm.kernels.reference import ReferenceBackend

FLOAT, QUANTISED = 2e-5, 0.01
WEIGHTS = sorted(n for n in quants.FORMATS if n not in ("F64", "I8", "I16", "I32", "I64"))
PLAIN = {"F32", "F16", "BF16"}
REFERENCE = ReferenceBackend()
F32 = np.float32


@cache
def backend(device: str) -> Backend:
    try:
        return interpreted_cuda() if device == "interpreted" else open_backend(device)
    except (DeviceError, ImportError) as e:
        return pytest.skip(f"{device}: {e}")


def interpreted_cuda() -> Backend:
    """The CUDA backend on NVRTC's code, interpreted."""
    pytest.importorskip("pyopencl", reason="needs PyOpenCL")
    from emulator.interpreted_cuda import Interpreter
    from emulator.simulated_cuda import backend as opened

    return opened(Interpreter())


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("opencl", marks=pytest.mark.device),
        pytest.param("cuda", marks=pytest.mark.device),
        pytest.param("interpreted", marks=pytest.mark.device),
    ]
)
def be(request: pytest.FixtureRequest) -> Backend:
    return backend(request.param)


def same(be: Backend, got: Any, want: np.ndarray, bound: float = FLOAT) -> None:
    got = np.asarray(be.numpy(got), F32)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.sqrt(np.mean((got - want) ** 2)) / max(float(np.sqrt(np.mean(want**2))), 1e-6)
    assert error <= bound, f"relative error {error:.2e} above {bound:.0e}"


def check(be: Backend, op: str, *args: Any, bound: float = FLOAT, **kwargs: Any) -> None:
    """One operation on host arrays, here and on the reference."""

    def on(b: Backend, x: Any) -> Any:
        return b.array(x) if isinstance(x, np.ndarray) else x

    want = getattr(REFERENCE, op)(*args, **kwargs)
    moved = [[on(be, y) for y in x] if isinstance(x, list) else on(be, x) for x in args]
    got = getattr(be, op)(*moved, **{k: on(be, v) for k, v in kwargs.items()})
    same(be, got, want, bound)


# ---- matrices


@pytest.mark.parametrize("t", [1, 3, 8, 20, 70])
@pytest.mark.parametrize("type_name", WEIGHTS)
def test_matmul_equals_the_dequantised_product(be: Backend, type_name: str, t: int) -> None:
    source = stored(type_name, 48, 512)
    x, bias = normal(t, 512), normal(48, seed=2)
    want = REFERENCE.matmul(REFERENCE.load(source), x, bias)
    got = be.matmul(be.load(source), be.array(x), be.array(bias))
    same(be, got, want, FLOAT if type_name in PLAIN else QUANTISED)


@pytest.mark.parametrize(("n_out", "n_in"), [(1, 32), (5, 96), (17, 64), (130, 288)])
@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_matmul_takes_odd_shapes(be: Backend, type_name: str, n_out: int, n_in: int) -> None:
    source = stored(type_name, n_out, n_in)
    for t in (1, 7):
        x = normal(t, n_in)
        want = REFERENCE.matmul(REFERENCE.load(source), x)
        bound = FLOAT if type_name in PLAIN else 3 * QUANTISED  # few values: a noisy estimate
        same(be, be.matmul(be.load(source), be.array(x)), want, bound)


@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_matmul_of_floats_takes_rows_of_any_length(be: Backend, type_name: str) -> None:
    source, x = stored(type_name, 10, 37), normal(3, 37)
    want = REFERENCE.matmul(REFERENCE.load(source), x)
    same(be, be.matmul(be.load(source), be.array(x)), want)


def test_load_selects_and_orders_rows(be: Backend) -> None:
    source, x = stored("Q8_0", 64, 64), normal(2, 64)
    whole = REFERENCE.matmul(REFERENCE.load(source), x)
    for rows in (slice(16, 40), np.array([5, 0, 63, 7])):
        same(be, be.matmul(be.load(source, rows), be.array(x)), whole[:, rows], 3 * QUANTISED)


def test_matmuls_are_the_single_products(be: Backend) -> None:
    ws = [be.load(stored("Q4_0", n, 128, seed=n)) for n in (32, 16, 48)]
    x = be.array(normal(5, 128))
    biases = [None, be.array(normal(16)), None]
    singles = [np.array(be.numpy(be.matmul(w, x, b))) for w, b in zip(ws, biases, strict=True)]
    for got, want in zip(be.matmuls(ws, x, biases), singles, strict=True):
        assert np.array_equal(be.numpy(got), want)


@pytest.mark.parametrize("type_name", WEIGHTS)
def test_embed_decodes_rows(be: Backend, type_name: str) -> None:
    source, ids = stored(type_name, 40, 256), np.array([3, 39, 0, 3], np.int32)
    want = REFERENCE.embed(REFERENCE.load(source), ids, 2.0)
    same(be, be.embed(be.load(source), be.array(ids), 2.0), want, 1e-6)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "MXFP4"])
@pytest.mark.parametrize("each", [False, True])
def test_matmul_experts_routes_each_row(be: Backend, type_name: str, each: bool) -> None:
    source = stored(type_name, 6, 24, 256)
    x = normal(9, 2, 256) if each else normal(9, 256)
    experts = np.random.default_rng(4).integers(0, 6, (9, 2)).astype(np.int32)
    bias = normal(6, 24)
    want = REFERENCE.matmul_experts(REFERENCE.load(source), x, experts, bias)
    got = be.matmul_experts(be.load(source), be.array(x), be.array(experts), be.array(bias))
    same(be, got, want, FLOAT if type_name in PLAIN else QUANTISED)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q4_0", "Q6_K", "Q8_0", "IQ4_XS"])
@pytest.mark.parametrize(("n_ff", "kind"), [(96, "silu"), (70, "swiglu_oai")])
def test_matmul_gated_of_one_row(be: Backend, type_name: str, n_ff: int, kind: Any) -> None:
    sources = [stored(type_name, n_ff, 512, seed=s) for s in (1, 2)]
    down = stored("Q8_0" if n_ff % 32 == 0 else "F32", 24, n_ff, seed=3)
    x, biases = normal(1, 512), [None, normal(n_ff, seed=5)]

    def through(b: Backend) -> Any:
        on = [None if v is None else b.array(v) for v in biases]
        y = b.matmul_gated([b.load(s) for s in sources], b.array(x), on, kind)
        return y, b.matmul(b.load(down), y)

    for got, want in zip(through(be), through(REFERENCE), strict=True):
        same(be, got, want, 0.02)


@pytest.mark.parametrize("type_name", ["F16", "Q4_0", "Q8_0", "Q6_K"])
@pytest.mark.parametrize(
    ("t", "n_in", "biased"), [(1, 512, False), (1, 1280, True), (3, 512, True)]
)
def test_a_norm_behind_a_sum_and_a_product(
    be: Backend, type_name: str, t: int, n_in: int, biased: bool
) -> None:
    first, more = stored(type_name, 256, n_in), [stored(type_name, 96, 256, seed=s) for s in (2, 3)]
    router, x, h = stored("F32", 5, 256, seed=4), normal(t, 256), normal(t, n_in, seed=5)
    weight, bias = normal(256, seed=6), normal(256, seed=7) if biased else None

    def through(b: Backend) -> list[Any]:
        product = b.matmul(b.load(first), b.array(h), None if bias is None else b.array(bias))
        total = b.add(b.array(x), product, scale=0.7)
        y, ws = b.rms_norm(total, b.array(weight), 1e-5), [b.load(s) for s in more]
        products = b.matmuls(ws, y, [None, b.array(normal(96))])
        gated = b.matmul_gated(ws, y, [None, None], "silu")
        return [*products, gated, b.matmul(b.load(router), y), total, y, b.act(y, "relu"), product]

    for got, want in zip(through(be), through(REFERENCE), strict=True):
        same(be, got, want, 1e-4 if type_name == "F16" else 0.03)


@pytest.mark.parametrize("type_name", ["F16", "Q4_K"])
@pytest.mark.parametrize("t", [1, 2, 40])
def test_matmul_experts_gated(be: Backend, type_name: str, t: int) -> None:
    sources = [stored(type_name, 5, 64, 256, seed=s) for s in (1, 2)]
    down = stored("Q8_0", 5, 24, 64, seed=3)
    x, bias = normal(t, 256), normal(5, 64, seed=4)
    experts = np.random.default_rng(2).integers(0, 5, (t, 2)).astype(np.int32)

    def through(b: Backend) -> Any:
        ws = [b.load(s) for s in sources]
        y = b.matmul_experts_gated(ws, b.array(x), b.array(experts), [b.array(bias), None], "silu")
        return y, b.matmul_experts(b.load(down), y, b.array(experts))

    for got, want in zip(through(be), through(REFERENCE), strict=True):
        same(be, got, want, 0.02)


def test_matmul_heads_gives_each_head_its_matrix(be: Backend) -> None:
    source, x = stored("F32", 3, 8, 16), normal(5, 48)
    want = REFERENCE.matmul_heads(REFERENCE.load(source), x)
    same(be, be.matmul_heads(be.load(source), be.array(x)), want)


# ---- elementwise and rows


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    ("n", "group", "weights"), [(64, 0, 64), (100, 0, 100), (96, 24, 24), (96, 24, 96), (64, 0, 0)]
)
def test_norms(be: Backend, op: str, n: int, group: int, weights: int) -> None:
    w = normal(weights, seed=3) if weights else None
    check(be, op, normal(5, n) + F32(0.5), w, 1e-5, w, group)


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize(("head_dim", "pairs", "first"), [(16, 8, 0), (24, 4, 0), (40, 4, 32)])
def test_rope_turns_pairs(be: Backend, pairing: Any, head_dim: int, pairs: int, first: int) -> None:
    x, positions = normal(6, 3 * head_dim), np.array([0, 1, 2, 7, 500, 9000], np.int32)
    freqs = (10000.0 ** -np.linspace(0, 0.9, pairs)).astype(F32)
    want = REFERENCE.rope(x, positions, RopeSpec(freqs, pairing, first, 1.2), head_dim)
    spec = RopeSpec(be.array(freqs), pairing, first, 1.2)
    same(be, be.rope(be.array(x), be.array(positions), spec, head_dim), want, 1e-4)


ACTS = ["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp", "softplus"]


@pytest.mark.parametrize("kind", ACTS)
def test_act(be: Backend, kind: Any) -> None:
    check(be, "act", normal(5, 77) * F32(4), kind)


@pytest.mark.parametrize("kind", [*ACTS, "swiglu_oai"])
def test_act_mul(be: Backend, kind: Any) -> None:
    check(be, "act_mul", normal(5, 77) * F32(4), normal(5, 77, seed=1) * F32(4), kind)


def test_act_has_no_holes_at_the_ends(be: Backend) -> None:
    x = np.array([[-1e4, -100, -88, -20, 0, 20, 88, 100, 1e4]], F32)
    for kind in ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "softplus"):
        check(be, "act", x, kind, bound=1e-5)


def test_add_mul_scale_clamp(be: Backend) -> None:
    x, y = normal(5, 33), normal(5, 33, seed=1)
    check(be, "add", x, y)
    check(be, "add", x, y, normal(5, 33, seed=2), scale=0.5)
    check(be, "add", x, normal(33, seed=2))
    check(be, "add", y, x, scale=-1.0)
    for other in (y, normal(5, 1), normal(33)):
        check(be, "mul", x, other)
    check(be, "scale_softcap", x, 0.25, 0.0)
    check(be, "scale_softcap", x, 20.0, 5.0)
    check(be, "clamp", x, 0.7)


def test_concat_repeat_take(be: Backend) -> None:
    check(be, "concat", [normal(4, 3 * 8), normal(4, 3 * 5)], 3)
    check(be, "concat", [normal(4, 7), normal(4, 9), normal(4, 2)])
    check(be, "repeat", normal(4, 6), 5)
    check(be, "take", normal(9, 20), np.array([8, 0, 8], np.int32))


# ---- attention


def written(
    be: Backend, lengths: list[int], heads: int, dim: int, dim_v: int, kv: Any, seed: int = 5
):
    """Caches of this backend and of the reference, filled with the same past of each length."""
    layers = [LayerCache(), LayerCache(heads, dim, dim_v)]
    both = []
    for b in (be, REFERENCE):
        caches = [b.new_cache(layers, n + 40, kv) for n in lengths]
        for i, (c, n) in enumerate(zip(caches, lengths, strict=True)):
            if n:
                k, v = (
                    normal(n, heads * dim, seed=seed + i),
                    normal(n, heads * dim_v, seed=seed + 50 + i),
                )
                b.step(None, writer(b, k, v), Batch.of([[0] * n], [0], [0], [c]))
        both.append(caches)
    return both


def writer(b: Backend, k: np.ndarray, v: np.ndarray) -> Callable[[Batch], Any]:
    def fn(batch: Batch) -> Any:
        b.cache_write(batch, 1, b.array(k), b.array(v))
        return b.array(np.zeros(1, F32))

    return fn


CACHE_ERROR = {"f32": FLOAT, "f16": 1e-3, "q8_0": 2e-2}


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("pairing", ["half", "adjacent"])
@pytest.mark.parametrize(
    ("dim", "dim_v", "pairs", "normed"), [(68, 64, 32, True), (20, 140, 8, False)]
)
def test_rope_write_norms_turns_and_stores(
    be: Backend, kv: Any, pairing: Any, dim: int, dim_v: int, pairs: int, normed: bool
) -> None:
    freqs, weights = (10000.0 ** -np.linspace(0, 0.9, pairs)).astype(F32), normal(2, dim, seed=9)
    got, want = [], []
    for b, out in ((be, got), (REFERENCE, want)):
        caches = [b.new_cache([LayerCache(), LayerCache(2, dim, dim_v)], 100, kv) for _ in range(2)]
        spec = RopeSpec(b.array(freqs), pairing, 2, 1.1)
        norms = HeadNorms(b.array(weights[0]), b.array(weights[1]), 1e-5) if normed else None

        def fn(batch: Batch, b: Backend = b, spec: Any = spec, norms: Any = norms) -> Any:
            q, k, v = (b.array(normal(5, n, seed=n)) for n in (6 * dim, 2 * dim, 2 * dim_v))
            return b.rope_write(batch, 1, q, k, v, spec, dim, norms)

        batch = Batch.of([[0] * 3, [0] * 2], [0, 0], [0], caches)
        out.append(np.array(b.numpy(b.step(None, fn, batch))))
        for c, n in zip(caches, (3, 2), strict=True):
            out += [rows for _, rows in sorted(c.export(n).items())]
    for x, y in zip(got, want, strict=True):
        if x.dtype == np.uint8:  # heads padded to whole blocks
            x = quants.dequantize("Q8_0", x)[..., : y.shape[-1]]
        same(be, x, y.astype(F32), max(CACHE_ERROR[kv], 1e-4))


def by_distance() -> np.ndarray:
    """A bias for each head and distance up to 24; the outermost 16 are alike."""
    bias = normal(4, 2 * 24 + 1, seed=3)
    bias[:, :16], bias[:, -16:] = bias[:, :1], bias[:, -1:]
    return bias


ATTENTION = {
    "plain": {},
    "window": {"window": 7},
    "chunks": {"window": -7},
    "softcap": {"softcap": 3.0},
    "alibi": {"slopes": np.array([0.5, 0.25, 0.125, 0.06], F32)},
    "sinks": {"sinks": np.array([0.5, -1, 2, 0], F32)},
    "bias": {"bias": by_distance()},
    "all": {"window": 100, "softcap": 5.0, "sinks": np.array([0.5, -1, 2, 0], F32)},
}
CACHED = [*(("f32", case) for case in ATTENTION), ("f16", "plain"), ("q8_0", "plain")]


@pytest.mark.parametrize(("kv", "case"), CACHED)
@pytest.mark.parametrize(
    ("past", "new", "heads", "dim", "dim_v"),
    [
        ([0], [5], 2, 16, 16),
        ([300, 0, 3], [1, 9, 4], 2, 32, 32),
        ([520], [1], 1, 24, 20),
        ([5, 700], [1, 1], 4, 64, 64),
    ],
)
def test_attention(
    be: Backend,
    kv: Any,
    case: str,
    past: list[int],
    new: list[int],
    heads: int,
    dim: int,
    dim_v: int,
) -> None:
    mine, theirs = written(be, past, heads, dim, dim_v, kv)
    t = sum(new)
    q, k, v = normal(t, 4 * dim), normal(t, heads * dim, seed=1), normal(t, heads * dim_v, seed=2)

    def run(b: Backend, caches: list[Any]) -> np.ndarray:
        options = {
            n: b.array(x) if isinstance(x, np.ndarray) else x for n, x in ATTENTION[case].items()
        }

        def fn(batch: Batch) -> Any:
            b.cache_write(batch, 1, b.array(k), b.array(v))
            return b.attention(batch, 1, b.array(q), 4, scale=dim**-0.5, **options)

        return np.array(
            b.numpy(b.step(None, fn, Batch.of([[0] * n for n in new], past, [0], caches)))
        )

    want = run(REFERENCE, theirs)
    got = run(be, mine)
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert error <= CACHE_ERROR[kv], f"relative error {error:.2e}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 6},
        {"slopes": np.array([0.5, 0.25, 0.1, 0.01], F32)},
        {"bias": by_distance()},
        {"bias": by_distance(), "window": 20},
    ],
)
def test_attention_full(be: Backend, options: dict[str, Any]) -> None:
    lengths, dim = [1, 17, 300 if "bias" in options else 40], 20
    t = sum(lengths)
    q, k, v = normal(t, 4 * dim), normal(t, 2 * dim, seed=1), normal(t, 2 * dim, seed=2)

    def run(b: Backend) -> np.ndarray:
        moved = {n: b.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}

        def fn(batch: Batch) -> Any:
            return b.attention_full(
                batch, b.array(q), b.array(k), b.array(v), 4, 2, scale=0.3, **moved
            )

        return np.array(
            b.numpy(b.step(None, fn, Batch.of([[0] * n for n in lengths], [0] * 3, [0])))
        )

    same(be, run(be), run(REFERENCE))


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_cache_shift_and_restore(be: Backend, kv: Any) -> None:
    """Shift turns keys back; export and restore give the same bits in a new cache."""
    mine, theirs = written(be, [60], 2, 16, 16, kv)
    freqs = (10000.0 ** -np.linspace(0, 0.9, 8)).astype(F32)
    mine[0].shift(1, 4, 20, 60, RopeSpec(be.array(freqs), "half"))
    theirs[0].shift(1, 4, 20, 60, RopeSpec(freqs, "half"))
    a, b = mine[0].export(40), theirs[0].export(40)
    assert set(a) == {"1.k", "1.v"}
    if kv != "q8_0":
        for name in a:
            assert a[name].dtype == b[name].dtype
            difference = np.abs(a[name].astype(F32) - b[name].astype(F32)).max()
            assert difference <= (1e-5 if kv == "f32" else 4e-3)
    other = be.new_cache([LayerCache(), LayerCache(2, 16, 16)], 80, kv)
    other.restore(a)
    again = other.export(40)
    assert all(np.array_equal(again[n], a[n]) for n in a)


# ---- mixtures of experts


ROUTINGS = [
    Routing(2),
    Routing(3, renormalise=False, scale=1.5),
    Routing(2, gating="softmax_selected"),
    Routing(4, gating="sigmoid", scale=2.5, n_group=4, n_group_used=2),
]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_route_chooses_the_same_experts(be: Backend, routing: Routing, biased: bool) -> None:
    logits, bias = normal(11, 16), normal(16, seed=1) * F32(0.1) if biased else None
    ids, weights = REFERENCE.route(logits, routing, bias)
    got_ids, got = be.route(be.array(logits), routing, None if bias is None else be.array(bias))
    assert np.array_equal(be.numpy(got_ids), ids)
    same(be, got, weights)


def test_combine_sums_choices(be: Backend) -> None:
    check(be, "combine", normal(7, 3, 20), normal(7, 3, seed=1))


# ---- choosing


@pytest.mark.parametrize("k", [1, 5, 40, 2000])
def test_top_k_orders_and_breaks_ties(be: Backend, k: int) -> None:
    x = np.round(normal(2000), 1)
    ids, values = REFERENCE.top_k(x, k)
    got_ids, got = be.top_k(x, k)
    assert np.array_equal(got_ids, ids)
    assert np.array_equal(got, values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_top_k_refuses_what_is_not_a_number(be: Backend, bad: float) -> None:
    x = normal(1000)
    x[123] = bad
    with pytest.raises(NumericError):
        be.top_k(x, 5)


# ---- recurrent layers


def recurrent(be: Backend, arrays: Any, fn: Callable[..., Any], *inputs: np.ndarray) -> None:
    """Two steps of two sequences on this backend and on the reference."""
    layer = LayerCache(arrays=arrays)

    def run(b: Backend) -> list[np.ndarray]:
        caches = [b.new_cache([layer], 8, "f32") for _ in range(2)]
        moved = [b.array(x) for x in inputs]
        out = []
        for past in (0, 3):
            batch = Batch.of([[0] * 3, [0] * 4], [past, past], [0], caches)
            out.append(np.array(b.numpy(b.step(None, lambda d: fn(b, d, *moved), batch))))
        return out

    try:
        got = run(be)
    except DeviceError as e:
        pytest.skip(str(e))
    for g, w in zip(got, run(REFERENCE), strict=True):
        same(be, g if be is REFERENCE else be.array(g), w)


def test_conv1d(be: Backend) -> None:
    x, w, bias = normal(7, 24), normal(24, 4, seed=1), normal(24, seed=2)
    recurrent(be, (("conv", (3, 24)),), lambda b, d, *a: b.conv1d(d, 0, *a), x, w, bias)


def test_scan(be: Backend) -> None:
    x, dt, a = normal(7, 12), np.abs(normal(7, 12, seed=1)), -np.abs(normal(12, 8, seed=2))
    rest = normal(7, 8, seed=3), normal(7, 8, seed=4), normal(12, seed=5)
    recurrent(be, (("ssm", (12, 8)),), lambda b, d, *i: b.scan(d, 0, *i), x, dt, a, *rest)


def test_scan_of_heads_in_groups(be: Backend) -> None:
    x, dt, a = normal(7, 12), np.abs(normal(7, 12, seed=1)), -np.abs(normal(12, 1, seed=2))
    rest = normal(7, 16, seed=3), normal(7, 16, seed=4), normal(12, seed=5)
    recurrent(be, (("ssm", (12, 8)),), lambda b, d, *i: b.scan(d, 0, *i), x, dt, a, *rest)


def test_shift_rows(be: Backend) -> None:
    recurrent(be, (("att", (10,)),), lambda b, d, x: b.shift_rows(d, 0, x, "att"), normal(7, 10))


def test_wkv6(be: Backend) -> None:
    r, k, v, u = (normal(7, 16, seed=s) for s in range(4))
    w = np.exp(-np.exp(normal(7, 16, seed=4)))
    recurrent(be, (("wkv", (2, 8, 8)),), lambda b, d, *i: b.wkv6(d, 0, *i), r, k, v, w, u[0])


def test_wkv7(be: Backend) -> None:
    r, k, v, a = (normal(7, 16, seed=s) * F32(0.3) for s in range(4))
    w = np.exp(-np.exp(normal(7, 16, seed=4)))
    inputs = r, w, k, v, a, -a * F32(0.5)
    recurrent(be, (("wkv", (2, 8, 8)),), lambda b, d, *i: b.wkv7(d, 0, *i), *inputs)
