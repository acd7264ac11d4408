"""A model's text on a terminal: control characters are shown as pictures, so that none is obeyed.

A hostile model, template or file could otherwise move the cursor over what was printed before, retitle the
window or, on some terminals, type commands.
"""

from __future__ import annotations

import sys
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
