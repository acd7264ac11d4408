"""Compiling kernels, one by one, when they are first needed, with a cache on disk.

A kernel is written ``def body(x, y, n, eps: f32, first, last, worker)``: it does the pieces [first, last) of
one instruction, whose arguments are what stands before. Compiled it is a C function ``(args, first, last,
worker)`` that finds them at the address ``args``. Callers name them (``Kernel``, ``Tape.add``).

``kernel(body, **names)`` compiles ``body``, and what it calls of its own file, with the given values in the
place of global names, so that one loop serves many micro-kernels.

The cache holds one object file for each kernel, with a hash of its bytes. It lives beside this file, or in the
user's cache folder when that is read-only, under a name made of all kernel sources, the version of llvmlite,
and the target processor: nothing stale is ever run. Files appear whole, so processes may share it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import ir

from ... import system
from ...errors import DeviceError
from . import emit, machine
from .source import source_of
from .translate import PyFunction, parameters, translate

Kinds = Mapping[str, ir.Type]  # types of a kernel's arguments by their names
GIVEN: Any = None  # stands for a global name whose value ``kernel`` is given

_kernels: dict[str, Kernel] = {}  # those in memory, by name
_functions: dict[str, Callable[[int, int, int, int], None]] = {}  # functions in memory, by name
_sources: dict[str, tuple[PyFunction, dict[str, Any], Kinds | None]] = {}  # what both were made of
compiled: list[str] = []  # those that were not in the cache
_lock = threading.RLock()
system.after_fork(_lock._at_fork_reinit)  # type: ignore[attr-defined]
_spent, _told = 0.0, False  # seconds of compiling so far; whether a line is open that says so
LINE = "tinyllm: compiling kernels for this processor (once):"
HASH = 32  # bytes before the machine code


class Kernel:
    """Machine code that does pieces of an instruction, and the names of the instruction's arguments.

    An argument is 8 bytes in memory: an integer, the address of an array or, if its kind is F32, a float32.
    """

    def __init__(self, name: str, address: int, kinds: Kinds) -> None:
        self.name, self.address, self.parameters = name, address, tuple(kinds)
        self.floats = tuple(name for name, kind in kinds.items() if kind == emit.F32)
        self._formats = ["f4x" if kind == emit.F32 else "q" for kind in kinds.values()]
        self._struct = struct.Struct("=" + "".join(self._formats))
        self._native = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int64] * 3)(address)

    def __call__(self, first: int, last: int, /, **args: Any) -> None:
        """Do some pieces here and now, as worker 0, without the interpreter's lock."""
        self._native(self.pack(**args), first, last, 0)

    def pack(self, **args: Any) -> bytes:
        """The arguments, numbers and addresses, as the kernel reads them; errors as of the two below."""
        memory = bytearray(8 * len(self.parameters))
        self.write(memory, 0, self.in_order(args))
        return bytes(memory)

    def in_order(self, args: Mapping[str, Any]) -> list[Any]:
        """The arguments in the order of the parameters; TypeError if names are missing or unknown."""
        try:
            values = list(map(args.__getitem__, self.parameters))
        except KeyError:
            raise self._misnamed(args) from None
        if len(values) != len(args):
            raise self._misnamed(args)
        return values

    def write(self, memory: Any, at: int, values: Sequence[Any]) -> None:
        """Write ordered values to a byte of some memory; TypeError if one is not of its parameter's kind."""
        try:
            self._struct.pack_into(memory, at, *values)
        except (struct.error, OverflowError, TypeError):
            raise self._unfit(values) from None

    def _misnamed(self, args: Mapping[str, Any]) -> TypeError:
        missing = ", ".join(n for n in self.parameters if n not in args) or "none"
        unknown = ", ".join(n for n in args if n not in self.parameters) or "none"
        takes = ", ".join(self.parameters)
        return TypeError(
            f"kernel {self.name} takes ({takes}); arguments missing: {missing}; unknown: {unknown}"
        )

    def _unfit(self, values: Sequence[Any]) -> TypeError:
        """The error for the first value that cannot be written."""
        fields = zip(self.parameters, self._formats, values, strict=True)
        for name, kind, v in fields:  # noqa: B007
            try:
                struct.pack(kind, v)
            except (struct.error, OverflowError, TypeError):
                break
        wanted = "an int64 or an address (a.ctypes.data of a NumPy array)"
        wanted = "a number that a float32 holds" if kind == "f4x" else wanted
        return TypeError(f"kernel {self.name}: {name} is {v!r:.100}; expected {wanted}")


def kernel(body: PyFunction, name: str | None = None, **names: Any) -> Kernel:
    """``body`` compiled with the global ``names`` replaced; ``name`` tells variants apart."""
    name = name or body.__name__
    with _lock:
        if name not in _kernels:
            kinds = parameters(body)
            _kernels[name] = Kernel(name, _load(body, name, names, kinds), kinds)
        return _kernels[name]


def function(
    body: PyFunction, name: str | None = None, **names: Any
) -> Callable[[int, int, int, int], None]:
    """A function of four integers, no kernel, compiled; a call releases the interpreter's lock."""
    name = name or body.__name__
    with _lock:
        if name not in _functions:
            native = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
            _functions[name] = native(_load(body, name, names, None))
        return _functions[name]


def _load(body: PyFunction, name: str, names: dict[str, Any], kinds: Kinds | None) -> int:
    _sources[name] = body, names, kinds
    return machine.load(name, _machine_code(body, name, names, kinds))


def assembly(name: str) -> str:
    """The instructions of a kernel in use, to read."""
    body, names, kinds = _sources[name]
    return machine.assembly(module_text(body, name, names, kinds))


def module_text(body: PyFunction, name: str, names: dict[str, Any], kinds: Kinds | None) -> str:
    """A kernel as LLVM IR."""
    return str(translate(body, name, emit.target()[0], kinds, names))


def _machine_code(body: PyFunction, name: str, names: dict[str, Any], kinds: Kinds | None) -> bytes:
    """From the cache, or compiled now and kept there."""
    folder = cache_folder()
    path = folder / f"{name}-{_origin(body)}.o" if folder else None
    if code := kept(path):
        return code
    _check_unchanged()
    start = time.perf_counter()
    code = machine.machine_code(module_text(body, name, names, kinds))
    compiled.append(name)
    _tell(time.perf_counter() - start)
    if path:
        with suppress(OSError):  # the disk is full, say: it only costs compiling again next time
            keep(path, code)
    return code


def _origin(body: PyFunction) -> str:
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


def kept(path: Path | None) -> bytes | None:
    """A file of the cache, if it is there and whole."""
    try:
        stored = path.read_bytes() if path else b""
    except OSError:
        return None
    code = stored[HASH:]
    return code if stored and hashlib.sha256(code).digest() == stored[:HASH] else None


def keep(path: Path, code: bytes) -> None:
    """Write a file that others see whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except BaseException:  # Ctrl-C, too
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
    kept = f"kept in {cache_folder()}"
    if cache_folder() is None:
        refused = " and ".join(map(str, _candidates()))
        kept = f"not kept: {refused} cannot be written; set TINYLLM_CACHE to a folder that can"
    return f"{len(compiled)} kernels compiled, {len(_sources)} in use, {kept}"


@lru_cache(1)
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None when no folder can be written."""
    _check_unchanged()
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
    triple, cpu, features = emit.target()
    parts = [sys.version, llvmlite.__version__, triple, cpu, *sorted(features)]
    return hashlib.sha256("\n".join([*parts, _sources_hash()]).encode()).hexdigest()[:16]


def _sources_hash() -> str:
    """A hash of the files of Python code beside this one."""
    digest = hashlib.sha256()
    for source in sorted(_package_files(), key=lambda f: f.name):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _check_unchanged() -> None:
    """DeviceError if the sources are not those that were imported: the two would make a kernel of both."""
    if _sources_hash() != _IMPORTED:
        raise DeviceError(
            f"the files in {Path(__file__).parent} changed while this program ran; start it again"
        )


def _package_files() -> list[Any]:
    """The files of Python code beside this one, compiled ones too; in a folder or in a zip."""
    folder: Any = Path(__file__).parent
    if not folder.is_dir():
        from importlib import resources

        folder = resources.files(__package__)
    return [f for f in folder.iterdir() if f.name.endswith((".py", ".pyc"))]


_IMPORTED = _sources_hash()
