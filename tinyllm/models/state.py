"""A conversation: the tokens so far, and what the layers keep of those already computed."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from .. import system
from ..errors import ArgumentError, StateError
from ..files import checked, replacing

if TYPE_CHECKING:
    from threading import RLock

    from ..kernels.backend import Cache, KVType, LayerCache, RopeSpec
    from .config import Config
    from .reading import Source

HEADER = 4096  # bytes before the numbers of an array in a saved state, at most


TAKING = threading.Lock()  # held for the moment in which a state changes hands


class User(Protocol):
    """Who goes on with a state."""

    @property
    def going_on(self) -> bool:
        """Whether it may still add tokens."""


class _Call:
    """A call that uses a state until it returns."""

    going_on = True


class State:
    """One sequence of tokens and its cache; made by ``Model.new_state``.

    ``ids`` is the whole sequence; the first ``n_past`` of them are stored in the cache, the others are
    computed by the next step. A model may serve many states; a state serves one caller at a time. ``lock`` is
    the model's: what works on the cache waits for other callers' steps.
    """

    def __init__(
        self,
        cache: Cache,
        layers: Sequence[LayerCache],
        ropes: Sequence[RopeSpec | None],
        n_ctx: int,
        fingerprint: str,
        lock: RLock,
        n_vocab: int,
        scales: tuple[float, ...] = (),
    ) -> None:
        self.scales = scales  # for the model's adapters, in every step of this sequence
        self.n_vocab = n_vocab
        self.cache, self.layers, self.ropes, self.lock = cache, layers, ropes, lock
        self.n_ctx, self.fingerprint = n_ctx, fingerprint
        self.can_shift = True  # may stored keys be turned to other positions?
        self.source: Source | None = (
            None  # the text that was read before, where another stack reads
        )
        self.ids: list[int] = []
        self.n_past = 0
        self.spoilt = False  # did a step end in its middle? Then recurrent layers are lost
        self.altered = False  # did a tap or a patch see, and perhaps change, what was stored?
        self._user: weakref.ref[User] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now, those shared with forks included."""
        return self.cache.nbytes + (0 if self.source is None else self.source.cache.nbytes)

    @property
    def can_truncate(self) -> bool:
        """Whether tokens can be taken back: the summary that recurrent layers keep cannot be unwound."""
        return not any(layer.arrays for layer in self.layers)

    def fork(self) -> State:
        """Another state with the same tokens; what is stored of them is shared until one of the two writes."""
        return self.fork_first(len(self.ids), self.n_ctx)

    def fork_first(self, n: int, n_ctx: int) -> State:
        """A fork with the first ``n`` tokens and room for ``n_ctx``, which rotates as this state does."""
        self.check_whole()
        with self.lock:
            other = self.copy(n_ctx)
            other.truncate(n)
        return other

    def copy(self, n_ctx: int) -> State:
        """``fork``, also of a state that lost what its recurrent layers had summed up."""
        with self.lock:
            other = State(
                self.cache.fork(n_ctx), self.layers, self.ropes, n_ctx, self.fingerprint, self.lock,
                self.n_vocab, self.scales,
            )  # fmt: skip
        other.source, other.can_shift = self.source, self.can_shift
        other.ids, other.n_past = list(self.ids), self.n_past
        other.spoilt, other.altered = self.spoilt, self.altered
        return other

    def become(self, copy: State) -> None:
        """Be what a ``copy`` of this state is, which nobody uses any more."""
        self.cache, self.ids, self.n_past = copy.cache, copy.ids, copy.n_past
        self.spoilt, self.altered = copy.spoilt, copy.altered

    def can_go_on(self, n: int) -> bool:
        """Whether what is stored of the first ``n`` tokens is all that the next one needs."""
        if not self.can_truncate:
            return n == self.n_past and not self.spoilt
        return n <= self.n_past and self.cache.holds(n)

    def check_free(self) -> None:
        """Raise StateError while a text or a call goes on with this state."""
        user = None if self._user is None else self._user()
        if user is not None and user.going_on:
            raise StateError(
                "the state is in use: another text goes on with it; let that end, close it, or use a fork"
            )

    def take(self, user: User) -> None:
        """Give the state to one user, until it goes on no longer; StateError while another has it."""
        with TAKING:  # not the model's lock, which may be held for a whole step
            self.check_free()
            self._user = weakref.ref(user)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the state for the length of a block."""
        call = _Call()
        self.take(call)
        try:
            yield
        finally:
            call.going_on = False

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens to the sequence; they are computed by the next step.

        ArgumentError for what are no ids of the vocabulary; StateError while a text goes on with the state, as
        by all methods that change it.
        """
        self.check_free()
        self.ids.extend(self._checked(ids))

    def _checked(self, ids: Sequence[int]) -> list[int]:
        found = ids_of(ids)
        check_vocabulary(found, self.n_vocab)
        return found

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` tokens.

        Layers with a window drop what lies far behind it. After a cut so deep that they would need it again,
        the next step computes all tokens anew.

        Raises
        ------
        StateError
            The state is recurrent and some of the dropped tokens are already part of it; or a text goes on
            with the state.
        ArgumentError
            There are not so many tokens.
        """
        self.check_free()
        self.cut_back(n)

    def cut_back(self, n: int) -> None:
        """``truncate``, for the text that goes on with the state."""
        if not _whole(n) or not 0 <= n <= len(self.ids):
            raise ArgumentError(f"cannot keep {n!r:.40} tokens of {len(self.ids)}")
        if n < self.n_past and n > 0 and not self.can_truncate:
            raise StateError("a recurrent state cannot be cut back; start a new one")
        if n == 0 and not self.can_truncate:
            with self.lock:
                self.cache.restore({k: np.zeros_like(v) for k, v in self.cache.export(0).items()})
            self.spoilt = False
        del self.ids[n:]
        self._cut(min(self.n_past, n))

    def _cut(self, n: int) -> None:
        """Keep what is stored of the first ``n`` tokens, or nothing if windows have dropped what it needs."""
        with self.lock:
            self.n_past = n if self.cache.holds(n) else 0
            self.cache.truncate(self.n_past)

    def reuse(self, ids: Sequence[int]) -> int:
        """Become the sequence ``ids``, keeping what is stored of their common beginning.

        At least the last token is left to compute. Returns how many stored tokens were kept.
        """
        self.check_free()
        ids = ids if isinstance(ids, list) else ids_of(ids)
        kept = self.n_common(ids)
        rest = self._checked(ids[kept:])
        self.cut_back(kept)
        self.ids.extend(rest)
        return kept

    def n_common(self, ids: Sequence[int]) -> int:
        """How many stored tokens ``reuse`` of these ids would keep; nothing changes."""
        same = 0
        limit = min(self.n_past, len(ids) - 1)
        while same < limit and self.ids[same] == ids[same]:
            same += 1
        if not self.can_truncate and (same < self.n_past or self.spoilt):
            return 0
        return same if self.cache.holds(same) else 0

    def shift(self, keep: int, discard: int) -> None:
        """Drop ``discard`` tokens after the first ``keep``; later keys are rotated to their new positions.

        Where layers have dropped the tokens behind their window, the next step computes all that are left anew.
        """
        self.check_free()
        self.drop(keep, discard)

    def drop(self, keep: int, discard: int) -> None:
        """``shift``, for the text that goes on with the state."""
        if not self.can_truncate:
            raise StateError("a recurrent state has no context to shift")
        if not self.can_shift:
            raise StateError("keys normalised behind their rotation cannot be turned; start anew")
        whole = _whole(keep) and _whole(discard)
        if not whole or keep < 0 or discard < 1 or keep + discard > self.n_past:
            raise ArgumentError(
                f"cannot drop {discard!r:.40} tokens after {keep!r:.40}: {self.n_past} are stored"
            )
        with self.lock:
            if not self.cache.holds_all(self.n_past):
                del self.ids[keep : keep + discard]
                self._cut(0)
                return
            for i, (layer, rope) in enumerate(zip(self.layers, self.ropes, strict=True)):
                if layer.n_head_kv:
                    self.cache.shift(i, keep, discard, self.n_past, rope)
            del self.ids[keep : keep + discard]
            self._cut(self.n_past - discard)

    def spoil(self) -> None:
        """Note that a step did not end. Keys and values will be written again; recurrent sums are lost."""
        self.spoilt = self.spoilt or not self.can_truncate

    def check_whole(self) -> None:
        """Raise StateError if the state lost what its recurrent layers had summed up."""
        if self.spoilt:
            raise StateError(
                "a step of this recurrent state was interrupted; truncate(0) and read its text again"
            )

    def check_no_source(self) -> None:
        """Raise StateError if the state writes about a text that another stack of layers has read."""
        if self.source is not None:
            raise StateError(
                "the state writes about a text that a file has no place for; keep the prompt, and read it anew"
            )

    def save(self, path: str | Path) -> None:
        """Write tokens and cache to a ``.npz`` file (no pickle), atomically.

        StateError while a text goes on with the state.
        """
        self.check_whole()
        self.check_no_source()
        with self.taken(), self.lock:
            n_past, ids = self.n_past, np.asarray(self.ids, np.int32)
            arrays = {f"cache.{k}": v for k, v in self.cache.export(n_past).items()}
        with replacing(path) as f:
            np.savez(
                f, fingerprint=np.array(self.fingerprint), ids=ids,
                n_past=np.int64(n_past), **arrays,  # type: ignore[arg-type]
            )  # fmt: skip

    def restore(self, path: str | Path) -> None:
        """Become the state that ``save`` wrote.

        Raises
        ------
        StateError
            The file is damaged, of another model, or longer than this state has room for; or a text goes on
            with the state.
        """
        self.check_free()
        self.check_no_source()
        file = system.expanded(checked(path))
        try:
            with file.open("rb") as raw, np.load(raw, allow_pickle=False) as f:
                sizes = {e.filename.removesuffix(".npy"): e.file_size for e in f.zip.infolist()}
                small = ("fingerprint", "ids", "n_past")
                if any(sizes[name] > 4 * self.n_ctx + HEADER for name in small):
                    raise ValueError(f"longer than the {self.n_ctx} tokens of this state")
                fingerprint, ids, n_past = str(f["fingerprint"]), f["ids"], int(f["n_past"])
                if (
                    ids.dtype != np.int32
                    or ids.ndim != 1
                    or not 0 <= n_past <= len(ids) <= self.n_ctx
                ):
                    raise ValueError(f"{ids.shape} tokens, {n_past} stored; room for {self.n_ctx}")
                check_vocabulary(ids.tolist(), self.n_vocab)
                if fingerprint != self.fingerprint:
                    raise ValueError(f"saved with another model or cache type ({fingerprint:.80})")
                with self.lock:
                    expected = {f"cache.{k}": a for k, a in self.cache.export(n_past).items()}
                for name, size in sizes.items():  # before anything is unpacked
                    if name not in small and size > expected[name].nbytes + HEADER:
                        raise ValueError(f"{name} has {size} bytes")
                arrays = {k: f[k] for k in f.files if k not in small}
                if not all(isinstance(a, np.ndarray) for a in arrays.values()):
                    raise ValueError("an entry is no array")
        except Exception as e:  # zipfile and zlib raise their own kinds for damaged files
            raise StateError(f"{path}: not a saved state of this model, or damaged ({e})") from None
        for name in expected.keys() | arrays.keys():
            a, b = arrays.get(name), expected.get(name)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                raise StateError(
                    f"{path}: the array {name} is missing, surplus or of another shape"
                )
        with self.lock:
            self.cache.restore({k.removeprefix("cache."): v for k, v in arrays.items()})
        self.ids, self.n_past, self.spoilt = ids.tolist(), n_past, False


def ids_of(
    ids: Iterable[int],
    what: str = "ids",
    expected: str = "the ids of tokens, a sequence of whole numbers",
) -> list[int]:
    """The ids of one sequence of tokens, as a caller gives them.

    Raises
    ------
    ArgumentError
        They are no whole numbers, or no sequence: a text, bytes or a mapping.
    """
    try:
        if isinstance(ids, (str, bytes, bytearray, Mapping, Set)):
            raise TypeError
        found = list(ids)
        if any(isinstance(i, (bool, np.bool_)) for i in found):
            raise TypeError
        return list(map(index, found))
    except TypeError:
        raise ArgumentError(
            f"{what} is {type(ids).__name__} {ids!r:.40}; expected {expected}"
        ) from None


def check_vocabulary(ids: Sequence[int], n_vocab: int) -> None:
    """ArgumentError for ids that a vocabulary of this size has not."""
    if len(ids) and not 0 <= min(ids) <= max(ids) < n_vocab:
        raise ArgumentError(f"token ids {min(ids)} to {max(ids)}; expected 0 to {n_vocab - 1}")


def _whole(n: object) -> bool:
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool)


def fingerprint(c: Config, kv_type: KVType) -> str:
    """Name a model and its cache type, so that a saved state is not restored into another one."""
    digest = hashlib.sha256(repr(c).encode()).hexdigest()[:16]
    return f"{c.arch}-{c.n_layer}x{c.n_embd}-{kv_type}-{digest}"


Want = Literal["all", "last", "none"]
Segment = tuple[State, int, Want]
"""A state's part in a step: how many of its next tokens to compute, and which rows' logits are wanted."""


def scales_of(segments: Sequence[Segment]) -> np.ndarray | None:
    """Each segment's scales of the adapters; None if all are 0."""
    return stacked([s.scales for s, _, _ in segments])


def stacked(scales: Sequence[tuple[float, ...]]) -> np.ndarray | None:
    """The scales of some sequences, float32 [n_seq, n]; None if all are 0."""
    return np.array(scales, np.float32) if any(map(any, scales)) else None
