"""From a Python function to LLVM IR: the part of Python that kernels are written in.

A value is an int64, a float32, a float64, a truth value or a vector of ``simd``; a variable keeps its type
throughout a branch or a loop. Statements: assignments, ``if``, ``while``, ``for .. in range``, ``break``,
``continue``, ``return``. Expressions: arithmetic, comparisons, ``and``, ``or``, ``not``, ``a if c else b``, and
calls: of emitters, of other such functions (written in line), of ``min``, ``max``, ``abs``, of types
(conversions) and of a few functions of ``math``. The rules are numba's: an int and a float32 make a float64.
numba itself would take a second for most kernels: it infers types, and compiles each helper apart.

A global that is a number is a constant, and of an ``if`` on constants only one side is translated.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn, TypeAlias

import numpy as np
from llvmlite import ir

from .emit import F32, F64, I1, I64, Emit
from .simd import Emitter

COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
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


PyFunction: TypeAlias = Callable[..., Any]  # a kernel, or what it calls, as Python has it
WORK = ("first", "last", "worker")  # how a kernel's parameters end


def parameters(kernel: PyFunction) -> dict[str, ir.Type]:
    """Names and types of the arguments of a kernel's instructions: of what stands before ``first``.

    Raises
    ------
    TypeError
        The parameters do not end with first, last and worker, or one is annotated otherwise than ``f32``.
    """
    code, name = kernel.__code__, kernel.__name__
    names = code.co_varnames[: code.co_argcount]
    if names[-len(WORK) :] != WORK:
        raise TypeError(f"{name}({', '.join(names)}): parameters must end with {', '.join(WORK)}")
    try:
        given = inspect.get_annotations(kernel, eval_str=True)
    except NameError as error:
        raise TypeError(f"{name}: an annotation means nothing: {error}; expected f32") from None
    kinds = {n: CASTS.get(given.get(n, I64), given.get(n, I64)) for n in names[: -len(WORK)]}
    for n, kind in kinds.items():
        if kind not in (I64, F32):
            raise TypeError(
                f"{name}: {n} is annotated {kind}; expected f32, or nothing for an integer"
            )
    return kinds


def translate(
    function: PyFunction, name: str, triple: str, kinds: Mapping[str, ir.Type] | None
) -> ir.Module:
    """A module with a function of four integers that returns nothing, under a name.

    Given the ``kinds`` of its ``parameters`` it is a kernel: the integers are (args, first, last, worker), and
    the parameters before ``first`` are read from the address ``args``, 8 bytes each. Else it takes the four.
    """
    module = ir.Module(name)
    module.triple = triple
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), name)
    f.attributes.add("nounwind")
    b = ir.IRBuilder(f.append_basic_block("entry"))
    values = list(f.args)
    if kinds is not None:
        e, address = Emit(b), values.pop(0)
        values[:0] = [e.load(e.ptr(address), ty, 8 * i) for i, ty in enumerate(kinds.values())]
    Body(b, function, values)
    b.ret_void()
    return module


class Body:
    """The statements of one call, written where the builder stands; ``result`` is what it returns."""

    def __init__(self, b: ir.IRBuilder, function: Any, args: Sequence[Any]) -> None:
        self.b, self.e, self.function = b, Emit(b), function
        cells = function.__closure__ or ()
        inner = zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True)
        self.globals = {**vars(builtins), **function.__globals__, **dict(inner)}
        self.places: dict[str, Any] = {}  # where local variables are stored
        self.loops: list[tuple[ir.Block, ir.Block]] = []  # where to continue, where to go on after
        self.exit = b.append_basic_block("exit")
        self.returned: list[tuple[Any, ir.Block]] = []
        node = _definition(function)
        for parameter, value in zip(node.args.args, args, strict=True):
            self.assign(ast.Name(parameter.arg), value)
        self.run(node.body)
        self.leave(None)
        b.position_at_end(self.exit)
        self.result = self.join(self.returned)

    # ---- statements

    def run(self, statements: Sequence[ast.stmt]) -> None:
        for s in statements:
            if self.b.block.is_terminated:
                return  # behind a break or a return
            getattr(self, type(s).__name__, self.refuse)(s)

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        """Raise a SyntaxError that names the line."""
        line = self.function.__code__.co_firstlineno + getattr(node, "lineno", 1) - 1
        why = why or f"a kernel cannot have {ast.unparse(node)!r}"
        raise SyntaxError(f"{why}: {self.function.__code__.co_filename}, line {line}")

    def Expr(self, s: ast.Expr) -> None:
        if not isinstance(s.value, ast.Constant):  # a docstring
            self.value(s.value)

    def Pass(self, s: ast.Pass) -> None:
        """Nothing."""

    def Assign(self, s: ast.Assign) -> None:
        value = self.value(s.value)
        for target in s.targets:
            self.assign(target, value)

    def AugAssign(self, s: ast.AugAssign) -> None:
        assert isinstance(s.target, ast.Name)
        now = self.value(ast.copy_location(ast.Name(s.target.id), s.target))
        self.assign(s.target, self.binary(s, type(s.op), now, self.value(s.value)))

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            for part, v in zip(target.elts, value, strict=True):
                self.assign(part, v)
        elif isinstance(target, ast.Name):
            value = self.typed(value)
            place = self.places.get(target.id)
            if place is None or place.type.pointee != value.type:
                place = self.places[target.id] = self.e.room(value.type)
            self.b.store(value, place)
        else:
            self.refuse(target)

    def Return(self, s: ast.Return) -> None:
        self.leave(None if s.value is None else self.typed(self.value(s.value)))

    def leave(self, value: Any) -> None:
        if self.b.block.is_terminated:
            return
        if value is None and any(v is not None for v, _ in self.returned):
            self.b.unreachable()  # every way here returned a value before
            return
        self.returned.append((value, self.b.block))
        self.b.branch(self.exit)

    def Break(self, s: ast.Break) -> None:
        self.b.branch(self.loops[-1][1])

    def Continue(self, s: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])

    def If(self, s: ast.If) -> None:
        condition = self.truth_of(s.test)
        if isinstance(condition, bool):
            return self.run(s.body if condition else s.orelse)
        then, other, after = (self.b.append_basic_block(n) for n in ("then", "else", "endif"))
        self.b.cbranch(condition, then, other)
        before = dict(self.places)
        for block, statements in ((then, s.body), (other, s.orelse)):
            self.b.position_at_end(block)
            self.run(statements)
            self.goto(after)
            self.same_types(s, before)
            before = dict(self.places)
        self.b.position_at_end(after)
        return None

    def same_types(self, node: ast.AST, before: dict[str, Any]) -> None:
        """A variable that had a type before has it still; new ones stay."""
        for name, place in before.items():
            if self.places[name] is not place:
                self.refuse(node, f"{name!r} changes its type within a branch or a loop")

    def goto(self, block: ir.Block) -> None:
        if not self.b.block.is_terminated:
            self.b.branch(block)

    @contextmanager
    def loop(self, node: ast.AST, following: ir.Block) -> Iterator[None]:
        """The body of a loop: after it, go to ``following`` and stand behind the loop."""
        after, before = self.b.append_basic_block("endloop"), dict(self.places)
        self.loops.append((following, after))
        yield
        self.loops.pop()
        self.goto(following)
        self.same_types(node, before)
        self.b.position_at_end(after)

    def While(self, s: ast.While) -> None:
        head, body = (self.b.append_basic_block(n) for n in ("while", "body"))
        self.b.branch(head)
        with self.loop(s, head):
            self.b.position_at_end(head)
            self.b.cbranch(self.typed(self.truth_of(s.test)), body, self.loops[-1][1])
            self.b.position_at_end(body)
            self.run(s.body)

    def For(self, s: ast.For) -> None:
        call = s.iter
        if not isinstance(call, ast.Call) or self.value(call.func) is not range:
            self.refuse(s.iter)
        ends = [self.value(a) for a in call.args]
        start, stop, step = [0, *ends, 1] if len(ends) == 1 else [*ends, 1][:3]
        stop, step, i = self.typed(stop), self.typed(step), self.e.room(I64)
        self.b.store(self.typed(start), i)
        head, body, following = (self.b.append_basic_block(n) for n in ("for", "body", "next"))
        self.b.branch(head)
        with self.loop(s, following):
            self.b.position_at_end(head)
            now = self.b.load(i)
            up, down = (self.b.icmp_signed(sign, now, stop) for sign in "<>")
            more = self.b.select(self.b.icmp_signed(">", step, I64(0)), up, down)
            self.b.cbranch(more, body, self.loops[-1][1])
            self.b.position_at_end(body)
            self.assign(s.target, now)
            self.run(s.body)
            self.goto(following)
            self.b.position_at_end(following)
            self.b.store(self.b.add(self.b.load(i), step, flags=["nsw"]), i)
            self.b.branch(head)

    # ---- expressions: a Python object when known now, else an IR value

    def value(self, node: ast.expr) -> Any:
        return getattr(self, type(node).__name__, self.refuse)(node)

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
        raise TypeError(f"{self.function.__name__}: {v!r} is no value of a kernel")

    def Constant(self, node: ast.Constant) -> Any:
        return node.value

    def Name(self, node: ast.Name) -> Any:
        if node.id in self.places:
            return self.b.load(self.places[node.id])
        if node.id in self.globals:
            return self.globals[node.id]
        return self.refuse(node, f"{node.id!r} has no value yet")

    def Attribute(self, node: ast.Attribute) -> Any:
        return getattr(self.value(node.value), node.attr)

    def Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.value(v) for v in node.elts)

    def UnaryOp(self, node: ast.UnaryOp) -> Any:
        v = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            v = self.truth(v)
            return (not v) if isinstance(v, bool) else self.b.not_(v)
        if not isinstance(node.op, ast.USub):
            return self.refuse(node)
        if not isinstance(v, ir.Value):
            return -v
        return self.b.neg(v) if v.type == I64 else self.b.fneg(v)

    def BinOp(self, node: ast.BinOp) -> Any:
        return self.binary(node, type(node.op), self.value(node.left), self.value(node.right))

    def binary(self, node: ast.AST, op: type, x: Any, y: Any) -> Any:
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
        return self.refuse(node)

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
            raise TypeError(f"{self.function.__name__}: {v.type} where {ty} is expected")
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

    def truth_of(self, node: ast.expr) -> Any:
        return self.truth(self.value(node))

    def Compare(self, node: ast.Compare) -> Any:
        left, found = self.value(node.left), None
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node)
            one = self.compare(COMPARE[type(op)], left, right)
            found = one if found is None else self.b.and_(self.typed(found), self.typed(one))
            left = right
        return found

    def compare(self, op: str, x: Any, y: Any) -> Any:
        if not isinstance(x, ir.Value) and not isinstance(y, ir.Value):
            return bool(SIGNS[op](x, y))
        x, y = self.alike(x, y)
        if x.type == I64:
            return self.b.icmp_signed(op, x, y)
        return (self.b.fcmp_unordered if op == "!=" else self.b.fcmp_ordered)(op, x, y)

    def BoolOp(self, node: ast.BoolOp) -> Any:
        """The rest is looked at only where the first part does not decide."""
        decisive = isinstance(node.op, ast.Or)
        first = self.truth_of(node.values[0])
        others = node.values[1:]
        if isinstance(first, bool):
            if first is decisive or not others:
                return first
            rest = others[0] if len(others) == 1 else ast.BoolOp(node.op, others)
            return self.truth_of(rest)
        for other in others:
            first = self.choose(first, lambda: decisive, partial(self.truth_of, other), decisive)
        return first

    def IfExp(self, node: ast.IfExp) -> Any:
        condition = self.truth_of(node.test)
        if isinstance(condition, bool):
            return self.value(node.body if condition else node.orelse)
        then, other = (partial(self.value, n) for n in (node.body, node.orelse))
        return self.choose(condition, then, other)

    def choose(
        self, condition: Any, then: PyFunction, other: PyFunction, first: bool = True
    ) -> Any:
        """then() or other(), whichever the condition (or, if not ``first``, its opposite) asks for."""
        blocks = [self.b.append_basic_block(n) for n in ("this", "that")]
        after = self.b.append_basic_block("chosen")
        self.b.cbranch(condition, *(blocks if first else blocks[::-1]))
        ends = []
        for block, make in zip(blocks, (then, other), strict=True):
            self.b.position_at_end(block)
            v = self.typed(make())
            ends.append((v, self.b.block))
        ty = widest({v.type for v, _ in ends})
        incoming = []
        for v, block in ends:
            self.b.position_at_end(block)
            incoming.append((self.cast(v, ty), block))
            self.b.branch(after)
        self.b.position_at_end(after)
        return self.join(incoming)

    def join(self, incoming: list[tuple[Any, ir.Block]]) -> Any:
        """One value of several that meet here."""
        values = [v for v, _ in incoming]
        if not values or values[0] is None:
            return None
        phi = self.b.phi(values[0].type)
        for v, block in incoming:
            phi.add_incoming(v, block)
        return phi

    # ---- calls

    def Call(self, node: ast.Call) -> Any:
        f, args = self.value(node.func), [self.value(a) for a in node.args]
        if isinstance(f, Emitter):
            return f.emit(self.e, *(self.cast(a, ty) for a, ty in zip(args, f.args, strict=True)))
        if f in (min, max):
            return self.extreme("<" if f is min else ">", args)
        if f is abs:
            return self.absolute(self.typed(args[0]))
        if f in MATH or f is math.log1p:
            return self.mathematics(f, self.typed(args[0]))
        if isinstance(f, ir.Type) or f in CASTS:
            return self.converted(args[0], CASTS.get(f, f))
        if isinstance(f, FunctionType):
            return Body(self.b, f, args).result
        return self.refuse(node)

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

    def mathematics(self, f: PyFunction, v: Any) -> Any:
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


def _definition(function: FunctionType) -> ast.FunctionDef:
    code = function.__code__
    found = _definitions(code.co_filename).get(code.co_firstlineno)
    if found is None:
        raise OSError(f"the source of {function.__name__} is not in {code.co_filename}")
    return found


@lru_cache
def _definitions(path: str) -> dict[int, ast.FunctionDef]:
    """The functions of a file, by their first lines."""
    tree = ast.parse(Path(path).read_text("utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return {min([n.lineno, *(d.lineno for d in n.decorator_list)]): n for n in found}
