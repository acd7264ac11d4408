"""The program that `explain` shows is the one that runs; the page about the table has every row."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tinyllm import gguf
from tinyllm.cli.commands import main
from tinyllm.models.archs import ARCHS
from tinyllm.models.explain import example, explain, recorded, runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ARCHS)
def test_every_row_has_a_program(name: str) -> None:
    lines = "\n".join(explain(*example(name))).splitlines()
    assert lines[0].startswith(f"{name}  ({ARCHS[name].source})")
    assert lines[-1].strip().split()[0] in ("logits", "output_norm")
    for line in lines:
        if "=" in line.split("[")[0] and line.startswith("  "):
            assert re.search(r"\[T(, \d+)+\]$", line), line


def test_values_are_made_before_they_are_used() -> None:
    for name in ("gemma2", "qwen3next", "rwkv7", "deepseek2"):
        _, lines, _ = recorded(*example(name))
        list(explain(*example(name)))
        made = set()
        for line in lines:
            used = [v for v in line.operands if hasattr(v, "shape") and v.shape[:1] == ("T",)]
            assert all(id(v) in made or v.name in ("ids", "positions") for v in used)
            made.add(id(line.result))


def test_shows_what_distinguishes_a_layer() -> None:
    text = "\n".join(explain(*example("gemma2")))
    assert "layers 0, 2" in text
    assert "window 8, soft cap 5" in text
    assert "gelu_tanh(" in text
    assert "rows ids of token_embd * 8" in text


def test_explains_files_and_names(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "golden" / "models" / "llama-mixtral.gguf"
    assert main(["explain", str(path)]) == 0
    of_file = capsys.readouterr().out
    assert "best 2 by softmax of" in of_file
    with gguf.open(path) as f:
        assert of_file == "\n".join(explain(f.metadata, f.tensors)) + "\n"
    assert main(["explain", "bert"]) == 0
    assert "both ways" in capsys.readouterr().out


def test_runs_of_layers_are_short() -> None:
    assert runs([0, 1, 2, 5]) == "0 to 2, 5"


def test_the_page_has_every_row() -> None:
    spec = importlib.util.spec_from_file_location(
        "architectures", ROOT / "scripts/architectures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text("utf-8")
    assert script.unmentioned(page) == []
    row = next(line for line in page.splitlines() if line.startswith("| gemma2 |"))
    assert script.unmentioned(page.replace(row, "")) == ["gemma2"]
    worst = [float(x) for x in re.findall(r"\| (\d+e-\d+) \|$", page, re.M)]
    assert len(worst) == len(ARCHS)
    assert max(worst) <= 1e-4
