"""Quantised matrices times activations as float32 has them: near the product, the same bits in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import normal, stored
from test_stored_formats import QUANTISED, random_bytes

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import DeviceError
from tinyllm.gguf import quants
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.devices import open_backend

TWO, ONE = CPUBackend(2, "exact"), CPUBackend(1, "exact")
N_EXPERTS = 5


def product(be: CPUBackend, w: Any, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    added = None if bias is None else be.array(bias)
    return np.array(be.numpy(be.matmul(w, be.array(x), added)))


@pytest.mark.parametrize("name", QUANTISED)
def test_weights_are_those_of_the_file(name: str) -> None:
    source = random_bytes(name, 70, 512)
    want = quants.dequantize(name, source.raw)
    got = product(TWO, TWO.load(source), np.eye(512, dtype=np.float32)).T
    assert np.abs(got - want).max() <= 2e-7 * np.abs(want).max()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(name: str) -> None:
    source, x, bias = random_bytes(name, 70, 768), normal(37, 768), normal(70, seed=3)
    w = TWO.load(source)
    singly = np.concatenate([product(TWO, w, row[None], bias) for row in x])
    exact = x.astype(np.float64) @ quants.dequantize(name, source.raw).T.astype(np.float64) + bias
    assert np.abs(singly - exact).max() <= 2e-5 * exact.std()
    for n in (2, 5, 8, 20, 37):
        assert np.array_equal(product(TWO, w, x[:n], bias), singly[:n])
        assert np.array_equal(product(ONE, w, x[:n], bias), singly[:n])


@pytest.mark.parametrize(("n_out", "n_in", "t"), [(7, 256, 600), (130, 1280, 7), (16, 2304, 1)])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_shapes(name: str, n_out: int, n_in: int, t: int) -> None:
    w, x = stored(name, n_out, n_in), normal(t, n_in)
    want = x.astype(np.float64) @ w.values.T.astype(np.float64)
    assert np.abs(product(TWO, TWO.load(w), x) - want).max() <= 2e-5 * want.std()


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_the_activation_follows_the_bias(n_tokens: int) -> None:
    w, x, bias = TWO.load(stored("Q5_0", 40, 96)), normal(n_tokens, 96), TWO.array(normal(40))
    plain = np.array(TWO.numpy(TWO.act(TWO.matmul(w, TWO.array(x), bias), "gelu")))
    assert np.array_equal(TWO.numpy(TWO.matmul_act(w, TWO.array(x), bias, "gelu")), plain)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("name", "n_tokens"), [("Q4_K", 70), ("MXFP4", 530), ("Q6_K", 2)])
def test_experts(name: str, n_tokens: int, each: bool) -> None:
    """Grouped rows are those of single tokens, and near the product in float64."""
    source, rng = stored(name, N_EXPERTS, 200, 256), np.random.default_rng(2)
    w, experts = TWO.load(source), rng.integers(0, N_EXPERTS, (n_tokens, 2)).astype(np.int32)
    x = normal(n_tokens, *([2] * each), 256)
    bias = normal(N_EXPERTS, 200)

    def chosen(be: CPUBackend, rows: slice) -> np.ndarray:
        args = be.array(x[rows]), be.array(experts[rows]), be.array(bias)
        return np.array(be.numpy(be.matmul_experts(w, *args)))

    together = chosen(TWO, slice(None))
    assert np.array_equal(chosen(ONE, slice(None)), together)
    for t in {0, 1, n_tokens - 1}:
        assert np.array_equal(chosen(TWO, slice(t, t + 1))[0], together[t])
    inputs = np.broadcast_to(x if each else x[:, None], (n_tokens, 2, 256)).astype(np.float64)
    want = np.einsum("tke,tkoe->tko", inputs[:40], source.values[experts[:40]]) + bias[experts[:40]]
    assert np.abs(together[:40] - want).max() <= 2e-5 * want.std()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_an_activation_far_above_the_others_takes_little_from_them(name: str) -> None:
    """No more than float32 loses when it adds them up: language models have such activations."""
    w, x = stored(name, 64, 512), normal(5, 512)
    x[:, 40] *= 1e4
    want = x.astype(np.float64) @ w.values.T.astype(np.float64)
    lost = np.abs(x).max() * np.abs(w.values).max() * np.sqrt(512) / 2**24
    assert np.abs(product(TWO, TWO.load(w), x) - want).max() <= lost


@pytest.mark.parametrize("be", [TWO, CPUBackend(1)], ids=["exact", "int8"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_no_activation_that_is_no_number_is_lost(be: CPUBackend, name: str) -> None:
    w, x = be.load(stored(name, 16, 256)), normal(256, 256)
    x[np.arange(256), np.arange(256)] = np.nan  # another column in each row
    for n in (256, 5, 1):
        assert np.isnan(product(be, w, x[-n:])).all()
    x[np.arange(256), np.arange(256)] = np.inf
    assert not np.isfinite(product(be, w, x)).any()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(size: float) -> None:
    w, x = stored("Q8_0", 16, 64), normal(4, 64) * np.float32(size)
    want = x.astype(np.float64) @ w.values.T.astype(np.float64)
    assert np.abs(product(TWO, TWO.load(w), x) - want).max() <= 1e-5 * np.abs(want).max() + 1e-35


def test_it_is_the_rounding_to_integers_that_is_gone() -> None:
    w, x, rounding = stored("Q8_0", 64, 256), normal(3, 256), CPUBackend(2)
    want = x.astype(np.float64) @ w.values.T.astype(np.float64)
    apart = [np.abs(product(be, be.load(w), x) - want).max() / want.std() for be in (TWO, rounding)]
    assert apart[0] < 1e-5 < 1e-3 < apart[1]


# ---- a whole model


def test_a_text_is_the_same_alone_in_a_batch_and_on_any_threads() -> None:
    prompts = ["Once upon a time", "One day a little dog", "The"]
    with (
        tinyllm.load(compute="exact", n_threads=2) as model,
        tinyllm.load(compute="exact", n_threads=1) as single,
    ):
        batch = model.generate(prompts, max_tokens=12, seed=3)
        assert isinstance(batch, list)
        for prompt, found in zip(prompts, batch, strict=True):
            alone = single.generate(prompt, max_tokens=12, seed=3)
            assert alone.ids == found.ids
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(prompts[1])
        steps, state = [], model.new_state()
        for i in ids:
            steps.append(model.logits([i], state=state)[0])
        assert np.array_equal(model.logits(ids), steps)


def test_logits_are_those_of_the_reference() -> None:
    with (
        tinyllm.load(compute="exact", kv_type="f32") as model,
        tinyllm.load(device="reference", compute="exact", kv_type="f32") as reference,
    ):
        assert model.tokenizer is not None
        ids = model.tokenizer.encode("Once upon a time there was a dog.")
        got, want = model.logits(ids), reference.logits(ids)
    assert np.abs(got - want).max() <= 1e-4 * want.std()


@pytest.mark.parametrize("device", ["cuda:0", "opencl:0"])
def test_gpus_refuse(device: str) -> None:
    with pytest.raises(DeviceError, match="is for device='cpu' or 'reference', not"):
        open_backend(device, compute="exact")


def test_the_sdk_and_the_command_line_hand_it_on(tmp_path: Path, capsys: Any) -> None:
    from tinyllm.loading import BUNDLED
    from tinyllm.sdk import GPT4All

    (tmp_path / "model.gguf").write_bytes(BUNDLED.read_bytes())
    with GPT4All("model.gguf", model_path=tmp_path, allow_download=False, compute="exact") as g:
        assert g.model.model is not None
        assert g.model.model.network.be.compute == "exact"  # type: ignore[attr-defined]
    assert main(["run", "Once", "-n", "2", "--compute", "exact"]) == 0
    assert capsys.readouterr().out
