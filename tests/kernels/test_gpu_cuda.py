"""The CUDA backend on a simulated driver: memory, launches, captured graphs, prefill through cuBLAS."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import normal, stored

from tinyllm import gguf
from tinyllm.errors import DeviceError
from tinyllm.kernels.backend import Batch, LayerCache
from tinyllm.kernels.gpu import backend, pinned
from tinyllm.kernels.gpu.attention import Query
from tinyllm.kernels.gpu.kvcache import Side
from tinyllm.kernels.gpu.weights import GPUWeight
from tinyllm.kernels.reference import ReferenceBackend
from tinyllm.models.build import build
from tinyllm.models.stages import Stage

pytestmark = pytest.mark.device
pytest.importorskip("pyopencl", reason="needs PyOpenCL")
F32 = np.float32
REFERENCE = ReferenceBackend()


@pytest.fixture
def driver() -> Any:
    from emulator.simulated_cuda import Driver

    try:
        return Driver()
    except DeviceError as e:
        return pytest.skip(str(e))


@pytest.fixture
def cuda(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from emulator.simulated_cuda import module

    return module(driver, monkeypatch)


@pytest.fixture
def be(cuda: Any) -> Iterator[Any]:
    opened = cuda.CUDABackend("0")
    yield opened
    opened.close()


def logits(where: Any, path: Path, parts: list[int]) -> np.ndarray:
    """All rows of a sequence, read in parts of these lengths."""
    with gguf.open(path) as f:
        net = build(f.metadata, f.tensors, where, "f16")
    state = net.new_state(64)
    state.append([(7 * i + 3) % 300 for i in range(sum(parts))])
    rows = [np.array(net.forward([(state, n, "all")])[0]) for n in parts]
    return np.concatenate(rows)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("name", ["llama-h256-Q4_K", "qwen2-h256-F16"])
def test_a_model_gives_the_references_logits(
    name: str, library: bool, be: Any, driver: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library:
        monkeypatch.setattr(backend, "LIBRARY_ROWS", 20)
    path = data / "golden" / "quants" / f"{name}.gguf"
    want = logits(ReferenceBackend(), path, [28])
    got = logits(be, path, [20, *[1] * 8])
    bound = 2e-3 if name.endswith("F16") else 0.2
    assert np.abs(got - want).max() <= bound * want.std()
    plain = name.endswith("F16")
    assert (driver.products > 0) == (library or plain)  # prefill went through cuBLAS
    assert ("matmul_tensor" in driver.kernels) == (not library and not plain)
    assert (
        driver.replays == 7
    )  # the second step of one token was captured, and replayed from then on
    assert "Simulated" in be.name


def test_steps_of_some_rows_are_captured_with_their_products(
    be: Any, driver: Any, data: Path
) -> None:
    path = data / "golden" / "quants" / "llama-h256-Q4_K.gguf"
    want = logits(ReferenceBackend(), path, [60])
    got = logits(be, path, [20, 20, 20])
    assert np.abs(got - want).max() <= 0.2 * want.std()
    assert driver.replays == 2


@pytest.mark.parametrize("name", ["llama-h256-Q4_K", "qwen2-h256-F16"])
def test_without_cublas_prompts_go_through_our_own_tiles(
    name: str, be: Any, driver: Any, data: Path
) -> None:
    be.library = None
    path = data / "golden" / "quants" / f"{name}.gguf"
    want, got = logits(ReferenceBackend(), path, [20]), logits(be, path, [20])
    assert np.abs(got - want).max() <= (2e-3 if name.endswith("F16") else 0.2) * want.std()
    assert driver.products == 0


def chosen(be: Any, kind: str, n_rows: int) -> str:
    """Which kernels multiply so many rows, or (row, expert) pairs if negative, with weights of a kind."""
    w = GPUWeight(kind, kind, (64, 256), 0, None, 0)
    product = be.choose_expert_product(w, -n_rows) if n_rows < 0 else be.choose_product(w, n_rows)
    return str(type(product).__name__)


QUANTISED = {1: "Matvec", 4: "Matvec", 5: "TensorTiles", 255: "TensorTiles", 256: "Library"}
FLOATS = {1: "Matvec", 8: "Matvec", 9: "Library", 256: "Library"}
PAIRS = {-32: "Matvec", -33: "TensorTiles"}


@pytest.mark.parametrize(
    ("kind", "table"), [("Q4_K", QUANTISED | PAIRS), ("F16", FLOATS | PAIRS | {-33: "Tiles"})]
)
def test_products_are_chosen_by_format_and_rows(be: Any, kind: str, table: dict[int, str]) -> None:
    assert {n: chosen(be, kind, n) for n in table} == table


def test_without_tensor_cores_tiles_multiply_in_integers(be: Any) -> None:
    be.tensor_cores = False
    assert [chosen(be, "Q4_K", n) for n in (16, 17, 256, -33)] == [
        *("Matvec", "Tiles", "Library", "Tiles")
    ]
    side = Side(0, 2, 64, 64, "f16")
    assert be.choose_attention(Query(None, 2, side, side, 1.0)) is be.plain_attention


def test_a_bias_for_each_distance_takes_the_plain_kernels(be: Any) -> None:
    side, bias = Side(0, 2, 64, 64, "f16"), object()
    assert be.choose_attention(Query(None, 2, side, side, 1.0)) is be.tensor_attention
    assert be.choose_attention(Query(None, 2, side, side, 1.0, bias=bias)) is be.plain_attention


def test_a_library_is_passed_over_for_what_it_does_not_multiply(be: Any) -> None:
    be.library.kinds = ("F32", "F16")
    assert [chosen(be, kind, 300) for kind in ("F16", "BF16", "Q4_K")] == [
        *("Library", "Tiles", "Library")
    ]


def test_experts_of_two_formats_share_their_choices(be: Any) -> None:
    """Tiles of floats and tiles on tensor cores are of different sizes."""
    x, experts = normal(40, 256), np.random.default_rng(0).integers(0, 5, (40, 2)).astype(np.int32)
    on_device = be.array(x), be.array(experts)
    for kind, bound in (("F16", 1e-3), ("Q8_0", 1e-2), ("F16", 1e-3)):
        source = stored(kind, 5, 64, 256)
        want = REFERENCE.matmul_experts(REFERENCE.load(source), x, experts)
        got = be.numpy(be.matmul_experts(be.load(source), *on_device))
        assert np.abs(got - want).max() < bound * np.abs(want).max()


def test_attention_in_floats_deals_out_the_past_by_pages(be: Any) -> None:
    """Sixteen pages go to as many groups of each of two key heads, since the device has 64 cores."""
    launched, launch = [], be.launch
    k, v, q = normal(900, 32), normal(900, 32, seed=1), normal(1, 64, seed=2)

    def traced(program: Any, kernel: str, groups: Any, *args: Any) -> None:
        launched.append((kernel, groups))
        launch(program, kernel, groups, *args)

    def attend(b: Any) -> np.ndarray:
        cache = b.new_cache([LayerCache(2, 16, 16)], 1000, "f32")
        past = b.upload(Batch.of([[0] * 900], [0], [0], [cache]))
        b.cache_write(past, 0, b.array(k), b.array(v))
        last = b.upload(Batch.of([[0]], [899], [0], [cache]))
        return np.array(b.numpy(b.attention(last, 0, b.array(q), 4, scale=0.25)))

    be.launch = traced
    assert np.abs(attend(be) - attend(REFERENCE)).max() < 1e-5
    assert ("attention", (2, 1, 16)) in launched


def test_two_devices_share_the_layers(cuda: Any, driver: Any, data: Path) -> None:
    path = data / "golden" / "quants" / "llama-h256-Q8_0.gguf"
    want = logits(cuda.CUDABackend("0"), path, [20, *[1] * 4])

    def place(n_layer: int) -> list[Stage]:
        first, second = cuda.CUDABackend("0"), cuda.CUDABackend("1")
        return [Stage(first, range(1)), Stage(second, range(1, n_layer))]

    got = logits(place, path, [20, *[1] * 4])
    assert np.abs(got - want).max() <= 1e-5 * want.std()
    assert set(driver.owner.values()) == {0, 1}
    assert driver.replays == 3 + 2 * 3


def test_many_small_copies_in_flight_keep_their_values(
    be: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "ROOM", 4096)
    monkeypatch.setattr(pinned, "PIECE", 1024)
    host = np.empty(700, F32)
    arrays = []
    for i in range(20):
        host[:] = i  # one memory is used again and again
        arrays.append(be.array(host))
    assert [be.numpy(x).min() for x in arrays] == list(range(20))
    assert [be.numpy(x).max() for x in arrays] == list(range(20))


def test_memory_that_a_recording_lacks_ends_the_recording(be: Any, driver: Any) -> None:
    """Spare buffers may be part of what is recorded: they must not be freed to make room."""

    def step(batch: Batch) -> Any:
        y = be.act(be.act(batch.ids, "exp"), "exp")
        return be.add(y, be.empty((1, 4 << 20)).reshape(4 << 20)) if steps > 1 else y

    batch = Batch.of([[1]], [0], [0])
    steps = 1
    be.step("k", step, batch)
    driver.total, steps = sum(driver.sizes.values()) + (1 << 20), 2
    with pytest.raises(DeviceError, match="do not fit"):
        be.step("k", step, batch)
    assert driver.tape is None
    assert not be.recording


def test_graphs_give_the_same_bits_as_launches(be: Any, driver: Any, data: Path) -> None:
    path = data / "golden" / "quants" / "llama-h256-Q8_0.gguf"
    recorded = logits(be, path, [1] * 6)
    assert driver.replays
    be.step = lambda key, fn, batch: fn(be.upload(batch))
    assert np.array_equal(recorded, logits(be, path, [1] * 6))


def test_a_capture_that_copies_is_given_up(be: Any, driver: Any) -> None:
    def step(batch: Batch) -> Any:
        return be.add(be.array(np.ones((1, 4), F32)), be.array(np.ones((1, 4), F32)))

    for _ in range(4):
        assert (be.numpy(be.step("copies", step, Batch.of([[1]], [0], [0]))) == 2).all()
    assert driver.replays == 0


def test_a_capture_that_the_driver_refuses_is_told_and_done_without(be: Any, driver: Any) -> None:
    def refuse() -> None:
        driver.tape = None
        raise type(be).launch.__globals__["runtime"].CUDARuntimeError("capture invalidated")

    def step(batch: Batch) -> Any:
        return be.add(be.take(w, batch.ids), be.take(w, batch.ids))

    w = be.array(np.ones((2, 4), F32))
    be.stream.end_capture = refuse
    be.step("k", step, Batch.of([[1]], [0], [0]))
    with pytest.warns(UserWarning, match=r"not captured \(capture invalidated\)"):
        y = be.step("k", step, Batch.of([[1]], [0], [0]))
    assert (be.numpy(y) == 2).all()
    assert (be.numpy(be.step("k", step, Batch.of([[1]], [0], [0]))) == 2).all()


def test_close_frees_everything_at_once(be: Any, driver: Any, data: Path) -> None:
    path = data / "golden" / "quants" / "llama-h256-Q8_0.gguf"
    with gguf.open(path) as f:
        net = build(f.metadata, f.tensors, be, "f16")
    state = net.new_state(64)
    state.append([1, 2, 3])
    net.forward([(state, 3, "last")])
    held = sum(driver.sizes.values())
    net.close()
    gc.collect()
    assert sum(driver.sizes.values()) < held // 10  # norms' weights stay as long as the network


def test_too_little_memory_is_one_clear_line(be: Any, driver: Any) -> None:
    driver.total = 1 << 20
    with pytest.raises(DeviceError, match=r"cuda:0 Simulated: 4 MiB more do not fit, 1 of 1 MiB"):
        be.allocate(4 << 20)


def test_a_missing_compiler_is_one_clear_line(be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def get_function(self, name: str) -> Any:
            raise RuntimeError("CuPy failed to load libnvrtc.so.13\nand much more")

    module = type(be).launch.__globals__["cupy"]
    monkeypatch.setattr(module, "RawModule", lambda **options: Broken())
    with pytest.raises(DeviceError, match=r"failed to load libnvrtc.so.13\. CUDA's .*ctk") as e:
        be.act(be.array(np.ones((1, 4), F32)), "silu")
    assert "\n" not in str(e.value)
