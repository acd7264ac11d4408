"""How a text can end: few tokens that make it whole from where it stands, found by trying.

A grammar does not say how long its texts must be. So a copy of its matcher goes on with the tokens that close
most: brackets, quotes, then a short value. Where that only fills a string, other ways are tried, short first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

OPEN, CLOSE, QUOTE = b"{[(", b"}])", b'"'
DIGITS = b"1023456789"  # 1 first: there is no month or year 0
LONG_ENOUGH = 8  # bytes of a token that fills a string
MOST_FILLED = 128  # tokens of an ending that close nothing, and of one on another way
MOST_FILLED_AROUND = 4
LEFT_AT = 0, 1, 4, 32  # tokens of the straight way that other ways begin with
MOST_TRIED = 256  # tokens tried on other ways: some 20 ms
FAR = 128  # tokens that are left for an ending, where no other ways need be tried yet
MANY = 8  # inside of a string, more than one token in so many is allowed


class Endings:
    """Finds endings in one vocabulary.

    Parameters
    ----------
    words : sequence of bytes
        What each token is.
    control, eog : collection of int
        Tokens that are no text, and those that end it.
    n_vocab : int
        How many bits a matcher's mask has.
    """

    def __init__(
        self, words: Sequence[bytes], control: Collection[int], eog: Collection[int], n_vocab: int
    ) -> None:
        kinds: dict[str, list[tuple[int, ...]]] = {
            kind: [] for kind in ("closing", "quotes", "commas", "digits", "others")
        }
        skipped = {*control, *eog}
        for i, word in enumerate(words):
            if word and i not in skipped:
                kind, *order = _kind(word)
                kinds[kind].append((*order, i))
        closing, quotes, commas, digits, others = (
            np.array([i for *_, i in sorted(some)], np.intp) for some in kinds.values()
        )
        named = np.array(sorted(set(control) - set(eog)), np.intp)
        some, rest = others[:4096], others[4096:]  # to look at all is slow
        self._inside = (named, quotes[::-1]), (some, rest, digits, commas, closing)
        self._between = (closing, named, quotes, commas), (digits, some, rest)
        self._first = np.array([word[0] if word else 0 for word in words], np.uint8)
        self._n_vocab = n_vocab
        self._bits = np.zeros(-(-n_vocab // 32), np.int32)

    def find(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens that make the text whole from where the matcher stands, which stays there.

        More than ``most`` where it takes too many: they are not all then. None where no end is found.
        """
        n_filled = min(most, MOST_FILLED)
        path, lost = self._straight(matcher.deep_copy(), [], most, n_filled)
        if not lost:
            return path
        return self._around(matcher, path, most) if 0 < most <= FAR else None

    def _straight(
        self, place: LLMatcher, path: list[int], most: int, n_filled: int
    ) -> tuple[list[int], bool]:
        """Close what is open until the text is whole, or has too many tokens; ``path`` are its first.

        The second value is whether it got lost: it could only fill a string that nothing closes.
        """
        path, n_chosen, n_left, n_same, was_inside = list(path), 0, n_filled, 0, False
        while not place.is_accepting():
            if place.is_error():
                return path, True
            forced = place.compute_ff_tokens()
            if forced:
                n_same, was_inside = 0, False
            else:
                allowed = self._allowed(place)
                inside = bool(np.count_nonzero(allowed) > self._n_vocab // MANY)
                token, fills = self._best(allowed, inside)
                fills = fills or (inside and was_inside)  # what was to close has not
                forced = [token] * (1 + n_same // 2 * fills)  # a long string in few masks
                n_same = n_same + len(forced) if fills else 0
                n_left -= len(forced) * fills
                if n_left < 0:
                    return path, True
                n_chosen, was_inside = n_chosen + len(forced), inside
            path += forced[: place.try_consume_tokens(forced)]
            if len(path) > most and 2 * (n_filled - n_left) <= n_chosen:
                break
        return path, False

    def _around(self, matcher: LLMatcher, straight: list[int], most: int) -> list[int] | None:
        """An ending on another way; two places are taken for one where the same tokens may come."""
        ways: deque[tuple[LLMatcher, list[int]]] = deque()
        seen, n_tried = set[int](), 0
        for n in LEFT_AT:
            place = matcher.deep_copy()
            place.consume_tokens(straight[:n])
            ways.append((place, straight[:n]))
        while ways:
            start, path = ways.popleft()
            for token in self._others(start):
                place = start.deep_copy()
                place.consume_token(token)
                if all(place.validate_tokens([again]) for again in (token, *straight[-1:])):
                    continue  # the string goes on
                forced = place.compute_ff_tokens()
                place.consume_tokens(forced)
                tried = [*path, token, *forced]
                self._allowed(place)
                here = hash(self._bits.tobytes())
                n_tried += 1
                if n_tried > MOST_TRIED:
                    return None
                if place.is_error() or here in seen or len(tried) > most:
                    continue
                seen.add(here)
                found, lost = self._straight(place.deep_copy(), tried, most, MOST_FILLED_AROUND)
                if not lost and len(found) <= most:
                    return found
                place_behind = matcher.deep_copy()
                place_behind.consume_tokens(found)
                ways += (place, tried), (place_behind, found)
        return None

    def _allowed(self, place: LLMatcher) -> NDArray[np.bool_]:
        place.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._n_vocab, bitorder="little")
        return bits.view(np.bool_)

    def _best(self, allowed: NDArray[np.bool_], inside: bool) -> tuple[int, bool]:
        """The token that closes most, and whether it only fills; inside a string a bracket closes nothing."""
        for kinds, fills in zip(
            self._inside if inside else self._between, (False, True), strict=True
        ):
            for ids in kinds:
                here = allowed[ids]
                if here.any():
                    return int(ids[here.argmax()]), fills
        return int(allowed.argmax()), True

    def _others(self, place: LLMatcher) -> list[int]:
        """A token for each byte that may come next, those that may close something first."""
        allowed = self._allowed(place)
        ids = np.concatenate([ids[allowed[ids]] for kinds in self._between for ids in kinds])
        _, at = np.unique(self._first[ids], return_index=True)
        found: list[int] = ids[np.sort(at)].tolist()
        return sorted(
            found, key=lambda i: chr(self._first[i]).isalnum()
        )  # words lead on, marks away


def _kind(word: bytes) -> tuple[str, int, int, int]:
    """What a token is good for, and three numbers that sort it among its like."""
    text = word.strip()
    bare = text.strip(OPEN + CLOSE + QUOTE)
    opened = len(text.translate(None, CLOSE)) - len(text.translate(None, OPEN))
    if text and not bare:
        n_quotes = text.count(QUOTE)
        if n_quotes and text.startswith(QUOTE) and opened <= 0:  # "" opens and closes, "} closes
            return "quotes", -n_quotes, -opened, len(word)
        if not n_quotes and opened <= 0:
            return "closing", opened, len(word), 0
    if text == b",":  # a number goes on for ever: before its next digit comes what follows it
        return "commas", len(word), 0, 0
    if len(text) == 1 and text in DIGITS:
        return "digits", DIGITS.index(text), len(word), 0
    return "others", max(opened, 0), not bare.isalpha(), -min(len(word), LONG_ENOUGH)
