"""How a text can end: few tokens that make it whole from where it stands, found by trying.

A grammar does not say how long its texts must be. So a copy of its matcher goes on with the tokens that close
most: brackets, quotes, then a short value. Where that is somewhat too long, or only fills a string, one choice
after the other is made otherwise.
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
# places left where the same tokens may come: items of a list, not a string's letters
MOST_ALIKE = 16
MOST_TRIED = 2048  # places looked at on other ways, some 20 ms
MOST_LOOKED = 1 << 26  # tokens looked at there: fewer places in a large vocabulary, some 40 ms
MOST_TOO_LONG = 6  # times what fits: where the straight way has more tokens, no other is looked for
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
        self._most_tried = min(MOST_TRIED, MOST_LOOKED // n_vocab)
        self._end = min(eog, default=-1)
        self._quote = next((i for i, w in enumerate(words) if w == QUOTE), self._end)
        self._bits = np.zeros(-(-n_vocab // 32), np.int32)

    def find(
        self, matcher: LLMatcher, most: int, said: Sequence[Sequence[int]] = ()
    ) -> list[int] | None:
        """Tokens that make the text whole from where the matcher stands, which stays there.

        ``said`` are words of the grammar, as tokens: one may end what would go on. More than ``most`` where
        it takes too many: they are not all then. None where no end is found.
        """
        path, whole, choices = self._straight(
            matcher.deep_copy(), [], MOST_TOO_LONG * most, min(most, MOST_FILLED), said
        )
        if (whole and len(path) <= most) or (whole is False and len(path) > MOST_TOO_LONG * most):
            return path
        return self._around(matcher, path, whole, choices, most, said)

    def _straight(
        self,
        place: LLMatcher,
        path: list[int],
        most: int,
        n_filled: int,
        said: Sequence[Sequence[int]],
    ) -> tuple[list[int], bool | None, list[int]]:
        """Close what is open until the text is whole, or has too many tokens; ``path`` are its first.

        The second value is whether it is whole; None where it got lost: it could only fill a string that
        nothing closes. The third, behind how many tokens another could have come.
        """
        path, choices = list(path), list[int]()
        n_chosen, n_left, n_same, was_inside = 0, n_filled, 0, False
        while not place.is_accepting():
            if place.is_error():
                return path, None, choices
            forced = place.compute_ff_tokens()
            if forced:
                n_same, was_inside = 0, False
            else:
                allowed = self._allowed(place)
                inside = self._is_inside(allowed)
                choices.append(len(path))
                token, fills = self._best(allowed, inside)
                fills = fills or (inside and was_inside)  # what was to close has not
                if fills and (word := self._word(place, said)):
                    path += word[: place.try_consume_tokens(list(word))]
                    said = ()  # one that has not ended it would come again
                    continue
                forced = [token] * (1 + n_same // 2 * fills)  # a long string in few masks
                n_same = n_same + len(forced) if fills else 0
                n_left -= len(forced) * fills
                if n_left < 0:
                    return path, None, choices
                n_chosen, was_inside = n_chosen + len(forced), inside
            path += forced[: place.try_consume_tokens(forced)]
            if len(path) > most and 2 * (n_filled - n_left) <= n_chosen:
                return path, place.is_accepting(), choices
        return path, True, choices

    def _around(
        self,
        matcher: LLMatcher,
        straight: list[int],
        whole: bool | None,
        choices: list[int],
        most: int,
        said: Sequence[Sequence[int]],
    ) -> list[int] | None:
        """An ending on another way: each choice of a way is made otherwise, those in front first.

        Behind it the way is straight again. A shorter one takes the place of the one that it left. Two tokens
        are taken for one where the same may come behind them.
        """
        best = straight if whole else None
        ways = deque((straight, n) for n in choices if n < most)
        n_seen: dict[int, int] = {}
        n_tried = 0
        while ways:
            way, n = ways.popleft()
            start = matcher.deep_copy()
            start.consume_tokens(way[:n])
            allowed = self._allowed(start)
            inside, here = self._is_inside(allowed), self._state()
            n_seen[here] = n_seen.get(here, 0) + 1
            if n_seen[here] > MOST_ALIKE:
                continue
            states: set[tuple[int, tuple[int, ...]]] = {(here, ())}
            shorter = list[int]()
            for token in self._others(allowed):
                ends = start.validate_tokens([token, self._end]) > 1
                if not ends and inside:
                    # a part of a letter: the rest would have to come, too
                    letter = self._first[token] > 127
                    if letter or start.validate_tokens([token, token, (way[n:] or way)[0]]) == 3:
                        continue  # the string goes on
                place = start.deep_copy()
                place.consume_token(token)
                forced = place.compute_ff_tokens()
                tried = [*way[:n], token, *forced[: place.try_consume_tokens(forced)]]
                if place.is_error() or len(tried) > (len(best) - 1 if best else most):
                    continue
                self._allowed(place)
                n_tried += 1
                if n_tried > self._most_tried:
                    return best or (None if whole is None else straight)
                if not ends and (inside or not forced):  # else each leads to a text of its own
                    state = self._state(), tuple(forced)
                    if state in states:
                        continue
                    states.add(state)
                limit = len(best) - 1 if best else most
                n_filled = MOST_FILLED if best else MOST_FILLED_AROUND
                found, is_whole, at = self._straight(place, tried, limit, n_filled, said)
                n_tried += len(at)
                if is_whole and len(found) <= most:
                    return found
                if is_whole and len(found) <= limit:
                    best, shorter = found, at
                elif best is None:
                    ways += ((found, i) for i in at if i < most)
            if best and shorter:
                ways = deque((best, i) for i in shorter if i < most)
        return best or (None if whole is None else straight)

    def _word(self, place: LLMatcher, said: Sequence[Sequence[int]]) -> Sequence[int]:
        """A word that ends the text, or the string that it is in."""
        for word in said:
            for end in (self._end, self._quote):
                if place.validate_tokens([*word, end]) > len(word):
                    return word
        return ()

    def _allowed(self, place: LLMatcher) -> NDArray[np.bool_]:
        place.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._n_vocab, bitorder="little")
        return bits.view(np.bool_)

    def _state(self) -> int:
        """What tells the place last looked at from others: the tokens that may come."""
        return hash(self._bits.tobytes())

    def _is_inside(self, allowed: NDArray[np.bool_]) -> bool:
        return bool(np.count_nonzero(allowed) > self._n_vocab // MANY)

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

    def _others(self, allowed: NDArray[np.bool_]) -> list[int]:
        """A token for each byte that may come next, those that may close something first."""
        ids = np.concatenate([ids[allowed[ids]] for kinds in self._between for ids in kinds])
        _, at = np.unique(self._first[ids], return_index=True)
        found: list[int] = ids[np.sort(at)].tolist()
        # words lead on, marks away
        return sorted(found, key=lambda i: chr(self._first[i]).isalnum())


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
