"""Compiling kernels, one by one, when they are first needed, with a cache on disk.

A kernel is a C function ``(args, first, last, worker)``: it does the pieces [first, last) of one
instruction, whose arguments are 64-bit values at the address ``args``. ``kernel(body, **names)`` compiles a
copy of ``body`` in which the given global names have the given values, so that one loop serves many
micro-kernels. (A closure would do the same, but numba's cache misses closures in the next process.)

The cache lives beside this file, or in the user's cache folder when that is read-only, under a name made
of all kernel sources, the versions of Python, numba and llvmlite, and the target processor: nothing stale is
ever run. numba's own cache folder, which belongs to the user, is restored after each compilation.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba import cfunc, types

from ...errors import DeviceError
from . import simd

SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64)
_kernels: dict[str, Any] = {}  # name -> the compiled object, kept alive with its machine code
_lock = threading.RLock()
_spent = 0.0  # seconds of compiling so far, to tell the user when it is many


def kernel(
    body: Callable, name: str | None = None, signature: Any = SIGNATURE, **names: Any
) -> int:
    """The address of ``body`` compiled with the global ``names`` replaced; ``name`` tells variants apart."""
    name = name or body.__name__
    with _lock:
        if name not in _kernels:
            _kernels[name] = _compile(_variant(body, name, names), signature)
        return _kernels[name].address


def _variant(body: Callable, name: str, names: dict[str, Any]) -> FunctionType:
    """A copy of a function under a name of its own, some of its globals replaced."""
    copy = FunctionType(body.__code__, {**body.__globals__, **names}, name)
    copy.__qualname__, copy.__module__ = name, body.__module__
    return copy


def _compile(function: FunctionType, signature: Any) -> Any:
    global _spent
    if numba.config.DISABLE_JIT:
        raise DeviceError("NUMBA_DISABLE_JIT is set; the cpu backend needs the compiler: unset it")
    start, folder = time.perf_counter(), cache_folder()
    try:
        compiled = _compiled(function, signature, folder)
    except Exception:  # a full disk, or a file that a crash cut short
        if folder is None:
            raise
        _remove(folder, function.__name__)
        compiled = _compiled(function, signature, None)
    _spent = _tell(_spent, _spent + time.perf_counter() - start)
    return compiled


def _compiled(function: FunctionType, signature: Any, folder: Path | None) -> Any:
    theirs = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = str(folder or "")
        return cfunc(signature, cache=folder is not None, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = theirs


def _remove(folder: Path, name: str) -> None:
    """Forget what the cache has of a kernel."""
    for path in folder.rglob(f"*.{glob.escape(name)}-*"):
        with suppress(OSError):
            path.unlink()


def _tell(before: float, after: float) -> float:
    """One line on a terminal's stderr when compiling begins to take long."""
    if before < 1.0 <= after and sys.stderr is not None and sys.stderr.isatty():
        print("tinyllm: compiling kernels for this processor (once) ...", file=sys.stderr)  # noqa: T201
    return after


@lru_cache(1)
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None when no folder can be written."""
    name = f"kernels-{_fingerprint()}"
    for parent in _candidates():
        folder = parent / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    return None


def _candidates() -> list[Path]:
    """TINYLLM_CACHE alone if set, else beside the sources, else the platform's cache folder."""
    if chosen := os.environ.get("TINYLLM_CACHE"):
        return [Path(chosen).expanduser()]
    home = Path.home()
    users = {
        "Windows": Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")),
        "Darwin": home / "Library" / "Caches",
    }.get(platform.system(), Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")))
    return [Path(__file__).parent / "__pycache__", users / "tinyllm"]


def _fingerprint() -> str:
    """A hash of everything that decides the machine code."""
    triple, cpu, features = simd.target()
    parts = [sys.version, numba.__version__, llvmlite.__version__, triple, cpu, *sorted(features)]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
