"""Load matrices: pieces of a file are read in parallel and interleaved into tiles of 16 rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..backend import Source
from . import readers
from .formats import FORMATS, Format
from .readers import Reader
from .records import EXACT_DIGITS
from .tiles import ROWS, RUN, interleave_rows, room, runs, share

PIECE = 4 << 20  # bytes read at a time
ALONE = 1 << 19  # bytes of a matrix that one thread loads faster than two


@dataclass
class CPUWeight:
    """A matrix [n_out, n_in] or a stack [n, n_out, n_in], as tiles.

    ``format`` is None for F32, F16 and BF16, ``reader`` for all others. A quantised matrix meets a row of
    activations as that many rows of int8, its ``digits`` (see ``micro``). ``tile_bytes`` are those of 16 whole
    rows; each matrix of a stack begins a new tile, and spare rows of its last one are zeros.
    """

    type: str
    shape: tuple[int, ...]
    format: Format | None
    kind: str  # the float type, or the format's name: what kernels are compiled for
    tile_bytes: int
    memory: np.ndarray
    address: int  # where the memory begins
    digits: int = 1
    outside: dict[str, Any] = field(default_factory=dict)  # kernels from outside, by operation
    # products with weights like these, by how many tokens there are
    plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    @property
    def reader(self) -> Reader | None:
        """How kernels read weights that are multiplied as floats."""
        return None if self.format else readers.reader(self.kind)

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


def load_weight(
    source: Source, rows: np.ndarray | slice | None, n_threads: int, exact: bool = False
) -> CPUWeight:
    """Read a tensor, or some of its rows, into tiles; ``exact``: activations keep all that float32 has."""
    shape = _shape_of(source, rows)
    fmt, kind = _form_of(source)
    n_out, n_in = shape[-2:]
    fields, n_blocks = _fields(fmt, kind, n_in)
    row_bytes = n_blocks * int(fields[:, 1].sum())
    n_mats, tiles = int(np.prod(shape[:-2])), -(-n_out // ROWS)
    memory = room.take(n_mats * tiles * ROWS * row_bytes)
    address = memory.ctypes.data
    digits = EXACT_DIGITS if exact and fmt else 1
    weight = CPUWeight(source.type, shape, fmt, kind, ROWS * row_bytes, memory, address, digits)

    def load(piece: tuple[int, int, int]) -> None:
        m, start, stop = piece
        raw = _read(source, rows, m * n_out, start, stop)
        to = address + (m * tiles + start // ROWS) * weight.tile_bytes
        interleave_rows(raw, to, n_blocks, fields)

    step = _rows_of_piece(n_out, row_bytes, n_threads)
    pieces = [(m, i, min(i + step, n_out)) for m in range(n_mats) for i in range(0, n_out, step)]
    share(pieces, load, n_threads)
    return weight


def _rows_of_piece(n_out: int, row_bytes: int, n_threads: int) -> int:
    """Rows of a piece: whole tiles of about PIECE bytes at most, the same number of pieces for each thread."""
    n_bytes = n_out * row_bytes
    rounds = -(-n_bytes // (PIECE * n_threads))
    n_pieces = rounds * n_threads if n_bytes >= ALONE else 1
    return max(-(-n_out // (n_pieces * ROWS)), 1) * ROWS


def _shape_of(source: Source, rows: np.ndarray | slice | None) -> tuple[int, ...]:
    shape = tuple(map(int, source.shape))  # recording counts with them: NumPy's are slow
    if len(shape) < 2:
        shape = (1, *shape)
    if rows is None:
        return shape
    if len(shape) != 2:
        raise DeviceError(f"{source.name}: rows can be selected of a matrix, not of shape {shape}")
    return len(np.arange(shape[0])[rows]), shape[1]


def _form_of(source: Source) -> tuple[Format | None, str]:
    """How a type is stored: its format (None for floats) and the kind its kernels are named by."""
    if source.type not in FORMATS and source.type not in readers.BYTES:
        raise DeviceError(f"{source.name}: type {source.type} is not supported on cpu")
    return FORMATS.get(source.type), source.type


def _fields(fmt: Format | None, kind: str, n_in: int) -> tuple[np.ndarray, int]:
    """The fields of a block as ``interleave`` takes them, and the number of blocks in a row."""
    if fmt:
        return runs(fmt.fields), n_in // fmt.block
    n = readers.BYTES[kind]
    block = RUN // n if n_in % (RUN // n) == 0 else 1
    return runs([(n * i, n) for i in range(block)]), n_in // block


def _read(
    source: Source, rows: np.ndarray | slice | None, first: int, start: int, stop: int
) -> np.ndarray:
    """Raw rows of the matrix that begins with row ``first``, or of those selected."""
    if rows is None:
        return source.read_rows(first + start, first + stop)
    some = np.arange(source.shape[0])[rows][start:stop]
    low, high = int(some.min()), int(some.max()) + 1
    return np.ascontiguousarray(source.read_rows(low, high)[some - low])
