"""Where the time of steps goes: how long each launch of a kernel took, what it read and what it multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Numbers = Literal["int8", "float", ""]  # what is multiplied: the limit that holds for it


@dataclass(frozen=True)
class Work:
    """What a launch has to do at least: bytes read and written once each, multiply-adds.

    ``stored`` are the bytes among them that come from memory: weights, keys and values. The others were just
    written, and lie in caches. Of a stack of experts as many matrices count as can have been chosen. ``kind``
    is the format of the weights; "" where there are none.
    """

    nbytes: int = 0
    stored: int = 0
    macs: int = 0
    numbers: Numbers = ""
    kind: str = ""


@dataclass(frozen=True)
class Launch:
    """One kernel's run over all its pieces."""

    kernel: str
    seconds: float
    work: Work


class Profile:
    """The launches since it was last asked, in their order; a backend adds them while it is profiled."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Callable[[], float], Work]] = []

    def add(self, kernel: str, seconds: Callable[[], float], work: Work) -> None:
        """Note a launch; ``seconds`` is called later and may wait for the device."""
        self._found.append((kernel, seconds, work))

    def take(self) -> list[Launch]:
        """What was launched since the last call."""
        found, self._found = self._found, []
        return [Launch(kernel, seconds(), work) for kernel, seconds, work in found]


def attention_work(
    tokens: list[int],
    past: list[int],
    causal: bool,
    window: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    kv_bytes: float,
) -> Work:
    """What attention must do for sequences of so many new tokens after so many stored ones.

    ``heads`` are those of queries and of keys, ``dims`` the values of a key and of a value, ``kv_bytes`` the
    bytes of one stored number.
    """
    pairs = positions = 0
    window = abs(window)  # below 0 they are chunks: no more than that
    for n, p in zip(tokens, past, strict=True):
        if not causal:
            pairs, positions = pairs + n * n, positions + n
            continue
        seen = range(p + 1, p + n + 1)
        pairs += sum(min(s, window) if window else s for s in seen)
        positions += min(p + n, window + n - 1) if window else p + n
    width = sum(dims)
    own = 4 * sum(tokens) * heads[0] * width  # queries and outputs
    stored = int(positions * heads[1] * width * kv_bytes)
    return Work(own + stored, stored, pairs * heads[0] * width, "float")
