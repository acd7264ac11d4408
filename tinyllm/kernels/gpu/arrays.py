"""Device memory: arrays that return their buffer to a pool when the last reference goes."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .weights import GPUWeight

Buffer = Any  # a device's own handle


class GPUArray:
    """A dense array on the device.

    ``int8`` and ``half`` cache the forms in which several matrices read it, ``by_expert`` the order of
    choices of experts. ``pending``, where set, computes the values when the buffer is asked for, unless
    another kernel has done its work along the way; ``early`` is what products may read in the meantime.
    """

    __slots__ = (
        *("_base", "_buffer", "_pool", "_room", "by_expert", "dtype", "early", "half", "int8"),
        *("pending", "shape"),
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
        self.early: Early | None = None
        self._base, self._room, self._pool = base, room, pool
        self.int8: tuple[GPUArray, GPUArray, GPUArray] | None = None
        self.half: dict[int, tuple[GPUArray, GPUArray]] = {}
        self.by_expert: tuple[int, tuple[GPUArray, GPUArray]] | None = None

    @property
    def buffer(self) -> Buffer:
        """The memory, its values computed or queued to be."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.compute(self)
        return self._buffer

    @property
    def raw_buffer(self) -> Buffer:
        """The memory for the kernel that computes what is pending."""
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
        """The same values in another shape."""
        if prod(shape) != self.size:
            raise ValueError(f"{self.shape} does not reshape to {shape}")
        return GPUArray(shape, self.dtype, self.buffer, None, self)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        pool = getattr(self, "_pool", None)  # Ctrl-C may have come before it was known
        if pool is not None and not finalizing():
            pool.give(self._buffer, self._room)


@dataclass(frozen=True)
class Pending:
    """What an array will hold, not yet computed."""

    compute: Callable[[GPUArray], None]


@dataclass(frozen=True)
class Sum(Pending):
    """x + scale * y: a norm that follows takes it along."""

    x: GPUArray
    y: GPUArray
    scale: float


@dataclass(frozen=True)
class Product(Pending):
    """One row x times a matrix, plus a bias: a sum and a norm that follow are made by the same kernel."""

    w: GPUWeight
    x: GPUArray
    bias: GPUArray | None


@dataclass(frozen=True)
class Early:
    """A row whose norm is pending: the values before they are divided by their root mean square.

    ``squares`` holds sums of squares of the row before the norm's weights. The product with a matrix is linear,
    so it may be divided in their place.
    """

    values: GPUArray
    int8: tuple[GPUArray, GPUArray, GPUArray] | None
    squares: GPUArray
    eps: float


class Pool:
    """Buffers by size, used again as soon as they are given back.

    The queue runs in order, so a kernel that still reads a returned buffer runs before the one that
    writes it anew. The sizes of one step return in the next: after the first, no step allocates.
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
