"""Steps of decoding that begin before the host knows their ids: the device has just chosen them.

While the host makes a token of one step's logits, the device already computes the next step, on the ids of the
largest logits. If the sequences do go on with those, the result is nearly there; if they do not, it is dropped,
and an ordinary step writes over the keys and values that it stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..errors import DeviceError
from ..kernels.backend import Batch, Best
from .state import Segment, State, scales_of

if TYPE_CHECKING:
    from .network import Network

UNKNOWN = -1  # several logits were the largest; which id the device went on with is not known


@dataclass(eq=False)
class PendingStep:
    """A step that has begun, with one row of results for each of several states.

    ``result`` lies on the device, ``rows`` waits for it, ``n_step`` is its number there. It serves states whose
    ``ids`` are these very ``sequences`` (a restored state has another list), whose first ``past`` tokens are
    stored, and which go on with ``next_ids``. No reference to a state is kept: a state may end at any time.
    """

    result: Any
    rows: Callable[[], list[Best]]
    n_step: int
    sequences: list[list[int]] = field(default_factory=list)
    past: list[int] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)

    def serves(self, segments: Sequence[Segment]) -> bool:
        """Whether this is the step that computes these segments."""
        if len(segments) != len(self.sequences):
            return False
        expected = zip(self.sequences, self.past, self.next_ids, strict=True)
        return all(
            n == 1 and want != "none" and s.ids is ids and s.n_past == past and ids[past] == next_id
            for (s, n, want), (ids, past, next_id) in zip(segments, expected, strict=True)
        )


class RunAhead:
    """The steps of one network that were begun early. All methods are called under the network's lock.

    Each state has at most one pending step, which several states may share. Any step of a state takes its
    pending one away, so none can be used for a sequence that has changed since.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.pending: WeakKeyDictionary[State, PendingStep] = WeakKeyDictionary()

    def step(
        self, net: Network, segments: Sequence[Segment], greedy: bool, go_on: bool
    ) -> list[Best] | None:
        """Find the largest logit after each segment, and begin the next step if the sequences ``go_on``.

        Returns None for an ordinary step: not ``greedy``, or neither begun early nor to be followed by one.
        """
        now = self.take_pending(segments)
        if not greedy:
            return None
        if now is None:
            if not go_on or any(want != "last" for _, _, want in segments):
                return None
            now = begin(net, net.make_batch(segments), n_ctx_of(segments))
        then = start_next(net, now, segments) if go_on else None
        return self.finish_pending(net, now, then, segments)

    def take_pending(self, segments: Sequence[Segment]) -> PendingStep | None:
        """The step that was begun for these segments, if there is one; afterwards their states have none."""
        found = [self.pending.pop(s, None) for s, _, _ in segments]
        first = found[0]
        if first is None or any(p is not first for p in found) or not first.serves(segments):
            return None
        return first

    def finish_pending(
        self, net: Network, now: PendingStep, then: PendingStep | None, segments: Sequence[Segment]
    ) -> list[Best]:
        """Wait for a step's results; the step behind it, if any, becomes the states' pending one."""
        rows = now.rows()
        if net.be.n_steps != now.n_step and any(not len(row.ids) for row in rows):
            # too many equals for the device's list, and a later step has overwritten the logits
            return list(net.compute(net.make_batch(segments), n_ctx_of(segments), None, best=1))
        if then is not None:
            then.next_ids = [row.ids.item() if len(row.ids) == 1 else UNKNOWN for row in rows]
            for s, _, _ in segments:
                self.pending[s] = then
        return rows


def begin(net: Network, batch: Batch, n_ctx: int, after: Any = None) -> PendingStep:
    """Start a step; with ``after``, the result of the step before it, on the ids found there."""
    result = net.run(batch, n_ctx, None, net.decoder.logits, best=1, after=after)
    return PendingStep(result, net.be.picked_later(result), net.be.n_steps)


def start_next(net: Network, now: PendingStep, segments: Sequence[Segment]) -> PendingStep | None:
    """Start the step behind one that has just begun, on the ids that the device chooses, if it can be."""
    past = [s.n_past + n for s, n, _ in segments]
    full = any(p == s.n_ctx for p, (s, _, _) in zip(past, segments, strict=True))
    # after another step of the backend, the device no longer has the ids
    if full or net.be.n_steps != now.n_step:
        return None
    caches, scales = [s.cache for s, _, _ in segments], scales_of(segments)
    batch = Batch.next([0] * len(past), past, caches, scales)
    try:
        then = begin(net, batch, n_ctx_of(segments), now.result)
    except DeviceError:  # too little memory: reported if the step is really needed
        return None
    then.sequences, then.past = [s.ids for s, _, _ in segments], past
    return then


def n_ctx_of(segments: Sequence[Segment]) -> int:
    """The longest context among the states of a step."""
    return max([s.n_ctx for s, _, _ in segments])
