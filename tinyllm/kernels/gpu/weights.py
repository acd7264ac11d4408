"""How tensors lie on the device: each field of a format's blocks in a plane of its own.

A block of Q4_0 is two bytes of scale and 16 of codes; in the file they alternate, so that no codes are
aligned. On the device all codes come first and then all scales: the same bytes, but neighbouring
threads read neighbouring 16-byte words. ``LAYOUTS`` names the planes in order, wide fields first
("a..b": the fields from a to b in one plane); the unpack functions of ``src`` read them in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DeviceError
from ...gguf.quants import FORMATS, dequantize, iq_tables
from ..backend import Source
from .arrays import Buffer

if TYPE_CHECKING:
    from .backend import GPUBackend

PIECE = 64 << 20  # bytes read from the file at a time


@dataclass(frozen=True)
class Layout:
    """How one format lies on the device, and the unpack function of ``header`` that reads it.

    ``scales`` is the number of scales for 32 weights, 1 or 2. ``mins`` is "own" where blocks hold minima, a
    number where the minimum is that number times the scale, "" without minima. ``grid`` names the codebook.
    ``apart`` is explained in src/piece_int8.h.
    """

    unpack: str
    header: str
    planes: tuple[str, ...]
    scales: int = 1
    mins: str = ""
    grid: str | None = None
    apart: int = 1

    def defines(self, name: str) -> dict[str, str | int]:
        """The macros with which kernels of this format are compiled."""
        macros: dict[str, str | int] = {
            "UNPACK": self.unpack,
            "BLOCK": FORMATS[name].block_size,
            "SCALES": self.scales,
            "MINS": int(self.mins != ""),
        }
        if self.mins not in ("", "own"):
            macros["RATIO"] = f"({self.mins}f)"
        if self.apart != 1:
            macros |= {"PIECE": self.unpack.replace("unpack", "piece"), "APART": self.apart}
        return macros


APART = {"Q8_0": 0, "Q8_1": 0, "Q8_K": 0, "Q6_K": 4} | dict.fromkeys(
    ("Q2_K", "Q3_K", "Q4_K", "Q5_K"), 2
)


def _layouts() -> dict[str, Layout]:
    rows: dict[str, tuple[str, str, int, str, str | None]] = {
        "Q4_0": ("legacy", "qs d", 1, "-8.0", None),
        "Q4_1": ("legacy", "qs d m", 1, "own", None),
        "Q5_0": ("legacy", "qs qh d", 1, "-16.0", None),
        "Q5_1": ("legacy", "qs qh d m", 1, "own", None),
        "Q8_0": ("legacy", "qs d", 1, "", None),
        "Q8_1": ("legacy", "qs d", 1, "", None),
        "Q2_K": ("kquants", "qs scales d dmin", 2, "own", None),
        "Q3_K": ("kquants", "qs hmask scales d", 2, "-4.0", None),
        "Q4_K": ("kquants", "qs d..scales", 1, "own", None),
        "Q5_K": ("kquants", "qs qh d..scales", 1, "own", None),
        "Q6_K": ("kquants", "ql qh scales d", 2, "-32.0", None),
        "Q8_K": ("kquants", "qs d", 1, "", None),
        "TQ1_0": ("lowbit", "qs qh d", 1, "-1.0", None),
        "TQ2_0": ("lowbit", "qs d", 1, "-1.0", None),
        "Q1_0": ("lowbit", "qs d", 1, "-0.5", None),
        "Q2_0": ("lowbit", "qs d", 1, "-1.0", None),
        "MXFP4": ("lowbit", "qs e", 1, "", None),
        "NVFP4": ("lowbit", "qs d", 2, "", None),
        "IQ1_S": ("iquants", "qs qh d", 1, "", "IQ1"),
        "IQ1_M": ("iquants", "qs qh scales", 2, "", "IQ1"),
        "IQ2_XXS": ("iquants", "qs d", 1, "", "IQ2_XXS"),
        "IQ2_XS": ("iquants", "qs scales d", 2, "", "IQ2_XS"),
        "IQ2_S": ("iquants", "qs signs qh scales d", 2, "", "IQ2_S"),
        "IQ3_XXS": ("iquants", "qs signs d", 1, "", "IQ3_XXS"),
        "IQ3_S": ("iquants", "qs signs qh scales d", 1, "", "IQ3_S"),
        "IQ4_NL": ("iquants", "qs d", 1, "", None),
        "IQ4_XS": ("iquants", "qs scales_l scales_h d", 1, "", None),
    }
    return {
        name: Layout(
            "unpack_q8_0" if name == "Q8_1" else f"unpack_{name.lower()}",
            f"{family}.h",
            tuple(planes.split()),
            scales,
            mins,
            grid,
            APART.get(name, 1),
        )
        for name, (family, planes, scales, mins, grid) in rows.items()
    }


LAYOUTS = _layouts()
PLAIN: dict[str, dict[str, str | int]] = {
    "F32": {"WEIGHT_BYTES": 4},
    "F16": {"WEIGHT_BYTES": 2},
    "BF16": {"WEIGHT_BYTES": 2, "BF16": 1},
}
WIDENED = "F64", "I8", "I16", "I32", "I64"  # kept as F32: no model multiplies with these


@dataclass(eq=False)
class GPUWeight:
    """A matrix [n_out, n_in], or a stack of matrices, on the device."""

    type: str
    kind: str  # the format on the device: the file's type, or F32 for one of WIDENED
    shape: tuple[int, ...]
    nbytes: int
    buffer: Buffer
    total: int  # blocks of the whole stack; weights for a plain kind

    @property
    def n_in(self) -> int:
        return self.shape[-1]

    @property
    def n_out(self) -> int:
        return self.shape[-2]


def load(be: GPUBackend, source: Source, rows: np.ndarray | slice | None = None) -> GPUWeight:
    """Read a tensor, or some of its rows, in pieces into device memory; see ``Backend.load``."""
    kind = stored_kind(source)
    chosen, shape = chosen_rows(source, rows)
    if kind in PLAIN:
        row_nbytes = -(-shape[-1] // 8) * 8 * int(PLAIN[kind]["WEIGHT_BYTES"])
        nbytes, total = prod(shape[:-1]) * row_nbytes, prod(shape)
    else:
        total = prod(shape) // FORMATS[kind].block_size
        nbytes = total * plane_bytes(kind)
    buffer = be.allocate(nbytes)
    for start, raw in read_pieces(source, chosen):
        if kind in PLAIN:
            be.put(buffer, start * row_nbytes, padded_rows(source.type, kind, raw))
            continue
        first = start * (shape[-1] // FORMATS[kind].block_size)
        for before, plane in split_planes(kind, raw):
            be.put(buffer, total * before + first * plane.shape[1], plane)
    return GPUWeight(source.type, kind, shape, nbytes, buffer, total)


def stored_kind(source: Source) -> str:
    """The format that the tensor will have on the device; DeviceError if no kernel reads it."""
    kind = "F32" if source.type in WIDENED else source.type
    if kind not in PLAIN and kind not in LAYOUTS:
        raise DeviceError(
            f"{source.name}: type {source.type} does not run on a GPU; use device='cpu'"
        )
    block = 1 if kind in PLAIN else FORMATS[kind].block_size
    if source.shape[-1] % block:
        raise DeviceError(
            f"{source.name}: rows of {source.shape[-1]} weights are not whole blocks of {block}"
        )
    return kind


def chosen_rows(
    source: Source, rows: np.ndarray | slice | None
) -> tuple[np.ndarray | range, tuple[int, ...]]:
    """The numbers of the rows to load, the tensor seen as [-1, n_in], and the shape of the result."""
    n_rows = prod(source.shape[:-1])
    if rows is None:
        return range(n_rows), source.shape
    picked = np.arange(n_rows)[rows]
    ascending = len(picked) and np.array_equal(picked, picked[0] + np.arange(len(picked)))
    chosen = range(int(picked[0]), int(picked[0]) + len(picked)) if ascending else picked
    return chosen, (len(picked), source.shape[-1])


def read_pieces(source: Source, rows: np.ndarray | range) -> Iterator[tuple[int, np.ndarray]]:
    """Raw rows in pieces of about PIECE bytes, each with the place of its first row."""
    if not isinstance(rows, range):  # out of order: read the span that holds them all, then pick
        low = int(rows.min())
        yield 0, source.read_rows(low, int(rows.max()) + 1)[rows - low]
        return
    fmt = FORMATS[source.type]
    step = max(1, PIECE // (source.shape[-1] // fmt.block_size * fmt.type_size))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        yield start, source.read_rows(rows.start + start, rows.start + stop)


def split_planes(kind: str, raw: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The planes of rows of blocks, uint8 [n_blocks, size], each with its offset in a block on the device."""
    blocks = raw.reshape(-1, FORMATS[kind].dtype.itemsize)
    before = 0
    for start, stop in plane_spans(kind):
        yield before, np.ascontiguousarray(blocks[:, start:stop])
        before += stop - start


def plane_spans(kind: str) -> list[tuple[int, int]]:
    """The first and the end byte of each plane in a block of the file."""
    fields = FORMATS[kind].dtype.fields
    assert fields is not None
    spans = []
    for plane in LAYOUTS[kind].planes:
        first, _, last = plane.partition("..")
        part, offset = fields[last or first][:2]
        spans.append((fields[first][1], offset + part.itemsize))
    return spans


def plane_bytes(kind: str) -> int:
    """The bytes of a block on the device."""
    return sum(stop - start for start, stop in plane_spans(kind))


def units(kind: str) -> int:
    """How many pieces of a row matvec.c loads before it uses the first: two where registers suffice."""
    if kind in PLAIN:
        return 2
    layout = LAYOUTS[kind]
    heavy = (
        layout.scales == 2
        or layout.grid
        or kind in ("Q5_1", "Q5_K", "Q8_K", "TQ1_0", "MXFP4", "IQ4_NL", "IQ4_XS")
    )
    return 1 if heavy else 2


def weights_at_once(kind: str) -> int:
    """How many weights of a row one lane of matvec.c loads at once."""
    if kind in PLAIN:
        return 8 * units(kind)
    return units(kind) * (32 if LAYOUTS[kind].apart else 16)


def padded_rows(source_type: str, kind: str, raw: np.ndarray) -> np.ndarray:
    """Plain numbers as uint8 [rows, bytes], with zeros up to a multiple of eight weights."""
    if source_type != kind:
        raw = dequantize(source_type, raw).view(np.uint8)
    unit = 8 * int(PLAIN[kind]["WEIGHT_BYTES"])
    out = np.zeros((len(raw), -(-raw.shape[1] // unit) * unit), np.uint8)
    out[:, : raw.shape[1]] = raw
    return out


def codebook_words(name: str) -> np.ndarray:
    """A codebook, four of its bytes in each uint32."""
    return np.ascontiguousarray(iq_tables.codebook(name)).view(np.uint32).reshape(-1)
