"""A call of ``generate``: prompts in, texts out, whole or as they are written."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np

from ..errors import ArgumentError, ContextOverflow
from ..models.adapters import Scales
from ..models.state import State
from ..sampling import LogitsProcessor, Sampler, SamplingParams
from ..text import TextStream
from .generate import FinishReason, Overflow, Run, Timings, Token, check_fits, force, steps
from .progress import reading
from .speculate import drafting

if TYPE_CHECKING:
    from types import TracebackType

    from ..model import Model
    from ..models.network import Network
    from ..models.state import User
    from ..models.step import Tap
    from ..tokenizers import Tokenizer
    from .constraint import Grammar, Schema
    from .prefixes import Prefixes
    from .speculate import Drafting

SMALLEST_CONTEXT = 8
Prompt: TypeAlias = str | Sequence[int]  # a text, or the ids of its tokens


class GenerateOptions(TypedDict, total=False):
    """What ``Model.generate`` and ``Model.chat`` take by keyword, for type checkers.

    ``Model.generate`` explains each of them.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    logits_processor: LogitsProcessor | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None
    echo: bool
    state: State | None
    tap: Tap | None
    overflow: Overflow
    json_schema: Schema | None
    regex: str | None
    grammar: str | None
    speculate: Literal["lookup"] | Model | None
    lora: Mapping[str, float] | None
    whole: bool


@dataclass(frozen=True)
class Completion:
    """A finished text.

    ``text`` is what was written, without the prompt; ``ids`` its tokens; ``logprobs`` one Token each, where
    asked for; ``finish_reason`` is "stop" (the model or a stop string ended it), "length" (max_tokens),
    "context" (no room was left), "cancelled" or an Engine's "deadline". ``message`` is a chat's answer as a
    message: {"role", "content"}, and where there are any "reasoning" and "tool_calls".
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_ids: list[int]
    logprobs: list[Token] | None = None
    prompt_logprobs: list[Token] | None = None
    timings: Timings = field(default_factory=Timings)
    message: dict[str, Any] | None = None

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
    grammar: Grammar | None = None
    drafting: Drafting | None = None  # how tokens are guessed ahead
    scales: Scales | None = None  # for the model's adapters; None: as it was loaded
    whole: bool = True  # where there is a grammar: is the text to keep to it when its tokens end?

    @property
    def reads_all(self) -> bool:
        """Whether the prompt's beginning is not known before, or is reported on."""
        return self.overflow == "truncate" or (self.echo and self.logprobs is not None)

    def __post_init__(self) -> None:
        if self.overflow not in get_args(Overflow):
            expected = ", ".join(map(repr, get_args(Overflow)))
            raise ArgumentError(f"overflow={self.overflow!r:.40}; expected one of {expected}")
        if not isinstance(self.whole, bool):
            raise ArgumentError(f"whole={self.whole!r:.40}; expected True or False")
        n = self.logprobs
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
            raise ArgumentError(
                f"logprobs={n!r:.40}; expected a whole number of at least 0, or None"
            )


def options_of(
    max_tokens: int = 256,
    stop: str | Sequence[str] | None = (),
    logprobs: int | None = None,
    echo: bool = False,
    overflow: Overflow = "error",
    grammar: Grammar | None = None,
    drafting: Drafting | None = None,
    scales: Scales | None = None,
    whole: bool = True,
    **sampling: Any,
) -> Options:
    """The options of a call; ``sampling`` are those of SamplingParams."""
    if unknown := [name for name in sampling if name not in SamplingParams.__dataclass_fields__]:
        raise ArgumentError(f"{unknown[0]}={sampling[unknown[0]]!r:.40}: there is no such option")
    params, limit = SamplingParams(**sampling), check_max_tokens(max_tokens)
    return Options(
        params, limit, strings(stop), logprobs, echo, overflow, grammar, drafting, scales, whole
    )


def asked_of(
    model: Model, max_tokens: int, state: State | None, options: Mapping[str, Any]
) -> Options:
    """What a caller of ``generate`` asks of a model by these options, ``state`` aside; checked."""
    left = dict(options)
    held = {name: left.pop(name, None) for name in ("json_schema", "regex", "grammar")}
    guesses = drafting(left.pop("speculate", None), model)
    scales = chosen_scales(model.network, left.pop("lora", None), state)
    return options_of(
        max_tokens, grammar=model.grammar(**held), drafting=guesses, scales=scales, **left
    )


def chosen_scales(net: Network, lora: Mapping[str, float] | None, state: State | None) -> Scales:
    """Each adapter's scale for a text; ArgumentError unless the ``state`` that it continues has these."""
    scales = net.adapters.chosen(lora)
    if state is None or lora is None or state.scales == scales:
        return scales
    raise ArgumentError(
        f"lora={lora!r:.60}, but the state has other scales: {state.scales}; give lora to new_state"
    )


class Job:
    """One prompt being continued: its run through the decode loop, and its text."""

    def __init__(
        self, tokenizer: Tokenizer, run: Run, stop: Sequence[str], prompt_ids: list[int]
    ) -> None:
        self.run, self.prompt_ids = run, prompt_ids
        self.pieces: list[tuple[int, str]] = []  # not yet taken: id of the last token, text
        me = weakref.ref(self)  # no circle: a job and its state are freed at once

        def accept(token: Token) -> None:
            if (job := me()) is not None:
                job.accept(token)

        run.accept = accept
        self.text = TextStream(tokenizer, stop, control_stops(tokenizer, stop))
        self.tokens: list[Token] = []
        self.tree: Prefixes | None = None  # where what it has read is kept for others
        self.due = sys.maxsize  # once so many tokens are read, or it ends

    def keep_in(self, tree: Prefixes | None) -> None:
        """Keep what is read in a tree: the prompt once it is, and all of the text at its end."""
        if tree is not None:
            self.tree, self.due = tree, tree.due(self.run.state.n_past, len(self.prompt_ids))

    def keep(self) -> None:
        """Keep what was read, where it is time."""
        run = self.run
        if self.tree is None or (run.going_on and run.state.n_past < self.due):
            return
        if run.shifted:  # others would read other keys
            self.tree = None
            return
        self.tree.add(run.state)
        self.due = self.tree.due(run.state.n_past, len(self.prompt_ids))
        if not run.going_on:
            self.tree = None

    @property
    def done(self) -> bool:
        return self.run.finish_reason is not None

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close; after an error, a state that was given is what it was. A closed stream is no error."""
        if e is not None and not isinstance(e, GeneratorExit):
            self.run.undo()
        self.close()

    def close(self) -> None:
        """End where it is, unless it has ended; keep what was read, and let go of the memory."""
        self.run.finish_reason = self.run.finish_reason or "cancelled"
        self.keep()
        self.run.close()

    def accept(self, token: Token) -> None:
        """Take one token, as the decode loop chooses it."""
        self.tokens.append(token)
        piece = "" if token.id in self.run.eog else self.text.push(token.id)
        if self.text.stopped is not None:
            self.run.finish_reason = "stop"
        if self.done:
            piece += self.text.finish()
        if piece:
            self.pieces.append((token.id, piece))

    def take(self) -> list[tuple[int, str]]:
        """(id of the last token, text) of what can be shown since the last call."""
        if self.done and (
            piece := self.text.finish()
        ):  # the context was full, or the caller ended it
            self.pieces.append((self.tokens[-1].id, piece))
        taken, self.pieces = self.pieces, []
        return taken

    def completion(self) -> Completion:
        """The text so far."""
        run = self.run
        return Completion(
            self.text.text, [t.id for t in self.tokens if t.id not in run.eog],
            run.finish_reason or "cancelled", self.prompt_ids,
            self.tokens if run.logprobs is not None else None,
            run.prompt if run.prompt_logprobs else None, run.timings,
        )  # fmt: skip


def begin(
    tokenizer: Tokenizer,
    net: Network,
    state: State,
    ids: list[int],
    o: Options,
    n_read: int = 0,
    kept: int | None = None,
    given: bool = False,
    user: User | None = None,
) -> Job:
    """Add a prompt to a state, which has its first ``n_read`` ids already, and make it a job.

    Nothing is computed yet. The prompt stands behind the state's first ``kept`` tokens, and the others are
    dropped; None: behind all. A ``given`` state is what it was after an error, here or in the job. ``user`` has
    taken the state; None: the job does.
    """
    keep = 1 if tokenizer.add_bos else 0
    n = len(state.ids) if kept is None else kept
    check_fits(n - n_read + len(ids), state.n_ctx, o.overflow)
    if kept != 0:  # where nothing is kept, all that was lost is read again
        state.check_whole()
    constraint = None if o.grammar is None else o.grammar.begin()
    if constraint is not None and constraint.forced() is None:
        constraint.allowed()  # where no token may come, the error is raised before the state changes
    limit = o.max_tokens if o.max_tokens >= 0 else sys.maxsize
    sampler = Sampler(o.params, net.n_vocab, net.be.top_k)
    run = Run(
        state, sampler, limit, tokenizer.eog, o.overflow, keep, o.logprobs,
        o.echo and o.logprobs is not None, constraint, o.whole,
        finish_reason="length" if limit == 0 else None,
        drafter=None if o.drafting is None else o.drafting.begin(),
    )  # fmt: skip
    if user is None:
        state.take(run)
    try:
        if given:
            run.before = state.copy(state.n_ctx)
        if kept is not None:
            state.cut_back(kept)
            run.timings.n_reused = state.n_past
        rest = state.n_ctx - n
        new = truncated(ids, rest, keep, o.max_tokens) if o.overflow == "truncate" else ids[n_read:]
        state.ids.extend(new)
        job = Job(tokenizer, run, o.stop, ids if state.source is None else state.source.ids)
        force(run)
    except BaseException:
        run.undo()
        run.close()
        raise
    return job


def divided(
    net: Network, ids: list[int], state: State | None, n_ctx: int
) -> tuple[list[int] | None, list[int]]:
    """A prompt as what is read before the text, or None, and what the text begins with.

    Where another stack of the model's layers reads, that is the prompt, and the text begins with a token of the
    file's; else the text begins with the prompt.

    Raises
    ------
    ArgumentError
        The prompt is read before the text, which a ``state`` has begun already.
    ContextOverflow
        What is read before the text has more than ``n_ctx`` tokens.
    """
    if net.reader is None:
        return None, ids
    if state is not None:
        raise ArgumentError(f"{net.arch.name} reads its prompt before it writes; leave state out")
    if len(ids) > n_ctx:
        raise ContextOverflow(
            f"the prompt has {len(ids)} tokens; the context holds {n_ctx}", "Use a larger n_ctx"
        )
    return ids, [net.config.start_id]


def room_for(ids: Sequence[int], o: Options, n_ctx: int) -> int:
    """Tokens of context for a prompt and its answer; all ``n_ctx`` where they may be needed."""
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
    """Run all jobs to their ends, side by side; ``before_step`` is called before each step."""
    with ExitStack() as ends:
        for job in jobs:
            ends.enter_context(job)
        with reading(sum(job.run.n_pending for job in jobs)) as read:
            for _ in steps(net, [job.run for job in jobs], tap, read, before_step):
                for job in jobs:
                    job.keep()
    for job in jobs:
        job.text.finish()
    return [job.completion() for job in jobs]


class Pieces(Iterator[str]):
    """A text, piece by piece, as ``generate(stream=True)`` gives it; closing it stops the work.

    Threads may share one: each piece goes to one of them, and a close waits for the piece being written.
    """

    def __init__(self, net: Network, job: Job, tap: Tap | None) -> None:
        self._job, self._pieces = job, pieces_of(net, job, tap)
        self._lock = threading.RLock()  # Python refuses a generator that another thread is in
        self.finished: Callable[[Completion], Completion] = lambda done: done

    def __next__(self) -> str:
        with self._lock:
            return next(self._pieces)[1]

    def close(self) -> None:
        with self._lock:
            self._pieces.close()
            self._job.close()  # the work may not have begun

    @property
    def completion(self) -> Completion:
        """The text so far, with its ids, log-probabilities and timings.

        Its ``finish_reason`` is "cancelled" until the text has ended.
        """
        return self.finished(self._job.completion())


def pieces_of(
    net: Network,
    job: Job,
    tap: Tap | None = None,
    progress: Callable[[int], object] | None = None,
    before_step: Callable[[], object] | None = None,
) -> Generator[tuple[int, str], None, None]:
    """(id of the last token, text) whenever text can be shown.

    ``progress`` and ``before_step`` as `steps` has them; without the first, reading a long prompt
    shows a bar on a terminal.
    """
    with (
        reading(job.run.n_pending) as bar,
        job,
        closing(steps(net, [job.run], tap, progress or bar, before_step)) as loop,
    ):
        for _ in loop:
            job.keep()
            yield from job.take()
        yield from job.take()  # a constraint may have left no choice about any token


def control_stops(tokenizer: Tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """Stop strings that are control tokens, by id: such tokens have no text to match."""
    special = tokenizer.special_tokens
    return {special[s]: s for s in stop if s in special}


def truncated(ids: list[int], room: int, keep: int, max_tokens: int) -> list[int]:
    """Drop tokens after the first ``keep`` until the answer, or half of the room, is free."""
    limit = room - min(max(max_tokens, 0) or room // 2, room // 2)
    return ids if len(ids) <= limit else ids[:keep] + ids[len(ids) - (limit - keep) :]


def or_beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """A prompt's ids; an empty one is the beginning-of-text token, or the one that ends texts."""
    first = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
    return ids or ([] if first is None else [first])


def split_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether they came as a list; the first element tells."""
    if isinstance(prompt, str):
        return [prompt], False
    items = _sequence(prompt)
    if items is None:
        raise ArgumentError(
            f"prompt is {_found(prompt)}; expected a text, ids, or a list of either"
        )
    if _are_ids(items):
        return [items], False
    for item in items:
        if not isinstance(item, str) and not _are_ids(_sequence(item)):
            raise ArgumentError(
                f"prompt has {_found(item)} in its list; expected texts, or lists of ids"
            )
    return items, True


def _sequence(x: Any) -> list[Any] | None:
    """The items of a list, tuple or array; None for what is no sequence of items, bytes among them."""
    if isinstance(x, np.ndarray):
        return list(x) if x.ndim else None
    known = isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray))
    return list(x) if known else None


def _are_ids(items: Sequence[Any] | None) -> bool:
    return items is not None and all(
        isinstance(i, (int, np.integer)) and not isinstance(i, (bool, np.bool_)) for i in items
    )


def _found(x: object) -> str:
    return f"{type(x).__name__} {x!r:.40}"


def listed(texts: Iterable[str], name: str) -> list[str]:
    """The texts that a caller gives one by one; ArgumentError for a single one, or what holds none."""
    try:
        if isinstance(texts, str):
            raise TypeError
        return list(texts)
    except TypeError:
        raise ArgumentError(f"{name} is {_found(texts)}; expected a list of texts") from None


def check_given(state: State | None, tap: Tap | None) -> None:
    """ArgumentError for what is no state or no tap; one that is false, such as 0, is not None."""
    if state is not None and not isinstance(state, State):
        raise ArgumentError(f"state is {_found(state)}; expected what new_state returns, or None")
    if tap is not None and not callable(tap):
        raise ArgumentError(f"tap is {_found(tap)}; expected a function of a name and an array")


def unread(ids: list[int], state: State | None) -> tuple[list[int], int | None]:
    """What a state has not read of a conversation yet, and how many of its tokens come before."""
    kept = None if state is None else state.n_common(ids)
    return ids[kept or 0 :], kept


def ids_behind(model: Model, prompt: Prompt, state: State | None) -> list[int]:
    """What is read of a prompt behind a state; of a text without a token for the beginning, which has been."""
    ids = model.prompt_ids(prompt)
    if state is None or not state.ids or not isinstance(prompt, str):
        return ids
    if not model.tokenizer.add_bos or ids[:1] != [model.tokenizer.bos]:
        return ids
    if len(ids) == 1 and len(state.ids) == state.n_past:
        raise ArgumentError(
            "the prompt is empty, and the state has nothing left to read; give a text"
        )
    return ids[1:]


def without_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids of a text to continue: without the end token that some vocabularies have put behind every text."""
    return ids[:-1] if tokenizer.add_eos and ids[-1:] == [tokenizer.eos] else ids


def strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple; None is none.

    Raises
    ------
    ArgumentError
        One of them is empty or no string.
    """
    if stop is None:
        return ()
    found = (stop,) if isinstance(stop, str) else _sequence(stop)
    if found is None or not all(isinstance(s, str) and s for s in found):
        raise ArgumentError(f"stop={stop!r:.80}; expected non-empty strings")
    return tuple(found)


def check_max_tokens(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < -1:
        raise ArgumentError(f"max_tokens={n!r}; expected a whole number, or -1 for no limit")
    return int(n)


def check_n_ctx(n: int | None) -> int | None:
    """A context's length as a caller gives it, at least ``SMALLEST_CONTEXT``; None stays None."""
    if n is None:
        return None
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n < 1 << 31:
        raise ArgumentError(
            f"n_ctx={n!r}; expected a whole number from 1 to {(1 << 31) - 1}, or None"
        )
    return max(int(n), SMALLEST_CONTEXT)
