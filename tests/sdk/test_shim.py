"""`import gpt4all` answered by tinyllm."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm.errors import TinyLLMError
from tinyllm.sdk import GPT4All, install_as_gpt4all, shim


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


def test_the_distribution_has_metadata() -> None:
    with install_as_gpt4all(replace=True):
        assert importlib.metadata.version("gpt4all") == "2.8.2"
        assert importlib.metadata.version("GPT4All") == "2.8.2"
        assert importlib.metadata.distribution("gpt4all").metadata["Name"] == "gpt4all"
        assert importlib.util.find_spec("gpt4all") is not None
        assert importlib.metadata.version("numpy")


def test_uninstalling_restores_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type(sys)("gpt4all")
    monkeypatch.setitem(sys.modules, "gpt4all", fake)
    finders = list(sys.meta_path)
    handle = install_as_gpt4all(replace=True)
    assert install_as_gpt4all() is handle
    assert sys.modules["gpt4all"] is not fake
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
