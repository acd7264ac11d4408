"""RWKV's vocabulary: byte strings, matched greedily by the longest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import regex

from .base import Tokenizer, to_bytes
from .matching import Lengths, longest
from .vocab import Vocab, key_error

_ESCAPE = regex.compile(rb"\\(?:x([0-9a-f]{2})|(.))", regex.DOTALL)
_LETTERS = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


class RWKV(Tokenizer):
    r"""Tokens are spelled in the file with ``\n``, ``\t``, ``\r``, ``\xhh`` and ``\\``."""

    kind = "rwkv"

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        vocab = Vocab(metadata, {})
        super().__init__(vocab, pre=vocab.text("pre"))
        pieces = map(self._piece, vocab.tokens)
        self._ids = {piece: i for i, piece in enumerate(pieces) if piece}
        self._lengths = Lengths(self._ids)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        return [], []

    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        data, at = to_bytes(text), 0
        while at < len(data):
            found = longest(self._lengths, self._ids, data, at)
            at, i = found or (at + 1, self._unknown(data[at]))
            yield i

    def _unknown(self, byte: int) -> int:
        if self.unk is None:
            raise key_error("tokens", f"no token for the byte 0x{byte:02x}, and no unknown token")
        return self.unk

    def _piece(self, token: str) -> bytes:
        return _ESCAPE.sub(_unescape, to_bytes(token)) if "\\" in token else to_bytes(token)


def _unescape(match: regex.Match[bytes]) -> bytes:
    if match[1] is not None:
        return bytes.fromhex(match[1].decode())
    letter: bytes = match[2]
    return _LETTERS.get(letter, letter)
