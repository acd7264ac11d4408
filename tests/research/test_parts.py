"""What heads, neurons and biases add is the residual stream, in every architecture, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_points import NAMES, file_of, network

from tinyllm import gguf
from tinyllm.models.altup import AltUpBlock
from tinyllm.models.ffn import (
    FFN,
    XIELU,
    BesideMoE,
    Choices,
    FeedForwardAlone,
    MoE,
    NormedBesideMoE,
)
from tinyllm.models.loops import LoopBlock, RoundsBlock
from tinyllm.models.mixer import NoMixer
from tinyllm.models.network import Network
from tinyllm.models.rwkv import ChannelMix
from tinyllm.research.cache import run_with_cache

BOUND = 1e-5  # x the largest value of the residual stream


def host(x: Any) -> Any:
    """A small array, or 0 where there is none."""
    return 0 if x is None else np.array(x, np.float64)


def normed(norm: Any, x: np.ndarray) -> np.ndarray:
    """A norm: linear in parts of x once its magnitude is known."""
    if norm is None:
        return x
    centred = x if norm.kind == "rms" else x - x.mean(-1, keepdims=True)
    rows = centred.reshape(len(x), -1, norm.group or x.shape[-1])
    scale = np.sqrt((rows * rows).mean(-1, keepdims=True) + norm.eps)
    weight = 1 if norm.weight is None else host(norm.weight)
    return (rows / scale).reshape(x.shape) * weight + host(norm.bias)


class Parts:
    """The parts of one layer's halves, of the points that a pass has shown and the file's matrices."""

    def __init__(self, net: Network, tensors: Mapping[str, Any], cache: Any, i: int) -> None:
        self.block, self.cache, self.i = net.decoder.blocks[i], cache, i
        self.at, self.of = f"blk.{i}.", f"{net.arch.blocks_at}.{net.config.blocks[i]}."
        self.tensors = tensors

    def point(self, kind: str) -> np.ndarray:
        return np.asarray(self.cache[self.at + kind], np.float64)

    def weight(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[self.of + name].dequantize(), np.float64)

    def bias(self, name: str) -> Any:
        return self.weight(name) if self.of + name in self.tensors else 0

    def heads(self) -> np.ndarray:
        """What heads and the bias add; all that a mixer adds that is a recurrence, or has one."""
        mixer: Any = self.block.mixer
        if isinstance(mixer, FeedForwardAlone):
            return self.half(mixer.half)
        if self.at + "attn_result" not in self.cache or not hasattr(mixer, "o"):
            return self.point("attn_out")
        return self.point("attn_result").sum(1) + host(mixer.o.bias)

    def half(self, ffn: Any) -> np.ndarray:
        """What the neurons and biases of a feed-forward half add."""
        if isinstance(ffn, FFN | XIELU):
            return self.neurons(ffn)
        if isinstance(ffn, MoE):
            return self.experts(ffn)
        if isinstance(ffn, BesideMoE):
            return (self.neurons(ffn.plain) + self.experts(ffn.experts)) * ffn.scale
        if isinstance(ffn, NormedBesideMoE):
            plain = normed(ffn.plain_post, self.neurons(ffn.plain))
            return plain + normed(ffn.experts_post, self.experts(ffn.experts))
        assert isinstance(ffn, ChannelMix), ffn
        return self.mixed_channels(ffn)

    def mixed_channels(self, ffn: ChannelMix) -> np.ndarray:
        """What RWKV's neurons add; those of its sixth version behind a gate that also reads the row before."""
        y = self.point("ffn_act") @ self.weight("channel_mix_value.weight").T
        if ffn.receptance is None:
            return np.asarray(y)
        x = self.point("ffn_norm")
        before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
        x = x + (before - x) * self.weight("channel_mix_lerp_r.weight").ravel()
        return np.asarray(y / (1 + np.exp(-x @ self.weight("channel_mix_receptance.weight").T)))

    def neurons(self, ffn: FFN | XIELU, suffix: str = "") -> np.ndarray:
        """What the neurons of a plain half, or of the expert that all tokens share, and the bias add."""
        act = normed(getattr(ffn, "norm", None), self.point(f"ffn_act{suffix}"))
        down = f"ffn_down{suffix}"
        return act @ self.weight(f"{down}.weight").T + self.bias(f"{down}.bias")

    def chosen(
        self, choices: Choices, suffix: str, which: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """What the neurons of the experts ``which`` [T, k] add, weighed."""
        down = self.weight(f"ffn_down_{suffix}.weight")
        each = np.einsum("tkef,tkf->tke", down[which], self.point(f"ffn_act_{suffix}"))
        if choices.down.bias is not None:
            each += self.weight(f"ffn_down_{suffix}.bias")[which]
        if choices.down_scale is not None:
            weights = weights * self.weight(f"ffn_down_{suffix}.scale")[which]
        return np.asarray((each * weights[..., None]).sum(1))

    def experts(self, moe: MoE) -> np.ndarray:
        """What the neurons of the chosen experts add, each as much as the router says."""
        logits = moe.be.array(self.cache[self.at + "router_logits"])
        chosen = np.array(moe.be.route(logits, moe.routing, moe.bias)[0])
        weights = np.take_along_axis(self.point("router_probs"), chosen, 1)
        if moe.chosen.inputs:  # the weights are in the neurons
            weights = np.ones_like(weights)
        total = self.chosen(moe.chosen, "exps", chosen, weights)
        if moe.small is not None:
            own = np.asarray(moe.small_of)[:, 0][chosen]
            total = total + moe.small_scale * self.chosen(moe.small, "chexps", own, weights)
        if moe.wide is not None:
            total = total @ self.weight("ffn_latent_up.weight").T
        if moe.shared is not None:
            extra = self.neurons(moe.shared, "_shexp")
            if moe.shared_gate is not None:
                gate = self.point("ffn_norm") @ self.weight("ffn_gate_inp_shexp.weight").ravel()
                extra = extra / (1 + np.exp(-gate))[:, None]
            total = total + extra
        return np.asarray(total * moe.scale)


def stream_of(p: Parts, start: np.ndarray) -> np.ndarray:
    """The residual stream after a layer that reads ``start``, put together of its parts."""
    b = p.block
    if isinstance(b.mixer, NoMixer):
        return start if b.ffn is None else start + b.scale * p.half(b.ffn)
    y = p.heads()
    if b.norm_at == "after":
        middle = normed(b.attn_post, start + y)
        return normed(b.ffn_post, middle + p.half(b.ffn))
    middle = start + b.scale * normed(b.attn_post, y)
    if b.ffn is None:
        return middle
    if b.parallel:
        return middle + b.scale * p.half(b.ffn)
    f = normed(b.ffn_post, p.half(b.ffn))
    if b.side is not None:
        f = f + p.experts(b.side)
    total = middle + b.scale * f
    if b.per_layer is not None:
        total = total + p.point("per_layer")
    return total * b.out_scale


def first_streams(x: np.ndarray, tensors: Mapping[str, Any]) -> np.ndarray:
    """Gemma 3n's streams [n, T, E] before the first layer: the embedding, and others of its magnitude."""
    matrices = np.asarray(tensors["altup_proj.weight"].dequantize(), np.float64)
    others = [x @ matrix.T for matrix in matrices]
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.stack([x, *(y * size / np.linalg.norm(y, axis=1, keepdims=True) for y in others)])


def streams_of(p: Parts, streams: np.ndarray) -> np.ndarray:
    """Gemma 3n's streams after a layer: mixtures of those before, moved by what the first one's parts add."""
    b, n = p.block, len(streams)

    def kinds(x: np.ndarray) -> np.ndarray:
        inner = normed(b.router_norm, x) / x.shape[1]
        return np.asarray(np.tanh(inner @ p.weight("altup_router.weight").T))

    mix = kinds(streams[0]) @ p.weight("altup_predict_coef.weight").T
    predicted = streams + np.einsum("tjk,kte->jte", mix.reshape(-1, n, n), streams)
    active = predicted[0]
    h = normed(b.attn_norm, active)
    low = h @ p.weight("laurel_l.weight").T @ p.weight("laurel_r.weight").T
    y = active + h + normed(b.laurel_norm, low) + normed(b.attn_post, p.heads())
    y = y * np.sqrt(0.5)
    y = y + normed(b.ffn_post, p.half(b.ffn))
    share = kinds(y) @ p.weight("altup_correct_coef.weight").T
    after = predicted + (1 + share.T[..., None]) * (y - active)
    after[1:] += p.point("per_layer")
    return np.asarray(after)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() <= BOUND * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_heads_neurons_and_biases_make_the_residual_stream(name: str, data: Path) -> None:
    """Each layer's parts, and with them the whole: what a layer starts from is what the last one made."""
    net, ids = network(name, "reference")
    cache = run_with_cache(net, [ids], lambda n: True, None, "float32", None)[0]
    with gguf.open(file_of(name)) as f:
        stream = np.asarray(cache["embd"], np.float64)
        altup = isinstance(net.decoder.blocks[0], AltUpBlock)
        streams = first_streams(stream, f.tensors) if altup else stream
        low = None if net.decoder.streams is None else getattr(net.decoder.streams, "low", None)
        for i, block in enumerate(net.decoder.blocks):
            p = Parts(net, f.tensors, cache, i)
            if altup:
                streams = streams_of(p, streams)
                assert near(streams[0], cache[p.at + "out"]), i
                continue
            if isinstance(block, LoopBlock):
                stream = normed(block.again, stream)
            if isinstance(block, RoundsBlock) and block.begins:
                stream = normed(block.norm, stream)
                stream, low = stream + host(low), stream if block.turns else low
            stream = stream_of(p, stream)
            assert near(stream, cache[p.at + "out"]), i
