"""An interpreter of PTX: the code that NVRTC makes of the CUDA kernels, carried out without a device.

It shows what compiling alone cannot: that inline assembly says what was meant, that every address lies within
its array and is aligned for its access, and that no thread reads what another of its group wrote to shared
memory with no barrier in between. Threads advance together, the furthest behind first, as NumPy arrays with a
value for each. Instructions are those that the kernels use; any other is an error that names it.

Source: NVIDIA, "PTX ISA", version 9. ``ptx_text`` reads the code, ``ptx_instructions`` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .ptx_instructions import WARP, Fault, operation
from .ptx_text import WIDTH, Instruction, Kernel, access, constant, place_of

PAGE = 1 << 33  # addresses of one allocation of global memory
MOST_THREADS = 4096  # at once
U8, U32, U64 = np.uint8, np.uint32, np.uint64


class Memory:
    """Global memory: allocations by address, and their bytes."""

    def __init__(self) -> None:
        self.allocations: dict[int, np.ndarray] = {}

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Bytes [n, size]."""
        out = np.empty((len(addresses), size), U8)
        for data, at, which in self._places(addresses, size):
            out[which] = data[at]
        return out

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        for data, at, which in self._places(addresses, values.shape[1]):
            data[at] = values[which]

    def _places(
        self, addresses: np.ndarray, size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        """For each allocation that addresses hit: its bytes, offsets into them, and which addresses hit it."""
        pages = addresses // PAGE
        for page in {int(pages[0])} if (pages == pages[0]).all() else set(pages.tolist()):
            which = pages == page
            data, offsets = self.allocations.get(page), addresses[which] - page * PAGE
            if data is None:
                raise Fault(f"address {page * PAGE + int(offsets[0]):#x} is not allocated")
            if offsets.max() + size > len(data):
                raise Fault(f"{size} bytes at {int(offsets.max())} of an allocation of {len(data)}")
            if (offsets % size).any():
                raise Fault(f"an access of {size} bytes is not aligned")
            yield data, offsets[:, None] + np.arange(size), which


class Shared:
    """Shared memory of several groups, and which thread used each byte last, since which barrier."""

    def __init__(self, nbytes: int, threads: int, groups: int) -> None:
        self.nbytes, self.threads = nbytes, threads
        self.data = np.full(nbytes * groups, 0xFF, U8)
        self.epoch = np.ones(groups, np.int64)
        self.written, self.writer = np.zeros((2, nbytes * groups), np.int64)
        self.was_read, self.reader = np.zeros((2, nbytes * groups), np.int64)

    def place(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        if addresses.min() < 0 or addresses.max() + size > self.nbytes:
            raise Fault(f"{size} bytes at {int(addresses.max())} of {self.nbytes} shared ones")
        if (addresses % size).any():
            raise Fault(f"a shared access of {size} bytes is not aligned")
        start = addresses + threads // self.threads * self.nbytes
        return start[:, None] + np.arange(size)

    def read(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Bytes [n, size] for each thread."""
        at, me = self.place(addresses, size, threads), threads[:, None]
        now = self.epoch[threads // self.threads][:, None]
        if ((self.written[at] == now) & (self.writer[at] != me)).any():
            raise Fault("reads what another thread wrote since the last barrier")
        again = (self.was_read[at] == now) & (self.reader[at] != me)
        self.reader[at], self.was_read[at] = me, now
        self.reader[at[again | (self.reader[at] != me)]] = -1  # several
        return self.data[at]

    def write(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        at, me = self.place(addresses, values.shape[1], threads), threads[:, None]
        now = self.epoch[threads // self.threads][:, None]
        others = (self.written[at] == now) & (self.writer[at] != me)
        others |= (self.was_read[at] == now) & (self.reader[at] != me)
        if others.any():
            raise Fault("writes what another thread used since the last barrier")
        self.written[at], self.writer[at] = now, me
        if (self.writer[at] != me).any():
            raise Fault("two threads write the same bytes")
        self.data[at] = values


Step = Callable[[np.ndarray], None]


class Groups:
    """The threads of some groups of one launch, as they run."""

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        params: dict[str, Any],
        grid: Sequence[int],
        size: Sequence[int],
        first: int,
        count: int,
    ) -> None:
        self.kernel, self.memory, self.params = kernel, memory, params
        self.size, self.n = int(np.prod(size)), count * int(np.prod(size))
        self.threads = np.arange(self.n)
        self.shared = Shared(kernel.sizes["shared"], self.size, count)
        self.local = np.zeros((self.n, kernel.sizes["local"]), U8)
        self.registers = {k: np.zeros(self.n, v) for k, v in kernel.registers.items()}
        self.fixed = special(grid, size, first, count)
        self.waiting, self.done = np.zeros((2, self.n), bool)
        self.pc = np.zeros(self.n, np.int64)
        self.copies: list[
            list[np.ndarray]
        ] = []  # shared addresses, bytes, threads, number of the commit
        self.commits = np.zeros(self.n, np.int64)
        self.steps: dict[int, list[tuple[Instruction, Step]]] = {}

    def run(self) -> None:
        """Until all threads are done."""
        end = len(self.kernel.blocks)
        while not self.done.all():
            live = ~(self.done | self.waiting)
            if not live.any():
                self._release()
                continue
            at = int(self.pc[live].min())
            mask = live & (self.pc == at)
            self.pc[mask] = at + 1
            if at == end:
                self.done |= mask
                continue
            if at not in self.steps:
                self.steps[at] = [(i, self._step(i)) for i in self.kernel.blocks[at]]
            for instruction, step in self.steps[at]:
                try:
                    step(mask)
                except Fault as e:
                    where = f"{self.kernel.name}: {e}: {instruction.text}"
                    raise Fault(where) from None

    def _release(self) -> None:
        """Every group has come to a barrier."""
        pc = np.where(self.waiting, self.pc, -1).reshape(-1, self.size)
        others = np.where(pc < 0, pc.max(1)[:, None], pc)
        if (others != pc.max(1)[:, None]).any():
            raise Fault(f"{self.kernel.name}: threads wait at different barriers")
        self.shared.epoch += 1
        self.waiting[:] = False

    def _step(self, i: Instruction) -> Step:
        """What an instruction does, for the threads of a mask."""
        found = getattr(self, f"_{i.op[0]}", None)
        do = found(i) if found else self._compute(i)
        if i.predicate is None:
            return do
        name, wanted = i.predicate.lstrip("!"), i.predicate[0] != "!"

        def predicated(mask: np.ndarray) -> None:
            part = mask & (self.registers[name] == wanted)
            if part.any():
                do(part)

        return predicated

    def _compute(self, i: Instruction) -> Step:
        f, sources = operation(i.op), [self.reader(x) for x in i.operands[1:]]
        put = self.writer(i.operands[0])
        return lambda mask: put(f(*[read() for read in sources]), mask)

    def _mov(self, i: Instruction) -> Step:
        """A register, or {parts} of one, the lowest first."""
        if i.operands[1][0] != "{" and i.operands[0][0] != "{":
            return self._compute(i)
        puts, reads = self.writers(i.operands[0]), self.readers(i.operands[1])
        bits = int(i.op[-1][1:]) // max(len(puts), len(reads))

        def move(mask: np.ndarray) -> None:
            parts = [read().astype(U64) << U64(k * bits) for k, read in enumerate(reads)]
            whole = np.bitwise_or.reduce(parts)
            for k, put in enumerate(puts):
                put(whole >> U64(k * bits), mask)

        return move

    # ---- control

    def _bra(self, i: Instruction) -> Step:
        target = self.kernel.labels[i.operands[0]]

        def jump(mask: np.ndarray) -> None:
            self.pc[mask] = target

        return jump

    def _ret(self, i: Instruction) -> Step:
        def end(mask: np.ndarray) -> None:
            self.done |= mask

        return end

    _exit = _ret

    def _bar(self, i: Instruction) -> Step:
        if "warp" in i.op:
            raise NotImplementedError(i.text)

        def wait(mask: np.ndarray) -> None:
            self.waiting |= mask

        return wait

    _barrier = _bar

    def _membar(self, i: Instruction) -> Step:
        """Threads see what others wrote before in any case."""
        return lambda mask: None

    _fence = _membar

    # ---- operands

    def reader(self, text: str) -> Callable[[], np.ndarray]:
        """Gives an operand's bits, one for each thread."""
        if text in self.kernel.registers:
            return lambda: self.registers[text]
        if text in self.fixed:
            value = self.fixed[text]
        elif text in self.kernel.arrays:
            value = np.full(self.n, self.kernel.arrays[text], U64)
        else:
            value = np.full(self.n, constant(text), U64)
        return lambda: value

    def writer(self, name: str) -> Callable[[np.ndarray, np.ndarray], None]:
        """Takes a result's bits and the threads that it is for."""
        if name == "_":
            return lambda bits, mask: None
        dtype, registers = self.kernel.registers[name], self.registers

        def put(bits: np.ndarray, mask: np.ndarray) -> None:
            bits = bits.astype(dtype, copy=False)
            registers[name] = bits if mask.all() else np.where(mask, bits, registers[name])

        return put

    def writers(self, text: str) -> list[Callable[[np.ndarray, np.ndarray], None]]:
        return [self.writer(x.strip()) for x in text.strip("{}").split(",")]

    def readers(self, text: str) -> list[Callable[[], np.ndarray]]:
        return [self.reader(x.strip()) for x in text.strip("{}").split(",")]

    def address(self, text: str) -> Callable[[np.ndarray], np.ndarray]:
        """A function from a mask of threads to their addresses: [register + offset] or [array + offset]."""
        base, offset = place_of(text)
        read = self.reader(base)
        return lambda mask: read()[mask].astype(np.int64) + offset

    # ---- memory

    def _ld(self, i: Instruction) -> Step:
        space, count, kind = access(i.op)
        targets, dtype = self.writers(i.operands[0]), np.dtype(kind)
        if space == "param":
            value = np.full(self.n, self.params[i.operands[1].strip("[]")])
            return lambda mask: targets[0](value.copy(), mask)
        address, size = self.address(i.operands[1]), dtype.itemsize * count

        def load(mask: np.ndarray) -> None:
            raw = self._read(space, address(mask), size, mask)
            values = np.zeros((self.n, count), dtype)
            values[mask] = np.ascontiguousarray(raw).view(dtype)
            if dtype.kind == "i":
                values = values.astype(np.int64).view(U64)
            for put, column in zip(targets, values.T, strict=True):
                put(np.ascontiguousarray(column), mask)

        return load

    def _read(self, space: str, addresses: np.ndarray, size: int, mask: np.ndarray) -> np.ndarray:
        if space == "shared":
            return self.shared.read(addresses, size, self.threads[mask])
        if space == "local":
            return self.local[self.threads[mask][:, None], addresses[:, None] + np.arange(size)]
        return self.memory.read(addresses, size)

    def _st(self, i: Instruction) -> Step:
        space, _, kind = access(i.op)
        sources, unsigned = self.readers(i.operands[1]), np.dtype(f"u{np.dtype(kind).itemsize}")
        address = self.address(i.operands[0])

        def store(mask: np.ndarray) -> None:
            values = np.stack([read()[mask].astype(unsigned) for read in sources], 1).view(U8)
            addresses, threads = address(mask), self.threads[mask]
            if space == "shared":
                self.shared.write(addresses, values, threads)
            elif space == "local":
                self.local[threads[:, None], addresses[:, None] + np.arange(values.shape[1])] = (
                    values
                )
            else:
                self.memory.write(addresses, values)

        return store

    def _atom(self, i: Instruction) -> Step:
        assert i.op[-2:] in (("add", "u32"), ("add", "s32")), i.text
        put, address = self.writer(i.operands[0]), self.address(i.operands[1])
        amount = self.reader(i.operands[2])

        def add(mask: np.ndarray) -> None:
            old = np.zeros(self.n, U32)
            for thread, place in zip(
                self.threads[mask], address(mask), strict=True
            ):  # in any order
                one = np.array([place])
                read, write = self._atomic("shared" in i.op, one, thread)
                word = read.view(U32)
                old[thread] = word[0, 0]
                write((word + U32(amount()[thread])).view(U8))
            put(old, mask)

        return add

    def _atomic(self, shared: bool, one: np.ndarray, thread: int) -> tuple[np.ndarray, Any]:
        """The word at one address, and what writes it."""
        if not shared:
            return self.memory.read(one, 4), lambda word: self.memory.write(one, word)
        at = self.shared.place(one, 4, np.array([thread]))
        self.shared.written[at] = 0  # atomics do not race with each other
        return self.shared.data[at], lambda word: self.shared.data.__setitem__(at, word)

    def _red(self, i: Instruction) -> Step:
        return self._atom(Instruction(i.op, ["_", *i.operands], None, i.text))

    def _cvta(self, i: Instruction) -> Step:
        """Addresses are the same in every space: spaces are told apart by the instructions."""
        put, read = self.writer(i.operands[0]), self.reader(i.operands[1])
        return lambda mask: put(read().copy(), mask)

    # ---- asynchronous copies: nothing arrives before the thread waits for it

    def _cp(self, i: Instruction) -> Step:
        assert i.op[1] == "async", i.text
        if i.op[2] == "commit_group":
            return self._commit
        if i.op[2] == "wait_all":
            return lambda mask: self._arrive(mask, -1)
        if i.op[2] == "wait_group":
            return lambda mask: self._arrive(mask, int(i.operands[0]))
        assert i.op[2:] == ("cg", "shared", "global"), i.text
        assert i.operands[2] == "16", i.text
        target, source = self.address(i.operands[0]), self.address(i.operands[1])
        given = self.reader(i.operands[3] if len(i.operands) > 3 else "16")

        def copy(mask: np.ndarray) -> None:
            values, there = np.zeros((int(mask.sum()), 16), U8), given()[mask] > 0
            if there.any():
                values[there] = self.memory.read(source(mask)[there], 16)
            self.copies.append([target(mask), values, self.threads[mask], self.commits[mask]])

        return copy

    def _commit(self, mask: np.ndarray) -> None:
        self.commits[mask] += 1

    def _arrive(self, mask: np.ndarray, newer: int) -> None:
        """All copies of these threads, but for those of the ``newer`` last commits (and none at -1)."""
        left = []
        for copy in self.copies:
            threads, number = copy[2], copy[3]
            ready = mask[threads] & ((newer < 0) | (number < self.commits[threads] - newer))
            if ready.any():
                self.shared.write(copy[0][ready], copy[1][ready], threads[ready])
            if not ready.all():
                left.append([part[~ready] for part in copy])
        self.copies = left

    # ---- warps

    def _together(self, mask: np.ndarray) -> None:
        whole = mask.reshape(-1, WARP)
        if (whole.any(1) != whole.all(1)).any():
            raise Fault("not all threads of a warp have come")

    def _shfl(self, i: Instruction) -> Step:
        puts = [self.writer(x.strip()) for x in i.operands[0].split("|")]
        x, b, clamp = (self.reader(o) for o in i.operands[1:4])
        lane = self.threads % WARP

        def shuffle(mask: np.ndarray) -> None:
            self._together(mask)
            assert clamp()[0] in (31, 0), i.text  # the whole warp
            by = b().astype(np.int64)
            source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[i.op[2]]
            inside = (source >= 0) & (source < WARP)
            taken = np.where(inside, self.threads - lane + source, self.threads)
            for put, result in zip(puts, (x()[taken], inside), strict=False):
                put(result, mask)

        return shuffle

    def _ldmatrix(self, i: Instruction) -> Step:
        assert "x4" in i.op, i.text
        puts, address = self.writers(i.operands[0]), self.address(i.operands[1])

        def load(mask: np.ndarray) -> None:
            self._together(mask)
            rows = np.zeros((self.n, 16), U8)
            rows[mask] = self.shared.read(address(mask), 16, self.threads[mask])
            tiles = rows.view(np.uint16).reshape(-1, 4, 8, 8)
            if "trans" in i.op:
                tiles = tiles.swapaxes(2, 3)
            words = np.ascontiguousarray(tiles).view(U32).reshape(-1, 4, WARP)
            for k, put in enumerate(puts):
                put(words[:, k].reshape(-1), mask)

        return load

    def _mma(self, i: Instruction) -> Step:
        assert i.op[3] in ("m16n8k16", "m16n8k8"), i.text
        assert i.op[4:] == ("row", "col", "f32", "f16", "f16", "f32"), i.text
        puts = self.writers(i.operands[0])
        a, b, c = (self.readers(o) for o in i.operands[1:])

        def multiply(mask: np.ndarray) -> None:
            self._together(mask)
            halves = [[tile(read()) for read in side] for side in (a, b)]
            left = np.block([halves[0][0::2], halves[0][1::2]])  # rows g, then rows g + 8
            right = np.concatenate(halves[1], 2)  # a row for each column of b
            product = left.astype(np.float32) @ right.astype(np.float32).swapaxes(1, 2)
            for k, (put, read) in enumerate(zip(puts, c, strict=True)):
                part = product[:, 8 * (k // 2) : 8 * (k // 2) + 8, k % 2 :: 2].reshape(-1)
                put((part + read().view(np.float32)).view(U32), mask)

        return multiply


def tile(x: np.ndarray) -> np.ndarray:
    """A register's pairs of halves as [warps, 8, 8]."""
    return x.view(np.float16).reshape(-1, 8, 8)


def special(
    grid: Sequence[int], size: Sequence[int], first: int, count: int
) -> dict[str, np.ndarray]:
    """Numbers of threads and of groups ``first`` to first + count of the grid."""
    n = int(np.prod(size))
    threads, groups = np.tile(np.arange(n), count), np.repeat(np.arange(first, first + count), n)
    out = {"%laneid": threads % WARP, "%warpid": threads // WARP}
    for axis, letter in enumerate("xyz"):
        out[f"%tid.{letter}"] = threads // int(np.prod(size[:axis])) % size[axis]
        out[f"%ctaid.{letter}"] = groups // int(np.prod(grid[:axis])) % grid[axis]
        out[f"%ntid.{letter}"] = np.full(n * count, size[axis])
        out[f"%nctaid.{letter}"] = np.full(n * count, grid[axis])
    return {name: x.astype(U32) for name, x in out.items()}


def launch(
    kernel: Kernel, memory: Memory, grid: Sequence[int], size: Sequence[int], args: list[Any]
) -> None:
    """Run all groups of a grid."""
    params = {}
    for (name, kind), value in zip(kernel.params, args, strict=True):
        raw, width = np.asarray(value), np.dtype(WIDTH[kind])
        assert raw.dtype.itemsize == width.itemsize, (kernel.name, name)
        params[name] = raw.reshape(1).view(width)[0]
    total, at_once = int(np.prod(grid)), max(1, MOST_THREADS // int(np.prod(size)))
    with np.errstate(all="ignore"):
        for first in range(0, total, at_once):
            count = min(at_once, total - first)
            Groups(kernel, memory, params, grid, size, first, count).run()
