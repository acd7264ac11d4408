"""Reading folders of safetensors: names, shapes, and rows as float32, without torch.

A file is eight bytes that say how long its header is, the header in JSON, and the tensors' bytes.
Source: https://github.com/huggingface/safetensors (format).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError, GGUFError

Floats = npt.NDArray[np.float32]
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_SIDES = 32  # as many as any NumPy has
INDEX = "model.safetensors.index.json"
PART = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")


def _e4m3() -> Floats:
    """All 256 values of F8_E4M3, whose exponents of all ones hold numbers too."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    size[[0x7F, 0xFF]] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3()
_STORED = {  # the format's name of a type -> how NumPy reads it
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def as_float32(kind: str, stored: npt.NDArray[Any]) -> Floats:
    """Numbers as a file stores them -> float32, exactly unless they are float64 or whole and large."""
    if kind == "BF16":
        return np.asarray(stored.astype(np.uint32) << 16).view(np.float32)
    if kind == "F8_E4M3":
        return np.take(_E4M3, stored)
    if kind == "F8_E5M2":  # the upper byte of a half float
        return (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    values: Floats = stored.astype(np.float32)
    return values


class StoredTensor:
    """One tensor of a file: what it is, and its rows when asked for.

    Attributes
    ----------
    name : str
    kind : str
        How its numbers are stored: "BF16", "F32", ...
    shape : tuple of int
    scale : StoredTensor or None
        The factor of each block of 8-bit floats, or the one factor of all.
    block : tuple of int
        Rows and columns that share one factor.
    """

    def __init__(self, path: Path, name: str, kind: str, shape: tuple[int, ...], at: int) -> None:
        self.path, self.name, self.kind, self.shape, self._at = path, name, kind, shape, at
        self.scale: StoredTensor | None = None
        self.block: tuple[int, ...] = ()

    def read(self) -> Floats:
        """All values, float32 [*shape]."""
        return self.rows(0, self.n_rows).reshape(self.shape)

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def rows(self, start: int, stop: int) -> Floats:
        """Rows of the tensor seen as [-1, shape[-1]], float32 [stop - start, shape[-1]]."""
        width = self.shape[-1] if self.shape else 1
        dtype = np.dtype(_STORED[self.kind])
        count = (stop - start) * width
        with open(self.path, "rb") as file:
            file.seek(self._at + start * width * dtype.itemsize)
            stored = np.fromfile(file, dtype, count)
        if stored.size != count:
            raise GGUFError("the file ends within the tensor", path=str(self.path), name=self.name)
        values = as_float32(self.kind, stored).reshape(stop - start, width)
        return values if self.scale is None else values * self._scales(start, stop, width)

    def _scales(self, start: int, stop: int, width: int) -> Floats:
        """The factor of each weight of some rows, [stop - start, width] or [1, 1]."""
        assert self.scale is not None
        factors = self.scale.read()
        if factors.size == 1:
            return factors.reshape(1, 1)
        high, wide = self.block or (1, width)
        factors = factors.reshape(-1, factors.shape[-1] if len(self.block) == 2 else 1)
        per_matrix = -(-self.shape[-2] // high)  # rows of factors; a stack of matrices has more
        row = np.arange(start, stop)
        matrix, row = row // self.shape[-2], row % self.shape[-2]
        chosen: Floats = factors[matrix * per_matrix + row // high]
        return np.repeat(chosen, wide, axis=1)[:, :width]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; GGUFError if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if not 2 <= n <= min(MAX_HEADER, size - 8):
            raise GGUFError(
                f"no safetensors file: its header takes {n} bytes", path=str(path), offset=0
            )
        try:
            header = json.loads(file.read(n))
        except (ValueError, RecursionError) as e:
            raise GGUFError(f"the header is no JSON: {e}", path=str(path), offset=8) from None
    if not isinstance(header, dict):
        raise GGUFError("the header is no object of JSON", path=str(path), offset=8)
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, info, 8 + n, size) for name, info in header.items()}


def _tensor(path: Path, name: str, info: Any, base: int, size: int) -> StoredTensor:
    """A tensor as the header describes it, checked against the size of the file."""
    try:
        kind, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
        numbers = [start, stop, *shape]
        fine = all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        # NumPy counts an empty array's bytes as if no side were 0
        fine = fine and len(shape) <= MAX_SIDES and math.prod(max(n, 1) for n in shape) < 1 << 59
        fine = fine and isinstance(kind, str) and isinstance(shape, list)
        shape = tuple(shape)
    except (KeyError, TypeError, ValueError):
        fine = False
    if not fine:
        raise GGUFError(f"the header says {info!r:.80} of it", path=str(path), name=name)
    if kind not in _STORED:
        raise GGUFError(
            f"is of type {kind!r:.20}; we read {', '.join(_STORED)}", path=str(path), name=name
        )
    need = math.prod(shape) * np.dtype(_STORED[kind]).itemsize
    if stop - start != need or base + stop > size:
        raise GGUFError(
            f"{kind} of shape {shape} takes {need} bytes; the header gives bytes {start} to {stop} of "
            f"{size - base}",
            path=str(path), name=name,
        )  # fmt: skip
    return StoredTensor(path, name, kind, shape, base + start)


def read_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """All tensors of a folder, those of 8-bit floats with their scales.

    Raises
    ------
    ArgumentError
        There are no weights in safetensors.
    GGUFError
        A file is damaged or missing, or two files hold a tensor of one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise GGUFError(
                    f"stands in {tensors[name].path.name} too", path=str(path), name=name
                )
            tensors[name] = tensor
    index = folder / INDEX
    if index.is_file():
        for name, file in _named(index).items():
            if name not in tensors:
                raise GGUFError(
                    f"{INDEX} says that it is there", path=str(folder / file), name=name
                )
    return _scaled(tensors, config)


def _files(folder: Path) -> list[Path]:
    """The files with weights that a folder names in its index, or has."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_named(index).values()))]
        for path in files:
            if path.parent != folder or not path.is_file():
                raise GGUFError(f"names {path.name}, which is missing", path=os.fspath(index))
        return files
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if not files:
        other = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {other[0]} is pickled: save it with save_pretrained again" if other else ""
        raise ArgumentError(f"{folder}: there is no *.safetensors file{hint}")
    for path in files:
        part = PART.fullmatch(path.name)
        if part is None:
            continue
        for i in range(1, int(part[3]) + 1):
            name = f"{part[1]}{i:0{len(part[2])}}-of-{part[3]}.safetensors"
            if not (folder / name).is_file():
                raise GGUFError(
                    f"is one of {int(part[3])} parts; {name} is missing", path=str(path)
                )
    return files


def _named(index: Path) -> dict[str, str]:
    """The file of each tensor, as the index says."""
    try:
        named = json.loads(index.read_text("utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in named.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise GGUFError(
            "is damaged; expected JSON with the file of each tensor under weight_map",
            path=str(index),
        ) from None
    return dict(named)


def _scaled(tensors: dict[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors without those that are others' scales, which are attached to them."""
    how = config.get("quantization_config") or {}
    method = how.get("quant_method")
    if method not in (None, "fp8", "compressed-tensors"):
        raise ArgumentError(
            f"the weights are quantised by {method!r:.40}; we read floats and fp8 with scales"
        )
    block = tuple(how.get("weight_block_size") or ())
    kept = dict(tensors)
    for name, scale in tensors.items():
        for ending in ("_scale_inv", "_scale"):
            weight = tensors.get(name.removesuffix(ending))
            if name.endswith(ending) and weight is not None:
                if not weight.kind.startswith("F8"):
                    raise GGUFError(
                        f"is of type {weight.kind} and has a scale; we know scales of 8-bit floats",
                        path=str(weight.path), name=weight.name,
                    )  # fmt: skip
                weight.scale, weight.block = scale, block
                kept.pop(name, None)
                break
        if name.endswith(("activation_scale", ".input_scale", ".k_scale", ".v_scale")):
            kept.pop(name, None)  # activations are not rounded
    return kept
