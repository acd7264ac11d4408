"""Reading a file's bytes safely: what libraries parse is parsed by another process, which may take little."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO

from .. import system
from .chunking import Content
from .formats import APART, Unreadable, as_json, from_json, read

FILE = 64 << 20  # bytes of a file at most
MEMORY = 1 << 30  # bytes that the reading process may take
SECONDS = 30.0  # that it may take for a file
NEEDS = {
    ".pdf": "pypdf",
    ".docx": "docx",
    ".html": "selectolax",
    ".htm": "selectolax",
    ".xhtml": "selectolax",
}
LENGTH = struct.Struct("<Q")


class Missing(Unreadable):
    """A file that can be read once a package is installed."""


def bytes_of(path: bytes) -> tuple[bytes, os.stat_result]:
    """All bytes of a regular file, and what it was when they were read; links are not followed.

    Raises
    ------
    Unreadable
        It is too large, something else than a file, or cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("it is no regular file")
            if status.st_size > FILE:
                raise Unreadable(
                    f"it has {status.st_size / 1e6:.0f} MB; at most {FILE / 1e6:.0f} MB are read"
                )
            data = file.read(FILE + 1)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    if len(data) > FILE:
        raise Unreadable(f"it grew beyond {FILE / 1e6:.0f} MB while it was read")
    return data, status


class Reader:
    """Reads files of all kinds; a context manager that ends the process it may have started."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end()

    def read(self, data: bytes, suffix: str) -> Content:
        """The content of a file's bytes; Unreadable, with the reason, where there is none."""
        if suffix not in APART:
            try:
                return read(data, suffix)
            except (RecursionError, MemoryError) as error:
                raise Unreadable(type(error).__name__) from None
        package = NEEDS[suffix]
        if find_spec(package) is None:
            raise Missing(
                f"reading {suffix} needs the extra [localdocs]: pip install 'tinyllm[localdocs]'"
            )
        return self._read_apart(data, suffix)

    def _read_apart(self, data: bytes, suffix: str) -> Content:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, kill)
        timer.start()
        try:
            send(process.stdin, suffix.encode())
            send(process.stdin, data)
            answer = receive(process.stdout)
        except OSError:
            answer = None
        except BaseException:
            self._end()
            raise
        finally:
            timer.cancel()
        if answer is None:
            self._end()
            why = (
                f"took more than {self._seconds:g} seconds" if late.is_set() else "ended its reader"
            )
            raise Unreadable(f"it {why}; a damaged or hostile file?")
        found = json.loads(answer)
        if "reason" in found:
            raise Unreadable(found["reason"])
        return from_json(found)

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tinyllm.localdocs.reading import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()


def send(pipe: IO[bytes], data: bytes) -> None:
    """Bytes behind their number."""
    pipe.write(LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes | None:
    """The bytes that ``send`` wrote; None where the pipe ended."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (n,) = LENGTH.unpack(head)
    data = pipe.read(n)
    return data if len(data) == n else None


def serve() -> None:
    """The other process: read file after file from standard input, until it is closed."""
    system.limit_memory(MEMORY)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library that prints must not spoil the answer
    while (suffix := receive(source)) is not None and (data := receive(source)) is not None:
        try:
            found = as_json(read(data, suffix.decode()))
        except Unreadable as error:
            found = {"reason": str(error)}
        except MemoryError:
            found = {"reason": f"it takes more than {MEMORY >> 20} MB to read"}
        except Exception as error:  # whatever a library makes of a damaged file
            found = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        send(target, json.dumps(found).encode())


def kind_of(path: bytes) -> str:
    """The suffix that says how a file is read, in lower case."""
    return Path(os.fsdecode(path)).suffix.lower()
