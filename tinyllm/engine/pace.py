"""What steps usually take, learnt from the clock: on it depends when tokens are computed, never which."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generate import Work

SLOWER = 2.5  # 99 of 100 steps take at most so many times as long as is usual for texts alone
MIXED = 16  # steps with rows of prompts, after which one has none
# but prompts make a step so many times as long where the machine's other work holds it up
LEAST = 1.5
TRUST = 0.1  # what is known of steps changes by this share at most with each
ODD = 1.5  # what takes more than so many times what was expected teaches as if it took just that
ALIKE = 0.005  # where the square of rows varies by less, little is known of what one of them adds
FIRST_ROWS = 8  # rows of prompts beside texts, before anything was timed


class Usual:
    """What a time usually is: one that is far off moves it no more than others do."""

    def __init__(self) -> None:
        self.seconds, self._trust = 0.0, 1.0  # in the first ones, which may hold what is done once

    def note(self, seconds: float) -> None:
        """Learn from one more."""
        known, self._trust = self.seconds, max(self._trust * 0.8, TRUST)
        least, most = known * (1 - self._trust), known * (1 + self._trust)
        self.seconds = min(max(seconds, least), most) if known else seconds


class Rows:
    """What rows add to a step: a part that any number of them takes, and one that each takes.

    A line through what the last steps took. While all had about as many rows, half of it is thought to be of
    the first kind: the next number that is tried then shows how it is.
    """

    def __init__(self) -> None:
        self._n = self._seconds = 0.0  # means of the last steps
        self._spread = self._both = 0.0  # the variance of n, and its covariance with the seconds

    def note(self, n: int, seconds: float) -> None:
        """Learn from a step of n rows."""
        if not self.known:
            self._n, self._seconds = n, seconds
            return
        usual = self.of(n)
        seconds = min(max(seconds, usual / ODD), usual * ODD)
        more, longer = n - self._n, seconds - self._seconds
        self._n += TRUST * more
        self._seconds += TRUST * longer
        self._spread = (1 - TRUST) * (self._spread + TRUST * more * more)
        self._both = (1 - TRUST) * (self._both + TRUST * more * longer)

    @property
    def each(self) -> float:
        """Seconds that one row more adds."""
        mean = self._seconds / self._n
        alike = ALIKE * self._n * self._n
        found = (self._both + alike * mean / 2) / (self._spread + alike)
        return min(max(found, mean / 10), mean)

    def of(self, n: float) -> float:
        """Seconds that n rows add."""
        return max(self._seconds + self.each * (n - self._n), 0.0)

    @property
    def known(self) -> bool:
        """Whether a step with rows took longer yet."""
        return self._seconds > 0

    def fade(self, share: float) -> None:
        """Take rows for cheaper: what was learnt may be long past."""
        self._seconds *= share
        self._both *= share

    def within(self, seconds: float) -> float:
        """How many rows add so many seconds."""
        return self._n + (seconds - self._seconds) / self.each


class Pace:
    """How many rows of prompts a step may compute without holding up the texts that it also writes."""

    def __init__(self) -> None:
        self.writing = Usual()  # a step that only writes
        self.reading = Rows()  # what rows of prompts add to it
        self.late = 1.5  # one step of a hundred takes more than so many times what was expected
        self.n_mixed = 0  # steps since one that only wrote

    def note(self, work: Work, seconds: float) -> None:
        """Learn from a step."""
        n_read = sum([n for run, n in work if run.reading or n > 1 + run.n_drafted])
        self.n_mixed = self.n_mixed + 1 if n_read else 0
        usual = self.writing.seconds
        if n_read and (not usual or len(work) == 1):
            return
        if usual and (self.reading.known or not n_read):
            more = self.reading.of(n_read) if n_read else 0.0
            late = seconds > self.late * (usual + more)
            self.late *= 1 + TRUST if late else 1 - TRUST / 99
        if n_read:
            self.reading.note(n_read, max(seconds - usual, 0))
        else:
            self.writing.note(seconds)

    def rows(self) -> int:
        """Rows of prompts with which hardly a step takes more than ``SLOWER`` times as long as usual.

        They are few numbers, each by about a half larger than the one before: a step is recorded for each.
        Now and then it is 0, to see how long a step takes that only writes: texts become longer meanwhile.
        """
        if self.n_mixed >= MIXED:
            return 0
        if not self.writing.seconds or not self.reading.known:
            return FIRST_ROWS
        slower = max(SLOWER / self.late, LEAST)
        n = max(int(self.reading.within((slower - 1) * self.writing.seconds)), 1)
        unit = 1 << max(n.bit_length() - 2, 0)
        return n // unit * unit
