"""What the pages of docs show is run, and what they quote is there."""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.cli import commands as cli
from tinyllm.errors import DeviceError
from tinyllm.loading import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cpu.md"
TEXT = PAGE.read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^python (benchmarks/.*)$", TEXT, re.M)


def test_the_page_of_cpu_kernels_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    names: dict[str, object] = {}
    for code in PYTHON:
        if file := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / file[1]).write_text(code, "utf-8")
        else:
            exec(compile(code, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "unknown: out" in out
    assert "GB/s; reading alone" in out


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_run(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--seconds", "0.01"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    table = re.search(r"```\n(avx512vnni.*?)```", TEXT, re.S)
    assert table
    shown, found = table[1].splitlines(), capsys.readouterr().out.splitlines()
    assert [s.split("|")[:2] for s in shown[1:]] == [s.split("|")[:2] for s in found[1:]]


def test_the_page_quotes_the_source() -> None:
    source = (ROOT / "tinyllm/kernels/cpu/formats.py").read_text("utf-8")
    quoted = re.findall(r"```\n(def .*?)```", TEXT, re.S)
    assert quoted
    assert [q for q in quoted if q not in source] == []


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`((?:tinyllm|benchmarks|tests|kernels)/[\w./]+)`", TEXT)
    named += [
        f"tinyllm/kernels/cpu/{n}"
        for n in re.findall(r"`(\w+\.py)`", TEXT)
        if "test_" not in n and n != "mine.py"
    ]
    named = [n if not n.startswith("kernels/") else f"tinyllm/{n}" for n in named]
    assert len(named) > 20
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_every_file_of_cpu_kernels_is_on_the_page() -> None:
    files = {p.name for p in (ROOT / "tinyllm/kernels/cpu").glob("*.py")} - {"__init__.py"}
    assert files - set(re.findall(r"`(\w+\.py)`", TEXT)) == set()


# ---- docs/one-token.md

WALK = (ROOT / "docs" / "one-token.md").read_text("utf-8")
EXCERPTS = re.findall(r"```python\n# (\S+)\n(.*?)```", WALK, re.S)


@pytest.mark.parametrize(("path", "excerpt"), EXCERPTS, ids=lambda text: text.splitlines()[0])
def test_the_walk_quotes_the_source(path: str, excerpt: str) -> None:
    assert excerpt in (ROOT / path).read_text("utf-8")


def test_the_walk_counts_as_the_script_does() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "files_of_a_token.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert f"```\n{printed}```" in WALK
    for line in printed.splitlines():
        count, most = map(int, re.findall(r"\d+", line))
        assert count <= most, line


# ---- docs/structured.md

STRUCTURED = ROOT / "docs" / "structured.md"


def test_the_page_of_structured_output_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", STRUCTURED.read_text("utf-8"), re.S):
        exec(compile(code, str(STRUCTURED), "exec"), names)
    assert capsys.readouterr().out


# ---- all pages

PAGES = sorted((ROOT / "docs").rglob("*.md"))
RAY = [ROOT / "docs" / "api" / "ray.md", ROOT / "docs" / "scale.md"]
APART = {
    *RAY,
    PAGE,
    STRUCTURED,
    ROOT / "docs" / "bfloat16.md",
    ROOT / "docs" / "one-token.md",
    ROOT / "docs" / "server.md",  # in tests/server
}  # they have tests of their own, above
NEEDS = {"guide.md": "llguidance", "api/model.md": "llguidance", "api/plots.md": "matplotlib"}
RUN = [p for p in PAGES if p not in APART and "```python" in p.read_text("utf-8")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "docs").as_posix()


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_the_code_of_a_page_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = NEEDS.get(name_of(path))
    if need and find_spec(need) is None:
        pytest.skip(f"{name_of(path)} needs {need}")
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.S):
        exec(compile(code, str(path), "exec"), names)


def test_the_code_of_the_page_of_bfloat16_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gguf.open(BUNDLED) as file:
        halves = {n: t.dequantize().astype(np.float16) for n, t in file.tensors.items()}
        gguf.write(tmp_path / "model-f16.gguf", file.exact_metadata, halves)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "bfloat16.md").read_text("utf-8")
    try:
        exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    except DeviceError as error:
        pytest.skip(str(error))


def commands(path: Path) -> list[str]:
    """Lines of a page's blocks that call tinyllm."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [re.match(r"(?:python -m )?tinyllm (.+)", line) for line in lines]
    return [m[1] for m in found if m and "." * 3 not in m[1]]


@pytest.mark.parametrize(
    ("path", "line"), [(p, c) for p in PAGES for c in commands(p)], ids=lambda x: str(x)[-60:]
)
def test_a_command_of_a_page_parses(path: Path, line: str) -> None:
    name, *args = shlex.split(line.partition(" | ")[0], comments=True)
    if name != "chat":
        cli.COMMANDS[name].parser(name).parse_intermixed_args(args)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_scripts_that_a_page_calls_are_there(path: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)
    called = re.findall(
        r"^(?:python )?((?:benchmarks|scripts|training|docs)/\S+)", "\n".join(blocks), re.M
    )
    assert [name for name in called if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_on_a_page_is_marked_as_such(path: Path) -> None:
    bare = re.findall(r"^```\n(.*?)^```", path.read_text("utf-8"), re.S | re.M)
    assert [code for code in bare if re.match(r"(import|from) \w+", code)] == []


@pytest.mark.parametrize("path", RAY, ids=name_of)
def test_the_code_of_a_page_of_ray_runs_up_to_ray(path: Path) -> None:
    """What it takes from tinyllm is there, and takes such arguments; jobs have tests in tests/clusters."""
    pytest.importorskip("ray", reason="these pages need ray")
    for code in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.S):
        lines = code.splitlines(keepends=True)
        ours = [line for line in lines if line.startswith("from tinyllm")]
        names: dict[str, Any] = {}
        exec("".join(ours), names)
        called = {name: names[name] for name in ("application", "per_node") if name in names}
        stand_ins = {name: create_autospec(f, return_value={}) for name, f in called.items()}
        names |= stand_ins | {"ray": MagicMock(), "serve": MagicMock()}
        exec("".join(line for line in lines if not re.match(r"(import|from) ", line)), names)


MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in sorted((ROOT / "tinyllm").rglob("*.py"))
    if ">>> " in p.read_text("utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name: str) -> None:
    found = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
