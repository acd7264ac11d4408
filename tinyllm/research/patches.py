"""Values put in the place of others while a model runs, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..errors import ArgumentError
from ..models.step import ACTIVE, Hook, Span
from .points import BEHIND, SQUARE, floats, heads_of, kind_of, name_of, points, positions_of

if TYPE_CHECKING:
    from ..models.network import Network

Function: TypeAlias = Callable[[np.ndarray], "np.ndarray | None"]
Positions: TypeAlias = "int | slice | Sequence[int] | None"


@dataclass(frozen=True)
class Patch:
    """What takes the place of an activation, or of a part of it.

    Parameters
    ----------
    name : str, or (str, int)
        A point, by our name or TransformerLens', or as ("out", 3).
    value : array, number or callable
        An array of the whole activation, as a cache has it, of which the part below is taken; or anything that
        broadcasts to the part: a number, one row; or a function of the part, which returns its replacement, or
        changes it in place and returns None.
    positions : int, slice or sequence of int, optional
        Only these positions of each sequence; negative ones count from the end of what the sequence holds.
        Those that it does not have are left out: while a text is written, they may come.
    heads : int or sequence of int, optional
        Only these heads, at points that have some.
    channels : int or sequence of int, optional
        Only these values of each row, such as single neurons of "ffn_act".
    """

    name: str | tuple[str, int]
    value: Any
    positions: Positions = None
    heads: int | Sequence[int] | None = None
    channels: int | Sequence[int] | None = None


class Resolved:
    """A patch whose point is known: it changes the rows of one sequence at a time."""

    def __init__(self, net: Network, patch: Patch) -> None:
        self.name = name_of(net, patch.name)
        self.kind, shape = kind_of(self.name), points(net)[self.name].shape
        self.positions = patch.positions
        self.value = patch.value
        if not callable(self.value):
            self.value = floats(self.value, f"a patch of {self.name}")
        self.heads = self.channels = None
        self.n_head = 0
        if patch.heads is not None:
            self.n_head = heads_of(net, self.name)
            self.heads = indices(patch.heads, self.n_head, "heads")
        if patch.channels is not None:
            if self.kind in SQUARE:
                raise ArgumentError(f"{self.name} has positions for channels; use a function")
            self.channels = indices(patch.channels, int(shape[-1]), "channels")
        if self.kind == "state" and self.positions is not None:
            raise ArgumentError(f"{self.name} is after the last row; leave positions out")

    def apply(self, x: np.ndarray, span: Span) -> None:
        """Change the values x of one sequence's rows in their place."""
        if self.kind == "state":
            rows = np.zeros(1, np.int64)
        else:
            wanted = positions_of(self.positions, span.length, inside=False)
            rows = wanted[(wanted >= span.start) & (wanted < span.start + span.n)]
        if not len(rows):
            return
        view, axes = x, {0: rows - (0 if self.kind == "state" else span.start)}
        if self.kind in SQUARE:
            axes = {1: axes[0]} | ({} if self.heads is None else {0: self.heads})
        elif self.heads is not None:
            if self.kind not in ("attn_result", "state"):
                view = x.reshape(len(x), self.n_head, -1)
            axes[1] = self.heads
        if self.channels is not None:
            axes[view.ndim - 1] = self.channels
        index = np.ix_(*(axes.get(a, np.arange(n)) for a, n in enumerate(view.shape)))
        if callable(self.value):
            part = view[index]
            result = self.value(part)
            result = part if result is None else result  # it may have changed what it was given
        else:
            result = self.part(x, view, index, rows)
        try:
            view[index] = result
        except ValueError:
            shapes = f"{np.shape(result)}; expected {view[index].shape}"
            raise ArgumentError(f"a patch of {self.name} has values of shape {shapes}") from None

    def part(
        self, x: np.ndarray, view: np.ndarray, index: tuple[np.ndarray, ...], rows: np.ndarray
    ) -> np.ndarray:
        """The part of an array of the whole activation; other arrays as they are."""
        value = self.value
        if self.kind in SQUARE:
            return self.square(value, view, index, rows)
        if self.kind == "state":
            return np.asarray(value)
        if value.shape == x.shape[1:]:  # one row, such as a mean, for all
            value = value[None]
        if value.ndim != x.ndim or value.shape[1:] != x.shape[1:]:
            return np.asarray(value)
        if len(value) == 1:
            rows = np.zeros_like(rows)
        if rows.max() >= len(value):
            raise ArgumentError(
                f"a patch of {self.name} has {len(value)} rows; position {rows.max()} is asked for"
            )
        whole = value.reshape(len(value), *view.shape[1:])
        picked = (rows.reshape(index[0].shape), *index[1:])
        return np.asarray(whole[picked])

    def square(
        self, value: np.ndarray, x: np.ndarray, index: tuple[np.ndarray, ...], rows: np.ndarray
    ) -> np.ndarray:
        """The part of scores or probabilities [H, T, T] of a whole sequence; other arrays as they are."""
        if value.ndim != 3 or value.shape[1] != value.shape[2] or len(value) != len(x):
            return np.asarray(value)
        seen = max(int(rows.max()) + 1, x.shape[2])
        if seen > value.shape[2]:
            raise ArgumentError(
                f"a patch of {self.name} has {value.shape[2]} positions; {seen} are asked for"
            )
        return np.asarray(value[index[0], rows[:, None], index[2]])


def patches_of(given: Patch | Iterable[Patch]) -> list[Patch]:
    """One patch or several as a list; ArgumentError for anything else."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = [given]  # what is no Patch is told below
    found = list(given)
    for patch in found:
        if not isinstance(patch, Patch):
            raise ArgumentError(f"{patch!r:.60} is no Patch; expected Patch(name, value)")
    return found


def indices(given: int | Sequence[int], n: int, what: str) -> np.ndarray:
    """Heads or channels as an array; ArgumentError for one that is not there."""
    try:
        found = np.atleast_1d(np.asarray(given))
    except ValueError:  # a ragged list
        found = np.empty((0, 0))
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ArgumentError(f"{what}={given!r:.60}; expected whole numbers")
    if len(found) and not -n <= found.min() <= found.max() < n:
        raise ArgumentError(f"{what}={given!r:.60}; there are {n}")
    return found % n


class Patches(Hook):
    """Patches of all sequences of a pass; of only one of them, by its number, where ``only`` says so."""

    def __init__(
        self, net: Network, patches: Sequence[Patch], only: Sequence[int] | None = None
    ) -> None:
        self.by_name: dict[str, list[tuple[Resolved, int]]] = {}
        numbers = [-1] * len(patches) if only is None else only
        for patch, number in zip(patches, numbers, strict=True):
            resolved = Resolved(net, patch)
            self.by_name.setdefault(resolved.name, []).append((resolved, number))
        self.spans: Sequence[Span] = ()
        self.turns: dict[str, int] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        self.spans, self.turns = spans, {}

    def replaces(self, name: str) -> bool:
        return name in self.by_name

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        kind = kind_of(name)
        if kind in SQUARE:
            turn = self.turns.get(name, 0)
            self.turns[name] = turn + 1
            self.change(name, turn, x, self.spans[turn])
            return x
        start = 0
        for i, whole in enumerate(self.spans):
            span = whole.behind if kind in BEHIND else whole
            n = 1 if kind == "state" else span.n
            self.change(name, i, x[start : start + n], span)
            start += n
        return x

    def change(self, name: str, i: int, x: np.ndarray, span: Span) -> None:
        """Apply the patches of a point to the rows of sequence i."""
        for patch, number in self.by_name[name]:
            if number in (-1, i):
                patch.apply(x, span)


@contextmanager
def within(net: Network, hook: Hook) -> Iterator[None]:
    """The hook looks into all passes of the network that this thread, or task, makes within."""
    token = ACTIVE.set((*ACTIVE.get(), (net.number, hook)))
    try:
        yield
    finally:
        ACTIVE.reset(token)


def steering(
    net: Network,
    vectors: Mapping[int | str, Any],
    positions: Positions = None,
    scale: float = 1.0,
) -> list[Patch]:
    """Patches that add vectors [E], times ``scale``, to the residual stream after layers, or at points."""
    if not isinstance(vectors, Mapping):
        raise ArgumentError(
            f"vectors is a {type(vectors).__name__}; expected a mapping of layers, or points, to vectors"
        )
    found = []
    for where, vector in vectors.items():
        name = where if isinstance(where, str) else ("out", where)
        added = floats(vector, f"the vector for {where}") * floats(scale, "scale")
        width = points(net)[name_of(net, name)].shape[-1]
        if added.shape != (width,):
            raise ArgumentError(
                f"the vector for {where} has shape {added.shape}; expected ({width},)"
            )
        if not np.isfinite(added).all():
            raise ArgumentError(
                f"the vector for {where} has a NaN or an infinity, or its scale has"
            )
        found.append(Patch(name, Adding(added), positions))
    return found


class Adding:
    """x + vector."""

    def __init__(self, vector: np.ndarray) -> None:
        self.vector = vector

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x + self.vector)
