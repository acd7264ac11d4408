"""Many patched runs of one prompt in few passes: activations of a clean run put into a corrupted one.

Runs that patch the same layer share a pass. What lies below the layer, or before the position, is as in the
corrupted run: it is taken from there and not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from ..engine.completion import SMALLEST_CONTEXT
from ..engine.embedding import pack
from ..errors import ArgumentError
from ..models.step import hook_of
from .cache import Cache, read, run_with_cache
from .patches import Patch, Patches, patches_of, within
from .points import Names, heads_of, kind_of, layer_of, name_of, positions_of, select, select_one

if TYPE_CHECKING:
    from ..models.network import Network
    from ..models.state import State
    from .patches import Positions

Over = Literal["positions", "heads", "layers"]
Metric: TypeAlias = "Callable[[np.ndarray], float] | tuple[int, int]"


@dataclass(frozen=True)
class Grid:
    """What patches did: ``values`` [layers, positions or heads], the metric of each patched run.

    ``layers`` are the rows' numbers; ``clean`` and ``corrupted`` the metric of the two runs without patches.
    """

    kind: str
    over: Over
    layers: list[int]
    values: np.ndarray
    clean: float
    corrupted: float

    @property
    def restored(self) -> np.ndarray:
        """What part of the way from the corrupted to the clean run each patch goes: 0 nothing, 1 all.

        Raises ArgumentError if the metric is the same in both runs.
        """
        if self.clean == self.corrupted:
            raise ArgumentError(f"the metric is {self.clean:.6g} in both runs: nothing to restore")
        return np.asarray((self.values - self.corrupted) / (self.clean - self.corrupted))


@dataclass(frozen=True)
class Run:
    """One patched run: it starts before layer ``first`` at position ``start``."""

    patch: Patch
    first: int
    start: int
    place: tuple[int, int]


def patch_grid(
    net: Network,
    clean: list[int],
    corrupted: list[int],
    kind: str,
    metric: Metric,
    over: Over,
    positions: Positions,
) -> Grid:
    """``Model.patch_grid`` for prompts that are ids."""
    if len(clean) != len(corrupted):
        raise ArgumentError(
            f"clean has {len(clean)} tokens and corrupted {len(corrupted)}; patches need equally many"
        )
    if over not in get_args(Over):
        raise ArgumentError(f"over={over!r:.40}; expected one of {', '.join(get_args(Over))}")
    measure = measure_of(metric, net.n_vocab)
    names = points_of(net, kind)
    source = run_with_cache(net, [clean], [*names.values()], None, "float32", None)[0]
    stream = run_with_cache(net, [corrupted], ["embd", "out"], None, "float32", None)[0]
    assert source.logits is not None
    assert stream.logits is not None
    length, whole = len(clean), not resumes(net)
    chosen = positions_of(positions, length)
    if not len(chosen):
        raise ArgumentError(f"positions={positions!r:.60}; the prompts have {length} tokens")
    differs = np.flatnonzero(np.array(clean) != np.array(corrupted))
    same = (
        0 if whole else int(differs[0]) if len(differs) else length
    )  # tokens: patches change nothing
    runs, widths, unmoved = [], [], []
    for row, name in enumerate(names.values()):
        first = 0 if whole else layer_of(name) + (kind_of(name) in ("out", "embd"))
        parts: list[tuple[Positions, int | None, int]]
        if over == "positions":
            parts = [(int(p), None, int(p)) for p in chosen]
        elif over == "heads":
            parts = [(chosen.tolist(), h, int(chosen.min())) for h in range(heads_of(net, name))]
        else:
            parts = [(chosen.tolist(), None, int(chosen.min()))]
        widths.append(len(parts))
        for column, (where, head, start) in enumerate(parts):
            if (where if isinstance(where, int) else chosen.max()) < same:
                unmoved.append((row, column))
                continue
            patch = Patch(name, source[name], where, head)
            runs.append(Run(patch, first, 0 if whole else start, (row, column)))
    values = np.full((len(names), max(widths)), np.nan)
    as_it_is = measure(stream.logits[-1])
    for place in unmoved:
        values[place] = as_it_is
    for run, logits in patched_runs(net, corrupted, runs, stream):
        values[run.place] = measure(logits)
    return Grid(kind, over, list(names), values, measure(source.logits[-1]), as_it_is)


def patched_runs(
    net: Network, ids: list[int], runs: Sequence[Run], stream: Cache
) -> list[tuple[Run, np.ndarray]]:
    """Each run with the logits of its last row; those that start at one layer share passes."""
    state = net.new_state(max(len(ids), SMALLEST_CONTEXT))
    if any(run.start for run in runs):
        state.append(ids)
        read_all(net, state)
    n_layer, found = net.config.n_layer, []
    for first in sorted({run.first for run in runs}):
        here = [run for run in runs if run.first == first]
        lengths = [len(ids) - run.start for run in here]
        x = None if first == 0 else stream[f"blk.{first - 1}.out"]
        for group in pack(lengths, net.n_batch):
            some = [here[i] for i in group]
            states = [
                state.fork_first(run.start, state.n_ctx) if run.start else None for run in some
            ]
            forks = [s or net.new_state(state.n_ctx) for s in states]
            for fork, run in zip(forks, some, strict=True):
                fork.append(ids[run.start :])
            hook = Patches(net, [run.patch for run in some], range(len(some)))
            rows = None if x is None else np.concatenate([x[run.start :] for run in some])
            layers = None if first == 0 else range(first, n_layer)
            with net.lock:
                segments = [
                    (s, len(ids) - r.start, "last") for s, r in zip(forks, some, strict=True)
                ]
                logits = net.forward(segments, hook, layers=layers, x=rows)  # type: ignore[arg-type]
                found += [(r, np.array(last[-1])) for r, last in zip(some, logits, strict=True)]
    return found


def read_all(net: Network, state: State) -> None:
    """Compute what a state has not read yet."""
    while n := min(net.n_batch, len(state.ids) - state.n_past):
        net.forward([(state, n, "none")])


def points_of(net: Network, kind: str) -> dict[int, str]:
    """Each layer's point of a kind; "resid_pre" is the residual stream before the layer."""
    n = net.config.n_layer
    if kind in ("resid_pre", "hook_resid_pre"):
        return {i: f"blk.{i - 1}.out" if i else "embd" for i in range(n)}
    if not isinstance(kind, str):
        raise ArgumentError(f"point={kind!r:.40}; expected a text such as 'out'")
    names = [name for name in select_one(net, kind) if layer_of(name) >= 0]
    if not names:
        raise ArgumentError(f"{kind} is no point that layers have")
    return {layer_of(name): name for name in names}


def resumes(net: Network) -> bool:
    """Whether a pass may begin in the middle: layers hand on nothing but their rows, and states can be cut.

    Not within contexts that change activations: they would change once more what they have changed already.
    """
    d = net.decoder
    if hook_of(net.number, None) is not None:
        return False
    if d.streams is not None or not net.config.causal:
        return False
    own = all(b.mixer.source in (-1, i) for i, b in enumerate(d.blocks))
    return own and not any(b.carries or b.mixer.cache.arrays for b in d.blocks)


def measure_of(metric: Metric, n_vocab: int) -> Callable[[np.ndarray], float]:
    """A function of the last logits: the caller's own, or the difference of two tokens' logits."""
    if callable(metric):
        return lambda logits: number(metric(logits))
    a, b = metric
    if not 0 <= min(a, b) <= max(a, b) < n_vocab:
        raise ArgumentError(
            f"metric={metric!r:.60}; expected two token ids below {n_vocab}, or a function"
        )
    return lambda logits: float(logits[a]) - float(logits[b])


def number(x: object) -> float:
    """What a metric gave; ArgumentError unless it is a number."""
    try:
        return float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ArgumentError(f"the metric gave {x!r:.60}; expected a number") from None


def path_patch(
    net: Network,
    clean: list[int],
    corrupted: list[int],
    senders: Patch | Sequence[Patch],
    receivers: Names,
    freeze: Names,
) -> np.ndarray:
    """Logits [len(corrupted), n_vocab] of the corrupted run in which the receivers alone feel the senders.

    The first pass puts the clean run's values at the senders, and holds the points ``freeze`` at the
    corrupted run's; what the receivers then are is put into a second pass.
    """
    if len(clean) != len(corrupted):
        raise ArgumentError(
            f"clean has {len(clean)} tokens and corrupted {len(corrupted)}; patches need equally many"
        )
    held = select(net, freeze) if freeze else []
    senders = patches_of(senders)
    named = [name_of(net, p.name) for p in senders]
    source = run_with_cache(net, [clean], named, None, "float32", None)[0]
    still = run_with_cache(net, [corrupted], held or "embd", None, "float32", None)[0]
    first = [Patch(name, still[name]) for name in held]
    first += [
        Patch(name, source[name], p.positions, p.heads, p.channels)
        for name, p in zip(named, senders, strict=True)
    ]
    with within(net, Patches(net, first)):
        heard = run_with_cache(net, [corrupted], receivers, None, "float32", None)[0]
    with within(net, Patches(net, [Patch(name, x) for name, x in heard.items()])):
        logits = read(net, [corrupted], None)[0]
    assert logits is not None
    return logits
