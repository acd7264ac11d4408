"""Rewriting a GGUF file with its matrices in other types."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NumericError
from ..files import check_apart
from . import quants
from .imatrix import Importance, check_covers, per_row, read_imatrix
from .mixtures import MIXTURES, is_matrix, plan
from .reader import GGUFFile, open_file
from .tensor import Tensor
from .writer import Deferred, write

_CHUNK = 1 << 20  # weights that a thread converts at a time
_AHEAD = 2 * (os.cpu_count() or 1)  # runs of them that wait to be written
Report = Callable[[str, str, str], object]
Rows = Callable[[int, int], npt.NDArray[np.float32]]  # first and last row -> [stop - start, n_in]


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    mixture: str = "Q4_K_M",
    *,
    requantize: bool = False,
    imatrix: Importance | str | os.PathLike[str] | None = None,
    keep: Sequence[str] = (),
    types: Mapping[str, str] | None = None,
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
    imatrix : path-like or Importance, optional
        How large the inputs of each matrix are, from ``tinyllm.imatrix``: larger ones count more.
    keep : sequence of str
        Regular expressions; tensors whose names have a match stay as they are.
    types : mapping of str to str, optional
        Regular expression -> type of the matrices whose names have a match, whatever the mixture says; the
        first that fits. Norms, routers and the like stay as they are.
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
        If the mixture is unknown, `n_threads` is below 1, `dst` is `src`, a tensor is quantised already, or an
        expression has no match.
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
        known = read_imatrix(imatrix) if isinstance(imatrix, str | os.PathLike) else imatrix
        if known is not None:
            check_covers(known, shapes)
        planned = plan(file.metadata, shapes, mixture, known is not None)
        planned = {n: planned.get(n, tensor.type) for n, tensor in file.tensors.items()}
        planned = _asked(file, planned, keep, types or {})
        if not requantize:
            _check_sources(file, planned)
        blocks = {
            n: deferred(t, planned[n], pool, report, importance=importance_of(known, t))
            for n, t in file.tensors.items()
        }
        beside = [imatrix] if isinstance(imatrix, str | os.PathLike) else []
        sources = [*file.paths, *beside]
        write(dst, _metadata(file, mixture), blocks, part_bytes=part_bytes, sources=sources)
    return planned


def _asked(
    file: GGUFFile, planned: Mapping[str, str], keep: Sequence[str], types: Mapping[str, str]
) -> dict[str, str]:
    """The types of a plan, less what the caller keeps and with what the caller chooses."""
    rules: list[tuple[re.Pattern[str], str | None]] = [(compiled(p), None) for p in keep]
    rules += [(compiled(pattern), kind.upper()) for pattern, kind in types.items()]
    asked = dict(planned)
    for pattern, kind in reversed(rules):
        names = [n for n in planned if pattern.search(n)]
        if not names:
            raise ArgumentError(f"no tensor's name has a match of {pattern.pattern!r:.60}")
        if kind is not None:  # norms, routers and the like have no other type in any mixture
            first = names[0]
            names = [n for n in names if is_matrix(n, file.tensors[n].shape)]
            if not names:
                raise ArgumentError(
                    f"{first} is no matrix that is quantised; {pattern.pattern!r:.60} has a match in no other"
                )
        for name in names:
            asked[name] = file.tensors[name].type if kind is None else kind
            if kind is not None and kind not in quants.FORMATS:
                written = ", ".join(k for k, f in quants.FORMATS.items() if f.quantize)
                raise ArgumentError(f"no type {kind!r:.20}; we write {written}")
            fmt, n = quants.FORMATS.get(asked[name]), file.tensors[name].shape[-1]
            if fmt is None or (kind is not None and (not fmt.quantize or n % fmt.block_size)):
                raise ArgumentError(f"{name}: rows of {n} values cannot be written as {kind!r:.20}")
    return asked


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; ArgumentError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ArgumentError(f"{pattern!r:.60} is no regular expression: {e}") from None


def importance_of(known: Importance | None, tensor: Tensor) -> Rows | None:
    """How much the weights of some rows of a tensor count, [1 or stop - start, n_in]; None: all alike."""
    means = None if known is None else known.means(tensor.name)
    if means is None:
        return None
    each = per_row(means, tensor.shape)
    assert each is not None  # check_covers has seen to it
    if len(each) == 1:
        return lambda start, stop: each
    return lambda start, stop: each[np.arange(start, stop) // tensor.shape[-2]]


def paths(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> tuple[str, str]:
    """A source and a target that is another file; ArgumentError if they are one."""
    a, b = os.path.expanduser(os.fspath(src)), os.path.expanduser(os.fspath(dst))
    check_apart(b, [a])
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
    added: Rows | None = None,
    importance: Rows | None = None,
) -> Deferred:
    """A tensor of a file in a new type, converted on all threads of the pool when it is written.

    ``added`` gives what is added to the values of some rows, ``importance`` how much their errors count.
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
            weights = None if importance is None else importance(start, stop)
            return quants.quantize(kind, values, weights).reshape(-1)
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
