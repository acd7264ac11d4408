"""Type checkers see the public surface as its users do."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
USERS = [HERE / "script.py", HERE / "surface.py"]


def strict_mypy(*files: Path) -> subprocess.CompletedProcess[str]:
    """Run ``mypy --strict`` as in a user's project: without our settings, errors in tinyllm itself hidden."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
    ]
    return subprocess.run(
        [*command, *map(str, files)], cwd=HERE.parent.parent, capture_output=True, text=True
    )


def test_a_users_script_is_accepted_and_the_surface_has_its_types():
    run = strict_mypy(*USERS)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_wrong_use_is_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import tinyllm\n\nnumber: int = tinyllm.load().generate('a')\n", "utf-8")
    run = strict_mypy(wrong)
    assert run.returncode == 1
    assert "Incompatible types in assignment" in run.stdout, run.stdout + run.stderr


@pytest.mark.filterwarnings(
    "default"
)  # the bundled model is short of the context that is asked for
def test_the_script_runs(capsys):
    runpy.run_path(str(HERE / "script.py"), run_name="__main__")
    assert "was a little girl" in capsys.readouterr().out


def test_pyright_agrees(tmp_path):
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    settings = tmp_path / "pyrightconfig.json"
    settings.write_text(
        json.dumps(
            {
                "include": [os.path.relpath(file, tmp_path) for file in USERS],
                "extraPaths": [str(HERE.parent.parent)],
                "typeCheckingMode": "strict",
                "reportUnnecessaryTypeIgnoreComment": "error",
            }
        ),
        "utf-8",
    )
    run = subprocess.run(
        [pyright, "--pythonpath", sys.executable, "--project", str(settings)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
