"""What a GGUF file holds, and how it would run here, without reading its weights."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .. import tokenizers
from ..errors import TinyLLMError
from ..gguf import GGUFFile, StringArray, Tensor
from ..kernels.backend import KVType, Source
from ..kernels.reference import ReferenceBackend
from ..models.archs import Arch
from ..models.build import build
from ..models.memory import cache_bytes, readable
from ..models.network import Network

CAPTION = 14  # columns


@dataclass(frozen=True)
class Outline:
    """A matrix that was not read."""

    type: str
    shape: tuple[int, ...]
    nbytes: int


class Outlines(ReferenceBackend):
    """Loads nothing: a network built on it checks the file, and knows its sizes."""

    def load(self, source: Source, rows: np.ndarray | slice | None = None) -> Outline:
        return Outline(source.type, source.shape, 0)


def outline(file: GGUFFile, kv_type: KVType) -> tuple[Network | None, str]:
    """The network of a file, without weights; and "yes", or why it does not run."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build_args = (file.metadata, file.tensors, Outlines(), kv_type)
            network = build(*build_args, strict=False)
    except TinyLLMError as e:
        return None, f"no: {e}"
    doubts = [str(w.message) for w in caught]
    return network, f"only with strict=False: {'; '.join(doubts)}" if doubts else "yes"


def report(file: GGUFFile, n_ctx: int | None = None, kv_type: KVType = "f16") -> Iterator[str]:
    """The lines of the report on a file and on the memory that ``n_ctx`` tokens take."""
    network, runs = outline(file, kv_type)
    yield from entry("file", f"{file.path}, GGUF {file.version}, {file.byteorder}-endian")
    yield from entry("name", text(file.metadata.get("general.name", "not said")))
    yield from architecture(file.metadata, network)
    yield from entry("runs", text(runs))
    yield from weights(file.tensors)
    if network is not None:
        yield from entry("memory", memory(file, network, n_ctx, kv_type))
    yield from entry("tokenizer", tokenizer(file.metadata))
    template = file.metadata.get("tokenizer.chat_template")
    yield from entry("chat template", "none" if template is None else "")
    if template is not None:
        yield text(template)


def as_json(file: GGUFFile, n_ctx: int | None = None, kv_type: KVType = "f16") -> dict[str, Any]:
    """What the report says, for programs: bytes and counts as numbers."""
    network, runs = outline(file, kv_type)
    found: dict[str, Any] = {
        "file": str(file.path),
        "version": file.version,
        "byteorder": file.byteorder,
        "name": file.metadata.get("general.name"),
        "architecture": file.metadata.get("general.architecture"),
        "runs": network is not None,
        "doubts": None if runs == "yes" else runs,
        "n_params": sum(t.n_elements for t in file.tensors.values()),
        "nbytes": sum(t.nbytes for t in file.tensors.values()),
        "formats": dict(Counter(t.type for t in file.tensors.values())),
        "tokenizer": tokenizer(file.metadata),
        "chat_template": file.metadata.get("tokenizer.chat_template"),
    }
    if network is not None:
        c = network.config
        found |= {
            "n_layer": c.n_layer,
            "n_embd": c.n_embd,
            "n_ctx_train": c.n_ctx_train,
            "n_vocab": network.n_vocab,
            "causal": c.causal,
            "cache_nbytes": cache_bytes(network.decoder.caches, n_ctx or c.n_ctx_train, kv_type),
        }
    return found


def entry(caption: str, *values: str) -> Iterator[str]:
    """A caption and its lines beside it."""
    for i, value in enumerate(values):
        yield f"{'' if i else caption:<{CAPTION}} {value}".rstrip()


def text(value: object) -> str:
    """A file's string, its control characters made visible: a terminal obeys some of them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(value))


# ---- architecture


def architecture(metadata: Mapping[str, Any], network: Network | None) -> Iterator[str]:
    name = metadata.get("general.architecture", "not said")
    if network is None:
        yield from entry("architecture", text(name))
        return
    c = network.config
    yield from entry(
        "architecture", f"{network.arch.name} ({network.arch.source})", row(network.arch)
    )
    heads = f"{spread(c.n_head)} heads of {c.head_dim}, {spread(c.n_head_kv)} for keys and values"
    yield from entry(
        "layers",
        f"{c.n_layer}, n_embd {c.n_embd}, n_ff {spread(c.n_ff)}, {heads}",
        *([f"{c.n_expert} experts, {c.n_expert_used} used"] if c.n_expert else []),
    )
    kind = "causal" if c.causal else f"an encoder, pooling {c.pooling or 'not said'}"
    yield from entry("context", f"trained for {c.n_ctx_train} tokens; {kind}")


def row(arch: Arch) -> str:
    """The fields of an architecture's row that differ from the defaults."""
    plain = Arch("", "")
    said = [
        f"{f.name}={shown(getattr(arch, f.name))}"
        for f in fields(Arch)
        if f.name not in ("name", "source") and getattr(arch, f.name) != getattr(plain, f.name)
    ]
    return ", ".join(said) or "all as the tensors and keys say"


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value)
    return str(getattr(value, "__name__", value))


def spread(values: Sequence[int]) -> str:
    """The number of all layers if they have the same, else the least and the largest."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


# ---- weights and memory


def weights(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Parameters, bits per weight, and each format with the kernel that would multiply by it."""
    n = sum(t.n_elements for t in tensors.values())
    nbytes = sum(t.nbytes for t in tensors.values())
    if not n:
        yield from entry("parameters", "none: a vocabulary only")
        return
    yield from entry(
        "parameters", f"{n:,} in {readable(nbytes)}: {8 * nbytes / n:.2f} bits per weight"
    )
    by_type: dict[str, list[Tensor]] = defaultdict(list)
    for t in tensors.values():
        by_type[t.type].append(t)
    largest_first = sorted(by_type.items(), key=lambda item: -sum(t.nbytes for t in item[1]))
    yield from entry("formats", *(format_line(name, ts) for name, ts in largest_first))


def format_line(name: str, tensors: Sequence[Tensor]) -> str:
    n, nbytes = sum(t.n_elements for t in tensors), sum(t.nbytes for t in tensors)
    bits = 8 * nbytes / n if n else 0.0
    kernel = kernel_of(name) if any(len(t.shape) > 1 for t in tensors) else "vectors, as float32"
    return f"{name:<8} {len(tensors):>4} tensors {readable(nbytes):>9} {bits:>6.2f} bits  {kernel}"


def kernel_of(name: str) -> str:
    """How the cpu backend multiplies by a matrix of this format."""
    from ..kernels.cpu import emit, formats

    if name in formats.FORMATS:
        return f"cpu: int8 products ({emit.instruction_set()})"
    if name in ("F32", "F16", "BF16"):
        return "cpu: float32 products"
    return "cpu: not supported"


def memory(file: GGUFFile, network: Network, n_ctx: int | None, kv_type: KVType) -> str:
    """Bytes of weights and of one conversation."""
    loaded = readable(sum(t.nbytes for t in file.tensors.values()))
    if not network.config.causal:
        return f"{loaded} of weights as stored"
    n = n_ctx or network.config.n_ctx_train
    cache = readable(cache_bytes(network.decoder.caches, n, kv_type))
    return f"{loaded} of weights as stored, {cache} for each conversation of {n} tokens ({kv_type})"


# ---- tokenizer


def tokenizer(metadata: Mapping[str, Any]) -> str:
    try:
        t = tokenizers.load(metadata)
    except TinyLLMError as e:
        return f"none that we run: {text(e)}"
    pre = f" ({t.pre})" if t.kind == "bpe" and t.pre else ""
    if t.kind == "bpe" and "tokenizer.ggml.pre" not in metadata:
        pre = " (the file does not say how texts are cut into words; the default is used)"
    special = [
        f"{role} {i} {text(t.token_text(i))}"
        for role in ("bos", "eos", "eot", "unk", "sep", "pad", "mask")
        if (i := getattr(t, role)) is not None
    ]
    return ", ".join([f"{t.kind}{pre}, {t.n_vocab} tokens", *special])


# ---- everything


def keys(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Every metadata key with its value, long ones cut."""
    for key, value in metadata.items():
        yield f"{text(key)} = {text(brief(value))}"


def brief(value: Any) -> str:
    if isinstance(value, (np.ndarray, StringArray, list)):
        first = value[:4].tolist() if isinstance(value, np.ndarray) else value[:4]
        head = ", ".join(map(repr, first))
        return f"[{head}{', ...' if len(value) > 4 else ''}] ({len(value)} values)"
    found = repr(value) if isinstance(value, str) else str(value)
    return found if len(found) <= 160 else f"{found[:160]}... ({len(found)} characters)"


def tensor_lines(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Every tensor: name, type, shape, bytes."""
    for t in tensors.values():
        yield f"{text(t.name):<40} {t.type:<8} {list(t.shape)!s:<22} {readable(t.nbytes):>9}"
