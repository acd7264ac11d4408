"""Text files that are read, and files that appear whole or not at all."""

from __future__ import annotations

import codecs
import errno
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from . import system
from .errors import ArgumentError

_numbers = itertools.count()
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def decode(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Raises
    ------
    ArgumentError
        The bytes are no UTF-8; ``name`` says whose they are.
    """
    if data.startswith(WIDE):
        raise ArgumentError(f"{name}: expected a text in UTF-8; this one is UTF-16: convert it")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ArgumentError(f"{name}: expected a text in UTF-8 ({e})") from None


def read_text(name: str | os.PathLike[str]) -> str:
    """All of a text file in UTF-8, or of standard input for "-".

    Raises
    ------
    ArgumentError
        What was read is no UTF-8, or there is no standard input.
    """
    if name != "-":
        return decode(system.expanded(checked(name)).read_bytes(), os.fspath(name))
    if sys.stdin is None or sys.stdin.closed:
        raise ArgumentError("there is no standard input to read; give the text as an argument")
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw is None else decode(raw.read(), "standard input")


def checked(path: str | os.PathLike[str]) -> str:
    """The name of a file; ArgumentError if no file can have it."""
    try:
        name = os.fsdecode(path)
        possible = bool(os.fsencode(name)) and "\0" not in name
    except TypeError:
        raise ArgumentError(
            f"{type(path).__name__} {path!r:.80} is no name of a file; expected a text or a Path"
        ) from None
    except UnicodeEncodeError:  # a lone surrogate
        possible = False
    if not possible:
        raise ArgumentError(f"{name!r:.80} is no name of a file")
    return name


def check_apart(target: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]]) -> None:
    """ArgumentError if a file to write is one of those that it is made of: of a folder, all but ``*.gguf``."""
    name = os.path.expanduser(checked(target))
    if not os.path.isfile(name):
        return
    for source in sources:
        path = os.path.expanduser(os.fspath(source))
        if os.path.isfile(path) and os.path.samefile(path, name):
            raise ArgumentError(f"{name} is the source itself; give another name")
        if os.path.isdir(path) and not name.endswith(".gguf"):
            above = os.path.dirname(os.path.realpath(name))
            while os.path.dirname(above) != above and not os.path.samefile(above, path):
                above = os.path.dirname(above)
            files = [e.path for e in os.scandir(path) if e.is_file()]  # some may be links
            if os.path.samefile(above, path) or any(os.path.samefile(f, name) for f in files):
                raise ArgumentError(f"{name} is a file of the source {path}; give another name")


def lines_of(text: str) -> list[str]:
    r"""The text's lines: only ``\n`` and ``\r\n`` end one, and the last may lack its end."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in the error of a write for which there is no room: the system does not."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno in FULL:
            raise type(e)(e.errno, e.strerror, os.fspath(path)) from None
        raise


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of ``path`` when the block ends without an error.

    An older file stays whole until then, and its permissions stay. Through a link, the file is replaced that
    the link leads to.

    Raises
    ------
    ArgumentError
        There is something else than a regular file at that place.
    OSError
        It cannot be written; the error names ``path``.
    """
    name = os.path.expanduser(checked(path))
    target = os.path.realpath(name)
    part = f"{target}.{os.getpid()}-{next(_numbers)}.part"
    mode = None
    with suppress(FileNotFoundError):
        status = os.stat(target)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ArgumentError(f"{name} is {kind}; give the name of a file to write")
        mode = stat.S_IMODE(status.st_mode)
    try:
        with naming(name), open(part, "xb") as file:
            yield file
        if mode is not None:
            os.chmod(part, mode)
        os.replace(part, target)
    except OSError as e:
        if e.filename == part:  # a name that means nothing to the caller
            raise type(e)(e.errno, e.strerror, name) from None
        raise
    finally:
        with suppress(OSError):
            os.unlink(part)
