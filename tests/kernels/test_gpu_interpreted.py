"""Whole models in NVRTC's own code, interpreted: prompt, decoding, recorded steps, chosen tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import PACKED, unpacked

from tinyllm import gguf
from tinyllm.kernels.reference import ReferenceBackend
from tinyllm.models.build import build
from tinyllm.models.network import Network

pytestmark = pytest.mark.device
OURS = Path(__file__).parent.parent / "data" / "models"
PARTS = 6, 1, 1, 1  # the third step is recorded, the fourth replayed
IDS = [(7 * i + 3) % 90 for i in range(sum(PARTS))]


def network(path: Path, be: Any) -> Network:
    with gguf.open(path) as f:
        return build(f.metadata, f.tensors, be, "f16")


def logits(net: Network) -> np.ndarray:
    """All rows of a sequence, read in parts."""
    state = net.new_state(32)
    state.append(IDS)
    return np.concatenate([np.array(net.forward([(state, n, "all")])[0]) for n in PARTS])


def distance(path: Path, be: Any) -> float:
    """The largest difference from the reference, in standard deviations of its logits."""
    want = logits(network(path, ReferenceBackend()))
    return float(np.abs(logits(network(path, be)) - want).max() / want.std())


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gptj", "falcon-h1", "mimo2", "gemma4-moe")
]


@pytest.mark.parametrize("name", ["hunyuan-moe", "qwen3next", *SLOW])
def test_models_of_floats_give_the_references_logits(name: str, interpreted: Any) -> None:
    path = unpacked(name) if name in PACKED else OURS / f"{name}.gguf"
    assert distance(path, interpreted) < 1e-3
    assert interpreted.driver.replays > 0


def test_a_quantised_model_gives_the_references_logits(interpreted: Any, data: Path) -> None:
    path = data / "golden" / "quants" / "llama-h256-Q4_K.gguf"
    assert distance(path, interpreted) < 0.2
    assert {"matmul_tensor", "matvec_add", "attention_tensor"} <= interpreted.driver.kernels


def test_the_largest_logits_are_found(interpreted: Any) -> None:
    path = OURS / "gptj.gguf"
    want = logits(network(path, ReferenceBackend()))[-1]
    net = network(path, interpreted)
    state = net.new_state(32)
    state.append(IDS)
    ((best,),) = net.forward([(state, len(IDS), "last")], best=1)
    assert best.finite
    assert best.ids[0] == int(want.argmax())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5encoder", "eurobert"])
def test_encoders_give_the_references_rows(name: str, interpreted: Any) -> None:
    ids = IDS * 2  # farther apart than buckets of one distance
    want, got = (
        network(unpacked(name), be).hidden([ids])[0] for be in (ReferenceBackend(), interpreted)
    )
    assert np.abs(got - want).max() < 1e-3 * want.std()
