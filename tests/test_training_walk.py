"""The walk of docs/howto/training.md, command by command; the training itself where torch is installed."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tinyllm.cli import main

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(DATA))
from make_adapters import STORED, write_adapter  # noqa: E402
from make_convert import write_safetensors  # noqa: E402

PAGE = (ROOT / "docs" / "howto" / "training.md").read_text("utf-8")
SCRIPT = ROOT / "docs" / "howto" / "train_tiny.py"
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
COMMANDS = [line.removeprefix("tinyllm ") for line in LINES if line.startswith("tinyllm ")]
TEXT = "Once upon a time there was a little cat. She had a red ball. " * 60


def stored_folder(folder: Path) -> None:
    """A folder like that of the script, of random weights."""
    model = STORED["models"]["llama"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model["config"]))
    for file, text in STORED["vocabularies"][model["vocabulary"]].items():
        (folder / file).write_bytes(text.encode("latin-1"))
    write_safetensors(folder / "model.safetensors", model["shapes"])


def test_each_command_of_the_walk_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads(gzip.decompress((DATA / "adapters.json.gz").read_bytes()))["llama-all"]
    stored_folder(tmp_path / "tiny")
    write_adapter(tmp_path / "adapter", stored["config"], stored["shapes"])
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0, command
    out = capsys.readouterr().out
    assert out.count("bits per weight") == 6  # five files written, one of them shown by info
    assert (tmp_path / "tiny.imatrix.gguf").exists()


def test_the_script_has_thirty_lines_and_its_page_names_it() -> None:
    code = [line for line in SCRIPT.read_text("utf-8").splitlines() if line.strip()]
    assert len(code) <= 31  # with its docstring
    assert f"python docs/howto/{SCRIPT.name}" in PAGE


@pytest.mark.skipif(
    not all(map(find_spec, ("torch", "transformers"))), reason="trains with torch and transformers"
)
def test_a_trained_model_converts_and_writes_what_it_learned(tmp_path: Path) -> None:
    import numpy as np
    import torch
    import transformers

    import tinyllm

    (tmp_path / "text.txt").write_text(TEXT)
    words = [sys.executable, str(SCRIPT), str(tmp_path / "text.txt"), str(tmp_path / "tiny"), "60"]
    subprocess.run(words, check=True, capture_output=True)
    tinyllm.convert(tmp_path / "tiny", tmp_path / "tiny.gguf", "F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    with tinyllm.load(tmp_path / "tiny.gguf", kv_type="f32") as m:
        ids = m.tokenizer.encode("Once upon a time there")
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(m.logits(ids) - expected).max() < 1e-4 * expected.std()
        text = m.generate("Once upon a time there", max_tokens=12, temperature=0).text
    assert "little cat" in text
