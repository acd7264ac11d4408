"""numba as the door for kernels from outside: write a kernel with ``numba.njit``, run it like one of ours.

A kernel is a function of addresses and numbers that does the pieces [first, last) of an operation::

    import numba
    from tinyllm.kernels.cpu import numba_door
    from tinyllm.kernels.cpu.simd import f32, load_n, splat, store_n

    @numba.njit
    def halve(x, y, n, by: f32, first, last, worker):
        for row in range(first, last):
            for i in range(4 * n * row, 4 * n * (row + 1), 64):
                rest = n * (row + 1) - i // 4
                store_n(y + i, load_n(x + i, rest) * splat(by), rest)

    kernel = numba_door.compile(halve)
    kernel(0, n_rows, x=x.ctypes.data, y=y.ctypes.data, n=n, by=0.5)  # at once, on this thread
    tape.add(kernel, n_rows, x=x, y=y, n=n, by=0.5)  # when the tape runs, on all threads

What a kernel may rely on:

* **Arguments.** A parameter is an int64 (an address, a count, a flag) unless it is annotated ``f32``. The
  last three are ``first, last, worker``: the pieces that this call does, and the number of the thread that
  runs it (for scratch memory of its own). Threads claim pieces in any order, so no piece may read what
  another one writes.
* **Words.** Importing this module teaches numba every emitter of ``simd`` (``load``, ``fma``, ``hsum``,
  ``get_half``, ...) and every micro-kernel made with ``simd.emitter``. Vectors of 16 float32 are values:
  ``+ - * /`` and ``-v`` work lane by lane, and ``njit`` functions take and return them. ``floats(address,
  n)`` gives memory as a NumPy array, where a loop over single numbers is enough.
* **Bits.** Kernels are compiled for the same processor and features as our own, without ``fastmath``:
  nothing is fused or reordered that the source does not say. The kernels of this package compute the same
  bits by either compiler.
* **Errors.** A division by zero gives infinity, NaN or the integer 0; nothing checks bounds. ``raise`` and
  ``assert`` are refused, for no Python code is there to catch an exception; one that a function of numba
  raises is printed, and ends that call alone.

Helpers may be ``njit`` functions or plain ones; they are compiled with the kernel, by the kernel's options.
numba takes some tenths of a second for a kernel. Nothing is kept on disk, so an edited helper is never stale.
This is the only module that imports numba.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable
from functools import cache, lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
from llvmlite import ir

from ...errors import ArgumentError, DeviceError
from . import emit
from .emit import F32, F64, I1, I64, Emit
from .jit import Kernel
from .simd import Emitter
from .translate import parameters

try:
    import numba
    from numba import carray, extending, types
    from numba.core import datamodel, errors, registry
except ImportError as error:
    raise DeviceError(
        f"kernels from outside are compiled by numba, which cannot be imported ({error}): "
        "pip install numba"
    ) from error

OPTIONS = {"error_model": "numpy", "fastmath": False}
FORBIDDEN = {
    "fastmath": "results would depend on how loops are vectorised",
    "parallel": "threads belong to the tape",
}
SCALARS = {
    ir.VoidType(): types.void,
    I1: types.boolean,
    I64: types.int64,
    F32: types.float32,
    F64: types.float64,
}


# ---- vectors


class Vector(types.Type):
    """numba's type of an LLVM vector, such as 16 lanes of float32."""

    def __init__(self, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        element = SCALARS.get(llvm.element, llvm.element)
        super().__init__(f"{element}x{llvm.count}")


@extending.register_model(Vector)
class VectorModel(extending.models.PrimitiveModel):
    """A vector is held in registers as LLVM holds it."""

    def __init__(self, manager: datamodel.DataModelManager, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


@cache
def _numbas(kind: ir.Type) -> types.Type:
    """numba's name of a type of ``simd``."""
    return Vector(kind) if isinstance(kind, ir.VectorType) else SCALARS[kind]


def _operator(sign: Callable, instruction: str, n_operands: int) -> None:
    """Teach numba an operator on vectors of floats, lane by lane."""

    def typing(context: Any) -> Callable:
        def binary(x: types.Type, y: types.Type) -> types.Type | None:
            return x if isinstance(x, Vector) and x == y else None

        def unary(x: types.Type) -> types.Type | None:
            return x if isinstance(x, Vector) else None

        return binary if n_operands == 2 else unary

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return getattr(builder, instruction)(*args)

    extending.type_callable(sign)(typing)
    extending.lower_builtin(sign, *[Vector] * n_operands)(lower)


for _name, _instruction in [("add", "fadd"), ("sub", "fsub"), ("mul", "fmul"), ("truediv", "fdiv")]:
    _operator(getattr(operator, _name), _instruction, 2)
    _operator(getattr(operator, f"i{_name}"), _instruction, 2)  # x += y
_operator(operator.neg, "fneg", 1)


# ---- words


@lru_cache(None)
def _intrinsic(word: Emitter) -> Any:
    """An emitter as an intrinsic of numba."""
    names = list(inspect.signature(word.emit).parameters)[1:]
    wanted = [_numbas(kind) for kind in word.args]

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        found = word.emit(Emit(builder), *args)
        return context.get_dummy_value() if signature.return_type == types.void else found

    def typing(context: Any, *given: types.Type) -> Any:
        if len(given) != len(wanted):
            raise errors.TypingError(
                f"{word.__name__}({', '.join(names)}) takes {len(wanted)} arguments, not {len(given)}"
            )
        for name, is_, must in zip(names, given, wanted, strict=True):
            if context.can_convert(is_, must) is None:
                raise errors.TypingError(
                    f"{word.__name__}({', '.join(names)}): {name} is {is_}, expected {must}"
                )
        return _numbas(word.ret)(*wanted), generate

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY)
    typing.__name__ = word.__name__
    typing.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    return extending.intrinsic(typing)


@extending.typeof_impl.register(Emitter)
def _type_of_word(word: Emitter, context: Any) -> types.Type:
    intrinsic, known = _intrinsic(word), registry.cpu_target.typing_context
    known.refresh()  # else an intrinsic made during this compilation is not seen before the next
    return known.resolve_value_type(intrinsic)


@extending.intrinsic
def _pointer(context: Any, address: types.Type) -> Any:
    """An address as a pointer to float32."""
    kind = types.CPointer(types.float32)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64), generate


@extending.register_jitable
def floats(address: int, n: int) -> np.ndarray:
    """n float32 at an address as an array; inside ``njit`` functions only."""
    return carray(_pointer(address), (n,))


# ---- kernels


_codes: dict[int, Any] = {}  # by address, the only thing that tapes keep: never given back


def compile(function: Callable, name: str | None = None, **names: Any) -> Kernel:  # noqa: A001
    """Compile a kernel by numba; ``jit.kernel`` does it by our own translator.

    Parameters
    ----------
    function
        A function as the text of this module describes it, decorated with ``numba.njit`` or plain. It and
        its helpers are compiled anew: a decorator's options are not used; ``fastmath`` and ``parallel`` are
        refused.
    name : str, optional
        What errors and reports call the kernel; the function's name unless given.
    **names
        Values in the place of the function's global names, so that one loop serves many micro-kernels.

    Returns
    -------
    Kernel
        What ``Tape.add`` takes; called as ``kernel(first, last, x=.., ..)`` it runs at once.

    Raises
    ------
    ArgumentError
        What was given is no function, is decorated with an option that kernels cannot have, raises exceptions,
        or does not refer to one of ``names``.
    TypeError
        Parameters do not end with ``first, last, worker``, or an annotation is neither ``f32`` nor ``i64``.
    DeviceError
        numba compiles for another processor than this package does, or not at all.
    numba.core.errors.NumbaError
        numba cannot compile the function's body; the message shows the line.
    """
    _check_target()
    body = _body_of(function)
    kinds = parameters(body)
    made: dict[FunctionType, Any] = {}
    inner = _jitted(body, made, (body.__globals__, names))
    used = set().union(*(_names(f.__code__) for f in made if f.__globals__ is body.__globals__))
    if unused := ", ".join(names.keys() - used):
        raise ArgumentError(
            f"{body.__name__} refers to no global name {unused}: nothing to replace"
        )
    load = _loader([_numbas(kind) for kind in kinds.values()])

    def entry(args: int, first: int, last: int, worker: int) -> None:
        inner(*load(args, first, last, worker))

    code = numba.cfunc(types.void(*[types.int64] * 4), **OPTIONS)(entry)
    _codes[code.address] = code
    return Kernel(name or body.__name__, code.address, kinds)


def assembly(kernel: Kernel) -> str:
    """The instructions of a kernel compiled here, to read; ``jit.assembly`` has those of our own."""
    return _codes[kernel.address]._library.get_asm_str()


def _check_target() -> None:
    """numba's processor must be ours: a micro-kernel for a larger one would end the process."""
    if numba.config.DISABLE_JIT:
        raise DeviceError("numba compiles nothing while NUMBA_DISABLE_JIT is set: unset it")
    registry.cpu_target.typing_context.refresh()
    _, cpu, features = registry.cpu_target.target_context.codegen().magic_tuple()
    ours = emit.cpu_name(), _switches(emit.features_text())
    if (cpu, _switches(features)) != ours:
        differ = sorted(_switches(features) ^ ours[1])
        raise DeviceError(
            f"numba compiles for {cpu}, tinyllm for {ours[0]}, and these features differ: {differ}; "
            "set NUMBA_CPU_NAME and NUMBA_CPU_FEATURES before the first import of either"
        )


def _switches(features: str) -> set[str]:
    """The features that are on."""
    return {f[1:] for f in features.split(",") if f[:1] == "+"}


def _body_of(function: Any) -> FunctionType:
    """The Python function of a kernel, after a look at how it was decorated."""
    if extending.is_jitted(function):
        for option, why in FORBIDDEN.items():
            if function.targetoptions.get(option):
                raise ArgumentError(
                    f"{function.__name__} is compiled with {option}={function.targetoptions[option]!r}: "
                    f"{why}; leave it out"
                )
        function = function.py_func
    if not isinstance(function, FunctionType):
        raise ArgumentError(
            f"a kernel is a Python function or one decorated with numba.njit, not {function!r}"
        )
    return function


def _jitted(function: FunctionType, made: dict, given: tuple[dict, dict]) -> Any:
    """A plain function for numba, with everything it refers to: helpers, words, types.

    ``made`` holds the helpers so far; ``given`` are the globals of the kernel's file, and what replaces some.
    """
    if function in made:
        return made[function]
    home, names = given
    new = names if function.__globals__ is home else {}
    code, known = function.__code__, {**function.__globals__, **new}
    if any(i.opname == "RAISE_VARARGS" for i in dis.get_instructions(code)):
        raise ArgumentError(
            f"{function.__name__} has raise or assert: no Python code would catch it"
        )
    cells = tuple(CellType() for _ in code.co_freevars)
    scope: dict[str, Any] = {"__builtins__": function.__globals__["__builtins__"]}
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, cells)
    made[function] = numba.njit(copy, **OPTIONS)
    for name in _names(code) & known.keys():
        scope[name] = _for_numba(known[name], made, given)
    for mine, theirs in zip(cells, function.__closure__ or (), strict=True):
        mine.cell_contents = _for_numba(theirs.cell_contents, made, given)
    return made[function]


def _for_numba(value: Any, made: dict, given: tuple[dict, dict]) -> Any:
    """A value as numba understands it; helpers are compiled anew, by the options of kernels."""
    if isinstance(value, ir.Type):
        return _numbas(value)
    if extending.is_jitted(value) or (isinstance(value, FunctionType) and not _is_known(value)):
        return _jitted(_body_of(value), made, given)
    return value


def _is_known(function: FunctionType) -> bool:
    """Whether numba has an implementation of its own for a function, as for ``numba.carray``."""
    try:
        registry.cpu_target.typing_context.resolve_value_type(function)
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> set[str]:
    """The names that a function's code refers to, nested functions included."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _loader(kinds: list[types.Type]) -> Any:
    """An intrinsic that turns the address of a row's arguments into the values of a kernel's parameters."""
    values = types.Tuple([*kinds, *[types.int64] * 3])

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        e, p = Emit(builder), Emit(builder).ptr(args[0])
        loaded = [e.load(p, context.get_value_type(kind), 8 * i) for i, kind in enumerate(kinds)]
        return context.make_tuple(builder, values, [*loaded, *args[1:]])

    @extending.intrinsic
    def load(context: Any, args: Any, first: Any, last: Any, worker: Any) -> Any:
        return values(*[types.int64] * 4), generate

    return load
