"""Rewriting a GGUF file with its matrices in other types."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NumericError
from . import quants
from .mixtures import MIXTURES, plan
from .reader import GGUFFile, open_file
from .tensor import Tensor
from .writer import RawTensor, write

_CHUNK = 1 << 20  # weights that a thread converts at a time
Report = Callable[[str, str, str], object]


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    mixture: str = "Q4_K_M",
    *,
    requantize: bool = False,
    n_threads: int | None = None,
    report: Report | None = None,
) -> dict[str, str]:
    """Write a model again in another type or mixture of types.

    Parameters
    ----------
    src : path-like
        A GGUF file, or the first part of a split one.
    dst : path-like
        The file to write, in one part; it appears only when it is complete.
    mixture : str
        A key of `tinyllm.gguf.mixtures.MIXTURES`, such as ``"Q4_K_M"`` or ``"Q8_0"``.
    requantize : bool
        Also convert from one quantised type to another, which adds the errors of both.
    n_threads : int, optional
        All cores by default.
    report : callable, optional
        Called with the name, the old and the new type of each tensor when its turn comes.

    Returns
    -------
    dict
        The type of each tensor by name.

    Raises
    ------
    GGUFError
        If `src` is damaged.
    ArgumentError
        If the mixture is unknown, `n_threads` is below 1, `dst` is `src`, or a tensor is quantised already.
    NumericError
        If a weight is NaN, infinite, or too large for its new type.

    Examples
    --------
    >>> from tinyllm.gguf.quantize import quantize_file
    >>> types = quantize_file("model-f16.gguf", "model-q4.gguf", "Q4_K_M")  # doctest: +SKIP
    """
    src, dst = os.path.expanduser(src), os.path.expanduser(dst)
    if os.path.exists(dst) and os.path.samefile(src, dst):
        raise ArgumentError(f"{os.fsdecode(dst)} is the source itself; give another name")
    if n_threads is not None and n_threads < 1:
        raise ArgumentError(f"n_threads={n_threads}; expected at least 1, or None for all cores")
    with open_file(src) as file, ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        types = plan(file.metadata, shapes, mixture)
        types = {name: types.get(name, tensor.type) for name, tensor in file.tensors.items()}
        if not requantize:
            _check_sources(file, types)
        blocks = {n: _Blocks(t, types[n], pool, report) for n, t in file.tensors.items()}
        write(dst, _metadata(file, mixture), {n: b.as_raw() for n, b in blocks.items()})
    return types


def _check_sources(file: GGUFFile, types: dict[str, str]) -> None:
    for name, tensor in file.tensors.items():
        both = quants.FORMATS[tensor.type], quants.FORMATS[types[name]]
        if tensor.type != types[name] and all(f.int8_form for f in both):
            raise ArgumentError(
                f"{name} is {tensor.type} already; quantise from an F16 or F32 file, "
                "or say requantize=True (--requantize)"
            )


def _metadata(file: GGUFFile, mixture: str) -> dict[str, Any]:
    """The file's metadata, with new values where they say how the weights are stored."""
    kept = {k: v for k, v in file.exact_metadata.items() if not k.startswith("split.")}
    kept["general.file_type"] = np.uint32(MIXTURES[mixture].file_type)
    if quants.FORMATS[MIXTURES[mixture].base].int8_form:
        kept["general.quantization_version"] = np.uint32(2)
    return kept


class _Blocks:
    """The bytes of a tensor in its new type; converted when the writer turns them to an array."""

    def __init__(
        self, tensor: Tensor, kind: str, pool: ThreadPoolExecutor, report: Report | None
    ) -> None:
        self._tensor, self._kind, self._pool, self._report = tensor, kind, pool, report
        fmt, n = quants.FORMATS[kind], tensor.shape[-1]
        self._row_nbytes = n // fmt.block_size * fmt.type_size
        self._n_rows = tensor.n_elements // n
        self.nbytes = self._n_rows * self._row_nbytes

    def as_raw(self) -> RawTensor:
        return RawTensor(self._kind, self._tensor.shape, cast("npt.NDArray[np.uint8]", self))

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[np.uint8]:
        if self._report is not None:
            self._report(self._tensor.name, self._tensor.type, self._kind)
        if self._tensor.type == self._kind:
            return self._tensor.read()
        out = np.empty((self._n_rows, self._row_nbytes), np.uint8)
        step = max(1, _CHUNK // self._tensor.shape[-1])
        parts = (slice(i, i + step) for i in range(0, self._n_rows, step))
        for _ in self._pool.map(lambda part: self._convert(out[part], part.start), parts):
            pass  # the loop raises what a thread raised
        return out

    def _convert(self, out: npt.NDArray[np.uint8], start: int) -> None:
        raw = self._tensor.read_rows(start, start + len(out))
        try:
            out[:] = quants.quantize(self._kind, quants.dequantize(self._tensor.type, raw))
        except NumericError as error:
            raise NumericError(f"{self._tensor.name}: {error}") from error
