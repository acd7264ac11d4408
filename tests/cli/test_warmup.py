"""``tinyllm warmup`` leaves nothing to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tinyllm.cli import commands as cli
from tinyllm.kernels.cpu import jit

USE = """
import tinyllm
from tinyllm.kernels.cpu import jit
m = tinyllm.load()
m.logits([1, 2, 3, 4, 5])
for n in (1, 2, 3, 5, 40):
    m.generate([7] * n, max_tokens=3, temperature=0)
m.generate(["one", "and two", "and a third"], max_tokens=3)
print(jit.compiled)
"""


def test_nothing_is_compiled_after_warming_up(tmp_path: Path) -> None:
    env = {**os.environ, "TINYLLM_CACHE": str(tmp_path)}
    for argv, said in ((["-m", "tinyllm", "warmup"], "ready on cpu; "), (["-c", USE], "[]\n")):
        run = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True)
        assert run.stdout.startswith(said), run.stderr


def test_an_encoder_is_warmed_up_and_the_folder_named(data: Path, capsys) -> None:
    model = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    assert cli.main(["warmup", str(model)]) == 0
    said = capsys.readouterr().out
    assert f"{len(jit.compiled)} kernels compiled" in said
    assert str(jit.cache_folder()) in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    env = {**os.environ, "TINYLLM_CACHE": str(file)}
    code = "from tinyllm.kernels.cpu import jit; print(jit.report())"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"not kept: {file} cannot be written; set TINYLLM_CACHE" in run.stdout, run.stderr


def test_the_reference_has_nothing_to_compile(capsys) -> None:
    assert cli.main(["warmup", "--device", "reference"]) == 0
    assert capsys.readouterr().out == "ready on reference, which compiles nothing\n"
