"""Rerankers: scores equal the reference's, pair by pair and side by side; and the method that users call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, ContextOverflow, GGUFError, UnsupportedModel
from tinyllm.kernels.devices import open_backend
from tinyllm.models.build import build
from tinyllm.models.network import Network

MODELS = Path(__file__).parent.parent / "data" / "models"


def network(name: str, device: str) -> Network:
    with gguf.open(MODELS / f"{name}.gguf") as f:
        return build(f.metadata, f.tensors, open_backend(device), "f32")


@pytest.mark.parametrize(("device", "bound"), [("reference", 1e-4), ("cpu", 1e-3)])
@pytest.mark.parametrize("name", ["rank-bert", "rank-roberta", "rank-modern-bert"])
def test_scores_equal_the_reference(name: str, device: str, bound: float) -> None:
    net, npz = network(name, device), np.load(MODELS / f"{name}.npz")
    ids = [npz[f"tokens_{i}"].tolist() for i in range(2)]
    types = [npz[f"types_{i}"].tolist() for i in range(2)] if "types_0" in npz else None
    want = np.array([npz[f"score_hf_{i}"][0] for i in range(2)])
    assert net.decoder.rank is not None
    got = np.array([net.decoder.rank(rows)[0] for rows in net.hidden(ids, types=types)])
    assert np.abs(got - want).max() <= bound * max(1.0, np.abs(want).max())


@pytest.fixture(scope="module")
def reranker():
    with tinyllm.load(MODELS / "rank-bert.gguf", device="reference") as m:
        yield m


def test_documents_are_scored_one_by_one_or_together(reranker) -> None:
    documents = ["the cat is a animal", "a stone", "", "the dogs"]
    scores = reranker.rank("what is a cat?", documents)
    assert scores.shape == (4,)
    assert scores.dtype == np.float32
    assert len(set(scores.tolist())) == 4
    alone = [reranker.rank("what is a cat?", [d])[0] for d in documents]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert reranker.rank("what is a cat?", []).shape == (0,)


def test_a_pair_is_joined_as_the_vocabulary_does(reranker) -> None:
    ids, types = reranker.tokenizer.encode_pair("a cat", "the dog")
    text = [reranker.tokenizer.token_text(i) for i in ids]
    assert text == ["[CLS]", "▁a", "▁cat", "[SEP]", "▁the", "▁dog", "[SEP]"]
    assert types == [0, 0, 0, 0, 1, 1, 1]


def test_what_cannot_be_ranked_is_refused(reranker, stories260k: Path) -> None:
    with pytest.raises(ArgumentError, match="list"):
        reranker.rank("a", "b")
    with pytest.raises(ContextOverflow):
        reranker.rank("a", ["cat " * 300])
    with pytest.raises(ArgumentError, match="rank"):
        reranker.embed("a cat")
    with (
        tinyllm.load(stories260k, device="reference") as m,
        pytest.raises(UnsupportedModel, match="no ranking head"),
    ):
        m.rank("a", ["b"])


def test_projections_follow_pooling(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(s).astype(np.float32) for s in ((48, 32), (16, 48)))
    ids = [5, 9, 30, 7]
    with gguf.open(MODELS / "gemma-embedding.gguf") as f:
        more = {"dense_2.weight": up, "dense_3.weight": down}
        gguf.write(tmp_path / "m.gguf", f.metadata, {**f.tensors, **more})
    with tinyllm.load(MODELS / "gemma-embedding.gguf", device="reference") as m:
        plain = m.embed_ids(ids, normalize=False)
        assert plain.shape == (32,)
    with tinyllm.load(tmp_path / "m.gguf", device="reference") as m:
        np.testing.assert_allclose(
            m.embed_ids(ids, normalize=False), down @ (up @ plain), rtol=1e-4, atol=1e-4
        )
        assert m.embed_ids(ids, pooling="none").shape == (4, 16)


def test_a_reranker_without_its_head_is_refused() -> None:
    with gguf.open(MODELS / "rank-bert.gguf") as f:
        tensors = {n: t for n, t in f.tensors.items() if n != "cls.output.weight"}
        with pytest.raises(GGUFError, match=r"cls\.output\.weight"):
            build(f.metadata, tensors, open_backend("reference"))
