"""Page-locked host memory, through which everything crosses to the device and back.

Copies from it run at full speed and are truly asynchronous, so a part is written again only when the copy
from it is known to be done. A copy from ordinary memory may return before or after the driver has read that
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PIECE = 8 << 20  # bytes that are copied at a time
ROOM = 4 * PIECE  # bytes of copies under way
ALIGNMENT = 64


class Landing:
    """Memory for one copy from the device; when nobody refers to it any more, other copies may use it."""

    def __init__(self, memory: np.ndarray, spare: list[np.ndarray]) -> None:
        self.memory, self._spare = memory, spare
        self.address = memory.ctypes.data

    def __del__(self) -> None:
        self._spare.append(self.memory)


class Pinned:
    """A ring of memory for copies to the device, and memory for copies from it.

    ``allocate`` gives page-locked memory; ``wait`` returns when all copies queued before have been made.
    """

    def __init__(self, allocate: Callable[[int], Any], wait: Callable[[], None]) -> None:
        self._allocate, self._wait = allocate, wait
        self._up = self._down = np.empty(0, np.uint8)
        self._used = self._up_address = self._down_address = 0
        self._landings: list[np.ndarray] = []  # that no copy uses

    def staged(self, x: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Copy x to pinned pieces: offset, address and length of each. They stay until the next ``wait``."""
        flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        n = flat.nbytes
        for start in range(0, n, PIECE):
            size = min(PIECE, n - start)
            at = self._take(size)
            self._up[at : at + size] = flat[start : start + size]
            yield start, self._up_address + at, size

    def _take(self, nbytes: int) -> int:
        """The offset of free room in ``_up``."""
        if not self._up.nbytes:
            self._up = self._new(ROOM)
            self._up_address = self._up.ctypes.data
        if self._used + nbytes > ROOM:
            self._wait()
            self._used = 0
        at = self._used
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return at

    def fetched(self, nbytes: int, copy: Callable[[int], None]) -> np.ndarray:
        """Bytes that ``copy`` brings to an address, when it and all copies before it are done."""
        if self._down.nbytes < nbytes:
            self._down = self._new(max(nbytes, 1 << 20))
            self._down_address = self._down.ctypes.data
        copy(self._down_address)
        self._wait()
        self._used = 0
        return self._down[:nbytes].copy()

    def landing(self, nbytes: int) -> Landing:
        """Memory for a copy from the device while others are under way; kept until the last reference goes."""
        for i, memory in enumerate(self._landings):
            if memory.nbytes >= nbytes:
                del self._landings[i]
                return Landing(memory, self._landings)
        return Landing(self._new(max(nbytes, 1 << 16)), self._landings)

    def _new(self, nbytes: int) -> np.ndarray:
        return np.frombuffer(self._allocate(nbytes), np.uint8, nbytes)
