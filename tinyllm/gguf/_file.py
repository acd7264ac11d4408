"""Reading a regular file at any offset: several threads at once, and an error when it has shrunk."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, GGUFError
from ..system import OPEN_FLAGS, read_at

_PIECE = 64 << 20  # bytes in one read call; Linux refuses more than 2 GiB


class RandomAccessFile:
    """A regular file held open; every read says where.

    Raises
    ------
    GGUFError
        If the path is a directory, a pipe, a device or a loop of links.
    OSError
        If the file is missing or may not be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = _open_without_waiting(path)
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise GGUFError("not a regular file; give the path of a .gguf file", path=path)
        self.size, self._written = status.st_size, status.st_mtime_ns

    def read(self, offset: int, n: int) -> bytearray:
        """`n` bytes at `offset`; GGUFError if the file ends before."""
        out = bytearray(n)
        self.read_into(offset, np.frombuffer(out, np.uint8))
        return out

    def read_into(self, offset: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n] contiguous, from `offset`; GGUFError if the file ends before."""
        view, done = memoryview(out.data), 0
        while done < len(view):
            got = self._read_piece(offset + done, view[done : done + _PIECE])
            if got == 0:
                raise GGUFError(
                    f"the file has shrunk since it was opened: {len(view)} bytes expected here, "
                    f"{done} left; was it replaced or is the disk full?",
                    path=self.path,
                    offset=offset + done,
                )
            done += got

    def _read_piece(self, offset: int, view: memoryview) -> int:
        if self._fd < 0:
            raise ArgumentError(f"{self.path}: the file is closed")
        return read_at(self._fd, view, offset)

    def map(self, offset: int, n: int) -> npt.NDArray[np.uint8]:
        """A read-only view, uint8 [n], of the mapped file."""
        if self._fd < 0:
            raise ArgumentError(f"{self.path}: the file is closed")
        if os.fstat(self._fd).st_size < offset + n:  # touching such a page would end the process
            raise GGUFError(
                "the file has shrunk since it was opened", path=self.path, offset=offset
            )
        with self._lock:
            if self._map is None:
                self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8, count=n, offset=offset)

    def check_unchanged(self) -> None:
        """GGUFError if somebody has written to the file since it was opened."""
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self._written):
            raise GGUFError(
                "the file was written to while it was read, and what was read may be of two files; "
                "load it again once it is complete",
                path=self.path,
                offset=0,
            )

    def close(self) -> None:
        """Close the file; views given out by `map` stay valid."""
        fd, self._fd, self._map = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def _open_without_waiting(path: str) -> int:
    """Open for reading; a pipe nobody writes to must not hold us."""
    try:
        return os.open(path, OPEN_FLAGS)
    except ValueError as error:  # a zero byte in it
        raise ArgumentError(f"{path!r:.200} is no path") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise GGUFError("the link leads back to itself", path=path) from error
        if os.path.isdir(path):  # Windows refuses to open one
            raise GGUFError("a directory; give the path of a .gguf file", path=path) from error
        raise
