"""The tensor types of GGUF files: bytes <-> weights, in NumPy.

Every quantised format says the same thing in its own bit layout: a small integer code for each
weight, and for each group of neighbours a scale and perhaps a minimum,

    weight = scale * code + minimum.

`int8_form` returns these three, `dequantize` their product, `quantize` chooses them. One file
holds one family of formats: the layout of a block is a NumPy structured dtype, followed by the
functions that read and write it.

>>> raw = quantize("Q8_0", np.linspace(-1, 1, 32, dtype=np.float32))
>>> raw.shape, dequantize("Q8_0", raw)[-1]
((34,), np.float32(1.0000...))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, NumericError
from . import float as plain
from . import fp4, iquants, kquants, legacy, lowbit, ternary
from .format import Array, Codes, Floats, Format

__all__ = ["FORMATS", "Format", "dequantize", "int8_form", "quantize"]

FORMATS: dict[str, Format] = {
    f.name: f
    for family in (plain, legacy, kquants, iquants, ternary, fp4, lowbit)
    for f in family.FORMATS
}
_CHUNK = 1 << 17  # weights decoded at a time: the temporaries stay within a few MB


def dequantize(type_name: str, raw: NDArray[np.uint8]) -> Floats:
    """Decode rows of blocks, as they stand in the file, to weights.

    Parameters
    ----------
    type_name : str
        ggml's name of the type, a key of `FORMATS`.
    raw : uint8 array [..., row_bytes]
        Whole blocks of a little-endian file.

    Returns
    -------
    float32 array [..., n]
        Equal to the last bit to what ggml decodes.

    Raises
    ------
    ArgumentError
        For an unknown type, another dtype than uint8, or a part of a block.
    """
    fmt = _format(type_name)
    blocks = _blocks(fmt, raw)
    out = np.empty((blocks.size, fmt.block_size), np.float32)
    with np.errstate(all="ignore"):  # infinite and NaN scales decode as IEEE 754 says
        for part in _chunks(fmt, blocks.size):
            out[part] = fmt.dequantize(blocks[part])
    return out.reshape(*raw.shape[:-1], _n_weights(fmt, raw))


def int8_form(type_name: str, raw: NDArray[np.uint8]) -> tuple[Codes, Floats, Floats | None, int]:
    """Decode rows of blocks to integers and scales: what integer kernels multiply with.

    Parameters
    ----------
    type_name : str
        A quantised type of `FORMATS`.
    raw : uint8 array [..., row_bytes]
        Whole blocks.

    Returns
    -------
    codes : int8 array [..., n]
    scales : float32 array [..., n / group]
    minima : float32 array [..., n / group] or None
    group : int
        ``dequantize`` equals ``scales * codes + minima`` to the last bit, each scale and minimum
        standing for `group` neighbouring weights.

    Raises
    ------
    ArgumentError
        As `dequantize`, and for the types that are plain numbers.
    """
    fmt = _format(type_name)
    if fmt.int8_form is None:
        raise ArgumentError(f"{type_name} is not quantised and has no codes; use dequantize")
    blocks, lead, group = _blocks(fmt, raw), raw.shape[:-1], fmt.group_size
    n = _n_weights(fmt, raw)
    codes = np.empty((blocks.size, fmt.block_size), np.int8)
    scales = np.empty((blocks.size, fmt.block_size // group), np.float32)
    minima = None
    for part in _chunks(fmt, blocks.size):
        codes[part], scales[part], some = fmt.int8_form(blocks[part])
        if some is not None:
            minima = np.empty_like(scales) if minima is None else minima
            minima[part] = some
    per_group = (*lead, n // group)
    minima = None if minima is None else minima.reshape(per_group)
    return codes.reshape(*lead, n), scales.reshape(per_group), minima, group


def quantize(type_name: str, x: Floats) -> NDArray[np.uint8]:
    """Encode weights: a least-squares choice of scales, not ggml's bits.

    Parameters
    ----------
    type_name : str
        A type of `FORMATS` whose `quantize` is not None.
    x : float32 array [..., n]
        n is a multiple of the block size.

    Returns
    -------
    uint8 array [..., row_bytes]

    Raises
    ------
    ArgumentError
        For an unknown type, one that we cannot write, or a row that is no whole number of blocks.
    NumericError
        If a quantised row holds NaN or infinity, or a value too large for the format.
    """
    fmt = _format(type_name)
    if fmt.quantize is None:
        raise ArgumentError(f"cannot write {type_name}; choose one of {_names(writable=True)}")
    x = np.ascontiguousarray(x, np.float32)
    if not x.ndim or x.shape[-1] % fmt.block_size:
        raise ArgumentError(f"{type_name} needs rows of whole {fmt.block_size}s, not {x.shape}")
    if fmt.int8_form is not None and not np.isfinite(x).all():
        raise NumericError(f"cannot quantise NaN or infinity to {type_name}")
    blocks, groups = np.empty(x.size // fmt.block_size, fmt.dtype), x.reshape(-1, fmt.block_size)
    try:
        with np.errstate(over="raise"):
            for part in _chunks(fmt, blocks.size):
                blocks[part] = fmt.quantize(groups[part])
    except FloatingPointError as error:
        raise NumericError(f"a value is too large for {type_name}: {np.abs(x).max()}") from error
    return blocks.view(np.uint8).reshape(
        *x.shape[:-1], x.shape[-1] // fmt.block_size * fmt.type_size
    )


def _format(type_name: str) -> Format:
    if type_name not in FORMATS:
        raise ArgumentError(f"unknown tensor type {type_name!r}; known are {_names()}")
    return FORMATS[type_name]


def _names(writable: bool = False) -> str:
    return ", ".join(f.name for f in FORMATS.values() if f.quantize or not writable)


def _blocks(fmt: Format, raw: NDArray[np.uint8]) -> Array:
    """View rows of bytes as blocks [N]."""
    if raw.dtype != np.uint8 or not raw.ndim or raw.shape[-1] % fmt.type_size:
        raise ArgumentError(
            f"{fmt.name} needs uint8 rows of whole {fmt.type_size}-byte blocks,"
            f" not {raw.dtype} {raw.shape}"
        )
    return np.ascontiguousarray(raw).reshape(-1).view(fmt.dtype)


def _n_weights(fmt: Format, raw: NDArray[Any]) -> int:
    return int(raw.shape[-1]) // fmt.type_size * fmt.block_size


def _chunks(fmt: Format, n_blocks: int) -> Iterator[slice]:
    step = _CHUNK // fmt.block_size
    return (slice(i, i + step) for i in range(0, n_blocks, step))
