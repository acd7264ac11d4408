"""Layers that run several times over the same rows, each time with a past of their own.

Nanbeige 4.2 runs all its layers again (hf.co/Nanbeige). The hierarchical reasoning model (arXiv:2506.21734) has
two stacks: the low one refines a state so many times, then the high one takes it up, and that over again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.backend import Array
from .config import Config
from .decoder import Block
from .step import Step
from .weights import Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class LoopBlock(Block):
    """A layer; the first one of each further run reads through the last norm, unless the file says not to."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        super().__init__(c, a, i, w)
        again = i > 0 and c.blocks[i] == 0 and c.loop_norm
        self.again = w.root.norm("output_norm", c.n_embd) if again else None

    def __call__(self, step: Step, x: Array) -> Array:
        return super().__call__(step, self.again(x) if self.again else x)


class Rounds:
    """The low state begins as one learned row; the last high state is what the head reads."""

    def __init__(self, c: Config, first: Tensors, last: Tensors) -> None:
        self.be, self.low = first.be, first.array("hrm.z_l_init", c.n_embd)

    def begin(self, step: Step, x: Array) -> Array:
        step.carried["other"] = self.be.add(self.be.scale_softcap(x, 0.0), self.low)
        return x

    def end(self, step: Step, x: Array) -> Array:
        return x


class RoundsBlock(Block):
    """A layer of one of two stacks; the first one of a stack reads the sum of both states.

    What comes from before is the state that was changed last; the other is in ``step.carried``.
    """

    carries = True

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        super().__init__(c, a, i, w)
        runs = c.n_cycles[1] + 1  # in a round: the low stack's, and then the high one's
        run = i // c.n_stack % runs
        self.begins = i % c.n_stack == 0
        self.turns = run in (0, runs - 1)  # the state that comes in is not the one to be changed
        self.norm = Norm(w.be, c.norm, c.norm_eps, None, None) if self.begins and i else None

    def __call__(self, step: Step, x: Array) -> Array:
        if self.begins:
            x = self.norm(x) if self.norm else x
            other = step.carried["other"]
            if self.turns:
                step.carried["other"] = x
            x = self.be.add(x, other)
        return super().__call__(step, x)
