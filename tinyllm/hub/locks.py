"""A lock between processes, on a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
    import time

    def _acquire(fd: int) -> None:
        while True:
            try:
                return msvcrt.locking(fd, msvcrt.LK_LOCK, 1)
            except OSError:  # LK_LOCK gives up after ten seconds
                time.sleep(0.1)
else:
    import fcntl

    def _acquire(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`; wait while another process, or another thread, holds it.

    The file exists only while somebody holds or awaits the lock. The system releases the lock of a process
    that dies.
    """
    fd = _open_locked(path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows does not remove a file that another process has open
            path.unlink()
        os.close(fd)


def _open_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _acquire(fd)
        except BaseException:
            os.close(fd)
            raise
        if _is_still(path, fd):
            return fd
        os.close(
            fd
        )  # the holder removed the file while we waited: we have locked one without a name


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False
