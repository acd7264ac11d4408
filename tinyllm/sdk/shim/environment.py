"""`tinyllm shim on|off|status`: gpt4all answered by tinyllm in all programs of an environment.

Python runs the ``.pth`` files of an environment when it starts, also in child processes. Ours adds a finder,
which costs a fraction of a millisecond and imports nothing until gpt4all is asked for.
"""

from __future__ import annotations

import importlib.util
import os
import py_compile
import site
import sysconfig
from pathlib import Path

from ...errors import TinyLLMError
from ...files import replacing
from . import _real_package, finder

MODULE = "_tinyllm_gpt4all"


def turn_on() -> str:
    """Write the finder into the environment; a line that says what holds now.

    Raises
    ------
    TinyLLMError
        The environment cannot be written to, or tinyllm is here without its sources.
    """
    spec = importlib.util.find_spec(finder.__name__)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(finder.__name__)
    if source is None:
        raise TinyLLMError("tinyllm is installed without its sources, which `shim on` copies")
    home = Path(__file__).parents[3]
    start = f"import {MODULE}; {MODULE}.install({str(home)!r})\n"
    folder = _folder()
    try:
        for name, text in ((f"{MODULE}.py", source), (f"{MODULE}.pth", start)):
            with replacing(folder / name) as file:
                file.write(text.encode())
        py_compile.compile(str(folder / f"{MODULE}.py"), quiet=2)  # or each start would do it
    except OSError as error:
        raise TinyLLMError(f"{folder} cannot be written to ({error.strerror})") from error
    return status()


def turn_off() -> str:
    """Remove the finder from the environment; a line that says what holds now."""
    for path in _files():
        try:
            path.unlink(missing_ok=True)
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        except OSError as error:
            raise TinyLLMError(f"{path} cannot be removed ({error.strerror})") from error
    return status()


def status() -> str:
    """What ``import gpt4all`` finds in programs that start from now on, as a line."""
    found = [path for path in _files() if path.suffix == ".pth" and path.exists()]
    if found:
        return f"on: programs that import gpt4all find tinyllm ({found[0]})"
    real = "the gpt4all that is installed" if _real_package() else "nothing"
    return f"off: programs that import gpt4all find {real}"


def _folder() -> Path:
    """The environment's folder of packages; the user's own where that one is not his to write."""
    folder = Path(sysconfig.get_path("purelib"))
    if not os.access(folder, os.W_OK) and site.ENABLE_USER_SITE:
        folder = Path(site.getusersitepackages())
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files() -> list[Path]:
    """The files that `turn_on` may have written."""
    folders = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    return [folder / f"{MODULE}{suffix}" for folder in folders for suffix in (".pth", ".py")]
