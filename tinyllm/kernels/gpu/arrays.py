"""Device memory: arrays that return their buffer to a pool when the last reference goes."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .weights import GPUWeight

Buffer = Any  # the handle by which a driver knows memory
i32, u64, f32 = np.int32, np.uint64, np.float32  # scalar arguments of kernels
Int8: TypeAlias = (
    "tuple[GPUArray, GPUArray, GPUArray]"  # codes, scales and sums of an array's values
)


class GPUArray:
    """A dense array on the device.

    ``int8`` and ``half`` keep the forms in which matrices read it (see ``operands``), ``by_expert`` the order
    of chosen experts. ``pending``, where set, computes the values when the buffer is asked for, unless
    another kernel has computed them on its way; until then products may read ``undivided``.
    """

    __slots__ = (
        *("_base", "_buffer", "_pool", "_room", "by_expert", "dtype", "half", "int8"),
        *("pending", "shape", "undivided"),
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        buffer: Buffer,
        pool: Pool | None = None,
        base: GPUArray | None = None,
        room: int = 0,
    ) -> None:
        self.shape, self.dtype, self._buffer = tuple(shape), np.dtype(dtype), buffer
        self.pending: Pending | None = None
        self.undivided: Undivided | None = None
        self._base, self._room, self._pool = base, room, pool
        self.int8: Int8 | None = None
        self.half: dict[int, tuple[GPUArray, GPUArray]] = {}
        self.by_expert: dict[int, tuple[GPUArray, GPUArray]] = {}

    @property
    def buffer(self) -> Buffer:
        """The memory; a kernel that computes its values has been launched."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.compute(self)
        return self._buffer

    @property
    def raw_buffer(self) -> Buffer:
        """The memory alone: for the kernel that computes a pending value."""
        return self._buffer

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> GPUArray:
        """A view of the values in another shape."""
        if prod(shape) != self.size:
            raise ValueError(f"{self.shape} does not reshape to {shape}")
        return GPUArray(shape, self.dtype, self.buffer, None, self)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        pool = getattr(self, "_pool", None)  # Ctrl-C may have interrupted __init__
        if pool is not None and not finalizing():
            pool.give(self._buffer, self._room)


@dataclass(frozen=True)
class Pending:
    """How to compute the values of an array that nobody has read yet."""

    compute: Callable[[GPUArray], None]


@dataclass(frozen=True)
class PendingSum(Pending):
    """x + scale * y: the kernel of a norm that follows computes it, too."""

    x: GPUArray
    y: GPUArray
    scale: float


@dataclass(frozen=True)
class PendingProduct(Pending):
    """One row x times a matrix, plus a bias: one kernel computes it with the sum and the norm that follow."""

    w: GPUWeight
    x: GPUArray
    bias: GPUArray | None


@dataclass(frozen=True)
class Undivided:
    """A row whose norm is pending: times the norm's weights, but not yet divided by its root mean square.

    A product with a matrix is linear, so its results may be divided instead. ``squares`` holds partial sums
    of the squares of the row, without the weights.
    """

    values: GPUArray
    int8: Int8 | None
    squares: GPUArray
    eps: float


class Pool:
    """Spare buffers by size, used again as soon as they are given back.

    The device runs kernels in order: one that still reads a returned buffer runs before the next that writes
    it. Steps need buffers of the same sizes again and again, so that only the first allocates.
    """

    def __init__(self, allocate: Callable[[int], Buffer], free: Callable[[Buffer], None]) -> None:
        self._allocate, self._free = allocate, free
        self._spare: defaultdict[int, list[Buffer]] = defaultdict(list)
        self.nbytes = 0
        self.closed = False

    def take(self, nbytes: int) -> tuple[Buffer, int]:
        """A buffer of at least ``nbytes``, and its size: a spare one of up to twice that, or a new one."""
        size = bucket(nbytes)
        if not self._spare[size]:
            larger = [s for s, spare in self._spare.items() if spare and size < s <= 2 * size]
            if not larger:
                buffer = self._allocate(size)
                self.nbytes += size
                return buffer, size
            size = min(larger)
        return self._spare[size].pop(), size

    def give(self, buffer: Buffer, size: int) -> None:
        """Take a buffer back."""
        if not self.closed:
            self._spare[size].append(buffer)

    def trim(self) -> None:
        """Free what is not in use."""
        for size, spare in self._spare.items():
            self.nbytes -= size * len(spare)
            while spare:
                self._free(spare.pop())

    def close(self) -> None:
        """Free all spare buffers and keep no more."""
        self.trim()
        self.closed = True


def bucket(nbytes: int) -> int:
    """``nbytes`` rounded up to one of eight steps between powers of two, at least 256.

    >>> bucket(1), bucket(1000), bucket(1025)
    (256, 1024, 1152)
    """
    if nbytes <= 256:
        return 256
    step = 1 << max((nbytes - 1).bit_length() - 4, 5)
    return -(-nbytes // step) * step
