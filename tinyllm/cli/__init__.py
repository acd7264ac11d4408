"""The command line: one function per command."""

from .commands import main

__all__ = ["main"]
