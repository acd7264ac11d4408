"""One answer as GPT4All gives it: its stop strings, its sampler, its way with a full context."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from ..engine.completion import (
    SMALLEST_CONTEXT,
    Completion,
    Options,
    begin,
    complete,
    pieces_of,
    strings,
)
from ..engine.generate import ERASED, Overflow
from ..errors import ArgumentError
from ..sampling import SamplingParams
from .arguments import whole

if TYPE_CHECKING:
    from ..model import Model
    from ..models.state import State
    from .names import ResponseCallbackType

STOP_STRINGS = (
    "### System",
    "### Instruction",
    "### Human",
    "### User",
    "### Response",
    "### Assistant",
    "### Context",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)


class AnswerOptions(TypedDict, total=False):
    """What ``GPT4All.generate`` takes by keyword, for type checkers; it explains each of them."""

    max_tokens: int
    temp: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    n_batch: int
    n_predict: int | None
    callback: ResponseCallbackType
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class Request:
    """What a call asks for beyond the prompt, with the names and defaults of GPT4All's ``prompt_model``.

    ``seed``, ``stop`` and ``logprobs`` are those of tinyllm's models. ``n_batch`` is checked and otherwise
    ignored: prompts are read in the engine's own batches.

    Raises
    ------
    ArgumentError
        A value is out of range; the message names the argument as it is called here.
    """

    n_predict: int = 4096
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    temp: float = 0.1
    n_batch: int = 8
    repeat_penalty: float = 1.2
    repeat_last_n: int = 10
    context_erase: float = ERASED
    reset_context: bool = True
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        whole("n_predict", self.n_predict)
        whole("n_batch", self.n_batch, 1)
        if self.logprobs is not None:
            whole("logprobs", self.logprobs, 0)
        if self.context_erase != ERASED or not self.reset_context:
            raise ArgumentError(
                f"context_erase is {ERASED}; to continue a conversation, pass its state"
            )
        self.options("error")

    def options(self, overflow: Overflow) -> Options:
        """The engine's options for this request."""
        try:
            params = SamplingParams(
                temperature=self.temp,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repeat_penalty=self.repeat_penalty,
                repeat_last_n=self.repeat_last_n,
                seed=self.seed,
            )
        except ArgumentError as error:
            raise ArgumentError(str(error).replace("temperature=", "temp=", 1)) from None
        # GPT4All counts after it has answered: a negative limit allows one token
        limit = 1 if self.n_predict < 0 else int(self.n_predict)
        stop = (*STOP_STRINGS, *strings(() if self.stop is None else self.stop))
        return Options(params, limit, stop, self.logprobs, False, overflow)


class _Cancelled(Exception):
    """The callback that follows the reading of the prompt returned false."""


class Answer:
    """A prompt being answered in a state, which keeps what it has in common with the prompt.

    Without one, it begins with what the model has kept of a text that begins alike.

    Iterating gives (token id, text) whenever text can be shown. ``check`` is called before each step, while no
    other call can compute; ``on_prompt`` with each token of the prompt once it is read, and a false result
    ends the answer.
    """

    def __init__(
        self,
        model: Model,
        state: State | None,
        ids: list[int],
        request: Request,
        check: Callable[[], object],
        on_prompt: Callable[[int], bool],
    ) -> None:
        self.network, n_ctx = model.network, model.n_ctx if state is None else state.n_ctx
        self._check, self._on_prompt = check, on_prompt
        ids = erase_oldest(ids, n_ctx, 1 if model.tokenizer.add_bos else 0)
        tree = model.prefixes if state is None else None
        if state is None:
            state = model.prefixes.find(ids, n_ctx) or model.new_state()
        self.state = state
        kept = state.reuse(ids)
        state.truncate(kept)
        shifts = state.can_truncate and state.can_shift
        options = request.options("shift" if shifts else "error")
        self.job = begin(model.tokenizer, model.network, state, ids[kept:], options)
        self.job.prompt_ids = ids
        self.job.keep_in(tree)

    def __iter__(self) -> Generator[tuple[int, str], None, None]:
        try:
            with suppress(_Cancelled):
                yield from pieces_of(
                    self.network, self.job, progress=self._note_read, before_step=self._check
                )
        finally:
            self.end()

    def _note_read(self, n: int) -> None:
        end = self.job.run.timings.n_reused + self.job.run.timings.n_prompt
        if not all(map(self._on_prompt, self.job.prompt_ids[end - n : end])):
            raise _Cancelled

    def end(self) -> None:
        """Stop here. The state keeps what was shown: no part of a stop string, no unread prompt."""
        run, text, state = self.job.run, self.job.text, self.state
        run.finish_reason = run.finish_reason or "cancelled"
        if run.n_generated == 0:
            state.truncate(state.n_past)
        elif text.stopped is not None and state.can_truncate:
            state.truncate(max(len(state.ids) - text.n_held_tokens, 0))


def complete_all(answers: Sequence[Answer], check: Callable[[], object]) -> list[Completion]:
    """Several answers side by side, in the same steps."""
    if not answers:
        return []
    try:
        return complete(answers[0].network, [answer.job for answer in answers], None, check)
    finally:
        for answer in answers:
            answer.end()


def room_for_prompt(n_ctx: int) -> int:
    """Tokens of a message that leave room to answer it."""
    return max(n_ctx, SMALLEST_CONTEXT) - 4


def erase_oldest(ids: list[int], n_ctx: int, keep: int) -> list[int]:
    """A prompt longer than the context, without its oldest tokens: a quarter of the context remains."""
    if len(ids) <= n_ctx:
        return ids
    remaining = max(1, min(n_ctx, int(n_ctx * (1 - ERASED))))
    return ids[:keep] + ids[keep + len(ids) - remaining :]
