"""Converting one folder: its configuration, vocabulary and tensors to a GGUF file."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from ...errors import ArgumentError, GGUFError, NumericError, TinyLLMError, UnsupportedModel
from ...files import checked
from .. import quants
from ..mixtures import MIXTURES, plan
from ..quantize import in_order, row_runs
from ..writer import Deferred, write
from .changes import Change, Floats
from .families import FAMILIES, NOT_TEXT, Family
from .keys import head_size, n_layer, needed, of_full_layers, rope
from .safetensors import StoredTensor, read_folder
from .settings import Settings, check_activation, check_rotation
from .vocabulary import read_json, read_vocabulary

Report = Callable[[str, str], object]
LAYER = re.compile(r"(?:encoder\.)?(?:layers?|h|blocks)\.(\d+)\.(.*)\Z")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
ENDINGS = {"gamma": "weight", "beta": "bias"}
BARE = {"ssm_a", "ssm_d"}  # names without an ending
HALVES = ("per_layer_model_proj.weight",)  # kept by quantisers as it is, and yet no float32
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # types of whole numbers
STILL = 1e30  # divides the frequencies of what does not turn


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str = "F16",  # noqa: A002  # the word of the command line and of the format
    *,
    n_threads: int | None = None,
    part_bytes: int | None = None,
    report: Report | None = None,
) -> dict[str, str]:
    """Convert a folder of safetensors to a GGUF file, tensor by tensor.

    Parameters
    ----------
    folder : path-like
        Has ``config.json``, ``*.safetensors`` (several, with an index, are read as one; BF16 and 8-bit floats
        with scales too), and a vocabulary.
    out : path-like
        The file to write; it appears only when it is complete.
    type : str
        A key of `tinyllm.gguf.mixtures.MIXTURES`: "F16" (default), "BF16", "F32", "Q8_0", "Q4_K_M", ...
    n_threads : int, optional
        All cores by default.
    part_bytes : int, optional
        Split the file into parts with about so many bytes each.
    report : callable, optional
        Called with the name and the type of each tensor when its turn comes.

    Returns
    -------
    dict
        The type of each tensor by name.

    Raises
    ------
    UnsupportedModel
        The kind of model, or its pre-tokenizer, is none that we know.
    ArgumentError
        Something is missing in the folder, or contradicts something else.
    GGUFError
        A file is damaged.
    NumericError
        A weight is NaN, infinite, or too large for its new type.

    Examples
    --------
    >>> import tinyllm
    >>> types = tinyllm.convert("SmolLM2-135M-Instruct", "smollm2.gguf", "Q8_0")  # doctest: +SKIP
    """
    path, kind = Path(os.path.expanduser(checked(folder))), str(type).upper()
    if kind not in MIXTURES:
        raise ArgumentError(f"no type {type!r:.40}; there are {', '.join(MIXTURES)}")
    if n_threads is not None and n_threads < 1:
        raise ArgumentError(f"n_threads={n_threads}; expected at least 1, or None for all cores")
    if kind.startswith(("IQ1", "IQ2")):
        warnings.warn(
            f"{kind} without an importance matrix is poor: convert to F16, then quantize --imatrix",
            stacklevel=2,
        )
    given = read_config(path)
    family = family_of(given)
    config = Settings({**family.defaults, **given})
    stored = read_folder(path, config)
    n_rows = _n_rows(family, config, stored)
    try:
        vocabulary = read_vocabulary(
            path, n_rows, family.prefer, family.surround, family.vocabulary
        )
    except TinyLLMError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, regex.error) as e:
        raise ArgumentError(
            f"{path}: the vocabulary's files are damaged ({e.__class__.__name__}: {e}); "
            "get tokenizer.json again"
        ) from e
    tensors = targets(family, config, stored)
    check_layers(tensors, family, n_layer(config))
    metadata = _metadata(path, family, config, vocabulary, kind)
    shapes = {name: t.shape for name, t in tensors.items()}
    chosen = plan(metadata, shapes, kind)
    wide = dict.fromkeys(HALVES, kind if kind in ("F32", "BF16") else "F16")
    types = {name: chosen.get(name, wide.get(name, "F32")) for name in tensors}
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        blocks = {name: t.stored_as(types[name], pool, report) for name, t in tensors.items()}
        write(out, metadata, blocks, part_bytes=part_bytes, sources=[path])
    return types


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json`` with the text model's part on top, and its pooling."""
    config = read_json(folder / "config.json")
    if not config:
        raise ArgumentError(
            f"{folder} has no config.json; expected a folder of a Hugging Face model"
        )
    for name in ("text_config", "quantization_config", "rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, dict):
            raise ArgumentError(
                f"{folder / 'config.json'}: {name} = {config[name]!r:.40}; expected an object"
            )
    config = {
        **config,
        **(config.get("text_config") or {}),
        "architectures": config.get("architectures"),
    }
    modules = folder / "modules.json"
    if modules.is_file():
        try:
            steps = [dict(m) for m in json.loads(modules.read_text("utf-8"))]
        except (ValueError, TypeError) as e:
            raise ArgumentError(f"{modules} is damaged: {e}; expected a list of objects") from None
        for module in steps:
            if str(module.get("type")).endswith("Pooling"):
                config["pooling"] = read_json(folder / str(module["path"]) / "config.json")
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of the table for a configuration; UnsupportedModel if there is none."""
    names = config.get("architectures") or [None]
    names = names if isinstance(names, list) else [names]
    if not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: architecture {names[0]!r:.60} is none that we convert; we know "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[names[0]]


# ---- tensors


@dataclass(frozen=True)
class Target:
    """A tensor of the new file: the stored ones that it is made of, and what is done to each."""

    name: str
    parts: tuple[StoredTensor, ...]
    change: Change | None
    config: Mapping[str, Any]
    stacked: bool = False  # one part for each expert

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.parts[0].shape
        if self.change is not None:
            one = self.change.shape(self.config, one)
        return (len(self.parts), *one) if self.stacked else one

    def values(self) -> Iterator[tuple[tuple[int, ...], Callable[[int, int], Floats]]]:
        """For each part, its shape and a function from first and last row to values."""
        for part in self.parts:
            if self.change is None:
                yield part.shape, part.rows
            else:
                stored = part.read()
                try:
                    rows = self.change.values(self.config, stored)
                except ValueError:
                    raise ArgumentError(
                        f"{part.name} has shape {part.shape}, which does not fit config.json's heads"
                    ) from None
                yield rows.shape, partial(_rows, rows.reshape(-1, rows.shape[-1]))

    def stored_as(self, kind: str, pool: ThreadPoolExecutor, report: Report | None) -> Deferred:
        """The tensor in its type, made when it is written."""

        def pieces() -> Iterator[npt.NDArray[np.uint8]]:
            if report is not None:
                report(self.name, kind)
            for shape, rows in self.values():

                def encode(start: int, stop: int, rows: Any = rows) -> npt.NDArray[np.uint8]:
                    x = rows(start, stop)
                    if not np.isfinite(x).all():
                        raise NumericError(f"{self.name}: holds NaN or infinity; expected numbers")
                    try:
                        return quants.quantize(kind, x).reshape(-1)
                    except NumericError as error:
                        raise NumericError(f"{self.name}: {error}") from error

                yield from in_order(pool, encode, row_runs(shape))

        return Deferred(kind, self.shape, pieces)


@dataclass(frozen=True)
class Given:
    """A tensor of values that are at hand."""

    x: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def stored_as(self, kind: str, pool: ThreadPoolExecutor, report: Report | None) -> Deferred:
        return Deferred(kind, self.shape, lambda: [quants.quantize(kind, self.x).reshape(-1)])


def _rows(x: Floats, start: int, stop: int) -> Floats:
    return x[start:stop]


def targets(
    family: Family, config: Settings, stored: Mapping[str, StoredTensor]
) -> dict[str, Target | Given]:
    """The tensors of the new file by name.

    Raises
    ------
    UnsupportedModel
        A stored tensor has no place in the new file.
    GGUFError
        An expert's tensor is missing.
    """
    found: dict[str, Target | Given] = {n: Given(x) for n, x in rotations(family, config).items()}
    experts: dict[str, dict[int, StoredTensor]] = {}
    unknown = []
    for name, tensor in stored.items():
        if name.startswith(family.skip + NOT_TEXT):
            continue
        places = placed(family, name)
        if places is None:
            unknown.append(name)
        if places and tensor.kind in WHOLE:
            raise GGUFError(
                f"is of type {tensor.kind}, which holds no weights by itself; expected floats",
                path=str(tensor.path), name=name,
            )  # fmt: skip
        for place in places or ():
            expert = EXPERT.search(name)
            if expert:
                experts.setdefault(place, {})[int(expert[1])] = tensor
            else:
                found[place] = Target(place, (tensor,), _change(family, place), config)
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if unknown[8:] else "")
        raise UnsupportedModel(f"{family.arch} has no place for the tensors {shown}")
    for place, parts in experts.items():
        missing = set(range(max(parts) + 1)) - set(parts)
        if missing:
            raise GGUFError(f"is missing for expert {min(missing)}", name=place)
        found[place] = Target(place, tuple(parts[i] for i in sorted(parts)), None, config, True)
    if config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    return _without_tied_head(found, family)


def check_layers(tensors: Mapping[str, Any], family: Family, n: int) -> None:
    """Check that there are as many layers as config.json says, those of one kind with the same tensors.

    Raises
    ------
    ArgumentError
        There are more or fewer.
    GGUFError
        A tensor is missing.
    """
    if "token_embd.weight" not in tensors:
        raise GGUFError("no stored tensor becomes it", name="token_embd.weight")
    if not 0 < n <= len(tensors):
        raise ArgumentError(f"config.json says {n} layers; the files have {len(tensors)} tensors")
    layers: dict[int, set[str]] = {i: set() for i in range(n)}
    for name in tensors:
        if name.startswith("blk."):
            _, number, rest = name.split(".", 2)
            layers.setdefault(int(number), set()).add(rest)
    if len(layers) > n:
        raise ArgumentError(
            f"config.json says {n} layers; the files have one of number {max(layers)}, counted from 0"
        )
    kinds: dict[bool, set[str]] = {}
    for names in layers.values():
        kinds.setdefault(any("_exps." in name for name in names), set()).update(names)
    for i, names in layers.items():
        needed = kinds[any("_exps." in name for name in names)]
        for name in sorted(needed - names if names else {"*"}):
            if name not in family.uneven:
                raise GGUFError(f"is missing; config.json says {n} layers", name=f"blk.{i}.{name}")


def placed(family: Family, name: str) -> tuple[str, ...] | None:
    """Where a stored tensor goes: no name where it is not needed, two for gate and up in one; None: unknown."""
    rest = next((name.removeprefix(p) for p in family.prefixes if name.startswith(p)), name)
    layer, prefix = LAYER.match(rest), ""
    if layer:
        prefix, rest = f"blk.{int(layer[1])}.", layer[2]
    rest = EXPERT.sub(".experts.*.", rest)
    module, _, ending = rest.rpartition(".")
    for base, end in ((module, "." + ENDINGS.get(ending, ending)), (rest, "")):
        if base in family.names and bool(prefix) == _in_layer(family, base):
            ours = family.names[base]
            if not ours:
                return ()
            return tuple(
                prefix + o + ("" if o in BARE or "." in o else end or ".weight")
                for o in ours.split("+")
            )
    return None


def _in_layer(family: Family, base: str) -> bool:
    """Whether a module's name belongs to a layer."""
    ours = family.names[base]
    outside = (
        "token_embd",
        "output_norm",
        "output",
        "position_embd",
        "token_types",
        "token_embd_norm",
        "per_layer_token_embd",
        "per_layer_model_proj",
        "per_layer_proj_norm",
    )
    if ours in outside:
        return False
    return not base.startswith(("embeddings.position_ids", "pooler."))


def _change(family: Family, place: str) -> Change | None:
    stem = place.split(".")[2] if place.startswith("blk.") else place.split(".")[0]
    return family.changes.get(stem)


def _without_tied_head(
    found: dict[str, Target | Given], family: Family
) -> dict[str, Target | Given]:
    """Without a head that repeats the embedding, where files hold both."""
    head, embedding = found.get("output.weight"), found.get("token_embd.weight")
    if family.arch == "mamba" and isinstance(head, Target) and isinstance(embedding, Target):
        a, b = head.parts[0], embedding.parts[0]
        if a.shape == b.shape and np.array_equal(a.read(), b.read()):
            del found["output.weight"]
    return found


def rotations(family: Family, config: Settings) -> dict[str, Floats]:
    """Factors that stretch the rotation: Llama 3's, Gemma 4's, and LongRoPE's two tables."""
    given = rope(config)
    kind = str(given.get("rope_type")).lower()
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(given, head_size(config))}
    if kind == "proportional":
        head = of_full_layers(config, "global_head_dim", "head_dim") or head_size(config)
        turning = int(head * needed(given, "partial_rotary_factor") / 2)
        factors = np.where(np.arange(head // 2) < turning, 1.0, STILL)
        return {"rope_freqs.weight": factors.astype(np.float32)}
    if given.get("long_factor") and family.arch == "phi3":
        return {
            f"rope_factors_{name}.weight": np.array(given[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    return {}


def llama3_factors(given: Mapping[str, Any], head_dim: int) -> Floats:
    """By how much each frequency is divided: those of long waves by ``factor``, of short ones not at all."""
    base = np.float32(given.get("rope_theta", 10000.0))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    waves = np.float32(2 * np.pi) / (1 / base**exponents)
    factor, trained, low, high = (
        np.float32(given.get(name, default))
        for name, default in (
            ("factor", 8.0),
            ("original_max_position_embeddings", 8192),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
        )
    )
    smooth = (trained / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(
        waves < trained / high, 1.0, np.where(waves > trained / low, factor, between)
    )
    return factors.astype(np.float32)


# ---- metadata


def _n_rows(
    family: Family, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> int | None:
    """Tokens that the embedding has rows for."""
    embeddings = (
        t.shape[0] for n, t in stored.items() if placed(family, n) == ("token_embd.weight",)
    )
    return next(embeddings, config.get("vocab_size"))


def _metadata(
    folder: Path, family: Family, config: Settings, vocabulary: dict[str, Any], kind: str
) -> dict[str, Any]:
    """All keys of the new file."""
    found: dict[str, Any] = {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": folder.resolve().name,
    }
    try:
        keys = family.keys(config)
        n_layer(config)
    except KeyError as e:
        raise ArgumentError(f"{folder / 'config.json'} lacks {e}") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise ArgumentError(f"{folder / 'config.json'}: {config.last}: {e}") from e
    check_rotation(rope(config), family.arch)
    if family.act and (message := check_activation(config, family.act)):
        warnings.warn(message, stacklevel=4)
    config.check_read(family.arch, family.ignored)
    found.update({f"{family.arch}.{key}": value for key, value in keys.items()})
    found["general.file_type"] = np.uint32(MIXTURES[kind].file_type)
    found["general.quantization_version"] = np.uint32(2)
    if config.get("type_vocab_size") and family.arch in ("bert", "nomic-bert"):
        vocabulary = {**vocabulary, "tokenizer.ggml.token_type_count": config["type_vocab_size"]}
    return found | vocabulary
