"""Limits on one rendering of a chat template: steps, characters, and the weight of values."""

from __future__ import annotations

import threading
from collections.abc import Collection, ItemsView, KeysView, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_DEPTH = 64  # levels of lists and mappings inside a value
MAX_BITS = 4096  # a whole number may have so many
STEPS = 100_000  # a rendering may take so many, and more for a large input
OUTPUT_BASE = 1 << 20  # characters of output, beyond four for each of the input
NODE = 16  # each element of a list or mapping weighs as much as so many characters
REGEX_S = 0.5  # seconds for the regular expressions of one rendering: nothing else bounds them
PER_STEP = 64  # reading or making so many characters costs a step


class Stopped(SecurityError):
    """The template exceeded one of its limits."""


class Meter(threading.local):
    """What this thread's rendering may still use."""

    steps: int = STEPS
    emitted: int = 0
    cap: int = 1 << 20  # characters of the output, and of any one string
    limit: int = 1 << 20  # weight of any one value

    regex_s: float = REGEX_S

    def reset(self, size: int, weight: int) -> None:
        """Begin a rendering: allow what an input of `size` characters and of this weight may need."""
        self.cap, self.emitted = OUTPUT_BASE + 4 * size, 0
        self.regex_s = REGEX_S
        self.limit = self.cap + 2 * weight
        self.steps = STEPS + 4 * weight

    def tick(self, n: int = 1) -> bool:
        """Charge `n` steps; True, so that generated code may write it as a condition."""
        self.steps -= n
        if self.steps < 0:
            raise Stopped("it takes too many steps")
        return True

    def fits(self, n: int) -> None:
        """Refuse a string of more characters than one may have."""
        if n > self.cap:
            raise Stopped(f"it makes more than {self.cap} characters")

    def weigh(self, value: Any) -> int:
        """Charge for a value and return its weight; refuse one that is too heavy, too deep or too long."""
        if isinstance(value, str):
            self.fits(len(value))
            self.tick(len(value) // PER_STEP)
            return len(value)
        weight = weight_of(value, self.limit)
        if weight > self.limit:
            raise Stopped(f"it makes a value of more than {self.limit} characters")
        self.tick(weight // PER_STEP)
        return weight

    def made(self, value: Any) -> Any:
        """Charge for a value that the template made, and return it."""
        self.weigh(value)
        return value


def weight_of(value: Any, limit: int, node: int = NODE) -> int:
    """Characters of the strings in a value, plus `node` for each element; counting ends beyond `limit`."""
    total = 0
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack and total <= limit:
        item, depth = stack.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
            continue
        total += node
        if isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise Stopped(f"it makes a number of more than {MAX_BITS} bits")
        children = _children(item)
        if children is not None:
            if total + node * len(children) > limit:
                return limit + 1
            if depth >= MAX_DEPTH:
                raise Stopped(f"it nests a value deeper than {MAX_DEPTH}")
            stack.extend((child, depth + 1) for child in children)
    return total


def _children(item: Any) -> Collection[Any] | None:
    if isinstance(item, str):
        return None
    if isinstance(item, Namespace):
        item = item._Namespace__attrs
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        return item
    return None
