"""What the contract of all backends does not ask, on OpenCL: recorded steps, splits, pages, memory."""

from __future__ import annotations

import gc
import re
from typing import Any

import numpy as np
import pytest
from stored import Stored, normal, stored

from tinyllm.errors import ContextOverflow, DeviceError, NumericError, StateError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch, LayerCache, Routing
from tinyllm.kernels.gpu import devices, sources, weights
from tinyllm.kernels.gpu.arrays import Pool, bucket
from tinyllm.kernels.gpu.kvcache import Shelf
from tinyllm.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.device
cl = pytest.importorskip("pyopencl", reason="needs PyOpenCL")
REFERENCE = ReferenceBackend()
F32 = np.float32
LAYERS = [LayerCache(2, 16, 16)]


@pytest.fixture
def be(opencl: Any) -> Any:
    return opencl


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def attend(b: Any, past: int, new: list[int], n_head: int = 4) -> np.ndarray:
    """Fill a past in one step, then attend from new rows of several sequences."""
    caches = [b.new_cache(LAYERS, 600, "f32") for _ in new]
    t = sum(new)

    def fill(batch: Batch) -> Any:
        n = past * len(new)
        b.cache_write(batch, 0, b.array(normal(n, 32)), b.array(normal(n, 32, seed=1)))
        return b.array(np.zeros(1, F32))

    def look(batch: Batch) -> Any:
        b.cache_write(batch, 0, b.array(normal(t, 32, seed=2)), b.array(normal(t, 32, seed=3)))
        return b.attention(batch, 0, b.array(normal(t, 16 * n_head, seed=4)), n_head, scale=0.25)

    b.step(None, fill, Batch.of([[0] * past] * len(new), [0] * len(new), [0], caches))
    y = b.step(None, look, Batch.of([[0] * n for n in new], [past] * len(new), [0], caches))
    return np.array(b.numpy(y))


# ---- work for large devices, which PoCL does not ask for by itself


@pytest.mark.parametrize("new", [[1], [1, 1, 1], [70, 3]])
def test_attention_split_over_the_past_is_the_same(be: Any, new: list[int]) -> None:
    be.n_cores = 64
    assert error(attend(be, 300, new), attend(REFERENCE, 300, new)) < 1e-5


def test_many_heads_to_one_key_head_take_several_groups(be: Any) -> None:
    for new in ([1, 1], [5]):
        assert error(attend(be, 20, new, 34), attend(REFERENCE, 20, new, 34)) < 1e-5


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q6_K"])
def test_matvec_whose_warps_share_rows_is_the_same(be: Any, type_name: str) -> None:
    source, x = stored(type_name, 37, 2048), normal(2, 2048)
    plain = np.array(be.numpy(be.matmul(be.load(source), be.array(x))))
    be.n_cores = 128
    assert error(be.numpy(be.matmul(be.load(source), be.array(x))), plain) < 1e-6


@pytest.mark.parametrize("type_name", ["F16", "Q4_0"])
def test_many_choices_are_sorted_by_expert(be: Any, type_name: str) -> None:
    source, x = stored(type_name, 5, 70, 64), normal(60, 64)
    experts = np.random.default_rng(2).integers(0, 5, (60, 2)).astype(np.int32)
    experts[:40] = 3  # one that fills more than a tile, one (4 or less) that may stay empty
    want = REFERENCE.matmul_experts(REFERENCE.load(source), x, experts)
    got = be.numpy(be.matmul_experts(be.load(source), be.array(x), be.array(experts)))
    assert error(got, want) < (1e-5 if type_name == "F16" else 0.01)


def test_top_k_of_more_equals_than_candidates(be: Any) -> None:
    ids, values = be.top_k(be.array(np.ones(40_000, F32)), 3)
    assert ids.tolist() == [0, 1, 2]
    assert values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("k", [1, 7, 5000])
def test_top_k_on_the_device_is_that_of_the_host(be: Any, k: int) -> None:
    x = np.round(normal(3000), 2)
    x[5:9] = -np.inf
    want, got = REFERENCE.top_k(x, k), be.top_k(be.array(x), k)
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1], want[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_top_k_refuses_in_the_same_words_everywhere(be: Any, bad: float) -> None:
    x = normal(3000)
    x[17 if np.isnan(bad) or bad > 0 else slice(None)] = bad
    said = []
    for run in (lambda: REFERENCE.top_k(x, 5), lambda: be.top_k(be.array(x), 5)):
        with pytest.raises(NumericError) as e:
            run()
        said.append(str(e.value))
    assert said[0] == said[1]


# ---- recorded steps


def test_a_step_seen_before_is_replayed_with_new_values(be: Any) -> None:
    """Twice fn runs; after that only the batch's values change, and the result with them."""
    w = be.load(stored("Q8_0", 50, 64))
    calls = []

    def step(batch: Batch) -> Any:
        calls.append(1)
        x = be.embed(w, batch.ids)
        be.cache_write(batch, 0, half(x), half(x))
        return be.attention(batch, 0, x, 4, scale=0.25)

    def half(x: Any) -> Any:
        return be.matmul(narrow, x)

    narrow = be.load(stored("F32", 32, 64))
    tokens, cache = [3, 7, 1, 30, 2, 9], be.new_cache(LAYERS, 64, "f32")
    replayed = [
        np.array(be.numpy(be.step("decode", step, Batch.of([[t]], [i], [0], [cache]))))
        for i, t in enumerate(tokens)
    ]
    assert len(calls) == 2
    cache = be.new_cache(LAYERS, 64, "f32")
    for i, t in enumerate(tokens):
        direct = be.numpy(be.step(None, step, Batch.of([[t]], [i], [0], [cache])))
        assert np.array_equal(replayed[i], direct)


def test_arrays_made_after_recording_are_not_overwritten(be: Any) -> None:
    w = be.load(stored("Q8_0", 50, 64))

    def step(batch: Batch) -> Any:
        return be.add(be.act(be.embed(w, batch.ids), "silu"), be.embed(w, batch.ids))

    for i in range(3):
        be.step("key", step, Batch.of([[i]], [0], [0]))
    kept = [be.array(np.full((1, 64), i, F32)) for i in range(8)]
    be.step("key", step, Batch.of([[5]], [0], [0]))
    assert all((be.numpy(x) == i).all() for i, x in enumerate(kept))


def test_a_step_that_copies_from_the_host_is_never_recorded(be: Any) -> None:
    def step(batch: Batch) -> Any:
        return be.add(be.array(np.ones((1, 4), F32)), be.array(np.ones((1, 4), F32)))

    for _ in range(4):
        y = be.step("copies", step, Batch.of([[1]], [0], [0]))
        assert (be.numpy(y) == 2).all()


def test_a_program_that_does_not_compile_is_an_error_of_the_device(be: Any) -> None:
    program = ("elementwise.c",), ()  # without activations.h
    with pytest.raises(DeviceError, match=r"does not compile elementwise\.c"):
        be.launch(program, "act", (1, 1, 1), (1, 1, 1))


# ---- caches and memory


def test_pages_are_taken_as_a_sequence_fills_and_given_back(be: Any) -> None:
    a, b = (be.new_cache(LAYERS, 1000, "f16") for _ in range(2))
    a.reserve(0, 65)
    b.reserve(0, 1)
    assert [[len(pages) for pages in c.pages] for c in (a, b)] == [[2], [1]]
    assert not set(a.numbers[0]) & set(b.numbers[0])
    a_store, (shelf,) = a.store, a.store.pages
    del a
    gc.collect()
    assert sorted(shelf._spare) == [0, 1]
    with pytest.raises(ContextOverflow, match="1001 positions"):
        b.reserve(64, 1001)
    a_store.trim()
    assert shelf.buffer is not None
    del b
    gc.collect()
    assert be.idle() == shelf.room * shelf.nbytes > 0
    held = shelf.version
    a_store.trim()
    assert shelf.buffer is None
    assert (be.idle(), shelf.version) == (0, held + 1)


def test_places_that_come_back_while_one_is_taken_are_no_harm() -> None:
    class Collecting:
        """A device whose allocations set the garbage collector to work."""

        freed = 0

        def allocate(self, nbytes: int) -> object:
            shelf.give(held)
            held.clear()
            shelf.trim()  # as when memory is scarce
            return object()

        def copy(self, *args: object) -> None: ...

        def finish(self) -> None: ...

        def free(self, buffer: object) -> None:
            self.freed += buffer is not None

    held: list[int] = []
    be: Any = Collecting()
    shelf = Shelf(be, 16)
    held += [shelf.take() for _ in range(64)]
    mine = shelf.take()
    assert shelf.buffer is not None
    assert 0 <= mine < shelf.room
    shelf.give([mine])
    shelf.trim()
    assert shelf.buffer is None
    assert be.freed == 2


def test_a_growing_store_keeps_what_it_holds(be: Any) -> None:
    caches = [be.new_cache(LAYERS, 200, "f32") for _ in range(6)]
    x = normal(6 * 100, 32)

    def fill(batch: Batch) -> Any:
        be.cache_write(batch, 0, be.array(x), be.array(-x))
        return be.array(np.zeros(1, F32))

    for i, c in enumerate(caches):
        x = normal(100, 32, seed=i)
        be.step(None, fill, Batch.of([[0] * 100], [0], [0], [c]))
    for i, c in enumerate(caches):
        assert np.array_equal(c.export(100)["0.k"].reshape(100, 32), normal(100, 32, seed=i))


def test_restore_refuses_what_does_not_fit(be: Any) -> None:
    cache = be.new_cache(LAYERS, 100, "f32")
    good = {"0.k": np.zeros((3, 2, 16), F32), "0.v": np.zeros((3, 2, 16), F32)}
    cache.restore(good)
    for bad in (
        {"0.k": good["0.k"]},
        good | {"0.v": np.zeros((2, 2, 16), F32)},
        good | {"0.v": np.zeros((3, 2, 8), F32)},
        good | {"0.v": np.zeros((3, 2, 16), np.float16)},
    ):
        with pytest.raises(StateError, match="saved"):
            cache.restore(bad)


def test_too_little_memory_is_an_error_that_says_how_much(
    be: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int) -> Any:
        raise MemoryError

    monkeypatch.setattr(be, "_allocate", none_left)
    with pytest.raises(DeviceError, match="8 MiB more do not fit"):
        be.load(Stored("w", "F32", (1024, 2048), np.zeros((1024, 8192), np.uint8)))


def test_loads_and_closes_leave_no_memory_behind() -> None:
    from tinyllm.kernels.gpu.opencl import OpenCLBackend

    source = Stored("w", "F32", (512, 2048), np.zeros((512, 8192), np.uint8))  # 4 MiB

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    def once() -> None:
        b = OpenCLBackend()
        w = b.load(source)
        b.numpy(b.matmul(w, b.array(normal(1, 2048))))
        b.close()

    try:
        for _ in range(25):  # until PoCL's threads have what they keep
            once()
        before = resident()
        for _ in range(40):
            once()
    except (DeviceError, FileNotFoundError) as e:
        pytest.skip(str(e))
    assert resident() - before < 32 << 20  # forty models are 160 MiB


@pytest.mark.parametrize("nbytes", [1, 256, 257, 1000, 4097, 10**6, 10**9 + 1])
def test_buckets_hold_what_they_are_for_and_little_more(nbytes: int) -> None:
    assert nbytes <= bucket(nbytes) <= max(256, nbytes * 1.13)
    assert bucket(bucket(nbytes)) == bucket(nbytes)


def test_a_pool_uses_spare_buffers_that_are_not_much_too_large() -> None:
    made = []

    def allocate(nbytes: int) -> int:
        made.append(nbytes)
        return len(made)

    pool = Pool(allocate, lambda buffer: None)
    first, room = pool.take(1000)
    pool.give(first, room)
    assert pool.take(600) == (first, 1024)
    second, _ = pool.take(600)
    assert second != first
    pool.give(first, 1024)
    assert pool.take(300)[0] != first
    assert made == [1024, 640, 320]
    pool.trim()
    assert pool.nbytes == 640 + 320


# ---- formats and devices


def test_every_quantised_type_has_a_layout_that_keeps_its_size() -> None:
    for name, f in quants.FORMATS.items():
        if f.int8_form is None:
            assert name in weights.PLAIN or name in weights.WIDENED
            continue
        saved = {"Q8_1": 2, "Q8_K": 32}.get(name, 0)  # sums that only dot products read
        assert weights.plane_bytes(name) == f.type_size - saved


WIDE = """load16 load32 nibbles pairs half_bytes uneven_steps scales_q4_k two_scales_q4_k pair_runs
bit_runs""".split()
LOADS = dict.fromkeys(WIDE, 16) | {"WORDS": 4}


@pytest.mark.parametrize("name", weights.LAYOUTS)
def test_wide_loads_are_aligned_and_within_their_plane(name: str) -> None:
    """A GPU refuses what is not aligned; a processor may not mind."""
    layout = weights.LAYOUTS[name]
    sizes = [stop - start for start, stop in weights.plane_spans(name)]
    planes = {sum(sizes[:i]): size for i, size in enumerate(sizes)}
    source = re.sub(r"HALF\((\d+)\)", r"PLANE(\1, 2)", sources.read(layout.header))
    source = re.sub(r"WORDS\(", "WORDS(PLANE(", source)
    names = [layout.unpack, *([layout.defines(name)["PIECE"]] if layout.apart != 1 else [])]
    found = []
    for function in names:
        body = source.split(f"Unit {function}(")[1].split("\n}")[0]
        place = r"(?:PLANE|FIELD|BYTES)\((\d+), (\d+)(?:\)(?: \+ (\d+) \*)?|,)"
        found += re.findall(rf"(?:(\w+)\()?{place}", body)
        assert found
    for load, before, size, step in found:
        align = LOADS.get(load, 2 if int(size) == 2 else 1)
        assert planes[int(before)] == int(size)
        assert int(before) % align == int(size) % align == int(step or 0) % align == 0


def test_plain_integers_are_widened(be: Any) -> None:
    values = np.arange(-32, 32, dtype=np.int8).reshape(4, 16)
    w = be.load(Stored("w", "I8", (4, 16), values.view(np.uint8)))
    y = be.numpy(be.matmul(w, be.array(np.eye(16, dtype=F32))))
    assert np.array_equal(y, values.T)


def test_routing_to_too_many_experts_is_an_error(be: Any) -> None:
    with pytest.raises(DeviceError, match="2000 experts"):
        be.route(be.array(normal(1, 2000)), Routing(2))


def test_devices_are_found_by_number_or_name() -> None:
    names = ["Tesla T4", "NVIDIA H200"]
    assert devices.pick("1", names, "cuda") == 1
    assert devices.pick("1 NVIDIA H200", names, "cuda") == 1
    assert devices.pick("h200", names, "cuda") == 1
    with pytest.raises(DeviceError, match=r"no device cuda:2; there are: 0 \(Tesla T4\)"):
        devices.pick("2", names, "cuda")


def test_the_list_of_devices_holds_this_one(be: Any) -> None:
    found = {str(d): d for d in devices.list()}
    assert found[be.name].kind == "opencl"
    assert found[be.name].memory > 0


@pytest.mark.parametrize(("package", "extra"), [("cupy", "cuda13"), ("pyopencl", "opencl")])
def test_a_missing_package_names_the_extra(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    look = devices.cuda_devices if package == "cupy" else devices.opencl_devices
    with pytest.raises(DeviceError, match=rf"tinyllm\[{extra}\]"):
        look()
