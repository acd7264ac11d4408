"""What a format is, and the bit fields that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Int8Form = tuple[Codes, Floats, Floats | None]
Quantize = Callable[[Floats, Floats | None], Array]


@dataclass(frozen=True)
class Format:
    """How one tensor type stores its weights.

    Attributes
    ----------
    name : str
        ggml's name, as in ``"Q4_K"``.
    dtype : numpy.dtype
        One block, field by field.
    dequantize : callable
        Blocks [N] -> float32 [N, block_size].
    quantize : callable or None
        Float32 [N, block_size], and how much each value's squared error counts or None -> blocks [N]; None
        where only others write the format.
    int8_form : callable or None
        Blocks [N] -> codes int8 [N, block_size], scales and (or None) minima float32
        [N, block_size / group_size], with ``weight = scale * code + minimum``.
        None for plain numbers.
    block_size, group_size : int
        Weights in a block, and neighbouring weights that share a scale.
    """

    name: str
    dtype: np.dtype[Any]
    dequantize: Callable[[Array], Floats]
    quantize: Quantize | None = None
    int8_form: Callable[[Array], Int8Form] | None = None
    block_size: int = 1
    group_size: int = 1

    @property
    def type_size(self) -> int:
        """Bytes in a block."""
        return self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of the scales included."""
        return 8 * self.type_size / self.block_size


def quantised(
    name: str,
    dtype: np.dtype[Any],
    int8_form: Callable[[Array], Int8Form],
    block_size: int,
    group_size: int,
    quantize: Quantize | None = None,
) -> Format:
    """Make the format whose weights are ``scale * code + minimum``, as all quantised ones are."""
    weights = partial(_weights, int8_form)
    return Format(name, dtype, weights, quantize, int8_form, block_size, group_size)


def _weights(int8_form: Callable[[Array], Int8Form], blocks: Array) -> Floats:
    """Blocks [N] -> float32 [N, block_size]; two roundings at most, the ones ggml makes."""
    codes, scales, minima = int8_form(blocks)
    groups = codes.reshape(*scales.shape, -1).astype(np.float32)
    groups *= scales[..., None]
    if minima is not None:
        groups += minima[..., None]
    return groups.reshape(codes.shape)


def planes(packed: Array, width: int) -> Array:
    """Split bytes into fields whose low bits come first, a plane of all bytes after the other.

    packed uint8 [..., n] -> [..., 8 / width, n].
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    values: Array = (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
    return values


def fields(packed: Array, width: int, count: int | None = None) -> Array:
    """Split integers into fields whose low bits come first, those of one integer together.

    packed unsigned [..., n] -> [..., n, count]; count defaults to all that fit.
    """
    count = count or 8 * packed.itemsize // width
    shifts = np.arange(0, count * width, width, dtype=packed.dtype)
    values: Array = (packed[..., None] >> shifts) & packed.dtype.type((1 << width) - 1)
    return values


def nibble_pairs(table: Codes) -> Array:
    """For each byte the table's entries of both its nibbles, as one integer: uint16 [256]."""
    byte = np.arange(256)
    return np.stack([table[byte & 15], table[byte >> 4]], axis=-1).view(np.uint16)[:, 0]


def look_up(pairs: Array, packed: Array) -> Codes:
    """Entries of a table of 16 for the nibbles of bytes [..., n], as `planes` orders them.

    Gathering both at once is three times faster than indexing the table with nibbles.
    -> int8 [..., 2, n]
    """
    both = np.take(pairs, packed).view(np.int8)
    entries: Codes = both.reshape(*packed.shape, 2).swapaxes(-1, -2)
    return entries


def pack_planes(values: Array, width: int) -> Array:
    """Undo `planes`: [..., 8 / width, n] -> uint8 [..., n]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    packed: Array = np.bitwise_or.reduce(values.astype(np.uint8) << shifts, axis=-2)
    return packed


def pack_fields(values: Array, width: int) -> Array:
    """Undo `fields` for bytes: [..., n, 8 / width] -> uint8 [..., n]."""
    return pack_planes(values.swapaxes(-1, -2), width)
