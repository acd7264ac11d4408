"""The tensor types of GGUF files: bytes <-> weights, in NumPy.

Every quantised format says the same thing in its own bit layout: a small integer code for each
weight, and for each group of neighbours a scale and perhaps a minimum,

    weight = scale * code + minimum.

`int8_form` returns these three, `dequantize` the weights, `quantize` chooses them. One file holds
one family of formats: the layout of a block is a NumPy structured dtype, followed by the
functions that read and write it.

======================  =====  ==============  ===========================================
types                   group  codes           scale of a group
======================  =====  ==============  ===========================================
Q4_0 Q5_0 Q8_0 Q8_1        32  -8..7 to int8   half
Q4_1 Q5_1                  32  0..15, 0..31    half; minimum half
Q2_K                       16  0..3            half x 4 bits; minimum half x 4 bits
Q3_K Q6_K                  16  -4..3 -32..31   half x 6 bits signed, x int8
Q4_K Q5_K                  32  0..15, 0..31    half x 6 bits; minimum half x 6 bits
Q8_K                      256  int8            float
IQ4_NL IQ4_XS              32  -127..113       half, half x 6 bits signed: 16 uneven steps
IQ3_S IQ3_XXS              32  +-15, +-62      half x odd 4-bit number; rows of 4
IQ2_XXS                    32  +-43            half x odd 4-bit number; rows of 8
IQ2_XS IQ2_S               16  +-43            half x odd 4-bit number; rows of 8
IQ1_S                      32  +-9             half x odd 3-bit number / 8; rows of 8
IQ1_M                      16  +-9             half x odd 3-bit number / 8; rows of 8
TQ1_0 TQ2_0               256  -1..1 (..2)     half
MXFP4                      32  +-12            power of two
NVFP4                      16  +-12            E4M3
Q1_0                      128  -1, 1           half
Q2_0                       64  -1..2           half
======================  =====  ==============  ===========================================

Only Q8_0, Q8_1 and Q8_K can hold the code -128, which ggml never writes. IQ1 codes are eight
times the codebook's -1, 0 or 1, plus or minus the 1 that stands for the format's shift by 1/8.

>>> raw = quantize("Q8_0", np.linspace(-127, 127, 32, dtype=np.float32))
>>> raw.shape, dequantize("Q8_0", raw)[[0, -1]].tolist()
((34,), [-127.0, 127.0])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArgumentError, NumericError
from . import float as plain
from . import fp4, iq_search, iquants, kquants, legacy, lowbit, ternary
from .fit import divide
from .format import Array, Codes, Floats, Format

__all__ = ["FORMATS", "Format", "dequantize", "int8_form", "quantize"]

FORMATS: dict[str, Format] = {
    f.name: f
    for family in (plain, legacy, kquants, iquants, ternary, fp4, lowbit)
    for f in family.FORMATS
}
for _name, _writer in iq_search.WRITERS.items():
    FORMATS[_name] = replace(FORMATS[_name], quantize=_writer)
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


def quantize(type_name: str, x: Floats, importance: Floats | None = None) -> NDArray[np.uint8]:
    """Encode weights: a least-squares choice of scales, not ggml's bits.

    Parameters
    ----------
    type_name : str
        A type of `FORMATS` whose `quantize` is not None.
    x : float32 array [..., n]
        n is a multiple of the block size.
    importance : float32 array, optional
        How much the squared error of each weight counts, [n] or [..., n]: mean squares of the inputs that it is
        multiplied by.

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
    weights = None if importance is None else _weights(importance, x).reshape(groups.shape)
    try:
        with np.errstate(over="raise"):
            for part in _chunks(fmt, blocks.size):
                blocks[part] = fmt.quantize(
                    groups[part], None if weights is None else weights[part]
                )
    except FloatingPointError as error:
        raise NumericError(f"a value is too large for {type_name}: {np.abs(x).max()}") from error
    return blocks.view(np.uint8).reshape(
        *x.shape[:-1], x.shape[-1] // fmt.block_size * fmt.type_size
    )


def _weights(importance: Floats, x: Floats) -> Floats:
    """The weight of each squared error, in the shape of x, about 1; a 0 would leave a scale open."""
    w = np.broadcast_to(importance, x.shape).astype(np.float32)
    mean = w.mean(-1, keepdims=True)
    weights: Floats = np.where(mean > 0, divide(w, mean), 1) + np.float32(1e-6)
    return weights.astype(np.float32)


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
