"""Logits to one token id: penalties, filters, temperature, and a draw.

The chain is GPT4All's (llama.cpp's older order): logit bias and processor, repetition penalties, then
either the largest logit (temperature 0) or top-k, typical-p, top-p, min-p, temperature and a draw. Each
filter looks at the probabilities before temperature and renormalises over what the filter before it kept.
Only the penalised entries and the k survivors are touched: at 128k tokens a single NumPy pass would cost more
than the draw. Where nothing is filtered, only so many tokens are sorted as the draw needs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError

Floats: TypeAlias = NDArray[np.floating[Any]]
Ids: TypeAlias = NDArray[np.integer[Any]]
TopK: TypeAlias = Callable[[Floats, int], tuple[Ids, Floats]]
LogitsProcessor: TypeAlias = Callable[[list[int], Floats], "Floats | None"]

FIRST_SORTED = 64  # tokens, of a draw from all
LARGEST_PENALTY = 1e30  # beyond, a float32 product may be 0 x infinity
LEAST_REPEAT = 1e-6  # the largest bias divided by it is still a float32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    Parameters
    ----------
    temperature : float
        Divides the logits before the draw; 0 takes the largest logit.
    top_k : int
        Keep the k most probable tokens; 0 or less keeps all.
    top_p : float
        Keep the most probable tokens whose probabilities first sum to this; 1 keeps all. arXiv:1904.09751.
    min_p : float
        Keep tokens at least this fraction as probable as the most probable one; 0 keeps all.
    typical_p : float
        Keep the tokens whose surprise is nearest to the expected one, up to this mass; 1 keeps all.
        arXiv:2202.00666.
    repeat_penalty : float
        Divides a positive logit, multiplies a negative one, of every token in the last ``repeat_last_n``;
        1 changes nothing. arXiv:1909.05858.
    repeat_last_n : int
        How many tokens of prompt and output the three penalties look at; -1 all, 0 none.
    presence_penalty, frequency_penalty : float
        Subtracted from the logit of a token once if it is there, and once per occurrence.
    logit_bias : mapping of int to float, optional
        Added to the logits of these ids; ``-inf`` forbids one.
    logits_processor : callable, optional
        ``f(ids, logits)`` with the ids so far and float32 [n_vocab]; edits in place, or returns a replacement.
    seed : int, optional
        Where the random numbers start; None takes a start from the operating system.

    Raises
    ------
    ArgumentError
        A value is out of range, NaN, or of the wrong type.

    Examples
    --------
    >>> SamplingParams(temperature=0.7, top_k=20).top_p
    0.95
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            check = _CHECKS.get(field.name)
            value = getattr(self, field.name)
            if check is not None and not check[0](value):
                raise ArgumentError(f"{field.name}={value!r}; expected {check[1]}")

    @property
    def penalises(self) -> bool:
        """Whether any of the three penalties changes anything."""
        return self.repeat_last_n != 0 and (
            (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        )


def _finite(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _float32(x: Any) -> bool:
    """Can x be added to a logit, many times, without leaving float32?"""
    return _finite(x) and abs(x) <= LARGEST_PENALTY


def _integer(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _fraction(x: Any) -> bool:
    return _finite(x) and 0 <= x <= 1


def _bias(x: object) -> bool:
    return x is None or (
        isinstance(x, Mapping)
        and all(_integer(i) and i >= 0 for i in x)
        and all(_float32(v) or v == -math.inf for v in x.values())
    )


_Check: TypeAlias = tuple[Callable[[Any], bool], str]
_BETWEEN: _Check = (_fraction, "a number from 0 to 1")
_NUMBER: _Check = (_float32, f"a number from -{LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}")
_CHECKS: dict[str, _Check] = {
    "temperature": (lambda x: _finite(x) and x >= 0, "a number >= 0 (0 is greedy)"),
    "top_k": (_integer, "an integer (0 keeps the whole vocabulary)"),
    "top_p": _BETWEEN,
    "min_p": _BETWEEN,
    "typical_p": _BETWEEN,
    "repeat_penalty": (
        lambda x: _finite(x) and LEAST_REPEAT <= x <= LARGEST_PENALTY,
        f"a number from {LEAST_REPEAT:g} to {LARGEST_PENALTY:g} (1 changes nothing)",
    ),
    "repeat_last_n": (lambda x: _integer(x) and x >= -1, "an integer >= -1 (-1 all, 0 off)"),
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "logit_bias": (
        _bias,
        f"a mapping of token ids to numbers up to {LARGEST_PENALTY:g} or -inf, or None",
    ),
    "logits_processor": (lambda x: x is None or callable(x), "a callable f(ids, logits), or None"),
    "seed": (
        lambda x: x is None or (_integer(x) and x >= 0),
        "an integer >= 0; None, or leaving it out, draws one",
    ),
}


def penalise(
    logits: Floats, recent: Sequence[int], repeat: float, presence: float, frequency: float
) -> None:
    """Lower, in place, the logits [n_vocab] of the tokens in ``recent``, each distinct one once."""
    counts = Counter(recent)
    ids = np.fromiter(counts, np.intp, len(counts))
    n = np.fromiter(counts.values(), np.float32, len(counts))
    logits[ids] = lowered(logits[ids], n, repeat, presence, frequency)


def lowered(x: Floats, n: Floats, repeat: float, presence: float, frequency: float) -> Floats:
    """Logits x [m] of tokens that have occurred n [m] times, penalised."""
    y: Floats = np.where(x > 0, x / np.float32(repeat), x * np.float32(repeat))
    y -= n * np.float32(frequency) + np.float32(presence)
    return y


def softmax(logits: Floats) -> Floats:
    """Probabilities of logits [n] sorted from the largest."""
    p: Floats = np.exp(logits - logits[0])
    p /= p.sum()
    return p


def typical(logits: Floats, p: float) -> Ids:
    """Positions, in order, of the locally typical among sorted logits [n], until their mass passes ``p``."""
    prob = softmax(logits)
    surprise = -np.log(np.maximum(prob, np.finfo(prob.dtype).tiny))
    nearest = np.argsort(np.abs(surprise - (prob * surprise).sum()), kind="stable")
    n = int(prob[nearest].cumsum().searchsorted(p, side="right")) + 1
    return np.sort(nearest[:n])


def top_p(logits: Floats, p: float) -> int:
    """How many of sorted logits [n] make up the mass ``p``, at least one."""
    return min(int(softmax(logits).cumsum().searchsorted(p)) + 1, len(logits))


def min_p(logits: Floats, p: float) -> int:
    """How many of sorted logits [n] are at least ``p`` times as probable as the first."""
    return int(np.count_nonzero(logits >= logits[0] + math.log(p)))


def masses(logits: Floats, largest: float, temperature: float) -> Floats:
    """Probabilities of logits [n] at a temperature, in units of that of the largest."""
    # with a tiny temperature the quotient may become -inf, which is probability 0
    with np.errstate(over="ignore"):
        p: Floats = np.exp((logits - largest) / temperature)
    return p


def draw(logits: Floats, temperature: float, u: float) -> int:
    """Position drawn from softmax(sorted logits [n] / temperature) by one uniform number u in [0, 1)."""
    mass = masses(logits, logits[0], temperature).cumsum()
    return min(int(mass.searchsorted(u * mass[-1], side="right")), len(logits) - 1)


class Sampler:
    """Chooses the tokens of one sequence; holds its random generator.

    Parameters
    ----------
    params : SamplingParams
    n_vocab : int
    top_k : callable
        ``top_k(logits, k)`` -> ids and values, largest first, or NumericError; a backend has one.

    Raises
    ------
    ArgumentError
        ``params.logit_bias`` names an id outside the vocabulary.
    """

    def __init__(self, params: SamplingParams, n_vocab: int, top_k: TopK) -> None:
        self.params, self.n_vocab, self._top_k = params, n_vocab, top_k
        k = 1 if params.temperature == 0 else params.top_k
        self._k = min(k, n_vocab) if k > 0 else n_vocab
        bias = params.logit_bias or {}
        self._bias_ids = np.fromiter(bias, np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        if len(bias) and max(bias) >= n_vocab:
            raise ArgumentError(f"logit_bias has id {max(bias)}; expected ids below {n_vocab}")

    @cached_property
    def _random(self) -> np.random.Generator:
        """The random generator, made at the first draw: greedy decoding does not import NumPy's."""
        return np.random.Generator(np.random.PCG64(self.params.seed))

    def twin(self) -> Sampler:
        """A sampler that will draw the same random numbers, without a processor of the logits."""
        params = replace(self.params, logits_processor=None)
        other = Sampler(params, self.n_vocab, self._top_k)
        if params.temperature > 0:
            other._random = deepcopy(self._random)
        return other

    def choose(
        self,
        logits: Floats,
        history: Sequence[int],
        allowed: NDArray[np.bool_] | None = None,
    ) -> int:
        """The next token's id.

        Parameters
        ----------
        logits : float32 [n_vocab]
            A scratch copy: it may be edited in place.
        history : sequence of int
            The ids of prompt and output so far.
        allowed : bool [n_vocab], optional
            Tokens that may be chosen, whatever bias and processor ask for; by default all.

        Raises
        ------
        NumericError
            A logit is NaN or +inf, or all tokens are forbidden.
        """
        logits = self._shape(logits, history)
        if allowed is not None:
            np.copyto(logits, -np.inf, where=~allowed)
        if self._keeps_all:
            return self._draw_from_all(logits)
        return self._draw(*self._top_k(logits, self._k))

    @cached_property
    def _keeps_all(self) -> bool:
        """Whether any token may be drawn."""
        p = self.params
        filters = p.typical_p < 1 or p.top_p < 1 or p.min_p > 0
        return p.temperature > 0 and self._k == self.n_vocab and not filters

    def _draw_from_all(self, logits: Floats) -> int:
        """Draw from the whole vocabulary, as ``draw`` does, but sort no more of it than the draw needs.

        Sorting all would take longer than a small model's step.
        """
        u, t, k = self._random.random(), self.params.temperature, FIRST_SORTED
        largest = float(self._top_k(logits, 1)[1][0])
        wanted = u * float(masses(logits.astype(np.float64), largest, t).sum())
        while k < self.n_vocab:
            ids, values = self._top_k(logits, k)
            mass = masses(values.astype(np.float64), largest, t).cumsum()
            if mass[-1] > wanted:
                return int(ids[mass.searchsorted(wanted, side="right")])
            k *= 16
        ids, values = self._top_k(logits, self.n_vocab)
        return int(ids[draw(values.astype(np.float64), t, u)])

    @cached_property
    def _lowers(self) -> bool:
        """Whether nothing can raise a logit: penalties may lower some, and nothing else changes any."""
        p = self.params
        if p.logits_processor is not None or len(self._bias):
            return False
        lowest = min(p.presence_penalty, p.frequency_penalty)
        return not p.penalises or (p.repeat_penalty >= 1 and lowest >= 0)

    def needs(self, n_history: int) -> int:
        """How many of the largest logits ``choose_best`` needs to pick the same token as ``choose``.

        Where penalties can only lower logits, each recent token may fall out of the k largest, and the next
        largest takes its place. Where anything may raise a logit, the whole vocabulary is needed.
        """
        if not self._lowers:
            return self.n_vocab
        return self._k + (self._n_recent(n_history) if self.params.penalises else 0)

    def choose_best(self, ids: Ids, values: Floats, history: Sequence[int]) -> int:
        """The next token's id, as ``choose`` picks it, from the largest logits alone.

        ``ids`` and ``values`` [n] are the n >= ``needs`` largest, largest first; all values are finite.
        """
        if self.params.penalises:
            n = self.needs(len(history))
            ids, values = self._penalised(ids[:n], values[:n], history)
        return self._draw(ids[: self._k], values[: self._k])

    def _penalised(self, ids: Ids, values: Floats, history: Sequence[int]) -> tuple[Ids, Floats]:
        """The largest logits after the penalties have lowered recent tokens, sorted again."""
        p = self.params
        recent = Counter(history[len(history) - self._n_recent(len(history)) :])
        at = [i for i, token in enumerate(ids.tolist()) if token in recent]
        counts = np.array([recent[token] for token in ids[at].tolist()], np.float32)
        values = values.copy()
        values[at] = lowered(
            values[at], counts, p.repeat_penalty, p.presence_penalty, p.frequency_penalty
        )
        order = np.lexsort((ids, -values))
        return ids[order], values[order]

    def _n_recent(self, n_history: int) -> int:
        """How many of the last tokens the penalties look at."""
        n = self.params.repeat_last_n
        return n_history if n < 0 else min(n, n_history)

    def _draw(self, ids: Ids, values: Floats) -> int:
        """Pick one of the k largest logits: the first, or by a draw."""
        if self.params.temperature == 0:
            return int(ids[0])
        ids, values = self._filter(ids, values.astype(np.float64))
        return int(ids[draw(values, self.params.temperature, self._random.random())])

    def logprobs(self, logits: Floats, id: int, n: int = 0) -> tuple[float, dict[int, float]]:  # noqa: A002
        """Natural log probability of ``id``, and the ``n`` largest by id, largest first.

        They are those of the model's own distribution, before bias, penalties and filters: call it before
        ``choose``, which edits the logits in place.
        """
        largest = float(self._top_k(logits, 1)[1][0])
        log_sum = largest + math.log(np.exp(logits - largest).sum(dtype=np.float64))
        if n <= 0:
            return float(logits[id]) - log_sum, {}
        ids, values = self._top_k(logits, min(n, self.n_vocab))
        best = dict(zip(ids.tolist(), (values.astype(np.float64) - log_sum).tolist(), strict=True))
        return float(logits[id]) - log_sum, best

    def _shape(self, logits: Floats, history: Sequence[int]) -> Floats:
        """Bias, processor and penalties, applied to logits [n_vocab]."""
        p = self.params
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if p.logits_processor is not None:
            logits = self._process(p.logits_processor, logits, history)
        if p.penalises:
            recent = history[len(history) - self._n_recent(len(history)) :]
            penalise(logits, recent, p.repeat_penalty, p.presence_penalty, p.frequency_penalty)
        return logits

    def _process(self, f: LogitsProcessor, logits: Floats, history: Sequence[int]) -> Floats:
        result = f(list(history), logits)
        if result is None:
            return logits
        result = np.array(result, np.float32)  # a copy: the penalties edit it
        if result.shape != (self.n_vocab,):
            raise ArgumentError(
                f"logits_processor returned shape {result.shape}; expected ({self.n_vocab},)"
            )
        return result

    def _filter(self, ids: Ids, values: Floats) -> tuple[Ids, Floats]:
        """Filter the k largest: the ids that may be drawn and their logits, both [n], largest first."""
        p = self.params
        if values[-1] == -math.inf:
            values = values[values > -math.inf]
        if p.typical_p < 1:
            kept = typical(values, p.typical_p)
            ids, values = ids[kept], values[kept]
        if p.top_p < 1:
            values = values[: top_p(values, p.top_p)]
        if p.min_p > 0:
            values = values[: min_p(values, p.min_p)]
        return ids[: len(values)], values
