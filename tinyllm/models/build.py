"""From a file's keys and tensors to a Network, with a check that everything in the file is understood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import GGUFError, UnsupportedModel
from ..kernels.backend import Backend, KVType
from .adapters import Adapters
from .archs import Arch, find
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
    arch, config = configured(arch, keys)
    if arch.tied_scale and "output.weight" not in tensors:
        config = replace(config, logit_scale=config.n_embd**-0.5)
    reader = configured(find(arch.reader), keys) if arch.reader else None
    check_vocabulary(metadata, keys, tensors)
    refuse(keys.unknown(), "unknown keys, which may change the mathematics", strict)
    tensors = without_skipped(tensors, config)
    for a, c in filter(None, (reader, (arch, config))):
        check_layers(tensors, c, a.gated)
    stages = (
        [Stage(where, range(config.n_layer))]
        if isinstance(where, Backend)
        else where(config.n_layer)
    )
    if reader is not None and len(stages) > 1:
        raise UnsupportedModel(
            f"{arch.name} reads with one stack of layers and writes with another; put all on one device"
        )
    for stage, need in zip(stages, stage_bytes(tensors, stages, config.blocks), strict=True):
        advice = "Use a smaller model or format, or another n_gpu_layers"
        check_fits(stage.be, need, "the weights", advice)
    root = Tensors(tensors, stages[0].be, config, adapters=adapters)
    root.adapters.check_control(config.n_layer, config.n_embd)
    if root.adapters.control and (arch.streams or reader):
        raise UnsupportedModel(
            f"{arch.name} has more than one residual stream; it takes no control="
        )
    if metadata.get("tokenizer.ggml.token_type_count", 0) > 1:
        root.require("token_types.weight")
    reads = None
    if reader is not None:
        alone = [Stage(stages[0].be, range(reader[1].n_layer))]
        stack = decoder_of(*reader, root.seen_as(reader[1]), alone, progress)
        reads = Network(reader[1], reader[0], stack, alone, kv_type)
    decoder = decoder_of(arch, config, root, stages, progress)
    check_sources(decoder, stages)
    if config.start_id >= decoder.n_vocab:
        raise GGUFError(
            f"is {config.start_id}; expected a token, 0 to {decoder.n_vocab - 1}",
            name=f"{arch.name}.decoder_start_token_id",
        )
    root.adapters.check_used()
    refuse(root.leftovers(), "tensors that this architecture does not use", strict)
    return Network(config, arch, decoder, stages, kv_type, reads)


def configured(arch: Arch, keys: Keys) -> tuple[Arch, Config]:
    """What a row makes of a file's keys, and the row with what the keys say of it."""
    config = arch.adjust(read_config(keys))
    if arch.norm:
        config = replace(config, norm=arch.norm)
    config = replace(config, blocks_at=arch.blocks_at)
    if config.act is not None:
        arch = replace(arch, act=config.act)
    if config.window_pattern >= 0 and not config.window_listed:
        raise GGUFError(
            f"is {config.window_pattern}; expected for each layer whether it has a window",
            name=f"{keys.prefix}attention.sliding_window_pattern",
        )
    return arch, config


def decoder_of(
    arch: Arch, config: Config, root: Tensors, stages: Sequence[Stage], progress: Progress
) -> Decoder:
    """Load one stack of layers, with what stands before and behind it."""
    layers = [root.layer(i, s.be) for s in stages for i in s.layers]
    end = root.below("", stages[-1].be)
    return Decoder(config, arch, root, progress(layers, config.n_layer), end)


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
