"""Embeddings as GPT4All makes them: task prefixes, chunks of long texts, Matryoshka dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine.tasks import SPEC_OF, Spec
from ..errors import TinyLLMError
from .names import CancellationError, EmbCancelCallbackType

if TYPE_CHECKING:
    from ..model import Model

ATLAS_MAX_LENGTH = 8192  # tokens
CHUNK_OVERLAP = 8  # tokens
EMPTY_PLACEHOLDER = "24df574ea1c998de59d5be15e769658e"  # MD5 of "nomic empty"


@dataclass(frozen=True)
class Request:
    """One call of ``embed``, as LLModel takes it."""

    texts: Sequence[str]
    prefix: str | None
    dimensionality: int  # -1: all
    do_mean: bool
    atlas: bool
    cancel_cb: EmbCancelCallbackType | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens of a part of text number ``text``, with the prefix and the special tokens around it."""

    text: int
    ids: list[int]


def answer(
    model: Model, request: Request, n_ctx: int, backend: str
) -> tuple[list[list[float]], int]:
    """Embeddings as lists [n_texts][dimensionality], and how many tokens of text they took.

    Raises
    ------
    RuntimeError
        What was asked for does not fit the model; the message is GPT4All's.
    CancellationError
        ``cancel_cb`` returned true.
    """
    for text in (*request.texts, request.prefix or ""):
        text.encode()  # GPT4All's errors: AttributeError for what is no text, UnicodeEncodeError
    try:
        vectors, n_tokens = embed(model, request, n_ctx, backend)
    except (ValueError, TinyLLMError) as error:
        raise RuntimeError(f"Failed to generate embeddings: {error}") from error
    return vectors.tolist(), n_tokens


def embed(
    model: Model, request: Request, n_ctx: int, backend: str
) -> tuple[NDArray[np.float32], int]:
    """Embeddings float32 [n_texts, dimensionality], and how many tokens of text they took.

    Raises
    ------
    ValueError
        The model, the prefix or the dimensionality does not fit; the message is GPT4All's.
    CancellationError
        ``cancel_cb`` returned true.
    """
    name, spec = name_of(model), SPEC_OF.get(name_of(model))
    if not supports_embedding(model):
        raise ValueError(f"not an embedding model: {name}")
    width = check_dimensionality(request.dimensionality, int(model.config.n_embd), name, spec)
    prefix = check_prefix(request.prefix, name, spec)
    chunks, n_tokens = split(model, request, prefix, n_ctx)
    if request.cancel_cb and request.cancel_cb(batch_sizes(chunks, n_ctx), backend):
        raise CancellationError("operation was canceled")
    rows = model.embed_batch([chunk.ids for chunk in chunks], None, False)
    matryoshka = bool(spec and spec.recommended)
    return combine(rows, chunks, len(request.texts), width, matryoshka), n_tokens


def name_of(model: Model) -> str:
    return str(model.metadata.get("general.name", ""))


def supports_embedding(model: Model) -> bool:
    """Whether a model embeds: encoders do, and decoders whose file says how rows are pooled."""
    return not model.config.causal or f"{model.arch}.pooling_type" in model.metadata


def check_dimensionality(wanted: int, n_embd: int, name: str, spec: Spec | None) -> int:
    if wanted < 0 or wanted == n_embd:
        return n_embd
    message = f"unsupported dimensionality {wanted} for model {name}"
    if spec is None and wanted < n_embd:
        return wanted
    if spec is None or not spec.recommended:
        raise ValueError(f"{message} (supported: {n_embd})")
    if wanted == 0 or wanted > n_embd:
        raise ValueError(f"{message} (recommended: {list(spec.recommended)})")
    return wanted


def check_prefix(prefix: str | None, name: str, spec: Spec | None) -> str:
    if prefix is None:
        if spec is None:
            raise ValueError(
                f"unknown model {name}, specify a prefix if applicable or an empty string"
            )
        return spec.document
    if spec is not None and prefix not in spec.prefixes:
        quoted = prefix.replace("\\", "\\\\").replace('"', '\\"')
        raise ValueError(f'"{quoted}" is not a valid task type for model {name}')
    return prefix


def split(model: Model, request: Request, prefix: str, n_ctx: int) -> tuple[list[Chunk], int]:
    """The chunks to compute, and how many tokens of text they have.

    The chunks of a text that is longer than the model takes overlap.
    """
    before, after = surroundings(model)
    if prefix:
        before = before + plain_ids(model, prefix + ":")
    room = min(int(model.config.n_ctx_train), n_ctx) - len(before) - len(after)
    if room <= CHUNK_OVERLAP:
        raise ValueError(
            f"max chunk length of {room} is smaller than overlap of {CHUNK_OVERLAP} tokens"
        )
    chunks = []
    for i, text in enumerate(request.texts):
        ids = text_ids(model, text, i, request)
        for start in starts(len(ids), room, request.do_mean):
            chunks.append(Chunk(i, [*before, *ids[start : start + room], *after]))
    around = len(before) + len(after)
    return chunks, sum(len(chunk.ids) - around for chunk in chunks)


def starts(n: int, room: int, do_mean: bool) -> list[int]:
    """Positions where the chunks of a text of n tokens begin."""
    found, start = [0], room
    while do_mean and start < n:
        found.append(start - CHUNK_OVERLAP)
        start += room - CHUNK_OVERLAP
    return found


def text_ids(model: Model, text: str, index: int, request: Request) -> list[int]:
    """A text's tokens; a text without any is embedded as a placeholder, as Atlas does."""
    ids = plain_ids(model, text)
    if request.atlas and len(ids) > ATLAS_MAX_LENGTH:
        if request.do_mean:
            raise ValueError(
                f"length of text at index {index} is {len(ids)} tokens"
                f" which exceeds limit of {ATLAS_MAX_LENGTH}"
            )
        ids = ids[:ATLAS_MAX_LENGTH]
    return ids or plain_ids(model, EMPTY_PLACEHOLDER)


def plain_ids(model: Model, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special=False, parse_special=False)


def surroundings(model: Model) -> tuple[list[int], list[int]]:
    """The tokens that the vocabulary puts before and after a text."""
    inner = plain_ids(model, "a")
    whole = model.tokenizer.encode("a", add_special=True, parse_special=False)
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]


def batch_sizes(chunks: Sequence[Chunk], n_batch: int) -> list[int]:
    """Tokens of each batch of at most n_batch, in order, as ``cancel_cb`` is told."""
    sizes = [0]
    for chunk in chunks:
        if sizes[-1] + len(chunk.ids) > n_batch:
            sizes.append(0)
        sizes[-1] += len(chunk.ids)
    return sizes


def combine(
    rows: Sequence[NDArray[Any]],
    chunks: Sequence[Chunk],
    n_texts: int,
    width: int,
    matryoshka: bool,
) -> NDArray[np.float32]:
    """Mean of each text's normalised chunks, normalised -> float32 [n_texts, width]."""
    chunk_rows = np.asarray(rows, np.float64)  # [n_chunks, n_embd]
    if matryoshka:
        chunk_rows = chunk_rows - chunk_rows.mean(axis=1, keepdims=True)
        variance = chunk_rows.var(axis=1, ddof=1, keepdims=True)
        chunk_rows = chunk_rows / np.sqrt(variance + 1e-5)
    sums = np.zeros((n_texts, width))
    np.add.at(sums, [chunk.text for chunk in chunks], unit_rows(chunk_rows[:, :width]))
    return unit_rows(sums).astype(np.float32)


def unit_rows(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows scaled to length 1 -> [n, width]."""
    norms = np.sqrt(np.einsum("ij,ij->i", x, x))
    return np.asarray(x / np.maximum(norms, 1e-12)[:, None])
