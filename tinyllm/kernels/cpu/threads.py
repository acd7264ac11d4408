"""Threads that run a program of kernels together, and never wait for one another, only for work done.

Every thread walks the same list of instructions. A *stage* is a run of instructions without dependence
on each other; its claims are numbered by tickets. Each thread has a stretch, neighbouring tickets of a stage
that it takes one by one by compare-and-swap, so that it reads memory without a gap; then it takes what is left
in the stretches of others. A stage is over when its pieces are done, so a thread that the system has put aside
holds up nobody unless it is in the middle of a piece. Waiting is a short spin, then a futex or what the system
has in its place.

The counters of tickets carry the generation of the program in their high bits: a thread that wakes up late,
with an old program before it, cannot claim anything.

A program is rows of 32 x int64. The first holds the number of the others; each other is an instruction:
kernel address, pieces, pieces per claim, 1 if a stage begins here, claims, then its arguments.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque

import numpy as np
from llvmlite import ir

from ... import system
from . import jit
from .emit import I32, I64, P8, target
from .simd import emitter, get_i64, i64, types

ROW = 32  # int64 values of an instruction
ROW_BYTES = ROW * 8
PIECES, CHUNK, BEGINS, CLAIMS = 8, 16, 24, 32  # bytes into a row
ARGS = 5  # where its arguments begin
LINE = 64  # bytes: shared counters stand on cache lines of their own
GENERATION, DONE, PROGRAM, STOP, LIMIT, SLEEPERS, WORKERS = (LINE * i for i in range(7))
NEXT, PARKED = WORKERS, WORKERS + 8  # for each thread: the next of its tickets, its last program
SPIN = 1500  # pauses before sleeping: some 50 microseconds
WAKES = system.WAKES  # else nobody is woken, and those who wait look again
YIELDS = 2000  # before the first nap: about a millisecond
# nanoseconds: each nap is that much longer than the one before, so 1 ms after 25 ms without work, 10 ms
# after 2.5 s; nobody waits for a thread that comes late, for the others do its pieces
NAP, LONGEST_NAP = 20_000, 20_000_000
SHIFT = 26  # the generation's place in the counters: a thousand programs a second fill them in four years
CLOSED = (1 << SHIFT) - 1  # a ticket beyond every program's end
RETIRED = 64  # programs; that many wait for sleeping threads before these are woken


def _address(e, p):
    return e.b.inttoptr(p, I64.as_pointer())


@emitter(i64, i64)
def atomic_load(e, p):
    """The value at an address, seen no earlier than what was written before it."""
    return e.b.load_atomic(_address(e, p), "acquire", 8)


@emitter(types.void, i64, i64)
def atomic_store(e, p, v):
    """A value to an address, after everything written before."""
    e.b.store_atomic(v, _address(e, p), "seq_cst", 8)


@emitter(i64, i64, i64)
def atomic_add(e, p, v):
    """Add to the value at an address; the value before."""
    return e.b.atomic_rmw("add", _address(e, p), v, "seq_cst")


@emitter(i64, i64, i64, i64)
def compare_and_swap(e, p, old, new):
    """1 if the value at an address was old and now is new."""
    pair = e.b.cmpxchg(_address(e, p), old, new, "seq_cst", "seq_cst")
    return e.b.zext(e.b.extract_value(pair, 1), I64)


@emitter(types.void, i64, i64, i64, i64, i64)
def call_kernel(e, address, args, first, last, worker):
    """Call a compiled kernel."""
    ty = ir.FunctionType(ir.VoidType(), [I64] * 4)
    e.b.call(e.b.inttoptr(address, ty.as_pointer()), [args, first, last, worker])


def _syscall(e, *values):
    ty = ir.FunctionType(I64, [I64], var_arg=True)
    return e.b.call(e.function("syscall", ty), values)


@emitter(types.void, i64, i64)
def sleep_while(e, p, value):
    """Sleep while the low 32 bits at an address are those of value."""
    word = e.b.trunc(value, I32)
    low = e.b.zext(word, I64)
    if system.WAITING == "futex":
        _syscall(e, I64(system.FUTEX), p, I64(128), low, I64(0), I64(0), I64(0))
    elif system.WAITING == "os_sync":  # address, value, its bytes, flags
        e.call("os_sync_wait_on_address", I32, p, low, I64(4), I32(0))
    elif system.WAITING == "WaitOnAddress":  # address, where the value stands, its bytes, for ever
        room = e.room(I32)
        e.b.store(word, room)
        e.call("WaitOnAddress", I32, p, e.b.ptrtoint(room, I64), I64(4), I32(0xFFFFFFFF))


@emitter(types.void, i64)
def wake_all(e, p):
    """Wake every thread that sleeps on an address."""
    if system.WAITING == "futex":
        _syscall(e, I64(system.FUTEX), p, I64(129), I64(1 << 20), I64(0), I64(0), I64(0))
    elif system.WAITING == "os_sync":
        e.call("os_sync_wake_by_address_all", I32, p, I64(4), I32(0))
    elif system.WAITING == "WaitOnAddress":
        e.call("WakeByAddressAll", ir.VoidType(), p)


@emitter(types.void, i64)
def nap(e, nanoseconds):
    """Let other threads run for so long, less than a second."""
    if system.WAITING == "Sleep":
        e.call("Sleep", ir.VoidType(), e.b.trunc(e.b.udiv(nanoseconds, I64(1_000_000)), I32))
        return
    timespec = e.room(ir.ArrayType(I64, 2))
    e.b.store(I64(0), e.b.gep(timespec, [I32(0), I32(0)]))
    e.b.store(nanoseconds, e.b.gep(timespec, [I32(0), I32(1)]))
    e.call("nanosleep", I32, e.b.bitcast(timespec, P8), I64(0))


@emitter(types.void)
def yield_processor(e):
    """Let another thread run that wants to."""
    if system.NAME == "win32":
        e.call("Sleep", ir.VoidType(), I32(0))
    else:
        e.call("sched_yield", I32)


@emitter(types.void)
def pause(e):
    """Tell the processor that this is a waiting loop."""
    triple = target()[0]
    if triple.startswith(("x86_64", "i686")):
        e.call("llvm.x86.sse2.pause", ir.VoidType())
    elif triple.startswith(("aarch64", "arm64")):
        e.call("llvm.aarch64.hint", ir.VoidType(), I32(1))


@emitter(i64)
def flush_denormals(e):
    """Let numbers below 2^-126 count as zero, for they take a hundred cycles; returns the setting before."""
    triple = target()[0]
    if triple.startswith("x86_64"):
        place = e.b.bitcast(e.room(I32), P8)
        e.call("llvm.x86.sse.stmxcsr", ir.VoidType(), place)
        before = e.load(place, I32)
        restore(e, e.b.or_(before, I32(0x8040)))  # results and operands
        return e.b.zext(before, I64)
    if triple.startswith(("aarch64", "arm64")):
        before = e.call("llvm.aarch64.get.fpcr", I64)
        restore(e, e.b.or_(before, I64(1 << 24)))
        return before
    return I64(0)


@emitter(types.void, i64)
def restore_denormals(e, before):
    """Give this thread its setting back."""
    restore(e, before)


def restore(e, setting):
    """Set the register that says how the processor treats small numbers."""
    triple = target()[0]
    if triple.startswith("x86_64"):
        place = e.b.bitcast(e.room(I32), P8)
        e.store(setting if setting.type == I32 else e.b.trunc(setting, I32), place)
        e.call("llvm.x86.sse.ldmxcsr", ir.VoidType(), place)
    elif triple.startswith(("aarch64", "arm64")):
        e.call("llvm.aarch64.set.fpcr", ir.VoidType(), setting)


def wait(state, field, goal, spin):
    """Until a counter reaches the goal: spin a little, then sleep.

    A system that cannot wake a thread at an address lets it look again after ever longer naps.
    """
    spent = 0
    seen = atomic_load(state + field)
    while seen < goal:
        spent += 1
        if spent < spin:
            pause()
        elif WAKES:
            atomic_add(state + SLEEPERS, 1)
            sleep_while(state + field, seen)
            atomic_add(state + SLEEPERS, -1)
        elif spent < spin + YIELDS:
            yield_processor()
        else:
            nap(min((spent - spin - YIELDS) * NAP, LONGEST_NAP))
        seen = atomic_load(state + field)


def wake(state, field):
    """After a counter changed: wake those who sleep on it, if anybody sleeps."""
    if atomic_load(state + SLEEPERS) > 0:
        wake_all(state + field)


def do_claim(row, ticket, worker):
    """Call the kernel that the ticket of a stage (counted from row's first) stands for."""
    while ticket >= get_i64(row + CLAIMS):
        ticket -= get_i64(row + CLAIMS)
        row += ROW_BYTES
    chunk = get_i64(row + CHUNK)
    first = ticket * chunk
    last = min(first + chunk, get_i64(row + PIECES))
    call_kernel(get_i64(row), row + ARGS * 8, first, last, worker)


def take_part(state, program, generation, stretches, worker, spin):
    """Walk the program, claiming and doing pieces, until all is done or another generation has begun."""
    base = generation << SHIFT
    row, stage_first = program + ROW_BYTES, 0
    end = row + get_i64(program) * ROW_BYTES
    while row < end and atomic_load(state + GENERATION) == generation:
        stop, stage_last = row, stage_first  # the stage: rows [row, stop), tickets [first, last)
        while True:
            stage_last += get_i64(stop + CLAIMS)
            stop += ROW_BYTES
            if stop >= end or get_i64(stop + BEGINS) != 0:
                break
        did, first, tickets = 0, base + stage_first, stage_last - stage_first
        for turn in range(stretches):
            stretch = (worker + turn) % stretches
            did += take_stretch(state, row, first, tickets, stretch, stretches, worker)
        if did > 0 and atomic_add(state + DONE, did) + did == base + stage_last:
            wake(state, DONE)
        wait(state, DONE, base + stage_last, spin)
        row, stage_first = stop, stage_last


def take_stretch(state, row, first, tickets, stretch, stretches, worker):
    """Do what nobody has claimed of a stretch; returns how many claims that was.

    The stage begins with this row and its first ticket.
    """
    counter, did = state + NEXT + LINE * stretch, 0
    begin = first + (tickets * stretch + stretches - 1) // stretches
    end = first + (tickets * (stretch + 1) + stretches - 1) // stretches
    seen = atomic_load(counter)
    while seen < end:
        ticket = max(seen, begin)  # it still stands where the stretch ended in a stage before
        if ticket == end:  # an empty stretch
            break
        if compare_and_swap(counter, seen, ticket + 1) == 1:
            do_claim(row, ticket - first, worker)
            did += 1
        seen = atomic_load(counter)
    return did


def announce(state, program, limit, generation):
    """Write down the program of the next generation, once nothing in its stretches is left to claim.

    A late thread of the last generation may read the program before the next has begun.
    """
    for stretch in range(limit):
        atomic_store(state + NEXT + LINE * stretch, generation << SHIFT)
    atomic_store(state + PROGRAM, program)
    atomic_store(state + LIMIT, limit)


def lead(state, program, limit, spin):
    """The caller's part: open a generation, wake the others, take part, and close it when all is done."""
    generation = atomic_load(state + GENERATION) + 1
    announce(state, program, limit, generation)
    atomic_store(state + DONE, generation << SHIFT)
    atomic_store(state + GENERATION, generation)
    if limit > 1:
        wake(state, GENERATION)
    take_part(state, program, generation, limit, 0, spin)
    for stretch in range(limit):
        atomic_store(state + NEXT + LINE * stretch, (generation << SHIFT) + CLOSED)


def work(state, worker, value, spin):
    """A thread's life (value: the last generation it knows): wait for a generation, take part, park.

    Worker 0 is the caller, and leads one program (value: its address; spin: the threads' number instead).
    """
    before = flush_denormals()
    if worker == 0:
        lead(state, value, spin, SPIN)
        restore_denormals(before)
        return
    while True:
        wait(state, GENERATION, value + 1, spin)
        if atomic_load(state + STOP) != 0:
            return
        value = atomic_load(state + GENERATION)
        limit = atomic_load(state + LIMIT)
        if worker < limit:
            take_part(state, atomic_load(state + PROGRAM), value, limit, worker, spin)
        atomic_store(state + PARKED + LINE * worker, value)


class Pool:
    """The threads of this process; programs of several Python threads run one after another."""

    def __init__(self) -> None:
        self.size = system.n_cores()
        self._lock = threading.Lock()
        self._memory = np.zeros(WORKERS + LINE * (self.size + 1), np.uint8)
        self._state = -(-self._memory.ctypes.data // LINE) * LINE
        self._work = jit.function(work, f"work_{system.WAITING}")
        self._nothing = np.zeros(ROW, np.int64)  # a program without instructions
        self._started = 1  # the caller is worker 0
        self._retired: deque[tuple[int, object]] = deque()

    def run(self, program: int, n_threads: int) -> None:
        """Run the program at an address to its end on up to n_threads threads."""
        with self._lock:
            n_threads = min(n_threads, self.size)
            while self._started < n_threads:
                self._start(self._started)
            self._work(self._state, 0, program, n_threads)
            self._release()
            if len(self._retired) > RETIRED:  # one works alone; the others sleep, and hold them
                self._work(self._state, 0, self._nothing.ctypes.data, self._started)

    def _start(self, worker: int) -> None:
        seen = self._counter(GENERATION)
        ctypes.c_int64.from_address(self._state + PARKED + LINE * worker).value = seen
        args = (self._state, worker, seen, SPIN)
        thread = threading.Thread(target=self._work, args=args, name="tinyllm", daemon=True)
        self._started += 1  # first: Ctrl-C below must not make two threads of one number
        try:
            thread.start()
        except RuntimeError:  # the system has no room for it
            self._started -= 1
            raise

    def _counter(self, field: int) -> int:
        return ctypes.c_int64.from_address(self._state + field).value

    def retire(self, memory: object) -> None:
        """Keep a program's memory until no late thread can still look at it.

        Finalisers call this at any moment, also in a forked child before ``_forget``: it waits for nobody.
        """
        self._retired.append((self._counter(GENERATION), memory))

    def _release(self) -> None:
        """Let go of the programs that every thread has left behind."""
        while self._retired:
            parked = [self._counter(PARKED + LINE * w) for w in range(1, self._started)]
            if parked and self._retired[0][0] > min(parked):
                return
            self._retired.popleft()


_pool: Pool | None = None
_pool_lock = threading.RLock()


def pool() -> Pool:
    """The process's pool, made when first needed."""
    global _pool
    if _pool is None:
        with _pool_lock:
            _pool = _pool or Pool()
    return _pool


def _forget() -> None:
    """In a forked child there are no threads and any lock may be held: start afresh."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.RLock()


system.after_fork(_forget)
