"""Every architecture against reference logits: whole, in chunks, one by one, and in mixed batches.

The references are float32 (or float64) implementations, not ours; only where none exists, llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import PACKED, unpacked

from tinyllm import gguf
from tinyllm.errors import DeviceError, StateError
from tinyllm.kernels.devices import open_backend
from tinyllm.models.archs import ARCHS
from tinyllm.models.build import build
from tinyllm.models.network import Network

GOLDEN = """arctic baichuan-13b baichuan-7b bert-bge-cls bert-distil bert-minilm bert-roberta bloom
chatglm codeshell cohere2 command-r command-r-qknorm deepseek2-lite deepseek2-v2 deepseek2-v3 exaone
exaone4 exaone4-swa falcon falcon-40b gemma gemma2 gemma3 glm4 gpt-oss gpt2 gptneox gptneox-seq granite
granitemoe internlm2 jais jina-bert-v2 llama-gqa-llama3rope llama-h256 llama-mha llama-mistral
llama-mixtral mamba minicpm minicpm3 modern-bert mpt nemotron nomic-bert nomic-bert-moe olmo olmo2
olmo3-swa olmoe openelm orion phi2 phi3 phi3-longrope-long phi3-longrope-short phimoe qwen qwen2
qwen2-h256 qwen2moe qwen3 qwen3moe refact rwkv6 rwkv7 smollm3 stablelm stablelm-12b starcoder
starcoder2 xverse""".split()
OURS = Path(__file__).parent.parent / "data" / "models"  # made by make_models.py beside it
NEWER = """apertus arcee dbrx dots1 ernie4_5 ernie4_5-moe falcon-h1 gemma-embedding gptj granitehybrid
hunyuan-dense hunyuan-moe lfm2 lfm2moe mamba2 qwen35 qwen35moe qwen3next seed_oss""".split()
BOUND = {"reference": 1e-4, "cpu": 1e-3, "opencl": 1e-3, "cuda": 1e-3}
# x std; 0: to the bit. On GPUs one row and many rows have kernels of their own, which sum in other orders
SAME = {"reference": 1e-5, "cpu": 0.0, "opencl": 2e-5, "cuda": 2e-5}
ONE_BY_ONE = {"opencl": 5}  # tokens, where a CPU plays a GPU: recorded, replayed
DEVICES = [
    "reference",
    "cpu",
    *(pytest.param(d, marks=pytest.mark.device) for d in ("opencl", "cuda")),
]
# what is read before each sequence; () where the model reads nothing
Sources = Sequence[Sequence[int]]
N_CTX = 256  # what the references were made with


@cache
def network(folder: Path, name: str, device: str) -> Network:
    try:
        be = open_backend(device)
    except (DeviceError, ImportError) as e:
        return pytest.skip(f"{device}: {e}")
    with gguf.open(folder / f"{name}.gguf") as f:
        return build(f.metadata, f.tensors, be, "f32")


def references(npz: Any, i: int) -> np.ndarray:
    """The most trusted reference of sequence i: Hugging Face, then float64 NumPy, then llama.cpp."""
    for name in (
        "logits_hf",
        "logits_np",
        "logits_lcpp",
        "emb_tok_hf",
        "emb_tok_np",
        "emb_tok_lcpp",
    ):
        if f"{name}_{i}" in npz:
            return np.asarray(npz[f"{name}_{i}"])
    raise AssertionError(f"no reference for sequence {i}: {sorted(npz)}")


def logits(
    net: Network, sequences: Sequence[Sequence[int]], chunk: int = 10**6, sources: Sources = ()
) -> list[np.ndarray]:
    """All sequences side by side, ``chunk`` tokens of each per step, written about ``sources`` if given."""
    read = sources or [None] * len(sequences)
    states = [net.new_state(N_CTX, source=source) for source in read]
    for state, ids in zip(states, sequences, strict=True):
        state.append(ids)
    out: list[list[np.ndarray]] = [[] for _ in sequences]
    while todo := [i for i, s in enumerate(states) if s.n_past < len(s.ids)]:
        parts = [
            (states[i], min(chunk, len(states[i].ids) - states[i].n_past), "all") for i in todo
        ]
        for i, rows in zip(todo, net.forward(parts), strict=True):
            out[i].append(np.array(rows))
    return [np.concatenate(rows) for rows in out]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_reference(name: str, device: str, data: Path) -> None:
    compare(data / "golden" / "models", name, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NEWER)
def test_newer_ones_equal_the_reference(name: str, device: str) -> None:
    compare(OURS, name, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_ones_equal_the_reference(name: str, device: str) -> None:
    compare(unpacked(name).parent, name, device)


def compare(folder: Path, name: str, device: str) -> None:
    """A file's logits or rows, computed in several ways, against its reference."""
    net = network(folder, name, device)
    npz = np.load(folder / f"{name}.npz")
    sequences = [npz[f"tokens_{i}"].tolist() for i in range(3) if f"tokens_{i}" in npz]
    sources = [npz[f"source_{i}"].tolist() for i in range(3) if f"source_{i}" in npz]
    each = sources or [None] * len(sequences)
    if net.config.causal:
        pairs = zip(sequences, each, strict=True)
        wholes = [logits(net, [s], sources=[r] if r else [])[0] for s, r in pairs]
    else:
        wholes = [net.hidden([s])[0] for s in sequences]
    for i, whole in enumerate(wholes):
        want = references(npz, i)
        assert np.abs(whole - want).max() <= BOUND[device] * want.std()
    bound = SAME[device] * max(w.std() for w in wholes)
    for batch in batches(net, sequences, ONE_BY_ONE.get(device), sources):
        for got, whole in zip(batch, wholes, strict=True):
            assert np.abs(got - whole[: len(got)]).max() <= bound


def test_keys_normalised_behind_their_rotation_are_not_shifted() -> None:
    state = network(OURS, "hunyuan-dense", "reference").new_state(32)
    with pytest.raises(StateError, match="cannot be turned"):
        state.shift(0, 1)


def batches(
    net: Network, sequences: list[list[int]], one_by_one: int | None, sources: Sources
) -> list[list[np.ndarray]]:
    """Logits or rows of sequences computed in several ways, each of which must give the same.

    All compute the sequences together; a decoder also computes them in chunks, alone and together, and one
    by one, the last with so many tokens of each, or all.
    """
    if not net.config.causal:
        return [net.hidden(sequences)]
    return [
        logits(net, sequences, sources=sources),
        logits(net, sequences, 5, sources),
        [logits(net, [s], 7, sources[i : i + 1])[0] for i, s in enumerate(sequences)],
        logits(net, [s[:one_by_one] for s in sequences], 1, sources),
    ]


def test_every_row_of_the_table_is_proven(data: Path) -> None:
    proven = set()
    shared = data / "golden" / "models"
    files = [shared / f"{n}.gguf" for n in GOLDEN] + [OURS / f"{n}.gguf" for n in NEWER]
    for path in [*files, *map(unpacked, PACKED)]:
        with gguf.open(path) as f:
            proven.add(f.metadata["general.architecture"])
    assert proven == set(ARCHS)


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "bloom", "jina-bert-v2", "modern-bert"])
def test_a_tap_sees_and_changes_attention_probabilities(name: str, device: str, data: Path) -> None:
    net = network(data / "golden" / "models", name, device)
    ids = list(range(5, 25))
    seen: dict[str, np.ndarray] = {}

    def look(point: str, x: np.ndarray) -> None:
        seen[point] = x

    def uniform(point: str, x: np.ndarray) -> np.ndarray | None:
        return np.full_like(x, 0.05) if point.endswith("1.attn_probs") else None

    def run(tap: Any) -> np.ndarray:
        if not net.config.causal:
            return net.hidden([ids], tap)[0]
        state = net.new_state(N_CTX)
        state.append(ids)
        return np.array(net.forward([(state, len(ids), "all")], tap)[0])

    look.attn_probs = uniform.attn_probs = True  # type: ignore[attr-defined]
    plain = run(None)
    assert np.abs(run(look) - plain).max() <= 1e-4 * plain.std()
    probs = seen["blk.0.attn_probs"]
    assert probs.shape == (net.config.n_head[0], 20, 20)
    if name != "gpt-oss":  # sinks take a share
        assert np.allclose(probs.sum(-1), 1, atol=1e-5)
    assert np.abs(run(uniform) - plain).max() > 0.1 * plain.std()
