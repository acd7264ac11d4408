"""One answer as GPT4All gives it: its stop strings, its sampler, its way with a full context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.completion import Completion, Job
from ..engine.generate import ERASED, Run, step
from ..sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from ..model import Model
    from ..models.state import State

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


@dataclass(frozen=True)
class Request:
    """What a call asks for, beyond the prompt."""

    params: SamplingParams
    n_predict: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class Answer(Job):
    """A prompt being answered in a state, which keeps what it has in common with the prompt."""

    def __init__(
        self,
        model: Model,
        state: State,
        ids: list[int],
        request: Request,
        borrowed: bool = False,
    ) -> None:
        tokenizer, network = model.tokenizer, model.network
        keep = 1 if tokenizer.add_bos else 0
        prompt_ids = erase_oldest(ids, state.n_ctx, keep)
        state.reuse(prompt_ids)
        # GPT4All counts after it has answered: a negative limit allows one token
        limit = 1 if request.n_predict < 0 else request.n_predict
        run = Run(
            state,
            Sampler(request.params, network.n_vocab, network.be.top_k),
            limit,
            eog=tokenizer.eog,
            overflow="shift" if state.can_truncate and state.can_shift else "error",
            keep=keep,
            logprobs=request.logprobs,
            finish_reason="length" if limit == 0 else None,
        )
        super().__init__(tokenizer, run, (*STOP_STRINGS, *request.stop), prompt_ids)
        self.network, self.state = network, state
        self.borrowed = borrowed  # the state goes back when the answer ends

    def end(self) -> None:
        """Stop here. The state keeps what was shown: no part of a stop string, no unread prompt."""
        self.run.finish_reason = self.run.finish_reason or "cancelled"
        state = self.state
        if self.run.n_generated == 0:
            state.truncate(state.n_past)
        elif self.text.stopped is not None and state.can_truncate:
            state.truncate(max(len(state.ids) - self.text.n_held_tokens, 0))


def pieces(
    answer: Answer, check: Callable[[], None], on_prompt: Callable[[int], bool]
) -> Iterator[tuple[int, str]]:
    """(id, text) whenever text can be shown; ``check`` runs before, and under the lock of, each step."""
    run, state = answer.run, answer.state
    try:
        while not answer.done:
            start, reading = state.n_past, run.n_generated == 0
            with answer.network.lock:
                check()
                chosen = step(answer.network, [run], [0], None)
            read = answer.prompt_ids[start : state.n_past] if reading else []
            if not all(on_prompt(i) for i in read):
                return
            for _, token in chosen:
                if text := answer.accept(token):
                    yield token.id, text
        if rest := answer.text.finish():  # the context was full
            yield answer.tokens[-1].id, rest
    finally:
        answer.end()


def complete(answers: Sequence[Answer], check: Callable[[], None]) -> list[Completion]:
    """Several answers side by side, in the same steps."""
    runs = [answer.run for answer in answers]
    try:
        while active := [i for i, answer in enumerate(answers) if not answer.done]:
            network = answers[0].network
            with network.lock:
                check()
                chosen = step(network, runs, active, None)
            for i, token in chosen:
                answers[i].accept(token)
    finally:
        for answer in answers:
            answer.text.finish()
            answer.end()
    return [answer.completion() for answer in answers]


def erase_oldest(ids: list[int], n_ctx: int, keep: int) -> list[int]:
    """A prompt longer than the context, without its oldest tokens: a quarter of the context remains."""
    if len(ids) <= n_ctx:
        return ids
    remaining = max(1, min(n_ctx, int(n_ctx * (1 - ERASED))))
    return ids[:keep] + ids[keep + len(ids) - remaining :]
