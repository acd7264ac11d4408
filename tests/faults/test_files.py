"""A model file that is cut, overwritten, replaced or removed while it loads and afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm import loading as module
from tinyllm.errors import GGUFError

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the bundled model."""
    return Path(shutil.copy(module.BUNDLED, tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def expected() -> str:
    return str(tinyllm.load().generate("Once", **GREEDY))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.open("wb").close()


def overwrite(path: Path) -> None:
    """Other weights in place, as of a download that goes on."""
    with path.open("r+b") as f:
        f.seek(-100_000, os.SEEK_END)
        f.write(bytes(100_000))


def append(path: Path) -> None:
    with path.open("ab") as f:
        f.write(bytes(32))


def replace(path: Path) -> None:
    """Another file under the same name."""
    other = path.with_name("other")
    other.write_bytes(b"GGUF, but not the model that was here")
    other.replace(path)


def after_a_layer(
    damage: Callable[[Path], None], path: Path
) -> Callable[[Any, int], Iterable[Any]]:
    """What ``load`` shows progress with: it does the damage once one layer is loaded."""

    def progress(layers: Iterable[Any], n: int) -> Iterator[Any]:
        for i, layer in enumerate(layers):
            if i == 1:
                damage(path)
            yield layer

    return progress


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("damage", [cut, empty, overwrite, append])
def test_writing_to_a_file_that_loads_is_an_error(
    path: Path, damage: Callable[[Path], None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "loading", after_a_layer(damage, path))
    with pytest.raises(GGUFError, match=r"has shrunk|was written to") as caught:
        tinyllm.load(path, device)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("damage", [replace, Path.unlink])
def test_a_file_that_loads_may_be_replaced(
    path: Path, damage: Callable[[Path], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "loading", after_a_layer(damage, path))
    assert str(tinyllm.load(path).generate("Once", **GREEDY)) == expected


AFTERWARDS = """
import sys
from pathlib import Path
import test_files, tinyllm
path = Path(sys.argv[1])
models = [tinyllm.load(path, device) for device in ("cpu", "reference")]
for damage in (test_files.overwrite, test_files.cut, test_files.empty, Path.unlink):
    damage(path)
    for model in models:
        print(model.generate("Once", **test_files.GREEDY))
for model in models:
    model.close()
"""


def test_a_loaded_model_does_not_need_its_file(path: Path, expected: str) -> None:
    """In another process: what reads a mapped file that was cut dies of SIGBUS."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", AFTERWARDS, path], env=env, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"{expected}\n" * 8
