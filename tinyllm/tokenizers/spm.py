"""SentencePiece BPE, as in LLaMA 1 and 2: merges by score, unknown characters as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import regex

from .base import Remembered, Tokenizer, to_bytes
from .merges import merge
from .vocab import Vocab, key_error

SPACE = "▁"  # how the vocabulary spells a space

CROSSING = regex.compile(f"([^{SPACE}\0]){SPACE}")  # a character and a space after it, in one token


class SPM(Tokenizer):
    """Starts from characters and merges the neighbours whose union is the token of highest score."""

    kind = "spm"

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        vocab = Vocab(metadata, {"bos": 1, "eos": 2, "unk": 0})
        super().__init__(vocab, add_bos=True, add_space_prefix=True, pre=vocab.text("pre"))
        self._scores = vocab.scores()
        self._words = Remembered(self._encode_word)

    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        prefix = SPACE if self.add_space_prefix and after_special else ""
        text = prefix + text.replace(" ", SPACE)
        return chain.from_iterable(map(self._words.__getitem__, self._words_of.findall(text)))

    def _encode_word(self, word: str) -> list[int]:
        ids, ranks = self.vocab.ids, self._ranks
        out: list[int] = []
        for symbol in merge(word, lambda a, b: ranks.get(a + b)):
            i = ids.get(symbol)
            out += (i,) if i is not None else map(self._byte, to_bytes(symbol))
        return out

    def _byte(self, byte: int) -> int:
        i = self.vocab.byte_id(byte)
        i = self.unk if i is None else i
        if i is None:
            raise key_error("tokens", f"no token for the byte <0x{byte:02X}>, and no unknown token")
        return i

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """Token to the rank of its score, 0 the highest; equal scores have equal ranks."""
        _, ranks = np.unique(-self._scores, return_inverse=True)
        return dict(zip(self.vocab.tokens, ranks.tolist(), strict=True))

    @cached_property
    def _words_of(self) -> regex.Pattern[str]:
        """An expression for words that can be merged alone, because no token reaches over their ends."""
        return words_apart(CROSSING.findall("\0".join(self.vocab.tokens)))

    def _piece(self, token: str) -> bytes:
        return to_bytes(token.replace(SPACE, " "))


def words_apart(joining: Iterable[str]) -> regex.Pattern[str]:
    """An expression for words with the spaces before them, so that each can be merged by itself.

    Parameters
    ----------
    joining : iterable of str
        Characters that the vocabulary joins to a space after them; no word ends there.
    """
    join = "".join(f"\\U{ord(c):08x}" for c in sorted(set(joining)))
    inner = f"[^{SPACE}]|(?<=[{join}]){SPACE}+" if join else f"[^{SPACE}]"
    return regex.compile(f"{SPACE}*(?:{inner})+|{SPACE}+")
