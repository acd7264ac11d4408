"""How the float kernels read F32, F16 and BF16: column after column of a tile, some rows of it in a vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .emit import F32, I16, I32, I64, LANES, Emit, V

BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def widen(e: Emit, p: Any, kind: str, offset: int, n: int) -> Any:
    """n weights of a type as float32."""
    if kind == "F32":
        return e.load(p, V(F32, n), offset)
    raw = e.load(p, V(I16, n), offset)
    if kind == "F16":
        return e.half(raw)
    return e.b.bitcast(e.shl(e.b.zext(raw, V(I32, n)), 16), V(F32, n))


@dataclass(frozen=True)
class Reader:
    """What the float kernels are compiled for."""

    name: str  # F32, F16 or BF16

    @property
    def tile_bytes(self) -> int:
        """Those of 16 rows of a column."""
        return LANES * BYTES[self.name]

    @property
    def line(self) -> int:
        """Columns of a cache line."""
        return 64 // self.tile_bytes

    def columns(
        self, e: Emit, p: Any, first: Any, n: int, n_columns: int, ahead: Any = None
    ) -> Iterator[Any]:
        """Some columns at p: of n rows, beginning with row ``first``.

        The lines ``ahead`` bytes behind those that are read are asked for, if it is given.
        """
        for line in range(0, n_columns * self.tile_bytes, 64) if ahead is not None else ():
            e.prefetch(e.at(p, ahead), line)
        rows = e.at(p, e.b.mul(first, I64(BYTES[self.name])))
        for c in range(n_columns):
            yield widen(e, rows, self.name, c * self.tile_bytes, n)


@lru_cache
def reader(kind: str) -> Reader:
    """The reader of F32, F16 or BF16."""
    return Reader(kind)
