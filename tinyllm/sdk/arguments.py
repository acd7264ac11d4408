"""Checks of arguments; what is wrong is said with the name that the caller used."""

from __future__ import annotations

import operator
import os
from pathlib import Path

from ..errors import ArgumentError

LARGEST = (1 << 31) - 1


def whole(name: str, value: object, least: int = -LARGEST, most: int = LARGEST) -> int:
    """A whole number in a range; ArgumentError, naming the argument, for anything else."""
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        if least <= (n := operator.index(value)) <= most:
            return n
    limits = f" from {least} to {most}" if least > -LARGEST else ""
    raise ArgumentError(f"{name}={value!r:.80}; expected a whole number{limits}")


def path_of(name: str, value: object) -> str:
    """A file name or path as text; ArgumentError for anything else."""
    if isinstance(value, (str, Path)) or hasattr(value, "__fspath__"):
        path = os.fspath(value)
        if isinstance(path, str) and path:
            return path
    raise ArgumentError(f"{name}={value!r:.80}; expected the name or the path of a file")
