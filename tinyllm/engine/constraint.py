"""What a text must be: a JSON schema, a regular expression or a grammar, kept to token by token.

llguidance (the extra ``[json]``) parses what was written and says which tokens may follow, as one bit each.
Where only one text can follow, it gives that text's tokens: they join the sequence without a choice. As the
tokens that may come grow few, only those are chosen behind which the text can still end in time.
"""

from __future__ import annotations

import json
import re
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, UnsupportedModel
from .ending import Endings

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from ..tokenizers import Tokenizer

Schema: TypeAlias = Mapping[str, Any] | str
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python's json.dumps writes it: whitespace without end would be allowed otherwise."""
_KEYWORDS = {  # which keyword a message speaks of that does not name it
    "Pointer ": "$ref",
    "Resource ": "$ref",
    "regex parse error": "pattern",
    "Invalid type": "type",
    "Unknown format": "format",
}
_PATTERNS = re.compile(r'"pattern": "((?:[^"\\]|\\.)*)"')
# what stands for something else
_SIGNS = re.compile(r"""\[[^\]]*\]|\{[^}]*\}|\\+\w|[\\()|*+?.^$"/\n]""")
MOST_WORDS = 16
FAR = 128  # tokens that are left, where a way may be taken behind which no ending is known
WATCHED = 512  # tokens before the last that may come: from there on each leaves room for an ending


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as llguidance has them, and how texts of them end."""

    tokens: LLTokenizer
    endings: Endings


class Grammar:
    """A constraint compiled for one vocabulary; every text that keeps to it starts from `begin`.

    Parameters
    ----------
    tokenizer : Tokenizer
    n_vocab : int
        How many logits a step gives; at least the size of the vocabulary.
    source : str
        In llguidance's own form; `compile_grammar` makes it.
    name : str
        What the caller called it, for errors.
    words : sequence of str
        What its expressions say letter by letter: a text may end by one.

    Raises
    ------
    ArgumentError
        llguidance cannot hold the text to it; the message says why.
    UnsupportedModel
        The vocabulary has no token that ends a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, n_vocab: int, source: str, name: str, words: Sequence[str] = ()
    ) -> None:
        from llguidance import LLMatcher

        self._vocabulary, self._name = _vocabulary_of(tokenizer, n_vocab), name
        tokens = self._vocabulary.tokens
        wrong, messages = LLMatcher.validate_grammar_with_warnings(source, tokens)
        if wrong:
            raise ArgumentError(f"{name}: {_explained(messages[0])}")
        self._matcher = LLMatcher(tokens, source, log_level=0)
        self._said = [tokens.tokenize_str(word) for word in words]

    def begin(self) -> Constraint:
        """The constraint of a text of which nothing is written yet."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary, self._name, self._said)


class Constraint:
    """Where one text stands in its grammar."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, name: str, said: Sequence[Sequence[int]]
    ) -> None:
        self._said = said
        self._matcher, self._name, self._endings = matcher, name, vocabulary.endings
        self._n_vocab, self._end = vocabulary.tokens.vocab_size, vocabulary.tokens.eos_token
        self._ending: list[int] | None = None  # tokens that would make the text whole, if known
        self._behind: tuple[int, list[int] | None] | None = (
            None  # a token, and the ending behind it
        )
        self._sought_at = sys.maxsize  # an ending is sought once no more tokens than these may come
        self._bits = np.zeros(-(-self._n_vocab // 32), np.int32)
        self._forced: list[int] | None = None  # None: not asked for at this place yet

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next -> bool [n_vocab]."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._n_vocab, bitorder="little")
        return bits.view(np.bool_)

    def forced(self) -> int | None:
        """The next token, where the text can go on in one way only; it is not taken yet."""
        if self._forced is None:
            stopped = self._matcher.is_stopped()
            self._forced = [self._end] if stopped else self._matcher.compute_ff_tokens()[::-1]
            self._check()
        return self._forced[-1] if self._forced else None

    def take(self, chosen: int) -> None:
        """Go on behind a token that does not end the text."""
        self._matcher.consume_token(chosen)
        self._check()
        if self._forced:
            self._forced.pop()
        self._forced = self._forced or None
        known, behind = self._ending, self._behind
        self._behind = None
        if behind is not None and behind[0] == chosen:
            self._ending = behind[1]
        elif known:
            here = known[0] == chosen
            self._ending = known[1:] if here else known if self._ends(known) else None

    def in_time(self, chosen: int, n_left: int) -> int:
        """The token, where the text can still end behind it; else one on the way to its end.

        ``n_left`` tokens may come, this one among them; a token that ends the text is not counted. Where no
        ending is known here, or none is short enough, any token is taken.
        """
        if n_left > self._sought_at:
            return chosen
        known, behind = self._ending, self._ending_behind(chosen, n_left - 1)
        if behind is None or len(behind) >= n_left:
            if known is None:
                known = self._ending = self.ending(n_left)
            fits = known is not None and len(known) <= n_left
            if known is not None and fits and (behind is not None or n_left <= FAR):
                return known[0] if known else self._end
            behind, self._sought_at = None, max(FAR, n_left // 2) if fits else n_left // 4
        elif n_left > (watched := max(WATCHED, 2 * len(behind))):
            behind, self._sought_at = None, watched
        self._behind = chosen, behind
        return chosen

    def ending(self, most: int) -> list[int] | None:
        """Tokens that make the text whole; more than ``most`` where it takes too many, None if unknown."""
        return self._endings.find(self._matcher, most, self._said)

    def _ending_behind(self, chosen: int, most: int) -> list[int] | None:
        """An ending behind a token: the rest of the known one, that one, or another."""
        known = self._ending
        if known and known[0] == chosen:
            return known[1:]
        if known is not None and len(known) <= most and self._ends([chosen, *known]):
            return known
        place = self._matcher.deep_copy()
        place.consume_token(chosen)
        return self._endings.find(place, most, self._said)

    def _ends(self, ids: list[int]) -> bool:
        """Whether these tokens make the text whole."""
        return self._matcher.validate_tokens([*ids, self._end]) > len(ids)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().split("\n")[0]
            if reason == "NoExtensionBias":  # no token may come, and the text may not end
                raise ArgumentError(
                    f"{self._name}: no text keeps to it; a rule calls itself without end"
                )
            # its limits are met while a text is written: it is what was asked for that is too large
            raise ArgumentError(f"{self._name} cannot be kept to any longer: {reason}")


def compile_grammar(
    tokenizer: Tokenizer | None,
    n_vocab: int,
    json_schema: Schema | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> Grammar | None:
    """What the arguments of ``Model.generate`` ask for; None where they ask for nothing.

    Raises
    ------
    ArgumentError
        More than one is given, llguidance is not installed, or it cannot hold a text to what is given: the
        message names the keyword.
    """
    options = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    given = [name for name, value in options.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(given)} are given; expected one of them")
    (name,) = given
    if tokenizer is None:
        raise UnsupportedModel(f"{name} needs a vocabulary, and the file has none")
    try:
        import llguidance
    except ImportError:
        raise ArgumentError(f"{name} needs llguidance: pip install 'tinyllm[json]'") from None
    matcher = llguidance.LLMatcher
    try:
        if json_schema is not None:
            source = matcher.grammar_from_json_schema(_schema(json_schema), defaults=JSON_STYLE)
        elif regex is not None:
            source = matcher.grammar_from_regex(_text(name, regex))
        else:
            source = llguidance.grammar_from("gbnf", _spelled(_text(name, grammar)))
    except ArgumentError:
        raise
    except (ValueError, TypeError) as error:  # half a surrogate pair, too
        raise ArgumentError(f"{name}: {_explained(str(error))}") from None
    expressions = (
        _PATTERNS.findall(_schema(json_schema)) if name == "json_schema" else [str(options[name])]
    )
    return Grammar(tokenizer, n_vocab, source, name, _words(" ".join(expressions)))


def _schema(schema: Any) -> str:
    """A schema's JSON, checked to be an object of JSON's own types."""
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(found, Mapping):
            return json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema is no JSON: {error}") from None
    raise ArgumentError(f"json_schema={schema!r:.40}; expected an object (a dict, or its JSON)")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not (value if name == "regex" else value.strip()):
        raise ArgumentError(f"{name}={value!r:.40}; expected a text that is not empty")
    return value


def _words(expression: str) -> list[str]:
    """The parts of expressions that stand for themselves; the last ones, for there they end."""
    parts = _SIGNS.split(expression)
    return list(dict.fromkeys(part for part in reversed(parts) if part.strip()))[:MOST_WORDS]


def _spelled(grammar: str) -> str:
    """A grammar without GBNF's ``\\u00e9`` and ``\\U0001f600``, which llguidance does not read."""

    def character(found: re.Match[str]) -> str:
        code = int(found[2] or found[3], 16)
        if code > sys.maxunicode:
            raise ArgumentError(f"grammar: {found[0]} is no character")
        return found[1] + (f"\\x{code:02x}" if code < 128 else chr(code))

    escapes = r"(?<!\\)((?:\\\\)*)\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))"
    return re.sub(escapes, character, grammar) if "::=" in grammar else grammar


def _explained(message: str) -> str:
    """A message of llguidance in one line that names the keyword it is about."""
    lines = [line.strip() for line in message.split("\n")]
    if len(lines) > 1 and (reason := [x for x in lines if x.startswith("error: ")]):
        lines[0] += f" {lines[1]}: {reason[0].removeprefix('error: ')}"
    if found := re.fullmatch(r"Unimplemented keys: \[(.*)\]", lines[0]):
        keywords = found[1].replace('"', "")
        return f"the keyword {keywords} cannot be held; leave it out, or check it afterwards"
    if lines[0].startswith("oneOf "):
        return "the keyword oneOf cannot be held where its schemas overlap; use anyOf"
    keyword = next((k for begin, k in _KEYWORDS.items() if lines[0].startswith(begin)), None)
    return f"{keyword}: {lines[0]}" if keyword else lines[0]


class _Words:
    """A vocabulary in the form that llguidance reads; it must not keep the tokenizer alive."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = [_word(tokenizer, i) for i in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else tokenizer.encode_inside(text)


def _word(tokenizer: Tokenizer, i: int) -> bytes:
    """A token's bytes; the byte 0xff before the spelling of a control token marks it as one."""
    if tokenizer.is_control(i):
        return b"\xff" + tokenizer.token_text(i).encode("utf-8", "surrogateescape")
    return tokenizer.token_bytes(i)


_vocabularies: weakref.WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]] = (
    weakref.WeakKeyDictionary()
)


def _vocabulary_of(tokenizer: Tokenizer, n_vocab: int) -> Vocabulary:
    """The vocabulary as llguidance has it, made once: at 128,000 tokens it takes a second."""
    from llguidance import LLTokenizer

    made = _vocabularies.setdefault(tokenizer, {})
    if n_vocab not in made:
        first = [] if tokenizer.eos is None else [tokenizer.eos]
        ends = first + sorted(tokenizer.eog - set(first))
        if not ends:
            raise UnsupportedModel("the vocabulary has no token that ends a text")
        words: Any = _Words(tokenizer)
        words.eos_token_id = ends[0]
        endings = Endings(words.tokens, words.special_token_ids, tokenizer.eog, n_vocab)
        made[n_vocab] = Vocabulary(LLTokenizer(words, n_vocab=n_vocab, eos_token=ends), endings)
    return made[n_vocab]
