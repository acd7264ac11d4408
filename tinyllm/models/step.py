"""What a forward pass carries from layer to layer beside the activations, and who looks into it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np

from ..errors import ArgumentError
from ..kernels.backend import Array, Backend, Batch

Tap = Callable[[str, np.ndarray], "np.ndarray | None"]

# Points that a plain function is not shown: they cost more than a copy, or repeat what others show.
ON_REQUEST = frozenset(
    """attn_probs attn_scores attn_result attn_norm_scale ffn_norm_scale output_norm_scale q_proj k_proj
    resid_mid attn_post ffn_post ffn_act ffn_act_exps ffn_act_chexps ffn_act_shexp router_logits router_probs
    gate rate decay state per_layer""".split()
)


@dataclass(frozen=True)
class Span:
    """One sequence's rows in a pass: its first row's position, how many there are, how long it is in all.

    Behind the layers, the last ``n_out`` of the rows are left: those whose logits are wanted.
    """

    start: int
    n: int
    length: int
    n_out: int

    @property
    def behind(self) -> Span:
        """The rows that are left behind the layers."""
        return Span(self.start + self.n - self.n_out, self.n_out, self.length, self.n_out)


class Hook:
    """A tap that says which points it wants: the others keep their fused kernels, and are not copied."""

    def begin(self, spans: Sequence[Span]) -> None:
        """Told before each pass which rows it has: those of the spans, one after the other."""

    def replaces(self, name: str) -> bool:
        """Whether it is called at this point, and may replace the values."""
        return False

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        """Values at a point, a copy; what is returned, if anything, takes their place."""
        return None

    def keeps(self, name: str) -> bool:
        """Whether it wants the values that the pass went on with at this point, once the pass is over."""
        return False

    def room(self, name: str) -> Sequence[tuple[int, np.ndarray]] | None:
        """Where values that it keeps may be written during the pass: pairs of a first row and memory.

        None, or a device that does not write there: they are handed over at the pass's end.
        """
        return None

    def kept(self, name: str, x: np.ndarray) -> None:
        """Values that it asked to keep and found no room for; valid during the call."""


class Plain(Hook):
    """A user's function as a hook. With its attribute ``attn_probs`` set it also sees those."""

    def __init__(self, tap: Tap) -> None:
        self.tap, self.probs = tap, bool(getattr(tap, "attn_probs", False))

    def replaces(self, name: str) -> bool:
        kind = name.rpartition(".")[2]
        return kind not in ON_REQUEST or (self.probs and kind == "attn_probs")

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        return self.tap(name, x)


class Chain(Hook):
    """Several hooks, each seeing what those before it made."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = hooks

    def begin(self, spans: Sequence[Span]) -> None:
        for hook in self.hooks:
            hook.begin(spans)

    def replaces(self, name: str) -> bool:
        return any(hook.replaces(name) for hook in self.hooks)

    def __call__(self, name: str, x: np.ndarray) -> np.ndarray | None:
        for hook in self.hooks:
            if hook.replaces(name):
                result = hook(name, x)
                x = x if result is None else checked(name, result, x.shape)
        return x

    def keeps(self, name: str) -> bool:
        return any(hook.keeps(name) for hook in self.hooks)

    def room(self, name: str) -> Sequence[tuple[int, np.ndarray]] | None:
        keepers = [hook for hook in self.hooks if hook.keeps(name)]
        return keepers[0].room(name) if len(keepers) == 1 else None

    def kept(self, name: str, x: np.ndarray) -> None:
        for hook in self.hooks:
            if hook.keeps(name):
                hook.kept(name, x)


# Hooks that contexts of this thread, or of this task, have put on networks: (the network's number, hook)
ACTIVE: ContextVar[tuple[tuple[Hashable, Hook], ...]] = ContextVar("ACTIVE", default=())


def hook_of(number: Hashable, tap: Tap | None) -> Hook | None:
    """What looks into a pass of a network: the hooks of the contexts around the call, then its own tap."""
    hooks = [hook for owner, hook in ACTIVE.get() if owner == number]
    if tap is not None:
        hooks.append(tap if isinstance(tap, Hook) else Plain(tap))
    return Chain(hooks) if len(hooks) > 1 else hooks[0] if hooks else None


def checked(name: str, result: object, shape: tuple[int, ...]) -> np.ndarray:
    """What a tap returned, as float32 of this shape; ArgumentError for another."""
    replacement = np.asarray(result, np.float32)
    if replacement.shape != shape:
        raise ArgumentError(
            f"tap {name!r} returned shape {replacement.shape}; expected {shape} or None"
        )
    return replacement


@dataclass(frozen=True)
class Step:
    """One pass over a batch: its rows, the room of its states, and who looks into it, if anyone."""

    be: Backend
    batch: Batch
    n_ctx: int = 0
    hook: Hook | None = None
    # int32 [T], for BERT: 0 for rows of a pair's first text, 1 for those of the second
    types: Array | None = None
    layers: range | None = None  # run only these; None: all
    # what a layer hands to later layers of this pass (RWKV 7's first values)
    carried: dict[str, Array] = field(default_factory=dict)
    kept: list[tuple[str, Array]] = field(default_factory=list)  # what the hook asked to keep

    def asks(self, prefix: str, *kinds: str) -> bool:
        """Whether someone looks at one of these points, such as "q" below "blk.3."."""
        hook = self.hook
        if hook is None:
            return False
        names = [prefix + kind for kind in kinds]
        return any(hook.replaces(name) or hook.keeps(name) for name in names)

    def tap(self, name: str, x: Array) -> Array:
        """Show the named activation to whoever asks; what is returned, if anything, takes its place."""
        hook = self.hook
        if hook is None:
            return x
        if hook.replaces(name):
            values = self.be.numpy(x)
            result = hook(name, np.array(values))
            if result is not None:
                replacement = checked(name, result, values.shape)
                x = x if np.array_equal(replacement, values) else self.be.array(replacement)
        if hook.keeps(name):
            room = hook.room(name)
            if room is None or not all(self.be.save(x, i, out) for i, out in room):
                self.kept.append((name, x))
        return x

    def show(self, name: str, values: np.ndarray) -> np.ndarray | None:
        """Show host values that stand for a part of the pass; returns what replaces them, if other values."""
        hook, changed = self.hook, None
        assert hook is not None
        if hook.replaces(name):
            result = hook(name, np.array(values))
            if result is not None:
                replacement = checked(name, result, values.shape)
                changed = None if np.array_equal(replacement, values) else replacement
        if hook.keeps(name):
            self.kept.append((name, values if changed is None else changed))
        return changed

    def hand_over(self) -> None:
        """Give the hook what it asked to keep; the pass has run."""
        for name, x in self.kept:
            assert self.hook is not None
            self.hook.kept(name, x if isinstance(x, np.ndarray) else self.be.numpy(x))
        self.kept.clear()
