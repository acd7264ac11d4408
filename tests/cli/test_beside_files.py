"""Adapters and control vectors on the command line reach each command that loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.arguments import Parser
from tinyllm.cli.commands import main
from tinyllm.cli.serving import check_loading, serve_arguments, settings_of
from tinyllm.errors import ArgumentError
from tinyllm.gguf.control import ControlVector
from tinyllm.research import Recording


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("beside") / "happy.gguf"
    with tinyllm.load() as m:
        m.control_vector(["I am happy"], ["I am sad"]).write(path)
    return str(path)


def settings(*argv: str) -> Any:
    parser = Parser()
    serve_arguments(parser)
    return settings_of(parser.parse_args(list(argv)))


def test_the_server_loads_with_what_it_was_given(vector: str) -> None:
    load = settings("--control", f"{vector}=2", "--control-layers", "1", "2", "--lora", "a").load
    assert load["control"] == [(vector, 2.0)]
    assert load["control_layers"] == (1, 2)
    assert load["lora"] == [("a", 1.0)]
    only = settings("--control", f"{vector}=2").load
    check_loading({"bundled": None}, only)
    with tinyllm.load(**only) as m, tinyllm.load(control=[(vector, 2)]) as same:
        options = {"max_tokens": 4, "temperature": 0}
        assert m.generate("Tom", **options).ids == same.generate("Tom", **options).ids
        assert m.network.adapters.control.keys() == same.network.adapters.control.keys()


def test_the_server_refuses_what_does_not_fit_each_model(tmp_path: Path) -> None:
    ControlVector({1: np.ones(3, np.float32)}).write(tmp_path / "small.gguf")
    for given in (
        ["--control", str(tmp_path / "small.gguf")],
        ["--control-layers", "1", "2"],
        ["--lora", str(tmp_path)],
    ):
        with pytest.raises(ArgumentError, match=r"bundled: .*every model that is served"):
            check_loading({"bundled": None}, settings(*given).load)


def test_a_map_with_a_control_vector_is_another_job(
    tmp_path: Path, vector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("Tom had\nLily\n", "utf-8")
    argv = ["map", "generate", str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), "-n", "3"]
    assert main(argv) == 0
    (journal,) = tmp_path.glob("*.job")
    assert "beside" not in json.loads(journal.read_bytes().splitlines()[0])
    assert main([*argv, "--control", vector]) == 2
    assert "beside" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    journal.unlink()
    assert main([*argv, "--control", f"{vector}=0.5"]) == 0
    assert main([*argv, "--control", f"{vector}=1"]) == 2
    capsys.readouterr()
    assert main([*argv, "--control", f"{vector}=0.5"]) == 0
    assert "whole already" in capsys.readouterr().err


def test_a_recording_with_a_control_vector_is_replayed(
    tmp_path: Path, vector: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("Tom had\n", "utf-8")
    out, beside = str(tmp_path / "r.json"), ["--control", vector, "--control-layers", "1", "2"]
    argv = ["record", str(tmp_path / "prompts.txt"), "-o", out, "-n", "4", *beside]
    assert main(argv) == 0
    assert main(["replay", out, *beside]) == 0
    capsys.readouterr()
    assert main(["replay", out]) == 1
    assert "changed: beside digest" in capsys.readouterr().out
    argv = ["replay", out, *beside, "--branch", "0:4", "-n", "6", "-o", str(tmp_path / "b.json")]
    assert main(argv) == 0
    assert len(Recording.read(tmp_path / "b.json").runs[1].ids) == 6


@pytest.mark.parametrize(
    "given",
    [["--put", "x"], ["--seed", "1"], ["-n", "4"], ["-o", "b"], ["--branch", "0:1", "--json"]],
)
def test_an_option_that_a_replay_would_not_use_is_refused(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "nothing.json", *given]) == 2
    assert "has no meaning with" in capsys.readouterr().err
