"""A Jinja environment that is safe to run on a template found in a downloaded file.

Jinja's immutable sandbox keeps a template away from Python's internals; it does not bound its work.
Here every statement, call, filter, test, operator and comparison draws on one allowance, in proportion
to the sizes it reads and makes, and whatever would make one value too large is refused before it is
made. The allowance is a number of steps, never a time: a template renders, or fails, alike everywhere.

Importing this module imports jinja2; `tinyllm.chat.render` does so at the first template.
"""

from __future__ import annotations

import functools
import operator
import re
import string
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, CompilerExit, Frame
from jinja2.compiler import operators as OPERATORS
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from .metering import MAX_BITS, NODE, PER_STEP, Meter, Stopped

MAX_SOURCE = 64 << 10  # characters of a template; the longest in use have 17,000
MAX_NODES = 10_000  # expressions and statements of a template
MAX_RANGE = 100_000

STR_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit"
    " isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition"
    " removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith"
    " strip swapcase title upper zfill format format_map".split()
)
METHODS: dict[type, frozenset[str]] = {
    str: STR_METHODS,
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
    int: frozenset({"bit_length"}),
}
FREE_RESULTS = frozenset({"get", "items", "keys", "values"})  # methods that make no new value

# Filters by what they cost: lazy ones yield element by element, shallow ones look at the value only,
# deep ones read all that is in it.
LAZY = frozenset("batch items map reject rejectattr reverse select selectattr slice unique".split())
SHALLOW = LAZY | frozenset(
    "abs count d default first float int last length list round safe".split()
)
PASSING = frozenset(
    {"d", "default", "first", "last"}
)  # filters that return a value they were given
DEEP = frozenset(
    "capitalize center dictsort e escape format groupby indent join lower max min replace sort string sum"
    " title tojson trim truncate upper wordcount".split()
)
COMPARING = frozenset(
    "== != < <= > >= eq equalto ne lt lessthan le gt greaterthan ge in lower upper".split()
)
PERCENT = re.compile(r"%(?:\([^()]{0,100}\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


class MeteredCode(CodeGenerator):
    """Generates the template's Python with the meter's calls in it."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        try:
            self.writeline("environment.meter.tick()")  # a loop's body may be empty
            for node in nodes:
                self.visit(node, frame)
                self.writeline("environment.meter.tick()")
        except CompilerExit:
            pass

    def _wrapped(self, name: str, visit: Callable[..., None], *args: Any) -> None:
        self.write(f"environment.{name}(")
        visit(*args)
        self.write(")")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:  # the condition also runs for elements that never reach the body
            node.test = nodes.And(nodes.EnvironmentAttribute("meter.tick()"), node.test)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate((")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._wrapped("compared", self.visit, node.expr, frame)
        for op in node.ops:
            self.write(f" {OPERATORS[op.op]} ")
            name = "searched" if op.op in ("in", "notin") else "compared"
            self._wrapped(name, self.visit, op.expr, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._wrapped("meter.made", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._wrapped("meter.made", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._wrapped("meter.made", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._wrapped("sliced", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)


class GenerationTag(Extension):
    """`{% generation %}`: marks the assistant's part for training; its body renders as it stands."""

    tags = {"generation"}  # noqa: RUF012 (as its base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates know it (transformers' options and names), metered."""

    code_generator_class = MeteredCode
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self.emit,
            extensions=[LoopControlExtension, GenerationTag],
        )
        self.meter = Meter()
        self.concat = self.concatenate  # type: ignore[method-assign]
        self.filters = {
            n: self._metered_filter(n, self.filters[n]) for n in SHALLOW | DEEP if n != "tojson"
        }
        self.tests = {name: self._metered_test(name, test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["range"] = self.range

    def parse_bounded(self, source: str) -> nodes.Template:
        """Parse a template; refuse one that is too long or does what a chat template has no use for."""
        if len(source) > MAX_SOURCE:
            raise Stopped(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        tree = self.parse(source)
        refused = (
            nodes.Include,
            nodes.Import,
            nodes.FromImport,
            nodes.Extends,
            nodes.ScopedEvalContextModifier,
        )
        for count, node in enumerate(tree.find_all(nodes.Node)):
            if count >= MAX_NODES:
                raise Stopped(f"it has more than {MAX_NODES} expressions")
            if isinstance(node, refused):
                tag = "autoescape" if isinstance(node, refused[-1]) else type(node).__name__.lower()
                raise Stopped(
                    f"line {node.lineno}: {{% {tag} %}} is not supported in a chat template"
                )
        return tree

    # ---- what the generated code calls

    def emit(self, value: Any) -> Any:
        """Charge for a value that is about to be printed, and return it."""
        weight = self.meter.weigh(value)
        self.meter.emitted += weight
        if self.meter.emitted > 8 * self.meter.cap:
            raise Stopped("it prints too much inside macros or blocks")
        return value

    def concatenate(self, parts: Iterable[Any]) -> str:
        """Join the operands of ``~``, whose length is checked first."""
        parts = list(parts)
        self.meter.fits(sum(map(self.meter.weigh, parts)))
        return "".join(map(str, parts))

    def compared(self, value: Any) -> Any:
        """Charge for an operand of a comparison, and return it."""
        if isinstance(value, str | list | tuple | dict):
            self.meter.weigh(value)
        return value

    def searched(self, value: Any) -> Any:
        return value if isinstance(value, dict) else self.compared(value)

    def sliced(self, value: Any) -> Any:
        self.meter.tick(1 + _length(value) // 4)
        return value

    def range(self, *args: int) -> range:
        numbers = range(*args)
        if len(numbers) > MAX_RANGE:
            raise Stopped(f"range({', '.join(map(str, args))}) is longer than {MAX_RANGE}")
        return numbers

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise Stopped(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if owner is not None and not isinstance(owner, type(operator)):
            args = self._check_method(owner, name, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        if name in FREE_RESULTS and isinstance(owner, dict):
            return result
        return self.meter.made(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.tick()
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        return self.meter.made(self.binop_table[operator](left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            self._check_format(str(value.__self__), (args, kwargs))
            return wrapped(*args, **kwargs)

        return bounded

    # ---- limits

    def _check_method(
        self, owner: Any, name: str, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, ...]:
        """Refuse a built-in type's method that no chat template needs; bound the others."""
        if isinstance(owner, type):
            raise Stopped(f"{owner.__name__}.{name}() is not allowed")
        for kind, allowed in METHODS.items():
            if isinstance(owner, kind) and name not in allowed:
                raise Stopped(f"{kind.__name__}.{name}() is not allowed")
        if not isinstance(owner, str):
            return args
        self.meter.tick(len(owner) // PER_STEP)
        if name in ("center", "ljust", "rjust", "zfill") and args:
            self.meter.fits(operator.index(args[0]))
        elif name == "expandtabs":
            self.meter.fits(len(owner) * operator.index((*args, *kwargs.values(), 8)[0]))
        elif name == "replace":
            self._check_replace(owner, *args[:2])
        elif name == "join" and args:
            return (self._check_join(args[0], owner),)
        return args

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
            return
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | list | tuple):
                self.meter.fits(max(0, times) * max(1, self.meter.weigh(value)))

    def _check_bits(self, n_bits: int) -> None:
        if n_bits > MAX_BITS:
            raise Stopped(f"it makes a number of more than {MAX_BITS} bits")

    def _check_percent(self, template: str, values: Any) -> None:
        total, fields = len(template), template.count("%")
        for widths in PERCENT.findall(template):
            if "*" in widths:
                raise Stopped("a width given as * in a format is not allowed")
            total += sum(int(w) for w in widths if w and self._short(w))
        weight = self.meter.weigh(values)
        self.meter.fits(total + weight * (fields if isinstance(values, dict) else 1))

    def _check_format(self, template: str, values: Any) -> None:
        total, fields = len(template), 0
        for _, field, spec, _ in string.Formatter().parse(template):
            fields += field is not None
            if "{" in (spec or ""):
                raise Stopped("a field inside the width of another is not allowed")
            total += sum(int(w) for w in re.findall(r"\d+", spec or "") if self._short(w))
        self.meter.fits(total + fields * self.meter.weigh(values))

    def _short(self, digits: str) -> bool:
        if len(digits) > 9:
            raise Stopped(f"a width of {len(digits)} digits is too large")
        return True

    def _check_replace(self, text: str, old: Any = "", new: Any = "") -> None:
        old, new = str(old), str(new)
        self.meter.fits(len(text) + (text.count(old) if new else 0) * len(new))

    def _check_join(self, parts: Iterable[Any], separator: Any) -> list[Any]:
        items = list(parts)
        weight = self.meter.weigh(items) + len(items) * self.meter.weigh(separator)
        self.meter.fits((weight - NODE * len(items)) // 2)
        return items

    def _check_filter(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Bound the filters whose result a number or a second text makes large; return the value to use."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if name in ("batch", "slice"):
            self.range(int(first or 0))
        elif name == "round":
            self._check_bits(4 * abs(int(kwargs.get("precision", args[0] if args else 0))))
        elif name == "center":
            self.meter.fits(int(first or 0))
        elif name == "indent":
            width = max(
                [len(a) if isinstance(a, str) else int(a) for a in (*args, *kwargs.values())],
                default=4,
            )
            self.meter.fits(len(str(value)) + (str(value).count("\n") + 1) * width)
        elif name == "replace":
            self._check_replace(
                str(value), *args[:2], **{k: v for k, v in kwargs.items() if k in ("old", "new")}
            )
        elif name == "format":
            self._check_percent(str(value), kwargs or args)
        elif name == "join":
            return self._check_join(value, kwargs.get("d", args[0] if args else ""))
        elif name == "sum" and not isinstance(
            kwargs.get("start", args[1] if args[1:] else 0), int | float
        ):
            raise Stopped("sum starts from something that is not a number")
        return value

    def _metered_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            value = args[skip]
            if name in DEEP:
                self.meter.weigh(value)
            by_element = name in LAZY or not isinstance(value, str)
            self.meter.tick(1 + (_length(value) if by_element else 0))
            value = self._check_filter(name, value, args[skip + 1 :], kwargs)
            result = function(*args[:skip], value, *args[skip + 1 :], **kwargs)
            if name in PASSING:
                return result
            if name in LAZY and not isinstance(result, str):
                return iter(self.meter.made(list(result)))
            return self.meter.made(result)

        return metered

    def _metered_test(self, name: str, function: Any) -> Callable[..., bool]:
        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> bool:
            self.meter.tick()
            if name in COMPARING:
                for value in args:
                    self.compared(value)
            return bool(function(*args, **kwargs))

        return metered


def _length(value: Any) -> int:
    try:
        return operator.length_hint(value, 0)
    except TypeError:
        return 0
