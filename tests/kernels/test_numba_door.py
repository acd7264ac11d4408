"""Kernels compiled by numba: the words of ``simd``, our own kernels to the bit, kernels from outside, and errors."""

from __future__ import annotations

import importlib.util
import inspect
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

from tinyllm.errors import ArgumentError, DeviceError
from tinyllm.kernels.cpu import elementwise, jit, matmul, micro, numba_door, simd
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.cpu.formats import FORMATS
from tinyllm.kernels.cpu.program import Tape
from tinyllm.kernels.cpu.simd import f32, get_f32, hsum, load, load_n, set_f32, splat, store, store_n

WORDS = {name: word for name, word in vars(simd).items() if isinstance(word, simd.Emitter)}
SLOT = 256  # bytes of memory for the result of each word


def floats_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 1, shape).astype(np.float32)


# ---- words


def call_of(name: str, word: simd.Emitter, slot: int) -> str:
    """A line of a kernel that calls a word with values of its types and keeps what it returns at y + slot."""
    y = f"y + {slot}"
    addresses = {"p": "x" if word.ret != simd.types.void else y, "to": y, "source": "x", "args": "x"}
    numbers = {"n": "n", "i": "1", "start": "n", "v": "n"}
    values = []
    for i, (parameter, kind) in enumerate(
        zip(list(inspect.signature(word.emit).parameters)[1:], word.args, strict=True)
    ):
        if kind == simd.V16F:
            values.append(f"simd.load(x + {64 * i})")
        elif kind == simd.F32:
            values.append(f"simd.get_f32(x + {4 * i})")
        else:
            values.append((addresses | numbers)[parameter])
    call = f"simd.{name}({', '.join(values)})"
    keep = {simd.V16F: "store", simd.F32: "set_f32", simd.I64: "set_i64"}.get(word.ret)
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
    x, found = floats_of(512), []
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
    x = floats_of(40)
    y = np.zeros_like(x)
    total = apply(x.ctypes.data, y.ctypes.data, 40)
    v = ((x - np.float32(0.5)) ** 2 + np.float32(1)) / np.float32(3)
    np.testing.assert_allclose(y, -v + v * v - v / (v + v), rtol=1e-5)
    last = np.float32(1.25 / 3)  # of the lanes behind the end, which are zeros
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


def by_both(body: Any, name: str, pieces: int, y: np.ndarray, names: dict[str, Any], **args: Any) -> list[np.ndarray]:
    """What a kernel writes to y, compiled by our translator and by numba."""
    found = []
    for kernel in (jit.kernel(body, name, **names), numba_door.compile(body, **names)):
        out = np.zeros_like(y)
        kernel(0, pieces, y=out.ctypes.data, **args)
        found.append(out)
    return found


@pytest.mark.parametrize("n", [5, 64, 100])
def test_rms_norm_has_the_same_bits(n: int) -> None:
    x, w = floats_of(6, n), floats_of(2, n)
    args = {"x": x.ctypes.data, "w": w.ctypes.data, "bias": w.ctypes.data, "n": n, "eps": 1e-5}
    ours, numbas = by_both(elementwise.rms_norm, "rms_norm", 6, x, {}, **args, w_period=2, b_period=1)
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()


def test_rope_has_the_same_bits() -> None:
    x, table = floats_of(3, 4, 32), floats_of(3, 2, 10)
    sizes = {"n_head": 4, "head_dim": 32, "pairs": 10, "start": 4, "step": 1, "apart": 10}
    args = {"x": x.ctypes.data, "table": table.ctypes.data, **sizes}
    ours, numbas = by_both(elementwise.rope, "rope", 3, x, {}, **args)
    assert (ours != x).sum() == 3 * 4 * 20
    assert ours.tobytes() == numbas.tobytes()


@pytest.mark.parametrize("kind", ["silu", "gelu", "tanh"])
def test_activations_with_helpers_have_the_same_bits(kind: str) -> None:
    x, up = 4 * floats_of(100), floats_of(100)
    args = {"x": x.ctypes.data, "up": up.ctypes.data, "n": 100}
    names = {"activate": elementwise.ACTIVATIONS[kind]}
    ours, numbas = by_both(elementwise.act, f"act_{kind}", 1, x, names, **args)
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_the_matvec_with_its_micro_kernel_has_the_same_bits(kind: str) -> None:
    backend = CPUBackend(1)
    w = backend.load(Stored(kind, 48, 512))
    x, bias, y = floats_of(1, 512), floats_of(48), np.zeros(48, np.float32)
    records = record_of(x, w.format.span)
    args = {"w": w.address, "x": records.ctypes.data, "bias": bias.ctypes.data}
    sizes = {"tile_bytes": w.tile_bytes, "n_blocks": w.n_blocks}
    names = {"multiply": micro.multiplier(w.format, 1, 1)}
    ours, numbas = by_both(matmul.matvec, f"matvec_{kind}", 3, y, names, **args, **sizes)
    assert ours.any()
    assert ours.tobytes() == numbas.tobytes()
