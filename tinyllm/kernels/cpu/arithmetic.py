"""What operators and functions do to the values of a kernel, as Python rounds and converts them.

A value is a Python number, if it is known while kernels are translated, or an IR value.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from .emit import F32, F64, I1, I64, Emit

SIGNS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge,
}  # fmt: skip
FLOATS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
INTEGERS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.LShift: "shl", ast.RShift: "ashr",
    ast.BitAnd: "and_", ast.BitOr: "or_", ast.BitXor: "xor",
}  # fmt: skip
FOLDED = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
CASTS = {np.float32: F32, np.float64: F64, float: F64, int: I64}
MATH = {math.sqrt: "sqrt", math.exp: "exp", math.sin: "sin", math.cos: "cos", np.rint: "rint"}


class Arithmetic:
    """Writes operations where the builder stands. TypeError where there is none for such values."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b, self.e = b, Emit(b)

    def typed(self, v: Any) -> ir.Value:
        """A constant as an IR value."""
        if isinstance(v, ir.Value):
            return v
        if isinstance(v, bool | np.bool_):
            return I1(int(v))
        if isinstance(v, int | np.integer):
            return I64(int(v))
        if isinstance(v, np.float32 | float):
            return ir.Constant(F32 if isinstance(v, np.float32) else F64, float(v))
        raise TypeError(f"{v!r} is no value of a kernel")

    def binary(self, op: type[ast.operator], x: Any, y: Any) -> Any:
        if type(x) is type(y) is int and op in FOLDED:
            return FOLDED[op](x, y)
        by = y
        x, y = self.alike(x, y)
        if x.type == I64 and op is ast.Div:
            x, y = self.cast(x, F64), self.cast(y, F64)
        if x.type != I64 and op in FLOATS:
            return getattr(self.b, FLOATS[op])(x, y)
        if x.type == I64 and op in INTEGERS:
            return getattr(self.b, INTEGERS[op])(x, y)
        if x.type == I64 and op in (ast.FloorDiv, ast.Mod):
            quotient, rest = self.divided(x, y, by)
            return quotient if op is ast.FloorDiv else rest
        raise TypeError(f"kernels have no {op.__name__} of {x.type}")

    def divided(self, x: Any, y: Any, by: Any) -> tuple[Any, Any]:
        """Quotient and remainder as Python rounds them, zeros if y is 0."""
        b = self.b
        if isinstance(by, int) and by > 0 and by & (by - 1) == 0:
            return b.ashr(x, I64(by.bit_length() - 1)), b.and_(x, I64(by - 1))
        none = b.icmp_signed("==", y, I64(0))
        y = b.select(none, I64(1), y)
        rest = b.srem(x, y)
        differs = b.icmp_signed("<", b.xor(rest, y), I64(0))
        under = b.and_(differs, b.icmp_signed("!=", rest, I64(0)))
        quotient = b.sub(b.sdiv(x, y), b.zext(under, I64))
        rest = b.add(rest, b.select(under, y, I64(0)))
        return b.select(none, I64(0), quotient), b.select(none, I64(0), rest)

    def alike(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Both as the type that holds them."""
        x, y = self.typed(x), self.typed(y)
        ty = widest({x.type, y.type})
        ty = I64 if ty == I1 else ty
        return self.cast(x, ty), self.cast(y, ty)

    def cast(self, v: Any, ty: ir.Type) -> Any:
        """v as a type."""
        b, v = self.b, self.typed(v)
        if v.type == ty:
            return v
        known = {
            (I1, I64): b.zext, (I1, F32): b.uitofp, (I1, F64): b.uitofp, (I64, F32): b.sitofp,
            (I64, F64): b.sitofp, (F32, F64): b.fpext, (F64, F32): b.fptrunc, (F32, I64): b.fptosi,
            (F64, I64): b.fptosi,
        }  # fmt: skip
        if ty == I1:
            return self.typed(self.truth(v))
        if (v.type, ty) not in known:
            raise TypeError(f"{v.type} where {ty} is expected")
        return known[v.type, ty](v, ty)

    def truth(self, v: Any) -> Any:
        """A bool if known now, else an i1."""
        if not isinstance(v, ir.Value):
            return bool(v)
        if v.type == I1:
            return v
        if v.type == I64:
            return self.b.icmp_signed("!=", v, I64(0))
        return self.b.fcmp_unordered("!=", v, v.type(0.0))

    def compare(self, op: str, x: Any, y: Any) -> Any:
        if not isinstance(x, ir.Value) and not isinstance(y, ir.Value):
            return bool(SIGNS[op](x, y))
        x, y = self.alike(x, y)
        if x.type == I64:
            return self.b.icmp_signed(op, x, y)
        return (self.b.fcmp_unordered if op == "!=" else self.b.fcmp_ordered)(op, x, y)

    def converted(self, v: Any, ty: ir.Type) -> Any:
        if not isinstance(v, ir.Value) and ty == F32:
            return np.float32(v)
        return self.cast(v, ty)

    def extreme(self, op: str, args: list[Any]) -> Any:
        """Python's rule: a later value wins if it compares so with the best before."""
        if all(type(a) is int for a in args):
            return min(args) if op == "<" else max(args)
        best = args[0]
        for v in args[1:]:
            v, best = self.alike(v, best)
            best = self.b.select(self.compare(op, v, best), v, best)
        return best

    def absolute(self, v: Any) -> Any:
        if v.type == I64:
            return self.b.select(self.b.icmp_signed("<", v, I64(0)), self.b.neg(v), v)
        return self.e.call(f"llvm.fabs.{_suffix(v.type)}", v.type, v)

    def mathematics(self, f: Callable[..., Any], v: Any) -> Any:
        v = self.cast(v, F64) if v.type == I64 else v
        if f is math.log1p:  # no instruction: the C library's
            return self.e.call("log1p" if v.type == F64 else "log1pf", v.type, v)
        return self.e.call(f"llvm.{MATH[f]}.{_suffix(v.type)}", v.type, v)


def widest(kinds: set[ir.Type]) -> ir.Type:
    """The type that holds values of all of these."""
    if len(kinds) == 1:
        return next(iter(kinds))
    return I64 if kinds == {I1, I64} else F32 if kinds == {I1, F32} else F64


def _suffix(ty: ir.Type) -> str:
    return "f32" if ty == F32 else "f64"
