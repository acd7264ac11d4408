"""References that are read anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tinyllm import Model


@contextmanager
def afresh(m: Model) -> Iterator[Model]:
    """The model, which keeps nothing of texts and finds nothing meanwhile."""
    before, m.prefix_bytes = m.prefix_bytes, 0
    yield m
    m.prefix_bytes = before
