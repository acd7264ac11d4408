"""A logit as a sum: what layers, heads and neurons add to it, with the last norm's magnitude held fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ArgumentError, UnsupportedModel
from ..gguf.adapter import product
from ..gguf.quants import dequantize
from .cache import run_with_cache
from .points import whole

if TYPE_CHECKING:
    from ..gguf import Tensor
    from ..models.decoder import Block
    from ..models.network import Network
    from ..models.weights import Norm

By = Literal["layers", "heads", "neurons"]


@dataclass(frozen=True)
class Attribution:
    """What parts of a model add to a logit, or to the difference of two, at one position.

    ``values`` [layers, 2] for layers (attention, feed-forward), [layers, heads] or [layers, neurons]; NaN where
    a layer has fewer. ``embd`` is the part of the embedding, ``constant`` that of the last norm's bias, and
    ``rest`` what is left of ``total``, the logit before a soft cap: other parts than those asked for, biases,
    and what rounding makes of the products.
    """

    by: By
    values: np.ndarray
    embd: float
    constant: float
    total: float

    @property
    def rest(self) -> float:
        """What the parts together leave of the total."""
        return float(self.total - np.nansum(self.values) - self.embd - self.constant)

    def top(self, n: int = 10) -> list[tuple[int, int, float]]:
        """The n parts that add or take most: (layer, number, value), the largest first."""
        flat = np.nan_to_num(self.values).ravel()
        order = np.argsort(-np.abs(flat), kind="stable")[:n]
        width = self.values.shape[1]
        return [(int(i) // width, int(i) % width, float(flat[i])) for i in order]


def attribute(
    net: Network,
    tensors: Mapping[str, Tensor],
    ids: list[int],
    token: int,
    against: int | None,
    position: int,
    by: By,
) -> Attribution:
    """``Model.attribute`` for a prompt that is ids."""
    check_adds(net)
    at = whole(position, "position")
    if not -len(ids) <= at < len(ids):
        raise ArgumentError(f"position={at}; the prompt has {len(ids)} tokens")
    kinds = {"layers": [], "heads": ["attn_result", "attn_out"], "neurons": ["ffn_act", "ffn_out"]}
    if by not in kinds:
        raise ArgumentError(f"by={by!r:.40}; expected one of {', '.join(kinds)}")
    names = ["embd", "resid_mid", "out", "output_norm_scale", *kinds[by]]
    cache = run_with_cache(net, [ids], names, at, "float32", None)[0]
    assert cache.logits is not None
    norm = net.decoder.output_norm
    row = head_row(net, tensors, token)
    row = row if against is None else row - head_row(net, tensors, against)
    row = row * np.float32(net.config.logit_scale)
    constant = 0.0
    direction = row if norm is None else row * host(net, norm.weight, 1.0)
    if norm is not None:
        constant = float(row @ np.broadcast_to(host(net, norm.bias, 0.0), row.shape))
        if norm.kind != "rms":
            direction = direction - direction.mean()
        direction = direction / cache["output_norm_scale"][0, 0]
    n = net.config.n_layer
    stream = [cache["embd"][0], *(cache[f"blk.{i}.out"][0] for i in range(n))]
    found = []
    for i, block in enumerate(net.decoder.blocks):
        if by == "layers":
            middle = cache[f"blk.{i}.resid_mid"][0]
            added = 0.0 if block.control is None else block.be.numpy(block.control)
            steered = np.float32(added)  # the rest: no half made it
            halves = middle - stream[i], stream[i + 1] - middle - steered
            found.append(np.array(halves) @ direction)
        elif by == "heads" and f"blk.{i}.attn_result" in cache:
            onto = through(net, block, block.attn_post, cache[f"blk.{i}.attn_out"][0], direction)
            found.append(cache[f"blk.{i}.attn_result"][0] @ onto)
        elif by == "neurons" and f"blk.{i}.ffn_act" in cache:
            onto = through(net, block, block.ffn_post, cache[f"blk.{i}.ffn_out"][0], direction)
            name = f"blk.{net.config.blocks[i]}.ffn_down.weight"
            down = rows_of(net, tensors[name], name, 0, len(onto))
            found.append(cache[f"blk.{i}.ffn_act"][0] * (onto @ down))
        else:
            found.append(np.empty(0, np.float32))
    values = np.full((n, max(len(x) for x in found)), np.nan)
    for line, x in zip(values, found, strict=True):
        line[: len(x)] = x
    total = float(direction @ stream[-1]) + constant
    return Attribution(by, values, float(direction @ stream[0]), constant, total)


def check_adds(net: Network) -> None:
    """Raise UnsupportedModel unless each layer adds its two halves to one residual stream."""
    d, c = net.decoder, net.config
    adds = d.streams is None and c.causal and all(b.norm_at != "after" for b in d.blocks)
    plain = all(b.out_scale == 1 and not b.parallel and b.per_layer is None for b in d.blocks)
    if not adds or not plain:
        raise UnsupportedModel(
            f"{net.arch.name}: its layers do not add two halves to one residual stream, one after the other"
        )


def head_row(net: Network, tensors: Mapping[str, Tensor], token: int) -> np.ndarray:
    """The row of the output matrix that makes a token's logit, float32 [E]."""
    if not 0 <= token < net.n_vocab:
        raise ArgumentError(f"token {token}; expected 0 to {net.n_vocab - 1}")
    tensor = tensors.get("output.weight") or tensors["token_embd.weight"]
    return np.asarray(rows_of(net, tensor, "output.weight", token, token + 1)[0])


def rows_of(net: Network, tensor: Tensor, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a matrix, with what adapters add to the tensor of this name: float32 [stop - start, n_in]."""
    x = dequantize(tensor.type, tensor.read_rows(start, stop))
    for scale, pair in net.adapters.of(name):
        x = x + np.float32(scale) * product(name, pair, start, stop)
    return np.asarray(x)


def host(net: Network, x: Any, otherwise: float) -> Any:
    """A small array of the last device, or a number where there is none."""
    return otherwise if x is None else np.array(net.be.numpy(x))


def through(
    net: Network, block: Block, norm: Norm | None, out: np.ndarray, direction: np.ndarray
) -> np.ndarray:
    """The direction before a half's norm, whose magnitude is that of its output ``out``."""
    direction = direction * np.float32(block.scale)
    if norm is None:
        return direction
    weight = np.array(block.be.numpy(norm.weight))
    centred = out if norm.kind == "rms" else out - out.mean()
    scale = np.sqrt((centred * centred).mean() + np.float32(norm.eps))
    onto = direction * weight / scale
    return np.asarray(onto if norm.kind == "rms" else onto - onto.mean())
