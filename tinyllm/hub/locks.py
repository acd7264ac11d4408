"""A lock between processes, on a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..system import lock_file


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
            lock_file(fd)
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
