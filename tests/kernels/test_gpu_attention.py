"""Attention on tensor cores, in NVRTC's own code and on CUDA: as exact as floats on what the cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from stored import normal

from tinyllm.errors import DeviceError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch, LayerCache
from tinyllm.kernels.devices import open_backend
from tinyllm.kernels.gpu.attention_tensor import GroupShape, choose_splits, group_shape
from tinyllm.kernels.gpu.kvcache import Side
from tinyllm.kernels.gpu.operands import operand
from tinyllm.kernels.gpu.weights import GPUWeight
from tinyllm.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.device
REFERENCE = ReferenceBackend()
FLOAT = 2e-5
F32 = np.float32


@pytest.fixture(params=["interpreted", "cuda"])
def be(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "interpreted":
        yield request.getfixturevalue("interpreted")
        return
    try:
        backend = open_backend("cuda")
    except (DeviceError, ImportError) as e:
        pytest.skip(str(e))
    yield backend
    backend.close()


def rounded(kv: str, x: np.ndarray) -> np.ndarray:
    """What a cache of this type gives back of x."""
    if kv == "f16":
        return x.astype(np.float16).astype(F32)
    return quants.dequantize("Q8_0", quants.quantize("Q8_0", x)).reshape(x.shape).astype(F32)


@dataclass
class Case:
    """New rows of several sequences with a past each; n_head queries to `heads` keys."""

    kv: Any
    past: list[int]
    new: list[int]
    n_head: int
    heads: int
    dim: int
    dim_v: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, b: Any, kv: str) -> Any:
        """The result on a backend."""
        layers = [LayerCache(), LayerCache(self.heads, self.dim, self.dim_v)]
        lengths = [p + n for p, n in zip(self.past, self.new, strict=True)]
        caches = [b.new_cache(layers, n, kv) for n in lengths]
        k = [self.stored(n, self.dim, 2 * i) for i, n in enumerate(lengths)]
        v = [self.stored(n, self.dim_v, 2 * i + 1) for i, n in enumerate(lengths)]
        q = b.array(normal(sum(self.new), self.n_head * self.dim, seed=99))
        options = {
            n: b.array(x) if isinstance(x, np.ndarray) else x for n, x in self.options.items()
        }

        old = list(zip(k, v, self.past, strict=True))

        def write(batch: Batch, sides: list[list[np.ndarray]]) -> None:
            b.cache_write(batch, 1, *(b.array(np.concatenate(x)) for x in sides))

        def fill(batch: Batch) -> Any:
            write(batch, [[x[i][: x[2]] for x in old] for i in (0, 1)])
            return b.array(np.zeros(1, F32))

        def look(batch: Batch) -> Any:
            write(batch, [[x[i][x[2] :] for x in old] for i in (0, 1)])
            return b.attention(batch, 1, q, self.n_head, scale=self.dim**-0.5, **options)

        before = [([0] * n, 0, c) for n, c in zip(self.past, caches, strict=True)]
        b.step(None, fill, Batch.of([x[0] for x in before], [0] * len(before), [0], caches))
        return b.step(None, look, Batch.of([[0] * n for n in self.new], self.past, [0], caches))

    def stored(self, n: int, dim: int, seed: int) -> np.ndarray:
        """Keys or values that a cache of this type holds exactly."""
        return rounded(self.kv, normal(n, self.heads * dim, seed=seed))


SINKS, SLOPES = normal(8), np.abs(normal(24)) * F32(0.1)
CASES = [
    Case("f16", [300], [1], 8, 1, 128, 128),
    Case("f16", [300, 130, 3], [1, 1, 1], 8, 8, 64, 64, {"window": 100, "sinks": SINKS}),
    Case("f16", [200, 40], [1, 1], 24, 1, 96, 64, {"softcap": 3.0, "slopes": SLOPES}),
    Case("f16", [100], [1], 2, 1, 256, 256, {"sinks": SINKS[:2], "window": 70}),
    Case("f16", [90, 5], [40, 70], 8, 2, 64, 64, {"window": 50, "softcap": 4.0}),
    Case("f16", [90, 7], [10, 15], 4, 1, 80, 80, {"slopes": SLOPES[:4]}),
    Case("f16", [20], [70], 3, 3, 128, 128, {"sinks": SINKS[:3]}),
    Case("f16", [10], [30], 2, 1, 256, 256),
    Case("q8_0", [300], [1], 8, 1, 128, 128, {"sinks": SINKS}),
    Case("q8_0", [200, 40], [1, 1], 5, 1, 64, 64, {"window": 100, "softcap": 3.0}),
    Case("q8_0", [70, 9], [40, 70], 8, 2, 64, 96, {"slopes": SLOPES[:8]}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kv}-{c.n_head}x{c.dim}-{sum(c.new)}")
def test_attention_is_exact_on_what_the_cache_holds(case: Case, be: Any) -> None:
    want = np.array(case.run(REFERENCE, "f32"))
    be.n_cores = 64  # the past is split
    got = np.array(be.numpy(case.run(be, case.kv)))
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < FLOAT
    assert np.abs(got - want).max() < 10 * FLOAT
    assert not be.numpy(be.counters()).any()  # for the next launch


@pytest.mark.parametrize("n_cores", [1, 64])
def test_decode_leaves_the_int8_form_with_the_result(n_cores: int, be: Any) -> None:
    """One launch, split or not; the form is that of ``quantise``."""
    be.n_cores, be.any_quantised = n_cores, True
    y = CASES[0].run(be, "f16")
    got = [be.numpy(x) for x in y.int8]
    y.int8 = None
    weight = GPUWeight("Q8_0", "Q8_0", (1, y.shape[-1]), 0, None, 0)
    want = [be.numpy(x) for x in operand(be, weight, y)]
    assert np.array_equal(got[0], want[0])
    assert np.allclose(got[1], want[1], rtol=1e-6)
    assert np.allclose(got[2], want[2], rtol=1e-5, atol=1e-6)


def test_large_values_do_not_overflow(be: Any) -> None:
    """Values near the end of halves, and scores so far apart that one key takes all."""
    case = Case("f16", [70], [1], 4, 1, 64, 64)
    stored = case.stored
    case.stored = lambda n, dim, seed: stored(n, dim, seed) * F32(8192 if seed % 2 else 256)
    want, got = np.array(case.run(REFERENCE, "f32")), case.run(be, "f16")
    assert np.sqrt(np.mean((be.numpy(got) - want) ** 2) / np.mean(want**2)) < FLOAT


# ---- how work is dealt out

SIDE = Side(0, 8, 128, 128, "f16")
DECODE, PREFILL = group_shape(4, SIDE, SIDE), group_shape(2048, SIDE, SIDE)


def test_shapes_of_groups() -> None:
    assert GroupShape(1, 4, 64) == DECODE
    assert GroupShape(8, 1, 64) == PREFILL
    assert group_shape(2048, SIDE, SIDE, even=False) == GroupShape(4, 1, 64)
    wide = Side(0, 8, 256, 256, "f16")
    assert group_shape(4, wide, wide) == GroupShape(1, 2, 32)
    assert group_shape(64, wide, wide) == GroupShape(4, 1, 32)


ROW = 512, 256  # bytes and values of a key and a value


@pytest.mark.parametrize(("n_pages", "fewest"), [(16, 8), (128, 16), (1024, 16)])
def test_one_sequence_fills_the_device(n_pages: int, fewest: int) -> None:
    assert fewest <= choose_splits(8, n_pages, DECODE, *ROW, 132) <= 64


def test_many_sequences_and_long_prompts_are_not_split() -> None:
    assert choose_splits(8 * 48, 16, DECODE, *ROW, 132) == 1
    assert choose_splits(128, 8, PREFILL, *ROW, 132) == 1
    assert choose_splits(8, 1, DECODE, *ROW, 132) == 1
