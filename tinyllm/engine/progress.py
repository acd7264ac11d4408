"""Progress bars on a terminal. Elsewhere none is shown, and tqdm, which is slow to import, is not loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
LONG_PROMPT = 256  # tokens from which reading a prompt shows a bar


def checking(tensors: Iterable[T]) -> Iterable[T]:
    """Show a bar while the weights of these tensors are checked."""
    return bar(tensors, "checking", "tensor")


def loading(layers: Iterable[T], total: int) -> Iterable[T]:
    """Show a bar while these layers are loaded, once that has taken a second."""
    return bar(layers, "loading", "layer", total)


def bar(items: Iterable[T], doing: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Count the items on the terminal as they are taken."""
    if sys.stderr is None or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, doing, total, leave=False, delay=1.0, unit=unit)


@contextmanager
def reading(n_tokens: int) -> Iterator[Callable[[int], None] | None]:
    """Show a bar while long prompts are read. Yields what to call with each step's number of tokens."""
    if n_tokens < LONG_PROMPT:
        yield None
        return
    from tqdm import tqdm

    def update(n: int) -> None:
        shown.update(n)
        if shown.n >= n_tokens:
            shown.close()

    with tqdm(
        total=n_tokens, desc="reading", leave=False, unit="token", delay=1.0, disable=None
    ) as shown:
        yield update
