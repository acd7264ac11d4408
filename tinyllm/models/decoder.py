"""The one model: token ids through embedding, blocks and head. Encoders have no head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..kernels.backend import Array, LayerCache
from . import probe
from .config import Config
from .ffn import MoE, make_ffn
from .mixer import NoMixer
from .norms import norms_after, norms_before, output_norm
from .perlayer import PerLayer
from .rank import Projections, RankHead
from .reading import Reading
from .step import Step
from .weights import Linear, Norm, Tensors

if TYPE_CHECKING:
    from .archs import Arch


def normed(step: Step, name: str, norm: Norm, x: Array) -> Array:
    """norm(x); the magnitude that it divides each row by is the point ``name`` + "_scale"."""
    y = norm(x)
    return probe.rescaled(step, name, norm, x, y) if step.asks(name, "_scale") else y


class Block:
    """One layer: the mixer and the feed-forward half around the residual stream. [T, E] -> [T, E]."""

    def __init__(self, c: Config, a: Arch, i: int, w: Tensors) -> None:
        self.be, self.i, self.norm_at = w.be, i, a.norm_at
        self.scale, self.routed_by_input = c.residual_scale, a.routed_by_input
        self.mixer = a.mixer(c, a, i, w)
        self.reading = Reading(c, a, i, w) if a.reader else None
        self.ffn = make_ffn(c, a, i, w)
        self.side_norm = self.side = None
        if w.has("ffn_norm_exps.weight"):  # Arctic: experts beside the whole block, on its input
            self.side_norm, self.side = w.norm("ffn_norm_exps", c.n_embd), MoE(c, a, w)
        self.parallel = is_parallel(c, a, w)
        self.attn_norm, self.ffn_norm = norms_before(c, a, i, w, self.ffn)
        self.attn_post, self.ffn_post = norms_after(c, a, w)
        self.per_layer = PerLayer(c, a, i, w) if c.n_embd_per_layer else None
        added = w.adapters.control.get(i)
        self.control = None if added is None else w.be.array(added)
        self.out_scale = 1.0
        if w.has("layer_output_scale.weight"):
            self.out_scale = float(w.host("layer_output_scale.weight", 1)[0])

    @property
    def carries(self) -> bool:
        """Whether it needs or hands on values in ``step.carried``."""
        return self.mixer.carries or self.per_layer is not None

    def __call__(self, step: Step, x: Array) -> Array:
        be, tap, i = self.be, step.tap, self.i
        start = x
        if isinstance(self.mixer, NoMixer):
            return self.out(step, self.alone(step, x))
        h = x
        if self.attn_norm:
            h = tap(f"blk.{i}.attn_norm", normed(step, f"blk.{i}.attn_norm", self.attn_norm, x))
        y = tap(f"blk.{i}.attn_out", self.mixer(step, h))
        if self.norm_at == "after":  # BERT: add, then normalise
            assert self.attn_post is not None
            assert self.ffn_post is not None
            x = tap(f"blk.{i}.resid_mid", self.attn_post.of_sum(x, y))
            return self.out(step, self.ffn_post.of_sum(x, self.feed(step, x)))
        y = tap(f"blk.{i}.attn_post", self.attn_post(y)) if self.attn_post else y
        if self.parallel:  # both halves read x; without a norm of its own, the second shares h
            f = self.feed(step, self.normed(step, x) if self.ffn_norm else h)
            return self.out(step, be.add(x, y, f, scale=self.scale))
        x = be.add(x, y, scale=self.scale)
        x = be.add(x, self.reading(step, x)) if self.reading else x
        if self.ffn is None:
            return self.out(step, x)
        x = tap(f"blk.{i}.resid_mid", x)
        f = self.feed(step, self.normed(step, x), start)
        f = tap(f"blk.{i}.ffn_post", self.ffn_post(f)) if self.ffn_post else f
        if self.side is not None and self.side_norm is not None:
            f = be.add(f, self.side(step, self.side_norm(start)))
        return self.out(step, self.finished(step, be.add(x, f, scale=self.scale)))

    def feed(self, step: Step, x: Array, start: Array | None = None) -> Array:
        """The feed-forward half, with its taps; some choose experts by the block's input ``start``."""
        x = step.tap(f"blk.{self.i}.ffn_norm", x)
        more = (start,) if self.routed_by_input else ()
        return step.tap(f"blk.{self.i}.ffn_out", self.ffn(step, x, *more))

    def out(self, step: Step, x: Array) -> Array:
        """What the next layer reads: with the layer's control vector, where the model was loaded with one."""
        x = x if self.control is None else self.be.add(x, self.control)
        return step.tap(f"blk.{self.i}.out", x)

    def finished(self, step: Step, x: Array) -> Array:
        """What the block hands on: with the layer's own embedding added, and scaled, where it has these."""
        if self.per_layer is not None:
            x = self.be.add(x, step.tap(f"blk.{self.i}.per_layer", self.per_layer(step, x)))
        return x if self.out_scale == 1 else self.be.scale_softcap(x, self.out_scale)

    def alone(self, step: Step, x: Array) -> Array:
        """The feed-forward half of a block that has no other, if it has this one."""
        if self.ffn is None:
            return x
        f = self.feed(step, self.normed(step, x))
        return self.be.add(x, f, scale=self.scale)

    def normed(self, step: Step, x: Array) -> Array:
        """What the feed-forward half reads."""
        name = f"blk.{self.i}.ffn_norm"
        return normed(step, name, self.ffn_norm, x) if self.ffn_norm else x


def is_parallel(c: Config, a: Arch, w: Tensors) -> bool:
    """Whether attention and feed-forward read the same input."""
    if a.residual == "file":
        return c.parallel_residual
    if a.residual == "norms":
        return not w.has("ffn_norm.weight")
    return a.residual == "parallel"


class Decoder:
    """Embedding, blocks, final norm and head of one file. Immutable; the states are elsewhere.

    ``w`` holds the tensors before the layers and ``end`` those behind them, which may be on another backend.
    """

    def __init__(
        self, c: Config, a: Arch, w: Tensors, layers: Iterable[Tensors], end: Tensors
    ) -> None:
        self.first, self.last, self.config = w.be, end.be, c
        w.require(*a.needs)
        self.read_beside_blocks(c, a, w, end)
        self.blocks = [(a.block or Block)(c, a, i, layer) for i, layer in enumerate(layers)]

    def read_beside_blocks(self, c: Config, a: Arch, w: Tensors, end: Tensors) -> None:
        """Load what stands before the blocks and behind them."""
        self.n_vocab = w.source("token_embd.weight").shape[0]
        self.token_embd = w.matrix("token_embd.weight", self.n_vocab, c.n_embd)
        self.adapters, self.embd_beside = w.adapters, w.beside("token_embd.weight")
        self.position_embd = None
        if a.position == "learned":
            self.position_embd = w.matrix("position_embd.weight", c.n_ctx_train, c.n_embd)
        self.token_type = self.token_types = None
        if w.has("token_types.weight"):
            n_type = w.source("token_types.weight").shape[0]
            self.token_types = w.matrix("token_types.weight", n_type, c.n_embd)
            self.token_type = w.be.array(w.host("token_types.weight")[0])
        taken = a.roles.get("output_norm") == "token_embd_norm"  # LFM2's last norm has that name
        self.embd_norm = None if taken else w.norm_if("token_embd_norm", c.n_embd)
        self.streams = a.streams(c, w, end) if a.streams else None
        self.output_norm = output_norm(c, a, end)
        self.output = self.head(end) if c.causal else None
        self.rank = RankHead(c, end) if c.pooling == "rank" else None
        self.pooled = Projections(end)

    def head(self, w: Tensors) -> Linear:
        """The output matrix; without one of its own, the embedding's rows serve ("tied")."""
        size = self.n_vocab, self.config.n_embd
        if w.has("output.weight"):
            return w.linear("output", *size)
        here = w.be is self.first
        rows = self.token_embd if here else w.matrix("token_embd.weight", *size)
        bias = w.optional("output.bias", self.n_vocab)
        return Linear(w.be, rows, bias, w.beside("output.weight"))

    @property
    def caches(self) -> list[LayerCache]:
        """What each layer keeps of the past."""
        return [b.mixer.cache for b in self.blocks]

    @property
    def source_caches(self) -> list[LayerCache]:
        """What each layer keeps of a text that was read before; none where one stack reads and writes."""
        return [b.reading.cache for b in self.blocks if b.reading]

    def embed(self, step: Step) -> Array:
        """Activations before the first block -> [T, E]."""
        be, batch, c = self.first, step.batch, self.config
        x = be.embed(self.token_embd, batch.ids, c.embedding_scale)
        if self.embd_beside is not None and not self.embd_beside.idle:
            x = self.embd_beside.added_to_embedding(x, batch.ids, c.embedding_scale)
        if c.n_embd_per_layer:
            step.carried.update(ids=batch.ids, embd=x)
        if self.position_embd is not None:
            x = be.add(x, be.embed(self.position_embd, batch.positions))
        if step.types is not None and self.token_types is not None:
            x = be.add(x, be.embed(self.token_types, step.types))
        elif self.token_type is not None:
            x = be.add(x, self.token_type)
        x = self.embd_norm(x) if self.embd_norm else x
        return step.tap("embd", self.streams.begin(step, x) if self.streams else x)

    def through(self, step: Step, x: Array, layers: range) -> Array:
        """Activations x [T, E] after these blocks -> [T, E]."""
        for block in self.blocks[layers.start : layers.stop]:
            x = block(step, x)
        return x

    def store(self, step: Step, x: Array) -> Array:
        """Store what the layers keep of a source, x [S, E] as the encoder's layers leave it."""
        for reading in filter(None, (b.reading for b in self.blocks)):
            reading.store(step, x)
        return x

    def body(self, step: Step, x: Array) -> Array:
        """Leave the last block's activations as they are: only what the caches keep is wanted."""
        return x

    def hidden(self, step: Step, x: Array) -> Array:
        """Normalised activations of the rows in ``batch.outputs`` -> [n_out, E]."""
        x = self.streams.end(step, x) if self.streams else x
        x = self.last.take(x, step.batch.outputs)
        if self.output_norm is not None:
            x = normed(step, "output_norm", self.output_norm, x)
        return step.tap("output_norm", x)

    def logits(self, step: Step, x: Array) -> Array:
        """Logits of the rows in ``batch.outputs`` -> [n_out, V]."""
        assert self.output is not None
        c = self.config
        y = self.output(self.hidden(step, x))
        if c.logit_scale != 1 or c.logit_softcap:
            y = self.last.scale_softcap(y, c.logit_scale, c.logit_softcap)
        return step.tap("logits", y)
