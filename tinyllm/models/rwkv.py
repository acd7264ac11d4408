"""RWKV 6 and 7: linear attention with a decaying matrix of state per head, and a shifted feed-forward half.

Eagle and Finch arXiv:2404.05892 (6), Goose arXiv:2503.14456 (7).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GGUFError
from ..kernels.backend import Activation, Array, LayerCache
from . import probe
from .config import Config
from .mixer import Mixer
from .step import Step
from .weights import Linear, Norm, Row, Tensors

if TYPE_CHECKING:
    from .archs import Arch

GROUP_EPS = 64e-5  # epsilon of the norm over each head's output
SLOWEST = -0.606531  # -e^-0.5: RWKV 7's decay is exp(SLOWEST * sigmoid(.))


def fused_shape(w: Tensors, n: int, n_embd: int) -> tuple[int, ...]:
    """The shape of the mixtures' weights, if it is one of n rows; else [n, 1, 1, n_embd], to be refused."""
    shape = tuple(w.source("time_mix_lerp_fused.weight").shape)
    good = int(np.prod(shape)) == n * n_embd
    return shape if good else (n, 1, 1, n_embd)


def difference(step: Step, be: Any, i: int, x: Array, name: str) -> Array:
    """The difference between the row before and each row of x."""
    return be.add(be.shift_rows(step.batch, i, x, name), x, scale=-1.0)


class TimeMix(Mixer):
    """The parts that both versions share: token shift, heads, the norm over heads, the output."""

    n_mix = 0  # how many mixtures of this row and the one before are made
    n_head_kv = 0  # heads of keys and values, where they are fewer

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be, self.i, e = w.be, i, c.n_embd
        if not c.wkv_head_dim or e % c.wkv_head_dim:
            raise GGUFError(f"is {c.wkv_head_dim}; must divide {e}", name=f"{c.arch}.wkv.head_size")
        self.head_dim, self.n_head = c.wkv_head_dim, e // c.wkv_head_dim
        self.n_embd = e
        lerp = w.host("time_mix_lerp_fused.weight", *fused_shape(w, self.n_mix, e))
        self.lerp = [w.be.array(row) for row in lerp.reshape(self.n_mix, e)]
        self.receptance, self.output = (
            w.linear(f"time_mix_{n}", e, e) for n in ("receptance", "output")
        )
        n_kv = (self.n_head_kv or self.n_head) * self.head_dim
        self.key, self.value = (w.linear(f"time_mix_{n}", n_kv, e) for n in ("key", "value"))
        ln = self.head_norm(w)
        self.norm = ln and Norm(w.be, "layer", GROUP_EPS, ln.weight, ln.bias, self.head_dim)
        self.shifts_twice = a.ffn is ChannelMix

    def head_norm(self, w: Tensors) -> Norm | None:
        """The weights of the norm over each head's output."""
        return w.norm("time_mix_ln", self.n_embd, "layer")

    @property
    def cache(self) -> LayerCache:
        """What the layer keeps: the last rows of the halves that shift them, and one matrix per head."""
        e, d = self.n_embd, self.head_dim
        rows = ("att", "ffn") if self.shifts_twice else ("att",)
        return LayerCache(arrays=(*((n, (e,)) for n in rows), ("wkv", (self.n_head, d, d))))


class TimeMix6(TimeMix):
    """RWKV 6: the mixtures depend on the data, decay comes from a small network. [T, E] -> [T, E]."""

    n_mix = 5
    gate_act: Activation = "silu"

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        super().__init__(c, a, i, w)
        be, e = w.be, c.n_embd
        self.lerp_x = be.array(w.host("time_mix_lerp_x.weight").ravel())
        first, second = w.host("time_mix_w1.weight"), w.host("time_mix_w2.weight", 5, e, len_low(w))
        low = first.reshape(5, -1, e)
        self.down = [Linear(be, be.load(Row("time_mix_w1", m)), None) for m in low]
        self.up = [Linear(be, be.load(Row("time_mix_w2", m)), None) for m in second]
        self.u = self.first(w)
        self.decay = be.array(w.host("time_mix_decay.weight").ravel())
        n_low = w.source("time_mix_decay_w1.weight").shape[0]
        self.decay_down = w.linear("time_mix_decay_w1", n_low, e)
        self.decay_up = w.linear("time_mix_decay_w2", e, n_low)
        self.gate = w.linear("time_mix_gate", e, e)

    def first(self, w: Tensors) -> Array | None:
        """How much a row's own key and value count, beside the state before."""
        return w.be.array(w.host("time_mix_first.weight").ravel())

    def __call__(self, step: Step, x: Array) -> Array:
        be = self.be
        sx = difference(step, be, self.i, x, "att")
        base = be.add(be.mul(sx, self.lerp_x), x)
        xw, xk, xv, xr, xg = (self.mixture(m, base, sx, x) for m in range(5))
        low = be.act(self.decay_down(xw), "tanh")
        w = be.act(be.add(self.decay_up(low), self.decay), "exp")
        w = be.act(be.scale_softcap(w, -1.0), "exp")
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = step.tap(f"blk.{self.i}.decay", w)
        y = self.attended(step, r, k, v, w)
        probe.state(step, self.i, "wkv", y)
        gate = step.tap(f"blk.{self.i}.gate", self.gate(xg))
        return self.output(be.act_mul(gate, y, self.gate_act))

    def attended(self, step: Step, r: Array, k: Array, v: Array, w: Array) -> Array:
        """What the rows read from the states, normalised."""
        assert self.norm is not None
        return self.norm(self.be.wkv6(step.batch, self.i, r, k, v, w, self.u))

    def mixture(self, m: int, base: Array, sx: Array, x: Array) -> Array:
        """x + sx * (lerp_m + up_m(tanh(down_m(base))))."""
        be = self.be
        weight = be.add(self.up[m](be.act(self.down[m](base), "tanh")), self.lerp[m])
        return be.add(be.mul(sx, weight), x)


def len_low(w: Tensors) -> int:
    """The width of each of the five small networks of the token shift."""
    return int(w.source("time_mix_w1.weight").shape[0]) // 5


class GatedTimeMix6(TimeMix6):
    """RWKV 6 in Qwen 2: gated linear attention, of grouped keys and values, without a norm over heads.

    A key counts as far as its row decays, and a row reads the state that it has changed. [T, E] -> [T, E].
    """

    gate_act = "sigmoid"

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.n_head_kv = c.n_head_kv[i]
        super().__init__(c, a, i, w)
        if self.n_head_kv and self.n_head % self.n_head_kv:
            raise GGUFError(
                f"is {self.n_head_kv}; expected a divisor of the {self.n_head} heads",
                name=f"{c.arch}.attention.head_count_kv",
            )

    def head_norm(self, w: Tensors) -> Norm | None:
        return None

    def first(self, w: Tensors) -> Array | None:
        return None

    def attended(self, step: Step, r: Array, k: Array, v: Array, w: Array) -> Array:
        be, n_kv = self.be, self.n_head_kv
        if n_kv and n_kv != self.n_head:
            k, v = (be.concat([y] * (self.n_head // n_kv), n_kv) for y in (k, v))
        k = be.add(k, be.mul(k, w), scale=-1.0)
        none = be.scale_softcap(w, 0.0)
        y = be.wkv7(step.batch, self.i, r, w, k, v, none, none)
        return be.scale_softcap(y, self.head_dim**-0.5)


class TimeMix7(TimeMix):
    """RWKV 7: the state is also corrected along a learned direction (delta rule). [T, E] -> [T, E]."""

    carries = True  # the first layer's values, to all others

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        gated = self.is_gated(w)
        self.n_mix = 6 if gated else 5
        super().__init__(c, a, i, w)
        be, e = w.be, c.n_embd
        self.w, self.a, self.v = (LowRank(w, n, e) for n in "wav")
        self.g_down = self.g_up = None
        if gated:
            n_gate = w.source("time_mix_g1.weight").shape[0]
            self.g_down = w.linear("time_mix_g1", n_gate, e)
            self.g_up = w.linear("time_mix_g2", e, n_gate)
        self.k_k, self.k_a, self.r_k = (
            be.array(w.host(f"time_mix_{n}.weight").ravel()) for n in ("k_k", "k_a", "r_k")
        )
        ones = np.ones((self.n_head, self.head_dim, self.head_dim), np.float32)
        self.ones = be.load(Row("ones", ones))  # sums each head and repeats the sum over it

    def is_gated(self, w: Tensors) -> bool:
        """Whether there is a gate of the output."""
        return True

    def __call__(self, step: Step, x: Array) -> Array:
        be = self.be
        sx = difference(step, be, self.i, x, "att")
        xr, xw, xk, xv, xa, *xg = (be.add(be.mul(sx, lerp), x) for lerp in self.lerp)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = be.act(be.scale_softcap(be.act(self.w(be, xw, "tanh"), "sigmoid"), SLOWEST), "exp")
        v = self.mix_values(step, v, xv)
        w = step.tap(f"blk.{self.i}.decay", w)
        a = step.tap(f"blk.{self.i}.rate", be.act(self.a(be, xa), "sigmoid"))
        unit = be.rms_norm(be.mul(k, self.k_k), None, 1e-24, None, self.head_dim)
        unit = be.scale_softcap(unit, self.head_dim**-0.5)
        k_a = be.mul(k, self.k_a)
        k = be.add(k, be.add(be.mul(k_a, a), k_a, scale=-1.0))
        y = be.wkv7(step.batch, self.i, r, w, k, v, be.scale_softcap(unit, -1.0), be.mul(unit, a))
        probe.state(step, self.i, "wkv", y)
        bonus = be.matmul_heads(self.ones, be.mul(be.mul(k, r), self.r_k))
        y = be.add(self.norm(y) if self.norm else y, be.mul(v, bonus))
        if self.g_down is None or self.g_up is None:
            return self.output(y)
        gate = step.tap(f"blk.{self.i}.gate", self.g_up(be.act(self.g_down(xg[0]), "sigmoid")))
        return self.output(be.mul(y, gate))

    def mix_values(self, step: Step, v: Array, xv: Array) -> Array:
        """Later layers blend in the first layer's values."""
        if self.i == 0:
            step.carried["v_first"] = v
            return v
        be = self.be
        toward = be.add(step.carried["v_first"], v, scale=-1.0)
        return be.add(v, be.mul(toward, be.act(self.v(be, xv), "sigmoid")))


class OptionalTimeMix7(TimeMix7):
    """RWKV 7 in Qwen 2: a gate, and a norm over heads, only where the file has them. [T, E] -> [T, E]."""

    def is_gated(self, w: Tensors) -> bool:
        return w.has("time_mix_g1.weight", "time_mix_g2.weight")

    def head_norm(self, w: Tensors) -> Norm | None:
        if not w.has("time_mix_ln.weight", "time_mix_ln.bias"):
            return None
        w.require("time_mix_ln.bias")
        return super().head_norm(w)


class LowRank:
    """bias + second(act(first(x)))."""

    def __init__(self, w: Tensors, name: str, n_embd: int) -> None:
        n = w.source(f"time_mix_{name}1.weight").shape[0]
        self.bias = w.be.array(w.host(f"time_mix_{name}0.weight").ravel())
        self.first = w.linear(f"time_mix_{name}1", n, n_embd)
        self.second = w.linear(f"time_mix_{name}2", n_embd, n)

    def __call__(self, be: Any, x: Array, act: str = "") -> Array:
        low = self.first(x)
        return be.add(self.second(be.act(low, act) if act else low), self.bias)


class ChannelMix:
    """The feed-forward half over a mixture with the row before; RWKV 6 gates it. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be, self.i, e, f = w.be, i, c.n_embd, c.n_ff[i]
        self.lerp_k = w.be.array(w.host("channel_mix_lerp_k.weight").ravel())
        self.key, self.value = (
            w.linear("channel_mix_key", f, e),
            w.linear("channel_mix_value", e, f),
        )
        self.receptance = None
        if w.has("channel_mix_receptance.weight"):
            self.receptance = w.linear("channel_mix_receptance", e, e)
            self.lerp_r = w.be.array(w.host("channel_mix_lerp_r.weight").ravel())

    def __call__(self, step: Step, x: Array) -> Array:
        be = self.be
        sx = difference(step, be, self.i, x, "ffn")
        hidden = be.act(self.key(be.add(be.mul(sx, self.lerp_k), x)), "relu2")
        y = self.value(step.tap(f"blk.{self.i}.ffn_act", hidden))
        if self.receptance is None:
            return y
        return be.act_mul(self.receptance(be.add(be.mul(sx, self.lerp_r), x)), y, "sigmoid")
