"""Speculation: tokens guessed ahead, which one step computes together, and which change no bit of the text.

Behind the last token of a text stand some guesses. One step gives the logits after each of them, the same as
steps of one token would. The request's own sampler then chooses token by token, with its own random numbers:
while it chooses what was guessed, the next logits are there already; the first other choice ends the step, and
the state drops the guesses behind it. (Leviathan et al., arXiv:2211.17192, accept by another rule, which keeps
the distribution but not the text.)

How many tokens are guessed follows from two things that are learnt: how often guesses of a kind come true, and
how long steps of so many rows take. Where no length pays, none is guessed. Text does not depend on it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import ArgumentError
from ..models.memory import cache_bytes
from .pace import Rows, Usual

if TYPE_CHECKING:
    from ..model import Model
    from ..models.network import Network
    from ..models.state import State
    from .generate import Run, Token, Work

# guesses in a step: with the token before them, sizes that kernels are made for, and few, as each is recorded
LENGTHS = (1, 3, 7, 11, 15)
LONGEST = LENGTHS[-1]
WORTH = 1.05  # a guess is made where it promises so many times the tokens per second
SIZES = (8, 4, 2, 1)  # tokens that must have occurred before, for a guess of what follows
UNLIKELY = 0.05  # beyond a guess that comes true so seldom, none is looked for
NOTHING, OTHER, EQUAL = range(3)  # what followed some tokens the last time but one
LONGEST_MATCH = 12  # longer repetitions count as this long
PROBE = 64  # tokens after which a draft model that did not pay is tried again
NEW_ROW = 0.1  # what a row adds to the time of a one-row step, as long as none was timed
# a step's remembered time shrinks to this share whenever it keeps a likely guess from being tried
FADE = 0.99
FORGET = 0.95  # how much of its experience each new one leaves


class Rate:
    """How often guesses of one kind come true."""

    def __init__(self, right: float, wrong: float) -> None:
        self.right, self.wrong = right, wrong

    def note(self, right: int, wrong: int) -> None:
        self.right = FORGET * self.right + right
        self.wrong = FORGET * self.wrong + wrong

    @property
    def p(self) -> float:
        return self.right / (self.right + self.wrong)


class Costs:
    """Seconds of steps that only write: those of the fewest rows, and what more rows add."""

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._fewest, self._step, self._more = 0, Usual(), Rows()

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step."""
        if rows not in self._begun:  # the first step of a size is also recorded, which takes long
            self._begun.add(rows)
        elif not self._fewest or rows < self._fewest:
            self._fewest, self._step, self._more = rows, Usual(), Rows()
            self._step.note(seconds)
        elif rows == self._fewest:
            self._step.note(seconds)
        else:
            self._more.note(rows - self._fewest, max(seconds - self._step.seconds, 0))

    def of(self, rows: int) -> float:
        """Seconds of a step of so many rows; a row is thought cheap, and so is tried, until one was timed."""
        step = self._step.seconds or 1.0
        more = rows - (self._fewest or 1)
        if more <= 0:  # fewer were not timed
            return step
        return step + (self._more.of(more) if self._more.known else NEW_ROW * step * more)

    def doubt(self) -> None:
        """Take rows for a little cheaper: what kept a guess from being tried may be long past."""
        self._more.fade(FADE)


COSTS: WeakKeyDictionary[Network, Costs] = WeakKeyDictionary()


def best_length(chances: Sequence[float], n_rows: int, costs: Costs, each: float = 0.0) -> int:
    """How many guesses promise the most tokens per second; 0 where none does better.

    Parameters
    ----------
    chances : sequence of float
        For each guess, how often it comes true where those before it did.
    n_rows : int
        Rows of the step without them.
    costs : Costs
        How long steps take.
    each : float
        Seconds that making a guess takes.
    """
    best, speed = 0, WORTH * n_rows / costs.of(n_rows)
    right = list(accumulate(chances, mul))
    for n in LENGTHS:
        if n > len(chances):
            break
        rate = (n_rows + sum(right[:n])) / (costs.of(n_rows + n) + n * each)
        if rate > speed:
            best, speed = n, rate
    return best


class Drafter(ABC):
    """Makes the guesses for one text."""

    @abstractmethod
    def guess(self, run: Run, most: int, n_rows: int, costs: Costs) -> list[int]:
        """Guess at most so many tokens that follow, in a step of ``n_rows`` other rows; [] where none pays."""

    @abstractmethod
    def learn(self, n_guessed: int, n_right: int) -> None:
        """Note how many of the last guesses came true."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for guessing."""
        return 0

    def give_up(self) -> None:  # noqa: B027  # nothing to do unless a subclass holds some
        """Let go of memory; it is filled again when it is needed."""


class Lookup(Drafter):
    """Guesses that the text goes on as it did the last time that its last tokens occurred.

    How likely that is depends on how many tokens are the same, and on whether they were followed by one and the
    same token before: forms repeat until a place that is filled anew each time.
    """

    def __init__(self) -> None:
        # some tokens: the position behind them, and what followed them the time before
        self._where: dict[tuple[int, ...], tuple[int, int]] = {}
        self._n_seen = 0
        self._rates = {
            (same, before): Rate(0.3 * same * (0.3 if before == OTHER else 1), 1.0)
            for same in range(1, LONGEST_MATCH + 1)
            for before in (NOTHING, OTHER, EQUAL)
        }
        self._made: list[Rate] = []  # what the guesses were expected of
        self._expected: tuple[int, int, Rate] | None = None  # a guess not made: position, token

    def guess(self, run: Run, most: int, n_rows: int, costs: Costs) -> list[int]:
        ids = run.state.ids
        if self._expected is not None:
            at, guess, rate = self._expected
            if at < len(ids):
                right = ids[at] == guess
                rate.note(right, not right)
            self._expected = None
        self._note(ids)
        found, rates = self._follow(ids, most)
        n = best_length([rate.p for rate in rates], n_rows, costs)
        self._made = rates[:n]
        if found and not n:
            self._expected = len(ids), found[0], rates[0]
            if rates[0].p > 0.5:
                costs.doubt()
        return found[:n]

    def _note(self, ids: Sequence[int]) -> None:
        """Remember where tokens stood in the text."""
        if len(ids) < self._n_seen:  # a shift has dropped some
            self._where.clear()
            self._n_seen = 0
        for end in range(max(self._n_seen, 1), len(ids)):
            for size in SIZES:
                if size <= end:
                    key = tuple(ids[end - size : end])
                    at, _ = self._where.get(key, (0, NOTHING))
                    before = NOTHING if not at else EQUAL if ids[at] == ids[end] else OTHER
                    self._where[key] = end, before
        self._n_seen = len(ids)

    def _follow(self, ids: Sequence[int], most: int) -> tuple[list[int], list[Rate]]:
        """At most so many guesses, each as if those before it had come true, and what to expect of them."""
        text, found, rates = list(ids[-LONGEST_MATCH - 1 :]), list[int](), list[Rate]()
        same, expected, chance = 0, 0, 1.0
        while len(found) < most and chance > UNLIKELY:
            known = (self._where.get(tuple(text[-size:])) for size in SIZES if size <= len(text))
            at, before = next((k for k in known if k is not None), (0, NOTHING))
            if not at:
                break
            same = same + 1 if at == expected else n_same_before(ids, at, text)
            same, expected = min(same, LONGEST_MATCH), at + 1
            rates.append(self._rates[same, before])
            chance *= rates[-1].p
            found.append(ids[at])
            text.append(ids[at])
        return found, rates

    def learn(self, n_guessed: int, n_right: int) -> None:
        for i, rate in enumerate(self._made[: n_right + 1]):
            rate.note(i < n_right, i == n_right)


def n_same_before(ids: Sequence[int], at: int, text: Sequence[int]) -> int:
    """How many of the last tokens of a text, LONGEST_MATCH at most, stand before a position of ids, too."""
    most = min(LONGEST_MATCH, at, len(text))
    return next((n for n in range(most) if ids[at - 1 - n] != text[-1 - n]), most)


class DraftModel(Drafter):
    """Guesses what a smaller model of the same vocabulary writes, drawing the request's random numbers."""

    def __init__(self, net: Network, eog: frozenset[int]) -> None:
        self._net, self._eog = net, eog
        self._state: State | None = None
        self._rate = Rate(4.0, 1.0)
        self._each = 0.0  # seconds of a guess
        self._n_skipped = 0

    def guess(self, run: Run, most: int, n_rows: int, costs: Costs) -> list[int]:
        n = best_length([self._rate.p] * most, n_rows, costs, self._each)
        if not n:
            self._n_skipped += 1
            if self._n_skipped < PROBE:
                return []
            n = min(most, 2)
        self._n_skipped = 0
        ids, source = run.state.ids, run.state.source
        read = None if source is None else source.ids
        state = self._state or self._net.new_state(run.state.n_ctx, source=read)
        self._state = state
        n = min(n, state.n_ctx - len(ids))
        if n < 1:
            return []
        state.reuse(ids)
        sampler, out = run.sampler.twin(), list[int]()
        start = time.perf_counter()
        while len(out) < n:
            chosen = sampler.choose(self._next_logits(state), state.ids)
            out.append(chosen)
            if chosen in self._eog:
                break
            state.append([chosen])
            if len(out) == 1:  # the first has read what was written since, or the prompt
                start = time.perf_counter()
        if len(out) > 1:
            each = (time.perf_counter() - start) / (len(out) - 1)
            self._each = min(each, self._each + (each - self._each) * 0.1) if self._each else each
        return out

    def _next_logits(self, state: State) -> np.ndarray:
        net = self._net
        while True:
            left = len(state.ids) - state.n_past
            n = min(left, net.n_batch)
            with net.lock:
                rows = net.forward([(state, n, "last" if n == left else "none")])[0]
                if n == left:
                    return np.array(rows[-1])

    def learn(self, n_guessed: int, n_right: int) -> None:
        self._rate.note(n_right, n_right < n_guessed)

    @property
    def nbytes(self) -> int:
        return 0 if self._state is None else self._state.nbytes

    def give_up(self) -> None:
        self._state = None


@dataclass(frozen=True)
class Drafting:
    """How the guesses of a text are made: by a network, or without one from the text itself."""

    net: Network | None = None
    eog: frozenset[int] = frozenset()

    def begin(self) -> Drafter:
        """What guesses for one text."""
        return Lookup() if self.net is None else DraftModel(self.net, self.eog)

    def nbytes(self, n: int) -> int:
        """Bytes of keys and values that guessing takes, once a text has ``n`` tokens."""
        net = self.net
        return 0 if net is None else cache_bytes(net.decoder.caches, n, net.kv_type)


def drafting(speculate: str | Model | None, model: Model) -> Drafting | None:
    """What makes the guesses that the argument ``speculate`` of ``Model.generate`` asks for.

    Raises
    ------
    ArgumentError
        It is neither "lookup" nor a model; that has another vocabulary; or one of the two is recurrent.
    """
    if speculate is None:
        return None
    if any(layer.arrays for layer in model.network.decoder.caches):
        raise ArgumentError(
            f"speculate: {model.arch} has recurrent layers, which cannot take guesses back; leave it out"
        )
    if isinstance(speculate, str):
        if speculate == "lookup":
            return Drafting()
    elif hasattr(speculate, "network"):
        net, key = speculate.network, "tokenizer.ggml.tokens"
        if net.n_vocab != model.network.n_vocab or list(speculate.metadata.get(key, ())) != list(
            model.metadata.get(key, ())
        ):
            raise ArgumentError(
                f"speculate: the draft model's vocabulary ({net.n_vocab} tokens) is another one than "
                f"the model's ({model.network.n_vocab}); expected the same"
            )
        if any(layer.arrays for layer in net.decoder.caches):
            raise ArgumentError(f"speculate: {speculate.arch} has recurrent layers; give another")
        return Drafting(net, model.tokenizer.eog)
    raise ArgumentError(f"speculate={speculate!r:.40}; expected 'lookup', a model, or None")


def guess(net: Network, active: Sequence[Run]) -> None:
    """Let each text that is being written guess its next tokens: they are in ``Run.draft``."""
    n_rows = sum([not run.reads for run in active])
    for run in active:
        run.draft, run.n_drafted = [], 0
        if run.drafter is None or run.reads or run.n_generated < 2:
            continue
        state = run.state
        most = min(LONGEST, run.max_tokens - run.n_generated - 1, state.n_ctx - state.n_past - 1)
        if most > 0:
            run.draft = run.drafter.guess(run, most, n_rows, COSTS.setdefault(net, Costs()))


def drop(run: Run) -> None:
    """Take the guesses of a step that failed out of the sequence."""
    if run.draft:
        del run.state.ids[len(run.state.ids) - len(run.draft) :]
        run.draft = []


def verify(run: Run, rows: Sequence[Any], choice: Callable[[Run, Any], Token]) -> None:
    """Choose tokens while they are what was guessed; keep of the state what they have confirmed."""
    assert run.drafter is not None
    draft, state = run.draft, run.state
    run.n_drafted = len(draft)
    drop(run)
    start, right = len(state.ids), 0
    try:
        for guessed, row in zip((*draft, None), rows, strict=True):
            token = choice(run, row)
            run.accept(token)
            if run.finish_reason is not None or token.id != guessed:
                break
            right += 1
    finally:
        rest = state.ids[start + right :]
        state.cut_back(start + right)
        state.ids.extend(rest)
        run.drafter.learn(len(draft), right)
        run.n_right += right


def time_step(net: Network, work: Work, seconds: float) -> None:
    """Learn from a step that only wrote texts, one of them with guesses allowed."""
    for run, _ in work:
        if run.drafter is not None:
            break
    else:
        return
    n_rows = sum([n for _, n in work])
    if n_rows == sum([1 + run.n_drafted for run, _ in work]):
        COSTS.setdefault(net, Costs()).note(n_rows, seconds)
