"""Byte-pair encoding: words split by an expression, then merged by rank.

Most vocabularies spell words byte by byte in GPT-2's alphabet, where every byte is a printable
character; some (gemma4) spell plain text with ``▁`` for the space, and unknown characters as byte tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import regex

from .base import Remembered, Tokenizer, to_bytes
from .merges import merge, read_merges
from .pretokenizers import pretokenizer
from .spm import SPACE, words_apart
from .vocab import Vocab

# GPT-2's alphabet: visible Latin-1 characters stand for themselves, the other bytes from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [b for b in range(256) if b not in _VISIBLE]
TO_ALPHABET = {b: 0x100 + n for n, b in enumerate(_OTHERS)}
FROM_ALPHABET = {c: b for b, c in TO_ALPHABET.items()}

_SOLID = regex.compile(r"\S+")
# a character and a ▁ after it, in one of the two halves of a merge "left right" or across them
_CROSSING = regex.compile(f"([^{SPACE} \0]) ?{SPACE}")


class BPE(Tokenizer):
    """Words from the pre-tokenizer, merged by the ranks of `tokenizer.ggml.merges`.

    A symbol that is no token, which only a broken vocabulary yields, is spelled by single characters;
    characters without a token are left out, as llama.cpp does.
    """

    kind = "bpe"

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        model = metadata["tokenizer.ggml.model"]
        vocab = Vocab(metadata, {} if model == "gemma4" else {"bos": 11, "eos": 11})
        pre = "gemma4" if model == "gemma4" else vocab.text("pre")
        recipe = pretokenizer(pre)
        if not recipe.has_default_bos and vocab.get("bos_token_id") is None:
            vocab.special.pop("bos", None)
        self._recipe = recipe
        super().__init__(
            vocab, add_bos=recipe.add_bos, add_sep=recipe.add_sep, pre=pre or "default"
        )
        self._merges = read_merges(vocab, required=pre != "kimi-k2")
        self._words = Remembered(self._encode_word)
        self._drop_spaces = recipe.drop_spaces or model == "whitespace"
        self._lower = model == "whitespace" and vocab.flag("normalizer.lowercase", pre != model)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        self.add_bos |= self._recipe.force_bos
        return super()._surroundings()

    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        return chain.from_iterable(map(self._words.__getitem__, self._split(text)))

    def _split(self, text: str) -> list[str]:
        if self._lower:
            text = lower(text)
        if self._recipe.composed:
            text = unicodedata.normalize("NFC", text)
        if self._drop_spaces:
            return [w for part in _SOLID.findall(text) for w in self._recipe.split(part)]
        if not self._recipe.escape_spaces:
            return self._recipe.split(text)
        lines = self._recipe.split(text.replace(" ", SPACE))
        if self._recipe.marked_words:
            lines = [w for line in lines for w in marked(line)]
        return [w for line in lines for w in self._words_of.findall(line)]

    def _encode_word(self, word: str) -> list[int]:
        recipe, ids, ranks = self._recipe, self.vocab.ids, self._ranks
        if recipe.byte_level:
            word = word.encode().decode("latin-1").translate(TO_ALPHABET)
        if word in ids and (recipe.ignore_merges or (recipe.newline_runs and not word.strip("\n"))):
            return [ids[word]]
        symbols = merge(word, lambda a, b: ranks.get(f"{a} {b}"))
        return [i for symbol in symbols for i in self._symbol(symbol)]

    def _symbol(self, symbol: str) -> Iterable[int]:
        i = self.vocab.ids.get(symbol)
        if i is not None:
            return (i,)
        if self._recipe.byte_level:
            parts = [self.vocab.ids.get(character) for character in symbol]
        else:
            parts = [self.vocab.ids.get(f"<0x{byte:02X}>") for byte in to_bytes(symbol)]
        return [i for i in parts if i is not None]

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """Rank of each merge by its string "left right": the file's strings need no splitting."""
        return dict(zip(self._merges, range(len(self._merges)), strict=True))

    @cached_property
    def _words_of(self) -> regex.Pattern[str]:
        """An expression for words that can be merged alone, because no merge reaches over their ends."""
        return words_apart(_CROSSING.findall("\0".join(self._ranks)))

    def _piece(self, token: str) -> bytes:
        if self._recipe.escape_spaces:
            return to_bytes(token.replace(SPACE, " "))
        if not self._recipe.byte_level:
            return to_bytes(token)
        try:
            return token.translate(FROM_ALPHABET).encode("latin-1")
        except UnicodeEncodeError:  # characters outside the alphabet stand for themselves
            return b"".join(map(_character, token))


def _character(c: str) -> bytes:
    byte = FROM_ALPHABET.get(ord(c), ord(c))
    return bytes((byte,)) if byte < 256 else to_bytes(c)


def marked(line: str) -> list[str]:
    """The words of a line, each of which begins with the mark of a space; newlines are one word."""
    if not line.strip("\n"):
        return [line]
    line = line if line.startswith(SPACE) else SPACE + line
    return [SPACE + word for word in line[1:].split(SPACE)]


def lower(text: str) -> str:
    """Turn a text to lower case character by character, so that a final sigma is like any other."""
    return text.replace("Σ", "σ").lower()
