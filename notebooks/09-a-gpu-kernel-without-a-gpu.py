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
# # 9. A GPU kernel without a GPU
#
# You want to know how programs for graphics processors work, and you have none. That is no obstacle: what a kernel *means* can
# be seen on any machine. Here you simulate its threads in NumPy, run real OpenCL kernels on your CPU, compile a real CUDA kernel
# to NVIDIA's own code, and let an interpreter carry that out, instruction by instruction. What only hardware can show, the speed,
# we reckon in the end.
#
# **Time: 50 minutes.** Parts 1 and 2 need NumPy alone. Part 3 needs an OpenCL driver (`pip install pyopencl intel-opencl-rt`, or a
# GPU's), part 4 a checkout of the repository and `pip install cupy-cuda13x nvidia-cuda-nvrtc pytest`. Each says so and goes on
# where something is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np

import tinyllm
from tinyllm import plots
from tinyllm.course import check
from tinyllm.gguf import quants
from tinyllm.kernels.gpu import sources

rng = np.random.default_rng(0)

# %% [markdown]
# ## Thousands of threads that all run one function
#
# A GPU kernel is a function for **one** number of the result. It is started once for every number, at the same time. Started
# copies are *threads*; they know their number. Threads form *groups* (CUDA says *blocks*), which share a small fast memory;
# and within a group 32 threads, a *warp*, take every step together.

# %%
groups, threads = 4, 64
numbers = np.arange(groups * threads).reshape(groups, threads)
plots.heat(
    numbers % 32,
    rows=[f"group {g}" for g in range(groups)],
    title="64 threads in each of 4 groups; colours count the lanes of a warp",
    numbers=False,
)

# %% [markdown]
# Here is the first kernel of every course, as a thread sees it:
#
# ```c
# KERNEL void add(GLOBAL const float* x, GLOBAL const float* y, GLOBAL float* z, const int n) {
#     const int i = GLOBAL_ID(0);
#     if (i < n) z[i] = x[i] + y[i];
# }
# ```
#
# `GLOBAL_ID(0)` is the thread's number among all. The `if` is needed because threads come in whole groups. **Predict:** for n = 1000
# and groups of 256, how many groups start, and how many threads do nothing?

# %%
n, size = 1000, 256
n_groups = -(-n // size)
print(n_groups, "groups,", n_groups * size - n, "idle threads")

# %% [markdown]
# ## Part 1. A GPU in twenty lines
#
# Let us simulate one group. All threads take a step together: a Python function, in which every variable is an array with a value
# for each thread. Memory of the group (`LOCAL`) is an array that all see. Between writing to it and reading what *others* wrote there
# must be a **barrier**: on a real device warps run at different speeds.


# %%
class Group:
    """A group of threads with local memory that notices a missing barrier."""

    def __init__(self, threads, size):
        self.id = np.arange(threads)
        self.memory = np.zeros(size, np.float32)
        self.writer = np.full(size, -1)

    def write(self, where, values, who=None):
        who = self.id if who is None else who
        self.memory[where], self.writer[where] = values, who

    def read(self, where, who=None):
        who = self.id if who is None else who
        others = (self.writer[where] != -1) & (self.writer[where] != who)
        if others.any():
            raise RuntimeError(
                f"thread {who[others][0]} reads what thread {self.writer[where][others][0]} wrote: a barrier is missing"
            )
        return self.memory[where]

    def barrier(self):
        self.writer[:] = -1


def mirror(group, x, barrier):
    """Each thread writes one value, and reads the one of its mirror image."""
    group.write(group.id, x)
    if barrier:
        group.barrier()
    return group.read(len(x) - 1 - group.id)


x = np.arange(8, dtype=np.float32)
print(mirror(Group(8, 8), x, barrier=True))
try:
    mirror(Group(8, 8), x, barrier=False)
except RuntimeError as error:
    print(error)

# %% [markdown]
# Without the barrier the program may well be right on one device, on most days. That is what makes this mistake expensive.
#
# **A sum** is what a product of a row ends in: each thread has a part, and one number is wanted. A *tree* needs log₂(n) steps:

# %%
tree, rows = x.copy(), [x.copy()]
for step in (4, 2, 1):
    tree[:step] += tree[step : 2 * step]
    rows.append(np.where(np.arange(8) < step, tree, np.nan))
plots.heat(
    np.array(rows),
    rows=["8 parts", "step 4", "step 2", "step 1"],
    columns=[f"t{i}" for i in range(8)],
    numbers=True,
)

# %% [markdown]
# ### Exercise 1: a tree
#
# Write the sum with `Group`: write the parts, then in each step the first half of the threads adds the value `step` places further.
# Only threads below `step` take part: give `who=` them. Set barriers where they are needed, and *only* there (the check counts them: at
# most 1 + log₂ n).


# %% tags=["exercise"]
def tree_sum(group, x):
    """The sum of x [threads], a power of two of them, as thread 0 reads it in the end."""
    raise NotImplementedError


# %% tags=["check"]
with check("a tree"):
    for n in (8, 32, 64):
        g = Group(n, n)
        counted, plain = [], g.barrier
        g.barrier = lambda plain=plain, counted=counted: (counted.append(1), plain())
        values = rng.integers(0, 9, n).astype(np.float32)
        assert tree_sum(g, values) == values.sum(), f"expected {values.sum()}"
        assert len(counted) <= 1 + np.log2(n), f"{len(counted)} barriers for {n} threads"

# %% [markdown]
# ## Part 2. Memory wants neighbours
#
# A warp's 32 threads load together. Memory is fetched in lines of 128 bytes: if the 32 addresses lie in one line, one is fetched; if they lie
# 32 lines apart, 32, of which nearly all is thrown away. This is called *coalescing*, and nothing matters more.


# %%
def lines_fetched(addresses):
    """How many lines of 128 bytes one load of a warp touches."""
    return len(np.unique(np.asarray(addresses) // 128))


lane = np.arange(32)
patterns = {
    "thread t loads float t": 4 * lane,
    "every second float": 8 * lane,
    "a row of 4 KB each": 4096 * lane,
    "all the same float": 0 * lane,
    "float t, shifted by 16": 4 * lane + 64,
}
plots.bars(
    list(patterns),
    {"lines": [lines_fetched(a) for a in patterns.values()]},
    xlabel="lines of 128 bytes for one load of a warp",
)

# %% [markdown]
# Now a weight matrix in Q8_0. In the file a block has 34 bytes: a scale and 32 codes. Let lane t of a warp work on block t of a row, and load its
# first 4 codes. **Predict:** how many lines does that touch, if the blocks lie as in the file? And if all *codes* lie together, 32 bytes a block,
# and all scales elsewhere?

# %%
print("as in the file:", lines_fetched(34 * lane + 2), "lines for", 32 * 4, "bytes that are wanted")
print("codes together:", lines_fetched(32 * lane), "lines")
print("lane t takes codes 4t to 4t+3 of one plane:", lines_fetched(4 * lane), "line")

# %% [markdown]
# And 34 t + 2 is not a multiple of 4, so a load of four bytes is not even allowed. So the package takes the blocks apart when it loads a
# model: each field into a *plane* of its own, and lanes walk along a plane side by side.

# %%
from tinyllm.kernels.gpu.weights import LAYOUTS

for kind in ("Q8_0", "Q4_K", "Q6_K"):
    print(kind, [str(p) for p in LAYOUTS[kind].planes])

# %% [markdown]
# ### Exercise 2: planes
#
# Take the blocks of a Q8_0 matrix apart: first all codes (32 bytes a block, in order), then all scales (2 bytes a block).


# %% tags=["exercise"]
def planes_of(raw):
    """uint8 [rows, n_blocks * 34] -> uint8 [rows * n_blocks * 34], codes first, then scales."""
    raise NotImplementedError


# %% tags=["check"]
with check("planes"):
    w = rng.normal(0, 0.1, (6, 128)).astype(np.float32)
    raw = quants.quantize("Q8_0", w)
    got = planes_of(raw)
    blocks = raw.reshape(-1, 34)
    assert got.shape == (raw.size,), f"the shape is {got.shape}"
    assert np.array_equal(got[:32], blocks[0, 2:]), "the codes of block 0 come first"
    assert np.array_equal(got[32 * len(blocks) :][:2], blocks[0, :2]), (
        "behind all codes the scale of block 0"
    )
    assert np.array_equal(got[32 * len(blocks) :][-2:], blocks[-1, :2]), (
        "at the end the scale of the last block"
    )

# %%
MATRIX = quants.quantize("Q8_0", rng.normal(0, 0.1, (40, 512)).astype(np.float32))
BLOCKS = MATRIX.reshape(-1, 34)
PLANES = np.concatenate([BLOCKS[:, 2:].reshape(-1), BLOCKS[:, :2].reshape(-1)])
VECTOR = rng.normal(0, 1, 512).astype(np.float32)
EXACT = quants.dequantize("Q8_0", MATRIX).astype(np.float64) @ VECTOR

# %% [markdown]
# ## Part 3. A real kernel, on your CPU
#
# The product of a Q8_0 matrix with a vector: a group of 32 threads for each row, thread t takes blocks t, t + 32, ... of the row, and a tree (here
# the simplest one: thread 0 adds all) makes the sum. It is written with the few words of `tinyllm`'s *prelude*, so that OpenCL and CUDA both
# take it.

# %%
KERNEL = """
KERNEL void group_a_row(GLOBAL const uchar* w, GLOBAL const float* x, GLOBAL float* y, GLOBAL const int* sizes) {
    LOCAL float parts[32];
    const int row = GROUP_ID(0), lane = LOCAL_ID(0), n_blocks = sizes[0], n_rows = sizes[1];
    GLOBAL const ushort* scales = (GLOBAL const ushort*)(w + 32 * n_rows * n_blocks);
    float sum = 0.0f;
    for (int b = lane; b < n_blocks; b += 32) {
        const int block = row * n_blocks + b;
        GLOBAL const schar* codes = (GLOBAL const schar*)w + 32 * block;
        float some = 0.0f;
        for (int i = 0; i < 32; ++i) some += (float)codes[i] * x[32 * b + i];
        sum += some * half_at(scales + block);
    }
    parts[lane] = sum;
    BARRIER();
    if (lane == 0) {
        sum = 0.0f;
        for (int i = 0; i < 32; ++i) sum += parts[i];
        y[row] = sum;
    }
}
"""
for name in ("prelude_opencl.h", "prelude_cuda.h"):
    words = re.findall(
        r"^#define (?:KERNEL\b|GLOBAL\b|LOCAL|BARRIER\(\)|LOCAL_ID\(d\)|GROUP_ID\(d\)) ?.*",
        sources.read(name),
        re.M,
    )
    print(name, *dict.fromkeys(words), sep="\n    ")

# %% [markdown]
# That is the whole difference between the two languages, as far as we need it: names.


# %%
def opencl():
    """A context of the first OpenCL device and its command queue, or None, with a word why."""
    if importlib.util.find_spec("pyopencl") is None:
        print("no pyopencl: pip install pyopencl intel-opencl-rt, and run this again")
        return None
    import warnings

    import pyopencl as cl

    warnings.simplefilter("ignore", cl.CompilerWarning)  # Intel's compiler says that it worked
    try:
        device = cl.get_platforms()[0].get_devices()[0]
    except (cl.Error, IndexError):
        print("pyopencl finds no driver: pip install intel-opencl-rt, or install your GPU's")
        return None
    print(device.name.strip(), "-", device.platform.name)
    context = cl.Context([device])
    return context, cl.CommandQueue(context)


def run_opencl(text, name, n_groups, threads, *arrays):
    """Compile a kernel, run it, and copy the arrays back."""
    import pyopencl as cl

    context, queue = OPENCL
    program = cl.Program(context, sources.read("prelude_opencl.h") + text).build("-DCPU_DEVICE")
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    buffers = [cl.Buffer(context, flags, hostbuf=a) for a in arrays]
    getattr(program, name)(queue, (n_groups * threads,), (threads,), *buffers)
    for a, b in zip(arrays, buffers, strict=True):
        cl.enqueue_copy(queue, a, b)
    queue.finish()


OPENCL = opencl()

# %% [markdown]
# **Predict.** The result is compared with exact products. Floats have 24 bits; a row has 512 products. How large will the relative error be:
# 1e-2, 1e-4, or 1e-7?

# %%
y = np.zeros(40, np.float32)
sizes = np.array([16, 40], np.int32)
if OPENCL:
    run_opencl(KERNEL, "group_a_row", 40, 32, PLANES, VECTOR, y, sizes)
    error = np.linalg.norm(y - EXACT) / np.linalg.norm(EXACT)
    print(f"relative error {error:.1e}")
    assert error < 1e-5

# %% [markdown]
# With a row of 512 only 16 of the 32 threads have a block. On a device that is half of the machine asleep. A better kernel lets several threads
# share a block. And `x` is read again for each row: a better one keeps it near, in `LOCAL` memory.
#
# ### Exercise 3: all threads at work
#
# Change the loop so that thread t works on the codes 4 (t % 8) to 4 (t % 8) + 3 of blocks t / 8, t / 8 + 4, ...: eight threads share a block, and
# four blocks are under way. Return the kernel's text; keep its name and parameters. (Without an OpenCL driver the check only looks whether the
# text has changed, and says so.)


# %% tags=["exercise"]
def shared_blocks():
    """The text of the kernel."""
    raise NotImplementedError


# %% tags=["check"]
with check("all threads at work"):
    text = shared_blocks()
    assert "group_a_row" in text, "keep the name"
    assert text != KERNEL, "nothing has changed yet"
    if OPENCL:
        y[:] = np.nan
        run_opencl(text, "group_a_row", 40, 32, PLANES, VECTOR, y, sizes)
        worst = np.abs(y - EXACT).max()
        assert worst < 1e-3, f"the result is off by {worst:.2g}"
    else:
        print("(not run: no OpenCL driver)")

# %% [markdown]
# A whole model on this device, if there is one: the same kernels that run on a GPU, with its weights as the file packs them.

# %%
if OPENCL:
    with tinyllm.load(device="opencl") as gpu, tinyllm.load() as cpu:
        ids = cpu.tokenizer.encode("Once upon a time")
        a, b = gpu.logits(ids), cpu.logits(ids)
        print(
            gpu.device,
            "against",
            cpu.device,
            f": logits differ by {np.abs(a - b).max() / b.std():.1e} of their spread",
        )
        print(gpu.generate(ids, max_tokens=12, temperature=0).text)

# %% [markdown]
# ## Part 4. NVIDIA's own code
#
# NVIDIA's compiler, NVRTC, runs without a GPU. It turns CUDA C into **PTX**, the assembly of an imagined processor with endless registers, which
# the driver later turns into the device's own. Let us look at it.

# %%
TESTS = next(
    (
        p / "tests" / "kernels"
        for p in (Path.cwd(), Path.cwd().parent)
        if (p / "tests" / "kernels" / "emulator").is_dir()
    ),
    None,
)
HAVE = TESTS is not None and all(
    importlib.util.find_spec(m) for m in ("cupy_backends", "pyopencl", "pytest")
)
if HAVE:
    sys.path.insert(0, str(TESTS))
    from emulator import ptx, ptx_text
    from emulator.interpreted_cuda import compiled, interpret

    code = sources.read("prelude_cuda.h") + KERNEL
    text = compiled(code)
    body = text[text.index("group_a_row") :]
    print(body[:900], "\n...")
else:
    print(
        "needs a checkout of the repository, cupy (for NVRTC), pyopencl and pytest; the notebook goes on without"
    )

# %% [markdown]
# Each line is one instruction. Some to look for:
#
# | PTX | means |
# |---|---|
# | `ld.global`, `ld.shared` | load from memory, from the group's memory |
# | `cvt.rn.f32.s8` | a byte becomes a float |
# | `fma.rn.f32` | x * y + z |
# | `bar.sync` | a barrier |
# | `@%p1 bra` | jump if predicate 1 holds |

# %%
if HAVE:
    found = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*)\s", body, re.M)
    kinds = [
        "ld.global",
        "ld.shared",
        "st.shared",
        "cvt",
        "fma",
        "mul",
        "add",
        "bar",
        "bra",
        "mov",
        "setp",
    ]
    counts = {k: sum(i.startswith(k) for i in found) for k in kinds}
    display(
        plots.bars(
            list(counts), {"instructions": list(counts.values())}, title="group_a_row in PTX"
        )
    )

# %% [markdown]
# **Predict.** For each code that is multiplied there is one `fma`. What else must be done for each code, and is that more or less than the product?
#
# Now the interpreter. It carries out these instructions for all threads of a group, as NumPy arrays with a value for each thread, much like our
# `Group`. It checks every address and every barrier.

# %%
if HAVE:

    def run_ptx(text, name, n_groups, threads, *arrays):
        """Carry out a kernel's PTX for several groups."""
        kernel = ptx_text.parse(compiled(sources.read("prelude_cuda.h") + text))[name]
        memory = ptx.Memory()
        for i, a in enumerate(arrays):
            memory.allocations[i + 1] = a.reshape(-1).view(np.uint8)
        addresses = [np.uint64((i + 1) * ptx.PAGE) for i in range(len(arrays))]
        ptx.launch(kernel, memory, (n_groups, 1, 1), (threads, 1, 1), addresses)

    y[:] = np.nan
    run_ptx(KERNEL, "group_a_row", 40, 32, PLANES, VECTOR, y, sizes)
    print(f"relative error {np.linalg.norm(y - EXACT) / np.linalg.norm(EXACT):.1e}")
    try:
        run_ptx(KERNEL.replace("BARRIER();", ""), "group_a_row", 2, 32, PLANES, VECTOR, y, sizes)
    except Exception as fault:
        print("without the barrier:", fault)
    try:
        run_ptx(KERNEL, "group_a_row", 41, 32, PLANES, VECTOR, y, sizes)
    except Exception as fault:
        print("one group too many:", fault)

# %% [markdown]
# Both mistakes would go unnoticed on most devices, most of the time. Here they are errors with a name, in every test run. The package
# runs whole models through this interpreter before anybody with a GPU sees them.
#
# ### Exercise 4: find the mistake
#
# A colleague's kernel adds up an array with a tree. It is right on his machine. Say what is wrong: return the corrected text.

# %%
SUM = """
KERNEL void sum64(GLOBAL const float* x, GLOBAL float* y) {
    LOCAL float part[64];
    const int i = LOCAL_ID(0);
    part[i] = x[i];
    BARRIER();
    for (int step = 32; step > 0; step /= 2) {
        if (i < step) part[i] += part[i + step];
    }
    if (i == 0) y[0] = part[0];
}
"""


# %% tags=["exercise"]
def corrected():
    """The text of a kernel that is right on every device."""
    raise NotImplementedError


# %% tags=["check"]
with check("the mistake"):
    text = corrected()
    inside = text[text.index("for (") :]
    assert "BARRIER();" in inside, "what a thread wrote in one step, another reads in the next"
    guarded = re.search(r"if \(i < step\)\s*\{[^}]*BARRIER", inside)
    assert not guarded, "all threads must reach a barrier, also those with i >= step"
    if HAVE:
        x, out = rng.integers(0, 9, 64).astype(np.float32), np.zeros(1, np.float32)
        interpret(text, "sum64", 64, x, out)
        assert out[0] == x.sum(), f"{out[0]}, expected {x.sum()}"

# %% [markdown]
# ## Part 5. What it would take on a device
#
# Nothing so far tells how fast a kernel is. But it can be reckoned, as in notebook 8: bytes over bytes a second, instructions over instructions
# a second, and the larger counts. An H200 reads 4.3 TB/s in practice, and its 132 processors each start 4 warp instructions a cycle at 1.7 GHz.

# %%
READ, ISSUE = 4.3e12, 132 * 4 * 32 * 1.7e9  # bytes, and thread instructions, a second
n_weights = 8e9
for name, n_bytes, per_32 in (
    ("one code at a time, as above", 34, 32 * 4 + 10),
    ("4 codes at once (dp4a)", 34, 8 * 3 + 8),
    ("Q4_0, 4 at once", 18, 8 * 4 + 8),
):
    by_memory, by_instructions = n_weights / 32 * n_bytes / READ, n_weights / 32 * per_32 / ISSUE
    print(
        f"{name:32} memory {1e3 * by_memory:.1f} ms, instructions {1e3 * by_instructions:.1f} ms: {1 / max(by_memory, by_instructions):5.0f} tokens/s"
    )

# %% [markdown]
# Even the simple kernel would wait for memory most of the time; multiplying four bytes at once (`dp4a`, the GPU's `vpdpbusd`) leaves
# it idle. For one token a kernel need not be clever, it must only read in order and not do too much. For a prompt of hundreds of tokens it must
# use the *tensor cores*, which multiply small matrices in one instruction, and then the art begins: `docs/gpu.md`.
#
# ### Exercise 5: how many groups fit
#
# A processor of the device has 65,536 registers, 228 KB of local memory, and room for 2048 threads and 32 groups. How many groups run on it at once?


# %% tags=["exercise"]
def groups_at_once(threads, registers, local_bytes):
    """Groups of `threads` threads, each thread with so many registers, each group with so many bytes."""
    raise NotImplementedError


# %% tags=["check"]
with check("groups at once"):
    assert groups_at_once(32, 40, 128) == 32, "room for 32 groups limits"
    assert groups_at_once(256, 32, 1024) == 8, "2048 threads limit"
    assert groups_at_once(256, 128, 1024) == 2, "65,536 registers limit"
    assert groups_at_once(128, 32, 100 * 1024) == 2, "228 KB limit"

# %% [markdown]
# ## What changes with a GPU
#
# `tinyllm devices` lists it. `tinyllm.load(device="cuda")` runs a model there. `tinyllm lab mine.cl --device opencl` checks a kernel of your own
# against exact products, in several shapes, and ranks it beside the package's. And the numbers of part 5 become measured ones.
#
# ## To think about
#
# 1. Why can a barrier not stand inside of `if (i < step)`? What would the threads wait for?
# 2. Two threads that add to one sum at the same time lose one of the additions. Atomic additions do not. Why does the package avoid them for
#    floats all the same? (Think of the order, and of results that repeat.)
# 3. On a CPU, 16 rows lay side by side in a tile; on the GPU, planes. Both serve the same end. Which?
