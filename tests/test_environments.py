"""``tinyllm run`` where programs are run: with Python's own options, by users without a home."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tinyllm"
RUN = ["run", "Once upon a time", "-n", "4", "--temperature", "0"]
SOMEBODY = 54321  # a number that no user has
PRINTED = "Once upon a time, there was a"

# The interpreter and what is installed may lie where only root can read: modules are imported before.
AS_SOMEBODY = f"""
import importlib, os, pkgutil, sys
import tinyllm
for module in pkgutil.walk_packages(tinyllm.__path__, "tinyllm."):
    apart = ("bridge", "cuda", "opencl", "__main__", "_pyinstaller")
    if not any(word in module.name for word in apart):
        importlib.import_module(module.name)
os.setgroups([])
os.setgid({SOMEBODY})
os.setuid({SOMEBODY})
sys.exit(importlib.import_module("tinyllm.cli").main(sys.argv[1:]))
"""


def python(*argv: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python; a variable that is None is taken out of the environment."""
    env = {"PYTHONPATH": str(PACKAGE.parent), **{k: v for k, v in environment.items() if v}}
    kept = {k: v for k, v in os.environ.items() if k not in environment}
    return subprocess.run(
        [sys.executable, *argv], env={**kept, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-W", "error"], ["-X", "dev"], ["-bb"]])
def test_run_works_with_pythons_options(options: list[str]) -> None:
    done = python(*options, "-m", "tinyllm", *RUN)
    assert (done.stdout, done.stderr, done.returncode) == (PRINTED + "\n", "", 0)


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that every user can read, with a copy of the package that nothing was compiled for."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(PACKAGE, folder / "tinyllm", ignore=shutil.ignore_patterns("__pycache__"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("home", [None, "none", "readable"])
def test_run_works_as_a_user_without_a_home_to_write_to(home: str | None, anyones: Path) -> None:
    (anyones / "readable").mkdir()
    (anyones / "tmp").mkdir()
    (anyones / "tmp").chmod(0o1777)
    before = {p for p in anyones.rglob("*") if "__pycache__" not in p.parts}
    nowhere = {"XDG_CACHE_HOME": None, "TINYLLM_CACHE": None, "TMPDIR": str(anyones / "tmp")}
    done = python(
        "-c", AS_SOMEBODY, *RUN, **nowhere,
        HOME=home and str(anyones / home), PYTHONPATH=str(anyones),
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == (PRINTED + "\n", "", 0)
    new = {p for p in anyones.rglob("*") if "__pycache__" not in p.parts} - before
    if (
        home is None
    ):  # what was compiled is kept among the temporary files, in a folder of this user
        assert (anyones / "tmp" / f"tinyllm-{SOMEBODY}").stat().st_uid == SOMEBODY
    else:
        assert new == set()
