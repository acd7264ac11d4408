"""A call of ``generate``: prompts in, texts out, whole or as they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError
from ..sampling import Sampler, SamplingParams
from ..text import TextStream
from .generate import Overflow, Run, Timings, Token, generate_tokens

if TYPE_CHECKING:
    from ..model import Model
    from ..models.network import Network
    from ..models.state import State
    from ..models.step import Tap
    from ..tokenizers import Tokenizer

SMALLEST_CONTEXT = 8
LONG_PROMPT = 256  # tokens from which reading shows a bar


@dataclass(frozen=True)
class Completion:
    """A finished text.

    ``text`` is what was written, without the prompt; ``ids`` its tokens; ``logprobs`` one Token each, where
    asked for; ``finish_reason`` is "stop" (the model or a stop string ended it), "length" (max_tokens),
    "context" (no room was left) or "cancelled".
    """

    text: str
    ids: list[int]
    finish_reason: str
    prompt_ids: list[int]
    logprobs: list[Token] | None = None
    prompt_logprobs: list[Token] | None = None
    timings: Timings = field(default_factory=Timings)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Options:
    """What a call of ``generate`` asks for, the same for all of its prompts."""

    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    logprobs: int | None
    echo: bool
    overflow: Overflow


class Job:
    """One prompt being continued: its run through the decode loop, and its text."""

    def __init__(
        self, tokenizer: Tokenizer, run: Run, stop: Sequence[str], prompt_ids: list[int]
    ) -> None:
        self.run, self.prompt_ids = run, prompt_ids
        self.text = TextStream(tokenizer, stop, control_stops(tokenizer, stop))
        self.tokens: list[Token] = []

    @property
    def done(self) -> bool:
        return self.run.finish_reason is not None

    def accept(self, token: Token) -> str:
        """Take one token; the text that may be shown because of it."""
        self.tokens.append(token)
        piece = "" if self.run.finish_reason == "stop" else self.text.push(token.id)
        if self.text.stopped is not None:
            self.run.finish_reason = "stop"
        return piece + self.text.finish() if self.done else piece

    def completion(self) -> Completion:
        """The text so far."""
        run = self.run
        return Completion(
            self.text.text, [t.id for t in self.tokens if t.id not in run.eog],
            run.finish_reason or "cancelled", self.prompt_ids,
            self.tokens if run.logprobs is not None else None,
            run.prompt if run.prompt_logprobs else None, run.timings,
        )  # fmt: skip


def begin(model: Model, ids: list[int], o: Options, state: State | None) -> Job:
    """A prompt's job; nothing is computed yet."""
    tokenizer = model.tokenizer
    keep = 1 if tokenizer.add_bos else 0
    if state is None:
        state = model.new_state(room_for(ids, o, model.n_ctx))
    rest = state.n_ctx - len(state.ids)
    state.append(truncated(ids, rest, keep, o.max_tokens) if o.overflow == "truncate" else ids)
    limit = o.max_tokens if o.max_tokens >= 0 else sys.maxsize
    sampler = Sampler(o.params, model.network.n_vocab, model.network.be.top_k)
    run = Run(
        state, sampler, limit, tokenizer.eog, o.overflow, keep, o.logprobs,
        o.echo and o.logprobs is not None,
    )  # fmt: skip
    return Job(tokenizer, run, o.stop, ids)


def room_for(ids: Sequence[int], o: Options, n_ctx: int) -> int:
    """Tokens of context for a prompt and its answer: all there are, if it may come to that."""
    needed = len(ids) + o.max_tokens
    if o.max_tokens < 0 or o.overflow == "shift" or needed > n_ctx:
        return n_ctx
    return max(needed, SMALLEST_CONTEXT)


def complete(
    net: Network,
    jobs: Sequence[Job],
    tap: Tap | None = None,
    before_step: Callable[[], object] | None = None,
) -> list[Completion]:
    """All jobs to their ends, side by side; ``before_step`` as `generate_tokens` has it."""
    with (
        reading(jobs) as read,
        closing(generate_tokens(net, [j.run for j in jobs], tap, read, before_step)) as tokens,
    ):
        for i, token in tokens:
            jobs[i].accept(token)
    for job in jobs:
        job.text.finish()
    return [job.completion() for job in jobs]


class Pieces(Iterator[str]):
    """A text, piece by piece, as ``generate(stream=True)`` gives it; closing it stops the work."""

    def __init__(self, net: Network, job: Job, tap: Tap | None) -> None:
        self._job, self._pieces = job, pieces_of(net, job, tap)

    def __next__(self) -> str:
        return next(self._pieces)[1]

    def close(self) -> None:
        self._pieces.close()

    @property
    def completion(self) -> Completion:
        """The text so far, with its ids, log-probabilities and timings.

        Its ``finish_reason`` is "cancelled" until the text has ended.
        """
        return self._job.completion()


def pieces_of(
    net: Network,
    job: Job,
    tap: Tap | None = None,
    progress: Callable[[int], object] | None = None,
    before_step: Callable[[], object] | None = None,
) -> Generator[tuple[int, str], None, None]:
    """(id of the last token, text) whenever text can be shown.

    ``progress`` and ``before_step`` as `generate_tokens` has them; without the first, reading a long prompt
    shows a bar on a terminal.
    """
    with (
        reading([job]) as bar,
        closing(generate_tokens(net, [job.run], tap, progress or bar, before_step)) as tokens,
    ):
        for _, token in tokens:
            if piece := job.accept(token):
                yield token.id, piece
    if piece := job.text.finish():  # the context was full
        yield job.tokens[-1].id, piece


@contextmanager
def reading(jobs: Sequence[Job]) -> Iterator[Callable[[int], None] | None]:
    """A bar on a terminal while long prompts are read; it goes when they are."""
    total = sum(len(j.run.pending()) for j in jobs)
    if total < LONG_PROMPT:
        yield None
        return
    from tqdm import tqdm

    def update(n: int) -> None:
        bar.update(n)
        if bar.n >= total:
            bar.close()

    with tqdm(
        total=total, desc="reading", leave=False, unit="token", delay=1.0, disable=None
    ) as bar:
        yield update


def control_stops(tokenizer: Tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """Stop strings that are control tokens, by id: such tokens have no text to match."""
    special = tokenizer.special_tokens
    return {special[s]: s for s in stop if s in special}


def truncated(ids: list[int], room: int, keep: int, max_tokens: int) -> list[int]:
    """The prompt without so much of its middle-left that the answer, or half the room, is free."""
    limit = room - min(max(max_tokens, 0) or room // 2, room // 2)
    return ids if len(ids) <= limit else ids[:keep] + ids[len(ids) - (limit - keep) :]


def or_beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A prompt's ids; an empty one is the beginning-of-text token, or the one that ends texts."""
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return ids or ([] if first is None else [first])


def split_prompts(prompt: str | Sequence[Any]) -> tuple[list[Any], bool]:
    """One prompt or a list of them, told apart by the first element."""
    if isinstance(prompt, str):
        return [prompt], False
    items = list(prompt)
    if items and not isinstance(items[0], (int, np.integer)):
        return items, True
    if not all(isinstance(i, (int, np.integer)) for i in items):
        raise ArgumentError("prompt mixes ids and texts; give text, ids, or a list of either")
    return [items], False


def strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in found):
        raise ArgumentError(f"stop={stop!r:.80}; expected non-empty strings")
    return found


def check_max_tokens(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < -1:
        raise ArgumentError(f"max_tokens={n!r}; expected a whole number, or -1 for no limit")
    return int(n)
