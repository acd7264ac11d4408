"""Rewriting a GGUF file with its matrices in other types."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NumericError
from . import quants
from .mixtures import MIXTURES, plan
from .reader import GGUFFile, open_file
from .tensor import Tensor
from .writer import Deferred, write

_CHUNK = 1 << 20  # weights that a thread converts at a time
_AHEAD = 2 * (os.cpu_count() or 1)  # runs of them that wait to be written
Report = Callable[[str, str, str], object]
Added = Callable[[int, int], npt.NDArray[np.float32]]  # first and last row -> [stop - start, n_in]


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    mixture: str = "Q4_K_M",
    *,
    requantize: bool = False,
    n_threads: int | None = None,
    part_bytes: int | None = None,
    report: Report | None = None,
) -> dict[str, str]:
    """Write a model again in another type or mixture of types.

    Parameters
    ----------
    src : path-like
        A GGUF file, or the first part of a split one.
    dst : path-like
        The file to write; it appears only when it is complete.
    mixture : str
        A key of `tinyllm.gguf.mixtures.MIXTURES`, such as ``"Q4_K_M"`` or ``"Q8_0"``.
    requantize : bool
        Also convert from one quantised type to another, which adds the errors of both.
    n_threads : int, optional
        All cores by default.
    part_bytes : int, optional
        Split the new file into parts with about so many bytes each.
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
    >>> import tinyllm
    >>> types = tinyllm.quantize("model-f16.gguf", "model-q4.gguf", "Q4_K_M")  # doctest: +SKIP
    """
    src, dst = paths(src, dst)
    check_threads(n_threads)
    with open_file(src) as file, ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        types = plan(file.metadata, shapes, mixture)
        types = {name: types.get(name, tensor.type) for name, tensor in file.tensors.items()}
        if not requantize:
            _check_sources(file, types)
        blocks = {n: deferred(t, types[n], pool, report) for n, t in file.tensors.items()}
        write(dst, _metadata(file, mixture), blocks, part_bytes=part_bytes)
    return types


def paths(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> tuple[str, str]:
    """A source and a target that is another file; ArgumentError if they are one."""
    a, b = os.path.expanduser(os.fspath(src)), os.path.expanduser(os.fspath(dst))
    if os.path.exists(b) and os.path.samefile(a, b):
        raise ArgumentError(f"{b} is the source itself; give another name")
    return a, b


def check_threads(n: int | None) -> None:
    """ArgumentError unless a number of threads is one, or None."""
    if n is not None and n < 1:
        raise ArgumentError(f"n_threads={n}; expected at least 1, or None for all cores")


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


def deferred(
    tensor: Tensor,
    kind: str,
    pool: ThreadPoolExecutor,
    report: Report | None,
    added: Added | None = None,
) -> Deferred:
    """A tensor of a file in a new type, converted on all threads of the pool when it is written.

    ``added`` gives what is added to the values of some rows.
    """

    def pieces() -> Iterator[npt.NDArray[np.uint8]]:
        if report is not None:
            report(tensor.name, tensor.type, kind)
        return in_order(pool, lambda a, b: convert(a, b), row_runs(tensor.shape))

    def convert(start: int, stop: int) -> npt.NDArray[np.uint8]:
        raw = tensor.read_rows(start, stop)
        if tensor.type == kind and added is None:
            return raw.reshape(-1)
        try:
            values = quants.dequantize(tensor.type, raw)
            values = values if added is None else values + added(start, stop)
            return quants.quantize(kind, values).reshape(-1)
        except NumericError as error:
            raise NumericError(f"{tensor.name}: {error}") from error

    return Deferred(kind, tensor.shape, pieces)


def row_runs(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last row of runs of about a million weights of a tensor."""
    n_rows, step = math.prod(shape[:-1]), max(1, _CHUNK // shape[-1])
    return [(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def in_order(
    pool: ThreadPoolExecutor,
    make: Callable[[int, int], npt.NDArray[np.uint8]],
    runs: Sequence[tuple[int, int]],
) -> Iterator[npt.NDArray[np.uint8]]:
    """What `make` makes of each run of rows, in their order; a few runs ahead, not all, are in memory."""
    ahead: deque[Future[npt.NDArray[np.uint8]]] = deque()
    for run in runs:
        ahead.append(pool.submit(make, *run))
        if len(ahead) > _AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
