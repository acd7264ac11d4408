"""Control vectors: a direction for each of some layers, which is added to what the layer hands on.

The files are llama.cpp's: architecture "controlvector", for each layer a tensor ``direction.<layer>`` F32 [E].
Source: representation engineering, arXiv:2310.01405.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, GGUFError
from .reader import open_file
from .writer import write

Floats = npt.NDArray[np.float32]
ARCH = "controlvector"
DIRECTION = re.compile(r"direction\.([1-9][0-9]{0,5})\Z")


class ControlVector(Mapping["int | str", Floats]):
    """Directions by layer, which ``Model.steered`` and ``load(control=...)`` add to the residual stream.

    The direction of layer i is added behind it, at the point ``blk.i.out``, as llama.cpp does. Files know none
    for layer 0.

    Parameters
    ----------
    directions : mapping of int to float array [n_embd]
        One for each layer that is changed.
    hint : str
        The architecture of the model that they come from.

    Examples
    --------
    >>> import tinyllm
    >>> m = tinyllm.load()
    >>> vector = m.control_vector(["I am so happy", "A nice day"], ["I am so sad", "A bad day"])
    >>> with m.steered(vector.layers(1, 2), scale=0.5):
    ...     text = m.generate("Tom went out and", max_tokens=4, temperature=0).text
    """

    def __init__(self, directions: Mapping[int, npt.ArrayLike], hint: str = "") -> None:
        found = {int(i): np.asarray(x, np.float32) for i, x in sorted(directions.items())}
        sizes = {x.shape for x in found.values()}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise ArgumentError(
                f"directions of shapes {sorted(sizes)}; expected at least one, all of one length"
            )
        if min(found) < 0 or not all(np.isfinite(x).all() for x in found.values()):
            raise ArgumentError("a direction has a NaN or an infinity, or a layer below 0")
        self._directions, self.hint = found, hint

    @property
    def n_embd(self) -> int:
        """The length of each direction."""
        return len(next(iter(self._directions.values())))

    def __getitem__(self, layer: int | str) -> Floats:
        return self._directions[layer]  # type: ignore[index]  # a name is a layer that is not there

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._directions)

    def __len__(self) -> int:
        return len(self._directions)

    def layers(self, first: int, last: int) -> ControlVector:
        """The directions of layers ``first`` to ``last``, both included.

        Raises ArgumentError if there are none.
        """
        chosen = {i: x for i, x in self._directions.items() if first <= i <= last}
        if not chosen:
            have = list(self._directions)
            raise ArgumentError(
                f"no direction for layers {first} to {last}; the vector has {have[0]} to {have[-1]}"
            )
        return ControlVector(chosen, self.hint)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a GGUF file, which llama.cpp's ``--control-vector`` reads, too.

        Raises ArgumentError for a direction of layer 0, which such files do not hold.
        """
        if 0 in self._directions:
            raise ArgumentError(
                "files hold no direction for layer 0; write vector.layers(1, ...), or give "
                "the vector itself to load(control=...)"
            )
        tensors = {f"direction.{i}": x for i, x in self._directions.items()}
        keys: dict[str, Any] = {"general.architecture": ARCH, f"{ARCH}.model_hint": self.hint}
        write(path, {**keys, f"{ARCH}.layer_count": np.int32(len(tensors))}, tensors)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ControlVector:
        """Read a file of ours, of llama.cpp's ``cvector-generator`` or of repeng.

        Raises
        ------
        ArgumentError
            The file holds something else.
        GGUFError
            It is damaged.
        """
        with open_file(path) as file:
            arch = file.metadata.get("general.architecture")
            if arch != ARCH:
                raise ArgumentError(f"{path}: general.architecture {arch!r:.40}; expected {ARCH!r}")
            found: dict[int, Floats] = {}
            for name, tensor in file.tensors.items():
                layer, shape = DIRECTION.match(name), tensor.shape
                if layer is None or len(shape) != 1 or not tensor.type.startswith(("F", "BF")):
                    raise GGUFError(
                        f"{tensor.type} of shape {shape}; expected tensors direction.<layer> with one row of "
                        "floats each, from layer 1 on",
                        path=str(path), name=name,
                    )  # fmt: skip
                found[int(layer[1])] = tensor.dequantize()
            if len({x.shape for x in found.values()}) != 1 or not all(
                np.isfinite(x).all() for x in found.values()
            ):
                raise GGUFError(
                    "expected directions of one length, without NaN or infinity", path=str(path)
                )
            return cls(found, str(file.metadata.get(f"{ARCH}.model_hint", "")))

    def __repr__(self) -> str:
        layers = list(self._directions)
        return (
            f"<tinyllm.ControlVector of {len(self)} layers, {layers[0]} to {layers[-1]}, "
            f"n_embd {self.n_embd}>"
        )


def summed(parts: Iterable[tuple[ControlVector, float]]) -> dict[int, Floats]:
    """Scaled vectors added up: a direction for each layer that any of them has."""
    found: dict[int, Floats] = {}
    for vector, scale in parts:
        for layer, x in vector._directions.items():
            with np.errstate(over="ignore"):
                added = x * np.float32(scale)
            have = found.get(layer)
            if have is not None and have.shape != added.shape:
                raise ArgumentError(
                    f"control vectors of {len(have)} and {len(added)} values for one model"
                )
            with np.errstate(over="ignore", invalid="ignore"):
                found[layer] = added if have is None else have + added
            if not np.isfinite(found[layer]).all():
                raise ArgumentError(
                    f"control: scale {scale:g} makes the direction of layer {layer} infinite"
                )
    return found


def read_controls(
    chosen: Sequence[tuple[Path | ControlVector, float]], layers: tuple[int, int] | None
) -> dict[int, Floats]:
    """What vectors, or their files, together add behind each layer; only of ``layers``, first and last."""
    vectors = [
        (x if isinstance(x, ControlVector) else ControlVector.read(x), scale) for x, scale in chosen
    ]
    if layers is not None:
        vectors = [(v.layers(*layers), scale) for v, scale in vectors]
    return summed(vectors)
