"""An embedding of their own for each layer, as Gemma 3n and 4 have it. hf.co/google/gemma-3n-E2B-it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels.backend import Array
from .config import Config
from .step import Step
from .weights import Norm, Part, Tensors

if TYPE_CHECKING:
    from .archs import Arch


class PerLayer:
    """What a layer adds to its activations x: norm(out(gelu(gate(x)) * own)). [T, E] -> [T, E].

    ``own`` [T, P] is the mean of the token's embedding for this layer and a projection of the first one.
    """

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        p, e, root = c.n_embd_per_layer, c.n_embd, w.root
        self.be, self.act, self.scale, self.narrow = w.be, a.act, p**0.5, e**-0.5
        columns = slice(i * p, (i + 1) * p)
        n_vocab = root.source("token_embd.weight").shape[0]
        table = root.source("per_layer_token_embd.weight", n_vocab, c.n_layer * p)
        self.table = w.be.load(Part(table, (n_vocab, p), columns=columns))
        self.project = root.linear("per_layer_model_proj", c.n_layer * p, e, columns)
        self.project_norm = root.norm("per_layer_proj_norm", p)
        self.gate, self.out = w.linear("inp_gate", p, e), w.linear("proj", e, p)
        self.post_norm: Norm = w.norm("post_norm", e)

    def own(self, step: Step) -> Array:
        """The layer's own embedding of each token -> [T, P]."""
        be = self.be
        token = be.embed(self.table, step.carried["ids"], self.scale)
        first = be.scale_softcap(self.project(step.carried["embd"]), self.narrow)
        return be.scale_softcap(be.add(self.project_norm(first), token), 2**-0.5)

    def __call__(self, step: Step, x: Array) -> Array:
        gated = self.be.act_mul(self.gate(x), self.own(step), self.act)
        return self.post_norm(self.out(gated))
