"""WordPiece, as in BERT: words and punctuation apart, each matched greedily by the longest pieces."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import regex

from .base import Remembered, Tokenizer, to_bytes
from .bpe import lower
from .matching import Lengths, longest
from .spm import SPACE
from .unassigned import hide_new
from .vocab import Vocab

MAX_WORD = 100  # characters; longer words are unknown, as in Hugging Face's WordPiece

# Scripts without spaces between words: every character is a word. U+2B920 as in the original's ranges.
_IDEOGRAPHS = (
    r"\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    r"\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_ALONE = rf"\p{{P}}$+<=>^`|~{_IDEOGRAPHS}"
_WORD = regex.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")
_INVISIBLE = regex.compile(r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\ufffd]")
_ACCENTS = regex.compile(r"\p{Mn}")


class WPM(Tokenizer):
    """Splits words and punctuation, then each word by the longest pieces.

    Text becomes lower case and loses its accents unless the file says otherwise.
    """

    kind = "wpm"

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        vocab = Vocab(metadata, {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103})
        self._lower = vocab.flag("normalizer.lowercase", True)
        self._strip_accents = vocab.flag("normalizer.strip_accents", self._lower)
        super().__init__(vocab, add_bos=True, add_sep=True, pre=vocab.text("pre"))
        self._lengths = Lengths(vocab.tokens)
        self._unknown = self._required(True, "unk")
        self._words = Remembered(self._encode_word)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        return self._required(True, "bos"), self._required(True, "sep")

    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        words = _WORD.findall(self._normalized(text))
        return chain.from_iterable(map(self._words.__getitem__, words))

    def _normalized(self, text: str) -> str:
        text = hide_new(text)
        if self._strip_accents and not text.isascii():
            text = _ACCENTS.sub("", unicodedata.normalize("NFD", text))
        text = _INVISIBLE.sub("", text)
        return lower(text) if self._lower else text

    def _encode_word(self, word: str) -> list[int]:
        if len(word) > MAX_WORD:
            return self._unknown
        word, at = SPACE + word, 0
        pieces = []
        while at < len(word):
            found = longest(self._lengths, self.vocab.ids, word, at)
            if found is None:
                return self._unknown
            at, i = found
            pieces.append(i)
        return pieces

    def _piece(self, token: str) -> bytes:
        return to_bytes(token.replace(SPACE, " "))
