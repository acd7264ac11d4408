"""From a file's keys and tensors to a Network, with a check that everything in the file is understood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import GGUFError, UnsupportedModel
from ..kernels.backend import Backend, KVType
from .adapters import Adapters
from .archs import find
from .config import Config, architecture, read_config
from .decoder import Decoder
from .keys import CONTEXT, Keys
from .memory import check_fits
from .network import Network
from .stages import Place, Stage, stage_bytes
from .weights import Stored, Tensors, check_layers

Progress = Callable[[Iterable[Tensors], int], Iterable[Tensors]]


def build(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    where: Backend | Place,
    kv_type: KVType = "f16",
    strict: bool = True,
    progress: Progress = lambda layers, n: layers,
    adapters: Adapters | None = None,
) -> Network:
    """Load the weights of a file to one backend, or to several stages, and check that all is understood.

    Raises
    ------
    UnsupportedModel
        The architecture, a key or a tensor is not known; with ``strict=False`` the latter two are warnings.
    GGUFError
        A key or tensor is missing, misshapen or contradicts another.
    """
    arch = find(architecture(metadata))
    keys = Keys(metadata, arch.name)
    config = arch.adjust(read_config(keys))
    if arch.norm:
        config = replace(config, norm=arch.norm)
    config = replace(config, blocks_at=arch.blocks_at)
    if config.act is not None:
        arch = replace(arch, act=config.act)
    if config.window_pattern >= 0 and not config.window_listed:
        raise GGUFError(
            f"is {config.window_pattern}; expected for each layer whether it has a window",
            name=f"{arch.name}.attention.sliding_window_pattern",
        )
    check_vocabulary(metadata, keys, tensors)
    refuse(keys.unknown(), "unknown keys, which may change the mathematics", strict)
    tensors = without_skipped(tensors, config)
    check_layers(tensors, config, arch.gated)
    stages = (
        [Stage(where, range(config.n_layer))]
        if isinstance(where, Backend)
        else where(config.n_layer)
    )
    for stage, need in zip(stages, stage_bytes(tensors, stages, config.blocks), strict=True):
        advice = "Use a smaller model or format, or another n_gpu_layers"
        check_fits(stage.be, need, "the weights", advice)
    root = Tensors(tensors, stages[0].be, config, adapters=adapters)
    root.adapters.check_control(config.n_layer, config.n_embd)
    if root.adapters.control and arch.streams:
        raise UnsupportedModel(f"{arch.name} has several residual streams; it takes no control=")
    if metadata.get("tokenizer.ggml.token_type_count", 0) > 1:
        root.require("token_types.weight")
    layers = [root.layer(i, s.be) for s in stages for i in s.layers]
    end = root.below("", stages[-1].be)
    decoder = Decoder(config, arch, root, progress(layers, config.n_layer), end)
    check_sources(decoder, stages)
    root.adapters.check_used()
    refuse(root.leftovers(), "tensors that this architecture does not use", strict)
    return Network(config, arch, decoder, stages, kv_type)


def without_skipped(tensors: Mapping[str, Stored], c: Config) -> Mapping[str, Stored]:
    """The tensors but those of the layers that guess further tokens: the next one needs none of them."""
    behind = tuple(f"blk.{i}." for i in range(c.n_layer, c.n_layer + c.n_skipped))
    return {n: t for n, t in tensors.items() if not n.startswith(behind)} if behind else tensors


def check_sources(decoder: Decoder, stages: Sequence[Stage]) -> None:
    """Raise UnsupportedModel if a layer reads keys that are kept on another device."""
    for stage in stages:
        for i in stage.layers:
            source = decoder.blocks[i].mixer.source
            if source >= 0 and source not in stage.layers:
                raise UnsupportedModel(
                    f"layer {i} reads the keys of layer {source}, which is on another device; "
                    "put all layers on one device"
                )


def check_vocabulary(
    metadata: Mapping[str, Any], keys: Keys, tensors: Mapping[str, Stored]
) -> None:
    """Raise GGUFError unless every row of the embedding has a token, and every token a row."""
    embedding = tensors.get("token_embd.weight")
    n_rows = 0 if embedding is None else embedding.shape[0]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    counts = {"tokenizer.ggml.tokens": len(tokens) if len(tokens) else n_rows}
    counts[keys.prefix + "vocab_size"] = keys.whole("vocab_size", n_rows, high=CONTEXT)
    for name, n in counts.items():
        if n_rows and n != n_rows:
            raise GGUFError(f"counts {n} tokens; token_embd.weight has {n_rows} rows", name=name)


def refuse(names: Sequence[str], what: str, strict: bool) -> None:
    """Raise UnsupportedModel for what is not understood, or warn if not ``strict``."""
    if not names:
        return
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    message = f"the file has {what}: {shown}"
    if strict:
        raise UnsupportedModel(f"{message}. Load with strict=False to ignore them")
    warnings.warn(message, stacklevel=4)
