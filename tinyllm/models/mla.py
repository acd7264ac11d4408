"""Latent attention: keys and values are projections of one short vector per position.

DeepSeek-V2 arXiv:2405.04434, section 2.1. Where the file has the up-projections per head (``attn_k_b``,
``attn_v_b``), only the latent vector is stored, and the projections move to the query and the output.
Files with one ``attn_kv_b`` (MiniCPM3, older DeepSeek ones) expand keys and values before they are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..kernels.backend import Array, LayerCache
from . import probe
from .attention import Heating, check_has_heads, make_rope
from .config import Config
from .mixer import Mixer, widened
from .rope import attention_scale
from .step import Step
from .weights import Tensors

if TYPE_CHECKING:
    from .archs import Arch


# DeepSeek 3.2's index chooses the positions to attend to; as long as it chooses all, nothing reads it.
INDEXER = "k_norm.weight k_norm.bias proj.weight attn_k.weight attn_q_b.weight".split()


class LatentAttention(Mixer):
    """[T, E] -> [T, E]; R = kv_lora_rank, P = rope_dim, N = head_dim - P."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        c = c.at(i)
        self.be, self.i, self.n_head = w.be, i, c.n_head[i]
        check_has_heads(c, i)
        self.window = c.window[i]
        self.rank, self.head_dim, self.head_dim_v = c.kv_lora_rank, c.head_dim, c.head_dim_v
        plain, turned = c.head_dim - c.rope_dim, c.rope_dim
        self.scale = attention_scale(c)
        self.q_a = self.q_a_norm = None
        source, n_in = "attn_q", c.n_embd
        if w.has("attn_q_a.weight", "attn_q_a_norm.weight", "attn_q_b.weight"):
            self.q_a = w.linear("attn_q_a", c.q_lora_rank, c.n_embd)
            self.q_a_norm = w.norm("attn_q_a_norm", c.q_lora_rank)
            source, n_in = "attn_q_b", c.q_lora_rank
        n_q, per_head = self.n_head * c.head_dim, np.arange(self.n_head)[:, None] * c.head_dim
        self.q_plain = w.linear(source, n_q, n_in, (per_head + np.arange(plain)).ravel())
        self.q_turned = w.linear(
            source, n_q, n_in, (per_head + np.arange(plain, c.head_dim)).ravel()
        )
        n_a = self.rank + turned
        self.latent = w.linear("attn_kv_a_mqa", n_a, c.n_embd, slice(0, self.rank))
        self.k_turned = w.linear("attn_kv_a_mqa", n_a, c.n_embd, slice(self.rank, n_a))
        self.latent_norm = w.norm("attn_kv_a_norm", self.rank)
        self.absorbed = w.has("attn_k_b.weight", "attn_v_b.weight")
        if self.absorbed:
            self.k_b = w.matrix("attn_k_b.weight", self.n_head, self.rank, plain)
            self.v_b = w.matrix("attn_v_b.weight", self.n_head, c.head_dim_v, self.rank)
        else:
            self.k_up, self.v_up = expansions(c, w, self.n_head, self.rank, plain)
        self.o = w.linear("attn_output", c.n_embd, self.n_head * c.head_dim_v)
        self.temperature = Heating(c, w) if c.temperature else None
        self.turned = turned
        self.gate = self.k_norm = None
        if w.has("attn_gate.weight", "attn_k_norm.weight"):  # dots 3 note's
            self.gate = w.linear("attn_gate", self.n_head, c.n_embd)
            self.k_norm = w.norm("attn_k_norm", turned)
        w.pass_over(*(f"indexer.{n}" for n in INDEXER))
        if a.position == "rope":
            self.rope = make_rope(c, a, i, w, first=self.rank if self.absorbed else plain)

    @property
    def cache(self) -> LayerCache:
        """The latent vector and one rotated key per position, or full keys and values."""
        if self.absorbed:
            return LayerCache(1, self.rank + self.turned, self.rank, window=self.window)
        return LayerCache(self.n_head, self.head_dim, self.head_dim_v, window=self.window)

    def __call__(self, step: Step, x: Array) -> Array:
        be, h = self.be, self.n_head
        if self.q_a is not None and self.q_a_norm is not None:
            q_in = self.q_a_norm(self.q_a(x))
        else:
            q_in = x
        q_plain, q_turned = self.q_plain(q_in), self.q_turned(q_in)
        latent, k_turned = self.latent_norm(self.latent(x)), self.k_turned(x)
        k_turned = self.k_norm(k_turned) if self.k_norm else k_turned
        if self.absorbed:
            q = be.concat([be.matmul_heads(self.k_b, q_plain), q_turned], h)
            k, v = be.concat([latent, k_turned]), latent
        else:
            q = be.concat([q_plain, q_turned], h)
            k, v = be.concat([self.k_up(latent), be.repeat(k_turned, h)], h), self.v_up(latent)
        if self.rope is not None:
            spec, dim = self.rope.at(step.n_ctx), self.cache.head_dim
            q, k = (be.rope(y, step.batch.positions, spec, dim) for y in (q, k))
        q = q if self.temperature is None else self.temperature(step, q)
        q, k = step.tap(f"blk.{self.i}.q", q), step.tap(f"blk.{self.i}.k", k)
        be.cache_write(step.batch, self.i, k, step.tap(f"blk.{self.i}.v", v))
        y = be.attention(step.batch, self.i, q, h, scale=self.scale, window=self.window)
        y = be.matmul_heads(self.v_b, y) if self.absorbed else y
        if self.gate is not None:
            gate = widened(be, be.act(self.gate(x), "sigmoid"), h, self.head_dim_v)
            y = be.mul(y, gate)
        y = step.tap(f"blk.{self.i}.attn_heads", y)
        y, heads = self.o(y), y
        if not step.asks(f"blk.{self.i}.", "attn_result"):
            return y
        return probe.by_head(step, f"blk.{self.i}.attn_result", self.o, heads, h, y)


def expansions(c: Config, w: Tensors, n_head: int, rank: int, plain: int):  # type: ignore[no-untyped-def]
    """``attn_kv_b`` holds, head by head, the rows of the keys and then those of the values."""
    both = plain + c.head_dim_v
    base = np.arange(n_head)[:, None] * both
    return (
        w.linear("attn_kv_b", n_head * both, rank, (base + np.arange(plain)).ravel()),
        w.linear("attn_kv_b", n_head * both, rank, (base + np.arange(plain, both)).ravel()),
    )
