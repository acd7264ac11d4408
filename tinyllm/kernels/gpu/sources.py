"""The kernel files, and the text of a program made of them."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from .weights import LAYOUTS, PLAIN, units

Defines = tuple[tuple[str, str | int], ...]
Program = tuple[tuple[str, ...], Defines]  # files in order, or their text; macros
Size = tuple[int, int, int]  # groups of a launch, or threads of a group


@cache
def read(name: str) -> str:
    """The text of one file of ``src``."""
    return (resources.files(__package__) / "src" / name).read_text(encoding="utf-8")


def text(prelude: str, program: Program) -> str:
    """A whole program: prelude, macros, files."""
    files, defines = program
    macros = "".join(f"#define {name} {value}\n" for name, value in defines)
    return macros + "\n".join(name if "\n" in name else read(name) for name in (prelude, *files))


def name(program: Program) -> str:
    """What a program is called in errors: its last file, or the one that its text says it is of."""
    last = program[0][-1]
    said = re.match(r'#line 1 "(.*)"', last)
    return said[1] if said else last


def complaint(log: str) -> str:
    """The first error of a compiler's log, with the line of source that the log shows below it."""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if re.search(r"[:(]\d+.*\berror:", line):
            shown = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return " ".join(f"{line.strip()} {shown}".split())
    return next(filter(None, map(str.strip, lines)), "it does not say why")


def plain(*files: str, **defines: str | int) -> Program:
    """A program of these files."""
    return files, tuple(sorted(defines.items()))


ELEMENTWISE = plain("activations.h", "elementwise.c")
ROWWISE = plain("activations.h", "reduce.h", "rows.c")
EXPERTS = plain("experts.c")
PRODUCTS = plain("products.c")
CHOOSE = plain("choose.c")
LIMITS = plain("limits.c")


def recurrent(size: int = 1, **defines: int) -> Program:
    """The program of ``recurrent.c`` for heads of ``size`` values."""
    return plain("recurrent.c", SIZE=size, **defines)


def kv_cache(kv: int) -> Program:
    """The program that writes and reads a cache of the type with this number."""
    return plain("kv.h", "reduce.h", "cache.c", KV=kv)


@cache
def matrix(kind: str, file: str) -> Program:
    """The program of ``matvec.c`` or ``matmul.c`` for weights of one format."""
    few = {"UNITS": units(kind)} if file == "matvec.c" else {}
    more = ["activations.h"] if few else []
    if kind in PLAIN:
        return plain("unit_float.h", *more, file, **PLAIN[kind], **few)
    layout = LAYOUTS[kind]
    headers = ["unit.h", *(["kquants.h"] if layout.header == "lowbit.h" else []), layout.header]
    headers += ["unit_int8.h", *(["piece_int8.h"] if few else [])]
    return plain(*headers, *more, file, **layout.defines(kind), **few)


def tensor(kind: str, tokens: int) -> Program:
    """The program of ``matmul_tensor.c`` for one quantised format and number of rows in a tile (CUDA)."""
    (*headers, _), defines = matrix(kind, "matmul.c")
    return ("tensor.h", *headers, "matmul_tensor.c"), tuple(sorted((*defines, ("TOKENS", tokens))))


def attention(kv: int, head_dim: int, head_dim_v: int, queries: int, dense: bool) -> Program:
    """The program of ``attention.c`` for one shape of heads."""
    shape = {"HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "QUERIES": queries}
    more = {"DENSE": 1} if dense else {}
    return plain("kv.h", "attention.c", KV=kv, **shape, **more)


def attention_tensor(
    kv: int, head_dim: int, head_dim_v: int, row_warps: int, key_warps: int, keys: int
) -> Program:
    """The program of ``attention_tensor.c`` for one shape of heads and of groups."""
    shape = {"HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "KEYS": keys}
    warps = {"ROW_WARPS": row_warps, "KEY_WARPS": key_warps}
    files = "tensor.h", "kv.h", "attention_parts.h", "attention_tensor.c"
    return plain(*files, KV=kv, **shape, **warps)
