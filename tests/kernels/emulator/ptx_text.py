"""PTX as text: kernels with their registers and arrays, and blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

U8, U32, U64 = np.uint8, np.uint32, np.uint64
WIDTH = {"pred": np.bool_, "b16": np.uint16, "b32": U32, "b64": U64, "f32": U32, "f64": U64}
WIDTH |= {"u16": np.uint16, "u32": U32, "u64": U64, "s16": np.uint16, "s32": U32, "s64": U64}
DECLARED = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?"
)


@dataclass
class Kernel:
    """An entry: types of its values, addresses of its arrays, blocks that end where control may leave."""

    name: str
    params: list[tuple[str, str]] = field(default_factory=list)
    registers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)  # addresses
    sizes: dict[str, int] = field(default_factory=lambda: {"shared": 0, "local": 0})
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Instruction:
    """One line: an opcode of parts, operands as text, and the predicate it depends on."""

    op: tuple[str, ...]
    operands: list[str]
    predicate: str | None
    text: str


def parse(ptx: str) -> dict[str, Kernel]:
    """The entries of a module."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    found = {}
    for match in re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", ptx, flags=re.S):
        kernel = Kernel(match[1])
        for line in match[2].split(","):
            words = line.split()
            if words:
                kernel.params.append((words[-1], words[1].lstrip(".")))
        _parse_body(kernel, ptx[match.end() : _closing(ptx, match.end())])
        found[kernel.name] = kernel
    return found


def _closing(text: str, at: int) -> int:
    """Where the brace that was opened before ``at`` is closed."""
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _parse_body(kernel: Kernel, body: str) -> None:
    block: list[Instruction] = []
    kernel.blocks.append(block)
    for line in _statements(body):
        if line.endswith(":"):
            block = []
            kernel.blocks.append(block)
            kernel.labels[line[:-1]] = len(kernel.blocks) - 1
        elif line.startswith(".reg"):
            _declare_registers(kernel, line)
        elif line.startswith("."):
            _declare_array(kernel, line)
        else:
            block.append(_instruction(line))
            if block[-1].op[0] in ("bra", "ret", "exit", "bar", "barrier"):
                block = []
                kernel.blocks.append(block)


def _statements(body: str) -> list[str]:
    """Lines, and labels with their colon; braces of inline assembly that only limit a scope are dropped."""
    out = []
    for part in re.split(r"(;|^\s*\$?\w+:)", body, flags=re.M):
        text = " ".join(part.split())
        text = re.sub(r"^\{\s*(?=[.@a-z])", "", text)
        if text and text not in (";", "{", "}"):
            out.append(text.removeprefix("} "))
    return out


def _declare_registers(kernel: Kernel, line: str) -> None:
    kind, names = line.split(maxsplit=2)[1:]
    for name in names.split(","):
        match = re.match(r"\s*([%\w]+)(?:<(\d+)>)?", name)
        assert match is not None
        count = match[2]
        each = [match[1]] if count is None else [f"{match[1]}{i}" for i in range(int(count))]
        kernel.registers |= dict.fromkeys(each, WIDTH[kind.lstrip(".")])


def _declare_array(kernel: Kernel, line: str) -> None:
    match = DECLARED.match(line)
    if match is None:
        if line.startswith((".maxntid", ".minnctapersm", ".pragma", ".loc")):
            return
        raise NotImplementedError(line)
    space, align = match[1], int(match[2] or 4)
    assert space in ("shared", "local"), line
    nbytes = np.dtype(WIDTH.get(match[3], U8)).itemsize * int(match[5] or 1)
    start = -(-kernel.sizes[space] // align) * align
    kernel.arrays[match[4]] = start
    kernel.sizes[space] = start + nbytes


def _instruction(line: str) -> Instruction:
    predicate = None
    text = line
    if line.startswith("@"):
        predicate, line = line[1:].split(maxsplit=1)
    op, _, rest = line.partition(" ")
    operands = [x.strip() for x in re.split(r",(?![^{]*\})(?![^\[]*\])", rest) if x.strip()]
    return Instruction(tuple(op.split(".")), operands, predicate, text)


@cache
def access(op: tuple[str, ...]) -> tuple[str, int, str]:
    """The space, number of values and type of a load or store."""
    space = next(p for p in op if p in ("param", "global", "shared", "local", "const"))
    count = next((int(p[1]) for p in op if p in ("v2", "v4")), 1)
    kind = op[-1]
    letter = {"b": "u", "f": "u", "u": "u", "s": "i"}[kind[0]]
    return space, count, f"{letter}{int(kind[1:]) // 8}"


@cache
def constant(text: str) -> int:
    """The bits of a number."""
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF


@cache
def place_of(text: str) -> tuple[str, int]:
    """Register or array, and offset, of an operand in brackets."""
    match = re.match(r"\[([%$\w]+)(?:\+(-?\d+))?\]$", text)
    assert match is not None, text
    return match[1], int(match[2] or 0)
