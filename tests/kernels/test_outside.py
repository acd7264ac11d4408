"""Kernels from outside: declared, compiled, checked against the contract, and run by models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError, TinyLLMError
from tinyllm.kernels import lab
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.gpu import sources
from tinyllm.kernels.outside import OPERATIONS, Outside, read_kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
IDS = [1, 5, 9, 30, 12, 7]
OURS = """
import tinyllm
from tinyllm.kernels.cpu import elementwise, micro
from tinyllm.kernels.cpu.formats import FORMATS
from tinyllm.kernels.cpu.simd import f32, load_n, store_n, splat, fma, hsum, exp
from tinyllm.kernels.cpu.floats import as_float

one = micro.multiplier(FORMATS["Q8_0"], 1, 1)


@tinyllm.kernel("matvec", "Q8_0")
def product(y, records, w, tile_bytes, n_blocks, first, last, worker):
    for tile in range(first, last):
        one(w + tile * tile_bytes, records, 0, n_blocks, y + 64 * tile, 0)


@tinyllm.kernel("act", "silu")
def gate(x, up, y, n, first, last, worker):
    one = splat(1.0)
    for i in range(1024 * first, min(1024 * last, n), 16):
        v = load_n(x + 4 * i, n - i)
        v = v * (one / (one + exp(splat(0.0) - v)))
        if up != 0:
            v = v * load_n(up + 4 * i, n - i)
        store_n(y + 4 * i, v, n - i)
"""
FLOATS = """
import tinyllm
from tinyllm.kernels.cpu.simd import get_f32, set_f32, f32


@tinyllm.kernel("matmul", "F32")
def product(w, x, y, n_in, n_out, n_tokens, tile_bytes, first, last, worker):
    for tile in range(first, last):
        for t in range(n_tokens):
            for row in range(min(16, n_out - 16 * tile)):
                total = 0.0
                for i in range(n_in):
                    total += get_f32(w + tile * tile_bytes + 64 * i + 4 * row) * get_f32(x + 4 * (t * n_in + i))
                set_f32(y + 4 * (t * n_out + 16 * tile + row), total)
"""


def only(file: Path) -> Outside:
    (found,) = read_kernels([file])
    return found


def verdict(outside: Outside, be: Any = None) -> lab.Verdict:
    be = be or CPUBackend(2)
    assert be.replace_kernels([outside]) == [outside]
    return lab.check(outside, be, CPUBackend(2))


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.mark.parametrize("name", ["plain_numba.py", "simd_words.py"])
def test_examples_are_right(name: str) -> None:
    found = verdict(only(EXAMPLES / name))
    assert found.wrong == ""
    assert found.error < 1e-6
    assert not found.same_bits


def test_kernels_made_of_ours_have_our_bits(written: Any) -> None:
    for outside in read_kernels([written(OURS)]):
        found = verdict(outside)
        assert (found.wrong, found.same_bits) == ("", True), outside


def test_a_product_of_floats_with_many_tokens_is_replaced(written: Any) -> None:
    assert verdict(only(written(FLOATS))).wrong == ""


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("store(y + 64 * tile, total)", "store(y + 64 * tile, total * splat(1.5))", "16 x 256"),
        ("range(first, last)", "range(first, min(last, 1))", r"40 x 512, 1 token: row 0, output"),
        ("range(n_in // 32)", "range(n_in // 64)", "16 x 256"),
        (
            "store(y + 64 * tile, total)",
            "store(y + 64 * tile, total / splat(0.0))",
            "got (inf|-inf|nan)",
        ),
    ],
)
def test_a_wrong_kernel_is_told_where(old: str, new: str, where: str, written: Any) -> None:
    import re

    text = (EXAMPLES / "simd_words.py").read_text("utf-8")
    assert old in text
    found = verdict(only(written(text.replace(old, new))))
    assert re.search(where, found.wrong)
    assert "expected" in found.wrong


def test_a_model_runs_with_kernels_from_outside(written: Any) -> None:
    with tinyllm.load() as m:
        want = m.logits(IDS)
        tokens = m.generate(IDS, 8, temperature=0).ids
    with tinyllm.load(kernels=[written(OURS)]) as m:
        assert np.array_equal(m.logits(IDS), want)
        assert m.generate(IDS, 8, temperature=0).ids == tokens
    with tinyllm.load(kernels=[EXAMPLES / "simd_words.py"], n_threads=2) as m:
        assert all(len(mark.rpartition("_")[2]) == 12 for mark in m.network.kernels)
        assert m.network.kernels
        found = np.concatenate([m.logits(IDS[:5]), np.zeros((0, want.shape[1]))])
        state = m.new_state(32)
        single = np.concatenate([m.logits([i], state) for i in IDS])
    assert np.array_equal(found, want[:5])  # several tokens: our kernels
    assert 0 < np.abs(single - want).max() < 0.2 * want.std()


def test_a_model_is_profiled_with_kernels_from_outside(written: Any) -> None:
    with tinyllm.load(kernels=[EXAMPLES / "simd_words.py"]) as m:
        state = m.new_state(32)
        with m.network.be.profiled() as profile:
            m.logits([1], state)
        names = {x.kernel for x in profile.take()}
    assert any(name.startswith("lanes_matvec_Q8_0_") for name in names)
    assert not any(name.startswith(("matvec_", "quantise_")) for name in names)


def test_a_kernel_that_the_model_cannot_use_is_an_error(written: Any) -> None:
    text = (EXAMPLES / "simd_words.py").read_text("utf-8").replace('"Q8_0"', '"Q4_K"')
    with pytest.raises(ArgumentError, match=r"lanes, matvec Q4_K: .* has matrices of Q8_0 only"):
        tinyllm.load(kernels=[written(text)])
    with pytest.raises(ArgumentError, match="written for cuda, which does not run on cpu"):
        tinyllm.load(kernels=[EXAMPLES / "warp.cu"])
    with pytest.raises(ArgumentError, match="written for python, which does not run on reference"):
        tinyllm.load(kernels=[EXAMPLES / "simd_words.py"], device="reference")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "declares no kernel"),
        (
            "import tinyllm\n@tinyllm.kernel('matvek', 'Q4_0')\ndef f(): ...\n",
            "expected one of matvec",
        ),
        ("import tinyllm\n@tinyllm.kernel('matvec', 'Q4_9')\ndef f(): ...\n", "matvec for 'Q4_9'"),
        (
            "import tinyllm\n@tinyllm.kernel('rms_norm', 'Q4_0')\ndef f(): ...\n",
            "expected one of none",
        ),
        ("def f(:\n", "SyntaxError"),
        (OURS + OURS.partition("one = ")[2].partition("\n")[2], "several kernels for"),
    ],
)
def test_a_wrong_declaration_is_told(text: str, message: str, written: Any) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_kernels([written(text)])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("w, x, first, last, worker", "missing: y;"),
        ("w, y, first, last, worker", "missing: x or records"),
        ("w, x, y, n_cols, first, last, worker", "unknown: n_cols"),
        ("w, x, records, y, first, last, worker", "unknown: records beside x"),
        ("w, x, y", "first, last, worker"),
    ],
)
def test_wrong_parameters_are_told(parameters: str, message: str, written: Any) -> None:
    text = f"import tinyllm\n@tinyllm.kernel('matvec', 'Q8_0')\ndef f({parameters}):\n    pass\n"
    with pytest.raises(ArgumentError, match=message):
        CPUBackend(1).replace_kernels(read_kernels([written(text)]))


def test_an_edited_kernel_is_compiled_anew(written: Any) -> None:
    text = (EXAMPLES / "simd_words.py").read_text("utf-8")
    assert verdict(only(written(text))).wrong == ""
    assert verdict(only(written(text.replace("halves(p), total", "halves(p + 2), total")))).wrong


def test_files_of_c_are_read(written: Any) -> None:
    found = only(EXAMPLES / "warp.cu")
    assert (found.key, found.language, found.options) == (
        ("matvec", "Q8_0"),
        "cuda",
        {"threads": 32, "rows": 1},
    )
    assert sorted(found.parameters) == sorted(OPERATIONS["matvec"].gpu)
    text = (EXAMPLES / "group.cl").read_text("utf-8")
    for old, new, message in (
        ("ulong blocks", "ulong total", "expected \\(w, blocks"),
        ("threads=32", "warps=32", "unknown warps"),
        ("threads=32", "threads=0", "at least 1"),
        ('"matvec"', '"act"', "act for 'Q8_0'"),
        ("rows=1)", "rows=)", "not understood"),
    ):
        with pytest.raises(ArgumentError, match=message):
            read_kernels([written(text.replace(old, new), "mine.cl")])


@pytest.mark.device
def test_opencl_c_runs(opencl: Any) -> None:
    assert verdict(only(EXAMPLES / "group.cl"), opencl).wrong == ""


@pytest.mark.device
def test_a_wrong_opencl_kernel_is_told_where(opencl: Any, written: Any) -> None:
    text = (EXAMPLES / "group.cl").read_text("utf-8")
    text = text.replace("int b = lane", "int b = lane + 1")
    outside = only(written(text, "mine.cl"))
    opencl.replace_kernels([outside])
    assert "row 0" in lab.check(outside, opencl, CPUBackend(1)).wrong


@pytest.mark.device
def test_cuda_c_runs_interpreted(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SHAPES", ((16, 256), (5, 64)))
    assert verdict(only(EXAMPLES / "warp.cu"), interpreted).wrong == ""


@pytest.mark.parametrize("kind", ["Q4_K", "IQ2_S", "IQ1_M", "NVFP4", "F16"])
def test_random_matrices_repeat_rows(kind: str) -> None:
    matrix = lab.RandomMatrix(kind, 40, 512, repeated=16)
    assert np.isfinite(matrix.values()).all()
    assert np.array_equal(matrix.read_rows(0, 8), matrix.read_rows(16, 24))


def test_exact_products_have_no_records_for_a_kernel_from_outside(written: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"product, matvec Q8_0: compute='exact' makes no records"
    ):
        CPUBackend(1, "exact").replace_kernels(read_kernels([written(OURS)]))


NORM = """
import tinyllm
from tinyllm.kernels.cpu.simd import f32, get_f32, set_f32
import math


@tinyllm.kernel("rms_norm")
def norm(x, y, w, bias, n, eps: f32, w_period, b_period, first, last, worker):
    for row in range(first, last):
        total = 0.0
        for i in range(n):
            total += get_f32(x + 4 * (row * n + i)) * get_f32(x + 4 * (row * n + i))
        scale = 1.0 / math.sqrt(total / n + eps)
        for i in range(n):
            v = get_f32(x + 4 * (row * n + i)) * scale
            if w_period != 0:
                v *= get_f32(w + 4 * (row % w_period * n + i))
            if b_period != 0:
                v += get_f32(bias + 4 * (row % b_period * n + i))
            set_f32(y + 4 * (row * n + i), v)
"""


def test_a_norm_without_weights_has_the_period_0(written: Any) -> None:
    assert verdict(only(written(NORM))).wrong == ""


RELU = """
import tinyllm
from tinyllm.kernels.cpu.simd import f32, load_n, splat, store_n, vmax


@tinyllm.kernel("act", "relu")
def above(x, up, y, n, first, last, worker):
    for i in range(1024 * first, min(1024 * last, n), 16):
        store_n(y + 4 * i, vmax(load_n(x + 4 * i, n - i), splat(0.0)), n - i)
"""


def test_an_activation_that_the_model_has_not_is_an_error(written: Any) -> None:
    said = r"above, act relu: .* does not compute that; it has act silu, rms_norm"
    with pytest.raises(ArgumentError, match=said):
        tinyllm.load(kernels=[written(RELU)])


def test_kernels_of_load_are_files() -> None:
    for wrong in (3, [3], {"a.py": 1}):
        with pytest.raises(ArgumentError, match=r"^kernels=.*; expected files, such as"):
            tinyllm.load(kernels=wrong)  # type: ignore[arg-type]
    with tinyllm.load(kernels=None) as m:
        assert m.network.kernels == ()


GATE = """
import numba, tinyllm
from tinyllm.kernels.cpu.simd import load


@tinyllm.kernel("act", "silu")
@numba.njit
def gate(x, up, y, n, first, last, worker):
    for i in range(first, last):
        {}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import tinyllm\nraise ValueError('a table')\n", "mine.py, line 2: ValueError: a table$"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: SystemExit: 3$"),
        (
            "import tinyllm\ntinyllm.kernel('act', 'silu')(3)\n",
            "mine.py, line 2: @tinyllm.kernel is over 3; expected a function$",
        ),
        (GATE.format("raise ValueError"), "^mine.py: gate, act silu: gate has raise"),
        (GATE.format("undefined(i)"), "^mine.py: gate, act silu: NameError: .*'undefined'"),
        (GATE.format("load(x) + n"), r"add\(float32x16, int64\); line 10: load\(x\) \+ n$"),
        (NORM.replace("eps: f32", "eps"), "^mine.py: norm, .*; expected eps: f32$"),
        (RELU.replace("(x,", "(x: f32,"), "x has the annotation f32; expected none$"),
    ],
)
def test_what_a_file_does_wrong_is_one_plain_line(text: str, message: str, written: Any) -> None:
    with pytest.raises(ArgumentError, match=message) as told:
        CPUBackend(1).replace_kernels(read_kernels([written(text)]))
    assert "\x1b" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_fails_leaves_no_declaration_behind(written: Any) -> None:
    with pytest.raises(ArgumentError, match="ZeroDivisionError"):
        read_kernels([written(RELU + "1 / 0\n")])
    assert [k.kind for k in read_kernels([written(GATE.format("pass"))])] == ["silu"]


def test_the_first_error_of_a_log_is_found_with_its_line() -> None:
    opencl = "Build on X:\n\na.cl:3:9: warning: error-prone\n  int a;\na.cl:7:1: error: no 'b'\n  y = b;\n  ^"
    cuda = 'a.cu(7): error: identifier "b" is undefined\n    y = b;\n        ^\n\n1 error detected.'
    assert sources.complaint(f"{opencl}\n1 error generated.") == "a.cl:7:1: error: no 'b' y = b;"
    assert sources.complaint(cuda) == 'a.cu(7): error: identifier "b" is undefined y = b;'
    assert sources.complaint("\nlibnvrtc.so: no such file\nmore") == "libnvrtc.so: no such file"


@pytest.mark.device
def test_what_an_opencl_driver_refuses_is_told(opencl: Any, written: Any) -> None:
    text = (EXAMPLES / "group.cl").read_text("utf-8")
    for old, new, message in (
        ("= sum;\n    barrier", "= summ;\n    barrier", r"not compile mine.cl: .*17.*summ"),
        ("threads=32", "threads=100000", "does not run it with threads=100000"),
    ):
        assert old in text
        outside = only(written(text.replace(old, new), "mine.cl"))
        opencl.replace_kernels([outside])
        with pytest.raises(TinyLLMError, match=message):
            lab.check(outside, opencl, CPUBackend(1))
