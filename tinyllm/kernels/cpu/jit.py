"""Compiling kernels, one by one, when they are first needed, with a cache on disk.

A kernel is a C function ``(args, first, last, worker)``: it does the pieces [first, last) of one
instruction, whose arguments are 64-bit values at the address ``args``. ``kernel(body, **names)`` compiles
``body`` with the given values in the place of its global names, so that one loop serves many micro-kernels.

The cache holds one object file for each kernel, with a hash of its bytes. It lives beside this file, or in the
user's cache folder when that is read-only, under a name made of all kernel sources, the version of llvmlite,
and the target processor: nothing stale is ever run. Files appear whole, so processes may share it.
"""

from __future__ import annotations

import hashlib
import os
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

from ... import system
from . import machine, simd
from .translate import source_of, translate

_addresses: dict[str, int] = {}  # of the kernels in memory, by name
_sources: dict[str, tuple[Callable, dict[str, Any]]] = {}  # what they were made of
compiled: list[str] = []  # those that were not in the cache
_lock = threading.RLock()
system.after_fork(_lock._at_fork_reinit)  # type: ignore[attr-defined]
_spent, _told = 0.0, False  # seconds of compiling so far; whether a line is open that says so
LINE = "tinyllm: compiling kernels for this processor (once):"
HASH = 32  # bytes before the machine code


def kernel(body: Callable, name: str | None = None, **names: Any) -> int:
    """The address of ``body`` compiled with the global ``names`` replaced; ``name`` tells variants apart."""
    name = name or body.__name__
    with _lock:
        if name not in _addresses:
            _sources[name] = body, names
            _addresses[name] = machine.load(name, _machine_code(body, name, names))
        return _addresses[name]


def assembly(name: str) -> str:
    """The instructions of a kernel in use, to read."""
    body, names = _sources[name]
    return machine.assembly(module_text(body, name, names))


def module_text(body: Callable, name: str, names: dict[str, Any]) -> str:
    """A kernel as LLVM IR."""
    variant = FunctionType(
        body.__code__, {**body.__globals__, **names}, name, None, body.__closure__
    )
    return str(translate(variant, name, simd.target()[0]))


def _machine_code(body: Callable, name: str, names: dict[str, Any]) -> bytes:
    """From the cache, or compiled now and kept there."""
    folder = cache_folder()
    path = folder / f"{name}-{_origin(body)}.o" if folder else None
    if code := _kept(path):
        return code
    start = time.perf_counter()
    code = machine.machine_code(module_text(body, name, names))
    compiled.append(name)
    _tell(time.perf_counter() - start)
    if path:
        with suppress(OSError):  # the disk is full, say: it only costs compiling again next time
            _keep(path, code)
    return code


def _origin(body: Callable) -> str:
    """A name of the file in which a kernel stands, for those from outside that of its content."""
    source = Path(body.__code__.co_filename)
    if source.parent == Path(__file__).parent:
        return source.stem
    return f"{source.stem}-{hashlib.sha256(source_of(body).encode()).hexdigest()[:16]}"


def can_compile() -> bool:
    """Whether the sources of the kernels came with the package; a program frozen to bytecode may lack them."""
    try:
        return bool(source_of(can_compile))
    except OSError:
        return False


def _kept(path: Path | None) -> bytes | None:
    """A file of the cache, if it is there and whole."""
    try:
        stored = path.read_bytes() if path else b""
    except OSError:
        return None
    code = stored[HASH:]
    return code if stored and hashlib.sha256(code).digest() == stored[:HASH] else None


def _keep(path: Path, code: bytes) -> None:
    """Write a file that others see whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _tell(seconds: float) -> None:
    """On a terminal's stderr, a line that counts once compiling takes more than a second."""
    global _spent, _told
    _spent += seconds
    if _spent > 1.0 and sys.stderr is not None and sys.stderr.isatty():
        print(f"\r{LINE} {len(compiled)}", end="", file=sys.stderr, flush=True)  # noqa: T201
        _told = True


def end_line() -> None:
    """Kernels are compiled for now: what follows on the terminal begins a line."""
    global _told
    if _told:
        print(f" in {_spent:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
        _told = False


def report() -> str:
    """How many kernels are in use, and where they are kept."""
    folder = cache_folder() or "nowhere: set TINYLLM_CACHE to a folder that can be written"
    return f"{len(compiled)} kernels compiled, {len(_addresses)} in use, kept in {folder}"


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
    """TINYLLM_CACHE alone if set, else beside the sources, else the user's cache folder."""
    beside = [] if os.environ.get("TINYLLM_CACHE") else [Path(__file__).parent / "__pycache__"]
    return [*beside, system.cache_folder()]


def _fingerprint() -> str:
    """A hash of everything that decides the machine code."""
    triple, cpu, features = simd.target()
    parts = [sys.version, llvmlite.__version__, triple, cpu, *sorted(features)]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(_package_files(), key=lambda f: f.name):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _package_files() -> list[Any]:
    """The files of Python code beside this one, compiled ones too; in a folder or in a zip."""
    folder: Any = Path(__file__).parent
    if not folder.is_dir():
        from importlib import resources

        folder = resources.files(__package__)
    return [f for f in folder.iterdir() if f.name.endswith((".py", ".pyc"))]
