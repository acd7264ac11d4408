# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. A kernel for your CPU
#
# Nine tenths of the time of a language model is one operation: a matrix times a vector. In plain Python it is some
# ten thousand times slower than your processor allows. In this notebook you climb that ladder rung by rung, in Python all the
# way: loops, NumPy, numba, vector instructions, and the instruction that was made for it. You read the machine's own
# assembly, and end near the limit.
#
# **Time: 60 minutes.** You should have packed a block of Q4_0 (notebook 3, part 1). Everything is compiled for the
# processor that you have; the pictures and numbers are your machine's. (Numbers in the text are those of one core of a cloud
# machine with AVX-512.)

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import collections
import os
import re
import time

import numpy as np

from tinyllm import plots
from tinyllm.course import check
from tinyllm.gguf import quants
from tinyllm.kernels.cpu import emit, jit, limits
from tinyllm.kernels.cpu.program import Tape, aligned

SECONDS = float(os.environ.get("TINYLLM_COURSE_SECONDS", 0.3))  # for each measurement
print(emit.instruction_set())

# %% [markdown]
# ## The roof
#
# Before we write a kernel we ask what the machine could do at best. Three numbers say it: how many bytes a second it
# reads from memory, how many products of *bytes*, and how many products of *floats* it carries out. In the picture, left
# is what reads much and computes little, right the reverse. Nothing can lie above the lines.

# %%
LIMITS = limits.limits(1, SECONDS)
plots.roofline(None, "One core of this machine", LIMITS, [])

# %% [markdown]
# **Predict.** One token times a matrix in Q4_0: each weight, 4.5 bits, is used for one multiply-add. How many
# multiply-adds is that for each byte? So which of the lines is the roof?

# %%
print(8 / 4.5, "multiply-adds for each byte")
roof = {
    "memory": LIMITS["read GB/s"] * 8 / 4.5,
    "products of bytes": LIMITS["dot GMAC/s"],
    "products of floats": LIMITS["float GMAC/s"],
}
plots.bars(
    list(roof),
    {"GMAC/s": list(roof.values())},
    xlabel="thousand millions of multiply-adds a second",
    title="Three limits of a Q4_0 product",
    log=True,
)

# %% [markdown]
# The smallest of the three is the roof: memory, if the matrix lies there. Ours, to begin with, fits into the caches,
# which are faster; then arithmetic counts.
#
# ## Part 1. Loops
#
# The matrix, as a file has it: rows of blocks, 18 bytes for 32 weights. The vector: floats.

# %%
N_OUT, N_IN = 1024, 1024
rng = np.random.default_rng(0)
raw = quants.quantize("Q4_0", rng.normal(0, 0.1, (N_OUT, N_IN)).astype(np.float32))
x = rng.normal(0, 1, N_IN).astype(np.float32)
exact = quants.dequantize("Q4_0", raw).astype(np.float64) @ x
print(raw.shape, f"{raw.nbytes:,} bytes")

# %%
scales = raw.reshape(N_OUT, -1, 18)[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
rows, xs = raw.reshape(N_OUT, -1, 18).tolist(), x.tolist()


def one_row(row):
    """A row times x, number by number."""
    total = 0.0
    for b, block in enumerate(rows[row]):
        some = 0.0
        for i in range(16):
            byte = block[2 + i]
            some += ((byte & 15) - 8) * xs[32 * b + i] + ((byte >> 4) - 8) * xs[32 * b + 16 + i]
        total += scales[row, b] * some
    return total


start = time.perf_counter()
assert abs(one_row(0) - exact[0]) < 1e-3
RESULTS = {"Python": N_IN / (time.perf_counter() - start) / 1e9}  # GMAC/s
print(f"{RESULTS['Python'] * 1e3:.2f} million multiply-adds a second")

# %% [markdown]
# **Predict.** How long would *one token* of a model of a thousand million weights take so?

# %%
print(f"{1 / RESULTS['Python']:.0f} seconds")

# %% [markdown]
# ### Exercise 1: what there is to do
#
# For a matrix of `n_out` by `n_in` in a format with `bits` per weight, and `n_tokens` vectors: how many
# multiply-adds, how many bytes of weights, and so how many multiply-adds a byte?


# %% tags=["exercise"]
def work(n_out, n_in, bits, n_tokens):
    """(multiply-adds, bytes of weights, multiply-adds for each byte)."""
    raise NotImplementedError


# %% tags=["check"]
with check("what there is to do"):
    macs, n_bytes, intensity = work(1024, 1024, 4.5, 1)
    assert macs == 1024 * 1024, "each weight once"
    assert n_bytes == raw.nbytes, f"{n_bytes} bytes, the matrix has {raw.nbytes}"
    assert np.isclose(work(64, 32, 16, 10)[2], 5.0), (
        "16 bits are 2 bytes; ten tokens use each weight ten times"
    )

# %% [markdown]
# ## Part 2. NumPy
#
# NumPy's product is fast, but it wants floats: so first decode the matrix, to 32 bits a weight.


# %%
def gmacs(run, macs=N_OUT * N_IN):
    """Thousand millions of multiply-adds a second, by the best of several runs."""
    return macs / limits.best(run, SECONDS) / 1e9


decoded = quants.dequantize("Q4_0", raw)
RESULTS["NumPy, decoding each time"] = gmacs(lambda: quants.dequantize("Q4_0", raw) @ x)
RESULTS["NumPy, floats kept"] = gmacs(lambda: decoded @ x)
for name, value in RESULTS.items():
    print(f"{name:28} {value:8.3f} GMAC/s")

# %% [markdown]
# Far faster, if the floats are kept. But they take seven times the memory; a model of 4 GB would need 28.
# And from memory it would be seven times slower, because 32 bits must be read where 4.5 would do. We want to read
# *packed* weights, and unpack them in registers.
#
# ## Part 3. numba
#
# numba compiles a Python function to machine code. The loops of part 1, nearly as they are:

# %%
import numba


@numba.njit
def by_numba(blocks, scales, x, y):
    """blocks uint8 [rows, n, 18], scales float32 [rows, n]."""
    for row in range(blocks.shape[0]):
        total = numba.float32(0)
        for b in range(blocks.shape[1]):
            some = numba.float32(0)
            for i in range(16):
                byte = blocks[row, b, 2 + i]
                low, high = numba.float32((byte & 15) - 8), numba.float32((byte >> 4) - 8)
                some += low * x[32 * b + i] + high * x[32 * b + 16 + i]
            total += scales[row, b] * some
        y[row] = total


y = np.zeros(N_OUT, np.float32)
blocks = raw.reshape(N_OUT, -1, 18)
by_numba(blocks, scales, x, y)
assert np.allclose(y, exact, atol=1e-3)
RESULTS["numba, loops"] = gmacs(lambda: by_numba(blocks, scales, x, y))
print(f"{RESULTS['numba, loops']:.2f} GMAC/s")

# %% [markdown]
# Far better than Python, and still a small part of the roof. Why? The assembly tells. `xmm` are registers of 4 floats,
# `ymm` of 8, `zmm` of 16; an instruction that ends in `ss` works on a **s**ingle float, one in `ps` on all of a register.

# %%
text = next(iter(by_numba.inspect_asm().values()))
words = collections.Counter(
    re.findall(r"^\s+(v?(?:mul|add|fmadd\w*|fma\w*)[sp][sd])\b", text, re.M)
)
print(words)

# %% [markdown]
# Additions of single floats, one after the other: each must wait for the one before, since (a + b) + c is not a + (b + c)
# in floats and a compiler may not change the order of a sum. A core that could do 32 floats at a time does one, and waits.
#
# ## Part 4. Sixteen rows side by side
#
# The trick is not to add *along* a row at all. Take 16 rows, and give each a **lane** of one wide register: lane r adds up
# row r. No sum crosses lanes, nothing is reordered, 16 sums go on at once.
#
# For that the bytes must lie differently. A **tile** is 16 rows, rearranged so that what is loaded together lies together:

# %%
plots.spans(
    {
        "in the file: row 0": [("d", 2), ("c0", 4), ("c1", 4), ("c2", 4), ("c3", 4)],
        "row 1": [("d", 2), ("c0", 4), ("c1", 4), ("c2", 4), ("c3", 4)],
        "a tile's block": [
            ("d of 16 rows", 32),
            ("c0 of 16 rows", 64),
            ("c1 of 16 rows", 64),
            ("c2 of 16 rows", 64),
            ("c3 of 16 rows", 64),
        ],
    },
    title="Q4_0: a scale d and 4 fields of 4 bytes",
)

# %% [markdown]
# One load of 64 bytes now brings field c0 of all 16 rows: 4 bytes, 8 codes, for each lane. The file's bytes are all there,
# only their order has changed; a model does it once, at load.
#
# ### Exercise 2: tiles
#
# Rearrange 16 rows: for each block first the 16 scales (2 bytes each), then field 0 (4 bytes) of row 0, 1, ..., 15, then
# field 1 of all rows, and so on. `reshape` and `transpose` do it without a loop.


# %% tags=["exercise"]
def tile_of(rows):
    """uint8 [16, n_blocks, 18] -> uint8 [n_blocks, 288]."""
    raise NotImplementedError


# %% tags=["check"]
with check("tiles"):
    some = np.arange(16 * 2 * 18).reshape(16, 2, 18).astype(np.uint16)
    tile = tile_of(some)
    assert tile.shape == (2, 288), f"the shape is {tile.shape}"
    assert tile[0, :4].tolist() == [0, 1, 36, 37], (
        "the scale of row 0, then of row 1, whose bytes begin 36 further"
    )
    assert tile[0, 32:36].tolist() == [2, 3, 4, 5], (
        "behind 32 bytes of scales stands field 0 of row 0"
    )
    assert tile[0, 36:40].tolist() == [38, 39, 40, 41], "then field 0 of row 1"
    assert tile[1, 0] == 18, "block 1 follows block 0"


# %%
def tiles_of(raw):
    """All rows, tile after tile, in memory that begins on a cache line."""
    n = len(raw)
    b = raw.reshape(n // 16, 16, -1, 18)
    d = b[..., :2].transpose(0, 2, 1, 3).reshape(n // 16, -1, 32)
    c = b[..., 2:].reshape(*b.shape[:3], 4, 4).transpose(0, 2, 3, 1, 4).reshape(n // 16, -1, 256)
    out = aligned(raw.nbytes)
    out[:] = np.concatenate([d, c], -1).reshape(-1)
    return out


tiles = tiles_of(raw)

# %% [markdown]
# ## Part 5. Words
#
# Vector instructions can be written in Python, too. `tinyllm` translates a small part of the language to LLVM, the compiler
# under numba and under C: numbers, loops, and **words** for vectors of 16 floats, such as `load`, `fma`, `splat`. A
# function of `(..., first, last, worker)` that does the pieces from `first` to `last` is a **kernel**; here a piece is a tile.
#
# `fma(a, b, c)` is a * b + c in one instruction. `halves` and `code` below are words of our own: they are
# **emitters**, Python functions that run while the kernel is *compiled*, and write instructions.

# %%
from tinyllm.kernels.cpu.emit import F32, I16, I32, V, lanes
from tinyllm.kernels.cpu.simd import emitter, f32x16, fma, get_f32, i64, splat, store, types


@emitter(f32x16, i64)
def halves(e, p):
    """16 half-precision numbers at an address, as floats."""
    return e.half(e.load(e.ptr(p), V(I16, 16)))


@emitter(f32x16, i64, i64)
def code(e, p, shift):
    """Of 16 words of 4 bytes at p, the four bits from `shift` on, minus 8, as floats."""
    word = e.load(e.ptr(p), V(I32, 16))
    bits = e.mask(e.b.lshr(word, e.splat(e.b.trunc(shift, I32), 16)), 15)
    return e.to_float(e.b.sub(bits, e.const(8, bits.type)))


def floats_kernel(w, x, y, n_blocks, first, last, worker):
    """A piece is a tile: 16 rows. A block of a tile has 16 scales, then 4 fields of 16 words."""
    for tile in range(first, last):
        total = splat(0.0)
        for b in range(n_blocks):
            p = w + 288 * (n_blocks * tile + b)
            some = splat(0.0)
            for j in range(4):
                for i in range(4):
                    some = fma(
                        code(p + 32 + 64 * j, 8 * i),
                        splat(get_f32(x + 4 * (32 * b + 4 * j + i))),
                        some,
                    )
                    some = fma(
                        code(p + 32 + 64 * j, 8 * i + 4),
                        splat(get_f32(x + 4 * (32 * b + 16 + 4 * j + i))),
                        some,
                    )
            total = fma(some, halves(p), total)
        store(y + 64 * tile, total)


kernel = jit.kernel(floats_kernel)
y[:] = 0
arguments = {"w": tiles.ctypes.data, "x": x.ctypes.data, "y": y.ctypes.data, "n_blocks": N_IN // 32}
kernel(0, N_OUT // 16, **arguments)
assert np.allclose(y, exact, atol=1e-3)
RESULTS["lanes of floats"] = gmacs(lambda: kernel(0, N_OUT // 16, **arguments))
print(f"{RESULTS['lanes of floats']:.1f} GMAC/s")

# %% [markdown]
# A column of `x` is put into all 16 lanes (`splat`), and meets one code of each row. Let us see what the processor is
# told: the instructions of the inner loop, counted.


# %%
def instructions_of(name):
    """How often each vector instruction stands in a kernel's assembly, the most frequent first."""
    found = re.findall(r"^\s+(v\w+|[sf]\w+)\s.*(?:[xyz]mm|\bv\d)", jit.assembly(name), re.M)
    return collections.Counter(found).most_common(9)


counted = instructions_of("floats_kernel")
plots.bars(
    [n for n, _ in counted],
    {"times": [c for _, c in counted]},
    title="Vector instructions of floats_kernel",
)

# %% [markdown]
# On a machine with AVX-512 you find `vfmadd...ps` on `zmm` registers: 16 products and sums in one. But look at what else
# there is: for each of them a shift, a mask, a subtraction, a conversion. Five instructions for 16 products; only one
# of them does the work.
#
# ### Exercise 3: a kernel
#
# Write a kernel with words: `y = a * x + y` for rows of n floats (n is a multiple of 16). A piece is a row. Parameters are
# numbers: addresses and counts are int64 unless they are annotated `f32`. You have `load(address)`, `store(address,
# vector)`, `fma`, `splat`.

# %%
from tinyllm.kernels.cpu.simd import f32, load


# %% tags=["exercise"]
def axpy(x, y, n, a: f32, first, last, worker):
    """y[row] += a * x[row] for rows of n floats, from row `first` to `last`."""
    store(y, load(y))  # your loops here


# %% tags=["check"]
with check("a kernel"):
    run = jit.kernel(axpy, f"axpy_{time.perf_counter_ns()}")
    a, b = rng.normal(size=(2, 3, 64)).astype(np.float32)
    want = b + np.float32(0.5) * a
    run(1, 3, x=a.ctypes.data, y=b.ctypes.data, n=64, a=0.5)
    assert np.allclose(b[1:], want[1:], atol=1e-6), "rows 1 and 2 should be b + 0.5 a"
    assert not np.allclose(b[0], want[0]), "row 0 was not asked for: begin at `first`"

# %% [markdown]
# ## Part 6. Whole numbers
#
# Weights are whole numbers times a scale. If the *activations* were too, a product would be one of whole numbers, and
# these can be packed four times as dense as floats. So round each 32 activations to 8 bits, with a scale of
# their own. Then, for one block,
#
# ```
# sum of d (q - 8) * s c   =   d s (sum of q c  -  8 sum of c)
# ```
#
# where q are the 4-bit codes of the weights and c the 8-bit codes of the activations. The sums are exact, in integers.
#
# **Predict.** Rounding activations to 8 bits makes an error. Weights have been rounded to 4 bits. Which one is larger,
# and by what factor, about?
#
# ### Exercise 4: round the activations
#
# For each 32 values: the scale is the largest size divided by 127; the codes are the values divided by it, rounded. Return
# codes, scales and the sums of the codes. (A block of zeros gets the scale 0 and zeros.)


# %% tags=["exercise"]
def rounded(x):
    """float32 [n] -> codes int8 [n], scales float32 [n / 32], sums of codes int32 [n / 32]."""
    raise NotImplementedError


# %% tags=["check"]
with check("activations in 8 bits"):
    c, s, n = rounded(x)
    assert (c.dtype, s.dtype, n.dtype) == (np.int8, np.float32, np.int32), (
        f"types {c.dtype}, {s.dtype}, {n.dtype}"
    )
    assert np.abs(c).max() == 127, "the largest of a block gets 127"
    assert np.allclose(
        c.reshape(-1, 32) * s[:, None], x.reshape(-1, 32), atol=np.abs(s).max() / 2 + 1e-6
    )
    assert np.array_equal(n, c.reshape(-1, 32).sum(1, dtype=np.int32)), "the sums"
    assert rounded(np.zeros(32, np.float32))[0].tolist() == [0] * 32, "zeros: don't divide by 0"

# %%
size = np.abs(x.reshape(-1, 32)).max(1) / np.float32(127)
codes = np.rint(x.reshape(-1, 32) / size[:, None]).astype(np.int8).reshape(-1)
xs_scale, xs_sum = size.astype(np.float32), codes.reshape(-1, 32).sum(1, dtype=np.int32)
back = (codes.reshape(-1, 32) * size[:, None]).reshape(-1)
print(
    f"activations: relative error {np.linalg.norm(back - x) / np.linalg.norm(x):.4f}; weights in Q4_0: about 0.08"
)

# %% [markdown]
# A fourteenth of what the weights lost. That is why every engine does it.
#
# ## Part 7. The instruction that was made for it
#
# Processors of the last years have one instruction for this: it takes 64 unsigned bytes and 64 signed bytes, multiplies
# them pairwise, adds each four neighbours, and adds that to 16 sums. On AVX-512 it is called `vpdpbusd` (VNNI), on ARM
# `sdot`. Where it is missing (AVX2) two instructions do it together. `e.dot` writes whichever your machine has.
#
# ```
# lane:          0                1                ...   15
# codes:     [q0 q1 q2 q3]    [q0 q1 q2 q3]               4 columns of row 0, of row 1, ... of row 15
# times      [c0 c1 c2 c3]    [c0 c1 c2 c3]               the same 4 activations in all lanes
# sum       += q0c0+...+q3c3  += ...                      64 products
# ```
#
# Here is the whole micro-kernel. The `for` over j runs in Python while the code is *written*, so that eight dot products
# stand one after the other; `e.loop` writes a loop for the machine.


# %%
@emitter(types.void, i64, i64, i64, i64, i64, i64)
def tile_times_x(e, w, x, scales, sums, n_blocks, y):
    """16 rows of Q4_0 times one vector of codes."""
    n = lanes()  # rows in one register: 16 with AVX-512, 8 with AVX2, 4 on ARM
    for first in range(0, 16, n):

        def block(i, state, first=first):
            at = e.ptr(e.b.add(w, e.b.mul(i, i64(288))))
            c = e.ptr(e.b.add(x, e.b.mul(i, i64(32))))
            total = e.const(0, V(I32, n))
            for j in range(4):
                word = e.load(at, V(I32, n), 32 + 64 * j + 4 * first)
                low, high = e.mask(word, 0x0F0F0F0F), e.mask(e.shr(word, 4), 0x0F0F0F0F)
                total = e.dot(total, low, e.broadcast(c, I32, n, 4 * j))
                total = e.dot(total, high, e.broadcast(c, I32, n, 16 + 4 * j))
            four_i = e.b.mul(i, i64(4))
            eight = e.shl(e.broadcast(e.ptr(e.b.add(sums, four_i)), I32, n), 3)
            value = e.to_float(e.b.sub(total, eight))
            scale = e.broadcast(e.ptr(e.b.add(scales, four_i)), F32, n)
            d = e.half(e.load(at, V(I16, n), 2 * first))
            return [e.fma(e.b.fmul(value, scale), d, state[0])]

        (out,) = e.loop(n_blocks, [e.const(0.0, V(F32, n))], block)
        e.store(out, e.ptr(y), 4 * first)


def bytes_kernel(w, x, scales, sums, y, n_blocks, first, last, worker):
    """A piece is a tile of 16 rows."""
    for tile in range(first, last):
        tile_times_x(w + 288 * n_blocks * tile, x, scales, sums, n_blocks, y + 64 * tile)


kernel = jit.kernel(bytes_kernel)
vector = {"x": codes.ctypes.data, "scales": xs_scale.ctypes.data, "sums": xs_sum.ctypes.data}
arguments = {"w": tiles.ctypes.data, "y": y.ctypes.data, "n_blocks": N_IN // 32, **vector}
y[:] = 0
kernel(0, N_OUT // 16, **arguments)
error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
print(f"relative error {error:.4f}: the rounding of activations")
assert error < 0.01
RESULTS["lanes of bytes"] = gmacs(lambda: kernel(0, N_OUT // 16, **arguments))
print(f"{RESULTS['lanes of bytes']:.1f} GMAC/s")

# %%
text = jit.assembly("bytes_kernel")
loop = [
    line for line in text.splitlines() if re.search(r"vpdpbusd|vpmaddubsw|sdot|smull|pmull", line)
]
print(len(loop), "lines with the product; the first ones:")
print("\n".join(loop[:8]))

# %% [markdown]
# Eight such lines for a block of 16 x 32 weights, where AVX-512 has the instruction: 512 multiply-adds in eight
# instructions. Around them there are few others: four loads, four shifts, eight masks. AVX2's words are half as long and
# its products need a second instruction for their sums: it has sixteen lines.

# %%
plots.bars(
    list(RESULTS),
    {"GMAC/s": list(RESULTS.values())},
    xlabel="GMAC/s, matrix in the cache",
    title="The ladder",
    log=True,
)

# %% [markdown]
# **What the package does beyond this.** For one token: it asks for the next lines of memory ahead of time. For many
# tokens: it unpacks some columns once and runs all tokens past them. Let us see how far ours is from its kernel,
# now with a matrix that does *not* fit into any cache.
#
# **Predict.** From memory: which share of the reading limit does our little kernel reach?

# %%
BIG = 4096 if SECONDS < 0.1 else 65536  # rows of 2048 columns: 75 MB
kept = np.frombuffer(rng.bytes(16 * 64 * 18), np.uint8).reshape(16, 64, 18).copy()
kept[..., :2] = np.array([0.01], "<f2").view(np.uint8)
big = tiles_of(np.tile(kept, (BIG // 16, 1, 1)).reshape(BIG, -1))
long = {"x": np.tile(codes, 2), "scales": np.tile(xs_scale, 2), "sums": np.tile(xs_sum, 2)}
out = np.empty(BIG, np.float32)
tapes = {}
for n_threads in (1, 2):
    tape = Tape()
    tape.add(
        kernel,
        BIG // 16,
        w=big.ctypes.data,
        y=out.ctypes.data,
        n_blocks=64,
        **{k: v.ctypes.data for k, v in long.items()},
    )
    seconds = limits.best(lambda tape=tape, n=n_threads: tape.run(n), SECONDS)
    reads = limits.read_bandwidth(n_threads, SECONDS) / 1e9
    print(
        f"{n_threads} threads: {big.nbytes / seconds / 1e9:.1f} GB/s of {reads:.1f} that reading alone reaches: {big.nbytes / seconds / 1e9 / reads:.0%}"
    )
    tapes[n_threads] = BIG * 2048 / seconds / 1e9

# %% [markdown]
# An operation is put on a `Tape`, and the threads of a pool claim pieces of it: tile by tile, whoever is free. That is all
# that is to be done for several cores. (A share above 100 % means that others used the
# machine while reading was measured.) Here are all rungs under the roof.

# %%
packed, unpacked = 8 / 4.5, 8 / 32
where = [
    ("numba, loops", packed),
    ("NumPy, floats kept", unpacked),
    ("lanes of floats", packed),
    ("lanes of bytes", packed),
]
points = [(name, name, at, RESULTS[name]) for name, at in where] + [
    ("bytes, from memory", "from memory", packed, tapes[1])
]
plots.roofline(None, "One core of this machine, one token", LIMITS, points)

# %% [markdown]
# Points in the cache may lie above the slope, which is that of memory. The one from memory may not.
#
# ### Exercise 5: two tokens at once
#
# A second token could use each loaded weight again, at hardly any cost: that is why prompts are read faster than
# answers are written. Complete the emitter: the vectors stand one behind the other (codes: `32 * n_blocks` bytes apart,
# scales and sums: `4 * n_blocks`); outputs are `y_step` bytes apart. Unpack each word **once**.


# %%
def two_kernel(w, x, scales, sums, y, n_blocks, y_step, first, last, worker):
    """A piece is a tile of 16 rows; it calls what you write in the next cell."""
    for tile in range(first, last):
        tile_times_two(w + 288 * n_blocks * tile, x, scales, sums, n_blocks, y + 64 * tile, y_step)


# %% tags=["exercise"]
@emitter(types.void, i64, i64, i64, i64, i64, i64, i64)
def tile_times_two(e, w, x, scales, sums, n_blocks, y, y_step):
    """16 rows of Q4_0 times two vectors."""
    # as tile_times_x, with two totals and a state of two sums: [first token, second token]


# %% tags=["check"]
with check("two tokens at once"):
    run = jit.kernel(two_kernel, f"two_{time.perf_counter_ns()}", tile_times_two=tile_times_two)
    both = {
        "x": np.concatenate([codes, codes[::-1]]),
        "scales": np.concatenate([xs_scale, xs_scale[::-1]]),
        "sums": np.concatenate([xs_sum, xs_sum[::-1]]),
    }
    got = np.zeros((2, N_OUT), np.float32)
    run(
        0,
        N_OUT // 16,
        w=tiles.ctypes.data,
        y=got.ctypes.data,
        n_blocks=N_IN // 32,
        y_step=4 * N_OUT,
        **{k: v.ctypes.data for k, v in both.items()},
    )
    kernel(0, N_OUT // 16, **arguments)
    assert np.array_equal(got[0], y), "the first token should have the bits of the kernel for one"
    backwards = decoded.astype(np.float64) @ (
        both["x"][N_IN:].reshape(-1, 32) * both["scales"][N_IN // 32 :, None]
    ).reshape(-1)
    assert np.linalg.norm(got[1] - backwards) < 1e-4 * np.linalg.norm(backwards), (
        "the second token is wrong"
    )
    fast = gmacs(
        lambda: run(
            0,
            N_OUT // 16,
            w=tiles.ctypes.data,
            y=got.ctypes.data,
            n_blocks=N_IN // 32,
            y_step=4 * N_OUT,
            **{k: v.ctypes.data for k, v in both.items()},
        ),
        2 * N_OUT * N_IN,
    )
    print(f"{fast:.1f} GMAC/s for two tokens, {RESULTS['lanes of bytes']:.1f} for one")

# %% [markdown]
# ## Where to go on
#
# Put your kernel into a file, with `@tinyllm.kernel("matvec", "Q4_0")` above it, and let `tinyllm lab mine.py` check it in
# several shapes and rank it beside the package's; `tinyllm.load(..., kernels=["mine.py"])` runs a whole model with it. The
# page `docs/lab.md` has the rules, and `docs/cpu.md` shows how the package's own kernels are made: for all formats by one
# micro-kernel, of which each format says only how to take it apart.
#
# ## To think about
#
# 1. `vpdpbusd` wants one side unsigned. Codes of Q4_0 are 0 to 15, fine. How would you multiply Q8_0, whose codes are
#    signed? (An offset of 128, and the sum of the activations' codes, which we have.)
# 2. Why does the first token of exercise 5 have *exactly* the bits of the kernel for one, although other instructions ran?
# 3. A neighbour takes one of your two cores for a while. Which way of dealing out tiles suffers least, and why?
