"""The activations of a pass, kept by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.completion import SMALLEST_CONTEXT
from ..engine.embedding import pack
from ..errors import ArgumentError
from ..models.state import Want
from ..models.step import Hook, Span
from .points import (
    SQUARE,
    Names,
    heads_of,
    kind_of,
    name_of,
    points,
    positions_of,
    select,
    select_one,
)

if TYPE_CHECKING:
    from ..models.network import Network
    from .patches import Positions

KEPT_TYPES = ("float32", "float16")
SPARE = 1 << 24, 1 << 29  # bytes of memory that is used again: the system takes long to give it


class Cache(Mapping[str, np.ndarray]):
    """Activations of one sequence by name; TransformerLens' names, and ("out", 3), are understood too.

    ``ids`` are the sequence's tokens, ``positions`` [n] those whose rows were kept, ``logits`` float32
    [len(ids), n_vocab]; None where the pass ended before them, and for encoders.
    """

    def __init__(
        self, net: Network, ids: list[int], positions: np.ndarray, arrays: dict[str, np.ndarray]
    ) -> None:
        self._net, self._arrays = net, arrays
        self.ids, self.positions = ids, positions
        self.logits: np.ndarray | None = None

    def __getitem__(self, name: str | tuple[str, int]) -> np.ndarray:
        if isinstance(name, str) and name in self._arrays:
            return self._arrays[name]
        ours = name_of(self._net, name)
        if ours not in self._arrays:
            raise KeyError(f"{ours} was not kept; add it to names")
        return self._arrays[ours]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        try:
            return self[name] is not None  # type: ignore[index]  # what is no name raises
        except (KeyError, ArgumentError, TypeError):
            return False

    def stack(self, kind: str) -> np.ndarray:
        """A point of all layers that have it, such as "out": [layers, ...]."""
        found = [n for n in select_one(self._net, kind) if n in self._arrays]
        if not found:
            raise KeyError(f"no {kind!r} was kept; add it to names")
        return np.stack([self._arrays[n] for n in found])

    def heads(self, name: str | tuple[str, int]) -> np.ndarray:
        """The rows of a point such as "q", "v" or "attn_heads", head by head: [T, H, D].

        Of attention's scores and probabilities D is S; a state has no rows, which is an ArgumentError.
        """
        x, ours = self[name], name_of(self._net, name)
        if kind_of(ours) == "state":
            raise ArgumentError(f"{ours} has no rows; its heads are cache[name]'s first axis")
        n = heads_of(self._net, ours)
        return x.swapaxes(0, 1) if kind_of(ours) in SQUARE else x.reshape(len(x), n, -1)

    def to_torch(self) -> dict[str, Any]:
        """The activations as torch tensors that share their memory; torch must be installed."""
        try:
            torch = import_module("torch")
        except ImportError:
            raise ArgumentError("torch is not installed: pip install torch") from None
        return {name: torch.from_numpy(x) for name, x in self._arrays.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all that was kept."""
        return sum(x.nbytes for x in self._arrays.values())

    def __repr__(self) -> str:
        return f"<tinyllm.research.Cache of {len(self)} activations, {self.nbytes / 1e6:.1f} MB>"


class Capture(Hook):
    """Keeps points of the sequences of a pass, chunk by chunk."""

    def __init__(self, net: Network, names: Sequence[str], dtype: str) -> None:
        self.names, self.known, self.dtype = frozenset(names), points(net), np.dtype(dtype)
        self.order = list(names)
        self.targets: list[Cache] = []
        self.spans: Sequence[Span] = ()
        self.turns: dict[str, int] = {}

    def new(self, net: Network, ids: list[int], positions: Positions) -> Cache:
        """An empty cache with room for a sequence's rows."""
        rows = positions_of(positions, len(ids))
        sizes: dict[int | str, int] = {"T": len(rows), "S": len(ids)}
        shapes = [
            [sizes[n] if n in sizes else int(n) for n in self.known[name].shape]
            for name in self.order
        ]
        counts = [prod(shape) for shape in shapes]
        memory = room_for(net, sum(counts) * self.dtype.itemsize).view(self.dtype)  # one piece
        ends = np.cumsum(counts)
        arrays = {}
        for name, shape, end, n in zip(self.order, shapes, ends, counts, strict=True):
            arrays[name] = memory[end - n : end].reshape(shape)
            if kind_of(name) in SQUARE:
                arrays[name].fill(0 if kind_of(name) == "attn_probs" else -np.inf)
        return Cache(net, ids, rows, arrays)

    def begin(self, spans: Sequence[Span]) -> None:
        self.spans, self.turns = spans, {}

    def keeps(self, name: str) -> bool:
        return name in self.names

    def room(self, name: str) -> Sequence[tuple[int, np.ndarray]] | None:
        if kind_of(name) in SQUARE or kind_of(name) == "state":
            return None
        found, first = [], 0
        for i, span in enumerate(self.spans):
            rows, _ = self.rows(i)
            if not isinstance(rows, slice):
                return None
            found.append((first, self.targets[i][name][rows]))
            first += span.n
        return found

    def kept(self, name: str, x: np.ndarray) -> None:
        kind, start = kind_of(name), 0
        if kind in SQUARE:
            turn = self.turns.get(name, 0)
            self.turns[name] = turn + 1
            rows, here = self.rows(turn)
            self.targets[turn][name][:, rows, : x.shape[2]] = x[:, here]
            return
        for i, span in enumerate(self.spans):
            if kind == "state":
                self.targets[i][name][...] = x[i]
                continue
            rows, here = self.rows(i)
            self.targets[i][name][rows] = x[start : start + span.n][here]
            start += span.n

    def rows(self, i: int) -> tuple[Any, Any]:
        """Which rows of sequence i's cache this pass fills, and with which of its own rows."""
        span, wanted = self.spans[i], self.targets[i].positions
        if np.array_equal(wanted, np.arange(span.length)):  # slices copy faster
            return slice(span.start, span.start + span.n), slice(None)
        rows = np.flatnonzero((wanted >= span.start) & (wanted < span.start + span.n))
        return rows, wanted[rows] - span.start


class Leased:
    """Memory whose views go back to a network's spare when nobody refers to them."""

    def __init__(self, memory: np.ndarray, spare: deque[np.ndarray]) -> None:
        self.memory, self.spare = memory, spare
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self.spare.append(self.memory)


def room_for(net: Network, n_bytes: int) -> np.ndarray:
    """Uninitialised bytes, from what an earlier cache of the network left if that is about as large."""
    least, most = SPARE
    if not least <= n_bytes <= most:
        return np.empty(n_bytes, np.uint8)
    try:
        memory = net.spare.pop()
    except IndexError:  # there is none, or another thread was faster
        memory = None
    if memory is None or not n_bytes <= memory.nbytes <= 2 * n_bytes:
        memory = np.empty(n_bytes, np.uint8)
    return np.asarray(Leased(memory, net.spare))[:n_bytes]


def run_with_cache(
    net: Network,
    sequences: Sequence[list[int]],
    names: Names,
    positions: Positions,
    dtype: str,
    stop_at_layer: int | None,
) -> list[Cache]:
    """Read sequences in as few passes as they fit into, and keep what is asked for of each."""
    if dtype not in KEPT_TYPES:
        raise ArgumentError(f"dtype={dtype!r:.40}; expected one of {', '.join(KEPT_TYPES)}")
    for ids in sequences:
        if not ids:
            raise ArgumentError("a prompt has no tokens; there is nothing to read")
    layers = None if stop_at_layer is None else layers_before(net, stop_at_layer)
    chosen = select(net, names)
    if layers is not None:
        there = reached(net, layers.stop)
        chosen = [n for n in chosen if n in there]
        if not chosen:
            raise ArgumentError(
                f"names={names!r:.60}; no such point comes before layer {layers.stop}"
            )
    capture = Capture(net, chosen, dtype)
    caches = [capture.new(net, ids, positions) for ids in sequences]
    for group in pack([len(ids) for ids in sequences], net.n_batch, net.rope_border):
        capture.targets = [caches[i] for i in group]
        here = [sequences[i] for i in group]
        if not net.config.causal:
            net.hidden(here, capture)
            continue
        for i, logits in zip(group, read(net, here, capture, layers), strict=True):
            caches[i].logits = logits
    return caches


def mean_of(caches: Sequence[Cache], name: str) -> np.ndarray:
    """The mean of a point over all rows of some caches; over the caches where a point has no rows."""
    found = [c[name] for c in caches]
    if kind_of(name) not in SQUARE | {"state"}:
        return np.asarray(np.concatenate(found).mean(0))
    if len({x.shape for x in found}) > 1:
        raise ArgumentError(
            f"{name} is as large as each prompt; give prompts of equally many tokens"
        )
    return np.asarray(np.mean(found, 0))


def read(
    net: Network, sequences: Sequence[list[int]], hook: Hook | None, layers: range | None = None
) -> list[np.ndarray | None]:
    """Logits of all rows of sequences that fit into a pass, or of one that may need several."""
    want: Want = "all" if layers is None else "none"
    states = []
    for ids in sequences:
        states.append(net.new_state(max(len(ids), SMALLEST_CONTEXT)))
        states[-1].append(ids)
    lengths = [len(ids) for ids in sequences]
    chunks = [lengths]
    if len(states) == 1:
        n, most = lengths[0], net.n_batch
        chunks = [[min(most, n - start)] for start in range(0, n, most)]
    found: list[list[np.ndarray]] = [[] for _ in states]
    for chunk in chunks:
        with net.lock:
            segments = [(s, n, want) for s, n in zip(states, chunk, strict=True)]
            rows = net.forward(segments, hook, layers=layers)
            for out, logits in zip(found, rows, strict=True):
                out.append(np.array(logits))
    if layers is not None:
        return [None] * len(states)
    return [out[0] if len(out) == 1 else np.concatenate(out) for out in found]


def layers_before(net: Network, stop: int) -> range:
    """The layers before ``stop``; negative numbers count from the last."""
    n = net.config.n_layer
    if not net.config.causal:
        raise ArgumentError("stop_at_layer: encoders are read to their end")
    whole = isinstance(stop, (int, np.integer)) and not isinstance(stop, bool)
    if not whole or not -n <= stop <= n:
        raise ArgumentError(f"stop_at_layer={stop!r:.40}; the model has layers 0 to {n - 1}")
    return range(int(stop) if stop >= 0 else n + int(stop))


def reached(net: Network, stop: int) -> set[str]:
    """The points that a pass reaches before layer ``stop``."""
    found = set()
    for name in points(net):
        if name.startswith("blk.") and int(name.split(".")[1]) >= stop:
            break
        if name.startswith(("output_norm", "logits")):
            break
        found.add(name)
    return found
