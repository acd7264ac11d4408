"""Unigram language model, as in T5 and XLM-RoBERTa: the most probable way to cut a text into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import regex

from .base import Remembered, Tokenizer, to_bytes
from .charsmap import CharsMap
from .matching import Lengths
from .names import NORMAL, UNUSED, USER_DEFINED
from .spm import CROSSING, SPACE, words_apart
from .vocab import Vocab

Arc = tuple[int, float]  # length and score of a token

UNKNOWN_PENALTY = 10.0  # an unknown character scores this much below the worst token


class Unigram(Tokenizer):
    """Normalizes with the file's character map, then maximises the sum of scores (Viterbi)."""

    kind = "unigram"

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        vocab = Vocab(metadata, {"eos": 1, "unk": 2, "pad": 0})
        super().__init__(vocab, add_eos=True, pre=vocab.text("pre"))
        self._merge_spaces = vocab.flag("remove_extra_whitespaces", False)
        self._unknown = self._required(True, "unk")[0]
        usable = vocab.of_types(NORMAL, USER_DEFINED, UNUSED)
        self._scores, self._unknown_score = _scores(vocab, usable)
        self._lengths = Lengths(self._scores)
        self._arcs = Remembered(self._arcs_of, limit=1 << 14)
        self._charsmap = CharsMap(
            vocab.get("precompiled_charsmap"),
            [vocab.tokens[i] for i in vocab.of_types(USER_DEFINED)],
        )

    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        text = self._spaced(self._charsmap.normalize(text))
        ids: list[int] = []
        for start, end in self._best_cuts(text):
            piece = text[start:end]
            i = self.vocab.ids[piece] if piece in self._scores else self._unknown
            if i != self._unknown or not ids or ids[-1] != i:  # unknown neighbours become one token
                ids.append(i)
        return ids

    def _spaced(self, text: str) -> str:
        """Spell spaces, and put one before the first word (or each, when repeated ones are merged)."""
        if self._merge_spaces:
            return "".join(SPACE + word for word in text.split(" ") if word)
        bare = text.lstrip(" ")
        if self.add_space_prefix and bare:
            text = text[: len(text) - len(bare)] + " " + bare
        return text.replace(" ", SPACE)

    def _best_cuts(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token of the best tokenization; sums are float64, left to right."""
        n, at = len(text), 0
        best, start = [0.0] + [-np.inf] * n, [0] * (n + 1)
        for word in self._words_of.findall(text):
            for arcs in self._arcs[word]:
                here = best[at]
                for length, score in arcs:
                    if here + score > best[at + length]:
                        best[at + length], start[at + length] = here + score, at
                at += 1
        cuts = []
        while n > 0:
            cuts.append((start[n], n))
            n = start[n]
        return cuts[::-1]

    def _arcs_of(self, word: str) -> list[list[Arc]]:
        """For each place in a word, the tokens that begin there, shortest first.

        Where none of them has one character, an unknown character is added.
        """
        out: list[list[Arc]] = []
        for at in range(len(word)):
            pieces = (word[at : at + n] for n in self._lengths.at(word, at) if at + n <= len(word))
            arcs = [(len(p), self._scores[p]) for p in pieces if p in self._scores]
            if not arcs or arcs[0][0] > 1:
                arcs.append((1, self._unknown_score))
            out.append(arcs)
        return out

    @cached_property
    def _words_of(self) -> regex.Pattern[str]:
        """An expression for words over whose ends no token reaches."""
        return words_apart(CROSSING.findall("\0".join(self._scores)))

    def _piece(self, token: str) -> bytes:
        return to_bytes(token.replace(SPACE, " "))


def _scores(vocab: Vocab, usable: list[int]) -> tuple[dict[str, float], float]:
    """The score of each token, and that of an unknown one; user-defined tokens win over all."""
    scores = vocab.scores()
    normal = scores[vocab.types == NORMAL]
    worst = np.float32(normal.min() if len(normal) else 0.0) - np.float32(UNKNOWN_PENALTY)
    scores[vocab.types == USER_DEFINED] = 0.0
    by_token = zip((vocab.tokens[i] for i in usable), scores[usable].tolist(), strict=True)
    return dict(by_token), float(worst)
