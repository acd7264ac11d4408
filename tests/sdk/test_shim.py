"""`import gpt4all` answered by tinyllm."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest

from tinyllm.errors import TinyLLMError
from tinyllm.sdk import GPT4All, install_as_gpt4all, shim
from tinyllm.sdk.shim import environment
from tinyllm.sdk.shim.finder import Finder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = str(Path(numpy.__file__).parents[1])


def test_the_names_resolve_to_ours() -> None:
    with install_as_gpt4all(replace=True):
        gpt4all = importlib.import_module("gpt4all")
        inner = importlib.import_module("gpt4all.gpt4all")
        low = importlib.import_module("gpt4all._pyllmodel")
        assert sorted(gpt4all.__all__) == ["CancellationError", "Embed4All", "GPT4All"]
        assert gpt4all.GPT4All is inner.GPT4All is GPT4All
        assert gpt4all._pyllmodel.LLModel is low.LLModel is inner.LLModel
        assert gpt4all.CancellationError is low.CancellationError
        assert importlib.import_module("gpt4all.pyllmodel") is low
        assert Path(gpt4all.__file__).is_file()
        assert (gpt4all.__name__, gpt4all.__version__) == ("gpt4all", "2.8.2")


def test_it_can_be_reloaded_and_patched() -> None:
    with install_as_gpt4all(replace=True):
        gpt4all = importlib.import_module("gpt4all")
        gpt4all.GPT4All = None
        assert importlib.reload(gpt4all) is gpt4all
        assert gpt4all.GPT4All is GPT4All
        with mock.patch("gpt4all.GPT4All.list_models", return_value=[]):
            assert gpt4all.GPT4All.list_models() == []
        answer = mock.Mock(status_code=200, json=lambda: [{"filename": "x.gguf"}])
        with (
            mock.patch("tinyllm.hub.catalogue._keep_list"),
            mock.patch("gpt4all.gpt4all.requests.get", return_value=answer) as get,
        ):
            assert gpt4all.GPT4All.list_models() == [{"filename": "x.gguf"}]
            assert get.call_count == 1
        for name in ("time.sleep", "sys", "os.path.exists", "tqdm", "LLModel", "Embed4All"):
            with mock.patch(f"gpt4all.gpt4all.{name}"):
                pass
        with mock.patch("gpt4all._pyllmodel.LLModel.prompt_model"):
            pass
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            gpt4all.gpt4all.nothing  # noqa: B018


def test_the_distribution_has_metadata() -> None:
    with install_as_gpt4all(replace=True):
        assert importlib.metadata.version("gpt4all") == "2.8.2"
        assert importlib.metadata.version("GPT4All") == "2.8.2"
        assert importlib.metadata.distribution("gpt4all").metadata["Name"] == "gpt4all"
        assert importlib.util.find_spec("gpt4all") is not None
        assert importlib.metadata.version("numpy")
        names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
        assert names.count("gpt4all") == 1


def test_metadata_is_ours_where_gpt4all_is_not_installed(tmp_path: Path) -> None:
    context = importlib.metadata.DistributionFinder.Context(path=[str(tmp_path)])
    (ours,) = shim.distributions(context)
    assert (ours.metadata["Name"], ours.version) == ("gpt4all", "2.8.2")
    (tmp_path / "gpt4all-2.0.2.dist-info").mkdir()
    assert list(shim.distributions(context)) == []


def test_uninstalling_restores_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type(sys)("gpt4all")
    monkeypatch.setitem(sys.modules, "gpt4all", fake)
    finders = list(sys.meta_path)
    handle = install_as_gpt4all(replace=True)
    assert install_as_gpt4all() is handle
    assert importlib.import_module("gpt4all") is not fake
    handle.uninstall()
    handle.uninstall()
    assert sys.modules["gpt4all"] is fake
    assert "gpt4all._pyllmodel" not in sys.modules
    assert sys.meta_path == finders


def test_a_real_installation_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt4all", type(sys)("gpt4all"))
    with pytest.raises(TinyLLMError, match=r"install_as_gpt4all\(replace=True\)"):
        install_as_gpt4all()


def test_without_one_nothing_has_to_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_real_package", lambda: False)
    with install_as_gpt4all():
        assert importlib.import_module("gpt4all").GPT4All is GPT4All


def test_an_assigned_directory_moves_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with install_as_gpt4all(replace=True):
        inner = importlib.import_module("gpt4all.gpt4all")
        monkeypatch.setattr(inner, "DEFAULT_MODEL_DIRECTORY", tmp_path)
        (tmp_path / "x.gguf").write_text("")
        assert inner.GPT4All.retrieve_model("x")["path"] == str(tmp_path / "x.gguf")


def test_importing_the_sdk_imports_nothing_heavy() -> None:
    code = (
        "import sys, tinyllm, tinyllm.sdk, tinyllm.hub.download\n"
        "heavy = {'numba', 'cupy', 'pyopencl', 'jinja2', 'requests'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- programs

PROGRAM = """
import sys, os
import gpt4all
print(__name__, gpt4all.GPT4All.__module__, sys.argv[1:], os.path.basename(sys.argv[0]))
"""


def python(*args: object, at: Path, executable: object = sys.executable, **environment: str) -> Any:
    """A finished Python process in the folder ``at``, which finds tinyllm and what it needs."""
    path = os.pathsep.join([str(ROOT), PACKAGES, str(at / "lib")])
    return subprocess.run(
        [str(executable), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=at,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with one program as file, module, package, folder and scripts."""
    lib = tmp_path / "lib"
    for path in ("program.py", "lib/module.py", "lib/package/__main__.py", "folder/__main__.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(PROGRAM)
    (lib / "package" / "__init__.py").write_text("")
    (lib / "scripted.py").write_text(f"def main():\n    exec({PROGRAM!r})\n    return 3\n")
    info = lib / "scripted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nmy-script = scripted:main\n")
    for name, first in (("plain-script", "#!/usr/bin/env python"), ("shell-script", "#!/bin/sh")):
        (lib / name).write_text(f"{first}\n{PROGRAM}")
        (lib / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("how", "name", "code"),
    [
        (["program.py"], "program.py", 0),
        (["lib/../program.py"], "program.py", 0),
        (["-m", "module"], "module.py", 0),
        (["-m", "package"], "__main__.py", 0),
        (["folder"], "folder", 0),
        (["my-script"], "my-script", 3),
        (["plain-script"], "plain-script", 0),
    ],
)
def test_a_program_runs_on_the_shim(how: list[str], name: str, code: int, programs: Path) -> None:
    path = f"{programs / 'lib'}{os.pathsep}{os.environ['PATH']}"
    done = python("-m", "tinyllm.sdk.shim", *how, "-m", "--help", "x", at=programs, PATH=path)
    module = "scripted" if how == ["my-script"] else "__main__"
    want = f"{module} tinyllm.sdk.gpt4all ['-m', '--help', 'x'] {name}\n"
    assert (done.stdout, done.returncode) == (want, code), done.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ([], "no program given"),
        (["-m"], "no program given"),
        (["-x"], "unknown option '-x'"),
        (["no-such"], "there is no file and no console script 'no-such'"),
        (["shell-script"], "shell-script is no Python program"),
    ],
)
def test_a_wrong_command_is_one_line(how: list[str], message: str, programs: Path) -> None:
    path = f"{programs / 'lib'}{os.pathsep}{os.environ['PATH']}"
    done = python("-m", "tinyllm.sdk.shim", *how, at=programs, PATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_help_and_a_programs_own_errors_are_shown(programs: Path) -> None:
    assert "CONSOLE-SCRIPT" in python("-m", "tinyllm.sdk.shim", "--help", at=programs).stdout
    (programs / "fails.py").write_text("import gpt4all\nraise SystemExit('its own words')")
    done = python("-m", "tinyllm.sdk.shim", "fails.py", at=programs)
    assert (done.returncode, done.stderr) == (1, "its own words\n")
    assert "No module named" in python("-m", "tinyllm.sdk.shim", "-m", "nil", at=programs).stderr


# ---- an environment


def test_an_environment_is_turned_on_and_off(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    own = next(p for p in (tmp_path / "env").glob("*/python*") if p.is_file())

    def run(*args: str) -> str:
        done = python(*args, at=tmp_path, executable=own)
        assert done.returncode == 0, done.stderr
        return done.stdout

    parent = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    child = "import gpt4all; print(gpt4all.GPT4All.__module__)"
    before = {p for p in (tmp_path / "env").rglob("*") if p.is_file()}
    assert run("-m", "tinyllm", "shim", "status").startswith("off: ")
    for _ in range(2):
        assert run("-m", "tinyllm", "shim", "on").startswith(
            "on: programs that import gpt4all find"
        )
    assert run("-c", parent, child) == "tinyllm.sdk.gpt4all\n"
    light = (
        "import sys; print([m for m in sys.modules if m.split('.')[0] in ('tinyllm', 'gpt4all')])"
    )
    assert run("-c", light) == "[]\n"
    install = (
        "from tinyllm.sdk import install_as_gpt4all as i\nwith i(replace=True): import gpt4all"
    )
    assert run("-c", install) == ""
    alone = python("-c", child, at=tmp_path, executable=own, PYTHONPATH=PACKAGES)
    assert alone.stdout == "tinyllm.sdk.gpt4all\n"  # the finder knows where tinyllm is
    listed = (
        "import importlib.metadata as m; from tinyllm.sdk import install_as_gpt4all as i; i(replace=True)\n"
        "print([d.metadata['Name'] for d in m.distributions()].count('gpt4all'))"
    )
    assert run("-c", listed) == "1\n"
    assert run("-m", "tinyllm", "shim", "status").startswith("on: ")
    for _ in range(2):
        assert run("-m", "tinyllm", "shim", "off").startswith("off: ")
    assert {p for p in (tmp_path / "env").rglob("*") if p.is_file()} == before


def test_where_tinyllm_was_removed_the_finder_finds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tinyllm.sdk.shim", None)
    with pytest.raises(ModuleNotFoundError):  # a damaged tinyllm is no absent one
        Finder().find_spec("gpt4all")
    monkeypatch.setattr(Finder, "_shim", lambda self: None)
    assert Finder().find_spec("gpt4all") is None
    assert list(Finder().find_distributions()) == []
    assert Finder().find_spec("numpy") is None


@pytest.mark.parametrize("do", [environment.turn_on, environment.turn_off])
def test_a_folder_that_cannot_be_written_to_is_named(
    do: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path / "file"))
    monkeypatch.setattr(environment.site, "ENABLE_USER_SITE", False)
    with pytest.raises(TinyLLMError, match="cannot be"):
        do()
