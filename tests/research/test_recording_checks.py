"""What a recording refuses: files that somebody has changed, and texts that it could not repeat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError
from tinyllm.research import Recording

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model() -> Iterator[tinyllm.Model]:
    with tinyllm.load() as m:
        yield m


@pytest.fixture(scope="module")
def stored(model: tinyllm.Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tinyllm.record(model)
    made.generate("Once", max_tokens=3, temperature=0, logit_bias={5: -np.inf})
    path = tmp_path_factory.mktemp("stored") / "r.json"
    made.write(path)
    assert tinyllm.replay(path, model).same
    return path.read_text("utf-8")


WRONG: list[tuple[list[str | int], Any]] = [
    (["settings", "kernels"], ["evil.py"]),
    (["settings", "lora"], ["a.gguf"]),
    (["settings", "path"], "x"),
    (["settings", "n_ctx"], True),
    (["settings", "device"], []),
    (["settings", "kv_type"], {}),
    (["settings"], 5),
    (["code"], []),
    (["beside"], None),
    (["hardware", "x"], [[]]),
    (["model", "sha256"], 5),
    (["more"], 1),
    (["runs"], {}),
    (["runs", 0], 1),
    (["runs", 0, "more"], 1),
    *[(["runs", 0, "parent"], x) for x in ([], [float("inf"), 0], [0, 0], [0, True], "ab")],
    *[(["runs", 0, name], x) for name in ("ids", "prompt_ids", "forced")
      for x in (None, "abc", [-1], ["a"], [[1]], [1.0])],
    *[(["runs", 0, "logits"], x) for x in (None, [1], ["a"])],
    *[(["runs", 0, "chosen"], x) for x in ([], ["a"] * 3, None)],
    *[(["runs", 0, "options"], x) for x in (
        [], {"tap": 1}, {"stream": True}, {"seed": "x"}, {"stop": 1}, {"logit_bias": [1]}, {"lora": []},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"1": []}}, {"max_tokens": 1.5}, {"regex": []},
        {"temperature": 10**400}, {"top_p": {}},
    )],
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), WRONG, ids=str)
def test_a_changed_file_is_one_error_on_reading(
    stored: str, tmp_path: Path, place: list[Any], value: Any
) -> None:
    whole = json.loads(stored)
    inner = whole
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "r.json").write_text(json.dumps(whole), "utf-8")
    with pytest.raises(ArgumentError, match="no recording of ours"):
        Recording.read(tmp_path / "r.json")


def test_a_file_runs_nothing(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil.py").write_text("print('it ran')\n", "utf-8")
    whole = json.loads(stored)
    whole["settings"]["kernels"] = [str(tmp_path / "evil.py")]
    (tmp_path / "r.json").write_text(json.dumps(whole), "utf-8")
    assert main(["replay", str(tmp_path / "r.json")]) == 2
    shown = capsys.readouterr()
    assert "it ran" not in shown.out + shown.err
    assert "no recording of ours" in shown.err


@pytest.mark.parametrize("text", [DEEP, '{"tinyllm_recording": 1, "model": ' + DEEP])
def test_a_deep_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text, "utf-8")
    with pytest.raises(ArgumentError, match="no recording of ours"):
        Recording.read(tmp_path / "r.json")


@pytest.mark.parametrize("name", ["ids", "forced", "prompt_ids"])
def test_a_token_that_the_model_lacks_is_refused(
    model: tinyllm.Model, stored: str, tmp_path: Path, name: str
) -> None:
    whole = json.loads(stored)
    whole["runs"][0][name] = [10**9]
    (tmp_path / "r.json").write_text(json.dumps(whole), "utf-8")
    with pytest.raises(ArgumentError, match="1000000000"):
        tinyllm.replay(tmp_path / "r.json", model)


def test_arguments_that_no_file_could_hold_are_refused(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    for options in ({"logit_bias": [1]}, {"logit_bias": {3: "x"}}, {"seed": "x"}):
        with pytest.raises(ArgumentError):
            made.generate("a", max_tokens=2, **options)
    with pytest.raises(ArgumentError, match="expected one text"):
        made.generate(["a", "b"], max_tokens=2)
    made.generate("a", max_tokens=4, seed=np.int64(3))
    assert made.runs[0].options["seed"] == 3
    for token in (10**6, -1, True, 1.5):
        with pytest.raises(ArgumentError, match="token"):
            made.branch(0, 2, token)
    assert made.branch(0, 2, np.int64(5)).ids[2] == 5
    assert len(made.runs) == 2


def test_what_is_put_needs_room(model: tinyllm.Model) -> None:
    made = tinyllm.record(model)
    made.generate("Once upon a time", max_tokens=6, temperature=0)
    with pytest.raises(ArgumentError, match="max_tokens=6, but 8 tokens"):
        made.branch(0, 6, [7, 8])
    assert made.branch(0, 6, [7, 8], max_tokens=9).ids[6:8] == [7, 8]


def test_a_grammar_that_forbids_what_is_put_is_told(model: tinyllm.Model) -> None:
    pytest.importorskip("llguidance")
    made = tinyllm.record(model)
    made.generate("It was", max_tokens=12, seed=1, regex=r"Lily [0-9]{2}:[0-9]{2}")
    choice = next(i for i, x in enumerate(made.runs[0].logits) if x)
    for at in (0, choice):  # a place without a choice, and one with
        with pytest.raises(ArgumentError, match="the grammar does not allow"):
            made.branch(0, at, " dog")
    assert len(made.runs) == 1
    run = made.runs[0]
    run.forced.extend([*run.ids[:choice], model.tokenizer.encode(" dog", add_special=False)[0]])
    (part,) = tinyllm.replay(made, model).parted
    assert part.token == choice


def test_a_context_that_changes_the_model_is_not_recorded(model: tinyllm.Model) -> None:
    vector = model.control_vector(["I am happy"], ["I am sad"])
    made = tinyllm.record(model)
    made.generate("Once", max_tokens=2)
    with model.steered(vector, scale=2):
        for call in (
            lambda: made.generate("Once", max_tokens=2),
            lambda: tinyllm.replay(made, model),
            lambda: tinyllm.record(model),
        ):
            with pytest.raises(ArgumentError, match=r"load\(control="):
                call()
    assert tinyllm.replay(made, model).same


def test_what_is_written_can_be_read(model: tinyllm.Model, tmp_path: Path) -> None:
    made = tinyllm.record(model)
    made.generate(np.array(model.prompt_ids("Once")), max_tokens=3, temperature=0, stop="\ud800")
    made.branch(np.int64(0), np.int64(1), np.int64(7))  # type: ignore[arg-type]
    made.write(tmp_path / "r.json")
    assert Recording.read(tmp_path / "r.json").runs == made.runs
    assert tinyllm.replay(tmp_path / "r.json", model).same


@pytest.mark.parametrize(
    "other",
    [{"logits": [], "chosen": []}, {"text": "something else"}, {"chosen": [0.0] * 3}],
    ids=str,
)
def test_a_text_that_somebody_has_changed_is_not_the_same(
    model: tinyllm.Model, stored: str, tmp_path: Path, other: dict[str, Any]
) -> None:
    whole = json.loads(stored)
    whole["runs"][0].update(other)
    (tmp_path / "r.json").write_text(json.dumps(whole), "utf-8")
    found = tinyllm.replay(tmp_path / "r.json", model)
    assert not found.same
    assert "something else" in str(found.parted[0]) or found.parted[0].bits == 0


def test_no_source_is_overwritten(
    stored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, recording, link = tmp_path / "p.txt", tmp_path / "r.json", tmp_path / "link"
    prompts.write_text("Once\n", "utf-8")
    recording.write_text(stored, "utf-8")
    link.symlink_to(prompts)
    model = tmp_path / "m.gguf"
    model.write_bytes(tinyllm.loading.BUNDLED.read_bytes())
    for words in (
        ["record", model, prompts, "-o", prompts],
        ["record", model, prompts, "-o", link],
        ["record", model, prompts, "-o", model],
        ["replay", model, recording, "--branch", "0:1", "-o", model],
        ["replay", model, recording, "--branch", "0:1", "-o", recording],
    ):
        assert main([str(w) for w in words]) == 2
        assert "is the source itself; give another name" in capsys.readouterr().err
    assert prompts.read_text("utf-8") == "Once\n"
    assert recording.read_text("utf-8") == stored
