"""The GPT4All surface: `GPT4All`, `Embed4All`, and the shim that answers to ``import gpt4all``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpt4all import Embed4All, GPT4All
    from .llmodel import CancellationError
    from .shim import install_as_gpt4all

__all__ = ["CancellationError", "Embed4All", "GPT4All", "install_as_gpt4all"]

_HOME = {
    "CancellationError": "names",
    "Embed4All": "embed4all",
    "GPT4All": "gpt4all",
    "install_as_gpt4all": "shim",
}


def __getattr__(name: str) -> Any:
    """Import a class when it is first used: the download module alone needs no engine."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
