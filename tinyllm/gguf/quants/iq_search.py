"""Writing the codebook formats, IQ1 to IQ3: the nearest rows of a codebook for a few scales, the best one kept.

A run of 4 or 8 weights becomes the row of the codebook with the smallest weighed squared error; all rows are
looked at. Groups of 16 or 32 weights share a scale; the scale that fits the chosen rows has a closed form; 256
weights share d, of which the scales are odd multiples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .fit import divide
from .fit_kernels import run
from .format import Array, Floats, pack_fields
from .iq_tables import codebook
from .iquants import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS

# A scale is tried as this many of the first guess; then rows and scales are fitted to each other. The small
# ones are for groups whose largest weights count for little.
STRETCHES = np.array([0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1, 1.3], np.float32)
ROUNDS = 2
SIGNS = np.left_shift(1, np.arange(8)).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """One codebook format.

    ``table`` is the codebook's name; ``group`` how many weights share a scale; ``unit`` is what d is multiplied
    by for a scale, beside the odd numbers up to 2 ``most`` + 1; ``even``: minus signs come in even numbers
    for eight weights; ``shift``: rows of -1, 0, 1 stand for 8 times these, one up or one down, one choice for
    so many runs.
    """

    table: str
    group: int
    unit: float
    most: int
    even: bool = False
    shift: int = 0


KINDS = {
    "IQ1_S": Kind("IQ1", 32, 1 / 8, 7, shift=4),
    "IQ1_M": Kind("IQ1", 16, 1 / 8, 7, shift=1),
    "IQ2_XXS": Kind("IQ2_XXS", 32, 1 / 8, 15, even=True),
    "IQ2_XS": Kind("IQ2_XS", 16, 1 / 8, 15, even=True),
    "IQ2_S": Kind("IQ2_S", 16, 1 / 8, 15),
    "IQ3_XXS": Kind("IQ3_XXS", 32, 1 / 4, 15, even=True),
    "IQ3_S": Kind("IQ3_S", 32, 1.0, 15),
}
TOPS = {8: 43.0, 4: 62.0}  # the largest code of a row, by its length; of IQ3_S below


@cache
def rows(table: str, shift: int) -> Floats:
    """The codebook as codes float32 [n, run]; ``shift`` -1 or 1 of IQ1's, whose codes are 8 times its rows."""
    found: Floats = codebook(table).astype(np.float32)
    return found * 8 + shift if shift else found


@cache
def columns(table: str, shift: int) -> Floats:
    """All codes [run, n]: those at one place of a run lie side by side."""
    turned: Floats = np.ascontiguousarray(rows(table, shift).T)
    return turned


def search(x: Floats, w: Floats, scale: Floats, table: Floats, index: Array, least: Floats) -> None:
    """The kernel of `nearest`: all rows of a table [run, n] are looked at."""
    run, n = table.shape
    errors = np.empty(n, np.float32)
    for r in range(len(x)):
        inverse = np.float32(1) / scale[r] if scale[r] > 0 else np.float32(0)
        for i in range(run):
            target, weight = x[r, i] * inverse, w[r, i]
            if i == 0:
                for j in range(n):
                    away = table[i, j] - target
                    errors[j] = weight * away * away
            else:
                for j in range(n):
                    away = table[i, j] - target
                    errors[j] += weight * away * away
        smallest = errors[0]
        for j in range(1, n):
            smallest = min(smallest, errors[j])
        for j in range(n):
            if errors[j] == smallest:
                index[r] = j
                break
        least[r] = smallest


def nearest(x: Floats, w: Floats, scale: Floats, table: str, shift: int) -> tuple[Array, Floats]:
    """The nearest row for each run: x, w [R, run], scale [R] -> indices [R], and errors / scale^2."""
    index, least = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    run(search, x, w, scale, columns(table, shift), index, least)
    return index, least


def chosen(x: Floats, w: Floats, scale: Floats, kind: Kind) -> tuple[Array, Array, Floats]:
    """Rows for groups x, w [G, runs, run] at scales [G]: indices, shifts (0 or -1, 1) [G, runs], codes."""
    n, runs, run = x.shape
    flat, heavy, each = x.reshape(-1, run), w.reshape(-1, run), np.repeat(scale, runs)
    if not kind.shift:
        index, _ = nearest(flat, heavy, each, kind.table, 0)
        codes = rows(kind.table, 0)[index]
        return index.reshape(n, runs), np.zeros((n, runs), np.int8), codes.reshape(x.shape)
    tries = [nearest(flat, heavy, each, kind.table, shift) for shift in (1, -1)]
    loss = [e.reshape(-1, kind.shift).sum(-1) for _, e in tries]
    down = np.repeat(loss[1] < loss[0], kind.shift)
    index = np.where(down, tries[1][0], tries[0][0])
    shifts = np.where(down, np.int8(-1), np.int8(1))
    codes = rows(kind.table, 1)[index] - 2 * down[:, None]
    return index.reshape(n, runs), shifts.reshape(n, runs), codes.reshape(x.shape)


def fitted(x: Floats, w: Floats, kind: Kind) -> Floats:
    """The scale of each group x, w [G, runs, run] with the smallest error -> [G]."""
    top = 15.0 if kind.table == "IQ3_S" else 9.0 if kind.shift else TOPS[x.shape[-1]]
    first = np.abs(x).max((1, 2)) / np.float32(top)
    best: Floats = np.zeros_like(first)
    scale: Floats = first.copy()
    for stretch in (*STRETCHES, *[None] * ROUNDS):
        tried = scale if stretch is None else first * stretch
        _, _, codes = chosen(x, w, tried, kind)
        xq, qq = (w * x * codes).sum((1, 2)), (w * codes * codes).sum((1, 2))
        s = divide(xq, qq)
        gain = s * xq
        better = (gain > best) & (s > 0)
        best, scale = np.where(better, gain, best), np.where(better, s, scale)
    return scale


def encode(name: str, x: Floats, w: Floats | None) -> tuple[Array, Array, Array, Array, Array]:
    """Blocks x, w [N, 256] -> d half [N], s [N, groups], indices, shifts [N, runs], signs u1 [N, 32]."""
    kind = KINDS[name]
    n, run = len(x), codebook(kind.table).shape[1]
    w = np.ones_like(x) if w is None else w
    signs, size = np.zeros((n, 32), np.uint8), x
    if not kind.shift:
        minus = (x < 0).reshape(n, 32, 8)
        size = np.abs(x)
        if kind.even:
            odd = minus.sum(-1) % 2 == 1
            least = (w * x * x).reshape(n, 32, 8).argmin(-1)
            flip = np.arange(8) == np.where(odd, least, -1)[..., None]
            minus ^= flip
            size = np.where(flip.reshape(n, 256), -size, size)
        signs = (minus * SIGNS).sum(-1).astype(np.uint8)
    groups = 256 // kind.group
    shape = (n * groups, kind.group // run, run)
    xs, ws = size.reshape(shape), w.reshape(shape)
    scale = fitted(xs, ws, kind).reshape(n, groups)
    d = (scale.max(-1) / np.float32(kind.unit * (2 * kind.most + 1))).astype(np.float16)
    step = d.astype(np.float32)[:, None] * np.float32(kind.unit)
    s = np.rint((divide(scale, step) - 1) / 2).clip(0, kind.most)
    exact = (step * (2 * s + 1)).reshape(-1)
    index, shifts, codes = chosen(xs, ws, exact, kind)
    # with the codes chosen, d has a closed form
    whole = (codes.reshape(n, groups, -1) * (2 * s + 1)[..., None]).reshape(n, 256)
    unit = np.float32(kind.unit)
    d = divide((w * size * whole).sum(-1), (w * whole * whole).sum(-1) * unit).astype(np.float16)
    return d, s.astype(np.uint16), index.reshape(n, -1), shifts.reshape(n, -1), signs


def nibbles(s: Array) -> Array:
    """Four-bit numbers in pairs, the first of each in the low bits: [N, n] -> u1 [N, n / 2]."""
    return pack_fields(s.astype(np.uint8).reshape(len(s), -1, 2), 4)


def sevens(signs: Array, s: Array) -> Array:
    """Seven signs of each of four runs and a scale above them: [N, 32], [N, 8] -> u4 [N, 8]."""
    parts = (signs & 127).astype(np.uint32).reshape(len(signs), 8, 4)
    parts = parts << np.array([0, 7, 14, 21], np.uint32)
    words: Array = np.bitwise_or.reduce(parts, axis=-1) | s.astype(np.uint32) << 28
    return words


def iq2_xxs(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ2_XXS)
    blocks["d"], s, index, _, signs = encode("IQ2_XXS", x, w)
    blocks["qs"]["index"] = index.reshape(len(x), 8, 4)
    blocks["qs"]["signs"] = sevens(signs, s)
    return blocks


def iq2_xs(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ2_XS)
    blocks["d"], s, index, _, signs = encode("IQ2_XS", x, w)
    blocks["qs"] = index | (signs & 127).astype(np.uint16) << 9
    blocks["scales"] = nibbles(s)
    return blocks


def iq2_s(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ2_S)
    blocks["d"], s, index, _, blocks["signs"] = encode("IQ2_S", x, w)
    blocks["qs"], blocks["scales"] = index & 255, nibbles(s)
    blocks["qh"] = pack_fields((index >> 8).astype(np.uint8).reshape(len(x), 8, 4), 2)
    return blocks


def iq3_xxs(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ3_XXS)
    blocks["d"], s, blocks["qs"], _, signs = encode("IQ3_XXS", x, w)
    blocks["signs"] = sevens(signs, s)
    return blocks


def iq3_s(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ3_S)
    blocks["d"], s, index, _, blocks["signs"] = encode("IQ3_S", x, w)
    blocks["qs"], blocks["scales"] = index & 255, nibbles(s)
    blocks["qh"] = pack_fields((index >> 8).astype(np.uint8).reshape(len(x), 8, 8), 1)
    return blocks


def iq1_s(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ1_S)
    blocks["d"], s, index, shifts, _ = encode("IQ1_S", x, w)
    blocks["qs"] = index & 255
    high = (index >> 8).reshape(len(x), 8, 4) << np.array([0, 3, 6, 9])
    minus = (shifts.reshape(len(x), 8, 4)[..., 0] < 0).astype(np.uint16)
    blocks["qh"] = np.bitwise_or.reduce(high, axis=-1) | s << 12 | minus << 15
    return blocks


def iq1_m(x: Floats, w: Floats | None = None) -> Array:
    blocks = np.zeros(len(x), IQ1_M)
    d, s, index, shifts, _ = encode("IQ1_M", x, w)
    blocks["qs"] = index & 255
    blocks["qh"] = nibbles(index >> 8 | (shifts < 0).astype(np.int64) << 3)
    words = s.reshape(len(x), 4, 4) << np.array([0, 3, 6, 9], np.uint16)
    half = d.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 15
    blocks["scales"] = np.bitwise_or.reduce(words, axis=-1) | half << 12
    return blocks


WRITERS = {
    "IQ1_S": iq1_s, "IQ1_M": iq1_m, "IQ2_XXS": iq2_xxs, "IQ2_XS": iq2_xs, "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs, "IQ3_S": iq3_s,
}  # fmt: skip
