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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ... import system
from . import jit
from .threads import ARGS, ROW, ROW_BYTES, pool

ALIGN = 64
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
        self._free: list[tuple[int, int]] = []  # (size, address)
        self._waiting: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> tuple[int, int]:
        """A place of at least n_bytes: (size, address)."""
        size = max(-(-n_bytes // ALIGN) * ALIGN, ALIGN)
        with self._lock:
            fits = [i for i, (s, _) in enumerate(self._free) if s >= size]
            if not fits:
                return self._grow(size)
            i = min(fits, key=lambda j: self._free[j][0])
            found, address = self._free.pop(i)
            if found - size >= 1024:
                self._free.append((found - size, address + size))
                return size, address
            return found, address

    def _grow(self, size: int) -> tuple[int, int]:
        chunk = huge(max(size, self._chunk))
        self._chunks.append(chunk)
        address = chunk.ctypes.data
        if chunk.nbytes > size:
            self._free.append((chunk.nbytes - size, address + size))
        return size, address

    def give(self, place: tuple[int, int]) -> None:
        """Take a place back, for the stages after the present one."""
        self._waiting.append(place)

    def begin_stage(self) -> None:
        """What was given back before can be used from now on."""
        with self._lock:
            while self._waiting:
                self._insert(*self._waiting.pop())

    def _insert(self, size: int, address: int) -> None:
        """Add a free place, joined with its neighbours."""
        for s, a in list(self._free):
            if a + s == address:
                self._free.remove((s, a))
                size, address = size + s, a
            elif address + size == a:
                self._free.remove((s, a))
                size += s
        self._free.append((size, address))


class CPUArray:
    """An array of this backend: a shape, a type and an address."""

    __slots__ = ("__weakref__", "_owner", "address", "dtype", "in_arena", "made", "maker", "shape")

    def __init__(self, shape: Sequence[int], dtype: Any, address: int, owner: Any) -> None:
        self.shape, self.dtype, self.address = tuple(shape), np.dtype(dtype), address
        self._owner = owner  # what keeps the memory: an arena's place or a NumPy array
        kind = owner.__class__
        self.in_arena: bool = kind is _Place or (kind is CPUArray and owner.in_arena)
        # ``Tape.made_of``: the mark of a tape, and what its instructions make of this array
        self.maker: object = None
        self.made: dict[Any, Any] = {}

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
        return CPUArray(whole, self.dtype, self.address, self)

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


class Tape:
    """Instructions recorded and not yet run, with the arena of their outputs."""

    def __init__(self, arena: Arena | None = None) -> None:
        self.arena = arena or Arena()
        self.rows = np.zeros((256, ROW), np.int64)
        self.n = 0
        self.kept: list[Any] = []  # arrays whose addresses stand in the rows
        self.mark = object()  # stands for the tape where it must not be kept
        self._grouped = False

    def array(self, shape: Sequence[int], dtype: Any = np.float32) -> CPUArray:
        """Room for an output of the next instruction."""
        if not self._grouped:
            self.arena.begin_stage()
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        place = _Place(self.arena, n_bytes)
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

    def made_of(self, x: CPUArray) -> dict[Any, Any]:
        """What this tape's instructions make of an array, such as int8 blocks: once for all that read them."""
        if x.maker is not self.mark:
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
