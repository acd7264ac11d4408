"""Opening a GGUF file, or all parts of a split one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from ..errors import GGUFError
from ..files import checked
from .part import Part, read_part
from .strings import StringArray
from .tensor import Tensor
from .types import VALUE_DTYPES

MAX_PARTS = 1000
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf\Z", re.DOTALL)


class GGUFFile:
    """An open GGUF file; `open` makes it.

    Attributes
    ----------
    path : str
    version : int
        2 or 3.
    byteorder : str
        ``"little"`` or ``"big"``.
    alignment : int
        Bytes; tensors begin at multiples of it.
    metadata : Mapping[str, Any]
        Scalars are Python's int, float, bool and str; arrays of numbers are NumPy arrays, arrays of strings
        `StringArray`, arrays of arrays lists.
    tensors : Mapping[str, Tensor]
        In the order of the file.
    key_offsets : Mapping[str, int]
        Where each key begins in the file, for messages.
    """

    def __init__(self, path: str, parts: list[Part]) -> None:
        first = parts[0]
        self.path, self._parts = path, parts
        self.version, self.byteorder, self.alignment = (
            first.version,
            first.byteorder,
            first.alignment,
        )
        self.metadata: Mapping[str, Any] = MappingProxyType(first.metadata)
        self.key_offsets: Mapping[str, int] = MappingProxyType(first.offsets)
        tensors = {name: t for part in parts for name, t in part.tensors.items()}
        self.tensors: Mapping[str, Tensor] = MappingProxyType(tensors)

    @property
    def exact_metadata(self) -> dict[str, Any]:
        """The metadata with scalars as NumPy scalars of the stored type, so that `write` repeats the file."""
        kinds = self._parts[0].kinds
        return {
            key: VALUE_DTYPES[kinds[key]].type(value) if kinds[key] in VALUE_DTYPES else value
            for key, value in self.metadata.items()
        }

    def located(self, error: GGUFError) -> GGUFError:
        """Add to an error the file, and where the key or tensor that it names begins.

        Code that checks what values mean knows only the name of a key or tensor.
        """
        name = error.name
        if error.path is not None or name is None:
            return error
        message = str(error).removeprefix(f"{name}: ")
        tensor = self.tensors.get(name)
        path = self.path if tensor is None else tensor.path
        offset = self.key_offsets.get(name) if tensor is None else tensor.offset
        return GGUFError(message, path=path, offset=offset, name=name)

    @property
    def paths(self) -> list[str]:
        """The names of the file's parts; one, unless it is split."""
        return [part.file.path for part in self._parts]

    def check_unchanged(self) -> None:
        """Raise GGUFError if a part was written to since it was opened.

        Another file that was put in its place does no harm: the one that is open stays as it is.
        """
        for part in self._parts:
            part.file.check_unchanged()

    def close(self) -> None:
        """Close the file; arrays already given out stay valid."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, {len(self.metadata)} keys, {len(self.tensors)} tensors)"


def open_file(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file and check everything in it but the values of the tensors.

    Parameters
    ----------
    path : path-like
        A ``.gguf`` file; of a split model (``name-00001-of-00003.gguf``) the first part, which opens all.

    Returns
    -------
    GGUFFile
        Also a context manager. Nothing of the tensors has been read yet.

    Raises
    ------
    GGUFError
        If anything in the file is not as the format demands; the message names the byte and the key or tensor.
    OSError
        If the file is missing or may not be read.

    Examples
    --------
    >>> import tinyllm
    >>> with tinyllm.gguf.open("model.gguf") as file:  # doctest: +SKIP
    ...     file.metadata["general.architecture"], len(file.tensors)
    ('llama', 147)
    """
    name = os.path.expanduser(checked(path))
    parts = [read_part(name)]
    try:
        _open_other_parts(parts)
        return GGUFFile(name, parts)
    except BaseException:
        for part in parts:
            part.file.close()
        raise


def _open_other_parts(parts: list[Part]) -> None:
    """Append parts 2 to n of a split model to its first."""
    first = parts[0]
    n_parts = _split_number(first, "split.count", 1)
    if n_parts in (0, 1):
        return
    match = _PART_NAME.match(first.file.path)
    if match is None or int(match[3]) != n_parts or n_parts > MAX_PARTS:
        raise _split_error(
            first,
            f"part of a model split into {n_parts}; such files are named "
            f"NAME-00001-of-{n_parts:05}.gguf, and at most {MAX_PARTS} are opened",
        )
    if int(match[2]) != 1 or _split_number(first, "split.no", 0) != 0:
        raise _split_error(
            first, f"not the first part; open {match[1]}-00001-of-{match[3]}.gguf instead"
        )
    for i in range(1, n_parts):
        parts.append(_open_part(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf", i, first))
    _check_tensors(parts)


def _open_part(path: str, i: int, first: Part) -> Part:
    try:
        part = read_part(path)
    except FileNotFoundError as error:
        raise GGUFError("this part of a split model is missing", path=path) from error
    try:
        _check_part(part, i, first)
    except BaseException:
        part.file.close()
        raise
    return part


def _check_part(part: Part, i: int, first: Part) -> None:
    for key, expected in ("split.no", i), ("split.count", first.metadata["split.count"]):
        if _split_number(part, key, -1) != expected:
            raise _split_error(
                part, f"expected {key} = {expected}; the parts do not belong together"
            )
    for key, value in part.metadata.items():
        if not key.startswith("split.") and not _same(value, first.metadata.get(key)):
            raise GGUFError(
                "differs from the first part, or is missing there",
                path=part.file.path,
                offset=part.offsets[key],
                name=key,
            )


def _check_tensors(parts: list[Part]) -> None:
    found = sum(len(part.tensors) for part in parts)
    total = _split_number(parts[0], "split.tensors.count", found)
    if total != found:
        raise _split_error(parts[0], f"{total} tensors announced, {found} found in the parts")
    where: dict[str, str] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if where.setdefault(name, tensor.path) != tensor.path:
                message = f"the tensor stands in two parts, first in {where[name]}"
                raise GGUFError(message, path=tensor.path, offset=tensor.offset, name=name)


def _split_number(part: Part, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _split_error(part, f"{key} must be a number")
    return value


def _split_error(part: Part, message: str) -> GGUFError:
    at = part.offsets.get("split.count", part.offsets.get("split.no"))
    return GGUFError(message, path=part.file.path, offset=at, name="split.count")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (np.ndarray, StringArray)) and isinstance(b, (np.ndarray, StringArray)):
        return len(a) == len(b) and a.tolist() == b.tolist()
    return type(a) is type(b) and bool(a == b)
