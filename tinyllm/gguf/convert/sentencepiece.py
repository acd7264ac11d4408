"""Reading SentencePiece models: a protocol buffer of pieces with their scores and types.

Source: https://github.com/google/sentencepiece (sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import GGUFError

UNIGRAM, BPE = 1, 2


@dataclass
class Pieces:
    """What a model file says.

    Attributes
    ----------
    model_type : int
        `UNIGRAM` or `BPE`.
    pieces : list of (str, float, int)
        Text, score, and type as GGUF numbers them.
    charsmap : bytes
        The compiled normalisation, empty for none.
    add_prefix, remove_spaces : bool
        Whether a space is put before a text, and whether runs of spaces become one.
    """

    model_type: int = UNIGRAM
    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    charsmap: bytes = b""
    add_prefix: bool = True
    remove_spaces: bool = True


def read_pieces(path: Path) -> Pieces:
    """Read a ``tokenizer.model``; GGUFError if it is none."""
    found = Pieces()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                found.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                spec = dict(_fields(value))
                found.model_type = _whole(spec.get(3, UNIGRAM))
            elif number == 3 and isinstance(value, bytes):
                spec = dict(_fields(value))
                charsmap = spec.get(2, b"")
                found.charsmap = charsmap if isinstance(charsmap, bytes) else b""
                found.add_prefix = bool(spec.get(3, 1))
                found.remove_spaces = bool(spec.get(4, 1))
    except (ValueError, IndexError, struct.error) as e:
        raise GGUFError(f"no SentencePiece model: {e}", path=str(path)) from None
    if not found.pieces:
        raise GGUFError("no SentencePiece model: it has no pieces", path=str(path))
    return found


def _piece(data: bytes) -> tuple[str, float, int]:
    spec = dict(_fields(data))
    text, score = spec.get(1, b""), spec.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece without text")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], _whole(spec.get(3, 1))


def _whole(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number is expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: their numbers, and integers or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of kind {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if at + size > len(data):
            raise ValueError("the file ends within a field")
        yield number, data[at : at + size]
        at += size
