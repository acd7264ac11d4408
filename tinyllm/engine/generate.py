"""The decode loop: from sequences of tokens to the next ones, many sequences in each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import ContextOverflow, NumericError
from ..sampling import Sampler

if TYPE_CHECKING:
    from ..kernels.backend import Best
    from ..models.network import Network
    from ..models.state import State
    from ..models.step import Tap
    from .constraint import Constraint

FinishReason = Literal["stop", "length", "context", "cancelled"]
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
    """Tokens and seconds of reading the prompt and of writing the answer."""

    n_prompt: int = 0
    n_reused: int = 0
    prompt_s: float = 0.0
    n_generated: int = 0
    generated_s: float = 0.0

    @property
    def prompt_per_s(self) -> float:
        return self.n_prompt / self.prompt_s if self.prompt_s else 0.0

    @property
    def generated_per_s(self) -> float:
        return self.n_generated / self.generated_s if self.generated_s else 0.0


@dataclass
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
    prompt: list[Token] = field(default_factory=list)  # filled when prompt_logprobs
    n_generated: int = 0
    finish_reason: FinishReason | None = None  # None while the run goes on; the caller may set it
    reading: bool = True  # no step has chosen a token yet
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.timings.n_reused = self.state.n_past

    def pending(self) -> list[int]:
        """Tokens that the next step computes."""
        return self.state.ids[self.state.n_past :]

    @property
    def n_pending(self) -> int:
        return len(self.state.ids) - self.state.n_past

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
            state.shift(self.keep, discard)
            return min(n, state.n_ctx - state.n_past)
        return 0


def generate_tokens(
    net: Network,
    runs: Sequence[Run],
    tap: Tap | None = None,
    progress: Callable[[int], object] | None = None,
    before_step: Callable[[], object] | None = None,
) -> Generator[tuple[int, Token], None, None]:
    """Continue all runs together, yielding (index of the run, token) as each is chosen.

    Each step computes the pending tokens of as many runs as fit into ``net.n_batch`` rows, so prompts are
    read and answers written in the same passes. A run ends when its ``finish_reason`` is set, here or by
    the caller between two tokens; closing the iterator ends all at once. ``progress`` is told the number of
    prompt tokens each step has read. ``before_step`` is called under the network's lock, which is then held
    until the step is done; what it raises ends the iteration.

    Raises
    ------
    ContextOverflow
        A prompt is longer than its state's context, and the run's policy is "error".
    """
    for run in runs:
        if len(run.state.ids) > run.state.n_ctx and run.overflow == "error":
            raise ContextOverflow(
                f"the prompt has {len(run.state.ids)} tokens; the context holds {run.state.n_ctx}. "
                "Use a larger n_ctx, or overflow='shift' or 'truncate'"
            )
        if run.max_tokens == 0:
            run.finish_reason = "length"
    for i, run in enumerate(runs):
        yield from forced(i, run)
    while active := [i for i, run in enumerate(runs) if run.finish_reason is None]:
        read = n_read(runs) if progress is not None else 0
        with net.lock:
            if before_step is not None:
                before_step()
            tokens = step(net, runs, active, tap)
        if progress is not None:
            progress(n_read(runs) - read)
        for i, token in tokens:
            yield i, token
            yield from forced(i, runs[i])


def forced(i: int, run: Run) -> Iterator[tuple[int, Token]]:
    """Tokens that a constraint leaves no choice about: they join the sequence, and the next step reads all.

    Log-probabilities are known only after a step for each; where they are asked for, `choose` takes these.
    """
    if run.constraint is None or run.logprobs is not None:
        return
    while run.finish_reason is None and len(run.state.ids) <= run.state.n_ctx:
        only = run.constraint.forced()
        if only is None:
            return
        join(run, only)
        yield i, Token(only)


def n_read(runs: Sequence[Run]) -> int:
    """Prompt tokens so far."""
    return sum(run.timings.n_prompt for run in runs)


def step(
    net: Network, runs: Sequence[Run], active: Sequence[int], tap: Tap | None
) -> list[tuple[int, Token]]:
    """Compute pending tokens of the active runs in one pass -> (index, token) of runs that chose one."""
    start = time.perf_counter()
    work = plan(net.n_batch, runs, active)
    chosen: list[tuple[int, Token]] = []
    if not work:
        return chosen
    segments = [(runs[i].state, n, wanted(runs[i], n)) for i, n in work]
    best = n_best(net, [runs[i] for i, _ in work]) if tap is None else 0
    ahead = best == 1 and len(work) == len(active) and all(goes_on(runs[i], n) for i, n in work)
    with net.lock:
        rows = net.forward(segments, tap, best, ahead)
        for (i, n), logits in zip(work, rows, strict=True):
            run = runs[i]
            if run.prompt_logprobs and not run.n_generated:
                note_prompt(run, n, logits)
            if run.n_pending == 0:
                chosen.append((i, (choose_best if best else choose)(run, logits[-1])))
    book(runs, work, time.perf_counter() - start)
    for i, _ in chosen:
        if runs[i].reading:  # forced tokens were read with the prompt
            runs[i].timings.n_prompt -= runs[i].n_generated - 1
            runs[i].reading = False
    return chosen


def n_best(net: Network, runs: Sequence[Run]) -> int:
    """How many of each row's largest logits the device must find; 0: all logits go to the host."""
    picks = net.be.picks
    if not picks or any(run.needs_all for run in runs):
        return 0
    needed = max([run.sampler.needs(len(run.state.ids)) for run in runs])
    return next((k for k in picks if needed <= k < net.n_vocab), 0)


def goes_on(run: Run, n: int) -> bool:
    """Is another step needed after the one that computes these n tokens, unless the text ends?"""
    return run.n_generated + 1 < run.max_tokens and run.n_pending == n


def plan(n_batch: int, runs: Sequence[Run], active: Sequence[int]) -> list[tuple[int, int]]:
    """Choose (run, number of its tokens) for the next step; finish runs whose context is full."""
    room, work = n_batch, []
    for i in active:
        if room == 0:
            break
        n = runs[i].make_room(min(runs[i].n_pending, room))
        if n:
            work.append((i, n))
            room -= n
        else:
            runs[i].finish_reason = "context"
    return work


def wanted(run: Run, n: int) -> Literal["all", "last", "none"]:
    """Which of the next n rows' logits are needed."""
    if run.prompt_logprobs and run.n_generated == 0:
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
    return run.sampler.choose(scratch, run.state.ids, run.constraint.allowed())


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
        run.finish_reason = "stop"
    else:
        run.state.append([chosen])
        if run.constraint is not None:
            run.constraint.take(chosen)
        if run.n_generated >= run.max_tokens:
            run.finish_reason = "length"


def token(run: Run, logits: np.ndarray, chosen: int) -> Token:
    logprob, top = run.sampler.logprobs(logits, chosen, run.logprobs or 0)
    return Token(chosen, logprob, top)


def book(runs: Sequence[Run], work: Sequence[tuple[int, int]], seconds: float) -> None:
    """Share the step's time among the runs by their rows."""
    rows = sum(n for _, n in work)
    for i, n in work:
        t = runs[i].timings
        if runs[i].reading:
            t.n_prompt += n
            t.prompt_s += seconds * n / rows
        else:
            t.generated_s += seconds * n / rows
