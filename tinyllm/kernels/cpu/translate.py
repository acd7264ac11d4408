"""From a Python function to LLVM IR: the part of Python that kernels are written in.

A value is an int64, a float32, a float64, a truth value or a vector of ``simd``; a variable keeps its type
throughout a branch or a loop. Statements: assignments, ``if``, ``while``, ``for .. in range``, ``break``,
``continue``, ``return``. Expressions: arithmetic, comparisons, ``and``, ``or``, ``not``, ``a if c else b``, and
calls: of emitters, of other such functions (written in line), of ``min``, ``max``, ``abs``, of types
(conversions) and of a few functions of ``math``. The rules are numba's: an int and a float32 make a float64.
numba itself would take a second for most kernels: it infers types, and compiles each helper apart.

A global that is a number is a constant, and of an ``if`` on constants only one side is translated. What is not
translated is refused with its line: nothing is dropped. This is a subset on purpose, in at most 500 lines: no
lists, no subscripts, no objects, no exceptions, no closures made in a kernel, no recursion.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from types import FunctionType
from typing import Any, NoReturn, TypeAlias

from llvmlite import ir

from .arithmetic import CASTS, MATH, Arithmetic, widest
from .emit import F32, I64, Emit
from .simd import Emitter
from .source import definition

COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
PyFunction: TypeAlias = Callable[..., Any]  # a kernel, or what it calls, as Python has it
DEEPEST = 32  # calls within calls: more are taken for recursion
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
    function: PyFunction,
    name: str,
    triple: str,
    kinds: Mapping[str, ir.Type] | None,
    given: Mapping[str, Any],
) -> ir.Module:
    """A module with a function of four integers that returns nothing, under a name.

    Given the ``kinds`` of its ``parameters`` it is a kernel: the integers are (args, first, last, worker), and
    the parameters before ``first`` are read from the address ``args``, 8 bytes each. Else it takes the four.
    ``given`` values replace globals of the function's file, there and in what it calls of that file.
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
    Body(b, function, values, (function.__globals__, given))
    b.ret_void()
    return module


class Body(Arithmetic):
    """The statements of one call, written where the builder stands; ``result`` is what it returns."""

    def __init__(
        self,
        b: ir.IRBuilder,
        function: Any,
        args: Sequence[Any],
        given: tuple[dict[str, Any], Mapping[str, Any]],
        depth: int = 0,
    ) -> None:
        super().__init__(b)
        self.function, self.given, self.depth = function, given, depth
        cells = function.__closure__ or ()
        inner = zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True)
        home, values = given  # the globals of the kernel's file, and what replaces some of them
        new = values if function.__globals__ is home else {}
        self.globals = {**vars(builtins), **function.__globals__, **new, **dict(inner)}
        self.places: dict[str, Any] = {}  # where local variables are stored
        # the variables with a value on every way here; None: no way leads here
        self.known: set[str] | None = set()
        # where to continue, where to go on after, what is known at each break
        self.loops: list[tuple[ir.Block, ir.Block, list[set[str] | None]]] = []
        self.exit = b.append_basic_block("exit")
        self.returned: list[tuple[Any, ir.Block]] = []
        node = definition(function)
        self.here: ast.stmt = node  # the statement being translated
        self.arguments(node.args, args)
        self.run(node.body)
        self.leave(None)
        b.position_at_end(self.exit)
        self.result = self.join(self.returned)

    def arguments(self, given: ast.arguments, values: Sequence[Any]) -> None:
        """Parameters become variables."""
        if given.defaults or given.kwonlyargs or given.vararg or given.kwarg:
            self.refuse(
                self.here, "a kernel's parameters have no defaults, no stars and no names only"
            )
        for parameter, value in zip([*given.posonlyargs, *given.args], values, strict=True):
            self.assign(ast.Name(parameter.arg), value)

    # ---- statements

    def run(self, statements: Sequence[ast.stmt]) -> None:
        for s in statements:
            if self.b.block.is_terminated:
                return  # behind a break or a return
            self.here = s
            try:
                getattr(self, type(s).__name__, self.refuse)(s)
            except TypeError as error:
                self.refuse(self.here, str(error))

    def refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        """Raise a SyntaxError that names the line of the file."""
        line = getattr(node, "lineno", getattr(self.here, "lineno", 0))
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
        if not isinstance(s.target, ast.Name):
            self.refuse(s.target)
        now = self.value(ast.copy_location(ast.Name(s.target.id), s.target))
        self.assign(s.target, self.binary(type(s.op), now, self.value(s.value)))

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            if not isinstance(value, tuple) or len(value) != len(target.elts):
                self.refuse(
                    target, f"{ast.unparse(target)} is set to what is not {len(target.elts)} values"
                )
            for part, v in zip(target.elts, value, strict=True):
                self.assign(part, v)
        elif isinstance(target, ast.Name):
            value = self.typed(value)
            place = self.places.get(target.id)
            if place is None or place.type.pointee != value.type:
                place = self.places[target.id] = self.e.room(value.type)
            self.b.store(value, place)
            if self.known is not None:
                self.known.add(target.id)
        else:
            self.refuse(target)

    def Return(self, s: ast.Return) -> None:
        value = None if s.value is None else self.value(s.value)
        if value is not None:
            value = tuple(map(self.typed, value)) if isinstance(value, tuple) else self.typed(value)
        self.leave(value)

    def leave(self, value: Any) -> None:
        if self.b.block.is_terminated:
            return
        if value is None and self.known is None:
            self.b.unreachable()  # every way here returned before
            return
        if len({kind_of(v) for v in (value, *(v for v, _ in self.returned))}) > 1:
            self.refuse(
                self.here,
                f"{self.function.__name__} does not always return a value of one type",
            )
        self.returned.append((value, self.b.block))
        self.b.branch(self.exit)
        self.known = None

    def Break(self, s: ast.Break) -> None:
        _, after, known = self.loops[-1]
        known.append(self.known)
        self.b.branch(after)
        self.known = None

    def Continue(self, s: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])
        self.known = None

    def If(self, s: ast.If) -> None:
        condition = self.truth_of(s.test)
        if isinstance(condition, bool):
            return self.run(s.body if condition else s.orelse)
        then, other, after = (self.b.append_basic_block(n) for n in ("then", "else", "endif"))
        self.b.cbranch(condition, then, other)
        before, known, ends = dict(self.places), self.known, []
        for block, statements in ((then, s.body), (other, s.orelse)):
            self.b.position_at_end(block)
            self.known = copy(known)
            self.run(statements)
            ends.append(self.known)
            self.goto(after)
            self.same_types(s, before)
            before = dict(self.places)
        self.known = common(ends)
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
    def loop(self, node: ast.For | ast.While, following: ir.Block) -> Iterator[None]:
        """The body of a loop: after it, go to ``following`` and stand behind the loop."""
        if node.orelse:
            self.refuse(node.orelse[0], "a loop of a kernel cannot have an else")
        after, before, known = (
            self.b.append_basic_block("endloop"),
            dict(self.places),
            copy(self.known),
        )
        endless = isinstance(node, ast.While) and getattr(node.test, "value", None) is True
        self.loops.append((following, after, [None if endless else known]))
        yield
        self.known = common(self.loops.pop()[2])
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
        if not isinstance(call, ast.Call) or self.value(call.func) is not range or call.keywords:
            self.refuse(s.iter)
        self.count(call, 1, 3)
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

    def Constant(self, node: ast.Constant) -> Any:
        return node.value

    def Name(self, node: ast.Name) -> Any:
        if node.id in self.places and (self.known is None or node.id in self.known):
            return self.b.load(self.places[node.id])
        if node.id in self.globals and node.id not in self.function.__code__.co_varnames:
            return self.globals[node.id]
        return self.refuse(node, f"{node.id!r} has no value yet, or not on every way here")

    def Attribute(self, node: ast.Attribute) -> Any:
        of = self.value(node.value)
        return self.refuse(node) if isinstance(of, ir.Value) else getattr(of, node.attr)

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
        return self.binary(type(node.op), self.value(node.left), self.value(node.right))

    def truth_of(self, node: ast.expr) -> Any:
        return self.truth(self.value(node))

    def Compare(self, node: ast.Compare) -> Any:
        left, found = self.value(node.left), None
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.value(right_node)
            if type(op) not in COMPARE:
                self.refuse(node)
            one = self.compare(COMPARE[type(op)], left, right)
            found = one if found is None else self.b.and_(self.typed(found), self.typed(one))
            left = right
        return found

    def BoolOp(self, node: ast.BoolOp) -> Any:
        """The rest is looked at only where the first part does not decide."""
        decisive = isinstance(node.op, ast.Or)
        first = self.truth_of(node.values[0])
        others = node.values[1:]
        if isinstance(first, bool):
            if first is decisive or not others:
                return first
            rest = others[0] if len(others) == 1 else ast.BoolOp(node.op, others)
            return self.truth_of(ast.copy_location(rest, node))
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
        if isinstance(values[0], tuple):
            ends = [block for _, block in incoming]
            return tuple(
                self.join(list(zip(vs, ends, strict=True))) for vs in zip(*values, strict=True)
            )
        phi = self.b.phi(values[0].type)
        for v, block in incoming:
            phi.add_incoming(v, block)
        return phi

    # ---- calls

    def Call(self, node: ast.Call) -> Any:
        f, args = self.value(node.func), [self.value(a) for a in node.args]
        if node.keywords:
            self.refuse(node, f"{ast.unparse(node)}: arguments in kernels have no names")
        if isinstance(f, Emitter):
            self.count(node, len(f.args))
            return f.emit(self.e, *(self.cast(a, ty) for a, ty in zip(args, f.args, strict=True)))
        if isinstance(f, FunctionType):
            self.count(node, f.__code__.co_argcount)
            if self.depth == DEEPEST:
                self.refuse(
                    node, f"{f.__name__} is called {DEEPEST} calls deep; kernels cannot recurse"
                )
            return Body(self.b, f, args, self.given, self.depth + 1).result
        if f in (min, max):
            self.count(node, 2, len(args))
            return self.extreme("<" if f is min else ">", args)
        self.count(node, 1)
        if f is abs:
            return self.absolute(self.typed(args[0]))
        if f in MATH or f is math.log1p:
            return self.mathematics(f, self.typed(args[0]))
        if isinstance(f, ir.Type) or f in CASTS:
            return self.converted(args[0], CASTS.get(f, f))
        return self.refuse(node)

    def count(self, call: ast.Call, least: int, most: int = 0) -> None:
        """Refuse a call with another number of arguments."""
        if not least <= len(call.args) <= max(least, most):
            wanted = f"{least} to {most}" if most > least else f"{least}"
            self.refuse(
                call, f"{ast.unparse(call)} has {len(call.args)} arguments; expected {wanted}"
            )


def kind_of(value: Any) -> Any:
    """The type of what a function returns: one of LLVM's, several, or None."""
    return tuple(v.type for v in value) if isinstance(value, tuple) else value and value.type


def common(ways: list[set[str] | None]) -> set[str] | None:
    """The variables that have a value on each of the ways that meet here; None if there is no way."""
    there = [known for known in ways if known is not None]
    return set.intersection(*there) if there else None
