"""Control vectors: made from prompts, written, read, and added to every text of a model loaded with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from packed import unpacked

import tinyllm
from tinyllm import gguf
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError, GGUFError, UnsupportedModel
from tinyllm.gguf.control import summed
from tinyllm.localdocs.embedding import Embedder
from tinyllm.research import ControlVector

HAPPY = ["I am so happy today", "What a nice day it was", "Lily smiled and laughed"]
SAD = ["I am so sad today", "What a bad day it was", "Lily cried and was alone"]
PROMPT = "Tom went out and"


@pytest.fixture(scope="module")
def vector() -> ControlVector:
    with tinyllm.load() as m:
        return m.control_vector(HAPPY, SAD)


@pytest.fixture
def file(vector: ControlVector, tmp_path: Path) -> Path:
    vector.write(tmp_path / "happy.gguf")
    return tmp_path / "happy.gguf"


def test_means_are_apart_by_the_vector(vector: ControlVector) -> None:
    with tinyllm.load() as m:
        kinds = [m.run_with_cache(p, "out", positions=-1) for p in (HAPPY, SAD)]
        high, low = (np.mean([c["blk.2.out"][0] for c in kind], 0) for kind in kinds)
        assert vector[2] == pytest.approx(high - low, abs=1e-5)
        whole = m.control_vector(HAPPY, SAD, positions=slice(1, None))[2]
        rows = [np.mean([c["blk.2.out"][1:].mean(0) for c in m.run_with_cache(p, "out")], 0)
                for p in (HAPPY, SAD)]  # fmt: skip
        assert whole == pytest.approx(rows[0] - rows[1], abs=1e-5)


def test_pca_finds_the_direction_that_pairs_differ_by() -> None:
    from tinyllm.research.vectors import principal

    rng = np.random.default_rng(1)
    direction = rng.normal(size=16)
    direction /= np.linalg.norm(direction)
    differences = np.outer(rng.uniform(2, 4, 30), direction) + rng.normal(size=(30, 16)) * 0.1
    found = principal(differences, differences.mean(0))
    assert found == pytest.approx(direction * (differences.mean(0) @ direction), abs=0.1)
    covariance = differences.T @ differences
    assert np.abs(found / np.linalg.norm(found)) == pytest.approx(
        np.abs(np.linalg.eigh(covariance)[1][:, -1])
    )


def test_a_file_is_read_as_it_was_written(vector: ControlVector, file: Path) -> None:
    again = ControlVector.read(file)
    assert again.hint == "llama"
    assert list(again) == list(vector)
    for layer, x in vector.items():
        assert np.array_equal(again[layer], x)
    theirs = oracle.GGUFReader(file)
    assert theirs.get_field("controlvector.layer_count").contents() == len(vector)
    assert {t.name for t in theirs.tensors} == {f"direction.{i}" for i in vector}
    assert all(t.tensor_type == oracle.GGMLQuantizationType.F32 for t in theirs.tensors)


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """As llama.cpp's cvector-generator writes them."""
    out = oracle.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    out.add_string("controlvector.model_hint", "mistral")
    out.add_int32("controlvector.layer_count", 2)
    for layer in (1, 2):
        out.add_tensor(f"direction.{layer}", np.full(8, layer, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    found = ControlVector.read(tmp_path / "theirs.gguf")
    assert found.hint == "mistral"
    assert found[2].tolist() == [2] * 8


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_model_loaded_with_vectors_is_a_steered_one(
    vector: ControlVector, file: Path, device: str
) -> None:
    with tinyllm.load(device=device, kv_type="f32") as m:
        ids = m.prompt_ids(PROMPT)
        plain = m.logits(ids)
        with m.steered(vector, scale=0.5):
            want = m.logits(ids)
    with tinyllm.load(device=device, kv_type="f32", control=[(file, 0.5)]) as m:
        found = m.logits(ids)
        assert np.abs(found - want).max() < 1e-4 * want.std()
        assert np.abs(found - plain).max() > 0.1 * want.std()
        cache = m.run_with_cache(ids, ["resid_mid", "ffn_out", "out"])
        middle, ffn = cache["blk.2.resid_mid"], cache["blk.2.ffn_out"]
        assert cache["blk.2.out"] == pytest.approx(middle + ffn + 0.5 * vector[2], abs=1e-5)
        parts = m.attribute(ids, 5)  # the vector is no half's work
        want_part = np.array([m.run_with_cache(ids, "ffn_out", -1)["blk.2.ffn_out"][0]])
        assert parts.values[2, 1] == pytest.approx(
            float((want_part @ direction_of(m, ids, 5))[0]), abs=1e-3
        )


def direction_of(m: tinyllm.Model, ids: list[int], token: int) -> np.ndarray:
    """What the residual stream is multiplied by for a token's logit."""
    scale = m.run_with_cache(ids, "output_norm_scale", -1)["output_norm_scale"][0, 0]
    tensors = m._file.tensors
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    return head.dequantize()[token] * tensors["output_norm.weight"].dequantize() / scale


def test_texts_keep_their_bits_in_any_batch(file: Path) -> None:
    with tinyllm.load(control=[(file, 0.7)]) as m, tinyllm.load() as plain:
        prompts = ["Once upon a time", "Tom went out and saw", "The"]
        alone = [m.generate(p, max_tokens=12, temperature=0).ids for p in prompts]
        assert [c.ids for c in m.generate(prompts, max_tokens=12, temperature=0)] == alone
        assert alone != [plain.generate(p, max_tokens=12, temperature=0).ids for p in prompts]
        with tinyllm.Engine(m) as engine:
            requests = [engine.submit(p, max_tokens=12, temperature=0) for p in prompts]
            assert [r.result().ids for r in requests] == alone


def test_a_state_of_the_plain_model_is_not_taken(file: Path, tmp_path: Path) -> None:
    with tinyllm.load() as m:
        state = m.new_state(64)
        m.generate("Once", max_tokens=2, temperature=0, state=state)
        state.save(tmp_path / "state.npz")
    with tinyllm.load(control=file) as m, pytest.raises(tinyllm.errors.StateError):
        m.new_state(64).restore(tmp_path / "state.npz")


def test_only_some_layers(vector: ControlVector, file: Path) -> None:
    with tinyllm.load(control=file, control_layers=(2, 3)) as m, tinyllm.load() as plain:
        ids = m.prompt_ids(PROMPT)
        ours, theirs = (x.run_with_cache(ids, "out") for x in (m, plain))
        assert np.array_equal(ours["blk.1.out"], theirs["blk.1.out"])
        assert ours["blk.2.out"] == pytest.approx(theirs["blk.2.out"] + vector[2], abs=1e-5)
    assert list(vector.layers(2, 3)) == [2, 3]


def test_compared_tensors_keep_the_vectors(file: Path) -> None:
    from tinyllm.research.cache import read
    from tinyllm.research.compare import with_tensors

    with tinyllm.load(control=file) as m:
        ids = m.prompt_ids(PROMPT)
        for prefix in ("blk.2.", "token_embd."):
            own = {n: t for n, t in m._file.tensors.items() if n.startswith(prefix)}
            (found,) = read(with_tensors(m, own), [ids], None)
            assert np.array_equal(found, m.logits(ids))


WRONG: list[Any] = [
    ({"control": 5}, "control="),
    ({"control": [("x", "y")]}, "scale"),
    ({"control_layers": (1, 2)}, "without control"),
]


@pytest.mark.parametrize(("how", "message"), WRONG)
def test_wrong_arguments_are_told(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tinyllm.load(**how)


def test_vectors_that_do_not_fit_are_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no direction for layers 90"):
        tinyllm.load(control=file, control_layers=(90, 99))
    with pytest.raises(ArgumentError, match="control_layers"):
        tinyllm.load(control=file, control_layers=(1,))  # type: ignore[arg-type]
    for directions in ({1: np.ones(3)}, {99: np.ones(ControlVector.read(file).n_embd)}):
        ControlVector(directions).write(tmp_path / "other.gguf")
        with pytest.raises(ArgumentError, match="control: a direction of"):
            tinyllm.load(control=tmp_path / "other.gguf")
    with pytest.raises(ArgumentError, match="expected 'controlvector'"):
        tinyllm.load(control=tinyllm.loading.BUNDLED)
    keys = {"general.architecture": "controlvector"}
    for tensors in (
        {"direction.0": np.ones(4, np.float32)},
        {"direction.1": np.ones((2, 4), np.float32)},
        {"direction.1": np.array([np.nan], np.float32)},
        {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)},
        {"up": np.ones(4, np.float32)},
        {},
    ):
        gguf.write(tmp_path / "bad.gguf", keys, tensors)
        with pytest.raises((GGUFError, ArgumentError), match=r"direction"):
            ControlVector.read(tmp_path / "bad.gguf")


def test_what_cannot_be_a_vector_is_told() -> None:
    for directions in ({}, {1: [[1.0]]}, {1: [1.0], 2: [1.0, 2.0]}, {1: [np.inf]}, {-1: [1.0]}):
        with pytest.raises(ArgumentError, match="direction"):
            ControlVector(directions)
    with pytest.raises(ArgumentError, match="layer 0"):
        ControlVector({0: [1.0]}).write("never.gguf")
    with tinyllm.load() as m:
        with pytest.raises(ArgumentError, match="pairs"):
            m.control_vector(HAPPY, SAD[:2], "pca")
        with pytest.raises(ArgumentError, match="empty"):
            m.control_vector(HAPPY, [])
        with pytest.raises(ArgumentError, match="positions"):
            m.control_vector(HAPPY, SAD, positions=slice(90, None))
        with pytest.raises(ArgumentError, match="method"):
            m.control_vector(HAPPY, SAD, "svd")  # type: ignore[arg-type]


def test_several_streams_take_no_vector(tmp_path: Path) -> None:
    path = unpacked("gemma3n")
    with tinyllm.load(path) as m:
        size = m.config.n_embd
    ControlVector({1: np.ones(size)}).write(tmp_path / "v.gguf")
    with pytest.raises(UnsupportedModel, match="more than one residual stream"):
        tinyllm.load(path, control=tmp_path / "v.gguf")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(HAPPY) + "\n\n", "utf-8")
    (tmp_path / "b.txt").write_text("\n".join(SAD), "utf-8")
    out = str(tmp_path / "v.gguf")
    model = str(tinyllm.loading.BUNDLED)
    argv = ["control", model, str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "-o", out]
    assert main([*argv, "--method", "pca"]) == 0
    assert "3 and 3 prompts" in capsys.readouterr().out
    argv = ["run", model, PROMPT, "-n", "8", "--temperature", "0"]
    assert main([*argv, "--control", f"{out}=2", "--control-layers", "1", "2"]) == 0
    steered = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out != steered
    (tmp_path / "none.txt").write_text("\n", "utf-8")
    assert main(["control", model, str(tmp_path / "none.txt"), out]) == 2


def test_a_scale_that_makes_a_vector_infinite_is_told() -> None:
    with pytest.raises(ArgumentError, match="scale 1e\\+38"):
        summed([(ControlVector({1: [1e3, 1.0]}), 1e38)])
    big = ControlVector({1: [3e38]})
    with pytest.raises(ArgumentError, match="layer 1"):
        summed([(big, 1.0), (big, 1.0)])
    with pytest.raises(ArgumentError, match="control: scale nan"):
        tinyllm.load(control=[("v.gguf", float("nan"))])


def test_an_embedder_with_a_vector_is_another(vector: ControlVector, tmp_path: Path) -> None:
    vector.write(tmp_path / "v.gguf")
    with tinyllm.load() as m, tinyllm.load(control=tmp_path / "v.gguf") as other:
        plain, changed = Embedder(m).identity, Embedder(other).identity
    assert len(plain) == 64  # as stores that exist know it
    assert changed.startswith(plain + "-")
