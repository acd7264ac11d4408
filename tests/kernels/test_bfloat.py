"""Matrices of floats multiplied as bfloat16: against NumPy's rounding, on every unit that the processor has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import normal, stored

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError, DeviceError
from tinyllm.kernels.cpu import bfloat
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.devices import open_backend

KINDS = ["F32", "F16", "BF16"]
SHAPES = [(48, 512, 3), (130, 288, 40), (17, 37, 7), (64, 2080, 530), (10, 1, 2)]  # n_out, n_in, T
MINILM = "all-MiniLM-L6-v2.gguf2.f16.gguf"
here = pytest.mark.skipif(not bfloat.available(), reason="the processor has no AVX512-BF16")


def rounded(x: np.ndarray) -> np.ndarray:
    """To 8 binary digits, nearest even, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    kept = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(np.float64)


def far(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square difference, relative to that of ``want``."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want.astype(np.float64) ** 2)))


@pytest.fixture(params=["unit", "vectors"])
def be(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CPUBackend:
    """The backend on the matrix unit, and as where there is none."""
    if not bfloat.available():
        pytest.skip("the processor has no AVX512-BF16")
    if request.param == "unit" and not bfloat.has_unit():
        pytest.skip("the processor has no matrix unit for bfloat16")
    monkeypatch.setattr(bfloat, "has_unit", lambda: request.param == "unit")
    return CPUBackend(2, "bf16")


@pytest.mark.parametrize(("n_out", "n_in", "t"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_rounded_values(
    be: CPUBackend, kind: str, n_out: int, n_in: int, t: int
) -> None:
    w, x, bias = stored(kind, n_out, n_in), normal(t, n_in), normal(n_out, seed=2)
    want = rounded(x) @ rounded(w.values).T + bias
    got = be.numpy(be.matmul(be.load(w), be.array(x), be.array(bias)))
    assert far(got, want) <= 1e-6
    exact = x.astype(np.float64) @ w.values.astype(np.float64).T + bias
    assert 1e-4 < far(got, exact) < 5e-3  # it is the rounding that is seen, and no more


def test_the_activation_follows_the_bias(be: CPUBackend) -> None:
    w, x, bias = be.load(stored("F16", 40, 96)), be.array(normal(5, 96)), be.array(normal(40))
    plain = np.array(be.numpy(be.act(be.matmul(w, x, bias), "gelu")))
    assert np.array_equal(be.numpy(be.matmul_act(w, x, bias, "gelu")), plain)


def test_a_row_has_the_same_bits_in_any_batch(be: CPUBackend) -> None:
    w, x = be.load(stored("F16", 48, 200)), normal(70, 200)
    whole = np.array(be.numpy(be.matmul(w, be.array(x))))
    for rows in (slice(0, 2), slice(30, 47), slice(5, 38)):
        assert np.array_equal(be.numpy(be.matmul(w, be.array(x[rows]))), whole[rows])


def test_nan_and_infinity_are_not_rounded_away(be: CPUBackend) -> None:
    w, x = be.load(stored("F32", 16, 64)), normal(3, 64)
    x[1, 5] = np.frombuffer(np.uint32(0x7FFFFFFF).tobytes(), np.float32)[0]  # a NaN, all bits set
    x[2, 7] = np.inf
    y = be.numpy(be.matmul(w, be.array(x)))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[2]).any()


@here
def test_one_token_is_computed_in_float32() -> None:
    w, x = stored("F16", 48, 96), normal(1, 96)
    one, other = CPUBackend(1, "bf16"), CPUBackend(1)
    y = np.array(one.numpy(one.matmul(one.load(w), one.array(x))))
    assert np.array_equal(y, other.numpy(other.matmul(other.load(w), other.array(x))))


@here
@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_logits_stay_near_those_of_float32(kind: str, data: Path) -> None:
    path = data / "golden" / "quants" / f"llama-h256-{kind}.gguf"
    ids = np.load(path.with_suffix(".npz"))["tokens_0"].tolist()
    with (
        tinyllm.load(path, kv_type="f32") as m,
        tinyllm.load(path, kv_type="f32", compute="bf16") as n,
    ):
        want, got = m.logits(ids), n.logits(ids)
    assert 1e-4 < far(got, want) < 0.012  # llama.cpp's own, on the BF16 file: 0.0051


@here
def test_embeddings_stay_near_those_of_float32(data: Path) -> None:
    texts = ["A first text.", "Another one, which is a little longer than the first.", "x"]
    with tinyllm.load(data / "models" / MINILM) as m:
        want = m.embed(texts)
    with tinyllm.load(data / "models" / MINILM, compute="bf16") as m:
        got = m.embed(texts)
    apart = 1 - (got.astype(np.float64) * want).sum(1)
    assert 1e-7 < apart.max() < 2e-4


# ---- refused


def test_a_processor_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat, "available", lambda: False)
    with pytest.raises(DeviceError, match="AVX512-BF16"):
        open_backend("cpu", compute="bf16")
    open_backend("cpu")


@pytest.mark.parametrize("device", ["reference", "cuda:0", "opencl:0"])
def test_other_devices_refuse(device: str) -> None:
    with pytest.raises(DeviceError, match="compute='bf16' is for device='cpu'"):
        open_backend(device, compute="bf16")


def test_load_refuses_what_it_does_not_know_or_cannot_use(data: Path) -> None:
    with pytest.raises(ArgumentError, match="compute='f8'; expected 'f32', 'bf16' or 'exact'"):
        tinyllm.load(compute="f8")  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="device='cpu', not 'reference'"):
        tinyllm.load(data / "models" / MINILM, device="reference", compute="bf16")


def test_a_file_without_floats_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllm.loading.FLOATS", ("F16",))  # the bundled model has no such matrix
    with pytest.raises(ArgumentError, match="has none; leave it out"):
        tinyllm.load(compute="bf16")


@here
def test_the_sdk_and_the_command_line_hand_it_on(data: Path, capsys: Any) -> None:
    from tinyllm.sdk import Embed4All

    where = {"model_path": data / "models", "allow_download": False}
    with Embed4All(MINILM, compute="bf16", **where) as e:  # type: ignore[arg-type]
        assert e.gpt4all.model.model is not None
        assert e.gpt4all.model.model.network.be.compute == "bf16"  # type: ignore[attr-defined]
    assert main(["embed", str(data / "models" / MINILM), "a text", "--compute", "bf16"]) == 0
    assert capsys.readouterr().out.startswith("[")
