"""Kernels of CUDA C and OpenCL C from outside, in the place of our own products."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ArgumentError, TinyLLMError
from ..outside import Outside
from .arrays import GPUArray, i32, u64
from .matmul import Job

if TYPE_CHECKING:
    from .backend import GPUBackend

THREADS, ROWS = 128, 1  # unless the declaration says otherwise


class OutsideProduct:
    """Products by a kernel from outside: a group computes ``rows`` outputs of one row of activations."""

    def __init__(self, be: GPUBackend, outside: Outside) -> None:
        self.be, self.outside = be, outside
        self.program = (f'#line 1 "{Path(outside.file).name}"\n{outside.text}',), ()
        self.threads = outside.options.get("threads", THREADS)
        self.rows = outside.options.get("rows", ROWS)

    def multiply(self, run: Sequence[Job], x: GPUArray, n_x: int) -> None:
        """Each matrix times n_x rows, a launch each."""
        for w, bias, y in run:
            shape = {"n_rows": i32(n_x), "n_in": i32(w.n_in), "n_out": i32(w.n_out)}
            known = {"w": w.buffer, "blocks": u64(w.total), "x": x, "y": y, "bias": bias, **shape}
            groups = -(-w.n_out // self.rows), n_x, 1
            args = (known[name] for name in self.outside.parameters)
            try:
                self.be.launch(self.program, self.outside.name, groups, (self.threads, 1, 1), *args)
            except TinyLLMError:
                raise
            except Exception as e:  # each driver has errors of its own
                raise ArgumentError(
                    f"{self.outside}: {self.be.name} does not run it with threads={self.threads}: {e}"
                ) from e
