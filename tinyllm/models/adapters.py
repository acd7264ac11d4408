"""Adapters beside a model's matrices: each row of a step has its own scale of each. LoRA, arXiv:2106.09685.

The factors of all adapters of a matrix stand side by side, so that one product serves rows with different ones:
y = W x + up (s * (down x)), where s [R] has the row's scale of an adapter for each of its r values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import ArgumentError, UnsupportedModel
from ..gguf.finite import checked_scale
from ..kernels.backend import Array, Backend, Weight
from .row import Row

if TYPE_CHECKING:
    from ..gguf.adapter import Adapter, Pair

Scales = tuple[float, ...]
EMBEDDING = "token_embd.weight"
MULTIPLE = 4  # values side by side, with zeros behind the last


class Beside(Protocol):
    """Something that reads what a product reads, and may add to it."""

    @property
    def idle(self) -> bool:
        """Whether it does nothing in the present step."""
        ...

    def added(self, y: Array, x: Array, each: int = 1) -> Array:
        """y [T, n_out], the product of x [T, n_in], with what is added; ``each`` rows for one of the step."""
        ...

    def added_to_embedding(self, y: Array, ids: Array, scale: float) -> Array:
        """Embeddings y [T, E] of ids [T], with what is added."""
        ...

    def added_to_experts(self, y: Array, x: Array, experts: Array, n: int) -> Array:
        """y [T, k, n_out], the products of the chosen of n experts, with what is added."""
        ...


class Adapters:
    """The adapters of one model, in the order given, and their scales unless told otherwise.

    ``control`` is what is added to the residual stream behind layers: float32 [E] by layer.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter] = (),
        scales: Sequence[float] = (),
        control: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.control = dict(control or {})
        self.names = tuple(a.name for a in adapters)
        if len(set(self.names)) < len(self.names):
            raise ArgumentError(f"two adapters have one name: {', '.join(self.names)}")
        self.scales: Scales = tuple(map(checked_scale, scales))
        self._adapters = tuple(adapters)
        self._taken: set[str] = set()
        self._mixes: dict[int, Mix] = {}
        self._digests: dict[Scales, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def chosen(self, wanted: Mapping[str, float] | None) -> Scales:
        """Each adapter's scale: those given, and 0 for the others; None: as the model was loaded."""
        if wanted is None:
            return self.scales
        if not isinstance(wanted, Mapping):
            raise ArgumentError(f"lora={wanted!r:.60}; expected a scale for each name, or None")
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            known = ", ".join(self.names) or "none"
            raise ArgumentError(f"lora: no adapter {unknown[0]!r:.60}; this model has {known}")
        return tuple(checked_scale(wanted.get(name, 0.0)) for name in self.names)

    def mix(self, be: Backend) -> Mix:
        """The scales of the present step on a backend."""
        return self._mixes.setdefault(id(be), Mix(be, len(self)))

    def begin(self, be: Backend, scales: Array | None) -> None:
        """Have the products on a backend use these scales [T, n] from now on."""
        if self._adapters:
            self.mix(be).begin(scales)

    def factors(
        self, name: str, rows: slice | np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]] | None:
        """All factors of a tensor side by side, down [.., R, n_in] and up [.., n_out, R], and each one's r.

        For the embedding, down is [V, R]. None: no adapter changes it.
        """
        found = [a.pairs.get(name) for a in self._adapters]
        if not any(found):
            return None
        self._taken.add(name)
        ranks = tuple(0 if p is None else p[1].shape[-1] for p in found)
        across = -1 if name == EMBEDDING else -2
        padding = -sum(ranks) % MULTIPLE
        down = np.concatenate([p[0] for p in found if p is not None], across)
        up = np.concatenate([p[1] for p in found if p is not None], -1)
        down = padded(down, across, padding)
        up = padded(up, -1, padding)
        return down, up if rows is None else np.ascontiguousarray(up[..., rows, :]), ranks

    def of(self, name: str) -> list[tuple[float, Pair]]:
        """The factors that change a tensor, each pair with its scale, where they do anything."""
        both = zip(self._adapters, self.scales, strict=True)
        return [(scale, a.pairs[name]) for a, scale in both if scale and name in a.pairs]

    def beside(
        self, be: Backend, name: str, rows: slice | np.ndarray | None = None
    ) -> Beside | None:
        """What stands beside a tensor's product, or beside that of some of its rows."""
        factors = self.factors(name, rows)
        return None if factors is None else LowRank(self.mix(be), *factors)

    def check_used(self) -> None:
        """Raise UnsupportedModel for a change of a tensor that no plain product reads."""
        for a in self._adapters:
            left = sorted(set(a.pairs) - self._taken)
            if left:
                raise UnsupportedModel(
                    f"adapter {a.name}: {left[0]} is not read by a product of its own here; "
                    "`tinyllm merge` puts the adapter into the file"
                )

    def check_control(self, n_layer: int, n_embd: int) -> None:
        """Raise ArgumentError unless the control vectors fit a model of this size."""
        for layer, x in self.control.items():
            if not 0 <= layer < n_layer or x.shape != (n_embd,):
                raise ArgumentError(
                    f"control: a direction of {len(x)} values behind layer {layer}; the model has layers 0 to "
                    f"{n_layer - 1} of {n_embd} values"
                )

    def digest(self, scales: Scales) -> str:
        """A name for what adapters of these scales and the control vectors do, "" where they do nothing."""
        if (any(scales) or self.control) and scales not in self._digests:
            found = hashlib.sha256(repr(scales).encode())
            for adapter, scale in zip(self._adapters, scales, strict=True):
                for name, pair in adapter.pairs.items() if scale else ():
                    found.update(name.encode())
                    for x in pair:
                        found.update(x.tobytes())
            for layer, x in sorted(self.control.items()):
                found.update(f"control {layer}".encode() + x.tobytes())
            self._digests[scales] = found.hexdigest()[:16]
        return self._digests.get(scales, "")


class Mix:
    """The scales of a step's rows on one backend: those that ``begin`` was told last."""

    def __init__(self, be: Backend, n: int) -> None:
        self.be, self.n = be, n
        self.scales: Array | None = None
        self._spread: dict[tuple[int, ...], Weight] = {}
        self._now: dict[tuple[int, ...], Array] = {}

    def begin(self, scales: Array | None) -> None:
        """Use these scales [T, n] from now on; None: no row has any."""
        self.scales = scales
        self._now.clear()

    def prepare(self, ranks: tuple[int, ...]) -> None:
        """Load what ``shares`` needs for these ranks."""
        if ranks not in self._spread:
            wide = sum(ranks) + -sum(ranks) % MULTIPLE
            selecting = np.zeros((wide, self.n), np.float32)
            selecting[np.arange(sum(ranks)), np.repeat(np.arange(self.n), ranks)] = 1
            self._spread[ranks] = self.be.load(Row("scales", selecting))

    def shares(self, ranks: tuple[int, ...]) -> Array:
        """Each row's scale for each of the values of factors with these ranks -> [T, R]."""
        if ranks not in self._now:
            self._now[ranks] = self.be.matmul(self._spread[ranks], self.scales)
        return self._now[ranks]


class LowRank:
    """The products of all adapters of one tensor, on the backend of its layer."""

    def __init__(self, mix: Mix, down: np.ndarray, up: np.ndarray, ranks: tuple[int, ...]) -> None:
        self.be, self.mix, self.ranks = mix.be, mix, ranks
        self.down, self.up = mix.be.load(Row("down", down)), mix.be.load(Row("up", up))
        mix.prepare(ranks)

    @property
    def idle(self) -> bool:
        """Whether no row of the present step has an adapter."""
        return self.mix.scales is None

    def added(self, y: Array, x: Array, each: int = 1) -> Array:
        """y [T, n_out] and what the adapters make of x [T, n_in]; ``each`` rows for one of the step."""
        inner, shares = self.be.matmul(self.down, x), self.mix.shares(self.ranks)
        if each > 1:
            shares = self.be.repeat(shares, each).reshape(*inner.shape)
        return self.be.add(y, self.be.matmul(self.up, self.be.mul(inner, shares)))

    def added_to_embedding(self, y: Array, ids: Array, scale: float) -> Array:
        """Embeddings y [T, E] of ids [T] and what the adapters add to them."""
        inner = self.be.mul(self.be.embed(self.down, ids, scale), self.mix.shares(self.ranks))
        return self.be.add(y, self.be.matmul(self.up, inner))

    def added_to_experts(self, y: Array, x: Array, experts: Array, n: int) -> Array:
        """y [T, k, n_out] and what the adapters of the chosen experts make of x [T, n_in] or [T, k, n_in]."""
        be, (t, k, n_out) = self.be, y.shape
        inner = be.matmul_experts(self.down, x, experts)
        wide = inner.shape[2]
        shares = be.repeat(self.mix.shares(self.ranks), k).reshape(t * k, wide)
        inner = be.mul(inner.reshape(t * k, wide), shares).reshape(t, k, wide)
        more = be.matmul_experts(self.up, inner, experts)
        return be.add(y.reshape(t * k, n_out), more.reshape(t * k, n_out)).reshape(t, k, n_out)


def padded(x: np.ndarray, axis: int, n: int) -> np.ndarray:
    """x with n zeros behind it along an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, n)
    return np.pad(x, widths) if n else x
