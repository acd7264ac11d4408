"""A recorded step serves any sequences of as many rows: the same bits as a step that is recorded for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import PACKED, unpacked
from test_adapters import LLAMAS, base, saved

import tinyllm
from tinyllm import gguf
from tinyllm.kernels.cpu.backend import CPUBackend
from tinyllm.kernels.cpu.steps import Steps
from tinyllm.models.build import build
from tinyllm.models.network import Network

MODELS = Path(__file__).parent.parent / "data" / "models"
# attention with windows, sinks, chunks; recurrent layers of each kind; experts; layers that share keys
CAUSAL = """apertus dbrx falcon-h1 gemma3n hunyuan-moe lfm2 llama4 mamba2 arwkv7 qwen3next
mimo2""".split()
ENCODERS = "gemma-embedding eurobert neo-bert".split()
# rows of three sequences in each step: as many steps of 3, 9 and 40 rows, divided in different ways
DIVISIONS = [
    (1, 7, 1), (38, 1, 1), (1, 1, 1), (7, 1, 1), (1, 20, 19), (2, 2, 5), (1, 1, 1), (1, 1, 7),
    (1, 1, 38), (5, 2, 2), (13, 14, 13),
]  # fmt: skip
Division = Sequence[int]


def network(name: str, kv_type: Any = "f16") -> Network:
    with gguf.open(unpacked(name) if name in PACKED else MODELS / f"{name}.gguf") as f:
        return build(f.metadata, f.tensors, CPUBackend(2), kv_type)


def ids_of(net: Network, n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, min(net.n_vocab, 60), n).tolist()


def written(net: Network, anew: bool) -> list[np.ndarray]:
    """Logits of all steps, and what the caches hold in the end; ``anew``: each step is recorded."""
    states = [net.new_state(256, tuple(s * i / 2 for s in net.adapters.scales)) for i in range(3)]
    found = []
    for i, state in enumerate(states):
        state.append(ids_of(net, sum(d[i] for d in DIVISIONS), i))
    for i, division in enumerate(DIVISIONS):
        if anew:
            net.be._steps.forget()  # type: ignore[attr-defined]
        wants = np.roll(["last", "last", "none"], i)
        for rows in net.forward(list(zip(states, division, wants, strict=True))):
            found.append(np.array(rows))
    for state in states:
        found += state.cache.export(state.n_past).values()
    return found


def compared(
    net: Network, make: Any, n_steps: int, n_shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    first_time = Steps._first_time

    def counted(self: Steps, *args: Any) -> Any:
        calls.append(1)
        return first_time(self, *args)

    monkeypatch.setattr(Steps, "_first_time", counted)
    anew = make(net, True)
    assert len(calls) == n_steps
    net.be._steps.forget()  # type: ignore[attr-defined]
    calls.clear()
    replayed = make(net, False)
    assert len(calls) == n_shapes
    assert all(map(np.array_equal, anew, replayed))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_step_is_replayed_for_other_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared(network(name), written, len(DIVISIONS), 3, monkeypatch)


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_a_step_is_replayed_over_caches_of_any_kind(
    kv_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(network("mimo2", kv_type), written, len(DIVISIONS), 3, monkeypatch)


def test_a_step_is_replayed_for_rows_with_other_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tinyllm.load(base("llama", tmp_path), lora=saved(LLAMAS[0], tmp_path)) as m:
        compared(m.network, written, len(DIVISIONS), 3, monkeypatch)


def read(net: Network, anew: bool) -> list[np.ndarray]:
    """The rows of all steps of an encoder."""
    found = []
    for i, division in enumerate(DIVISIONS):
        if anew:
            net.be._steps.forget()  # type: ignore[attr-defined]
        found += net.hidden([ids_of(net, n, 9 * i + j) for j, n in enumerate(division)])
    return found


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_s_step_is_replayed_for_other_texts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(network(name), read, len(DIVISIONS), 3, monkeypatch)
