"""The cpu backend beyond the contract: equal bits on every path, replayed steps, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from stored import normal, stored

from tinyllm.errors import ArgumentError, DeviceError
from tinyllm.gguf import quants
from tinyllm.kernels.backend import Batch, LayerCache
from tinyllm.kernels.cpu import emit, jit, matmul, program, simd, steps
from tinyllm.kernels.cpu.backend import CPUBackend

F32 = np.float32
ONE, TWO = CPUBackend(1), CPUBackend(2)


def product(be: CPUBackend, w: Any, x: np.ndarray) -> np.ndarray:
    return np.array(be.numpy(be.matmul(w, be.array(x))))


@pytest.mark.parametrize("n_out", [16, 80, 96])
@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "TQ2_0"])
def test_a_row_has_the_same_bits_in_any_batch(type_name: str, n_out: int) -> None:
    source, x = stored(type_name, n_out, 512), normal(70, 512)
    w = ONE.load(source)
    singly = np.concatenate([product(ONE, w, row[None]) for row in x])
    for n in (2, 3, 6, 7, 12, 15, 23, 37, 49, 70):
        assert np.array_equal(product(ONE, w, x[:n]), singly[:n])
    assert np.array_equal(product(TWO, TWO.load(source), x), singly)


def test_rows_written_past_the_caches_are_the_same() -> None:
    source, x = stored("Q4_0", 2048, 32), normal(matmul.PAST // 2048, 32)
    w = TWO.load(source)
    several = [product(TWO, w, part) for part in np.split(x, 4)]
    assert np.array_equal(product(TWO, w, x), np.concatenate(several))


LAYERS = [LayerCache(2, 32, 32)]


def attend(be: CPUBackend, cache: Any, past: int, x: np.ndarray, key: Any = None) -> np.ndarray:
    """Rows x [T, 8 * 32] (queries, then keys, then values) after ``past`` others."""
    q, k, v = (be.array(np.ascontiguousarray(p)) for p in np.split(x, [128, 192], axis=1))

    def fn(batch: Batch) -> Any:
        be.cache_write(batch, 0, k, v)
        return be.attention(batch, 0, q, 4, scale=0.2)

    batch = Batch.of([[0] * len(x)], [past], [0], [cache])
    return np.array(be.numpy(be.step(key, fn, batch)))


def test_attention_has_the_same_bits_whole_in_chunks_or_one_by_one() -> None:
    x, n = normal(300, 256), 300
    whole = attend(ONE, ONE.new_cache(LAYERS, n, "f16"), 0, x)
    for be, cuts in ((TWO, [0, 290, *range(291, n + 1)]), (ONE, [0, 7, 256, 299, 300])):
        cache = be.new_cache(LAYERS, n, "f16")
        parts = [attend(be, cache, a, x[a:b]) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("kv", "group", "dim", "window"),
    [
        ("f16", 3, 64, 0),
        ("f16", 7, 80, 0),
        ("q8_0", 12, 64, 0),
        ("f32", 1, 128, 0),
        ("f16", 2, 32, 40),
    ],
)
def test_texts_of_several_lengths_have_the_bits_that_each_has_alone(
    kv: Any, group: int, dim: int, window: int
) -> None:
    """They have one block or several, few rows and many, and windows."""
    lengths, cuts = (20, 300, 790), (16, 15, 4, 0)
    layers = [LayerCache(2, dim, dim, window=window)]
    texts = [normal(n, 2 * (group + 2) * dim, seed=n) for n in lengths]

    def step(
        be: CPUBackend, caches: list[Any], past: list[int], xs: list[np.ndarray]
    ) -> np.ndarray:
        x = np.concatenate(xs)
        n = 2 * group * dim
        q, k, v = (be.array(p.copy()) for p in np.split(x, [n, n + 2 * dim], axis=1))

        def fn(batch: Batch) -> Any:
            be.cache_write(batch, 0, k, v)
            return be.attention(batch, 0, q, 2 * group, scale=0.2, window=window)

        batch = Batch.of([[0] * len(x) for x in xs], past, [0], caches)
        return np.array(be.numpy(be.step(None, fn, batch)))

    alone = [step(ONE, [ONE.new_cache(layers, len(x), kv)], [0], [x]) for x in texts]
    caches, past = [TWO.new_cache(layers, n, kv) for n in lengths], [0] * len(lengths)
    for left in cuts:
        ends = [n - left for n in lengths]
        y = step(TWO, caches, past, [x[a:b] for x, a, b in zip(texts, past, ends, strict=True)])
        rows = [a[i:j] for a, i, j in zip(alone, past, ends, strict=True)]
        assert np.array_equal(y, np.concatenate(rows))
        past = ends


def test_a_replayed_step_reads_the_new_batch_and_its_caches() -> None:
    w = ONE.load(stored("Q8_0", 64, 32))
    calls = []

    def fn(batch: Batch) -> Any:
        calls.append(1)
        x = ONE.embed(w, batch.ids)
        ONE.cache_write(batch, 0, ONE.concat([x, x]), ONE.concat([x, x]))
        return ONE.attention(batch, 0, ONE.concat([x] * 4), 4, scale=0.2)

    def tokens(key: Any) -> list[np.ndarray]:
        caches = [ONE.new_cache(LAYERS, 700, "f32") for _ in range(2)]
        out = []
        for i in range(4):
            batch = Batch.of([[3 * i]], [i // 2], [0], [caches[i % 2]])
            out.append(np.array(ONE.numpy(ONE.step(key, fn, batch))))
        return out

    plain = tokens(None)
    replayed = tokens("decode")
    assert len(calls) == 4 + 1
    assert np.array_equal(plain, replayed)


def test_a_step_is_recorded_anew_when_its_past_has_outgrown_it() -> None:
    """There is room for the parts of some blocks of the past, whatever the context's length."""
    calls = []

    def fn(batch: Batch) -> Any:
        calls.append(1)
        x = ONE.array(np.ones((1, 64), np.float32))
        ONE.cache_write(batch, 0, x, x)
        return ONE.attention(batch, 0, ONE.concat([x, x]), 4, scale=0.2)

    results = []
    for n_ctx, past in ((16, 0), (700, 0), (4000, 1900), (4000, 2100), (4000, 3900), (16, 0)):
        cache = ONE.new_cache(LAYERS, n_ctx, "f16")
        if past:
            x = np.random.default_rng(past).normal(size=(past, 128)).astype(F32)
            attend(ONE, cache, 0, np.concatenate([x, x], 1))
        batch = Batch.of([[0]], [past], [0], [cache])
        results.append(np.array(ONE.numpy(ONE.step("room", fn, batch))))
        assert np.array_equal(results[-1], ONE.numpy(ONE.step(None, fn, batch)))
    assert len(calls) == len(results) + 2


def test_the_steps_used_last_are_kept_as_far_as_they_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be, calls = CPUBackend(1), []

    def step(key: str) -> None:
        def fn(batch: Batch) -> Any:
            calls.append(key)
            return be.scale_softcap(be.array(np.ones((1, 16), F32)), 2.0)

        be.step(key, fn, Batch.of([[1]], [0], [0]))

    step("a")
    (one,) = be._steps._known.values()
    monkeypatch.setattr(steps, "MOST_BYTES", 2 * one.nbytes)
    for key in "abacab":
        step(key)
    assert calls == ["a", "b", "c", "b"]


def test_steps_in_one_memory_do_not_see_what_others_make_of_an_array() -> None:
    w, x = ONE.load(stored("Q8_0", 64, 64)), ONE.array(normal(5, 64))
    want = np.array(ONE.numpy(ONE.matmul(w, x)))

    def fn(batch: Batch) -> Any:
        y = ONE.scale_softcap(ONE.matmul(w, x), float(batch.n_rows))
        return ONE.matmul(w, ONE.add(y, y, ONE.matmul(w, x)))

    found: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for n in (1, 2, 1, 2, 2, 1):
        y = ONE.step("shared", fn, Batch.of([[0] * n], [0], [0]))
        found[n].append(np.array(ONE.numpy(y)))
    for n, results in found.items():
        sums = ONE.array(want * np.float32(2 * n) + want)
        assert all(np.array_equal(y, results[0]) for y in results)
        assert np.allclose(results[0], ONE.numpy(ONE.matmul(w, sums)), rtol=1e-3, atol=1e-2)


def test_a_step_that_asks_for_values_is_not_replayed() -> None:
    seen = []

    def fn(batch: Batch) -> Any:
        x = ONE.act(ONE.mul(ONE.array(np.ones(4, F32)), ONE.array(np.full(4, 2, F32))), "relu")
        seen.append(ONE.numpy(x).tolist())
        return ONE.add(x, x)

    for _ in range(2):
        y = ONE.step("asks", fn, Batch.of([[1]], [0], [0]))
        assert ONE.numpy(y).tolist() == [4.0] * 4
    assert seen == [[2.0] * 4] * 2


def test_an_output_is_not_overwritten_while_it_is_held() -> None:
    x = ONE.array(np.ones(64, F32))
    held = [ONE.scale_softcap(x, float(i)) for i in range(40)]
    for i, y in enumerate(held):
        assert (ONE.numpy(y) == i).all()


def test_loading_refuses_what_has_no_matrix() -> None:
    source = stored("Q8_0", 8, 32)
    source.type = "Z9_K"
    with pytest.raises(DeviceError, match="Z9_K"):
        ONE.load(source)
    with pytest.raises(ArgumentError, match="n_threads"):
        CPUBackend(0)


def test_more_threads_than_cores_are_remembered_not_started() -> None:
    be = CPUBackend(1000)
    assert be.n_threads == 1000
    assert be._workers <= (os.cpu_count() or 1)


# ---- instruction sets


def assembly(triple: str, features: str, write: Any) -> str:
    """The machine code of one emitted function for another processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    pointer = emit.P8
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer] * 3), "f")
    b = ir.IRBuilder(f.append_basic_block())
    write(emit.Emit(b), *f.args)
    b.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(features=features, opt=2)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize(
    ("isa", "triple", "features", "lanes", "instruction"),
    [
        ("neon", "aarch64-linux-gnu", "+neon,+dotprod", 4, "sdot"),
        ("avxvnni", "x86_64-linux-gnu", "+avx2,+fma,+avxvnni", 8, "{vex} vpdpbusd"),
        ("avx2", "x86_64-linux-gnu", "+avx2,+fma", 8, "vpmaddubsw"),
        ("avx512vnni", "x86_64-linux-gnu", "+avx512f,+avx512bw,+avx512vnni", 16, "vpdpbusd"),
    ],
)
def test_dot_products_of_other_processors(
    monkeypatch: Any, isa: str, triple: str, features: str, lanes: int, instruction: str
) -> None:
    monkeypatch.setattr(emit, "instruction_set", lambda: isa)
    ty = ir.VectorType(emit.I32, lanes)

    def add_dot(e: emit.Emit, total: Any, codes: Any, x: Any) -> None:
        e.store(e.dot(e.load(total, ty), e.load(codes, ty), e.load(x, ty)), total)

    text = assembly(triple, features, add_dot).replace("\t", " ")
    assert instruction in text
    assert ("zmm" in text) == (lanes == 16)


IN_ANOTHER_PROCESS = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_cpu import normal, product, stored
from tinyllm.kernels.cpu import emit, jit
from tinyllm.kernels.cpu.backend import CPUBackend
be = CPUBackend(1)
y = product(be, be.load(stored("Q4_K", 80, 512, written=False)), normal(1, 512))
print(emit.instruction_set(), *jit.compiled)
print("zmm" in jit.assembly("matvec_Q4_K_parts") if {asm} else "numba" in sys.modules)
print(y.tobytes().hex())
"""


def elsewhere(folder: Path, asm: bool = False, **environment: str) -> list[str]:
    """A product in a new process with its own kernel cache: its output's lines."""
    return in_another_process(IN_ANOTHER_PROCESS, folder, asm, **environment)


def in_another_process(
    template: str, folder: Path, asm: bool = False, **environment: str
) -> list[str]:
    """What a program prints that keeps its kernels in a folder of its own."""
    code = template.format(tests=str(Path(__file__).parent), asm=asm)
    env = {**os.environ, "TINYLLM_CACHE": str(folder), **environment}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\n")


@pytest.mark.skipif(emit.instruction_set() != "avx512vnni", reason="needs AVX-512 to compare with")
def test_avx2_alone_gives_the_same_bits_and_no_wide_registers(tmp_path: Path) -> None:
    avx2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    lines = elsewhere(tmp_path, asm=True, **avx2)
    assert lines[0].startswith("avx2 ")
    assert lines[1] == "False"
    here = product(ONE, ONE.load(stored("Q4_K", 80, 512, written=False)), normal(1, 512))
    assert lines[2] == here.tobytes().hex()


dot = None  # given by ``jit.function``


def dots(p: int, n: int, step: int, worker: int) -> None:
    """n dot products, ``step`` bytes apart."""
    for i in range(n):
        dot(p + step * i)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
@pytest.mark.parametrize("lowest", [0, -128])
def test_dot_products_of_all_bytes_are_exact(monkeypatch: Any, isa: str, lowest: int) -> None:
    """Each code with each activation, in all four places at once, where sums of 16 bits are largest."""
    lanes = 8 if isa == "avx2" else 4
    if emit.lanes() < lanes:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(emit, "instruction_set", lambda: isa)

    @simd.emitter(simd.types.void, simd.i64)
    def emitted(e: emit.Emit, p: Any) -> None:
        ty = ir.VectorType(emit.I32, lanes)
        codes, x, total = (e.load(e.ptr(p), ty, 4 * lanes * i) for i in range(3))
        e.store(e.dot(total, codes, x, lowest < 0), e.ptr(p), 8 * lanes)

    codes, x = np.meshgrid(np.arange(lowest, 128), np.arange(-127, 129), indexing="ij")
    x = np.minimum(x, 127)
    table = np.stack([np.repeat(v, 4).astype(np.int8).view(np.int32) for v in (codes, x, x)])
    table[2] = np.arange(table.shape[1])
    rows = np.ascontiguousarray(table.reshape(3, -1, lanes).transpose(1, 0, 2))
    run = jit.function(dots, f"dots_{isa}_{lowest < 0}", dot=emitted)
    run(rows.ctypes.data, len(rows), rows[0].nbytes, 0)
    want = 4 * codes.ravel() * x.ravel() + np.arange(codes.size)
    assert np.array_equal(rows[:, 2].ravel(), want)


EXTREMES = """
import sys
sys.path.insert(0, {tests!r})
from test_cpu import emit, jit, products_of_extremes
found = products_of_extremes()
wide = ["zmm" in jit.assembly(name) for name in jit.compiled if "Q4_0" in name]
print(emit.instruction_set(), len(wide), any(wide))
for y in found:
    print(y.tobytes().hex())
"""


def products_of_extremes() -> list[np.ndarray]:
    """With the largest and the smallest codes of several sizes, and activations that all are 127 or -127."""
    found = []
    for type_name in ("Q4_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "Q8_0"):
        source = stored(type_name, 48, 512, written=False)
        blocks = source.raw.view(quants.FORMATS[type_name].dtype).reshape(48, -1)
        for name in {"qs", "ql", "qh", "hmask", "scales"} & set(blocks.dtype.names):
            kind = np.iinfo(blocks.dtype[name].base)
            blocks[name][:16], blocks[name][16:32] = kind.max, kind.min
        w = ONE.load(source)
        x = np.concatenate([np.ones((2, 512)), -np.ones((1, 512)), normal(34, 512)]).astype(F32)
        found += [product(ONE, w, some) for some in (x, x[:7], x[2:3])]
    return found


@pytest.mark.skipif(emit.instruction_set() != "avx512vnni", reason="needs AVX-512 to compare with")
@pytest.mark.parametrize("more", ["avx2", "avxvnni"])
def test_the_largest_sums_have_the_same_bits_without_wide_registers(
    tmp_path: Path, more: str
) -> None:
    """Where sums are of 16 bits, four of pairs of 5-bit codes, say, just fit."""
    if not llvm.get_host_cpu_features().get(more):
        pytest.skip(f"this processor has no {more}")
    env = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": f"+avx2,+fma,+f16c,+{more}"}
    first, *lines = in_another_process(EXTREMES, tmp_path, **env)
    assert first == f"{more} 3 False"
    assert lines[:-1] == [y.tobytes().hex() for y in products_of_extremes()]


# ---- half precision without instructions for it


def test_halves_by_bits_are_numpys(monkeypatch: Any) -> None:
    """Every half, and floats around the roundings, through the integer conversions."""
    monkeypatch.setattr(emit, "has_half", lambda: False)
    convert = jit.function(convert_halves)
    halves = np.arange(1 << 16, dtype=np.uint16)
    floats = np.empty(1 << 16, F32)
    convert(halves.ctypes.data, floats.ctypes.data, 1 << 16, False)
    want = halves.view(np.float16).astype(F32)
    finite = ~np.isnan(want)
    assert np.array_equal(floats[finite], want[finite])
    assert np.isnan(floats[~finite]).all()

    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(F32)
    near = np.where(finite, want, 0)[: 1 << 15]
    x[: 1 << 15] = near * rng.uniform(0.9995, 1.0005, 1 << 15).astype(F32)
    got = np.empty(1 << 16, np.uint16)
    convert(x.ctypes.data, got.ctypes.data, 1 << 16, True)
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    ok = ~np.isnan(x)
    assert np.array_equal(got.view(np.float16)[ok], expected[ok])


def exponentials(source: int, to: int, n: int, below: bool) -> None:
    """e^x of n floats, as it is computed of all or of those that are not above 0."""
    for i in range(0, n, 16):
        x = simd.load(source + 4 * i)
        simd.store(to + 4 * i, simd.exp_below(x) if below else simd.exp(x))


def test_exponentials_of_no_positive_number_have_the_bits_of_all() -> None:
    rng, n = np.random.default_rng(0), 1 << 16
    steps = np.arange(n // 2) / 256 * np.log(2)  # halves of ln 2 among them: where rounding turns
    x = -np.r_[steps, rng.uniform(0, 130, n // 4), rng.uniform(0, 1e-3, n // 4)].astype(F32)
    x[:4] = 0, -0.0, -np.inf, -1e30
    x[4:6] = np.nextafter(F32(-87), F32([-100, 0]))
    found = [np.empty(n, F32) for _ in range(2)]
    compute = jit.function(exponentials)
    for below, y in enumerate(found):
        compute(x.ctypes.data, y.ctypes.data, n, below)
    assert np.array_equal(found[0].view(np.uint32), found[1].view(np.uint32))
    assert np.allclose(found[1], np.where(x < -87, 0, np.exp(x, dtype=np.float64)), rtol=3e-7)


@simd.emitter(simd.f32x16, simd.i64)
def halves(e: emit.Emit, p: Any) -> Any:
    """16 halves at an address."""
    return e.half(e.load(e.ptr(p), ir.VectorType(emit.I16, 16)))


@simd.emitter(simd.types.void, simd.i64, simd.f32x16)
def set_halves(e: emit.Emit, p: Any, v: Any) -> None:
    """16 floats as halves."""
    e.store(e.to_half(v), e.ptr(p))


def convert_halves(source: int, to: int, n: int, back: int) -> None:
    """n halves to floats, or back."""
    for i in range(0, n, 16):
        if back:
            set_halves(to + 2 * i, simd.load(source + 4 * i))
        else:
            simd.store(to + 4 * i, halves(source + 2 * i))


def convert_pieces(source: int, to: int, first: int, last: int, worker: int) -> None:
    """Halves to floats; a piece is 16."""
    for piece in range(first, last):
        simd.store(to + 64 * piece, halves(source + 32 * piece))


def test_small_halves_by_bits_are_numbers_in_kernels(monkeypatch: Any) -> None:
    """Threads of kernels take floats below 2^-126 for zero; the bits of a small half are such a float's."""
    monkeypatch.setattr(emit, "has_half", lambda: False)
    small = np.arange(1 << 11, dtype=np.uint16)
    floats = np.empty(len(small), F32)
    tape = program.Tape()
    places = {"source": small.ctypes.data, "to": floats.ctypes.data}
    tape.add(jit.kernel(convert_pieces), len(small) // 16, **places)
    tape.run(1)
    assert np.array_equal(floats, small.view(np.float16).astype(F32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5,), (64,), (3, 7)], ids=str)
def test_rows_are_saved_as_numpy_converts_them(shape: tuple[int, ...], dtype: str) -> None:
    x = normal(40, *shape)
    x[3], x[4], x[5] = 1e6, 3e-6, 65519  # infinite as a half, a small half, the largest one
    with np.errstate(over="ignore"):
        want = x[2:].astype(dtype)
    out = np.full((37, *shape), 9, dtype)
    y = TWO.array(x)
    assert TWO.save(y, 2, out)
    TWO.numpy(y)  # what was recorded runs
    assert np.array_equal(out, want[:37])
    assert not TWO.save(y, 4, out)  # there are not as many rows


def test_small_numbers_count_as_zero_in_kernels_and_nowhere_else():
    """Arithmetic below 2^-126 takes a hundred cycles: a model full of it would seem to hang."""
    be = CPUBackend(2)
    tiny = np.full((64, 64), 1e-20, np.float32)
    assert not be.numpy(be.mul(be.array(tiny), be.array(tiny))).any()
    assert not be.numpy(be.mul(be.array(tiny * tiny), be.array(np.ones_like(tiny)))).any()
    assert (tiny * tiny).all()
