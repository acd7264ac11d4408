"""Loading matrices: read in pieces, interleaved in parallel into tiles of 16 rows (see ``formats``).

A type without a micro-kernel of its own is stored as signed bytes with a float scale per 16 or 32 columns
(``REPACKED``): still integers, exact, but more bytes than in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...errors import DeviceError
from ...gguf import quants
from ..backend import Source
from . import floats, jit
from .formats import FORMATS, Format, int8_format
from .program import Tape, aligned
from .simd import arg, get_i8, get_i16, get_i32, get_i64, i64, set_i8, set_i16, set_i32

ROWS = 16  # of a tile
PIECE = 4 << 20  # bytes read at a time


def repacked() -> list[str]:
    """Types that are stored as int8 for want of a micro-kernel of their own."""
    formats = quants.FORMATS.values()
    return [f.name for f in formats if f.int8_form and f.name not in FORMATS]


@dataclass
class CPUWeight:
    """A matrix [n_out, n_in] or a stack [n, n_out, n_in], as tiles.

    ``format`` is None for F32, F16 and BF16. ``tile_bytes`` are those of 16 whole rows; each matrix of a stack
    begins a new tile, and spare rows of its last one are zeros.
    """

    type: str
    shape: tuple[int, ...]
    format: Format | None
    kind: str  # the float type, or the format's name: what kernels are compiled for
    tile_bytes: int
    memory: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def n_in(self) -> int:
        return self.shape[-1]

    @property
    def n_out(self) -> int:
        return self.shape[-2]

    @property
    def n_tiles(self) -> int:
        """Tiles of one matrix."""
        return -(-self.n_out // ROWS)

    @property
    def n_blocks(self) -> int:
        """What a micro-kernel counts along a row: blocks, or columns of a float matrix."""
        return self.n_in // self.format.block if self.format else self.n_in

    @property
    def address(self) -> int:
        return self.memory.ctypes.data


def interleave(args, first, last, worker):
    """Rows of blocks -> tiles, field by field; a piece is a tile. Missing rows become zeros."""
    source, out, row_bytes, n_rows = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n_blocks, block_bytes = arg(args, 4), arg(args, 5)
    fields, n_fields = arg(args, 6), arg(args, 7)
    for tile in range(first, last):
        to = out + tile * 16 * n_blocks * block_bytes
        rows = min(16, n_rows - 16 * tile)
        for block in range(n_blocks):
            base = source + 16 * tile * row_bytes + block * block_bytes
            for f in range(n_fields):
                p, size = base + get_i64(fields + 16 * f), get_i64(fields + 16 * f + 8)
                if size == 4:
                    for r in range(rows):
                        set_i32(to + 4 * r, get_i32(p + r * row_bytes))
                    for r in range(rows, 16):
                        set_i32(to + 4 * r, i64(0))
                elif size == 2:
                    for r in range(rows):
                        set_i16(to + 2 * r, get_i16(p + r * row_bytes))
                    for r in range(rows, 16):
                        set_i16(to + 2 * r, i64(0))
                else:
                    for r in range(rows):
                        set_i8(to + r, get_i8(p + r * row_bytes))
                    for r in range(rows, 16):
                        set_i8(to + r, i64(0))
                to += 16 * size


def load_weight(source: Source, rows: np.ndarray | slice | None, n_threads: int) -> CPUWeight:
    """Read a tensor, or some of its rows, into tiles."""
    shape = _shape_of(source, rows)
    fmt, kind = _form_of(source, shape[-1])
    fields = _fields(fmt, kind)
    n_out, n_in = shape[-2:]
    n_blocks = n_in // fmt.block if fmt else n_in
    row_bytes = n_blocks * int(fields[:, 1].sum())
    n_mats = int(np.prod(shape[:-2]))
    tiles = -(-n_out // ROWS)
    memory = aligned(n_mats * tiles * ROWS * row_bytes)
    weight = CPUWeight(source.type, shape, fmt, kind, ROWS * row_bytes, memory)
    at = weight.address
    for m in range(n_mats):
        for raw in _pieces(source, rows, m * n_out, n_out, row_bytes):
            raw = _recode(source.type, fmt, raw)
            n = len(raw)
            args = (raw.ctypes.data, at, row_bytes, n, n_blocks, row_bytes // n_blocks)
            _interleave(raw, (*args, fields.ctypes.data, len(fields)), n_threads)
            at += -(-n // ROWS) * weight.tile_bytes
    return weight


def _interleave(raw: np.ndarray, args: tuple[int, ...], n_threads: int) -> None:
    tape = Tape()
    tape.add(jit.kernel(interleave), -(-len(raw) // ROWS), args)
    tape.run(n_threads)


def _shape_of(source: Source, rows: np.ndarray | slice | None) -> tuple[int, ...]:
    shape = tuple(source.shape)
    if len(shape) < 2:
        shape = (1, *shape)
    if rows is None:
        return shape
    if len(shape) != 2:
        raise DeviceError(f"{source.name}: rows can be selected of a matrix, not of shape {shape}")
    return len(np.arange(shape[0])[rows]), shape[1]


def _form_of(source: Source, n_in: int) -> tuple[Format | None, str]:
    """How a type is stored: its format (None for floats) and the kind its kernels are named by."""
    if source.type in floats.BYTES:
        return None, source.type
    if source.type in FORMATS:
        fmt = FORMATS[source.type]
        return fmt, fmt.name
    file_format = quants.FORMATS.get(source.type)
    if file_format is None or file_format.int8_form is None:
        raise DeviceError(f"{source.name}: type {source.type} is not supported on cpu")
    group = 16 if file_format.group_size == 16 else 32
    fmt = int8_format(group, minima=False)  # those with minima all have kernels
    return fmt, fmt.name


def _fields(fmt: Format | None, kind: str) -> np.ndarray:
    """[n, 2] int64: byte in the block and size of each field of a tile, in its order."""
    fields = fmt.fields if fmt else ((0, floats.BYTES[kind]),)
    return np.array(fields, np.int64)


def _pieces(
    source: Source, rows: np.ndarray | slice | None, first: int, n_out: int, row_bytes: int
) -> Iterator[np.ndarray]:
    """The raw rows of one matrix, some whole tiles at a time."""
    step = max(PIECE // row_bytes // ROWS, 1) * ROWS
    if rows is None:
        for start in range(0, n_out, step):
            yield source.read_rows(first + start, first + min(start + step, n_out))
        return
    wanted = np.arange(source.shape[0])[rows]
    for start in range(0, n_out, step):
        some = wanted[start : start + step]
        low, high = int(some.min()), int(some.max()) + 1
        yield np.ascontiguousarray(source.read_rows(low, high)[some - low])


def _recode(type_name: str, fmt: Format | None, raw: np.ndarray) -> np.ndarray:
    """Rows of blocks of the file as rows of the blocks that tiles are made of."""
    if fmt is None or type_name in FORMATS:
        return raw
    codes, scales, minima, group = quants.int8_form(type_name, raw)
    parts = [codes.reshape(len(raw), -1, 32).view(np.uint8)]
    for values in (scales,) if minima is None else (scales, minima):
        spread = np.repeat(values, group // min(group, 32), axis=-1)
        grouped = np.ascontiguousarray(spread.reshape(len(raw), parts[0].shape[1], -1))
        parts.append(grouped.view(np.uint8).reshape(*grouped.shape[:2], -1))
    return np.ascontiguousarray(np.concatenate(parts, -1)).reshape(len(raw), -1)
