"""Recorded texts come again with every bit, and whatever was changed is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError
from tinyllm.loading import BUNDLED
from tinyllm.research import Recording, recording

MODEL = BUNDLED


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load() as m:
        yield m


@pytest.fixture
def file(model: tinyllm.Model, tmp_path: Path) -> Path:
    made = tinyllm.record(model)
    made.generate("Once upon a time", max_tokens=12, temperature=0.9, seed=7)
    made.generate("Tom had", max_tokens=12, repeat_penalty=1.2, logit_bias={5: 1.0})
    made.chat([{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0)
    made.write(tmp_path / "session.json")
    return tmp_path / "session.json"


def test_recording_changes_no_text(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    for how in ({"temperature": 0}, {"seed": 3}, {"seed": 4, "top_k": 0, "top_p": 1.0}):
        done = made.generate("Lily had a", max_tokens=10, **how)
        assert done.ids == model.generate("Lily had a", max_tokens=10, **how).ids
    assert made.runs[1].options["seed"] == 3
    hello = [{"role": "user", "content": "Hello"}]
    want = model.chat(hello, max_tokens=5, temperature=0).ids
    assert made.chat(hello, max_tokens=5, temperature=0).ids == want


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_file_comes_again_with_every_bit(file: Path, n_threads: int) -> None:
    again = Recording.read(file)
    assert again.settings["kv_type"] == "f16"
    with tinyllm.load(n_threads=n_threads, **again.settings) as m:
        found = tinyllm.replay(file, m)
        assert found.same
        assert found.changed == []
    assert [len(r.logits) - len(r.ids) in (0, 1) for r in again.runs] == [True] * 3


def test_a_seed_is_drawn_and_recorded(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    texts = {made.generate("The", max_tokens=24, top_p=1.0).text for _ in range(4)}
    assert len({r.options["seed"] for r in made.runs}) == 4
    assert len(texts) > 1
    assert tinyllm.replay(made, model).same


def test_another_setting_is_told(file: Path) -> None:
    with tinyllm.load(kv_type="q8_0") as m:
        found = tinyllm.replay(file, m)
        assert not found.same
        assert found.changed == ["settings kv_type: f16, now q8_0"]
        first = found.parted[0]
        assert first.run == 0
        assert first.bits is not None
        assert first.difference is not None
        assert first.difference > 0
        assert f"the logits of token {first.bits} differ by" in str(first)


def test_another_file_is_told(file: Path, tmp_path: Path) -> None:
    """One value of a norm is another; all else is as it was."""
    other = tmp_path / "other.gguf"
    with tinyllm.gguf.open(MODEL) as source:
        tensors: dict[str, Any] = dict(source.tensors)
        x = np.array(tensors["output_norm.weight"].dequantize())
        x[3] *= 2
        tinyllm.gguf.write(other, source.metadata, {**tensors, "output_norm.weight": x})
    with tinyllm.load(other) as m:
        found = tinyllm.replay(file, m)
        assert [line.split(":")[0] for line in found.changed] == ["model sha256"]
        assert {p.run for p in found.parted} == {0, 1, 2}
        assert all(p.bits == 0 for p in found.parted)
        with pytest.raises(ArgumentError, match="sha256"):
            Recording.read(file, m)


def test_other_code_is_told(file: Path, model: tinyllm.Model, monkeypatch: Any) -> None:
    monkeypatch.setattr(recording, "hash_of_sources", lambda: "0123")
    found = tinyllm.replay(file, model)
    assert found.same  # the bits are what counts
    assert len(found.changed) == 1
    assert "now 0123" in found.changed[0]


def test_adapters_and_vectors_are_told(file: Path, tmp_path: Path) -> None:
    with tinyllm.load() as m:
        m.control_vector(["I am happy"], ["I am sad"]).write(tmp_path / "v.gguf")
    with tinyllm.load(control=tmp_path / "v.gguf") as m:
        found = tinyllm.replay(file, m)
        told = [line.split(":")[0] for line in found.changed]
        assert told == ["beside digest", "beside weights"]
        assert len(found.parted) == 3


def test_where_words_part_is_told(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    made.generate("Once upon a time", max_tokens=8, temperature=0)
    run = made.runs[0]
    ids = [*run.ids[:3], (run.ids[3] + 1) % 100, *run.ids[4:]]
    made.runs[0] = replace(run, ids=ids)
    (part,) = tinyllm.replay(made, model).parted
    assert (part.bits, part.token) == (None, 3)
    assert part.words == tuple(model.tokenizer.decode([x[3]]) for x in (ids, run.ids))
    assert "recorded is" in str(part)
    made.runs[0] = replace(run, finish_reason="stop")
    (part,) = tinyllm.replay(made, model).parted
    assert part.words == ("stop", "length")


def test_a_branch_without_a_change_is_the_text(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    options = {"max_tokens": 16, "temperature": 0.9, "seed": 2, "repeat_penalty": 1.3}
    whole = made.generate("Once upon a time", **options)
    for at in (0, 5, 15):
        assert made.branch(0, at).ids == whole.ids
    assert made.runs[2].parent == (0, 5)


def test_a_branch_goes_on_from_its_token(model: tinyllm.Model, tmp_path: Path) -> None:
    made = tinyllm.record(model)
    whole = made.generate("Once upon a time", max_tokens=12, temperature=0.9, seed=2)
    dog = model.tokenizer.encode(" dog", add_special=False)
    done = made.branch(0, 4, " dog", max_tokens=14)
    assert done.ids[: 4 + len(dog)] == whole.ids[:4] + dog
    assert done.ids[4:] != whole.ids[4:]
    other = made.branch(0, 4, seed=5)
    assert other.ids[:4] == whole.ids[:4]
    deeper = made.branch(1, 8, temperature=0)
    assert deeper.ids[:8] == done.ids[:8]
    made.write(tmp_path / "tree.json")
    assert tinyllm.replay(tmp_path / "tree.json", model).same
    more = Recording.read(tmp_path / "tree.json", model)
    assert more.branch(3, 8).ids == deeper.ids


def test_constrained_texts_are_recorded(model: tinyllm.Model) -> None:
    pytest.importorskip("llguidance")
    made = tinyllm.record(model)
    done = made.generate("It was", max_tokens=12, seed=1, regex=r"Lily [0-9]{2}:[0-9]{2}")
    assert done.text.startswith("Lily ")
    assert tinyllm.replay(made, model).same
    assert made.branch(0, 2).ids == done.ids


def test_what_no_file_holds_is_told(model: tinyllm.Model, tmp_path: Path) -> None:
    made = tinyllm.record(model)
    for name in ("tap", "state", "logits_processor", "speculate", "overflow"):
        with pytest.raises(ArgumentError, match=f"{name}= cannot be recorded"):
            made.generate("Once", **{name: None})
    for run, at in ((0, 0), (-1, 0)):
        with pytest.raises(ArgumentError, match="run="):
            made.branch(run, at)
    made.generate("Once", max_tokens=2)
    with pytest.raises(ArgumentError, match="at="):
        made.branch(0, 9)
    made.write(tmp_path / "r.json")
    with pytest.raises(ArgumentError, match="give its model"):
        Recording.read(tmp_path / "r.json").generate("Once")
    for text in (
        "",
        "[]",
        "{}",
        '{"tinyllm_recording": 2}',
        '{"tinyllm_recording": 1, "runs": [1]}',
    ):
        (tmp_path / "bad.json").write_text(text, "utf-8")
        with pytest.raises(ArgumentError, match="no recording of ours"):
            Recording.read(tmp_path / "bad.json")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time\n\nTom had\n", "utf-8")
    out, model = str(tmp_path / "r.json"), str(MODEL)
    argv = ["record", model, str(tmp_path / "prompts.txt"), "-o", out, "-n", "8", "--seed", "3"]
    assert main(argv) == 0
    assert "2 texts" in capsys.readouterr().out
    assert main(["replay", model, out]) == 0
    assert "every bit is as recorded" in capsys.readouterr().out
    assert main(["replay", out, "--json"]) == 0  # the bundled model
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert main(["replay", model, out, "--kv-type", "q8_0"]) == 1
    shown = capsys.readouterr()
    assert "changed: settings kv_type: f16, now q8_0" in shown.out
    assert "differ from the recording" in shown.err
    branched = str(tmp_path / "b.json")
    argv = ["replay", model, out, "--branch", "1:3", "--put", " dog", "--seed", "9", "-o", branched]
    assert main(argv) == 0
    assert len(Recording.read(branched).runs) == 3
    assert main(["replay", model, branched]) == 0
    assert main(["replay", model, out, "--branch", "x"]) == 2


def test_kernels_and_what_adapters_hold_are_told(file: Path, model: tinyllm.Model) -> None:
    kept = model.network.kernels
    model.network.kernels = ("mine_matvec_Q4_K_0123",)
    try:
        found = tinyllm.replay(file, model)
    finally:
        model.network.kernels = kept
    assert [line.split(":")[0] for line in found.changed] == ["beside kernels"]
    assert "weights" in recording.about(model)["beside"]
    assert "llguidance" in recording.about(model)["code"]
    assert "tokenizers" in recording.DECIDES
