"""Mutants that keep to the format: a few keys or tensors of a model changed to something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from malformed import written

from tinyllm import gguf
from tinyllm.errors import ArgumentError

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    255,
    256,
    270,
    271,
    4096,
    2**31 - 1,
    2**32 - 1,
    2**40,
    2**63,
    -1,
    -8,
)
TEXTS = (
    "",
    " ",
    "a",
    "ab",
    "▁",
    "<s>",
    "<0x41>",
    "<0x>",
    "\n",
    "\0",
    "é",
    "🙂",
    "a b",
    "x" * 300,
    "llama",
)
PARTS = (b"", b" ", b"a", b"\xff", b"\xe2\x96", b"\0", "▁".encode(), b"<0x00>", b"[UNK]", b"##a")


def anything(rng: random.Random) -> Any:
    """A value of any type that metadata can hold."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice((0.0, 1.0, -1.0, 1e-5, 1e30, 0.5, -1e30))
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.random() < 0.5
    if kind == 4:
        return [rng.choice(TEXTS) for _ in range(rng.randrange(1, 9))]
    if kind == 5:
        return np.array([rng.choice(NUMBERS[:12]) for _ in range(rng.randrange(9))], np.int32)
    return np.array([rng.uniform(-9, 9) for _ in range(rng.randrange(9))], np.float32)


def edited_list(values: list[Any], rng: random.Random) -> list[Any]:
    """A copy of the list with one element replaced, removed, doubled, moved or spliced with another."""
    out, i, j = list(values), rng.randrange(len(values)), rng.randrange(len(values))
    kind = rng.randrange(6)
    if kind == 0:
        out[i] = out[j]
    elif kind == 1 and len(out) > 1:
        del out[i]
    elif kind == 2:
        out.insert(j, out[i])
    elif kind == 3:
        out[i], out[j] = out[j], out[i]
    elif isinstance(out[i], (str, bytes)):
        old = out[i] if isinstance(out[i], bytes) else out[i].encode("utf-8", "surrogateescape")
        cut = rng.randrange(len(old) + 1)
        out[i] = old[:cut] + rng.choice(PARTS) + old[rng.randrange(len(old) + 1) :]
    else:
        out[i] = type(out[i])(rng.choice(NUMBERS[:8]))
    return out


def edited_value(value: Any, rng: random.Random) -> Any:
    """The value changed a little where it is an array, else something else."""
    if isinstance(value, gguf.StringArray):
        return gguf.StringArray.of(edited_list(value.tobytes_list(), rng))
    if isinstance(value, np.ndarray) and len(value) and rng.random() < 0.8:
        return np.array(edited_list(value.tolist(), rng)).astype(value.dtype)
    if isinstance(value, np.integer) and rng.random() < 0.5:
        return int(value) + rng.choice((-1, 1))
    return anything(rng)


def edited_tensor(tensor: gguf.Tensor, rng: random.Random) -> gguf.RawTensor:
    """A tensor's bytes under another shape, with a row more or less, or spoilt."""
    raw, shape = tensor.read(), list(tensor.shape)
    kind = rng.randrange(4)
    if kind == 0:
        return gguf.RawTensor(tensor.type, tuple(shape[::-1]), raw)
    if kind == 1:
        shape[0] = max(1, shape[0] + rng.choice((-1, 1)))
        return gguf.RawTensor("F32", tuple(shape), np.zeros(4 * int(np.prod(shape)), np.uint8))
    if kind == 2:
        return gguf.RawTensor(
            rng.choice(("F32", "I32")), tuple(shape), rng.choice((raw, raw[::-1]))
        )
    raw[rng.randrange(len(raw))] = rng.randrange(256)
    return gguf.RawTensor(tensor.type, tuple(shape), raw)


def mutant(files: list[gguf.GGUFFile], rng: random.Random) -> bytes:
    """One of the files, written again with one to three of its parts changed."""
    file = rng.choice(files)
    metadata: dict[str, Any] = file.exact_metadata
    tensors: dict[str, Any] = dict(file.tensors)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if tensors and rng.random() < 0.3:
            change(
                tensors, lambda t: edited_tensor(t, rng) if isinstance(t, gguf.Tensor) else t, rng
            )
        elif metadata:
            change(metadata, lambda value: edited_value(value, rng), rng)
    try:
        return written(metadata, tensors)
    except ArgumentError:  # not every change can be stored
        return written(file.exact_metadata, file.tensors)


def change(parts: dict[str, Any], edit: Any, rng: random.Random) -> None:
    """Change one part, take it away, or give it the place of another."""
    name = rng.choice(list(parts))
    kind = rng.random()
    if kind < 0.1:
        del parts[name]
    elif kind < 0.2:
        parts[rng.choice(list(parts))] = parts[name]
    else:
        parts[name] = edit(parts[name])


def opened(raws: list[bytes], folder: Path) -> list[gguf.GGUFFile]:
    """The files that the mutants come from, open."""
    files = []
    for i, raw in enumerate(raws):
        path = folder / f"input-{i}.gguf"
        path.write_bytes(raw)
        files.append(gguf.open(path))
    return files
