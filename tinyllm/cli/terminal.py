"""A model's text on a terminal: control characters are shown as pictures, so that none is obeyed.

A hostile model, template or file could otherwise move the cursor over what was printed before, retitle the
window or, on some terminals, type commands.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

ALLOWED = "\n\t"
PICTURES = 0x2400  # where the pictures of control characters begin: ESC is shown as ␛
SHOWN = {i: PICTURES + i for i in range(0x20) if chr(i) not in ALLOWED}
SHOWN |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    r"""The text with its control characters, other than line ends and tabs, made visible.

    >>> visible("red: \x1b[31m, bell: \x07")
    'red: ␛[31m, bell: ␇'
    """
    return text.translate(SHOWN)


def show(text: str, stream: TextIO | None = None) -> None:
    """Write a text to standard output or another stream, and flush it.

    A terminal gets it with control characters made visible; a file or pipe gets it unchanged.
    """
    out = stream or sys.stdout
    out.write(visible(text) if out.isatty() else text)
    out.flush()


def prepare_streams() -> None:
    """Have the standard streams carry UTF-8 where no terminal is at their other end.

    A pipe's encoding would otherwise be what the system was set up for, and a redirected text damaged. Output
    for which there is no stream is dropped. A terminal that lacks a character shows another.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None and name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            errors = "strict" if name == "stdin" else "surrogateescape"
            stream.reconfigure(encoding="utf-8", errors=errors)
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="replace")


def drop_output() -> None:
    """Drop what is still to be written: Python would complain when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def has_terminal(stream: TextIO | None) -> bool:
    """Is somebody at the other end of a standard stream?"""
    return stream is not None and not stream.closed and stream.isatty()
