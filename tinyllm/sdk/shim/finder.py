"""Finds the package gpt4all, and its metadata, in tinyllm.

Nothing is imported before a program asks for gpt4all. `tinyllm shim on` copies this file into an environment,
where it has to work by itself.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution
    from types import ModuleType
    from typing import Any


class Finder:
    """An entry of `sys.meta_path`; ``home`` is the folder of tinyllm, for programs that do not find it."""

    stands_for_gpt4all = True

    def __init__(self, home: str = "") -> None:
        self.home = home

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "ModuleSpec | None":
        """The module gpt4all; its submodules are there once it is imported."""
        if name != "gpt4all" or (shim := self._shim()) is None:
            return None
        found: ModuleSpec = shim.spec_of_gpt4all()
        return found

    def find_distributions(self, context: "Any" = None) -> "Iterable[Distribution]":
        """What `importlib.metadata` tells of gpt4all, once, however many of these finders there are."""
        name = getattr(context, "name", None)
        ours = [f for f in sys.meta_path if hasattr(f, "stands_for_gpt4all")]
        if ours and ours[0] is not self:
            return ()
        if (name or "gpt4all").lower() != "gpt4all" or (shim := self._shim()) is None:
            return ()
        found: Iterable[Distribution] = shim.distributions(context)
        return found

    def invalidate_caches(self) -> None:
        """Nothing is kept."""

    def _shim(self) -> "ModuleType | None":
        """tinyllm's side of it; None when tinyllm was removed."""
        for folder in ("", self.home):
            if folder and folder not in sys.path:
                sys.path.append(folder)
            try:
                import tinyllm.sdk.shim
            except ModuleNotFoundError as error:
                if error.name != "tinyllm":
                    raise
            else:
                return tinyllm.sdk.shim
        return None


def install(home: str) -> None:
    """Let ``import gpt4all`` find tinyllm from now on; once, though some Pythons read a .pth file twice."""
    if not any(hasattr(finder, "stands_for_gpt4all") for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(home))
