"""Two files on the same tokens, and what each tensor of one costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from packed import unpacked

import tinyllm
from tinyllm import gguf
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError
from tinyllm.kernels.devices import open_backend
from tinyllm.models.build import build
from tinyllm.models.network import Network
from tinyllm.research.cache import read
from tinyllm.research.compare import Comparison, divergence, logits_of, with_tensors

TEXT = "Once upon a time, there was a little girl named Lily. She had a red ball and a dog."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, Path]:
    """A float model, and its quantisation."""
    place = tmp_path_factory.mktemp("compare")
    whole, small = data / "models" / "stories260K.gguf", place / "small.gguf"
    tinyllm.quantize(whole, small, "Q4_0", requantize=True)
    return whole, small


@pytest.fixture(scope="module")
def pair(files: tuple[Path, Path]) -> Iterator[tuple[tinyllm.Model, tinyllm.Model]]:
    with tinyllm.load(files[0]) as a, tinyllm.load(files[1]) as b:
        yield a, b


def test_a_model_is_itself(pair: tuple[tinyllm.Model, tinyllm.Model]) -> None:
    found = tinyllm.compare(pair[0], pair[0], TEXT, tensors=True)
    assert found.kl == (0, 0)
    assert found.agreement == 1
    assert found.parting is None
    assert found.tensors == {}
    assert not any(found.layers)


def test_a_quantisation_costs_what_its_tensors_cost(pair: Any) -> None:
    a, b = pair
    found: Comparison = tinyllm.compare(a, b, TEXT, tensors=True)
    ids = a.prompt_ids(TEXT)
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in
            (m.logits(ids).astype(np.float64) for m in pair))  # fmt: skip
    assert found.kl[0] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-6)
    chosen = -q[np.arange(len(ids) - 1), ids[1:]]
    assert found.perplexity_b[0] == pytest.approx(np.exp(chosen.mean()), rel=1e-5)
    assert found.n_tokens == len(ids)
    changed = {n for n, t in b._file.tensors.items() if t.type != a._file.tensors[n].type}
    assert set(found.tensors) == changed
    assert list(found.together) == list(found.predicted) == found.worst()
    worst = with_tensors(b, {n: a._file.tensors[n] for n in found.worst(3)})
    after = np.mean(divergence(a.logits(ids), logits_of(worst, ids)))
    assert found.together[found.worst()[2]] == pytest.approx(found.kl[0] - after, rel=1e-6)
    first = found.worst()[0]
    assert found.together[first] == found.tensors[first]
    assert found.predicted[first] == pytest.approx(found.tensors[first], rel=1e-4)
    logits = b.logits(ids)
    single = [logits_of(with_tensors(b, {n: a._file.tensors[n]}), ids) for n in found.worst(3)]
    after = np.mean(divergence(a.logits(ids), logits + sum(x - logits for x in single)))
    assert found.predicted[found.worst()[2]] == pytest.approx(found.kl[0] - after, rel=1e-4)
    by_layer = tinyllm.compare(a, b, TEXT, "layers", n_greedy=0)
    assert set(by_layer.tensors) >= {f"blk.{i}" for i in range(a.config.n_layer)}


def test_all_tensors_of_the_other_make_it_the_other(pair: Any) -> None:
    a, b = pair
    ids = a.prompt_ids(TEXT)
    everything = dict(a._file.tensors)
    layers = {n: t for n, t in everything.items() if n.startswith("blk.")}
    for tensors in (everything, layers):
        net = with_tensors(b, tensors)
        state = net.new_state(64)
        state.append(ids)
        found = np.array(net.forward([(state, len(ids), "all")])[0])
        if tensors is everything:
            assert np.array_equal(found, a.logits(ids))
        else:
            assert not np.array_equal(found, b.logits(ids))


def test_a_block_that_several_layers_share_changes_in_all_of_them() -> None:
    with gguf.open(unpacked("nanbeige")) as f:
        ids = np.load(unpacked("nanbeige").with_suffix(".npz"))["tokens_0"][:8].tolist()
        name = "blk.0.ffn_down.weight"
        changed = {**f.tensors, name: Negated(f.tensors[name])}
        be = open_backend("reference")
        net, other = (build(f.metadata, t, be, "f32") for t in (f.tensors, changed))
        whole = SimpleNamespace(network=net, metadata=f.metadata, _file=f)
        made = with_tensors(cast(Any, whole), {name: changed[name]})
    old, found, expected = (last_logits(n, ids) for n in (net, made, other))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, old)


class Negated:
    """A float tensor of a file with every sign turned."""

    def __init__(self, tensor: Any) -> None:
        self.name, self.shape, self.type = tensor.name, tensor.shape, "F32"
        self.values = -tensor.dequantize().astype(np.float32)
        self.nbytes = self.values.nbytes

    def dequantize(self) -> np.ndarray:
        return self.values

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        rows = self.values.reshape(-1, self.shape[-1])[start:stop].view(np.uint8)
        if out is None:
            return rows
        out[...] = rows
        return out


def last_logits(net: Network, ids: list[int]) -> np.ndarray:
    state = net.new_state(32)
    state.append(ids)
    return np.array(net.forward([(state, len(ids), "all")])[0])


def test_the_command(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", *map(str, files), TEXT, "--layers", "-n", "8"]
    assert main([*argv, "--plot", "figure.gif"]) == 2
    assert ".png, .svg, .pdf" in capsys.readouterr().err
    figure = tmp_path / "figure.svg"
    assert main([*argv, "--plot", str(figure)]) == 0
    assert "<svg" in figure.read_text("utf-8")
    text = capsys.readouterr().out
    assert "perplexity" in text
    assert "blk.0" in text
    assert "with those above it, too: predicted, measured" in text
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"][0] > 0


def test_other_vocabularies_are_told(pair: Any) -> None:
    with tinyllm.load() as other, pytest.raises(ArgumentError, match="vocabularies"):
        tinyllm.compare(pair[0], other, TEXT)


def test_what_no_tensor_replaces_is_not_loaded_again(pair: Any) -> None:
    a, b = pair
    ids = a.prompt_ids(TEXT)
    for name in ("token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"):
        net = with_tensors(b, {name: a._file.tensors[name]})
        shared = [x is y for x, y in zip(net.decoder.blocks, b.network.decoder.blocks, strict=True)]
        assert shared == [not name.startswith(f"blk.{i}.") for i in range(len(shared))]
        assert (net.decoder.token_embd is b.network.decoder.token_embd) == name.startswith("blk.")
        whole = build(b.metadata, {**b._file.tensors, name: a._file.tensors[name]}, net.be)
        assert np.array_equal(read(net, [ids], None)[0], read(whole, [ids], None)[0])
