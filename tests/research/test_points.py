"""The points of every architecture: what they show is the reference's, and looking changes nothing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import PACKED, unpacked

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, DeviceError
from tinyllm.kernels.devices import open_backend
from tinyllm.models.build import build
from tinyllm.models.network import Network
from tinyllm.models.step import Hook
from tinyllm.research.cache import run_with_cache
from tinyllm.research.points import MEANINGS, points, select

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "tests" / "data" / "models"
GOLDEN = Path(os.environ.get("TINYLLM_TESTDATA", ROOT.parent / "shared" / "data")) / "golden/models"
WITHOUT = {"t5", "t5-plain"}  # they read before they write, and show no points
NAMES = sorted(
    ({p.stem for folder in (GOLDEN, OURS) for p in folder.glob("*.gguf")} | set(PACKED)) - WITHOUT
)
# One of each kind of attention, norm, feed-forward half and recurrence
KINDS = """bert-bge-cls bloom deepseek2-lite exaone4 falcon-40b falcon-h1 gemma2 gemma3 gemma3n gpt-oss gpt2
granitemoe grovemoe jina-bert-v2 kimi-linear lfm2 llama-gqa-llama3rope llama-mixtral mamba nemotron_h olmo2
olmoe qwen3 qwen35moe rwkv6 rwkv7""".split()
BOUND = 1e-3  # x the spread of a point's values
N = 12  # tokens


class Identity(Hook):
    """Gives back what it is shown, everywhere."""

    def replaces(self, name: str) -> bool:
        return True

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray:
        return x


def file_of(name: str) -> Path:
    if name in PACKED:
        return unpacked(name)
    return next(p for p in (GOLDEN / f"{name}.gguf", OURS / f"{name}.gguf") if p.exists())


@cache
def backend(device: str) -> Any:
    try:
        return open_backend(device)
    except (DeviceError, ImportError) as e:
        return pytest.skip(f"{device}: {e}")


def network(name: str, device: str) -> tuple[Network, list[int]]:
    """A model, and some tokens to read."""
    path = file_of(name)
    ids = np.load(path.with_suffix(".npz"))["tokens_0"][:N].tolist()
    with gguf.open(path) as f:
        return build(f.metadata, f.tensors, backend(device), "f32"), ids


def result(net: Network, ids: list[int], tap: Hook | None) -> np.ndarray:
    """Logits, or an encoder's rows."""
    if not net.config.causal:
        return net.hidden([ids], tap)[0]
    state = net.new_state(64)
    state.append(ids)
    return np.array(net.forward([(state, len(ids), "all")], tap)[0])


def looks_the_same(name: str, device: str) -> None:
    """Identity patches change no bit; every point's values are the reference's."""
    net, ids = network(name, device)
    assert np.array_equal(result(net, ids, Identity()), result(net, ids, None))
    if device == "reference":
        return
    want = run_with_cache(
        network(name, "reference")[0], [ids], lambda n: True, None, "float32", None
    )
    found = run_with_cache(net, [ids], lambda n: True, None, "float32", None)
    assert list(found[0]) == list(want[0])
    for point, x in want[0].items():
        seen = np.isfinite(x)
        assert np.array_equal(seen, np.isfinite(found[0][point])), point
        error = np.abs(found[0][point][seen] - x[seen]).max()
        assert error <= BOUND * x[seen].std() + 1e-6, point


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "device", ["reference", "cpu", pytest.param("opencl", marks=pytest.mark.device)]
)
def test_looking_changes_nothing(name: str, device: str, data: Path) -> None:
    looks_the_same(name, device)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in KINDS])
@pytest.mark.parametrize(
    "device", ["reference", "cpu", pytest.param("opencl", marks=pytest.mark.device)]
)
def test_looking_changes_nothing_in_the_others(name: str, device: str, data: Path) -> None:
    looks_the_same(name, device)


def test_every_kind_of_point_is_met(data: Path) -> None:
    met = set()
    for name in KINDS:
        met |= {p.rpartition(".")[2] for p in points(network(name, "reference")[0])}
    assert met == set(MEANINGS)


@pytest.mark.parametrize("name", ["nanbeige", "hrm_text"])
def test_layers_that_share_a_block_have_points_of_their_own(name: str) -> None:
    net, _ = network(name, "reference")
    found = points(net)
    assert len(set(net.config.blocks)) < net.config.n_layer
    for i in range(net.config.n_layer):
        assert {f"blk.{i}.ffn_act", f"blk.{i}.out"} <= found.keys()


@pytest.fixture(scope="module")
def model() -> tinyllm.Model:
    return tinyllm.load(device="cpu")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("blk.1.out", ["blk.1.out"]),
        ("hook_embed", ["embd"]),
        (
            ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_pattern"],
            ["blk.0.attn_probs", "blk.0.out"],
        ),
        ("blocks.*.mlp.hook_post", ["blk.0.ffn_act", "blk.1.ffn_act", "blk.2.ffn_act"]),
        ("blk.[01].resid_mid", ["blk.0.resid_mid", "blk.1.resid_mid"]),
        (lambda n: n.endswith("hook_resid_mid") and ".2." in n, ["blk.2.resid_mid"]),
    ],
    ids=["ours", "theirs", "several", "their pattern", "our pattern", "function"],
)
def test_names_are_understood(model: tinyllm.Model, names: Any, expected: list[str]) -> None:
    assert [n for n in select(model.network, names) if n.split(".")[1:2] < ["3"]] == expected


def test_a_name_that_is_none_is_told_with_those_near_it(model: tinyllm.Model) -> None:
    with pytest.raises(ArgumentError, match=r"blk\.1\.out.*points\(\)"):
        model.run_with_cache([1, 2], names="blk.1.uot")
