"""The decode loop: from sequences of tokens to the next ones, many sequences in each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ContextOverflow, NumericError
from ..models.step import hook_of
from ..sampling import Sampler
from .speculate import drop, guess, time_step, verify

if TYPE_CHECKING:
    from ..kernels.backend import Best
    from ..models.network import Network
    from ..models.state import State
    from ..models.step import Tap
    from .constraint import Constraint
    from .speculate import Drafter

FinishReason = Literal["stop", "length", "context", "cancelled", "deadline"]
Overflow = Literal["error", "shift", "truncate"]
DAMAGED = "logits hold NaN or infinity: the weights are damaged"
ERASED = 0.75  # a context shift drops this fraction of n_ctx, as GPT4All does


@dataclass(frozen=True)
class Token:
    """One chosen token; ``logprob`` and ``top`` (ids to log-probabilities) only where asked for."""

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None


@dataclass
class Timings:
    """Tokens and seconds of reading the prompt and of writing the answer.

    ``n_reused`` tokens of the prompt were known already, and not read again.
    """

    n_prompt: int = 0
    n_reused: int = 0
    prompt_s: float = 0.0
    n_generated: int = 0
    generated_s: float = 0.0

    def add_read(self, n: int, seconds: float) -> None:
        """Count tokens of a prompt that were read before its run began, which took them for known."""
        self.n_reused -= n
        self.n_prompt += n
        self.prompt_s += seconds

    @property
    def prompt_per_s(self) -> float:
        return self.n_prompt / self.prompt_s if self.prompt_s else 0.0

    @property
    def generated_per_s(self) -> float:
        return self.n_generated / self.generated_s if self.generated_s else 0.0


def ignore(token: Token) -> object:
    """Do nothing with a chosen token."""


@dataclass(eq=False)
class Run:
    """One sequence being continued: its state holds the tokens, prompt included."""

    state: State
    sampler: Sampler
    max_tokens: int
    eog: frozenset[int] = frozenset()
    overflow: Overflow = "error"
    keep: int = 0  # tokens at the beginning that a shift keeps
    logprobs: int | None = None  # how many alternatives to report with each token
    prompt_logprobs: bool = False
    constraint: Constraint | None = None  # what the text must be
    whole: bool = False  # is such a text to end before its tokens do?
    prompt: list[Token] = field(default_factory=list)  # filled when prompt_logprobs
    n_generated: int = 0
    finish_reason: FinishReason | None = None  # None while the run goes on; the caller may set it
    hurried: FinishReason | None = (
        None  # why another token was taken than was chosen, to end in time
    )
    reading: bool = True  # no step has chosen a token yet
    timings: Timings = field(default_factory=Timings)
    accept: Callable[[Token], object] = ignore  # told each token once it is chosen; may end the run
    drafter: Drafter | None = None  # guesses tokens, which one step computes together
    draft: list[int] = field(default_factory=list)  # the guesses of the next step
    n_drafted: int = 0  # how many the last step had
    n_right: int = 0  # how many have come true so far
    shifted: bool = False  # were tokens dropped? Reading ``ids`` anew then gives other keys
    before: State | None = None  # what the state was: after an error, it is that again

    def __post_init__(self) -> None:
        self.timings.n_reused = self.state.n_past

    @property
    def going_on(self) -> bool:
        """Whether more tokens may come."""
        return self.finish_reason is None

    def close(self) -> None:
        """End where it is, unless it has ended, and let go of the memory."""
        self.finish_reason = self.finish_reason or "cancelled"
        if hasattr(self, "state"):
            self.give_up()

    def undo(self) -> None:
        """Have the state be what it was before this run, where that is kept: an error ends it."""
        if self.before is not None:
            self.state.become(self.before)
            self.before = None

    @property
    def n_pending(self) -> int:
        """How many tokens are still to be computed."""
        return len(self.state.ids) - self.state.n_past

    @property
    def reads(self) -> bool:
        """Whether the next step reads a prompt; else it writes the text."""
        return self.reading or self.n_pending > 1

    @property
    def limit(self) -> tuple[int, FinishReason]:
        """How many tokens may still come, and what ends the text then."""
        n = self.max_tokens - self.n_generated
        room = self.state.n_ctx + 1 - len(self.state.ids)  # the last is not computed
        return (n, "length") if n <= room or self.overflow == "shift" else (room, "context")

    @property
    def needs_all(self) -> bool:
        """Whether the logits of the whole vocabulary are needed to choose a token or to report on it."""
        return self.logprobs is not None or self.prompt_logprobs or self.constraint is not None

    def make_room(self, n: int) -> int:
        """How many of n tokens fit now, after a shift where that is the policy."""
        state = self.state
        if state.n_past + n <= state.n_ctx or state.n_past < state.n_ctx:
            return min(n, state.n_ctx - state.n_past)
        if self.overflow == "shift":
            discard = min(state.n_past - self.keep, max(1, int(state.n_ctx * ERASED)))
            state.drop(self.keep, discard)
            self.shifted = True
            return min(n, state.n_ctx - state.n_past)
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self.state.nbytes + (self.drafter.nbytes if self.drafter is not None else 0)

    def give_up(self) -> list[int]:
        """Let go of the state's memory; returns its tokens, for ``resume``."""
        ids = self.state.ids
        del self.state
        self.before = None
        if self.drafter is not None:
            self.drafter.give_up()
        return ids

    def resume(self, state: State, ids: list[int]) -> None:
        """Go on in another state, which reads these tokens anew: to the same keys unless some were shifted."""
        state.ids.extend(ids)
        self.state = state
        if self.n_generated == 0:
            self.prompt.clear()


Work = list[tuple[Run, int]]  # runs, and how many of their tokens a step computes
Failed = Callable[[Run, BaseException], object]


def check_fits(n_tokens: int, n_ctx: int, overflow: Overflow) -> None:
    """Raise ContextOverflow for a sequence longer than its context, where the policy is "error"."""
    if n_tokens > n_ctx and overflow == "error":
        raise ContextOverflow(
            f"the prompt has {n_tokens} tokens; the context holds {n_ctx}",
            "Use a larger n_ctx, or overflow='shift' or 'truncate'",
        )


def steps(
    net: Network,
    runs: Sequence[Run],
    tap: Tap | None = None,
    progress: Callable[[int], object] | None = None,
    before_step: Callable[[], object] | None = None,
    prompt_rows: Callable[[], int] | None = None,
    failed: Failed | None = None,
) -> Generator[Work, None, None]:
    """Continue all runs together, and yield after each step what it has computed.

    Each step computes the pending tokens of as many runs as fit into ``net.n_batch`` rows, so prompts are
    read and answers written in the same passes; ``Run.accept`` is told what was chosen. A run ends when its
    ``finish_reason`` is set, here or by the caller; closing the iterator ends all at once. ``runs`` is looked
    at before each step: the caller may add runs and take some away.

    Parameters
    ----------
    net, runs, tap
        The model, what it continues, and who sees the activations.
    progress : callable, optional
        Told the number of prompt tokens that each step has read.
    before_step : callable, optional
        Called under the network's lock, which is then held until the step is done; what it raises ends the
        iteration.
    prompt_rows : callable, optional
        How many rows of prompts a step may compute while it also writes texts; None: as many as fit.
    failed : callable, optional
        Told of an exception in the choice of a run's token, and must end that run; None: it is raised.
    """
    while active := [run for run in runs if run.finish_reason is None]:
        read = n_read(active) if progress is not None else 0
        for run in active:
            if run.drafter is not None:
                if hook_of(net.number, tap) is None:  # patches would see guesses as the last tokens
                    guess(net, active)
                break
        with net.lock:
            if before_step is not None:
                before_step()
            work = step(net, active, tap, prompt_rows, failed)
        if progress is not None:
            progress(n_read(active) - read)
        yield work


def n_read(runs: Sequence[Run]) -> int:
    """Prompt tokens so far."""
    return sum(run.timings.n_prompt for run in runs)


def step(
    net: Network,
    active: Sequence[Run],
    tap: Tap | None,
    prompt_rows: Callable[[], int] | None = None,
    failed: Failed | None = None,
) -> Work:
    """Compute pending tokens of the active runs in one pass, and choose the next ones.

    The caller holds the network's lock: logits are valid until the next step of anyone.
    """
    start = time.perf_counter()
    work = plan(net.n_batch, active, prompt_rows)
    was_read: list[Run] = []
    left = work
    while left:  # LongRoPE rotates long contexts by another table: they have a pass of their own
        here = net.rope_class(left[0][0].state.n_ctx)
        part = [(run, n) for run, n in left if net.rope_class(run.state.n_ctx) == here]
        left = [(run, n) for run, n in left if net.rope_class(run.state.n_ctx) != here]
        try:
            compute(net, part, len(active), tap, failed, was_read)
        except BaseException:
            for run, _ in left:
                drop(run)
            raise
    if not work:
        return work
    seconds = time.perf_counter() - start
    book(work, seconds)
    time_step(net, work, seconds)
    for run in was_read:
        run.reading = False
    return work


def compute(
    net: Network,
    work: Work,
    n_active: int,
    tap: Tap | None,
    failed: Failed | None,
    was_read: list[Run],
) -> None:
    """Compute tokens of some runs in one pass, and choose the next ones; those just read join ``was_read``."""
    segments = [(run.state, n, wanted(run, n)) for run, n in work]
    best = n_best(net, [run for run, _ in work]) if tap is None else 0
    ahead = best == 1 and len(work) == n_active and all(goes_on(run, n) for run, n in work)
    choice = choose_best if best else choose
    try:
        rows = net.forward(segments, tap, best, ahead)
    except BaseException:
        for run, _ in work:
            drop(run)
        raise
    for (run, n), logits in zip(work, rows, strict=True):
        try:
            if run.prompt_logprobs and not run.n_generated:
                note_prompt(run, n, logits)
            if run.n_pending == 0:
                if run.reading:
                    was_read.append(run)
                    run.timings.n_prompt -= run.n_generated  # forced tokens, read with the prompt
                if run.draft:
                    verify(run, logits, choice)
                else:
                    run.accept(choice(run, logits[-1]))
                force(run)
        except BaseException as e:
            if failed is None:
                raise
            failed(run, e)


def force(run: Run) -> None:
    """Add the tokens that a constraint leaves no choice about: the next step reads all of them.

    Log-probabilities are known only after a step for each; where they are asked for, `choose` takes these.
    """
    if run.constraint is None or run.logprobs is not None:
        return
    while run.finish_reason is None and len(run.state.ids) <= run.state.n_ctx:
        only = run.constraint.forced()
        if only is None:
            return
        join(run, only)
        run.accept(Token(only))


def n_best(net: Network, runs: Sequence[Run]) -> int:
    """How many of each row's largest logits the device must find; 0: all logits go to the host."""
    picks = net.be.picks
    if not picks or any(run.needs_all for run in runs):
        return 0
    needed = max([run.sampler.needs(len(run.state.ids)) for run in runs])
    return next((k for k in picks if needed <= k < net.n_vocab), 0)


def goes_on(run: Run, n: int) -> bool:
    """Is another step needed after the one that computes these n tokens, unless the text ends?"""
    return run.n_generated + 1 < run.max_tokens and run.n_pending == n and run.drafter is None


def plan(n_batch: int, active: Sequence[Run], prompt_rows: Callable[[], int] | None = None) -> Work:
    """Choose runs and the number of their tokens for the next step; end runs whose context is full."""
    room = most_read = n_batch
    if prompt_rows is not None and not all(run.reads for run in active):
        active = sorted(active, key=lambda run: run.reads)  # texts being written come first
        most_read = prompt_rows()
    work: Work = []
    for run in active:
        reads = run.reads
        most = min(room, most_read) if reads else room
        if most == 0:
            break
        if run.draft:
            del run.draft[room - 1 :]
            run.state.ids.extend(run.draft)
        n = run.make_room(min(run.n_pending, most))
        if n:
            work.append((run, n))
            room -= n
            most_read -= n if reads else 0
        else:
            run.finish_reason = "context"
    return work


def wanted(run: Run, n: int) -> Literal["all", "last", "none"]:
    """Which of the next n rows' logits are needed."""
    if run.draft or (run.prompt_logprobs and run.n_generated == 0):
        return "all"
    return "last" if n == run.n_pending else "none"


def note_prompt(run: Run, n: int, logits: np.ndarray) -> None:
    """Report the log-probabilities of prompt tokens: row t predicts token t + 1."""
    first = run.state.n_past - n
    for t, row in enumerate(logits):
        if first + t + 1 < len(run.state.ids):
            run.prompt.append(token(run, row, run.state.ids[first + t + 1]))


def choose(run: Run, logits: np.ndarray) -> Token:
    """Choose the next token; it joins the sequence unless it ends the text.

    The sampler may edit the logits, which nobody reads again; a caller's processor might keep them.
    """
    if not math.isfinite(logits.min()):
        raise NumericError(DAMAGED)
    report = np.array(logits) if run.logprobs is not None else logits
    try:
        chosen = pick(run, logits)
    except NumericError:
        if logits.max() == np.inf:
            raise NumericError(DAMAGED) from None
        raise
    join(run, chosen)
    return token(run, report, chosen) if run.logprobs is not None else Token(chosen)


def pick(run: Run, logits: np.ndarray) -> int:
    """The id that the sampler picks among those that the run's constraint allows."""
    processed = run.sampler.params.logits_processor is not None
    scratch = np.array(logits) if processed else logits
    if run.constraint is None:
        return run.sampler.choose(scratch, run.state.ids)
    only = run.constraint.forced()
    if only is not None:
        return only
    chosen = run.sampler.choose(scratch, run.state.ids, run.constraint.allowed())
    if not run.whole or chosen in run.eog:
        return chosen
    n_left, reason = run.limit
    taken = run.constraint.in_time(chosen, n_left)
    if taken != chosen:
        run.hurried = reason
    return taken


def choose_best(run: Run, best: Best) -> Token:
    """The next token, chosen from the largest logits alone, which the device has found."""
    if not best.finite:
        raise NumericError(DAMAGED)
    if not len(best.ids):  # too many equal logits for the device to give the largest
        return choose(run, best.all())
    chosen = run.sampler.choose_best(best.ids, best.values, run.state.ids)
    join(run, chosen)
    return Token(chosen)


def join(run: Run, chosen: int) -> None:
    """Add a token to the sequence, unless it ends the text."""
    run.n_generated += 1
    run.timings.n_generated += 1
    if chosen in run.eog:
        run.finish_reason = run.hurried or "stop"
    else:
        run.state.ids.append(chosen)
        if run.constraint is not None:
            run.constraint.take(chosen)
        if run.n_generated >= run.max_tokens:
            run.finish_reason = "length"


def token(run: Run, logits: np.ndarray, chosen: int) -> Token:
    logprob, top = run.sampler.logprobs(logits, chosen, run.logprobs or 0)
    return Token(chosen, logprob, top)


def book(work: Work, seconds: float) -> None:
    """Share the step's time among the runs by their rows."""
    rows = sum([n for _, n in work])
    for run, n in work:
        t = run.timings
        if run.reading:
            t.n_prompt += n
            t.prompt_s += seconds * n / rows
        else:
            t.generated_s += seconds * n / rows
