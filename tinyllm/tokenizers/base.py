"""What all tokenizers share: special tokens around and inside the text, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import ClassVar, TypeVar
from weakref import WeakMethod

from ..errors import ArgumentError
from .names import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from .special import SpecialTokens
from .vocab import Vocab, key_error

LONG_WORD = 256  # characters; longer words hardly repeat and are not remembered

V = TypeVar("V")

_HIDDEN = frozenset((CONTROL, UNKNOWN))


class Tokenizer(ABC):
    """Text to ids and back, for one vocabulary.

    Attributes
    ----------
    kind : str
        "spm", "bpe", "wpm", "unigram" or "rwkv".
    pre : str
        The pre-tokenizer's name; matters for "bpe" only.
    n_vocab : int
        Number of tokens.
    bos, eos, unk, sep, pad, mask, eot : int or None
        Special ids by role.
    eog : frozenset of int
        Every id that ends a generation.
    add_bos, add_eos, add_sep, add_space_prefix : bool
        What `encode` puts around the text, and whether it puts a space before it.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        vocab: Vocab,
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        add_sep: bool = False,
        add_space_prefix: bool = False,
        pre: str = "",
    ) -> None:
        self.vocab = vocab
        self.pre = pre
        self.n_vocab = len(vocab)
        self.eog = vocab.eog
        self.bos, self.eos, self.unk, self.sep, self.pad, self.mask, self.eot = (
            vocab.special.get(r) for r in ("bos", "eos", "unk", "sep", "pad", "mask", "eot")
        )
        self.add_bos = vocab.flag("add_bos_token", add_bos)
        self.add_eos = vocab.flag("add_eos_token", add_eos)
        self.add_sep = vocab.flag("add_sep_token", add_sep)
        self.add_space_prefix = vocab.flag("add_space_prefix", add_space_prefix)
        self._types = vocab.types.tobytes()  # indexed much faster than the array
        self._special = SpecialTokens(vocab)
        self._before, self._after = self._surroundings()

    # ---- text to ids

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Turn text into ids.

        Parameters
        ----------
        text : str
            Any text; lone surrogates are refused.
        add_special : bool
            Put the beginning and end tokens around it that the file asks for.
        parse_special : bool
            Read control tokens spelled in the text, such as ``<|im_end|>``, as such; otherwise they
            are text like any other. User-defined tokens are always read.

        Returns
        -------
        list of int
        """
        _require_text(text)
        ids = list(self._before) if add_special else []
        ids += self._encode_parts(text, parse_special, after_special=True)
        return ids + self._after if add_special else ids

    def encode_inside(self, text: str) -> list[int]:
        """Turn text that stands in the middle of another into ids: no space is put before it.

        Nothing is added, and control tokens spelled in it are text.
        """
        _require_text(text)
        return self._encode_parts(text, parse_special=False, after_special=False)

    def _encode_parts(self, text: str, parse_special: bool, after_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._special.split(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_text(part, after_special)
            after_special = isinstance(part, int)
        return ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Turn two texts into one sequence for a reranker: [CLS] first [SEP] second [SEP].

        Vocabularies that end a text with ``</s>`` (RoBERTa's) put two of them between the texts.

        Returns
        -------
        ids, token types : lists of int
            The type is 0 for tokens of the first text and 1 for those of the second.
        """
        head, tail = self.encode(first), self.encode(second)[int(self.add_bos) :]
        end = self.eos if self.eos is not None else self.sep
        if end is not None and self.token_text(end) == "</s>":
            tail = [end, *tail]
        return head + tail, [0] * len(head) + [1] * len(tail)

    @abstractmethod
    def _encode_text(self, text: str, after_special: bool) -> Iterable[int]:
        """Ids of a non-empty text without special tokens.

        `after_special` says that a special token, or nothing, stands before the text.
        """

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """Ids that `encode` puts before and after."""
        return self._required(self.add_bos, "bos"), self._required(self.add_eos, "eos")

    def _required(self, wanted: bool, role: str) -> list[int]:
        i = self.vocab.special.get(role)
        if not wanted:
            return []
        if i is None:
            raise key_error(f"add_{role}_token", f"true, but the file names no {role} token")
        return [i]

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD.

        The one space that `encode` put before the text is dropped. With `skip_special`, control tokens
        are left out.
        """
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """Turn ids into the exact bytes they stand for.

        The one space that `encode` put before the text is dropped. With `skip_special`, control tokens
        are left out.
        """
        try:
            given = iter(ids)
        except TypeError:
            raise ArgumentError(
                f"ids is {ids!r:.40}; expected a sequence of ids, such as [{self.eos}]"
            ) from None
        pieces: list[bytes] = []
        drop_space = self.add_space_prefix
        for i in given:
            if self._is_hidden(i):
                pieces.append(b"" if skip_special else self._spelled(i))
                continue
            piece = self.token_bytes(i)
            pieces.append(piece.removeprefix(b" ") if drop_space else piece)
            drop_space = False
        return b"".join(pieces)

    def token_bytes(self, i: int) -> bytes:
        """The bytes that one id adds to a text: with its leading space; none for a control token."""
        type_ = self._type(i)
        if type_ == NORMAL:
            return self._piece(self.vocab.tokens[i])
        if type_ == BYTE:
            return bytes((self.vocab.byte_value(i),))
        return self._spelled(i) if type_ == USER_DEFINED else b""

    def token_text(self, i: int) -> str:
        """How the vocabulary spells a token; control tokens have a spelling too."""
        self._type(i)
        return self.vocab.tokens[i]

    @abstractmethod
    def _piece(self, token: str) -> bytes:
        """The bytes that a normal token stands for."""

    def _spelled(self, i: int) -> bytes:
        return to_bytes(self.vocab.tokens[i])

    # ---- questions

    def token_id(self, text: str) -> int | None:
        """The id of a token spelled exactly so in the vocabulary, or None."""
        return self.vocab.ids.get(text)

    def is_control(self, i: int) -> bool:
        """Whether the token is never part of visible text."""
        return self._is_hidden(i)

    def is_byte(self, i: int) -> bool:
        """Whether the token stands for one byte, such as ``<0x0A>``."""
        return self._type(i) == BYTE

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling to id of every control and unknown token."""
        tokens = self.vocab.tokens
        return {tokens[i]: i for i in self.vocab.of_types(CONTROL, UNKNOWN)}

    def _is_hidden(self, i: int) -> bool:
        return self._type(i) in _HIDDEN

    def _type(self, i: int) -> int:
        with suppress(TypeError):  # what is no whole number
            if 0 <= i < self.n_vocab:
                return self._types[i]
        raise ArgumentError(
            f"token id {i!r:.40}: the vocabulary has the ids 0 to {self.n_vocab - 1}"
        )

    def __repr__(self) -> str:
        pre = f", pre={self.pre!r}" if self.pre else ""
        return f"<Tokenizer {self.kind}{pre}, {self.n_vocab} tokens>"


class Remembered(dict[str, V]):
    """A cache of what `compute` makes of each word; few words make up most of a text.

    Parameters
    ----------
    compute : method
        From a word to anything; of the object that owns the cache.
    limit : int
        How many words are kept before starting afresh.
    """

    def __init__(self, compute: Callable[[str], V], limit: int = 1 << 17) -> None:
        super().__init__()
        # a strong reference would make a circle, and the tokenizer's memory wait for the collector
        self._compute, self._limit = WeakMethod(compute), limit

    def __missing__(self, word: str) -> V:
        compute = self._compute()
        assert compute is not None  # its tokenizer owns this cache
        value = compute(word)
        if len(word) <= LONG_WORD:
            if len(self) >= self._limit:
                self.clear()
            self[word] = value
        return value


def to_bytes(text: str) -> bytes:
    """Encode text as UTF-8; a lone surrogate becomes the stray byte that it stands for."""
    return text.encode("utf-8", "surrogateescape")


def _require_text(text: str) -> None:
    if not isinstance(text, str):
        raise ArgumentError(f"text is expected, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at {error.start}; "
            "remove it, or decode the bytes it came from"
        ) from None
