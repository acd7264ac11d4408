"""A loaded model as the rest of the program sees it: states in, logits or hidden rows out."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import system
from ..errors import ArgumentError, DeviceError, StateError, TinyLLMError, UnsupportedModel
from ..kernels.backend import Array, Backend, Batch, Cache, KVType, LayerCache, RopeSpec
from .adapters import Scales
from .ahead import RunAhead
from .archs import Arch
from .config import Config
from .decoder import Decoder
from .memory import allocating, cache_bytes, check_fits
from .reading import Source, batch_of
from .stages import Stage, caches_of, new_cache
from .state import Segment, State, check_vocabulary, fingerprint, scales_of, stacked
from .step import ACTIVE, Hook, Span, Step, Tap, hook_of

End = Callable[[Step, Array], Array]  # makes a step's result of the last activations

# Rows of a step: weights are read once for all of them. Encoders profit from more.
FEWEST_ROWS, MOST_ROWS, MOST_ENCODED = 64, 512, 1024
NUMBERS = itertools.count()
NETWORKS: weakref.WeakSet[Network] = weakref.WeakSet()


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
        reader: Network | None = None,
    ) -> None:
        # the stack of layers that reads a text before this one writes about it
        self.reader = reader
        self.config, self.arch, self.decoder, self.stages = config, arch, decoder, tuple(stages)
        self.kv_type: KVType = kv_type
        self.lock: threading.RLock = threading.RLock() if reader is None else reader.lock
        NETWORKS.add(self)
        self.kernels: tuple[str, ...] = ()  # the marks of those that replace ours
        self.number = next(NUMBERS)  # several networks may share a backend and its recorded steps
        self.fingerprint = fingerprint(config, kv_type)
        self.adapters = decoder.adapters
        self.closed = False
        # memory in which activations were kept and that nobody refers to; the next ones are kept there
        self.spare: deque[np.ndarray] = deque(maxlen=1)

        whole = len(stages) == 1
        # a step that nobody wants cannot be undone in recurrent layers
        recurrent = any(c.arrays for c in decoder.caches)
        alone = reader is None
        self.ahead = RunAhead(enabled=bool(self.be.picks) and whole and alone and not recurrent)
        ropes = [getattr(b.mixer, "rope", None) for b in decoder.blocks]
        two = any(getattr(r, "long", None) is not None for r in ropes)
        # contexts longer than this rotate by another table (LongRoPE); 0: all by one
        self.rope_border = config.rope_scaling.n_ctx_original if two else 0
        # may steps be recorded and replayed?
        self.repeats = alone and (whole or not any(b.carries for b in decoder.blocks))

    @property
    def be(self) -> Backend:
        """The backend that results come from: the last stage's."""
        return self.stages[-1].be

    @property
    def n_vocab(self) -> int:
        return int(self.decoder.n_vocab)

    def new_state(
        self, n_ctx: int, scales: Scales | None = None, source: Sequence[int] | None = None
    ) -> State:
        """An empty state with room for ``n_ctx`` tokens, whose steps use these scales of the adapters.

        ``source`` are the ids that a model with a ``reader`` reads before it writes.

        Raises
        ------
        ArgumentError
            There is no source for such a model, or one for another.
        DeviceError
            The full cache would not fit into the memory that is free now.
        """
        check_source(self, source)
        most = self.config.n_ctx_most
        if most and n_ctx > most:
            raise DeviceError(
                f"n_ctx={n_ctx}; this model attends to the best {most} positions, which no backend chooses: "
                f"it runs up to n_ctx={most}"
            )
        layers = self.decoder.caches
        cache = self.new_cache(layers, n_ctx)
        scales = self.adapters.scales if scales is None else scales
        own = "-".join(filter(None, (self.fingerprint, self.adapters.digest(scales))))
        state = State(cache, layers, self.ropes(n_ctx), n_ctx, own, self.lock, self.n_vocab, scales)
        state.can_shift = all(b.mixer.can_shift for b in self.decoder.blocks)
        if source is not None:
            ids = list(source)
            state.source = Source(ids, self.new_cache(self.decoder.source_caches, len(ids)))
        return state

    def new_cache(self, layers: Sequence[LayerCache], n_ctx: int) -> Cache:
        """Room for ``n_ctx`` positions of all layers; DeviceError if it would not fit when full."""
        advice = "Use a smaller n_ctx, or kv_type='q8_0'"
        for stage in self.stages:
            need = cache_bytes(stage.own(layers), n_ctx, self.kv_type)
            check_fits(stage.be, need, f"the keys and values of n_ctx={n_ctx}", advice)
        with self.lock, allocating(f"the keys and values of n_ctx={n_ctx}", advice):
            return new_cache(self.stages, layers, n_ctx, self.kv_type)

    def ropes(self, n_ctx: int) -> list[RopeSpec | None]:
        """Each layer's rotation in a state of this length."""
        ropes = (b.mixer.rope for b in self.decoder.blocks)
        return [None if r is None else r.at(n_ctx) for r in ropes]

    def forward(
        self,
        segments: Sequence[Segment],
        tap: Tap | None = None,
        best: int = 0,
        ahead: bool = False,
        layers: range | None = None,
        x: np.ndarray | None = None,
    ) -> list[Any]:
        """Compute the next tokens of several states in one pass.

        Parameters
        ----------
        segments : sequence of (state, n, want)
            How many of each state's tokens to compute, and the rows whose logits are wanted: "all", the
            "last" or "none".
        tap : callable, optional
            Sees, and may replace, the activations.
        best : int
            0, or one of ``be.picks``: find this many of each row's largest logits on the device.
        ahead : bool
            With ``best=1``: each sequence is expected to go on with its largest logit. The next step may begin
            at once, and is used if that comes true.
        layers : range, optional
            Run only these. The states then hold keys and values of these layers only.
        x : float32 [T, E], optional
            Where the first layers are left out: what the layer before made of the rows.

        Returns
        -------
        list
            Each segment's logits, float32 [rows wanted, n_vocab], or with ``best`` a list of ``Best``. They are
            valid until the next step: hold ``lock`` while using them, or copy.
        """
        for s, _, _ in segments:
            self.check_own(s)
            s.check_whole()
        hook = hook_of(self.number, tap) if tap is not None or ACTIVE.get() else None
        try:
            with self.lock:
                start = time.perf_counter()
                self.read_sources(segments)
                if hook is not None:
                    for s, _, _ in segments:
                        s.altered = True
                    wanted = zip(segments, n_wanted(segments), strict=True)
                    hook.begin([Span(s.n_past, n, len(s.ids), m) for (s, n, _), m in wanted])
                rows: Any = None
                if self.ahead.enabled:
                    rows = self.ahead.step(self, segments, best == 1 and hook is None, ahead)
                if rows is None:
                    n_ctx = max([s.n_ctx for s, _, _ in segments])
                    batch = self.make_batch(segments)
                    batch = batch if x is None else replace(batch, ids=x)
                    rows = self.compute(batch, n_ctx, hook, best, layers)
                self.pace(sum([n for _, n, _ in segments]), time.perf_counter() - start)
            for s, n, _ in segments:
                s.n_past += n
        except BaseException:  # Ctrl-C, or an error in a tap
            for s, _, _ in segments:
                s.spoil()
            raise
        return split(rows, segments)

    def check_own(self, state: State) -> None:
        """Raise StateError for a state of another model: kernels write to its memory by address."""
        if state.lock is not self.lock:
            raise StateError(
                "the state belongs to another model, or to another loading of this one; "
                "make one with new_state, and restore what the other has saved"
            )

    def read_sources(self, segments: Sequence[Segment]) -> None:
        """Read what these states write about, where no step has done it yet."""
        if self.reader is None:
            return
        for state, _, _ in segments:
            source = state.source
            if source is None or source.stored:
                continue
            n, scales = len(source.ids), stacked([state.scales])
            batch = Batch.of([source.ids], [0], range(n), [source.cache], scales)
            self.reader.run(batch, n, None, self.stored)
            source.stored = True

    def stored(self, step: Step, x: Array) -> Array:
        """Store what the layers keep of a source; x [S, E] is what the reader's layers make of it."""
        assert self.reader is not None
        return self.decoder.store(step, self.reader.decoder.hidden(step, x))

    def make_batch(self, segments: Sequence[Segment]) -> Batch:
        """The rows of a step over these segments."""
        batch = self.make_rows(segments)
        if self.reader is None:
            return batch
        sources = [s.source for s, _, _ in segments if s.source is not None]
        return replace(batch, source=batch_of(sources, [n for _, n, _ in segments]))

    def make_rows(self, segments: Sequence[Segment]) -> Batch:
        """A batch of what the segments themselves hold."""
        past, caches = [s.n_past for s, _, _ in segments], [s.cache for s, _, _ in segments]
        scales = scales_of(segments)
        if all(n == 1 and want != "none" for _, n, want in segments):
            rows = [s.ids[s.n_past] for s, _, _ in segments]
            self.check_ids([rows])
            return Batch.next(rows, past, caches, scales)
        ids = [s.ids[s.n_past : s.n_past + n] for s, n, _ in segments]
        self.check_ids(ids)
        return Batch.of(ids, past, output_rows(segments), caches, scales)

    def compute(
        self,
        batch: Batch,
        n_ctx: int,
        hook: Hook | None,
        best: int,
        layers: range | None = None,
    ) -> Any:
        """Run a step and fetch its logits float32 [n_out, n_vocab], or with ``best`` a list of ``Best``."""
        if not batch.n_out:
            self.run(batch, n_ctx, hook, self.decoder.body, layers=layers)
            return np.empty((0, self.n_vocab), np.float32)
        y = self.run(batch, n_ctx, hook, self.decoder.logits, best=best, layers=layers)
        return self.be.picked(y) if best else self.be.numpy(y)

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

        ``types`` gives each token's segment, for models that tell the halves of a pair apart. Of a model with a
        ``reader`` they are the reader's.
        """
        if self.reader is not None:
            return self.reader.hidden(ids, tap, types)
        self.check_ids(ids)
        lengths = [len(i) for i in ids]
        caches = []
        if self.config.causal:
            caches = [self.new_state(n).cache for n in lengths]
        scales = stacked([self.adapters.scales] * len(ids))
        batch = Batch.of(ids, [0] * len(ids), range(sum(lengths)), caches, scales)
        hook = hook_of(self.number, tap) if tap is not None or ACTIVE.get() else None
        with self.lock:
            start = time.perf_counter()
            if hook is not None:
                hook.begin([Span(0, n, n, n) for n in lengths])
            y = self.run(batch, max(lengths), hook, self.decoder.hidden, self.token_types(types))
            y = np.array(self.be.numpy(y))
            self.pace(batch.n_rows, time.perf_counter() - start)
        ends = itertools.accumulate(lengths)
        return [y[end - n : end] for n, end in zip(lengths, ends, strict=True)]

    def lens(self, x: np.ndarray) -> np.ndarray:
        """Logits of rows x [T, E] of the residual stream, by the last norm and the head -> float32 [T, V]."""
        if self.decoder.streams is not None:
            raise UnsupportedModel(
                f"{self.arch.name}'s residual stream is several: no row has a logit"
            )
        n, behind = len(x), range(self.config.n_layer, self.config.n_layer)
        scales = stacked([self.adapters.scales])
        batch = Batch.of([[0] * n], [0], range(n), scales=scales)
        batch = replace(batch, ids=np.asarray(x, np.float32))
        with self.lock:
            return np.array(self.compute(batch, n, None, 0, behind))

    def token_types(self, types: Sequence[Sequence[int]] | None) -> np.ndarray | None:
        """The token types of all rows, int32 [T]; None where the model knows but one type."""
        known = self.decoder.token_types
        if types is None or known is None or known.shape[0] < 2:
            return None
        return np.concatenate([np.asarray(t, np.int32) for t in types])

    def run(
        self,
        batch: Batch,
        n_ctx: int,
        hook: Hook | None,
        end: End,
        types: np.ndarray | None = None,
        best: int = 0,
        after: Any = None,
        layers: range | None = None,
    ) -> Any:
        """Run a step through every stage -> ``end``'s result, on the last stage's device.

        Between two stages, activations pass through the host. With ``after``, the result of the step that
        has just begun, the ids are those that it finds (``Backend.follow``).
        """
        if self.closed:
            raise TinyLLMError("the model is closed")
        carried: dict[str, np.ndarray] = {}
        for i, stage in enumerate(self.stages):
            step = Step(stage.be, batch, n_ctx, hook, layers=layers)
            if types is not None and i == 0:
                step = replace(step, types=stage.be.array(types))
            step.carried.update((name, stage.be.array(x)) for name, x in carried.items())
            y = self.step(i, step, end, best, after)
            if step.kept:
                step.hand_over()
            if i + 1 < len(self.stages):
                carried = {name: np.array(stage.be.numpy(x)) for name, x in step.carried.items()}
                batch = replace(batch, ids=stage.be.numpy(y))
        return y

    def step(self, i: int, step: Step, end: End, best: int, after: Any = None) -> Any:
        """Run one stage's part of a step; a step like an earlier one is replayed."""
        stage, d, first, here = self.stages[i], self.decoder, 0, self.stages[i].layers
        if step.layers is not None:
            first, stop = step.layers.start, step.layers.stop
            here = range(max(here.start, first), min(here.stop, stop))
        batch = caches_of(step.batch, i) if len(self.stages) > 1 else step.batch

        def compute(b: Batch) -> Any:
            now = replace(step, batch=b)
            self.adapters.begin(stage.be, b.scales)
            x = d.embed(now) if i == 0 and first == 0 else b.ids
            if i == 0 and first > 0:
                x = now.tap(f"blk.{first - 1}.out", x)
            x = d.through(now, x, here)
            if i + 1 < len(self.stages):
                return x
            y = end(now, x)
            return stage.be.pick(y, best) if best else y

        plain = step.hook is None and step.types is None and step.layers is None and self.repeats
        key = (self.number, i, end.__name__, best, self.rope_class(step.n_ctx))
        if after is not None:
            return stage.be.follow(after, key, compute, batch)
        return stage.be.step(key if plain else None, compute, batch)

    def rope_class(self, n_ctx: int) -> bool:
        """Whether the context is a long one: LongRoPE rotates those by another table, so that steps differ."""
        return 0 < self.rope_border < n_ctx

    def check_ids(self, ids: Sequence[Sequence[int]]) -> None:
        """Raise ArgumentError for ids that are not rows of the embedding."""
        for sequence in ids:
            check_vocabulary(sequence, self.n_vocab)

    def close(self) -> None:
        """Free the weights and what was computed ahead."""
        with self.lock:
            self.closed = True
            self.ahead.pending.clear()
            self.spare = deque(maxlen=0)  # what somebody still looks at comes back to the old one
            for stage in self.stages:
                stage.be.close()
            if self.reader is not None:
                self.reader.close()


def unlock() -> None:
    """Free all locks in a forked child, where the threads that held them do not exist."""
    for network in list(NETWORKS):
        network.lock._at_fork_reinit()  # type: ignore[attr-defined]  # the standard library calls it, too


system.after_fork(unlock)


def check_source(net: Network, source: Sequence[int] | None) -> None:
    """ArgumentError unless a state begins with a source where the model reads one, and else without."""
    if source is None and net.reader is not None:
        raise ArgumentError(
            f"{net.arch.name} writes about a text that it has read before: use generate, whose prompt is that "
            "text, or new_state(source=...)"
        )
    if source is not None and net.reader is None:
        raise ArgumentError(
            f"{net.arch.name} has no layers that only read: leave source out, and give its text as prompt"
        )
    if source is not None and not len(source):
        raise ArgumentError("source is empty; expected the ids of a text, one at least")
    net.check_ids([] if source is None else [source])


def n_wanted(segments: Sequence[Segment]) -> list[int]:
    """How many rows of logits each segment wants."""
    return [n if want == "all" else 1 if want == "last" else 0 for _, n, want in segments]


def output_rows(segments: Sequence[Segment]) -> list[int]:
    """The rows of the batch whose logits are wanted: the last ones of each segment."""
    ends = itertools.accumulate([n for _, n, _ in segments])
    wanted = zip(ends, n_wanted(segments), strict=True)
    return [row for end, n in wanted for row in range(end - n, end)]


def split(rows: Any, segments: Sequence[Segment]) -> list[Any]:
    """Each segment's part of the rows that were wanted."""
    counts = n_wanted(segments)
    ends = itertools.accumulate(counts)
    return [rows[end - n : end] for n, end in zip(counts, ends, strict=True)]
