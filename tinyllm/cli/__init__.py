"""The command line: ``main`` runs one command."""

from .commands import main

__all__ = ["main"]
