"""Answers from one's own documents: folders are read into one SQLite file, searched, and quoted to a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answering import Answer
    from .collections import Collection, LocalDocs
    from .search import Hit
    from .updating import Report

__all__ = ["Answer", "Collection", "Hit", "LocalDocs", "Report"]

_HOMES = {
    "Answer": "answering",
    "Collection": "collections",
    "Hit": "search",
    "LocalDocs": "collections",
    "Report": "updating",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the process that reads documents needs none of them."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
