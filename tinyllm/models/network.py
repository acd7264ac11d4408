"""A loaded model as the rest of the program sees it: states in, logits or hidden rows out."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..errors import DeviceError, UnsupportedModel
from ..kernels.backend import Array, Backend, Batch, KVType, RopeSpec
from ..kernels.backend import Best as Best
from .ahead import Flight, landed
from .archs import Arch
from .config import Config
from .decoder import Decoder
from .memory import allocating, cache_bytes, check_fits
from .stages import Stage, caches_of, new_cache
from .state import State, fingerprint
from .step import Step, Tap

Want = Literal["all", "last", "none"]
Segment = tuple[
    State, int, Want
]  # this many of the state's pending tokens; rows whose logits are wanted
FEWEST_ROWS, MOST_ROWS = 64, 512  # of a step: weights are read once for all of them
MOST_ENCODED = 1024  # of an encoder's
UNKNOWN = -1  # which of several equals the device took for the largest
NUMBERS = itertools.count()
NETWORKS: weakref.WeakSet[Network] = weakref.WeakSet()


End = Callable[[Step, Array], Array]  # what is made of the last activations


class Network:
    """Weights on their devices. Immutable; many states may be computed, each step under ``lock``."""

    n_batch = 256  # rows of a step; about a second's work once one has been timed

    def __init__(
        self,
        config: Config,
        arch: Arch,
        decoder: Decoder,
        stages: Sequence[Stage],
        kv_type: KVType,
    ) -> None:
        self.config, self.arch, self.decoder, self.stages = config, arch, decoder, tuple(stages)
        self.kv_type: KVType = kv_type
        self.lock = threading.RLock()
        NETWORKS.add(self)
        self.number = next(NUMBERS)  # several networks may share a backend and its recorded steps
        self.fingerprint = fingerprint(config, kv_type)

        carried = any(getattr(b.mixer, "carries", False) for b in decoder.blocks)
        recurrent = any(c.arrays for c in decoder.caches)
        # may a step be begun that nobody may want?
        self.follows = bool(self.be.picks) and len(stages) == 1 and not recurrent
        self.repeats = not carried or len(stages) == 1  # may steps be recorded and replayed?

    @property
    def be(self) -> Backend:
        """The backend that results come from: the last stage's."""
        return self.stages[-1].be

    @property
    def n_vocab(self) -> int:
        return int(self.decoder.n_vocab)

    def new_state(self, n_ctx: int) -> State:
        """An empty state with room for ``n_ctx`` tokens.

        Raises
        ------
        DeviceError
            The full cache would not fit into the memory that is free now.
        """
        layers = self.decoder.caches
        advice = "Use a smaller n_ctx, or kv_type='q8_0'"
        for stage in self.stages:
            need = cache_bytes(stage.own(layers), n_ctx, self.kv_type)
            check_fits(stage.be, need, f"the keys and values of n_ctx={n_ctx}", advice)
        with self.lock, allocating(f"the keys and values of n_ctx={n_ctx}", advice):
            cache = new_cache(self.stages, layers, n_ctx, self.kv_type)
        state = State(cache, layers, self.ropes(n_ctx), n_ctx, self.fingerprint, self.lock)
        state.can_shift = all(getattr(b.mixer, "can_shift", True) for b in self.decoder.blocks)
        return state

    def ropes(self, n_ctx: int) -> list[RopeSpec | None]:
        """Each layer's rotation in a state of this length."""
        ropes = (getattr(b.mixer, "rope", None) for b in self.decoder.blocks)
        return [None if r is None else r.at(n_ctx) for r in ropes]

    def forward(
        self,
        segments: Sequence[Segment],
        tap: Tap | None = None,
        best: int = 0,
        ahead: bool = False,
    ) -> list[Any]:
        """Compute pending tokens of several states in one pass.

        Returns each segment's logits, float32 [rows wanted, n_vocab], valid until the next step: hold ``lock``
        while using them, or copy. With ``best``, one of ``be.picks``, a list of ``Best`` instead: of
        so many of each row's largest. With ``best=1`` and ``ahead``, each sequence is expected to go on with
        its largest: the next step may begin at once, and is used if that comes true.
        """
        for s, _, _ in segments:
            s.check_whole()
        try:
            with self.lock:
                start = time.perf_counter()
                rows, counts = self.results(segments, tap, best, ahead)
                self.pace(sum([n for _, n, _ in segments]), time.perf_counter() - start)
            for s, n, _ in segments:
                s.n_past += n
        except BaseException:  # Ctrl-C, or an error in a tap
            for s, _, _ in segments:
                s.spoil()
            raise
        ends = itertools.accumulate(counts)
        return [rows[end - n : end] for n, end in zip(counts, ends, strict=True)]

    def lay(self, segments: Sequence[Segment]) -> tuple[Batch, list[int]]:
        """The rows of a step, and of how many of them each segment wants logits."""
        past, caches = [s.n_past for s, _, _ in segments], [s.cache for s, _, _ in segments]
        if all(n == 1 and want != "none" for _, n, want in segments):
            rows = [s.ids[s.n_past] for s, _, _ in segments]
            self.check_ids([rows])
            return Batch.next(rows, past, caches), [1] * len(rows)
        ids = [s.ids[s.n_past : s.n_past + n] for s, n, _ in segments]
        self.check_ids(ids)
        outputs, counts = output_rows(segments)
        return Batch.of(ids, past, outputs, caches), counts

    def results(
        self, segments: Sequence[Segment], tap: Tap | None, best: int, ahead: bool
    ) -> tuple[Any, list[int]]:
        """The rows of logits that are wanted, or the best of each, and how many belong to each segment."""
        n_ctx = max([s.n_ctx for s, _, _ in segments])
        flight = landed(segments) if self.follows else None
        greedy = best == 1 and tap is None
        if flight is None or not greedy:
            batch, counts = self.lay(segments)
            if not (ahead and greedy and self.follows and batch.n_out == len(segments)):
                return self.brought(batch, n_ctx, tap, best), counts
            flight = self.launch([s for s, _, _ in segments], batch, n_ctx)
        return self.fly(segments, n_ctx, flight, ahead), [1] * len(segments)

    def brought(self, batch: Batch, n_ctx: int, tap: Tap | None, best: int) -> Any:
        """A step's results on the host."""
        if not batch.n_out:
            self.run(batch, n_ctx, tap, self.decoder.body)
            return np.empty((0, self.n_vocab), np.float32)
        y = self.run(batch, n_ctx, tap, self.decoder.logits, best=best)
        return self.be.picked(y) if best else self.be.numpy(y)

    def fly(self, segments: Sequence[Segment], n_ctx: int, now: Flight, ahead: bool) -> list[Best]:
        """The largest logit of each row, when the step behind has begun if that may be."""
        then = self.launch_behind(now, segments, n_ctx) if ahead else None
        rows = now.rows()
        if self.be.n_steps != now.n_step and any(not len(row.ids) for row in rows):
            batch, _ = self.lay(segments)  # once more: its logits are gone
            return list(self.brought(batch, n_ctx, None, best=1))
        if then is not None:
            then.ids = [row.ids.item() if len(row.ids) == 1 else UNKNOWN for row in rows]
            for s, _, _ in segments:
                s.flight = then
        return rows

    def launch(
        self, states: Sequence[State], batch: Batch, n_ctx: int, after: Any = None
    ) -> Flight:
        """Begin a step."""
        y = self.run(batch, n_ctx, None, self.decoder.logits, best=1, after=after)
        later, n_step = self.be.picked_later(y), self.be.n_steps
        return Flight(y, later, n_step, [id(s) for s in states], batch.n_past.tolist(), [])

    def launch_behind(
        self, flight: Flight, segments: Sequence[Segment], n_ctx: int
    ) -> Flight | None:
        """Begin the step behind one that has just been begun, on the ids that the device chooses."""
        states, past = [s for s, _, _ in segments], [s.n_past + n for s, n, _ in segments]
        full = any(p == s.n_ctx for p, s in zip(past, states, strict=True))
        if full or self.be.n_steps != flight.n_step:  # another thread's step has its place by now
            return None
        batch = Batch.next([0] * len(past), past, [s.cache for s in states])
        try:
            return self.launch(states, batch, n_ctx, flight.result)
        except DeviceError:  # too little memory, which is told when the step's turn comes
            return None

    def pace(self, n_rows: int, seconds: float) -> None:
        """Choose the rows of the next steps so that each takes a second: Ctrl-C waits for one at most."""
        if n_rows >= FEWEST_ROWS:
            most = MOST_ROWS if self.config.causal else MOST_ENCODED
            self.n_batch = int(min(max(n_rows / seconds, FEWEST_ROWS), most)) // 8 * 8

    def hidden(
        self,
        ids: Sequence[Sequence[int]],
        tap: Tap | None = None,
        types: Sequence[Sequence[int]] | None = None,
    ) -> list[np.ndarray]:
        """Normalised activations of every row of independent sequences -> float32 [len, n_embd] each.

        ``types`` gives each token's segment, for models that tell the halves of a pair apart.
        """
        self.check_ids(ids)
        lengths = [len(i) for i in ids]
        caches = []
        if self.config.causal:
            caches = [self.new_state(n).cache for n in lengths]
        batch = Batch.of(ids, [0] * len(ids), range(sum(lengths)), caches)
        with self.lock:
            start = time.perf_counter()
            y = self.run(batch, max(lengths), tap, self.decoder.hidden, self.segments(types))
            y = np.array(self.be.numpy(y))
            self.pace(batch.n_rows, time.perf_counter() - start)
        ends = itertools.accumulate(lengths)
        return [y[end - n : end] for n, end in zip(lengths, ends, strict=True)]

    def segments(self, types: Sequence[Sequence[int]] | None) -> np.ndarray | None:
        """All rows' token types; None where the model has but one."""
        known = self.decoder.token_types
        if types is None or known is None or known.shape[0] < 2:
            return None
        return np.concatenate([np.asarray(t, np.int32) for t in types])

    def run(
        self,
        batch: Batch,
        n_ctx: int,
        tap: Tap | None,
        end: End,
        types: np.ndarray | None = None,
        best: int = 0,
        after: Any = None,
    ) -> Any:
        """One pass: a step of each stage's backend. Between two, activations cross by way of the host."""
        carried: dict[str, np.ndarray] = {}
        for i, stage in enumerate(self.stages):
            step = Step(stage.be, batch, n_ctx, tap)
            if types is not None and i == 0:
                step = replace(step, types=stage.be.array(types))
            step.carried.update((name, stage.be.array(x)) for name, x in carried.items())
            y = self.step(i, step, end, best, after)
            if i + 1 < len(self.stages):
                carried = {name: np.array(stage.be.numpy(x)) for name, x in step.carried.items()}
                batch = replace(batch, ids=stage.be.numpy(y))
        return y

    def step(self, i: int, step: Step, end: End, best: int, after: Any = None) -> Any:
        """Stage i; it may be replayed when nothing but the batch's values differ."""
        stage, d = self.stages[i], self.decoder
        batch = caches_of(step.batch, i) if len(self.stages) > 1 else step.batch

        def compute(b: Batch) -> Any:
            now = replace(step, batch=b)
            x = d.embed(now) if i == 0 else b.ids
            x = d.through(now, x, stage.layers)
            if i + 1 < len(self.stages):
                return x
            y = end(now, x)
            return stage.be.pick(y, best) if best else y

        plain = step.user_tap is None and step.types is None and self.repeats
        key = (self.number, i, end.__name__, best, self.rope_class(step.n_ctx), batch.key)
        if after is not None:
            return stage.be.follow(after, key, compute, batch)
        return stage.be.step(key if plain else None, compute, batch)

    def rope_class(self, n_ctx: int) -> bool:
        """LongRoPE rotates long contexts by another table."""
        return n_ctx > self.config.rope_scaling.n_ctx_original

    def check_ids(self, ids: Sequence[Sequence[int]]) -> None:
        """Ids outside of the vocabulary would read outside of the embedding."""
        for sequence in ids:
            if len(sequence) and not 0 <= min(sequence) <= max(sequence) < self.n_vocab:
                raise UnsupportedModel(
                    f"token ids {min(sequence)} to {max(sequence)} do not fit the vocabulary of {self.n_vocab}"
                )

    def close(self) -> None:
        with self.lock:
            for stage in self.stages:
                stage.be.close()


def unlock() -> None:
    """In a forked child, the thread that held a lock does not exist."""
    for network in list(NETWORKS):
        network.lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=unlock)


def output_rows(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The batch's rows whose logits are wanted, and how many of them belong to each segment."""
    rows: list[int] = []
    counts: list[int] = []
    start = 0
    for _, n, want in segments:
        first = {"all": 0, "last": n - 1, "none": n}[want]
        rows += range(start + first, start + n)
        counts.append(n - first)
        start += n
    return rows, counts
