"""A model's text on a terminal, which obeys control characters: those are shown, not sent.

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
    """Write at once to standard output, or another stream; only terminals get another text than was given."""
    out = stream or sys.stdout
    out.write(visible(text) if out.isatty() else text)
    out.flush()
