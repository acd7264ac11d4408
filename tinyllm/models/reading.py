"""Attention of a text that is written to a text that was read before, by a stack of layers of its own.

What the encoder has made of the source is projected to keys and values once, which stay as they are: each row
that is written attends to all of them. Attention Is All You Need, arXiv:1706.03762, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels.backend import Array, Batch, Cache, LayerCache
from .step import Step
from .weights import Tensors, products

if TYPE_CHECKING:
    from .archs import Arch
    from .config import Config


@dataclass(eq=False)
class Source:
    """A text that a state and its forks write about; ``cache`` has the keys and values that layers keep of it.

    The first step of any of the states has them ``stored``, and they never change afterwards.
    """

    ids: list[int]
    cache: Cache
    stored: bool = False


def batch_of(sources: Sequence[Source], counts: Sequence[int]) -> Batch:
    """The rows of a step, ``counts`` of each sequence, as readers of their sources.

    Each row is a sequence of its own that stands at its source's last position, so that it sees all of them.
    """
    rows = [s for s, n in zip(sources, counts, strict=True) for _ in range(n)]
    return Batch.next([0] * len(rows), [len(s.ids) - 1 for s in rows], [s.cache for s in rows])


class Reading:
    """The part of a block that attends to the source, with the norm before it. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        c = c.at(i)
        self.be, self.i, self.n_head, self.scale = w.be, i, c.n_head[i], c.attn_scale
        self.cache = LayerCache(c.n_head_kv[i], c.head_dim, c.head_dim_v)
        self.norm = w.norm("cross_attn_norm", c.n_embd)
        self.q = w.linear("cross_attn_q", self.n_head * c.head_dim, c.n_embd)
        self.k = w.linear("cross_attn_k", c.n_head_kv[i] * c.head_dim, c.n_embd)
        self.v = w.linear("cross_attn_v", c.n_head_kv[i] * c.head_dim_v, c.n_embd)
        self.o = w.linear("cross_attn_o", c.n_embd, self.n_head * c.head_dim_v)
        w.pass_over("cross_attn_rel_b.weight")  # no implementation reads it

    def store(self, step: Step, x: Array) -> None:
        """Store keys and values of what the encoder has made of a source, x [S, E]."""
        k, v = products([self.k, self.v], x)
        self.be.cache_write(step.batch, self.i, k, v)

    def __call__(self, step: Step, x: Array) -> Array:
        at = f"blk.{self.i}.cross_"
        q = self.q(step.tap(f"{at}norm", self.norm(x)))
        assert step.batch.source is not None
        y = self.be.attention(step.batch.source, self.i, q, self.n_head, scale=self.scale)
        return step.tap(f"{at}out", self.o(y))
