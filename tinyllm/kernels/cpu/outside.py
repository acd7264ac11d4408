"""Kernels from outside in the place of our own: compiled by our translator, or by numba, and recorded."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from ...errors import ArgumentError, DeviceError
from ..outside import FLOATS, OPERATIONS, SCRATCH, Outside
from . import elementwise, jit, matmul
from .program import CPUArray, Tape
from .weights import CPUWeight


@dataclass(frozen=True)
class Replacement:
    """A kernel that is used instead of one of ours."""

    outside: Outside
    kernel: jit.Kernel

    @property
    def wants_records(self) -> bool:
        """Whether it reads int8 records, not floats."""
        return "records" in self.kernel.parameters

    def add(self, tape: Tape, pieces: int, chunk: int, joins: bool, args: dict[str, Any]) -> None:
        """Record it with those of the arguments that it names."""
        own = {name: args[name] for name in self.kernel.parameters}
        tape.add(self.kernel, pieces, chunk, joins, **own)

    def record(
        self,
        tape: Tape,
        w: CPUWeight,
        x: CPUArray,
        bias: CPUArray | None,
        n_workers: int,
        joins: bool,
    ) -> CPUArray:
        """Record y = x w^T + bias for a product; a piece is a tile of 16 rows of w."""
        n_tokens = x.shape[0]
        forms = matmul.prepare(tape, w, x)
        y = tape.array((n_tokens, -(-w.n_out // 16) * 16 if n_tokens == 1 else w.n_out))
        y.shape = (n_tokens, w.n_out)
        args: dict[str, Any] = {"w": w, "x": forms, "records": forms, "y": y, "bias": bias}
        args |= {"n_in": w.n_in, "n_out": w.n_out, "n_tokens": n_tokens}
        args |= {"tile_bytes": w.tile_bytes, "n_blocks": w.n_blocks}
        if "scratch" in self.kernel.parameters:
            args["scratch"] = tape.array((n_workers, SCRATCH), "u1")
        args["scratch_bytes"] = SCRATCH
        self.add(tape, w.n_tiles, matmul.chunk(w.n_tiles), joins, args)
        if bias is not None and "bias" not in self.kernel.parameters:
            sizes: dict[str, Any] = {"n": w.n_out, "y_step": 0, "scale": 1.0}
            tape.add(jit.kernel(elementwise.add), n_tokens, 1, False, x=y, y=bias, out=y, **sizes)
        return y


def compiled(kernels: Sequence[Outside]) -> dict[tuple[str, str], Replacement]:
    """The kernels of Python among some, by operation and kind.

    Raises
    ------
    ArgumentError
        One does not compile, or its parameters are not those of its operation.
    """
    found = {}
    for outside in kernels:
        if outside.function is not None:
            found[outside.key] = Replacement(outside, _checked(outside, _compile(outside)))
    return found


def _compile(outside: Outside) -> jit.Kernel:
    function = outside.function
    try:
        if isinstance(function, FunctionType):
            return jit.kernel(function, outside.mark)
        from . import numba_door  # a second, and only where it is wanted

        return numba_door.compile(function, outside.mark)
    except DeviceError:  # numba is not there, say: nothing is wrong with the kernel
        raise
    except Exception as e:  # numba's own tree of errors, ours for what the subset does not have
        raise ArgumentError(f"{outside}: {complaint(str(e), outside.file)}") from e


COLOUR = re.compile(r"\x1b\[[0-9;]*m")
AROUND = re.compile(
    r"\s*(?:There are \d+ candidate|During: |File \")"
)  # what follows numba's reason


def complaint(message: str, file: str) -> str:
    """What a compiler says about a kernel of a file: the reason, and the line of the file if it names one.

    numba's messages have colours, the stages of its own work, and all that it could have called instead.
    """
    text = COLOUR.sub("", message)
    if "Failed in nopython mode pipeline" not in text:
        return text
    lines = [line for line in text.splitlines() if not line.startswith("Failed in nopython mode")]
    end = next((i for i, line in enumerate(lines) if AROUND.match(line)), len(lines))
    reason = " ".join(" ".join(lines[:end]).split())
    place = re.search(rf'File "[^"]*{re.escape(Path(file).name)}", line (\d+)', text)
    if place is None:
        return reason
    return f"{reason}; line {place[1]}: {linecache.getline(file, int(place[1])).strip()}"


def _checked(outside: Outside, kernel: jit.Kernel) -> jit.Kernel:
    """The kernel, if it can be given all that it asks for."""
    operation, names = OPERATIONS[outside.operation], kernel.parameters
    unknown = [name for name in names if name not in operation.cpu]
    missing = [name for name in operation.needed if name not in names]
    if outside.operation in ("matvec", "matmul"):
        missing += [] if {"x", "records"} & set(names) else ["x or records"]
        if "records" in names and ("x" in names or outside.kind in ("F32", "F16", "BF16")):
            unknown.append("records beside x" if "x" in names else "records of float weights")
    if unknown or missing:
        raise ArgumentError(
            f"{outside}: takes ({', '.join(names)}); missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(unknown) or 'none'}; expected some of ({', '.join(operation.cpu)})"
        )
    for name in names:
        if (name in kernel.floats) != (name in FLOATS):
            found, wanted = ("f32", "none") if name in kernel.floats else ("none", f"{name}: f32")
            raise ArgumentError(f"{outside}: {name} has the annotation {found}; expected {wanted}")
    return kernel
