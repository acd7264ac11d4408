"""Find special tokens in a text, before anything else is tokenized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .names import CONTROL, UNKNOWN, USER_DEFINED
from .vocab import Vocab

_SPACE = " \t\n\v\f\r"
_HEAD = 3  # tokens that share so many first characters are looked for only if the text has these

Part = str | int


class SpecialTokens:
    """Splits text at the special tokens it holds.

    The longest token is looked for first, in the whole text, as llama.cpp does: where two overlap, the
    longer wins, not the earlier. Control tokens count only when asked for; user-defined ones always.
    """

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._user_defined = set(vocab.of_types(USER_DEFINED))
        self._strips_left, self._strips_right = _stripping(vocab)
        self._by_head: defaultdict[str, list[int]] = defaultdict(list)
        for i in vocab.of_types(CONTROL, UNKNOWN, USER_DEFINED):
            self._by_head[vocab.tokens[i][:_HEAD]].append(i)

    def split(self, text: str, parse_special: bool) -> list[Part]:
        """The special ids and the non-empty texts between them, in order."""
        parts: list[Part] = [text] if text else []
        for i in self._present(text, parse_special):
            parts = [q for p in parts for q in (self._cut(p, i) if isinstance(p, str) else (p,))]
        return parts

    def _present(self, text: str, parse_special: bool) -> list[int]:
        """Ids of the special tokens that occur in the text, longest first."""
        tokens, allowed = self._vocab.tokens, self._user_defined
        found = [
            i
            for head, ids in self._by_head.items()
            if head in text
            for i in ids
            if (parse_special or i in allowed) and tokens[i] in text
        ]
        return sorted(found, key=lambda i: (-len(tokens[i].encode("utf-8", "surrogateescape")), i))

    def _cut(self, text: str, i: int) -> Iterable[Part]:
        pieces = text.split(self._vocab.tokens[i])
        last = len(pieces) - 1
        for n, piece in enumerate(pieces):
            if n > 0:
                yield i
                piece = piece.lstrip(_SPACE) if i in self._strips_right else piece
            if n < last and i in self._strips_left:
                piece = piece.rstrip(_SPACE)
            if piece:
                yield piece


def _stripping(vocab: Vocab) -> tuple[set[int], set[int]]:
    """Ids that swallow the white space on their left, and on their right.

    The file has no field for this. llama.cpp knows the few families concerned by name, and so must we.
    """
    pre, name = vocab.text("pre"), vocab.general("name").lower()
    arch = vocab.general("architecture")
    ids = vocab.ids
    if any(s in pre for s in ("jina-v2-de", "jina-v2-es", "jina-v2-code", "mmbert")) or any(
        s in arch for s in ("nomic-bert-moe", "jina-bert-v3")
    ):
        return _these(ids, "<mask>"), set()
    if "phi-3" in name or "phi3" in name:
        special = set(vocab.of_types(CONTROL, UNKNOWN, USER_DEFINED)) | _these(ids, "</s>")
        return set(), special - _these(ids, "<unk>", "<s>", "<|endoftext|>")
    if "modern-bert" in name:
        return _these(ids, "[MASK]"), set()
    return set(), set()


def _these(ids: dict[str, int], *tokens: str) -> set[int]:
    return {ids[token] for token in tokens if token in ids}
