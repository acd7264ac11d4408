"""Token ids to text as it streams: whole UTF-8 characters, and nothing of a stop string.

A token is bytes, not characters: one may end in the middle of a character, and a stop string may begin in one
token and end three later. So text is shown only when no token to come can take it back.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from .errors import ArgumentError, StateError


class TokenBytes(Protocol):
    """What a stream needs of a tokenizer."""

    def token_bytes(self, i: int, /) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        ...


class TextStream:
    """Turns ids into the text that may be shown so far.

    Parameters
    ----------
    tokenizer : object with ``token_bytes(id)``
    stop : sequence of str
        Strings that end the text; neither they nor what follows is ever shown. Where several begin at the
        same character, the first listed counts. A single str is one stop string.
    special_stops : mapping of int to str
        Stop strings that are single control tokens, by id: these have no text that ``stop`` could find.

    Raises
    ------
    ArgumentError
        A stop string is empty or not a str.

    Examples
    --------
    >>> class Letters:
    ...     def token_bytes(self, id):
    ...         return bytes([id])
    >>> stream = TextStream(Letters(), stop=["END"])
    >>> [stream.push(id) for id in b"an END"]
    ['a', 'n', ' ', '', '', '']
    >>> stream.stopped, stream.n_held_tokens
    ('END', 3)
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        stop: Sequence[str] = (),
        special_stops: Mapping[int, str] | None = None,
    ) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        for s in self._stop:
            if not isinstance(s, str) or not s:
                raise ArgumentError(f"stop has {s!r}; expected strings of at least one character")
        self._stop_chars = frozenset("".join(self._stop))
        self._special_stops = dict(special_stops or {})
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self._n_chars = 0  # characters shown and held
        # for each token that is not wholly shown, its first character and the one after its last
        self._spans: list[tuple[int, int]] = []
        self._ended = False
        self.stopped: str | None = None
        """The stop string that ended the text; None if none has."""

    @property
    def text(self) -> str:
        """All that was shown so far."""
        return "".join(self._shown)

    @property
    def n_held_tokens(self) -> int:
        """How many of the last tokens show nothing, because they belong to a stop string, whole or begun.

        When ``stopped``, dropping that many tokens from the state leaves it as if they were never chosen.
        A token that is shown in part is not counted.
        """
        return len(self._spans) if self._held or self.stopped is not None else 0

    def push(self, id: int) -> str:  # noqa: A002
        """Add a token, and return the text, possibly empty, that may be shown now.

        Raises StateError after the end: a stop was met, or ``finish`` was called.
        """
        if self._ended:
            raise StateError("this text has ended; start a new TextStream")
        if id in self._special_stops:
            return self._stop_at(id)
        self._append(self._token_bytes(id))
        start, found = self._find_stop()
        if found is not None:
            self._ended, self.stopped = True, found
        piece = self._show(start)
        if found is not None:
            self._held = ""
        return piece

    def finish(self) -> str:
        """End the text: the rest that was held back, "" after a stop. An unfinished character is dropped."""
        if self._ended:
            return ""
        self._ended = True
        return self._show(len(self._held))

    def _stop_at(self, id: int) -> str:  # noqa: A002
        piece = self.finish()  # a stop string that had begun cannot be completed any more
        self.stopped = self._special_stops[id]
        self._spans = [(self._n_chars, self._n_chars)]
        return piece

    def _append(self, data: bytes) -> None:
        """Decode a token's bytes; an unfinished character counts for the tokens before and after the cut."""
        new = self._decoder.decode(data)
        unfinished = bool(self._decoder.getstate()[0])
        self._spans.append((self._n_chars, self._n_chars + len(new) + unfinished))
        self._held += new
        self._n_chars += len(new)

    def _find_stop(self) -> tuple[int, str | None]:
        """Where in the held text a stop string begins, and which; else where one may be beginning."""
        if self._held[-1:] not in self._stop_chars and not any(s in self._held for s in self._stop):
            return len(self._held), None
        matches = [(at, s) for s in self._stop if (at := self._held.find(s)) >= 0]
        if matches:
            return min(matches, key=lambda m: m[0])
        return len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0), None

    def _show(self, n: int) -> str:
        """Move the first n held characters to what was shown, and forget the tokens that end there."""
        piece, self._held = self._held[:n], self._held[n:]
        if piece:
            self._shown.append(piece)
        shown = self._n_chars - len(self._held)
        self._spans = [s for s in self._spans if s[0] >= shown and s[1] > shown]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ends ``text``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
