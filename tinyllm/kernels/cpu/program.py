"""Programs: operations are recorded as rows of numbers, and run by all threads in one native call.

An operation called from Python computes nothing. It appends an instruction (kernel address, pieces,
arguments) to the thread's ``Tape``; its output is a place in an ``Arena``. The tape runs when somebody asks for
values. A tape kept under a key is a whole step of a model: running it again costs one call.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ... import system
from . import jit
from .threads import ARGS, ROW, ROW_BYTES, pool

ALIGN = 64
F32, U8 = np.dtype(np.float32), np.dtype(np.uint8)
HEAD = struct.Struct(f"={ARGS}q")  # the beginning of an instruction, before its arguments


def aligned(n_bytes: int) -> np.ndarray:
    """Uninitialised bytes that begin on a cache line."""
    memory = np.empty(n_bytes + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    return memory[start : start + n_bytes]


def huge(n_bytes: int) -> np.ndarray:
    """Uninitialised bytes on large pages where the system has them: kernels stride far, and page walks cost."""
    page = 1 << 21
    size = -(-n_bytes // page) * page + page
    whole = np.frombuffer(system.map_memory(size), np.uint8)
    start = -whole.ctypes.data % page
    return whole[start : start + n_bytes]


class Arena:
    """Memory for the outputs of a step, handed out and taken back in program order.

    A place freed during recording may be given to a later instruction, because stages run one after
    another; within the stage being recorded it may not, so freed places wait for ``begin_stage``.
    """

    def __init__(self, chunk: int = 1 << 21) -> None:
        self._chunk = chunk
        self._chunks: list[np.ndarray] = []
        self._free: dict[int, int] = {}  # sizes by address
        self._ends: dict[int, int] = {}  # addresses by where the free places end
        self._waiting: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> tuple[int, int]:
        """A place of at least n_bytes: (size, address)."""
        size = max(-(-n_bytes // ALIGN) * ALIGN, ALIGN)
        with self._lock:
            fits = [(s, a) for a, s in self._free.items() if s >= size]
            found, address = min(fits) if fits else self._grow(size)
            del self._free[address], self._ends[address + found]
            if found - size >= 1024:
                self._set_free(found - size, address + size)
                found = size
            return found, address

    def _grow(self, size: int) -> tuple[int, int]:
        """Memory from the system, a free place: at least as much as there is, so that it is few pieces."""
        held = sum(chunk.nbytes for chunk in self._chunks)
        chunk = huge(max(size, self._chunk, held))
        self._chunks.append(chunk)
        self._set_free(chunk.nbytes, chunk.ctypes.data)
        return chunk.nbytes, chunk.ctypes.data

    def give(self, place: tuple[int, int]) -> None:
        """Take a place back, for the stages after the present one."""
        self._waiting.append(place)

    def begin_stage(self) -> None:
        """What was given back before can be used from now on."""
        if self._waiting:
            with self._lock:
                while self._waiting:
                    self._insert(*self._waiting.pop())

    def _insert(self, size: int, address: int) -> None:
        """Add a free place, joined with its neighbours."""
        before = self._ends.pop(address, None)
        if before is not None:
            size, address = size + self._free.pop(before), before
        behind = self._free.pop(address + size, 0)
        self._set_free(size + behind, address)

    def _set_free(self, size: int, address: int) -> None:
        self._free[address] = size
        self._ends[address + size] = address


class CPUArray:
    """An array of this backend: a shape, a type and an address."""

    __slots__ = ("__weakref__", "_owner", "address", "dtype", "in_arena", "made", "maker", "shape")

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], address: int, owner: Any
    ) -> None:
        self.shape, self.dtype, self.address = shape, dtype, address
        self._owner = owner  # what keeps the memory: an arena's place or a NumPy array
        kind = owner.__class__
        self.in_arena: bool = kind is _Place or (kind is CPUArray and owner.in_arena)
        # ``Tape.made_of``: the mark of a tape, and what its instructions make of this array
        self.maker: object = None
        self.made: dict[Any, Any] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> CPUArray:
        """An array in the same memory under another shape; one length may be -1."""
        known = -math.prod(shape)  # the product of the others when one is -1
        whole = [self.size // known if n == -1 else n for n in shape]
        return CPUArray(tuple(whole), self.dtype, self.address, self)

    def view(self) -> np.ndarray:
        """The memory as a NumPy array, whatever it holds at the moment."""
        if not self.size:
            return np.empty(self.shape, self.dtype)
        pointer = {"data": (self.address, False), "shape": self.shape, "version": 3}
        pointer["typestr"] = self.dtype.str
        return np.asarray(_Interface(pointer, self))


def wrapped(memory: np.ndarray) -> CPUArray:
    """An array of this backend in a NumPy array's memory."""
    return CPUArray(memory.shape, memory.dtype, memory.ctypes.data, memory)


class _Interface:
    """What NumPy needs to see foreign memory; keeps its owner alive."""

    def __init__(self, pointer: dict[str, Any], owner: object) -> None:
        self.__array_interface__, self.owner = pointer, owner


class _Place:
    """An arena's place; goes back when nobody refers to it."""

    __slots__ = ("arena", "place")

    def __init__(self, arena: Arena, n_bytes: int) -> None:
        self.arena, self.place = arena, arena.take(n_bytes)

    def __del__(self) -> None:
        if hasattr(self, "place"):  # Ctrl-C may have come before it was taken
            self.arena.give(self.place)


class Planned:
    """An instruction that is recorded often: all but the addresses of its arrays, written once.

    ``numbers`` are arguments by name; the others stay open.
    """

    def __init__(
        self, kernel: jit.Kernel, pieces: int, chunk: int, numbers: dict[str, Any]
    ) -> None:
        self.kernel, self.numbers = kernel, numbers
        self.places = {n: ARGS + i for i, n in enumerate(kernel.parameters) if n not in numbers}
        values = kernel.in_order({**dict.fromkeys(self.places, 0), **numbers})
        self.row = np.zeros(ROW, np.int64)
        kernel.write(self.row, 8 * ARGS, values)
        self.row[:ARGS] = kernel.address, pieces, chunk, 1, -(-pieces // chunk)


class Tape:
    """Instructions recorded and not yet run, with the arena of their outputs."""

    def __init__(self, arena: Arena | None = None) -> None:
        self.arena = arena or Arena()
        self.rows = np.zeros((256, ROW), np.int64)
        self.n = 0
        self.kept: list[Any] = []  # arrays whose addresses stand in the rows
        self.mark = object()  # stands for the tape where it must not be kept
        self._scratch: dict[int, CPUArray] = {}  # by its bytes for each thread
        self._grouped = False

    def array(self, shape: tuple[int, ...], dtype: Any = F32) -> CPUArray:
        """Room for an output of the next instruction."""
        if not self._grouped:
            self.arena.begin_stage()
        dtype = np.dtype(dtype)
        place = _Place(self.arena, math.prod(shape) * dtype.itemsize)
        return CPUArray(shape, dtype, place.place[1], place)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "rows") and not finalizing():  # a default outlives the module's names
            pool().retire(self.rows)

    @contextmanager
    def one_stage(self) -> Iterator[None]:
        """Instructions recorded within may run side by side: no output takes another's freed place."""
        self.arena.begin_stage()
        self._grouped = True
        try:
            yield
        finally:
            self._grouped = False

    def add(
        self, kernel: jit.Kernel, pieces: int, /, chunk: int = 1, joins: bool = False, **args: Any
    ) -> int:
        """Append an instruction, and keep the arrays that it is given.

        Parameters
        ----------
        kernel, pieces
            What is run, and for how many pieces.
        chunk : int
            Pieces that a thread claims at once.
        joins : bool
            The instruction may run beside the previous one.
        **args
            The kernel's arguments by name: arrays and weights, numbers, addresses; None is the address 0.

        Returns
        -------
        int
            Its row.

        Raises
        ------
        TypeError
            The names are not those of the kernel's parameters, or a value does not fit.
        """
        if self.n + 1 >= len(self.rows):
            self._grow()
        if len(args) > ROW - ARGS:
            raise TypeError(f"kernel {kernel.name}: {len(args)} arguments; at most {ROW - ARGS}")
        values, at = kernel.in_order(args), ROW_BYTES * (self.n + 1)
        for i, v in enumerate(values):
            kind = v.__class__
            if kind is int:  # as most are
                continue
            if kind is CPUArray:
                values[i] = v.address
                if not v.in_arena:
                    self.kept.append(v)
            elif v is None:
                values[i] = 0
            elif kind is not float and hasattr(v, "address"):
                values[i] = v.address
                self.kept.append(v)
        kernel.write(self.rows, at + 8 * ARGS, values)
        claims = -(-pieces // chunk)
        head = kernel.address, pieces, chunk, not joins, claims
        HEAD.pack_into(self.rows, at, *head)  # type: ignore[arg-type]  # an array is a buffer
        self.n += 1
        return self.n

    def put(self, planned: Planned, joins: bool = False, **arrays: Any) -> int:
        """Append an instruction that was planned, with its arrays and weights; as ``add``."""
        if self.n + 1 >= len(self.rows):
            self._grow()
        self.n += 1
        row = self.rows[self.n]
        row[:] = planned.row
        if joins:
            row[3] = 0
        for name, place in planned.places.items():
            v = arrays[name]
            if v is not None:
                row[place] = v.address
                if v.__class__ is not CPUArray or not v.in_arena:
                    self.kept.append(v)
        return self.n

    def scratch(self, n_threads: int, n_bytes: int) -> CPUArray:
        """Memory [n_threads, at least n_bytes], which any instructions share: a thread does one at a time."""
        wide = 1 << max(n_bytes - 1, 4095).bit_length()
        if wide not in self._scratch:
            self._scratch[wide] = self.array((n_threads, wide), U8)
        return self._scratch[wide]

    def let_go(self) -> None:
        """Leave the scratch memory to what is recorded later."""
        self._scratch.clear()

    def made_of(self, x: CPUArray) -> dict[Any, Any]:
        """What this tape's instructions make of an array, such as int8 blocks: once for all that read them."""
        if x.made is None or x.maker is not self.mark:
            x.maker, x.made = self.mark, {}
        return x.made

    def keep(self, *things: Any) -> None:
        """Keep memory that recorded rows point to in other ways than by their arguments."""
        self.kept += things

    def _grow(self) -> None:
        grown = np.zeros((2 * len(self.rows), ROW), np.int64)
        grown[: len(self.rows)] = self.rows
        pool().retire(self.rows)
        self.rows = grown

    def set_pieces(self, rows: list[int], pieces: int) -> None:
        """Change the amount of work of recorded instructions."""
        self.rows[rows, 1], self.rows[rows, 4] = pieces, -(-pieces // self.rows[rows, 2])

    def run(self, n_threads: int) -> None:
        """Run all instructions; they stay recorded."""
        if self.n:
            self.rows[0, 0] = self.n
            pool().run(self.rows.ctypes.data, n_threads)

    def clear(self) -> None:
        """Forget the instructions (their outputs stay)."""
        self.n = 0
        self.kept.clear()
        self.let_go()
