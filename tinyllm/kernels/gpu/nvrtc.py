"""Compile kernels to CUDA machine code without a GPU, and report the registers and memory that each needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import DeviceError
from ..backend import KVType
from . import attention_tensor, devices, sources
from .kvcache import Side
from .sources import Program
from .weights import LAYOUTS, PLAIN

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Usage:
    """What one kernel needs: registers of a thread; bytes of stack, spills and local memory."""

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int


def compile_program(program: Program, arch: str) -> tuple[bytes, list[Usage]]:
    """Machine code of a program for one architecture, and its kernels' usage; warnings are errors."""
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as e:
        raise DeviceError(f"{devices.NO_CUPY}; NVRTC is missing") from e
    text = sources.text("prelude_cuda.h", program)
    handle = nvrtc.createProgram(text, f"{program[0][-1]}.cu", (), ())
    options = [f"-arch={arch}", "-std=c++17", "--ptxas-options=-v", "-Werror=all-warnings"]
    try:
        nvrtc.compileProgram(handle, options)
        return nvrtc.getCUBIN(handle), list(_usage(nvrtc.getProgramLog(handle)))
    except nvrtc.NVRTCError as e:
        log = nvrtc.getProgramLog(handle)
        raise DeviceError(f"{program[0][-1]} does not compile for {arch}: {log}") from e
    finally:
        nvrtc.destroyProgram(handle)


def text_hash(program: Program) -> str:
    """A short hash of the text that NVRTC compiles."""
    text = sources.text("prelude_cuda.h", program)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _usage(log: str) -> Iterator[Usage]:
    """Read ptxas's report, three lines a kernel."""
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name = entry[1]
        elif frame := _STACK.search(line):
            stack, spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := _USED.search(line):
            yield Usage(name, int(used[1]), stack, spills, int(used[2] or 0))


def programs() -> dict[str, Program]:
    """Every program by a name; those that depend on the shape of heads, for the usual shapes."""
    named = {f"{kind} matvec.c": sources.matrix(kind, "matvec.c") for kind in (*PLAIN, *LAYOUTS)}
    named |= {f"{kind} matmul.c": sources.matrix(kind, "matmul.c") for kind in PLAIN}
    named |= {
        f"{kind} matmul_tensor.c x {tokens}": sources.tensor(kind, tokens)
        for kind in LAYOUTS
        for tokens in (16, 32, 64)
    }
    fixed = (
        sources.ROWWISE,
        sources.ELEMENTWISE,
        sources.EXPERTS,
        sources.CHOOSE,
        sources.PRODUCTS,
        sources.LIMITS,
    )
    named |= {program[0][-1]: program for program in fixed}
    for size in (16, 64):
        named[f"recurrent.c {size}"] = sources.recurrent(size)
    for name, kv in (("f32", 0), ("f16", 1), ("q8_0", 2)):
        named[f"cache.c {name}"] = sources.kv_cache(kv)
        for dim in (64, 128, 256) if name == "f32" else (72,):  # what tensor cores do not take
            for queries in (8, 16) if dim < 256 else (8,):
                program = sources.attention(kv, dim, dim, queries, dense=False)
                named[f"attention.c {name} {dim} x {queries}"] = program
    named["attention.c f16 576 x 8"] = sources.attention(1, 576, 512, 8, dense=False)
    for dim in (64, 80, 128, 256):
        named |= _tensor_attention("f16", dim, dim)
    for dim in (64, 128, 256):
        named |= _tensor_attention("q8_0", dim, dim)
    named |= _tensor_attention("f16", 192, 128)
    for dim in (32, 64):
        named[f"attention.c dense {dim}"] = sources.attention(0, dim, dim, 16, dense=True)
    return named


def _tensor_attention(kv_type: KVType, dim: int, dim_v: int) -> dict[str, Program]:
    """The programs of ``attention_tensor.c`` for all shapes of groups."""
    piece = 32 if kv_type == "q8_0" else 4
    k, v = (Side(0, 1, d, -(-d // piece) * piece, kv_type) for d in (dim, dim_v))
    shapes = [attention_tensor.group_shape(pairs, k, v) for pairs in (16, 64, 128)]
    return {
        f"attention_tensor.c {kv_type} {dim} {s.rows} x {s.keys}": attention_tensor.program(k, v, s)
        for s in shapes
    }
