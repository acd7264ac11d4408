"""SentencePiece's compiled normalization: the longest known prefix is replaced, the rest kept.

The map is a double array: a trie in 32-bit units, where the child for byte c of a node with base b is
the unit b ^ c, if its label is c. Bits of a unit: 0 to 7 label, 8 has a value, 9 base is shifted by 8
more, 10 to 30 base; in a value unit, 0 to 30 the offset of a null-terminated replacement.

Reference: SentencePiece, normalizer.cc; S. Kanda, "Space- and Time-Efficient String Dictionaries" (2018).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
import regex

from .base import to_bytes
from .vocab import key_error

_KEY = "precompiled_charsmap"
_LABEL = 0x800000FF
_HAS_VALUE = 0x100
_VALUE = 0x7FFFFFFF
_MAX_PREFIX = 256  # bytes; a damaged map must not walk on for ever
_VISIBLE_ASCII = range(0x20, 0x7F)


class CharsMap:
    """Normalizes text as the file's `precompiled_charsmap` says.

    Parameters
    ----------
    blob : array of uint8, or None
        Length of the trie in bytes (uint32, little-endian), the trie, the replacements.
    protected : list of str
        Tokens whose text, and whatever they begin with, stays as it is.

    Raises
    ------
    GGUFError
        If the map is damaged; from `normalize` too, when it comes upon the place.
    """

    def __init__(self, blob: Any, protected: list[str]) -> None:
        self._units, self._texts = _parse(blob)
        self._protected = sorted(map(to_bytes, protected))
        self._longest = max(map(len, self._protected), default=0)
        self._unchanged = self._find_unchanged()

    def normalize(self, text: str) -> str:
        """The text with every longest known prefix replaced, from left to right."""
        if not self._units:
            return text
        data, at, out = to_bytes(text), 0, []
        while at < len(data):
            if run := self._unchanged.match(data, at):
                length, piece = len(run[0]), run[0]
            else:
                length, piece = self._step(data, at)
            out.append(piece)
            at += length
        return b"".join(out).decode("utf-8", "replace")

    def _step(self, data: bytes, at: int) -> tuple[int, bytes]:
        """How many bytes are consumed at `at`, and what they become."""
        if length := self._protected_length(data, at):
            return length, data[at : at + length]
        length, replacement = self._replacement(data, at)
        if length:
            return length, replacement
        length = _utf8_length(data[at])
        return length, data[at : at + length]

    def _replacement(self, data: bytes, at: int) -> tuple[int, bytes]:
        """Length and replacement of the longest prefix in the map; (0, b"") if there is none."""
        node, length, value = _base(self._unit(0)), 0, 0
        for i in range(at, min(len(data), at + _MAX_PREFIX)):
            node ^= data[i]
            unit = self._unit(node)
            if data[i] == 0 or unit & _LABEL != data[i]:
                break
            node ^= _base(unit)
            if unit & _HAS_VALUE:
                length, value = i - at + 1, self._unit(node) & _VALUE
        return (length, self._text(value)) if length else (0, b"")

    def _unit(self, i: int) -> int:
        if i >= len(self._units):
            raise key_error(_KEY, f"damaged: a node at {i} of {len(self._units)}")
        return self._units[i]

    def _text(self, at: int) -> bytes:
        end = self._texts.find(b"\0", at)
        if end < 0:
            raise key_error(_KEY, f"damaged: no replacement ends at or after byte {at}")
        return self._texts[at:end]

    def _protected_length(self, data: bytes, at: int) -> int:
        """Bytes that the text at `at` has in common with the start of a protected token."""
        if not self._protected:
            return 0
        here = data[at : at + self._longest]
        i = bisect_left(self._protected, here)
        return max(_common(here, p) for p in self._protected[max(i - 1, 0) : i + 1])

    def _find_unchanged(self) -> regex.Pattern[bytes]:
        """An expression for ASCII that no entry of the map can change: nearly all of an English text."""
        if not self._units:
            return regex.compile(b"")
        alone = {c for c in _VISIBLE_ASCII if not self._begins(c)}
        members = b"".join(b"\\x%02x" % c for c in sorted(alone))
        return regex.compile(b"[%s]+(?=[ -~]|\\Z)" % members if members else b"(?!)")

    def _begins(self, c: int) -> bool:
        """Whether an entry is `c` alone or begins with it and another visible ASCII character."""
        if any(p[0] == c for p in self._protected):
            return True
        if self._replacement(bytes((c,)), 0)[0]:
            return True
        node = _base(self._unit(0)) ^ c
        unit = self._unit(node)
        if unit & _LABEL != c:
            return False
        node ^= _base(unit)
        return any(self._unit(node ^ d) & _LABEL == d for d in _VISIBLE_ASCII)


def _base(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _common(a: bytes, b: bytes) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _utf8_length(first: int) -> int:
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _parse(blob: Any) -> tuple[list[int], bytes]:
    """The trie's units and the replacements; both empty without a map."""
    if blob is None:
        return [], b""
    array = np.asarray(blob)
    if array.ndim != 1 or array.dtype.kind not in "iu" or isinstance(blob, (str, bytes)):
        raise key_error(_KEY, "an array of bytes is expected")
    data = array.astype(np.uint8).tobytes()
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size < len(data) - 4:
        raise key_error(_KEY, f"damaged: a trie of {size} bytes in a map of {len(data)}")
    units: list[int] = np.frombuffer(data, "<u4", size // 4, offset=4).tolist()
    return units, data[4 + size :]
