"""The interpreter of PTX finds what it is there to find, and computes what NumPy does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.device
pytest.importorskip("pyopencl", reason="needs PyOpenCL")
pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy")

from emulator.interpreted_cuda import interpret  # noqa: E402
from emulator.ptx_instructions import Fault  # noqa: E402

F32, I32, U32 = np.float32, np.int32, np.uint32
WORDS = (Path(__file__).parent / "emulator" / "tensor_words.c").read_text("utf-8")


def elementwise(body: str, *sources: np.ndarray, out: Any = F32) -> np.ndarray:
    """The expression ``body`` of x, y and z for each element."""
    kinds = {"f": "float", "i": "int", "u": "uint"}
    given = [(kinds[v.dtype.kind], n) for n, v in zip("xyz", sources, strict=False)]
    declared = "".join(f"const {kind}* {n}s, " for kind, n in given)
    named = "".join(f"const {kind} {n} = {n}s[i];" for kind, n in given)
    result = np.zeros(len(sources[0]), out)
    kind = kinds[result.dtype.kind]
    code = f"KERNEL void f({declared}{kind}* out) {{ const int i = LOCAL_ID(0); {named} out[i] = {body}; }}"
    interpret(code, "f", len(result), *sources, result)
    return result


def test_reading_before_a_barrier_is_found() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(n).astype(np.float16) for n in (256, 128))
    outputs = [np.zeros(n, F32) for n in (128, 128, 32)]
    interpret(WORDS, "words", 32, a, b, *outputs)
    with pytest.raises(Fault, match=r"words: .* another thread .* since the last barrier"):
        interpret(WORDS.replace("BARRIER();", ""), "words", 32, a, b, *outputs)


def test_writing_what_others_read_is_found() -> None:
    code = """KERNEL void f(int* out) { LOCAL int a[32]; const int i = LOCAL_ID(0); a[i] = i; BARRIER();
              const int v = a[31 - i]; %s a[i] = v; BARRIER(); out[i] = a[i]; }"""
    out = np.zeros(32, I32)
    interpret(code % "BARRIER();", "f", 32, out)
    assert np.array_equal(out, np.arange(32)[::-1])
    with pytest.raises(Fault, match="writes what another thread used"):
        interpret(code % "", "f", 32, out)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("x[LOCAL_ID(0) + 1] = 1", "allocation of 128"),
        ("x[-1 - LOCAL_ID(0)] = 1", "is not allocated"),
        ("*(uint4*)(x + 1) = make_uint4(1, 2, 3, 4)", "not aligned"),
    ],
)
def test_wrong_addresses_are_found(body: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        interpret(f"KERNEL void f(int* x) {{ {body}; }}", "f", 32, np.zeros(32, I32))


def test_different_barriers_are_found() -> None:
    code = """KERNEL void f(int* x) { if (LOCAL_ID(0) < 32) { x[0] = 1; BARRIER(); x[1] = 2; }
              else { x[2] = 3; BARRIER(); x[3] = 4; } }"""
    with pytest.raises(Fault, match="different barriers"):
        interpret(code, "f", 64, np.zeros(32, I32))


def test_half_a_warp_cannot_exchange() -> None:
    code = "KERNEL void f(float* x) { if (x[LOCAL_ID(0)] > 15.0f) x[LOCAL_ID(0)] = lane_xor(1.0f, 1); }"
    with pytest.raises(Fault, match="not all threads of a warp"):
        interpret(code, "f", 32, np.arange(32, dtype=F32))


@pytest.mark.parametrize("waited", [False, True])
def test_copies_arrive_when_they_are_waited_for(waited: bool) -> None:
    code = """KERNEL void f(const uchar* from, ushort* to) { LOCAL __align__(16) ushort a[256];
              const int i = LOCAL_ID(0); copy16(a + 8 * i, from + 16 * i); %s BARRIER();
              for (int j = 0; j < 8; ++j) to[j * 32 + i] = a[j * 32 + i]; }"""
    given, got = np.arange(256, dtype=np.uint16), np.zeros(256, np.uint16)
    interpret(code % ("copies_done();" if waited else ""), "f", 32, given, got)
    assert np.array_equal(given, got) == waited


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("expf(x)", np.exp),
        ("tanhf(x)", np.tanh),
        ("sqrtf(fabsf(x))", lambda x: np.sqrt(np.abs(x))),
        ("1.0f / x", lambda x: 1 / x),
        ("rintf(x)", np.rint),
        ("floorf(x)", np.floor),
        ("sinf(x)", np.sin),
        ("ldexpf(x, 3)", lambda x: 8 * x),
    ],
)
def test_functions_of_floats(body: str, want: Any) -> None:
    x = (np.random.default_rng(0).standard_normal(64) * 20).astype(F32)
    assert np.allclose(elementwise(body, x), want(x.astype(np.float64)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("x / y", lambda x, y: (x / y).astype(np.int64)),
        ("x % y", lambda x, y: np.fmod(x, y)),
        ("x >> (y & 31)", lambda x, y: x >> (y & 31)),
        ("(int)((uint)x >> (y & 31))", lambda x, y: x.astype(U32).astype(np.int64) >> (y & 31)),
        ("x << (y & 31)", lambda x, y: x << (y & 31)),
        ("max(x, y) - min(x, y)", lambda x, y: np.abs(x - y)),
        ("(int)(((long long)x * y) >> 32)", lambda x, y: x * y >> 32),
        ("POPCOUNT(x)", lambda x, y: [int(v).bit_count() for v in x.astype(U32)]),
        ("(int)(schar)x", lambda x, y: x.astype(np.int8)),
        ("dot4(x, y, x)", lambda x, y: x + _dot(x, y)),
        ("(int)byte_pick(x, y, 0x7410)", lambda x, y: _bytes(x, y)),
    ],
)
def test_functions_of_integers(body: str, want: Any) -> None:
    x, y = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (2, 64))
    y[y == 0] = 1
    got = elementwise(body, x.astype(I32), y.astype(I32), out=I32)
    assert np.array_equal(got, np.asarray(want(x, y)).astype(np.int64).astype(I32))


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = (v.astype(I32).view(np.int8).reshape(-1, 4).astype(np.int64) for v in (x, y))
    return (a * b).sum(1)


def _bytes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    both = np.stack([x, y], 1).astype(I32).view(np.uint8)
    return np.ascontiguousarray(both[:, [0, 1, 4, 7]]).view(I32)[:, 0]


def test_branches_and_loops_end_each_thread_at_its_time() -> None:
    code = """KERNEL void f(int* x) { const int i = LOCAL_ID(0); int n = x[i], steps = 0;
              while (n != 1) { n = n & 1 ? 3 * n + 1 : n / 2; ++steps; } x[i] = steps; }"""
    x = np.arange(1, 65, dtype=I32)
    interpret(code, "f", 64, x)
    want = []
    for n in range(1, 65):
        steps = 0
        while n != 1:
            n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
        want.append(steps)
    assert x.tolist() == want


def test_unknown_instructions_are_named() -> None:
    code = """KERNEL void f(uint* x) {
              uint r; asm("brev.b32 %0, %1;" : "=r"(r) : "r"(x[LOCAL_ID(0)])); x[0] = r; }"""
    with pytest.raises(NotImplementedError, match=r"brev\.b32"):
        interpret(code, "f", 1, np.zeros(1, U32))
