"""What steps usually take, learnt from the clock: on it depends when tokens are computed, never which."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .generate import Work

SLOWER = 2.8  # 99 of 100 steps take at most so many times as long as is usual for texts alone
MIXED = 16  # steps with rows of prompts, after which one has none
LEAST = (
    1.5  # but prompts make a step so many times as long where the machine's other work holds it up
)
TRUST = 0.1  # what is known of steps changes by this share at most with each
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


class Pace:
    """How many rows of prompts a step may compute without holding up the texts that it also writes."""

    def __init__(self) -> None:
        self.writing = Usual()  # a step that only writes
        self.row = Usual()  # what each row of a prompt adds
        self.late = 1.5  # one step of a hundred takes more than so many times what was expected
        self.n_mixed = 0  # steps since one that only wrote

    def note(self, work: Work, seconds: float) -> None:
        """Learn from a step."""
        n_read = sum([n for run, n in work if run.reading or n > 1 + run.n_drafted])
        self.n_mixed = self.n_mixed + 1 if n_read else 0
        usual, each = self.writing.seconds, self.row.seconds
        if n_read and (not usual or len(work) == 1):
            return
        if usual and (each or not n_read):
            late = seconds > self.late * (usual + n_read * each)
            self.late *= 1 + TRUST if late else 1 - TRUST / 99
        if n_read:
            self.row.note(max(seconds - usual, 0) / n_read)
        else:
            self.writing.note(seconds)

    def rows(self) -> int:
        """Rows of prompts with which hardly a step takes more than ``SLOWER`` times as long as usual.

        They are few numbers, each by about a half larger than the one before: a step is recorded for each.
        Now and then it is 0, to see how long a step takes that only writes: texts become longer meanwhile.
        """
        if self.n_mixed >= MIXED:
            return 0
        if not self.writing.seconds or not self.row.seconds:
            return FIRST_ROWS
        slower = max(SLOWER / self.late, LEAST)
        n = max(1, int((slower - 1) * self.writing.seconds / self.row.seconds))
        unit = 1 << max(n.bit_length() - 2, 0)
        return n // unit * unit
