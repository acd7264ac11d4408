"""What a step works on: the new tokens of some sequences, and what is stored of those before them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any  # a backend's own array; has .shape
Pairing = Literal["adjacent", "half"]
KVType = Literal["f32", "f16", "q8_0"]
SLACK = 2048  # positions kept behind a window, so that so many tokens can be taken back


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of the past.

    ``head_dim`` and ``head_dim_v`` are 0 for a layer without attention; ``arrays`` names the float32
    arrays, zero at first, that a recurrent layer carries from one token to the next. ``window`` is how many
    positions attention looks back at, its own included; 0: all.
    """

    n_head_kv: int = 0
    head_dim: int = 0
    head_dim_v: int = 0
    arrays: tuple[tuple[str, tuple[int, ...]], ...] = ()
    window: int = 0

    def n_held(self, n_ctx: int) -> int:
        """Positions that are kept at most, about, when ``n_ctx`` have been read."""
        return min(n_ctx, self.window + SLACK + 512) if self.window else n_ctx


@dataclass(frozen=True)
class RopeSpec:
    """How rotary embedding turns the values of one head; ``Backend.rope`` defines the pairs."""

    freqs: Array  # [n_pairs] float32, radians per position
    pairing: Pairing
    first: int = 0  # the first value of a head that turns
    scale: float = 1.0  # multiplies cos and sin


class Cache(ABC):
    """The stored past of one sequence, for all layers. Memory is taken as it fills."""

    n_ctx: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are held now, those shared with other sequences included."""

    @abstractmethod
    def held(self) -> dict[int, int]:
        """Bytes of each page that is held now, by a number that sharing caches have in common."""

    @abstractmethod
    def fork(self, n_ctx: int) -> Cache:
        """Another cache, of ``n_ctx`` positions' room, with the same past as far as it has room.

        What is stored is shared until one of the two writes.
        """

    @abstractmethod
    def truncate(self, n: int) -> None:
        """Give back what only positions from ``n`` on need."""

    @abstractmethod
    def holds(self, n: int) -> bool:
        """Whether all is still stored that position ``n`` looks at; layers with a window drop the rest."""

    @abstractmethod
    def holds_all(self, n: int) -> bool:
        """Whether the first ``n`` positions are still stored for every layer."""

    @abstractmethod
    def shift(
        self, layer: int, keep: int, discard: int, n_past: int, rope: RopeSpec | None
    ) -> None:
        """Drop positions [keep, keep + discard) of a layer and move the later ones down.

        With ``rope``, moved keys are turned back by ``discard`` positions, so that they are as if written
        at their new place.
        """

    @abstractmethod
    def export(self, n_past: int) -> dict[str, np.ndarray]:
        """The first ``n_past`` positions (and recurrent arrays) as host arrays, exactly as stored.

        Positions that a layer has dropped behind its window are zeros.

        Keys are ``"{layer}.k"`` [n_past, K, D], ``"{layer}.v"`` and ``"{layer}.{array}"``; a backend that
        stores in another order converts. float16 caches give float16; q8_0 ones a uint8 of blocks.
        """

    @abstractmethod
    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Put back what ``export`` gave; StateError if names, shapes or types are others.

        Positions behind a layer's window may have been dropped: they are not stored.
        """


@dataclass(frozen=True)
class Batch:
    """The rows of one step: one or more sequences, each a run of consecutive rows.

    The decoder makes its arrays on the host; ``Backend.step`` hands ``fn`` a Batch whose arrays are on the
    device. Row t of sequence s stands at position ``positions[t] = n_past[s] + t - starts[s]``.
    """

    ids: (
        Array  # [T] int32; or float32 [T, E], the output of the layers that another device computed
    )
    positions: Array  # [T] int32
    starts: Array  # [n_seq + 1] int32: sequence s has the rows starts[s]:starts[s + 1]
    n_past: Array  # [n_seq] int32: positions stored before this step
    outputs: Array  # [n_out] int32: rows whose result is wanted
    # one Cache of the backend's own kind for each sequence; () when nothing is kept (encoders)
    caches: tuple[Any, ...]
    n_rows: int
    n_seq: int
    n_out: int
    # [T, n] float32: each row's scale of each adapter; None: no row has any
    scales: Array | None = field(default=None, kw_only=True)
    # where rows attend to a text that was read before: T sequences of one row, at that text's last position
    source: Batch | None = field(default=None, kw_only=True)

    @staticmethod
    def next(
        ids: Sequence[int],
        n_past: Sequence[int],
        caches: Sequence[Cache],
        scales: np.ndarray | None = None,
    ) -> Batch:
        """Make the batch of a decoding step: one row for each sequence, all results wanted.

        ``scales`` [n_seq, n] are those of the adapters in each sequence.
        """
        n = len(ids)
        count = counting(n + 1)
        past = np.array(n_past, np.int32)
        return Batch(
            np.array(ids, np.int32),
            past,
            count,
            past,
            count[:n],
            tuple(caches),
            n,
            n,
            n,
            scales=scales,
        )

    @staticmethod
    def of(
        ids: Sequence[Sequence[int]],
        n_past: Sequence[int],
        outputs: Sequence[int],
        caches: Sequence[Cache] = (),
        scales: np.ndarray | None = None,
    ) -> Batch:
        """Lay the sequences' new ids row by row; ``scales`` [n_seq, n] are those of the adapters."""
        lengths = [len(i) for i in ids]
        starts = np.array([0, *accumulate(lengths)], np.int32)
        runs = [np.arange(p, p + n, dtype=np.int32) for p, n in zip(n_past, lengths, strict=True)]
        flat = [np.asarray(i, np.int32) for i in ids]
        return Batch(
            flat[0] if len(flat) == 1 else np.concatenate(flat),
            runs[0] if len(runs) == 1 else np.concatenate(runs),
            starts,
            np.asarray(n_past, np.int32),
            np.asarray(outputs, np.int32),
            tuple(caches),
            int(starts[-1]),
            len(ids),
            len(outputs),
            scales=None if scales is None else np.repeat(scales, lengths, axis=0),
        )


@cache
def counting(n: int) -> np.ndarray:
    """0, 1, ... n - 1, read only."""
    numbers = np.arange(n, dtype=np.int32)
    numbers.flags.writeable = False
    return numbers
