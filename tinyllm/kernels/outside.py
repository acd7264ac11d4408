"""Kernels from outside: which operations they may replace, and files that declare them.

A Python file declares a kernel by ``@tinyllm.kernel("matvec", "Q4_K")`` over a function, plain or of numba;
a file of CUDA C or OpenCL C by a comment line of that form before the function. docs/lab.md has examples.
Parameters are taken by their names, in any order: ``OPERATIONS`` lists those that each operation offers.
"""

from __future__ import annotations

import ast
import hashlib
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArgumentError
from ..gguf.quants import FORMATS

Function = TypeVar("Function", bound=Callable[..., Any])
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "exp")
_NORM = ("x", "y", "w", "bias", "n", "eps", "w_period", "b_period")
_MATRIX = ("w", "y", "x", "records", "bias", "n_in", "n_out", "tile_bytes", "n_blocks")


@dataclass(frozen=True)
class Operation:
    """An operation that can be replaced; the names are those of a kernel's parameters."""

    kinds: tuple[str, ...]  # what it is declared for: formats, activations
    cpu: tuple[str, ...]
    needed: tuple[str, ...]  # by every kernel of the CPU
    gpu: tuple[str, ...] = ()  # all are needed


_FORMATS = tuple(name for name in FORMATS if name not in ("F64", "I8", "I16", "I32", "I64"))
_GPU_MATRIX = ("w", "blocks", "x", "y", "bias", "n_rows", "n_in", "n_out")
OPERATIONS = {
    "matvec": Operation(_FORMATS, _MATRIX, ("w", "y"), _GPU_MATRIX),
    "matmul": Operation(
        _FORMATS, (*_MATRIX, "n_tokens", "scratch", "scratch_bytes"), ("w", "y"), _GPU_MATRIX
    ),
    "rms_norm": Operation(("",), _NORM, _NORM),
    "act": Operation(ACTIVATIONS, ("x", "up", "y", "n"), ("x", "up", "y", "n")),
}
FLOATS = ("eps",)  # parameters that are float32; the others are int64
SCRATCH = 1 << 16  # bytes for each thread, what ``scratch_bytes`` says


@dataclass(frozen=True)
class Outside:
    """A kernel as a file declares it."""

    operation: str
    kind: str
    name: str
    file: str
    function: Any = None  # None where it is written in C
    text: str = ""  # the whole file, where it is written in C
    language: str = "python"  # or "cuda", "opencl", "both"
    parameters: tuple[str, ...] = ()  # names, where it is written in C
    options: dict[str, int] = field(default_factory=dict, hash=False)  # threads and rows of a group

    @property
    def key(self) -> tuple[str, str]:
        return self.operation, self.kind

    @property
    def mark(self) -> str:
        """A name that no other kernel has, nor this one after an edit of its file."""
        text = self.text or Path(self.file).read_text("utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return "_".join(filter(None, (self.name, self.operation, self.kind, digest)))

    def __str__(self) -> str:
        return f"{Path(self.file).name}: {self.name}, {self.operation} {self.kind}".rstrip()


_declared: list[tuple[str, str, Any]] = []


def kernel(operation: str, kind: str = "") -> Callable[[Function], Function]:
    """Declare that a function is a kernel for an operation, where ``load`` and ``tinyllm lab`` find it.

    Parameters
    ----------
    operation : {"matvec", "matmul", "rms_norm", "act"}
        What it computes.
    kind : str
        The format of the weights, such as "Q4_K"; for "act" the activation; none for "rms_norm".

    Raises
    ------
    ArgumentError
        There is no such operation, or it is not for this kind.
    """
    check(operation, kind, "@tinyllm.kernel")

    def declare(function: Function) -> Function:
        if not (callable(function) and hasattr(function, "__name__")):
            raise ArgumentError(f"@tinyllm.kernel is over {function!r:.60}; expected a function")
        _declared.append((operation, kind, function))
        return function

    return declare


def check(operation: str, kind: str, where: str) -> None:
    """ArgumentError unless an operation can be replaced for a kind."""
    if operation not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise ArgumentError(f"{where}: operation {operation!r:.40}; expected one of {known}")
    kinds = OPERATIONS[operation].kinds
    if kind not in kinds:
        expected = ", ".join(kinds) if kinds != ("",) else "none"
        raise ArgumentError(f"{where}: {operation} for {kind!r:.40}; expected one of {expected}")


def read_kernels(files: Sequence[str | Path]) -> list[Outside]:
    """The kernels that files declare.

    Raises
    ------
    ArgumentError
        A file declares none, or is neither of Python nor of C; a declaration is wrong.
    """
    found = []
    for file in map(Path, files):
        some = _of_python(file) if file.suffix == ".py" else _of_c(file)
        if not some:
            raise ArgumentError(
                f'{file} declares no kernel; expected @tinyllm.kernel("matvec", "Q4_0") over a function, '
                "in a file of C a comment line of that form"
            )
        found += some
    twice = {k.key for k in found if [o.key for o in found].count(k.key) > 1}
    for operation, kind in twice:
        names = ", ".join(k.name for k in found if k.key == (operation, kind))
        raise ArgumentError(f"several kernels for {operation} {kind}: {names}; give one at a time")
    return found


def _of_python(file: Path) -> list[Outside]:
    if not file.is_file():
        raise ArgumentError(f"{file}: no such file; expected one that declares kernels")
    from .cpu import emit

    emit.target()  # what LLVM does not know would end the process as soon as numba compiles
    before = len(_declared)
    try:
        runpy.run_path(str(file), run_name=f"tinyllm_kernels_{file.stem}")
        found = _declared[before:]
    except (Exception, SystemExit) as e:  # the file is a program: it may raise anything
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""  # a SyntaxError names its own
        name = "" if isinstance(e, ArgumentError) else f"{type(e).__name__}: "
        raise ArgumentError(f"{file}{where}: {name}{e}") from e
    finally:
        del _declared[before:]
    return [
        Outside(operation, kind, function.__name__, str(file), function)
        for operation, kind, function in found
    ]


DECLARATION = re.compile(
    r"^\s*(?://|/\*|\*)\s*@tinyllm\.kernel\((?P<what>[^)]*)\).*?\n"
    r"(?P<before>.*?)\bvoid\s+(?P<name>\w+)\s*\((?P<parameters>[^)]*)\)",
    re.M | re.S,
)


def _of_c(file: Path) -> list[Outside]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ArgumentError(f"{file}: {e}") from e
    language = "cuda" if "__global__" in text else "opencl" if "__kernel" in text else "both"
    found = []
    for match in DECLARATION.finditer(text):
        positional, options = _call(match["what"], str(file))
        operation, kind = (*positional, "")[:2] if positional else ("", "")
        check(operation, kind, str(file))
        wanted = OPERATIONS[operation].gpu
        names = tuple(re.findall(r"(\w+)\s*(?:,|$)", match["parameters"].strip()))
        if not wanted:
            raise ArgumentError(f"{file}: {operation} is replaced on the CPU only")
        if sorted(names) != sorted(wanted):
            raise ArgumentError(
                f"{file}: {match['name']} takes ({', '.join(names)}); "
                f"expected ({', '.join(wanted)}) in any order"
            )
        found.append(
            Outside(operation, kind, match["name"], str(file), None, text, language, names, options)
        )
    return found


def _call(text: str, where: str) -> tuple[list[str], dict[str, int]]:
    """The arguments of a declaration in a comment."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        positional = [str(ast.literal_eval(a)) for a in call.args]
        options = {str(k.arg): int(ast.literal_eval(k.value)) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as e:
        raise ArgumentError(f"{where}: @tinyllm.kernel({text}) is not understood: {e}") from e
    if unknown := options.keys() - {"threads", "rows"}:
        raise ArgumentError(f"{where}: unknown {', '.join(unknown)}; expected threads=, rows=")
    if min(options.values(), default=1) < 1:
        raise ArgumentError(f"{where}: threads and rows are at least 1")
    return positional, options
