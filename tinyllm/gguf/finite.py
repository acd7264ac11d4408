"""NaN and infinity in the weights of a file, found without decoding them: only scales can hold either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, GGUFError
from . import quants
from .reader import GGUFFile
from .tensor import Tensor

MOST = float(np.finfo(np.float32).max)  # a scale, which kernels have as float32
PIECE = 16 << 20  # bytes read at a time
HALVES = np.dtype("<f2")


def check_finite(
    file: GGUFFile, progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
) -> None:
    """Read every tensor and refuse NaN and infinity.

    Parameters
    ----------
    file : GGUFFile
        Open.
    progress : callable, optional
        Wraps the tensors as they are gone through, to show a bar.

    Raises
    ------
    GGUFError
        Names the first such tensor, the byte of the block, and its weights.
    """
    for tensor in progress(file.tensors.values()):
        if tensor.type in quants.FORMATS:
            _check(tensor, quants.FORMATS[tensor.type])


def _check(tensor: Tensor, fmt: quants.Format) -> None:
    row_nbytes = tensor.row_nbytes
    for start, raw in _pieces(tensor):
        bad = _bad_blocks(fmt, raw)
        if len(bad):
            byte = start * row_nbytes + int(bad[0]) * fmt.type_size
            row, column = divmod(byte, row_nbytes)
            first = column // fmt.type_size * fmt.block_size
            raise GGUFError(
                f"row {row}, {_weights(first, fmt.block_size)}: NaN or infinity; expected finite numbers. "
                "The file is damaged: download or convert it again",
                path=tensor.path,
                offset=tensor.offset + byte,
                name=tensor.name,
            )


def _weights(first: int, n: int) -> str:
    return f"weight {first}" if n == 1 else f"weights {first} to {first + n - 1}"


def _pieces(tensor: Tensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(first row, rows of blocks) until all rows are read."""
    n_rows = tensor.n_elements // tensor.shape[-1]
    step = max(1, PIECE // tensor.row_nbytes)
    for start in range(0, n_rows, step):
        yield start, tensor.read_rows(start, min(start + step, n_rows))


def _bad_blocks(fmt: quants.Format, raw: NDArray[np.uint8]) -> NDArray[Any]:
    """Numbers of the blocks that hold NaN or infinity."""
    blocks = raw.reshape(-1).view(fmt.dtype)
    scales = _halves(fmt)
    if fmt.dtype == HALVES:
        bad = (blocks.view("<u2") & 0x7C00) == 0x7C00
    elif scales:  # times a small integer, a finite half is finite in float32
        bad = np.zeros(len(blocks), bool)
        for name in scales:
            bad |= ~np.isfinite(blocks[name])
    else:
        bad = ~np.isfinite(quants.dequantize(fmt.name, raw)).reshape(-1, fmt.block_size).all(-1)
    return np.flatnonzero(bad)


def _halves(fmt: quants.Format) -> list[str]:
    """The fields of a block that are its scales, where these are halves."""
    return [name for name, (kind, *_) in (fmt.dtype.fields or {}).items() if kind == HALVES]


def checked_scale(scale: Any, name: str = "lora") -> float:
    """The scale of what ``load`` takes by this name as a float; ArgumentError unless it is a finite number."""
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not -MOST <= scale <= MOST:
        raise ArgumentError(f"{name}: scale {scale!r:.40}; expected a finite number")
    return float(scale)
