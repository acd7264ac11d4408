"""Arithmetic of PTX, over arrays with the bits of each thread's registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

WARP = 32
Bits = np.ndarray


class Fault(Exception):
    """The code does what a device would punish, or nobody notices: a wrong address, a race."""


@cache
def operation(op: tuple[str, ...]) -> Callable[..., Bits]:
    """What an instruction without side effects makes of its operands' bits."""
    name = op[0]
    if name == "cvt":
        return _conversion(op[1:])
    if name in ("mul", "mad") and ("wide" in op or "hi" in op):
        return _wide(name, op)
    if name in SPECIAL:
        return SPECIAL[name](op)
    kind = op[-1]
    if kind == "f16x2":
        return _pairwise(name)
    if name in ANY:
        return _typed(ANY[name], kind)
    table = FLOAT if kind[0] == "f" else INTEGER
    if name not in table:
        raise NotImplementedError(".".join(op))
    rounding = next((p for p in op if p in ("rm", "rz")), None)
    if rounding and name in ("fma", "add", "mul") and kind == "f32":
        return _typed(_rounded(name, rounding), kind)
    operation = _saturated(table[name]) if "sat" in op else table[name]
    return _typed(operation, kind)


@cache
def numpy_type(kind: str) -> np.dtype[Any]:
    """NumPy's type for a type of PTX, such as s32, b16 or f32."""
    letter = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    return np.dtype(f"{letter}{int(kind[1:]) // 8}")


def as_type(x: Bits, kind: str) -> np.ndarray:
    """The low bits of a register as numbers of this type."""
    dtype = numpy_type(kind)
    if x.dtype.itemsize != dtype.itemsize:
        x = x.astype(f"u{dtype.itemsize}")
    return x.view(dtype)


def as_bits(x: np.ndarray) -> Bits:
    """Signed numbers are extended by their sign when the register is wider."""
    if x.dtype.kind == "i" and x.dtype.itemsize < 4:
        return x.astype(np.int64).view(np.uint64)
    return x if x.dtype.kind in "ub" else np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _typed(f: Callable[..., np.ndarray], kind: str) -> Callable[..., Bits]:
    if kind == "pred":
        return f
    dtype = numpy_type(kind)

    def run(*sources: Bits) -> Bits:
        return as_bits(f(*[as_type(x, kind) for x in sources]).astype(dtype, copy=False))

    return run


def _shifted(left: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Shifts by the width and more give zeros, or the sign."""

    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        width = 8 * x.dtype.itemsize
        by = by.astype(f"u{x.dtype.itemsize}") if by.dtype.kind == "i" else by
        safe = np.minimum(by, width - 1).astype(x.dtype)
        y = np.left_shift(x, safe) if left else np.right_shift(x, safe)
        signed = x.dtype.kind == "i" and not left
        return y if signed else np.where(by < width, y, 0)

    return shift


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Toward zero."""
    y = np.where(y == 0, 1, y)
    q = np.floor_divide(np.abs(x), np.abs(y))
    return np.where((x < 0) != (y < 0), -q, q) if x.dtype.kind == "i" else x // y


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = np.where(y == 0, 1, y)
    return x - _quotient(x, y) * y


INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,  # .lo
    "mad": lambda x, y, z: x * y + z,
    "div": _quotient,
    "rem": _remainder,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": lambda x: -x,
    "shl": _shifted(left=True),
    "shr": _shifted(left=False),
    "popc": lambda x: np.array([int(v).bit_count() for v in x]),
}


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    if x.dtype == np.float64:
        return x * y + z
    return (x.astype(np.float64) * y + z).astype(x.dtype)  # the product of two floats is exact


FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "fma": _fma,
    "div": lambda x, y: x / y,
    "min": np.fmin,
    "max": np.fmax,
    "abs": np.abs,
    "neg": lambda x: -x,
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": lambda x, y: np.copysign(y, x),  # the first one's sign
}
ANY: dict[str, Callable[..., np.ndarray]] = {
    "mov": np.copy,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "not": np.invert,
}


def _saturated(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *x: np.clip(np.nan_to_num(f(*x), nan=0.0), 0, 1)


def _rounded(name: str, rounding: str) -> Callable[..., np.ndarray]:
    """Floats rounded down (rm) or toward zero (rz)."""
    exact: dict[str, Callable[..., np.ndarray]] = {
        "fma": lambda x, y, z: x * y + z,
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
    }

    def run(*sources: np.ndarray) -> np.ndarray:
        wide = exact[name](*(x.astype(np.float64) for x in sources))
        near = wide.astype(np.float32)
        down = np.nextafter(near, np.float32(-np.inf))
        up = np.nextafter(near, np.float32(np.inf))
        below = np.where(near > wide, down, near)
        above = np.where(near < wide, up, near)
        return below if rounding == "rm" else np.where(wide < 0, above, below)

    return run


def _pairwise(name: str) -> Callable[..., Bits]:
    """Two halves in a register."""
    f = FLOAT[name]

    def run(*sources: Bits) -> Bits:
        pairs = [np.ascontiguousarray(x.astype(np.uint32)).view(np.float16) for x in sources]
        if name == "fma":
            exact = pairs[0].astype(np.float64) * pairs[1] + pairs[2]
            return exact.astype(np.float16).view(np.uint32)
        return f(*pairs).astype(np.float16).view(np.uint32)

    return run


def _conversion(parts: tuple[str, ...]) -> Callable[..., Bits]:
    """cvt: rounding, saturation, the target's type and the source's."""
    target, source = parts[-2:]
    if target == "f16x2":

        def pair(high: Bits, low: Bits) -> Bits:
            halves = [as_type(x, source).astype(np.float16).view(np.uint16) for x in (low, high)]
            return halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << 16

        return pair
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    rounding = next((whole[p] for p in parts if p in whole), None)
    dtype = numpy_type(target)

    def run(x: Bits) -> Bits:
        y = as_type(x, source)
        if rounding is not None:
            y = rounding(y)
        if "sat" in parts and dtype.kind == "f":
            y = np.clip(np.nan_to_num(y, nan=0.0), 0, 1)
        if dtype.kind != "f" and y.dtype.kind == "f":
            limits = np.iinfo(dtype)
            y = np.clip(np.nan_to_num(y.astype(np.float64), nan=0.0), limits.min, limits.max)
        return as_bits(y.astype(dtype))

    return run


def _wide(name: str, op: tuple[str, ...]) -> Callable[..., Bits]:
    """Products of twice the width, or their upper half."""
    kind = op[-1]
    width = int(kind[1:])

    def run(x: Bits, y: Bits, *z: Bits) -> Bits:
        if width == 64:
            assert "hi" in op
            signed = kind[0] == "s"
            numbers = ([int(v) for v in as_type(a, kind)] for a in (x, y))
            high = [(a * b >> 64) & 0xFFFFFFFFFFFFFFFF for a, b in zip(*numbers, strict=True)]
            assert not signed or high
            return np.array(high, np.uint64)
        both = (as_type(a, kind).astype(np.int64 if kind[0] == "s" else np.uint64) for a in (x, y))
        product = next(both) * next(both)
        if "hi" in op:
            product = product >> width
        bits = product.view(np.uint64)
        if name == "mad":
            bits = bits + z[0].astype(np.uint64)
        return bits

    return run


COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}


def _setp(op: tuple[str, ...]) -> Callable[..., Bits]:
    how, kind = op[1], op[-1]

    def run(x: Bits, y: Bits, *also: Bits) -> Bits:
        a, b = as_type(x, kind), as_type(y, kind)
        unordered = kind[0] == "f" and how not in COMPARE
        if how == "nan" or how == "num":
            found = (np.isnan(a) | np.isnan(b)) == (how == "nan")
        elif kind[0] == "f":
            nan = np.isnan(a) | np.isnan(b)
            name = how[:-1] if unordered else how
            found = np.where(nan, unordered, COMPARE[name](a, b))
        else:
            found = COMPARE[how](a, b)
        if also:
            found = {"and": np.logical_and, "or": np.logical_or}[op[2]](found, also[0])
        return found

    return run


def _selp(op: tuple[str, ...]) -> Callable[..., Bits]:
    return lambda x, y, p: np.where(p, x, y)


def _prmt(op: tuple[str, ...]) -> Callable[..., Bits]:
    """Bytes of two words by nibbles; the upper bit of one repeats the byte's sign."""
    assert len(op) == 2

    def run(x: Bits, y: Bits, pick: Bits) -> Bits:
        both = x.astype(np.uint64) & 0xFFFFFFFF | y.astype(np.uint64) << 32
        pick, out = pick.astype(np.uint64), np.zeros(len(x), np.uint64)
        for i in range(4):
            nibble = pick >> (4 * i) & 15
            byte = both >> 8 * (nibble & 7) & 255
            byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
            out |= byte.astype(np.uint64) << (8 * i)
        return out

    return run


def _dp4a(op: tuple[str, ...]) -> Callable[..., Bits]:
    def run(x: Bits, y: Bits, z: Bits) -> Bits:
        total = as_type(z, "s32").astype(np.int64)
        for i in range(4):
            a, b = (as_type(v.astype(np.uint64) >> (8 * i), k[0] + "8")
                    for v, k in ((x, op[1]), (y, op[2])))  # fmt: skip
            total += a.astype(np.int64) * b
        return total.view(np.uint64) & 0xFFFFFFFF

    return run


def _bfi(op: tuple[str, ...]) -> Callable[..., Bits]:
    """The low bits of x into y."""

    def run(x: Bits, y: Bits, start: Bits, length: Bits) -> Bits:
        start, length = (v.astype(np.uint64) & 255 for v in (start, length))
        ones = np.where(
            length < 64, (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1), ~np.uint64(0)
        )
        mask = ones << start
        return y.astype(np.uint64) & ~mask | x.astype(np.uint64) << start & mask

    return run


def _bfe(op: tuple[str, ...]) -> Callable[..., Bits]:
    kind = op[1]
    assert kind in ("u32", "s32")

    def run(x: Bits, start: Bits, length: Bits) -> Bits:
        start, length = (v.astype(np.int64) & 255 for v in (start, length))
        wide = as_type(x, kind).astype(np.int64)
        part = wide >> np.minimum(start, 63) & ((1 << length) - 1)
        if kind == "s32":
            sign = 1 << np.maximum(length - 1, 0)
            part = (part ^ sign) - sign
        return part.view(np.uint64)

    return run


def _lop3(op: tuple[str, ...]) -> Callable[..., Bits]:
    def run(x: Bits, y: Bits, z: Bits, table: Bits) -> Bits:
        x, y, z = (v.astype(np.uint32) for v in (x, y, z))
        out, code = np.zeros_like(x), int(table[0])
        for i in range(8):
            if code >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return out

    return run


def _shf(op: tuple[str, ...]) -> Callable[..., Bits]:
    """A funnel shift."""

    def run(low: Bits, high: Bits, by: Bits) -> Bits:
        by = by.astype(np.uint64)
        by = by & 31 if op[2] == "wrap" else np.minimum(by, 32)
        both = low.astype(np.uint64) & 0xFFFFFFFF | high.astype(np.uint64) << 32
        return (both << by) >> 32 if op[1] == "l" else both >> by & 0xFFFFFFFF

    return run


SPECIAL: dict[str, Callable[[tuple[str, ...]], Callable[..., Bits]]] = {
    "setp": _setp,
    "selp": _selp,
    "prmt": _prmt,
    "dp4a": _dp4a,
    "bfi": _bfi,
    "bfe": _bfe,
    "lop3": _lop3,
    "shf": _shf,
}
