"""``import gpt4all`` answered by tinyllm: opt in, and reversible.

Three ways in: `install_as_gpt4all` for this process, ``python -m tinyllm.sdk.shim PROGRAM`` for one program,
and ``tinyllm shim on`` for an environment and its child processes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import TinyLLMError
from ..closing import Closing
from .finder import Finder

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

    Call it before the programs that import gpt4all; nothing is imported before they do. The distribution
    metadata that some of them ask for (`importlib.metadata.version("gpt4all")`) is answered too, unless a
    gpt4all that is installed answers it.

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


class Shim(Closing):
    """The modules and the metadata that stand for gpt4all."""

    def __init__(self) -> None:
        self._hidden = {name: sys.modules.pop(name) for name in _loaded()}
        self._finder: Any = Finder()
        sys.meta_path.insert(0, self._finder)

    def uninstall(self) -> None:
        """Undo it: what was imported or installed before is found again."""
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


def _real_package() -> bool:
    """Is another gpt4all imported, or would one be?"""
    if (module := sys.modules.get("gpt4all")) is not None:
        return not isinstance(getattr(module, "__loader__", None), _Loader)
    others = [f for f in sys.meta_path if not hasattr(f, "stands_for_gpt4all")]
    return any(f.find_spec("gpt4all", None) for f in others if hasattr(f, "find_spec"))


def spec_of_gpt4all() -> importlib.machinery.ModuleSpec:
    """What the import system needs to know of ``gpt4all``; its file is this one."""
    spec = importlib.machinery.ModuleSpec("gpt4all", _Loader(), origin=__file__, is_package=True)
    spec.has_location = True
    return spec


class _Loader(importlib.abc.Loader):
    """Fills the module ``gpt4all``, and fills it again when it is reloaded."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        home = import_module("tinyllm.sdk.gpt4all")
        names: dict[str, Any] = {name: getattr(home, name) for name in EXPORTS}
        for name, target in MODULES.items():
            names[name.partition(".")[2]] = sys.modules[name] = import_module(target)
        module.__doc__ = "tinyllm's GPT4All classes, under the name that programs import."
        vars(module).update(names, __version__=VERSION, __all__=list(EXPORTS))


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


def distributions(
    context: importlib.metadata.DistributionFinder.Context | None = None,
) -> Iterable[importlib.metadata.Distribution]:
    """The distribution gpt4all; none where one is installed, which is found by itself."""
    where = {} if context is None else {"path": context.path}
    real = importlib.metadata.DistributionFinder.Context(name="gpt4all", **where)
    if not any(importlib.metadata.MetadataPathFinder.find_distributions(real)):
        yield _Distribution()
