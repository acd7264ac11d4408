"""Golden files that lie packed in tests/data/models (``.gguf.xz``), unpacked when they are first asked for."""

from __future__ import annotations

import lzma
import shutil
import tempfile
from functools import cache
from pathlib import Path

MODELS = Path(__file__).parent / "data" / "models"
PACKED = sorted(p.name.removesuffix(".gguf.xz") for p in MODELS.glob("*.gguf.xz"))
FOLDER = tempfile.TemporaryDirectory(prefix="tinyllm-golden-", ignore_cleanup_errors=True)


@cache
def unpacked(name: str) -> Path:
    """The unpacked file, with its references (``.npz``) beside it."""
    path = Path(FOLDER.name) / f"{name}.gguf"
    path.write_bytes(lzma.decompress((MODELS / f"{name}.gguf.xz").read_bytes()))
    shutil.copyfile(MODELS / f"{name}.npz", path.with_suffix(".npz"))
    return path
