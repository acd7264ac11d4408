"""One answer as GPT4All gives it: its stop strings, its sampler, its way with a full context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyllm.completion import Completion
from tinyllm.generate import ERASED, Run, Token, step
from tinyllm.sampling import Sampler, SamplingParams
from tinyllm.text import TextStream

if TYPE_CHECKING:
    from tinyllm.model import Model
    from tinyllm.models.state import State

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
MIN_N_CTX = 8


@dataclass(frozen=True)
class Request:
    """What a call asks for, beyond the prompt."""

    params: SamplingParams
    n_predict: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class Answer:
    """A prompt being answered in a state, which keeps what it has in common with the prompt."""

    def __init__(
        self,
        model: Model,
        state: State,
        ids: list[int],
        request: Request,
        borrowed: bool = False,
    ) -> None:
        tokenizer = model.tokenizer
        self.model, self.state, self.lock = model, state, model.network.lock
        self.borrowed = borrowed  # the state goes back when the answer ends
        self.keep = 1 if tokenizer.add_bos else 0
        self.prompt_ids = erase_oldest(ids, state.n_ctx, self.keep)
        self.n_reused = state.reuse(self.prompt_ids)
        # GPT4All counts after it has answered: a negative limit allows one token
        limit = 1 if request.n_predict < 0 else request.n_predict
        self.run = Run(
            state,
            Sampler(request.params, model.network.n_vocab, model.network.be.top_k),
            limit,
            eog=tokenizer.eog,
            overflow="shift" if state.can_truncate and state.can_shift else "error",
            keep=self.keep,
            logprobs=request.logprobs,
            finish_reason="length" if limit == 0 else None,
        )
        stop = (*STOP_STRINGS, *request.stop)
        self.text = TextStream(tokenizer, stop, special_ids(model, stop))
        self.tokens: list[Token] = []

    @property
    def done(self) -> bool:
        return self.run.finish_reason is not None

    def read(self) -> list[int]:
        """Compute one step; the prompt's ids that it read. Fills `tokens` when it ends with a choice."""
        start = self.state.n_past
        chosen = step(self.model.network, [self.run], [0], None)
        self.tokens += [token for _, token in chosen]
        return self.prompt_ids[start : self.state.n_past] if self.run.n_generated <= 1 else []

    def show(self) -> str:
        """The text that the last token allows to show."""
        if self.run.finish_reason == "stop":
            return self.text.finish()
        piece = self.text.push(self.tokens[-1].id)
        if self.text.stopped is not None:
            self.run.finish_reason = "stop"
        return piece + self.text.finish() if self.done else piece

    def completion(self) -> Completion:
        """The whole answer, with the log-probabilities that were asked for."""
        ids = [token.id for token in self.tokens if token.id not in self.run.eog]
        reason = self.run.finish_reason or "cancelled"
        tokens = self.tokens if self.run.logprobs is not None else None
        return Completion(
            self.text.text, ids, reason, self.prompt_ids, tokens, None, self.run.timings
        )

    def end(self, reason: str = "cancelled") -> None:
        """Stop here. The state keeps what was shown: no part of a stop string, no unread prompt."""
        self.run.finish_reason = self.run.finish_reason or reason
        state = self.state
        if self.run.n_generated == 0:
            state.truncate(state.n_past)
        elif self.text.stopped is not None and state.can_truncate:
            held = self.text.n_held_tokens
            state.truncate(max(len(state.ids) - held, 0))


def pieces(
    answer: Answer, begin: Callable[[], None], on_prompt: Callable[[int], bool]
) -> Iterator[tuple[int, str]]:
    """(id, text) whenever text can be shown; ``begin`` runs before, and under the lock of, each step."""
    try:
        while not answer.done:
            with answer.lock:
                begin()
                n_before = len(answer.tokens)
                read = answer.read()
            if not all(on_prompt(i) for i in read):
                return
            if len(answer.tokens) == n_before:
                continue
            text = answer.show()
            if text:
                yield answer.tokens[-1].id, text
        if rest := answer.text.finish():  # the context was full
            yield answer.tokens[-1].id, rest
    finally:
        answer.end()


def complete(answers: Sequence[Answer], begin: Callable[[], None]) -> list[Completion]:
    """Several answers side by side, in the same steps."""
    runs = [answer.run for answer in answers]
    try:
        while active := [i for i, answer in enumerate(answers) if not answer.done]:
            with answers[0].lock:
                begin()
                chosen = step(answers[0].model.network, runs, active, None)
            for i, token in chosen:
                answers[i].tokens.append(token)
                answers[i].show()
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


def special_ids(model: Model, texts: Sequence[str]) -> dict[int, str]:
    """The control tokens spelled like one of these texts, by id."""
    ids = {model.tokenizer.token_id(text): text for text in texts}
    return {i: s for i, s in ids.items() if i is not None and model.tokenizer.is_control(i)}
