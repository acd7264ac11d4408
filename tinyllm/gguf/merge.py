"""Writing a model again with adapters added to its matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from . import quants
from .adapter import EMBEDDING, Adapter, product, read_adapter
from .finite import checked_scale
from .quantize import Report, check_threads, deferred, paths
from .reader import open_file
from .writer import write

Floats = npt.NDArray[np.float32]
HEAD = "output.weight"
AdapterPath = str | os.PathLike[str]


def merge(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    lora: Sequence[AdapterPath | tuple[AdapterPath, float]],
    *,
    n_threads: int | None = None,
    part_bytes: int | None = None,
    report: Report | None = None,
) -> dict[str, str]:
    """Write a model again with adapters in its weights, each tensor in the type that it has.

    Parameters
    ----------
    src : path-like
        A GGUF file, or the first part of a split one. Quantised matrices that an adapter changes are quantised
        again, which rounds them a second time: F16 is the better source. Where an adapter changes an
        embedding that is the head too, or that head, the head is written beside it: what is for one is not
        for the other.
    dst : path-like
        The file to write; it appears only when it is complete.
    lora : sequence of path-like or (path-like, float)
        Adapters, GGUF files or folders that PEFT has saved, each with its scale (1 unless said).
    n_threads : int, optional
        All cores by default.
    part_bytes : int, optional
        Split the new file into parts with about so many bytes each.
    report : callable, optional
        Called with the name, the old and the new type of each tensor when its turn comes.

    Returns
    -------
    dict
        The type of each tensor by name.

    Raises
    ------
    ArgumentError
        There are no adapters, `dst` is `src`, or a changed tensor has a type that we do not write.
    GGUFError, UnsupportedModel
        A file is damaged, or an adapter does not fit the model.

    Examples
    --------
    >>> import tinyllm
    >>> types = tinyllm.merge("model-f16.gguf", "merged.gguf", [("my-adapter", 0.5)])  # doctest: +SKIP
    """
    src, dst = paths(src, dst)
    check_threads(n_threads)
    if not lora:
        raise ArgumentError("lora names no adapter; expected at least one")
    with open_file(src) as file, ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        tied = HEAD not in shapes and EMBEDDING in shapes
        if tied:  # an adapter of the head then stands beside the embedding's product
            shapes[HEAD] = shapes[EMBEDDING]
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in lora]
        adapters = [
            (read_adapter(p, file.metadata, shapes), checked_scale(scale)) for p, scale in pairs
        ]
        blocks = {}
        for name, tensor in file.tensors.items():
            mine = changing(name, adapters)
            head = changing(HEAD, adapters) if tied and name == EMBEDDING else []
            if (mine or head) and not quants.FORMATS[tensor.type].quantize:
                raise ArgumentError(
                    f"{name} is {tensor.type}, which we do not write; merge into an F16 file"
                )
            more = partial(changed, name, mine) if mine else None
            blocks[name] = deferred(tensor, tensor.type, pool, report, more)
            if head or (mine and tied and name == EMBEDDING):
                more = partial(changed, HEAD, head) if head else None
                blocks[HEAD] = deferred(tensor, tensor.type, pool, None, more)
        kept = {k: v for k, v in file.exact_metadata.items() if not k.startswith("split.")}
        sources = [*file.paths, *(path for path, _ in pairs)]
        write(dst, kept, blocks, part_bytes=part_bytes, sources=sources)
        return {name: block.type for name, block in blocks.items()}


def changing(name: str, adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """Those of the adapters, with their scales, that change a tensor."""
    return [(a, scale) for a, scale in adapters if name in a.pairs]


def changed(name: str, adapters: Sequence[tuple[Adapter, float]], start: int, stop: int) -> Floats:
    """What adapters with these scales add to some rows of a tensor."""
    parts = [np.float32(s) * product(name, a.pairs[name], start, stop) for a, s in adapters]
    total: Floats = np.sum(parts, axis=0)
    return total
