"""One tensor of an open file."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ._file import RandomAccessFile
from .types import GGMLType, swap_words


class Tensor:
    """A tensor of a file: what it is, and its bytes when asked for.

    All bytes are given out in little-endian form, whatever the file's order.

    Attributes
    ----------
    name : str
    shape : tuple of int
        NumPy order: rows first, the contiguous dimension last.
    type : str
        ggml's name of the type, such as ``"Q4_K"``.
    offset : int
        Where its bytes begin in its file.
    n_elements, nbytes : int
        Elements and bytes of the whole tensor.
    row_nbytes : int
        Bytes of one row of ``shape[-1]`` elements.
    """

    __slots__ = ("_file", "_kind", "_swapped", "n_elements", "name", "nbytes", "offset", "shape")

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: GGMLType,
        file: RandomAccessFile,
        offset: int,
        byteorder: str,
    ) -> None:
        self.name, self.shape, self.offset = name, shape, offset
        self._kind, self._file = kind, file
        self._swapped = byteorder == "big" and bool(kind.words)
        self.n_elements = math.prod(shape)
        self.nbytes = kind.row_nbytes(self.n_elements)

    @property
    def type(self) -> str:
        """ggml's name of the type, such as ``"Q4_K"``."""
        return self._kind.name

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of ``shape[-1]`` elements."""
        return self._kind.row_nbytes(self.shape[-1])

    @property
    def path(self) -> str:
        """The file that holds the tensor; a part, if the model is split."""
        return self._file.path

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored blocks, read-only uint8 [*shape[:-1], row_nbytes], as a view of the mapped file.

        For a big-endian file it is a converted copy. If another program cuts the file while it is mapped,
        touching the view ends the process: a model is better loaded with `read`.
        """
        raw = self._file.map(self.offset, self.nbytes)
        if self._swapped:
            raw = swap_words(self._kind, raw)
            raw.flags.writeable = False
        return raw.reshape(*self.shape[:-1], self.row_nbytes)

    def read(self, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """Read the stored blocks, uint8 [nbytes], without mapping the file.

        Parameters
        ----------
        out : uint8 [nbytes], optional
            Contiguous memory to fill instead of a new array; any shape of that many bytes.

        Raises
        ------
        GGUFError
            If the file has shrunk.
        """
        return self._read(0, self.nbytes, out, (self.nbytes,))

    def read_rows(
        self, start: int, stop: int, out: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Rows `start` to `stop` of the tensor seen as [-1, shape[-1]]: uint8 [stop - start, row_nbytes]."""
        n_rows = self.n_elements // self.shape[-1]
        if not 0 <= start <= stop <= n_rows:
            raise ArgumentError(f"{self.name}: rows {start} to {stop} of {n_rows}")
        size = self.row_nbytes
        return self._read(start * size, stop * size, out, (stop - start, size))

    def _read(
        self, start: int, stop: int, out: npt.NDArray[np.uint8] | None, shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8]:
        out = np.empty(shape, np.uint8) if out is None else out
        if out.dtype != np.uint8 or out.size != stop - start or not out.flags.c_contiguous:
            raise ArgumentError(
                f"{self.name}: out must be contiguous uint8 of {stop - start} bytes, "
                f"not {out.dtype} of shape {out.shape}"
            )
        flat = out.reshape(-1)
        self._file.read_into(self.offset + start, flat)
        if self._swapped:
            flat[:] = swap_words(self._kind, flat)
        return out

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values, float32 [*shape]."""
        from .quants import dequantize

        return dequantize(self.type, self.read().reshape(*self.shape[:-1], self.row_nbytes))

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.type}, shape={self.shape})"
