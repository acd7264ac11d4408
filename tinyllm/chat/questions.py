"""Questions with a fixed set of answers: how a model is asked one, and what its choice of a letter means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..tokenizers import Tokenizer

MOST_QUESTIONS, MOST_CHOICES, MOST_LEVELS = 400, 255, 10
KINDS = {
    "predicate": {"instructions", "name", "criteria"},
    "choice": {"instructions", "name", "choices"},
    "score": {"instructions", "name", "levels"},
}
LISTS = {"choice": ("choices", "value", MOST_CHOICES), "score": ("levels", "label", MOST_LEVELS)}


@dataclass(frozen=True)
class Question:
    """One question; ``options`` are what may be answered, each a value and perhaps its description."""

    type: str
    instructions: str
    options: tuple[tuple[Any, str | None], ...]
    name: str | None = None

    def text(self, labels: Sequence[str]) -> str:
        """What the model is asked."""
        first = (
            f"Is this true? {self.instructions}" if self.type == "predicate" else self.instructions
        )
        lines = [first]
        for label, (value, description) in zip(labels, self.options, strict=False):
            shown = (
                {True: "Yes", False: "No"}.get(value, value) if isinstance(value, bool) else value
            )
            lines.append(f"{label}. {shown}" + (f": {description}" if description else ""))
        return "\n".join([*lines, "Answer with the letter of one option, and nothing else."])

    def answer(self, p: np.ndarray) -> dict[str, Any]:
        """What probabilities of the options [n], which sum to 1, say."""
        values = [value for value, _ in self.options]
        shares = [float(x) for x in p]
        named = {"type": self.type, "name": self.name}
        if self.type == "predicate":
            return {**named, "probability": shares[0]}
        if self.type == "choice":
            both = [{"value": v, "probability": x} for v, x in zip(values, shares, strict=True)]
            chosen = values[int(np.argmax(p))]
            return {**named, "choice": chosen, "confidence": certainty(p), "probabilities": both}
        levels = [
            {"value": i, "label": v, "probability": x}
            for i, (v, x) in enumerate(zip(values, shares, strict=True))
        ]
        score = float(np.arange(len(p)) @ p)
        return {**named, "score": score, "confidence": nearness(p), "probabilities": levels}


def certainty(p: np.ndarray) -> float:
    """0 where all options are equally likely, 1 where one is certain."""
    return float((p.max() * len(p) - 1) / (len(p) - 1))


def nearness(p: np.ndarray) -> float:
    """0 where levels are equally likely, or likely far apart; 1 where one is certain.

    It is 1 - the mean distance from the median level over that of equally likely levels.
    """
    levels = np.arange(len(p))
    median = int(np.searchsorted(np.cumsum(p), 0.5))
    flat = len(p) ** 2 // 4 / len(p)
    return max(0.0, 1 - float(np.abs(levels - min(median, len(p) - 1)) @ p) / flat)


def questions_of(given: Any) -> list[Question]:
    """Questions as a caller gives them.

    Raises
    ------
    ArgumentError
        One of them is malformed; the message names its number and the field.
    """
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise ArgumentError(f"questions is {given!r:.40}; expected a list of mappings")
    if not 1 <= len(given) <= MOST_QUESTIONS:
        raise ArgumentError(f"{len(given)} questions; expected 1 to {MOST_QUESTIONS}")
    return [_question(q, f"questions[{i}]") for i, q in enumerate(given)]


def _question(q: Any, at: str) -> Question:
    kind = q.get("type") if isinstance(q, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        expected = ", ".join(map(repr, KINDS))
        raise ArgumentError(
            f"{at} is {q!r:.60}; expected a mapping whose type is one of {expected}"
        )
    if unknown := set(q) - KINDS[kind] - {"type"}:
        raise ArgumentError(
            f"{at}.{min(map(str, unknown))} is unknown; a {kind} has {', '.join(sorted(KINDS[kind]))}"
        )
    instructions, name = q.get("instructions"), q.get("name")
    if not isinstance(instructions, str) or not instructions.strip():
        raise ArgumentError(f"{at}.instructions is {instructions!r:.40}; expected a text")
    if name is not None and not isinstance(name, str):
        raise ArgumentError(f"{at}.name is {name!r:.40}; expected a text")
    return Question(kind, instructions, _options(kind, q, at), name)


def _options(kind: str, q: Mapping[str, Any], at: str) -> tuple[tuple[Any, str | None], ...]:
    if kind == "predicate":
        said = q.get("criteria") or {}
        if not isinstance(said, Mapping) or set(said) - {"true", "false"}:
            raise ArgumentError(
                f"{at}.criteria is {said!r:.40}; expected descriptions of true and false"
            )
        return ((True, said.get("true")), (False, said.get("false")))
    field, key, most = LISTS[kind]
    given = q.get(field)
    if not isinstance(given, Sequence) or isinstance(given, str) or not 2 <= len(given) <= most:
        raise ArgumentError(f"{at}.{field} is {given!r:.40}; expected a list of 2 to {most}")
    found = [_option(o, key, f"{at}.{field}[{i}]", kind) for i, o in enumerate(given)]
    distinct = {(type(value), value) for value, _ in found}
    if len(distinct) < len(found):
        raise ArgumentError(f"{at}.{field}: each {key} may be given once")
    return tuple(found)


def _option(o: Any, key: str, at: str, kind: str) -> tuple[Any, str | None]:
    if not isinstance(o, Mapping):
        o = {key: o}
    value, description = o.get(key), o.get("description")
    if set(o) - {key, "description"} or not (description is None or isinstance(description, str)):
        raise ArgumentError(f"{at} is {o!r:.60}; expected {key} and perhaps a description")
    if not (isinstance(value, str) and value) and not (
        kind == "choice" and isinstance(value, bool)
    ):
        raise ArgumentError(f"{at}.{key} is {value!r:.40}; expected a text")
    return value, description


def labels_of(tokenizer: Tokenizer, n: int) -> tuple[list[str], list[list[int]]]:
    """Names for n options that the vocabulary tells apart by one token: A, B, ..., then pairs of letters.

    Returns
    -------
    labels, ids
        The names, and for each the tokens that spell it, with and without a space before it.

    Raises
    ------
    ArgumentError
        The vocabulary has not so many.
    """
    labels: list[str] = []
    ids: list[list[int]] = []
    for letters in (*product(ascii_uppercase), *product(ascii_uppercase, repeat=2)):
        label = "".join(letters)
        spelled = spellings(tokenizer, label)
        if spelled:
            labels.append(label)
            ids.append(spelled)
        if len(labels) == n:
            return labels, ids
    raise ArgumentError(
        f"{n} options; this vocabulary tells {len(labels)} apart by one token: ask in groups"
    )


def spellings(tokenizer: Tokenizer, label: str) -> list[int]:
    """The tokens that are a label, with and without a space before it."""
    found = set()
    for text in (label, f" {label}", f"\n{label}"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        if ids and tokenizer.decode(ids[-1:]).strip() == label:
            found.add(ids[-1])
    return sorted(found)
