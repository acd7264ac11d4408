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
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import ArgumentError
from ..models.memory import cache_bytes

if TYPE_CHECKING:
    from ..model import Model
    from ..models.network import Network
    from ..models.state import State
    from .generate import Run, Token, Work

LONGEST = 15  # guesses in a step: with the token before them, two tiles of eight rows
WORTH = 1.05  # a guess is made where it promises so many times the tokens per second
SIZES = (4, 2, 1)  # tokens that must have occurred before, for a guess of what follows
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
    """Seconds of steps that only write, by their number of rows."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def note(self, rows: int, seconds: float) -> None:
        old = self.seconds.get(rows)
        # a first measurement may hold what is done once; the machine's other work only adds
        self.seconds[rows] = seconds if old is None else min(seconds, old + (seconds - old) * 0.1)

    def of(self, rows: int) -> float:
        """Seconds of a step of so many rows; a number not timed yet is thought cheap, and so is tried."""
        if rows in self.seconds or not self.seconds:
            return self.seconds.get(rows, 1 + NEW_ROW * rows)
        fewest = min(self.seconds)
        hope = self.seconds[fewest] * (1 + NEW_ROW * (rows - fewest))
        return min([hope, *(t for n, t in self.seconds.items() if n > rows)])

    def doubt(self) -> None:
        """Take steps of several rows for a little faster: what kept one from being tried may be long past."""
        for rows in self.seconds:
            if rows > min(self.seconds):
                self.seconds[rows] *= FADE


COSTS: WeakKeyDictionary[Network, Costs] = WeakKeyDictionary()


def best_length(p: float, most: int, n_rows: int, costs: Costs, each: float = 0.0) -> int:
    """How many guesses promise the most tokens per second; 0 where none does better.

    Parameters
    ----------
    p : float
        How often a guess comes true, where those before it did.
    most : int
        Guesses at most.
    n_rows : int
        Rows of the step without them.
    costs : Costs
        How long steps take.
    each : float
        Seconds that making a guess takes.
    """
    best, speed = 0, WORTH * n_rows / costs.of(n_rows)
    extra, chance = 0.0, 1.0
    for n in range(1, most + 1):
        chance *= p
        extra += chance
        rate = (n_rows + extra) / (costs.of(n_rows + n) + n * each)
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
    """Guesses that the text goes on as it did the last time these tokens occurred in it."""

    def __init__(self) -> None:
        self._where: dict[tuple[int, ...], int] = {}  # some tokens: the position behind them
        self._n_seen = 0
        self._rates = [Rate(0.3 * n, 1.0) for n in range(LONGEST_MATCH + 1)]
        self._rate = self._rates[0]
        self._expected: tuple[int, int, Rate] | None = None  # a guess not made: position, token

    def guess(self, run: Run, most: int, n_rows: int, costs: Costs) -> list[int]:
        ids = run.state.ids
        if self._expected is not None:
            at, guess, rate = self._expected
            if at < len(ids):
                right = ids[at] == guess
                rate.note(right, not right)
            self._expected = None
        at = self._find(ids)
        if not at:
            return []
        same = 1
        while same < LONGEST_MATCH and at > same and ids[at - 1 - same] == ids[-1 - same]:
            same += 1
        self._rate = self._rates[same]
        n = best_length(self._rate.p, most, n_rows, costs)
        if not n:
            self._expected = len(ids), ids[at], self._rate
            if self._rate.p > 0.5:
                costs.doubt()
            return []
        period = len(ids) - at
        return [ids[at + i % period] for i in range(n)]

    def _find(self, ids: Sequence[int]) -> int:
        """Where the text stood when its last tokens occurred before; 0 if they did not."""
        if len(ids) < self._n_seen:  # a shift has dropped some
            self._where.clear()
            self._n_seen = 0
        for end in range(max(self._n_seen, 1), len(ids)):
            for size in SIZES:
                if size <= end:
                    self._where[tuple(ids[end - size : end])] = end
        self._n_seen = len(ids)
        found = (self._where.get(tuple(ids[-size:]), 0) for size in SIZES)
        return next((at for at in found if at), 0)

    def learn(self, n_guessed: int, n_right: int) -> None:
        self._rate.note(n_right, n_right < n_guessed)


class DraftModel(Drafter):
    """Guesses what a smaller model of the same vocabulary writes, drawing the request's random numbers."""

    def __init__(self, net: Network, eog: frozenset[int]) -> None:
        self._net, self._eog = net, eog
        self._state: State | None = None
        self._rate = Rate(4.0, 1.0)
        self._each = 0.0  # seconds of a guess
        self._n_skipped = 0

    def guess(self, run: Run, most: int, n_rows: int, costs: Costs) -> list[int]:
        n = best_length(self._rate.p, most, n_rows, costs, self._each)
        if not n:
            self._n_skipped += 1
            if self._n_skipped < PROBE:
                return []
            n = min(most, 2)
        self._n_skipped = 0
        ids, state = run.state.ids, self._state or self._net.new_state(run.state.n_ctx)
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
