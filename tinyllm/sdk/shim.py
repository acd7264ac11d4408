"""Let ``import gpt4all`` find tinyllm's classes, where a program asks for it, until it is undone."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import TinyLLMError
from .closing import Closing

VERSION = "2.8.2"
EXPORTS = ("CancellationError", "Embed4All", "GPT4All")
MODULES = {
    "gpt4all.gpt4all": "tinyllm.sdk.gpt4all",
    "gpt4all._pyllmodel": "tinyllm.sdk.llmodel",
    "gpt4all.pyllmodel": "tinyllm.sdk.llmodel",
}

_installed: Shim | None = None


def install_as_gpt4all(replace: bool = False) -> Shim:
    """Make ``import gpt4all`` find tinyllm's classes in this process.

    Call it before the programs that import gpt4all. The distribution metadata that some of them ask for
    (`importlib.metadata.version("gpt4all")`) is answered too.

    Parameters
    ----------
    replace : bool
        Hide a gpt4all package that is installed or already imported.

    Returns
    -------
    Shim
        Its `uninstall` undoes everything; it is a context manager too.

    Raises
    ------
    TinyLLMError
        The real package is there, and ``replace`` is false.

    Examples
    --------
    >>> from tinyllm.sdk import install_as_gpt4all
    >>> with install_as_gpt4all(replace=True):
    ...     import gpt4all
    ...     gpt4all.GPT4All.__module__
    'tinyllm.sdk.gpt4all'
    """
    global _installed
    if _installed is not None:
        return _installed
    if not replace and _real_package():
        raise TinyLLMError(
            "the gpt4all package is installed; uninstall it, or call install_as_gpt4all(replace=True)"
        )
    _installed = Shim()
    return _installed


def _real_package() -> bool:
    return "gpt4all" in sys.modules or importlib.util.find_spec("gpt4all") is not None


class Shim(Closing):
    """The modules and the metadata that stand for gpt4all."""

    def __init__(self) -> None:
        self._hidden = {name: sys.modules.pop(name) for name in _loaded()}
        sys.modules["gpt4all"] = _package()
        for name, target in MODULES.items():
            sys.modules[name] = import_module(target)
        self._finder = _Finder()
        sys.meta_path.insert(0, self._finder)

    def uninstall(self) -> None:
        """Let ``import gpt4all`` find again what was imported or installed before."""
        global _installed
        if _installed is not self:
            return
        _installed = None
        sys.meta_path.remove(self._finder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(self._hidden)

    close = uninstall  # at the end of a with block


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "gpt4all"]


def _package() -> ModuleType:
    """The module ``gpt4all``."""
    package = ModuleType("gpt4all", "tinyllm's GPT4All classes, under the name programs import.")
    package.__path__ = []
    package.__spec__ = importlib.machinery.ModuleSpec("gpt4all", None, is_package=True)
    package.__version__ = VERSION  # type: ignore[attr-defined]
    package.__all__ = list(EXPORTS)  # type: ignore[attr-defined]
    home = import_module("tinyllm.sdk.gpt4all")
    for name in EXPORTS:
        setattr(package, name, getattr(home, name))
    for name, target in MODULES.items():
        setattr(package, name.partition(".")[2], import_module(target))
    return package


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` is told about gpt4all."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: gpt4all\nVersion: {VERSION}\n"
            "Summary: tinyllm, standing for gpt4all\n",
            "top_level.txt": "gpt4all\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the distribution; the modules are in sys.modules already."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        return self._found(None if context is None else context.name)

    def _found(self, name: str | None) -> Iterator[importlib.metadata.Distribution]:
        if name is None or name.lower() == "gpt4all":
            yield _Distribution()
