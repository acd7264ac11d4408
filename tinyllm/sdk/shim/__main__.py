"""``python -m tinyllm.sdk.shim``: run a program that imports gpt4all, unmodified, on tinyllm."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from . import install_as_gpt4all

USAGE = "usage: python -m tinyllm.sdk.shim PROGRAM.py | -m MODULE | CONSOLE-SCRIPT [ARGS]"


def main(argv: list[str]) -> None:
    """Run what ``argv`` names, with the rest of it as its arguments, as ``python`` itself would."""
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE + "\n")
        return
    if not argv or argv == ["-m"]:
        give_up(f"no program given; {USAGE}")
    name = argv[0]
    if name.startswith("-") and name != "-m":
        give_up(f"unknown option {name!r}; {USAGE}")
    install_as_gpt4all(replace=True)
    if name == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif os.path.exists(name):
        run_file(name, argv)
    else:
        run_script(name, argv)


def run_file(path: str, argv: list[str]) -> None:
    """Run a program's file, or a folder or archive with a ``__main__.py``."""
    sys.argv = [path, *argv[1:]]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def run_script(name: str, argv: list[str]) -> None:
    """Run what an installed package put on the PATH under this name."""
    sys.argv = list(argv)
    sys.path.pop(0)  # the folder that python -m adds; a script does not see it
    for script in entry_points(group="console_scripts", name=name):
        sys.exit(script.load()())
    beside = os.path.dirname(sys.executable)
    path = shutil.which(name, path=beside) or shutil.which(name)
    if path is None:
        give_up(f"there is no file and no console script {name!r}; {USAGE}")
    with open(path, "rb") as file:
        first = file.readline()
    if not first.startswith(b"#!") or b"python" not in first:
        give_up(f"{path} is no Python program")
    run_file(path, argv)


def give_up(why: str) -> NoReturn:
    sys.stderr.write(f"tinyllm.sdk.shim: {why}\n")
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
