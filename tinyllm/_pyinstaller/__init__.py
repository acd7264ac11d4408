"""What PyInstaller must know to freeze a program that uses tinyllm; it finds this by an entry point."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Where PyInstaller finds ``hook-tinyllm.py``."""
    return [str(Path(__file__).parent)]
