"""Loading: from a file's name to a ``Model`` on its devices."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np

from . import gguf, system, tokenizers
from .engine.completion import check_n_ctx
from .engine.prefixes import check_bytes
from .engine.progress import checking, loading
from .errors import ArgumentError, GGUFError
from .files import checked
from .gguf.control import ControlVector, read_controls
from .gguf.finite import check_finite, checked_scale
from .kernels import devices
from .kernels.backend import Compute, KVType
from .kernels.devices import open_backend
from .kernels.outside import Outside, read_kernels
from .model import Model
from .models.adapters import Adapters
from .models.build import build
from .models.config import architecture, read_config
from .models.keys import Keys
from .models.memory import default_n_ctx
from .models.stages import Place, Stage, divide
from .tokenizers import Tokenizer

Source: TypeAlias = str | Path | ControlVector
FLOATS = ("F32", "F16", "BF16")
BUNDLED = Path(__file__).parent / "data" / "bundled.gguf"


def load(
    path: str | Path | None = None,
    device: str | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    kv_type: KVType = "f16",
    strict: bool = True,
    check_weights: bool = False,
    compute: Compute = "f32",
    kernels: str | Path | Sequence[str | Path] | None = None,
    lora: Sequence[str | Path | tuple[str | Path, float]] = (),
    control: Source | Sequence[Source | tuple[Source, float]] = (),
    control_layers: tuple[int, int] | None = None,
    prefix_bytes: int | None = None,
) -> Model:
    """Load a GGUF file.

    Parameters
    ----------
    path : str or Path, optional
        A file; the first shard of a split one; "hf:owner/repo/file.gguf"; a name of GPT4All's list. None is
        the small model that comes with the package.
    device : str, optional
        "cpu" (default), "auto", "gpu", "reference", "cuda[:i]", "opencl[:i]", a maker ("nvidia", "amd",
        "intel") or a part of a device's name. Several, as "cuda:0,cuda:1", share the layers in proportion to
        their free memory.
    n_ctx : int, optional
        Tokens of a conversation; default: the trained length, or what half of the free memory holds.
    n_threads : int, optional
        Default: the physical cores.
    n_gpu_layers : int, optional
        The last so many layers, and the head, go to the GPU, the layers before them to the CPU; 0: all to
        the CPU. Default, or -1: all to the GPU.
    kv_type : {"f16", "f32", "q8_0"}
        How keys and values are stored.
    strict : bool
        Refuse files with keys or tensors that we do not understand (True), or warn (False).
    check_weights : bool
        Look for NaN and infinity in all weights and scales first, and refuse the file that has any. Reads the
        file twice; without it, they are refused once they reach the logits.
    compute : {"f32", "bf16", "exact"}
        In what numbers matrices are multiplied. By default those stored as F32, F16 or BF16 in float32, and
        quantised ones as integers, with activations of 8 bits. "exact": with activations that keep what
        float32 has, so that logits are those of the dequantised weights; on "cpu" and "reference"
        (docs/exact.md). "bf16": those stored as F32, F16 or BF16, with several tokens, in bfloat16, faster and
        less exactly, on a CPU with AVX512-BF16.
    kernels : str or Path, or sequence of these, optional
        Files with kernels of your own (docs/lab.md), which replace ours wherever they fit.
    lora : sequence of str, Path or (str or Path, float)
        Adapters, GGUF files or folders that PEFT has saved, each with its scale (1 unless said). Each is known
        by the name of its file or folder; ``generate(lora={name: scale})`` chooses others for one text.
    control : str, Path, ControlVector, or a sequence of these or of (one of these, float)
        Control vectors, as ``Model.control_vector`` makes them, or GGUF files of them, also llama.cpp's, each
        with its scale (1 unless said): what is added to the residual stream behind layers, for every text.
    control_layers : (int, int), optional
        The first and the last layer behind which they are added; default: all that they have.
    prefix_bytes : int, optional
        Bytes of keys and values that are kept of texts, so that a prompt that begins like one of them reads
        only the rest; default: a quarter of the memory that is free once the model is loaded. 0 keeps none.

    Raises
    ------
    GGUFError, UnsupportedModel, DeviceError, ArgumentError, FileNotFoundError

    Examples
    --------
    >>> import tinyllm
    >>> tinyllm.load().arch
    'llama'
    """
    if kv_type not in ("f16", "f32", "q8_0"):
        raise ArgumentError(f"kv_type={kv_type!r}; expected 'f16', 'f32' or 'q8_0'")
    if compute not in get_args(Compute):
        raise ArgumentError(f"compute={compute!r}; expected 'f32', 'bf16' or 'exact'")
    wanted = check_n_ctx(n_ctx)
    if prefix_bytes is not None:
        check_bytes(prefix_bytes)
    if not (device is None or isinstance(device, str)):
        raise ArgumentError(
            f"device={device!r:.40}; expected a name such as 'cpu', 'auto' or 'cuda:0'"
        )
    if not (n_gpu_layers is None or isinstance(n_gpu_layers, int)):
        raise ArgumentError(f"n_gpu_layers={n_gpu_layers!r:.40}; expected a whole number, or None")
    outside = read_kernels(kernel_files(kernels))
    chosen, vectors = beside_files(lora, control, control_layers)
    file = gguf.open(locate(path))
    try:
        tokenizer = vocabulary(file, strict)
        if check_weights:
            check_finite(file, checking)
        if compute == "bf16":
            check_floats(file)
        check_kinds(outside, file, strict)
        place = placing(device, n_threads, n_gpu_layers, compute, outside)
        adapters = read_adapters(file, chosen, read_controls(vectors, control_layers))
        network = build(file.metadata, file.tensors, place, kv_type, strict, loading, adapters)
        network.kernels = tuple(k.mark for k in outside)
        file.check_unchanged()
    except GGUFError as e:
        file.close()
        raise file.located(e) from e
    except BaseException:
        file.close()
        raise
    return Model(file, network, wanted or default_n_ctx(network), tokenizer, prefix_bytes)


def beside_files(
    lora: object, control: object, control_layers: object
) -> tuple[list[tuple[Path, float]], list[tuple[Any, float]]]:
    """The files and scales of adapters and of control vectors, as ``load`` was given them."""
    chosen = [scaled(item, "lora") for item in listed_files(lora, "lora")]
    vectors = [scaled(item, "control") for item in listed_files(control, "control")]
    check_control_layers(control_layers, bool(vectors))
    return chosen, vectors


def beside_file(
    file: gguf.GGUFFile, lora: object, control: object, control_layers: tuple[int, int] | None
) -> None:
    """Read what stands beside a model without loading it; an error where it does not fit the model."""
    chosen, vectors = beside_files(lora, control, control_layers)
    found = read_adapters(file, chosen, read_controls(vectors, control_layers))
    if found is not None:
        config = read_config(Keys(file.metadata, architecture(file.metadata)))
        found.check_control(config.n_layer, config.n_embd)


def listed_files(given: object, name: str) -> list[Any]:
    """The files that ``load`` was given for ``name``; a single one need not stand in a list."""
    if isinstance(given, str | Path | ControlVector):
        return [given]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Real):
        return [given]  # one with its scale
    if not isinstance(given, list | tuple):
        raise ArgumentError(f"{name}={given!r:.60}; expected a list of files, or of (file, scale)")
    return list(given)


def check_control_layers(layers: object, vectors: bool) -> None:
    """ArgumentError unless ``control_layers`` is a first and a last layer for vectors that are there."""
    if layers is None:
        return
    pair = isinstance(layers, list | tuple) and len(layers) == 2
    if not pair or not all(type(i) is int for i in layers):  # type: ignore[attr-defined]
        raise ArgumentError(f"control_layers={layers!r:.60}; expected (first, last)")
    if not vectors:
        raise ArgumentError("control_layers without control; give the vectors' files, too")


def scaled(item: Any, name: str) -> tuple[Any, float]:
    """A file's place, or a control vector, and its scale."""
    path, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
    if name == "control" and isinstance(path, ControlVector):
        return path, checked_scale(scale, name)
    return system.expanded(checked(path)), checked_scale(scale, name)


def read_adapters(
    file: gguf.GGUFFile, chosen: Sequence[tuple[Path, float]], control: Mapping[int, np.ndarray]
) -> Adapters | None:
    """The adapters and control vectors for a file; None where there are none."""
    if not chosen:
        return Adapters(control=control) if control else None
    from .gguf.adapter import read_adapter

    shapes = {name: t.shape for name, t in file.tensors.items()}
    shapes.setdefault("output.weight", shapes.get("token_embd.weight", ()))
    found = [read_adapter(path, file.metadata, shapes) for path, _ in chosen]
    return Adapters(found, [scale for _, scale in chosen], control)


def kernel_files(given: object) -> list[str | Path]:
    """The files that ``load`` was given for ``kernels``."""
    if given is None:
        return []
    files = [given] if isinstance(given, str | Path) else given
    if not (isinstance(files, list | tuple) and all(isinstance(f, str | Path) for f in files)):
        raise ArgumentError(f"kernels={given!r:.60}; expected files, such as ['mine.py']")
    return list(files)


def check_kinds(kernels: Sequence[Outside], file: gguf.GGUFFile, strict: bool) -> None:
    """ArgumentError for a kernel whose format no matrix of a file has, or whose operation its model has not."""
    kinds = {t.type for t in file.tensors.values() if len(t.shape) == 2}
    products = {(name, kind) for name in ("matvec", "matmul") for kind in kinds}
    if all(k.key in products for k in kernels):
        return
    # a second network, which computes nothing, and only where it is wanted
    from .models.explain import asked

    known = products | asked(file.metadata, file.tensors, strict)
    for k in kernels:
        if k.key not in known and k.operation in ("matvec", "matmul"):
            raise ArgumentError(f"{k}: {file.path} has matrices of {', '.join(sorted(kinds))} only")
        if k.key not in known:
            others = ", ".join(sorted(" ".join(key).rstrip() for key in known - products))
            raise ArgumentError(f"{k}: {file.path} does not compute that; it has {others}")


def check_floats(file: gguf.GGUFFile) -> None:
    """ArgumentError unless a file has matrices of floats."""
    if not any(t.type in FLOATS and len(t.shape) == 2 for t in file.tensors.values()):
        raise ArgumentError(
            f"compute='bf16' is for matrices of {', '.join(FLOATS)}; {file.path} has none; leave it out"
        )


def placing(
    device: str | None,
    n_threads: int | None,
    n_gpu_layers: int | None,
    compute: Compute = "f32",
    kernels: Sequence[Outside] = (),
) -> Place:
    """Where the layers of a model go: the last ``n_gpu_layers`` to the devices named, the others to the CPU."""
    names = devices.resolve_all(device)
    if not any(map(devices.on_gpu, names)):
        if n_gpu_layers and device != "auto":
            raise ArgumentError(
                f"n_gpu_layers={n_gpu_layers}, but the device is {names[0]!r}; give device='gpu', 'cuda:0' "
                "or a name of `tinyllm devices`, or leave n_gpu_layers out"
            )
        n_gpu_layers = None

    def place(n_layer: int) -> list[Stage]:
        wanted = n_layer if n_gpu_layers is None or n_gpu_layers < 0 else n_gpu_layers
        first = max(n_layer - wanted, 0)
        rest = [Stage(open_backend("cpu", n_threads, compute), range(first))] if first else []
        backends = [] if first == n_layer else [open_backend(n, n_threads, compute) for n in names]
        everywhere = [*(stage.be for stage in rest), *backends]
        used = [k for be in everywhere for k in be.replace_kernels(kernels)] if kernels else []
        for k in kernels:
            if k not in used:
                where = " + ".join(be.name for be in everywhere)
                raise ArgumentError(f"{k}: written for {k.language}, which does not run on {where}")
        if not backends:
            return rest
        return rest + divide(backends, range(first, n_layer))

    return place


def vocabulary(file: gguf.GGUFFile, strict: bool = True) -> Tokenizer | None:
    """The file's tokenizer, if it has one."""
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    return tokenizers.load(file.metadata, strict)


def locate(path: str | Path | None) -> Path:
    """The file of a name; names of the hub or of GPT4All's list may be downloaded."""
    if path is None:
        return BUNDLED if BUNDLED.is_file() else unpacked_model()
    name = checked(path)
    if os.path.exists(name):
        return Path(name)
    if not isinstance(path, str):
        return system.expanded(name)
    from .hub.catalogue import find_model

    return Path(find_model(name))


@lru_cache(1)
def unpacked_model() -> Path:
    """The bundled model, out of the zip that holds the package, until the program ends."""
    files = ExitStack()
    atexit.register(files.close)
    packed = resources.files(__package__) / "data" / BUNDLED.name
    return files.enter_context(resources.as_file(packed))
