"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tinyllm.cli import commands as cli
from tinyllm.gguf import quants
from tinyllm.models.archs import ARCHS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^(?:.*&& )?tinyllm (.*)$", README, re.M)


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    name, *args = shlex.split(line, comments=True)
    if name != "chat":
        cli.COMMANDS[name].parser(name).parse_intermixed_args(args)


@pytest.mark.parametrize("code", [c for c in PYTHON if "tinyllm.load()" in c])
def test_python_runs_on_a_real_model(code, capsys, smollm2):
    code = code.replace("tinyllm.load()", f"tinyllm.load({str(smollm2)!r})")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith(("run", "info", "tokenize"))])
def test_commands_run_on_a_real_model(line, capsys, smollm2):
    argv = [
        str(smollm2) if word == "model.gguf" else word for word in shlex.split(line, comments=True)
    ]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out


def test_there_is_something_to_run():
    assert PYTHON
    assert COMMANDS


def test_named_files_exist():
    names = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"^(scripts/\w+)$", README, re.M)
    assert names
    assert [n for n in names if not (ROOT / n).exists()] == []


@pytest.mark.parametrize(
    ("caption", "names"), [("formats", list(quants.FORMATS)), ("architectures", sorted(ARCHS))]
)
def test_the_table_lists_what_there_is(caption, names):
    line = f"| {caption} | {' '.join(names)} |"
    assert line in README.splitlines(), f"README.md should have the line\n{line}"
