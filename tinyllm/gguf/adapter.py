"""Adapters: low-rank changes of a model's matrices, from GGUF files and from PEFT's folders.

W [n_out, n_in] becomes W + scale * up @ down, with up [n_out, r] and down [r, n_in]. LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, GGUFError, UnsupportedModel
from .convert.families import FAMILIES, Family
from .convert.folder import EXPERT, placed
from .convert.safetensors import StoredTensor, read_header
from .reader import open_file

Floats = npt.NDArray[np.float32]
Pair = tuple[Floats, Floats]
Shapes = Mapping[str, tuple[int, ...]]

EMBEDDING = "token_embd.weight"
SIDES = {".lora_a": 0, ".lora_b": 1}
PEFT = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?\Z"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what a PEFT configuration may ask for beside plain products, each with what it would take
NOT_PLAIN = {
    "use_dora": "DoRA scales each row by its length",
    "layer_replication": "layers would stand several times",
    "lora_bias": "the products would have biases",
    "use_qalora": "activations would be pooled first",
    "alora_invocation_tokens": "it would begin in the middle of a text",
    "megatron_config": "the tensors are divided among devices",
}


@dataclass(frozen=True)
class Adapter:
    """One adapter: its name, and for each tensor that it changes the factors ``down`` and ``up``.

    ``down`` is [r, n_in], ``up`` [n_out, r], with the adapter's own factor alpha / r in it; for a stack of
    experts each has the number of the expert in front. For the embedding [V, E], ``down`` is [V, r] and
    ``up`` [E, r].
    """

    name: str
    pairs: Mapping[str, Pair]


def read_adapter(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], shapes: Shapes
) -> Adapter:
    """Read an adapter for a model: a GGUF file, or a folder that PEFT has saved.

    Parameters
    ----------
    path : path-like
        The file or the folder.
    metadata, shapes : Mapping
        The model's keys, and the shapes of its tensors by name.

    Raises
    ------
    GGUFError
        A file is damaged, or an adapter's tensor does not fit the model's.
    UnsupportedModel
        The adapter is for another architecture, or changes more than products.
    ArgumentError
        There is no adapter at the path.
    """
    where = Path(path)
    pairs = _folder(where, metadata, shapes) if where.is_dir() else _file(where, metadata)
    if not pairs:
        raise ArgumentError(f"{where} has no tensors of an adapter")
    for name, pair in pairs.items():
        try:
            check_pair(name, pair, shapes)
        except GGUFError as e:
            e.path = str(where)
            raise
    return Adapter(where.name.removesuffix(".gguf"), pairs)


def check_pair(name: str, pair: Pair, shapes: Shapes) -> None:
    """Raise GGUFError unless the product of two factors has the shape of the model's tensor."""
    down, up = pair
    if name not in shapes:
        raise GGUFError("the adapter changes it, and the model has no such tensor", name=name)
    whole = shapes[name]
    found = (down.shape[0], up.shape[0]) if name == EMBEDDING else (*up.shape[:-1], down.shape[-1])
    ranks = down.shape[-1 if name == EMBEDDING else -2], up.shape[-1]
    if found != tuple(whole) or ranks[0] != ranks[1] or down.shape[:-2] != up.shape[:-2]:
        raise GGUFError(
            f"the adapter's factors {down.shape} and {up.shape} do not make the model's {tuple(whole)}",
            name=name,
        )
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise GGUFError("the adapter's factors have a NaN or an infinity", name=name)


def product(name: str, pair: Pair, start: int, stop: int) -> Floats:
    """What an adapter at the scale 1 adds to some rows of a tensor seen as [-1, n_in]."""
    down, up = pair
    if name == EMBEDDING or up.ndim == 2:
        left, right = (down, up.T) if name == EMBEDDING else (up, down)
        rows: Floats = left[start:stop] @ right
        return rows
    n = up.shape[1]  # rows of an expert
    experts = range(start // n, -(-stop // n))
    return np.concatenate([up[i, max(start - i * n, 0) : stop - i * n] @ down[i] for i in experts])


# ---- GGUF


def _file(path: Path, metadata: Mapping[str, Any]) -> dict[str, Pair]:
    """The factors in a GGUF file, as llama.cpp's converter of adapters writes them."""
    with open_file(path) as file:
        keys = file.metadata
        kind = keys.get("general.type"), keys.get("adapter.type")
        if kind != ("adapter", "lora"):
            raise ArgumentError(
                f"{path}: general.type {kind[0]!r} and adapter.type {kind[1]!r}; expected an adapter of "
                "type 'lora'"
            )
        arch, own = keys.get("general.architecture"), metadata.get("general.architecture")
        if arch != own:
            raise UnsupportedModel(f"{path}: the adapter is for {arch!r}, the model is a {own!r}")
        if "adapter.alora.invocation_tokens" in keys:
            raise UnsupportedModel(
                f"{path}: {NOT_PLAIN['alora_invocation_tokens']} (adapter.alora.invocation_tokens)"
            )
        alpha = float(keys.get("adapter.lora.alpha", 0))
        halves: dict[str, list[Floats | None]] = {}
        for name, tensor in file.tensors.items():
            stem, dot, side = name.rpartition(".")
            if dot + side not in SIDES:
                raise UnsupportedModel(
                    f"{path}: {name}: expected names that end in .lora_a or .lora_b"
                )
            halves.setdefault(stem, [None, None])[SIDES[dot + side]] = tensor.dequantize()
    return {name: _scaled(name, pair, alpha) for name, pair in halves.items()}


def _scaled(name: str, pair: list[Floats | None], alpha: float) -> Pair:
    """Both factors, with alpha / r in the second; an alpha of 0 is none."""
    down, up = pair
    if down is None or up is None:
        raise GGUFError("only one factor of the adapter is there", name=name)
    if down.ndim < 2 or up.ndim < 2:
        raise GGUFError(f"the adapter's factors have shapes {down.shape} and {up.shape}", name=name)
    return down, up * np.float32(alpha / up.shape[-1]) if alpha else up


# ---- PEFT


def _folder(path: Path, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Pair]:
    """The factors in a folder, under GGUF's names and in its order of rows."""
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ArgumentError(
            f"{path}: expected {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them"
        )
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ArgumentError(f"{path / CONFIG} is no JSON: {e}") from None
    if not isinstance(config, dict):
        raise ArgumentError(f"{path / CONFIG} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(f"{path}: peft_type {config.get('peft_type')!r}; expected 'LORA'")
    for key, reason in NOT_PLAIN.items():
        if config.get(key):
            raise UnsupportedModel(f"{path}: {key}={config[key]!r:.60}: {reason}")
    families, values = families_of(path, metadata), as_hugging_face(metadata)
    halves: dict[str, list[Floats | None]] = {}
    experts: dict[str, dict[int, list[Floats | None]]] = {}
    for stored, tensor in read_header(path / WEIGHTS).items():
        if ".base_layer." in stored:  # PEFT saves an embedding that it changes as it was, too
            continue
        found = PEFT.match(stored)
        if found is None:
            raise UnsupportedModel(
                f"{path}: {stored} is no factor of a product; merge the adapter with PEFT and convert that"
            )
        module, embedding, side = found.groups()
        name, rows = target(families, module, values, tensor, side == "B")
        if embedding and side == "A":
            rows = np.ascontiguousarray(rows.T)
        if side == "B":
            try:
                rows = rows * np.float32(factor(config, module, rows.shape[-1]))
            except (AttributeError, ArithmeticError, TypeError, ValueError, re.error) as e:
                raise ArgumentError(f"{path / CONFIG}: no alpha for {module}: {e}") from None
        expert = EXPERT.search(stored)
        if expert is None:
            pair = halves.setdefault(name, [None, None])
        else:
            pair = experts.setdefault(name, {}).setdefault(int(expert[1]), [None, None])
        pair[side == "B"] = rows
    for name, parts in experts.items():
        halves[name] = list(stacked(name, parts, shapes))
    return {name: _scaled(name, pair, 0.0) for name, pair in halves.items()}


def families_of(path: Path, metadata: Mapping[str, Any]) -> list[Family]:
    """The rows of the table of conversions for the model's architecture."""
    arch = metadata.get("general.architecture")
    families = [f for f in FAMILIES.values() if f.arch == arch]
    if not families:
        raise UnsupportedModel(
            f"{path}: we do not know PEFT's names for architecture {arch!r}; convert the adapter to GGUF first"
        )
    return families


def as_hugging_face(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What changes of rows ask a configuration for, out of a model's keys."""
    arch = metadata["general.architecture"]
    n_head = metadata.get(f"{arch}.attention.head_count")
    n_kv = metadata.get(f"{arch}.attention.head_count_kv", n_head)
    return {
        "num_attention_heads": n_head,
        "num_key_value_heads": n_kv,
        "num_kv_heads": n_kv,
        "new_decoder_architecture": True,  # Falcon's: the number of key heads is given
    }


def target(
    families: list[Family],
    module: str,
    config: Mapping[str, Any],
    tensor: StoredTensor,
    is_up: bool,
) -> tuple[str, Floats]:
    """GGUF's name for a module, and one of its factors with rows in GGUF's order."""
    for family in families:
        places = placed(family, f"{module}.weight")
        if places and len(places) == 1:
            place = places[0]
            stem = place.split(".")[2] if place.startswith("blk.") else place.split(".")[0]
            change, rows = family.changes.get(stem), tensor.read()
            if EXPERT.search(module) or change is None or change.linear:
                return place, rows
            if not change.by_rows:
                break
            return place, np.ascontiguousarray(change.values(config, rows)) if is_up else rows
    raise UnsupportedModel(
        f"{tensor.name}: the model has no matrix of its own for {module}; merge the adapter with PEFT and "
        "convert that"
    )


def factor(config: Mapping[str, Any], module: str, rank: int) -> float:
    """A module's factor: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ),
        config.get("lora_alpha", 8),  # PEFT's default
    )
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def stacked(
    name: str, parts: Mapping[int, list[Floats | None]], shapes: Shapes
) -> Iterator[Floats]:
    """The factors of all experts as two stacks; experts that the adapter leaves alone have zeros."""
    n = shapes[name][0] if name in shapes else max(parts) + 1
    for side in (0, 1):
        found = {i: pair[side] for i, pair in parts.items()}
        some = [x for x in found.values() if x is not None]
        if len(some) < len(found) or len({x.shape for x in some}) > 1 or max(found) >= n:
            raise GGUFError("the adapter's experts have factors of several shapes", name=name)
        zero = np.zeros_like(some[0])
        yield np.stack([zero if (x := found.get(i)) is None else x for i in range(n)])
