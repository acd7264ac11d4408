"""A model whose layers are on several devices is the model: logits, states, batches, taps, memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import unpacked
from test_golden import GOLDEN, NEWER, OURS, logits, references

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, DeviceError, StateError
from tinyllm.kernels import devices
from tinyllm.kernels.backend import Device
from tinyllm.kernels.devices import open_backend
from tinyllm.kernels.reference import ReferenceBackend
from tinyllm.loading import placing
from tinyllm.models.build import build
from tinyllm.models.network import Network
from tinyllm.models.stages import Stage, divide, stage_bytes

ON_OPENCL = {
    "opencl,cpu": """llama-h256 gemma2 phi3-longrope-long bloom llama-mixtral mamba rwkv7 bert-minilm
    qwen3next""",
    "opencl,opencl": "llama-h256 rwkv7 falcon-h1",
}
PAIRS = [(names, name) for names, listed in ON_OPENCL.items() for name in listed.split()]


def half_each(names: str, n_layer: int) -> list[Stage]:
    """Half of the layers on either device."""
    try:
        first, second = map(open_backend, names.split(","))
    except (DeviceError, ImportError) as e:
        return pytest.skip(f"{names}: {e}")
    return [Stage(first, range(n_layer // 2)), Stage(second, range(n_layer // 2, n_layer))]


@cache
def network(path: Path, names: str) -> Network:
    with gguf.open(path) as f:
        return build(f.metadata, f.tensors, lambda n: half_each(names, n), "f32")


def file(name: str, data: Path) -> Path:
    return (OURS if name in NEWER else data / "golden" / "models") / f"{name}.gguf"


def compare(name: str, names: str, data: Path) -> None:
    """Whole sequences, side by side, and one token at a time, against the reference."""
    path = file(name, data)
    net, npz = network(path, names), np.load(path.with_suffix(".npz"))
    assert len(net.stages) == 2
    sequences = [npz[f"tokens_{i}"].tolist() for i in range(3) if f"tokens_{i}" in npz]
    ways = [net.hidden(sequences)]
    if net.config.causal:
        ways = [logits(net, sequences), logits(net, sequences, 5), logits(net, sequences[:1], 1)]
    for way in ways:
        for i, got in enumerate(way):
            want = references(npz, i)
            assert np.abs(got - want).max() <= 1e-3 * want.std()


@pytest.mark.parametrize("name", GOLDEN + NEWER)
def test_every_architecture_can_be_cut_in_two(name: str, data: Path) -> None:
    compare(name, "reference,cpu", data)


@pytest.mark.device
@pytest.mark.parametrize(("names", "name"), PAIRS)
def test_the_cut_may_lie_between_a_gpu_and_another(names: str, name: str, data: Path) -> None:
    compare(name, names, data)


@pytest.mark.device
def test_the_layers_behind_a_cut_are_replayed_too(data: Path) -> None:
    net = network(file("llama-h256", data), "cpu,opencl")
    logits(net, [[5, 6, 7, 8, 9]], 1)
    assert any(known.replay for known in net.be._steps._known.values())


# ---- through the public surface


@pytest.fixture(scope="module")
def whole(stories260k: Path) -> Any:
    with tinyllm.load(stories260k, device="reference", kv_type="f32") as m:
        yield m


@pytest.fixture(scope="module")
def staged(stories260k: Path) -> Any:
    with tinyllm.load(stories260k, device="reference,cpu", kv_type="f32") as m:
        yield m


@pytest.mark.parametrize(
    ("device", "n_gpu_layers"),
    [
        ("reference,cpu", None),
        *(pytest.param("opencl", n, marks=pytest.mark.device) for n in (2, 0)),
    ],
)
def test_the_text_is_the_same(
    device: str, n_gpu_layers: int | None, whole: tinyllm.Model, stories260k: Path
) -> None:
    want = whole.generate("Once upon a time", max_tokens=40, temperature=0).text
    try:
        m = tinyllm.load(stories260k, device=device, n_gpu_layers=n_gpu_layers, kv_type="f32")
    except DeviceError as e:
        pytest.skip(str(e))
    with m:
        assert m.generate("Once upon a time", max_tokens=40, temperature=0).text == want
        together = m.generate(["Once upon a time"] * 2, max_tokens=40, temperature=0)
        assert [done.text for done in together] == [want, want]


def test_the_device_names_each_ones_layers(staged: tinyllm.Model) -> None:
    assert staged.device == "reference (layers 0 to 1) + cpu (layers 2 to 4)"


def test_taps_see_and_change_all_layers(staged: tinyllm.Model, whole: tinyllm.Model) -> None:
    ids = whole.tokenizer.encode("Once upon a time")
    seen: dict[str, list[str]] = {"whole": [], "staged": []}
    for name, m in (("whole", whole), ("staged", staged)):
        m.logits(ids, tap=lambda point, x, name=name: seen[name].append(point))
    assert seen["staged"] == seen["whole"]

    def silence(point: str, x: np.ndarray) -> np.ndarray | None:
        return np.zeros_like(x) if point in ("blk.1.ffn_out", "blk.3.attn_out") else None

    want = whole.logits(ids, tap=silence)
    assert np.abs(staged.logits(ids, tap=silence) - want).max() <= 1e-4 * want.std()


def test_states_are_cut_back_shifted_and_saved(
    staged: tinyllm.Model, whole: tinyllm.Model, tmp_path: Path
) -> None:
    ids = whole.tokenizer.encode("Once upon a time there was a dog who liked to play.")
    rows = []
    for m in (whole, staged):
        state = m.new_state(64)
        m.logits(ids, state)
        state.truncate(len(ids) - 2)
        state.shift(1, 3)
        rows.append(m.logits(ids[:4], state))
        state.save(tmp_path / f"{m is staged}.npz")
        assert state.nbytes > 0
    bound = 1e-4 * rows[0].std()
    assert np.abs(rows[1] - rows[0]).max() <= bound
    want = whole.logits([7, 8], restored(whole, tmp_path / "False.npz"))
    for m, saved in ((staged, "False"), (staged, "True"), (whole, "True")):
        assert (
            np.abs(m.logits([7, 8], restored(m, tmp_path / f"{saved}.npz")) - want).max() <= bound
        )


def test_work_on_a_cache_waits_for_the_steps_of_others(
    staged: tinyllm.Model, tmp_path: Path
) -> None:
    state = staged.new_state(64)
    staged.logits([5, 6, 7, 8], state)
    state.save(tmp_path / "saved.npz")
    for work in (
        lambda: state.shift(1, 1),
        lambda: state.save(tmp_path / "again.npz"),
        lambda: state.restore(tmp_path / "saved.npz"),
    ):
        thread = threading.Thread(target=work)
        with staged.network.lock:
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
        thread.join()


def restored(m: tinyllm.Model, path: Path) -> Any:
    """A state of a file, whichever placing wrote it."""
    state = m.new_state(64)
    state.restore(path)
    return state


def test_a_saved_state_without_a_layer_is_refused(staged: tinyllm.Model) -> None:
    cache = staged.new_state(64).cache
    arrays = cache.export(0)
    del arrays["3.k"]
    with pytest.raises(StateError, match=r"expected .*'3.k'"):
        cache.restore(arrays)


def test_close_closes_every_backend(stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, closed = tinyllm.load(stories260k, device="reference,cpu"), []
    for stage in m.network.stages:
        monkeypatch.setattr(stage.be, "close", lambda name=stage.be.name: closed.append(name))
    m.close()
    assert closed == ["reference", "cpu"]


# ---- who gets what


class Sized(ReferenceBackend):
    """A device with this much memory."""

    def __init__(self, name: str, free: int) -> None:
        super().__init__()
        self.where, self.free = Device(name), free

    def memory(self) -> tuple[int, int]:
        return self.free, self.free


def ranges(stages: Sequence[Stage]) -> list[tuple[str, range]]:
    return [(s.be.name, s.layers) for s in stages]


def test_layers_are_dealt_by_free_memory() -> None:
    big, small = Sized("big", 30), Sized("small", 10)
    assert ranges(divide([big, small], range(8))) == [("big", range(6)), ("small", range(6, 8))]
    assert ranges(divide([small, big], range(4, 8))) == [
        ("small", range(4, 5)),
        ("big", range(5, 8)),
    ]
    none = Sized("none", 0)
    assert ranges(divide([big, none], range(2))) == [("big", range(2))]
    assert ranges(divide([none], range(2))) == [("none", range(2))]


@pytest.mark.parametrize(
    ("device", "n_gpu_layers", "where"),
    [
        ("cuda:0", None, [("cuda:0", range(4))]),
        ("cuda:0", -1, [("cuda:0", range(4))]),
        ("cuda:0", 99, [("cuda:0", range(4))]),
        ("cuda:0", 1, [("cpu", range(3)), ("cuda:0", range(3, 4))]),
        ("cuda:0", 0, [("cpu", range(4))]),
        ("cuda:0, cuda:1", None, [("cuda:0", range(2)), ("cuda:1", range(2, 4))]),
        (
            "cuda:0,opencl:1",
            2,
            [("cpu", range(2)), ("cuda:0", range(2, 3)), ("opencl:1", range(3, 4))],
        ),
        (None, 0, [("cpu", range(4))]),
        ("auto", 3, [("cpu", range(4))]),
    ],
)
def test_gpu_layers_are_the_last_ones(
    device: str | None,
    n_gpu_layers: int | None,
    where: list[tuple[str, range]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tinyllm.loading.open_backend", lambda name, n, compute: Sized(name, 10))
    monkeypatch.setattr(devices, "gpus", list)
    assert ranges(placing(device, None, n_gpu_layers)(4)) == where


def test_gpu_layers_without_a_gpu_are_an_error() -> None:
    with pytest.raises(
        ArgumentError, match="n_gpu_layers=2, but the device is 'cpu'; give device="
    ):
        placing(None, None, 2)


def test_memory_is_asked_for_on_each_device(stories260k: Path) -> None:
    with gguf.open(stories260k) as f:
        stages = [Stage(Sized("first", 1), range(2)), Stage(Sized("last", 1), range(2, 5))]
        first, last = stage_bytes(f.tensors, stages, range(5))
        total = sum(t.nbytes for t in f.tensors.values())
        tied = f.tensors["token_embd.weight"].nbytes
        assert first + last == total + tied
        stages[0].be.free, stages[1].be.free = first, last
        net = build(f.metadata, f.tensors, lambda n: stages)
        stages[1].be.free -= 1
        with pytest.raises(DeviceError, match=r"last: the weights need .*; .* are free"):
            build(f.metadata, f.tensors, lambda n: stages)
    stages[0].be.free = 10
    with pytest.raises(DeviceError, match="first: the keys and values of n_ctx=64 need"):
        net.new_state(64)


def test_a_block_that_runs_on_two_devices_counts_on_both() -> None:
    with gguf.open(unpacked("nanbeige")) as f:
        net = network(unpacked("nanbeige"), "reference,reference")
        blocks = net.config.blocks
        assert blocks == (0, 1, 0, 1)
        first, last = stage_bytes(f.tensors, net.stages, blocks)
        layers = sum(t.nbytes for n, t in f.tensors.items() if n.startswith("blk."))
        rest = sum(t.nbytes for n, t in f.tensors.items() if not n.startswith("blk."))
        tied = 0 if "output.weight" in f.tensors else f.tensors["token_embd.weight"].nbytes
    assert min(first, last) >= layers
    assert first + last == 2 * layers + rest + tied
