"""Kernels compiled by numba: words, our own kernels to the bit, kernels from outside, errors."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from stored import normal, stored

import tinyllm
from tinyllm.errors import ArgumentError, DeviceError
from tinyllm.kernels.cpu import elementwise, emit, jit, matmul, micro, numba_door, records, simd
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.cpu.formats import FORMATS
from tinyllm.kernels.cpu.program import Tape
from tinyllm.kernels.cpu.simd import (
    f32,
    hsum,
    load,
    load_n,
    splat,
    store,
    store_n,
)

WORDS = {name: word for name, word in vars(simd).items() if isinstance(word, simd.Emitter)}
SLOT = 256  # bytes of memory for the result of each word


# ---- words


def call_of(name: str, word: simd.Emitter, slot: int) -> str:
    """A line of a kernel that calls a word with values of its types and keeps what it returns at y + slot."""
    y = f"y + {slot}"
    addresses = {
        "p": "x" if word.ret != simd.types.void else y,
        "to": y,
        "source": "x",
        "args": "x",
    }
    numbers = {"n": "n", "i": "1", "start": "n", "v": "n"}
    values = []
    for i, (parameter, kind) in enumerate(
        zip(list(inspect.signature(word.emit).parameters)[1:], word.args, strict=True)
    ):
        if kind == emit.V16F:
            values.append(f"simd.load(x + {64 * i})")
        elif kind == emit.F32:
            values.append(f"simd.get_f32(x + {4 * i})")
        else:
            values.append((addresses | numbers)[parameter])
    call = f"simd.{name}({', '.join(values)})"
    keep = {emit.V16F: "store", emit.F32: "set_f32", emit.I64: "set_i64"}.get(word.ret)
    return f"simd.{keep}({y}, {call})" if keep else call


@pytest.fixture(scope="module")
def all_words(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A module with a kernel that calls every word once."""
    lines = [call_of(name, word, SLOT * i) for i, (name, word) in enumerate(WORDS.items())]
    source = "\n    ".join(["def all_words(x, y, n, first, last, worker):", *lines])
    path = tmp_path_factory.mktemp("words") / "all_words.py"
    path.write_text(f"from tinyllm.kernels.cpu import simd\n\n\n{source}\n", "utf-8")
    spec = importlib.util.spec_from_file_location("all_words", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_word_means_the_same_in_numba(all_words: ModuleType) -> None:
    x, found = normal(512), []
    for kernel in (jit.kernel(all_words.all_words), numba_door.compile(all_words.all_words)):
        y = np.zeros((len(WORDS), SLOT // 4), np.float32)
        kernel(0, 1, x=x.ctypes.data, y=y.ctypes.data, n=11)
        found.append(y)
    differ = [n for n, a, b in zip(WORDS, *found, strict=True) if a.tobytes() != b.tobytes()]
    assert differ == []
    silent = [n for n, a in zip(WORDS, found[0], strict=True) if not a.any()]
    assert silent == ["clear"]


@numba.njit
def polynomial(v):
    """Operators on vectors, and vectors handed to and fro."""
    v -= splat(np.float32(0.5))
    v *= v
    v += splat(np.float32(1))
    v /= splat(np.float32(3))
    return -v + v * v - v / (v + v)


@numba.njit
def apply(p, q, n):
    total = splat(np.float32(0))
    for i in range(0, n, 16):
        v = polynomial(load_n(p + 4 * i, n - i))
        store_n(q + 4 * i, v, n - i)
        total = total + v
    return hsum(total)


def test_vectors_are_values_in_functions_of_numba() -> None:
    x = normal(40)
    y = np.zeros_like(x)
    total = apply(x.ctypes.data, y.ctypes.data, 40)
    v = ((x - np.float32(0.5)) ** 2 + np.float32(1)) / np.float32(3)
    np.testing.assert_allclose(y, -v + v * v - v / (v + v), rtol=1e-5)
    last = np.float32(1.25 / 3)  # what the lanes behind the end, zeros, become
    np.testing.assert_allclose(total, y.sum() + 8 * (-last + last * last - 0.5), rtol=1e-5)


@numba.njit
def wrong_type(p):
    store(p, 3)


@numba.njit
def wrong_number(p):
    return hsum(load(p, 3))


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (wrong_type, r"store\(p, v\): v is .*, expected float32x16"),
        (wrong_number, r"load\(p\) takes 1 arguments, not 2"),
    ],
)
def test_a_word_called_wrongly_says_what_it_takes(function: Any, complaint: str) -> None:
    with pytest.raises(numba.core.errors.TypingError, match=complaint):
        function(0)


# ---- our own kernels, from the very same source


def by_both(
    body: Any, name: str, pieces: int, y: np.ndarray, names: dict[str, Any], **args: Any
) -> list[np.ndarray]:
    """What a kernel writes to y, compiled by our translator and by numba."""
    found = []
    for kernel in (jit.kernel(body, name, **names), numba_door.compile(body, **names)):
        out = np.zeros_like(y)
        kernel(0, pieces, y=out.ctypes.data, **args)
        found.append(out)
    return found


@pytest.mark.parametrize("n", [5, 64, 100])
def test_rms_norm_has_the_same_bits(n: int) -> None:
    x, w = normal(6, n), normal(2, n)
    args = {"x": x.ctypes.data, "w": w.ctypes.data, "bias": w.ctypes.data, "n": n, "eps": 1e-5}
    ours, numbas = by_both(
        elementwise.rms_norm, "rms_norm", 6, x, {}, **args, w_period=2, b_period=1
    )
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()


def test_rope_has_the_same_bits() -> None:
    x, table = normal(3, 4, 32), normal(3, 2, 10)
    sizes = {"n_head": 4, "head_dim": 32, "pairs": 10, "start": 4, "step": 1, "apart": 10}
    args = {"x": x.ctypes.data, "table": table.ctypes.data, **sizes}
    ours, numbas = by_both(elementwise.rope, "rope", 3, x, {}, **args)
    assert (ours != x).sum() == 3 * 4 * 20
    assert ours.tobytes() == numbas.tobytes()


@pytest.mark.parametrize("kind", ["silu", "gelu", "tanh"])
def test_activations_with_helpers_have_the_same_bits(kind: str) -> None:
    x, up = 4 * normal(100), normal(100)
    args = {"x": x.ctypes.data, "up": up.ctypes.data, "n": 100}
    names = {"activate": elementwise.ACTIVATIONS[kind]}
    ours, numbas = by_both(elementwise.act, f"act_{kind}", 1, x, names, **args)
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()


def quantised(x: np.ndarray, span: int) -> np.ndarray:
    """Activations of one token as the matvec reads them."""
    n = x.shape[1]
    out = np.zeros((n // 32, records.record_bytes(1, span)), np.uint8)
    quantise = {"quantise": records.quantiser(1, span)}
    kernel = jit.kernel(matmul.quantise_rows, f"quantise_1_{span}", **quantise)
    sizes = {
        "n_rows": 1,
        "n": n,
        "slots": 1,
        "span": span,
        "width": n,
        "step_bytes": records.record_bytes(1, span),
    }
    kernel(0, 1, x=x.ctypes.data, out=out.ctypes.data, **sizes)
    return out


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_the_matvec_with_its_micro_kernel_has_the_same_bits(kind: str) -> None:
    backend = CPUBackend(1)
    w = backend.load(stored(kind, 48, 512))
    x, bias, y = normal(1, 512), normal(48), np.zeros(48, np.float32)
    records = quantised(x, w.format.span)
    args = {"w": w.address, "x": records.ctypes.data, "bias": bias.ctypes.data}
    sizes = {"tile_bytes": w.tile_bytes, "n_blocks": w.n_blocks, "ahead": 4096}
    names = {"multiply": micro.multiplier(w.format, 1, 1)}
    ours, numbas = by_both(matmul.matvec, f"matvec_{kind}", 3, y, names, **args, **sizes)
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()


@pytest.mark.slow
def test_a_whole_model_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, found, compiled = list(range(300, 340)), [], {}

    def by_numba(body: Any, name: str | None = None, **names: Any) -> jit.Kernel:
        name = name or body.__name__
        if name not in compiled:
            compiled[name] = numba_door.compile(body, name, **names)
        return compiled[name]

    for kernel in (jit.kernel, by_numba):
        monkeypatch.setattr(jit, "kernel", kernel)
        model = tinyllm.load(device="cpu")
        state = model.new_state(64)
        found.append([model.logits(ids, state), *(model.logits([i], state) for i in ids[:4])])
    assert len(compiled) > 10
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


# ---- kernels from outside, on the tape


@numba.njit
def bend(v, by):
    """A helper of the user's."""
    return v / (splat(np.float32(1)) + v * v * splat(by))


@numba.njit
def bend_rows(x, y, n, by: f32, first, last, worker):
    """Words of ``simd``."""
    for row in range(first, last):
        for i in range(0, n, 16):
            at = 4 * (n * row + i)
            store_n(y + at, bend(load_n(x + at, n - i), by), n - i)


@numba.njit
def bend_numbers(x, y, n, by: f32, first, last, worker):
    """Plain numba, on arrays."""
    for row in range(first, last):
        v, out = numba_door.floats(x + 4 * n * row, n), numba_door.floats(y + 4 * n * row, n)
        for i in range(n):
            out[i] = v[i] / (np.float32(1) + v[i] * v[i] * by)


@pytest.mark.parametrize("function", [bend_rows, bend_numbers])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_from_outside_runs_on_the_tape(function: Any, threads: int) -> None:
    rows, n = 200, 37
    x = normal(rows, n)
    tape = Tape()
    middle, y = tape.array((rows, n)), tape.array((rows, n))
    kernel = numba_door.compile(function)
    tape.add(kernel, rows, chunk=8, x=x.ctypes.data, y=middle, n=n, by=0.5)
    ours = jit.kernel(elementwise.act, "act_relu", activate=elementwise.relu)
    tape.add(ours, -(-rows * n // 1024), x=middle, up=None, y=y, n=rows * n)
    tape.run(threads)
    bent = x / (np.float32(1) + x * x * np.float32(0.5))
    assert np.array_equal(y.view(), np.maximum(bent, 0))


def test_the_tape_asks_for_the_arguments_of_a_kernel_from_outside() -> None:
    with pytest.raises(
        TypeError, match=r"bend_rows takes \(x, y, n, by\).*missing: by; unknown: n_rows"
    ):
        Tape().add(numba_door.compile(bend_rows), 1, x=0, y=0, n=1, n_rows=1)


def test_a_numpy_array_where_an_address_is_due_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bend_rows: x is array.*expected an int64 or an address"):
        Tape().add(numba_door.compile(bend_rows), 1, x=normal(4), y=0, n=4, by=1.0)


# ---- errors


@numba.njit(fastmath=True)
def fast(x, first, last, worker):
    """Results depend on how a loop is vectorised."""


@numba.njit(parallel=True)
def threaded(x, first, last, worker):
    """Starts threads."""


@numba.njit
def calls_fast(x, first, last, worker):
    fast(x, first, last, worker)


@numba.njit
def checks(n):
    assert n > 0


def calls_checks(x, first, last, worker):
    checks(last)


def no_pieces(x, y, n):
    """Has no first, last, worker."""


def wrong_order(x, last, first, worker):
    """The caller would pass first as last."""


def wrong_kind(x, scale: str, first, last, worker):
    """Text is no argument."""


def unknown_kind(x, scale: f33, first, last, worker):  # noqa: F821
    """A slip of the pen."""


@pytest.mark.parametrize(
    ("function", "kind", "complaint"),
    [
        (fast, ArgumentError, "fast is compiled with fastmath=True: .*; leave it out"),
        (calls_fast, ArgumentError, "fast is compiled with fastmath=True"),
        (
            threaded,
            ArgumentError,
            "threaded is compiled with parallel=True: threads belong to the tape",
        ),
        (calls_checks, ArgumentError, "checks has raise or assert"),
        (math.sqrt, ArgumentError, "a kernel is a Python function .* not <built-in function sqrt>"),
        (no_pieces, TypeError, r"no_pieces\(x, y, n\): .*first, last, worker"),
        (wrong_order, TypeError, "wrong_order.*first, last, worker"),
        (unknown_kind, TypeError, "unknown_kind: an annotation means nothing: name 'f33' is not"),
        (wrong_kind, TypeError, "wrong_kind: scale is annotated .*; expected f32"),
    ],
)
def test_what_is_no_kernel_is_refused(function: Any, kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        numba_door.compile(function)


def test_a_name_that_replaces_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="matvec refers to no global name multipy"):
        numba_door.compile(matmul.matvec, multipy=micro.multiplier(FORMATS["Q4_0"], 1, 1))


def test_a_processor_that_llvm_does_not_know_keeps_its_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(emit.llvm, "get_host_cpu_name", lambda: "generic")
    assert emit.features_text.__wrapped__() == emit.llvm.get_host_cpu_features().flatten()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert emit.features_text.__wrapped__() == ""


@pytest.mark.parametrize(
    ("variable", "value", "unknown"),
    [
        ("NUMBA_CPU_NAME", "foo", "processor foo"),
        ("NUMBA_CPU_FEATURES", "+foo,-bar", "feature +foo, -bar"),
    ],
)
def test_names_that_llvm_does_not_know_are_told(
    variable: str, value: str, unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.warns(
        UserWarning, match=re.escape(f"{variable}={value}: LLVM knows no {unknown},")
    ):
        emit.check_names()


def test_features_without_a_sign_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,garbage")
    with pytest.raises(DeviceError, match=r"=\+avx2,garbage: 'garbage' has no sign; expected"):
        emit.check_names()
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "")
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    emit.check_names()


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from tinyllm.errors import DeviceError
try:
    import tinyllm.kernels.cpu.numba_door
except DeviceError as error:
    print(error)
"""
WITH_NUMBA = """
import os
import re
import numba
os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = "generic", "+popcnt"
from tinyllm.errors import DeviceError
from tinyllm.kernels.cpu import numba_door
def nothing(first, last, worker):
    pass
try:
    numba_door.compile(nothing)
except DeviceError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("program", "environment", "complaint"),
    [
        (WITHOUT_NUMBA, {}, "numba, which cannot be imported"),
        (WITH_NUMBA, {}, "tinyllm for generic, and these features differ"),
        (WITH_NUMBA, {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT is set"),
    ],
)
def test_a_numba_that_cannot_serve_is_an_error_that_says_so(
    program: str, environment: dict[str, str], complaint: str
) -> None:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert complaint in done.stdout, done.stderr
