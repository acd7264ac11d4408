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
# # 3. Quantisation: a weight in four bits
#
# Trained models are stored as 16-bit floats. Nearly nobody runs them so: weights are squeezed into 8, 4, even 2 bits,
# and the model hardly notices, until suddenly it does. What happens to the numbers? Which formats are there, why so many,
# and how does one find out what was lost?
#
# You will pack a matrix into Q4_0 yourself, then take apart every other idea in use (two-level scales, uneven steps,
# tiny floats), and in the end measure what each does to a whole model. **Time: 50 minutes.** You need NumPy, and to
# have seen a block of Q8_0 (notebook 1, part 4).

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
from tinyllm.course import check
from tinyllm.gguf import quants
from tinyllm.loading import BUNDLED

file = gguf.open(BUNDLED)
W = {
    name: t.dequantize() for name, t in file.tensors.items()
}  # float32; we take these as the truth
w = W["blk.1.ffn_gate.weight"]
print(w.shape, w.dtype)

# %% [markdown]
# ## What is to be squeezed
#
# A matrix of a language model looks like noise: numbers around zero, most small, a few large.

# %%
plots.histogram({"blk.1.ffn_gate": w}, xlabel="weight", title=f"{w.size:,} weights", log=True)

# %% [markdown]
# If all weights shared *one* grid of 16 steps, it would have to reach the largest, and most weights would fall on the
# two or three steps in the middle. So neighbours in a row are taken in small groups, 32 for example, and each group gets
# a grid of its own. Here is one group, and the grid that Q4_0 gives it.

# %%
block = w[0, :32]
raw = quants.quantize("Q4_0", block)
back = quants.dequantize("Q4_0", raw)
plots.lines(
    {"weight": (range(32), block), "in Q4_0": (range(32), back)}, xlabel="column", title="One block"
)

# %% [markdown]
# The dashed line may only take 16 values. It follows, roughly.
#
# **Predict.** 32 weights have 4 bits each and share one scale, a half-precision float. How many bits is that for each
# weight? How many megabytes would a model of 7 billion weights have?

# %%
bits = (32 * 4 + 16) / 32
print(bits, "bits;", 7e9 * bits / 8 / 1e9, "GB, against", 7e9 * 2 / 1e9, "in 16-bit floats")

# %% [markdown]
# ## Part 1. Q4_0 by hand
#
# The format's definition is one line: `weight = d * (q - 8)`, with `q` from 0 to 15 and the scale `d` a half float.
#
# Look at the range: q - 8 goes from **-8 to 7**. There is no +8. So the weight with the largest size should get
# -8, whether it is positive or negative: then d is that weight divided by -8, and may be a negative number.

# %%
largest = block[np.abs(block).argmax()]
d = np.float16(largest / -8)
q = np.clip(np.rint(block / np.float32(d)) + 8, 0, 15).astype(np.uint8)
print("largest", largest, " d", d)
print("q", q)

# %% [markdown]
# Two codes share a byte. The low half of byte `i` holds weight `i`, and its high half weight `i + 16` (not `i + 1`!). So
# a processor that loads 16 bytes gets the first half of the block by one `and`, the second by one shift.

# %%
plots.spans(
    {"a block of Q4_0": [("d", 2), *[(f"{i}|{i + 16}", 1) for i in range(16)]]},
    title="32 weights in 18 bytes",
)

# %%
packed = q[:16] | q[16:] << 4
mine = np.concatenate([np.array([d], "<f2").view(np.uint8), packed])
print(mine.tobytes().hex(" "))
assert np.array_equal(quants.dequantize("Q4_0", mine), np.float32(d) * (q.astype(np.float32) - 8))

# %% [markdown]
# ### Exercise 1: unpack
#
# Write the way back, from the 18 bytes of each block to weights.


# %% tags=["exercise"]
def unpack_q4_0(raw):
    """uint8 [n, 18] -> float32 [n, 32]."""
    raise NotImplementedError


# %% tags=["check"]
with check("unpacking Q4_0"):
    some = quants.quantize("Q4_0", w[:4]).reshape(-1, 18)
    want = quants.dequantize("Q4_0", some)
    got = unpack_q4_0(some)
    assert got.shape == want.shape, f"the shape is {got.shape}, expected {want.shape}"
    assert got.dtype == np.float32, f"the type is {got.dtype}"
    assert np.array_equal(got[:, :16], want[:, :16]), "the first 16 are wrong: the low halves"
    assert np.array_equal(got[:, 16:], want[:, 16:]), "the last 16 are wrong: the high halves"

# %% [markdown]
# **Predict.** Is the scale "largest weight gets -8" the best one? What would a *slightly smaller* scale do to the
# largest weight, and what to all the others?


# %%
def error_with(x, scale):
    """Root mean square error of a block with this scale, relative to its size."""
    y = scale * np.clip(np.rint(x / scale), -8, 7)
    return np.sqrt(((x - y) ** 2).sum() / (x**2).sum())


base = largest / -8
shares = np.linspace(0.7, 1.2, 51)
plots.lines(
    {"error": (shares, [error_with(block, s * base) for s in shares])},
    xlabel="scale / (largest / -8)",
    ylabel="relative error",
)

# %% [markdown]
# The curve is jagged: with each step of the scale some weight jumps to another code. Its lowest point is
# usually *not* at 1. Cutting the largest weight short may well pay.
#
# ### Exercise 2: a better scale
#
# Write a function that tries scales from 0.8 to 1.2 times `largest / -8` (41 of them) and returns the best. It must do
# so for many blocks at once; no loop over blocks.


# %% tags=["exercise"]
def best_scales(x):
    """Blocks [n, 32] -> scales float32 [n], each the best of its 41."""
    raise NotImplementedError


# %% tags=["check"]
with check("a better scale"):
    blocks = w[:8].reshape(-1, 32)
    s = best_scales(blocks)
    assert s.shape == (len(blocks),), f"the shape is {s.shape}"
    error = np.array([error_with(x, v) for x, v in zip(blocks, s, strict=True)])
    plain = np.array([error_with(x, x[np.abs(x).argmax()] / -8) for x in blocks])
    assert (error <= plain + 1e-6).all(), (
        "worse than the simple scale somewhere: is 1.0 among your tries?"
    )
    assert error.mean() < 0.97 * plain.mean(), "hardly better than the simple scale"

# %% [markdown]
# ## Part 2. What a bit is worth
#
# How good is a format? Squeeze a matrix, unpack it, and compare: the size of the difference divided by the size of the
# matrix. Here are thirteen formats.
#
# **Predict** the shape of the picture: with each further bit, does the error fall by a fixed amount, or by a fixed
# factor? Which?


# %%
def relative_error(kind, x):
    """Size of the error divided by the size of the matrix."""
    return np.linalg.norm(quants.dequantize(kind, quants.quantize(kind, x)) - x) / np.linalg.norm(x)


kinds = [
    "Q1_0",
    "TQ2_0",
    "Q2_0",
    "Q2_K",
    "Q3_K",
    "MXFP4",
    "IQ4_XS",
    "Q4_0",
    "Q4_K",
    "Q4_1",
    "Q5_0",
    "Q5_K",
    "Q6_K",
    "Q8_0",
]
error = {k: relative_error(k, w + 1e-9) for k in kinds}
size = {k: quants.FORMATS[k].bits_per_weight for k in kinds}
shown = [k for k in kinds if k != "Q8_0"]
plots.points(
    shown,
    [size[k] for k in shown],
    [error[k] for k in shown],
    xlabel="bits for each weight",
    ylabel="relative error",
    log="y",
)

# %% [markdown]
# On a logarithmic axis it is nearly a straight line: **each further bit halves the error**, because it halves the
# distance between two steps. (Q8_0 is left out: our "truth" comes from a Q8_0 file, so it loses nothing here.)
#
# Look at where formats leave the line. At four and a quarter to four and a half bits there are four. Which is
# best, and by how much? The rest of this part is about where that comes from.
#
# **An offset.** Q4_1 writes `d * q + m`: the grid need not be centred at zero. A group whose weights are all positive
# wastes nothing then. It costs a second half float: 5 bits instead of 4.5.
#
# **Scales of scales.** Half floats for every 32 weights cost half a bit each. Formats with a K take 256 weights at
# once: eight groups of 32, each with a scale and a minimum of only *six bits*, which are multiples of two half floats.

# %%
plots.spans(
    {
        "Q4_0, 8 blocks": [part for _ in range(8) for part in (("d", 2), ("32 codes", 16))],
        "Q4_1, 8 blocks": [
            part for _ in range(8) for part in (("d", 2), ("m", 2), ("32 codes", 16))
        ],
        "Q4_K, 1 block": [("d", 2), ("dmin", 2), ("8 scales, 8 minima", 12), ("256 codes", 128)],
    },
    title="256 weights",
)

# %% [markdown]
# Q4_K has the offset of Q4_1 and the size of Q4_0. That is why nobody who has the choice takes Q4_0.
#
# ### Exercise 3: bits
#
# The package describes each block by a NumPy type. Compute the bits for each weight from it. `quants.FORMATS[k]` has
# `.dtype` and `.block_size`; don't use `.bits_per_weight`. Then answer: for which formats is the share of the codes
# themselves below 85 % of the bits? The field that holds codes is called `qs` (and `qh` their upper bits).


# %% tags=["exercise"]
def bits_of(kind):
    """(bits for each weight, share of the fields qs, ql, qh and hmask in them)."""
    raise NotImplementedError


# %% tags=["check"]
with check("bits"):
    assert bits_of("Q4_0") == (4.5, 16 / 18), "18 bytes for 32 weights, 16 of them codes"
    assert bits_of("Q6_K")[0] == 6.5625, "210 bytes for 256 weights"
    assert bits_of("Q6_K")[1] == 192 / 210, "ql and qh are codes, the scales are not"
    assert sorted(k for k in ("Q2_K", "Q4_K", "Q4_1", "Q5_1", "Q8_0") if bits_of(k)[1] < 0.85) == [
        "Q2_K",
        "Q4_1",
        "Q5_1",
    ]

# %% [markdown]
# ## Part 3. Steps need not be even
#
# Weights crowd around zero. Should the grid not do so too? IQ4_NL has 16 uneven steps from a fixed table; MXFP4's 16 are the
# numbers, zero twice, that a float with one bit of sign, two of exponent and one of mantissa can be.

# %%
uneven = np.unique(quants.int8_form("IQ4_NL", quants.quantize("IQ4_NL", w))[0]).astype(float)
floats = np.unique(quants.int8_form("MXFP4", quants.quantize("MXFP4", w))[0]).astype(float)
even = np.arange(-8, 8.0)
grids = {"Q4_0": even, "IQ4_NL": uneven, "MXFP4": floats}
plots.lines(
    {k: (g / np.abs(g).max(), [i] * len(g)) for i, (k, g) in enumerate(grids.items())},
    title="Where the steps lie",
)

# %% [markdown]
# **Predict.** MXFP4 has its steps as dense near zero as IQ4_NL, but in the picture of errors it was clearly worse. What
# else about it is coarse? (Hint: its scale takes 8 bits, and they are all exponent.)

# %%
for kind in ("Q4_0", "IQ4_NL", "MXFP4"):
    _, scales, _, _ = quants.int8_form(kind, quants.quantize(kind, w[:2]))
    print(f"{kind:7} {np.abs(scales[0, :6])}")

# %% [markdown]
# MXFP4's scales are powers of two: no product is needed to apply one, an addition to the exponent will do, and that is
# what hardware likes. But the largest weight may meet a grid that is nearly twice too wide.
#
# ### Exercise 4: a code book
#
# Write the nearest step for each weight: `table` is sorted. (`np.searchsorted` on the borders between steps.) It is
# the heart of every format with a table.


# %% tags=["exercise"]
def nearest(x, table):
    """Index of the nearest entry of the sorted table, for each of x, of any shape."""
    raise NotImplementedError


# %% tags=["check"]
with check("a code book"):
    table = np.array([-3.0, 0.0, 1.0, 8.0])
    assert nearest(np.array([-9.0, -1.6, -1.4, 0.4, 0.6, 4.4, 4.6, 99.0]), table).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    x = w[:4] / np.abs(w[:4]).max()
    g = uneven / np.abs(uneven).max()
    assert nearest(x, g).shape == x.shape, "keep the shape"
    assert np.abs(x - g[nearest(x, g)]).max() <= np.diff(g).max() / 2 + 1e-6

# %% [markdown]
# At the far end stand TQ2_0, whose codes are -1, 0 and 1, and Q1_0 with one bit and its sign. Models *trained* with such
# weights work well. Ours was not; we shall see.
#
# ## Part 4. What the model loses
#
# The error of a matrix is not what you care about. You care whether the model says something else. Three measures:
#
# * **the text**: what it writes when it takes the likeliest token;
# * **perplexity**: e to the mean surprise about a text. A perplexity of 4 means: as unsure as if it chose from
#   four equally likely tokens at every step;
# * **KL divergence**: how far its probabilities are from those of the original model, at each position, in nats. It sees
#   changes that perplexity averages away: some tokens get likelier, others less.
#
# As a text we take a story that the original model wrote, and compute on the NumPy backend with floats, so that
# nothing but the weights differs.


# %%
def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


original = tinyllm.load(device="reference")
begin = original.tokenizer.encode("Once upon a time")
ids = begin + original.generate(begin, max_tokens=60, seed=3).ids
truth = log_softmax(original.logits(ids))


def squeezed(kinds):
    """The model with each matrix in the type that kinds(name) gives it, or as it is for None."""
    tensors = {}
    for name, x in W.items():
        kind = kinds(name) if x.ndim == 2 else None
        tensors[name] = gguf.RawTensor(kind, x.shape, quants.quantize(kind, x)) if kind else x
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        gguf.write(path, file.exact_metadata, tensors)
        return tinyllm.load(path, device="reference")


def judge(model):
    """KL divergence, perplexity, and the beginning of a story."""
    found = log_softmax(model.logits(ids))
    kl = (np.exp(truth) * (truth - found)).sum(-1).mean()
    surprise = -found[np.arange(len(ids) - 1), ids[1:]]
    with model:
        return (
            float(kl),
            float(np.exp(surprise.mean())),
            model.generate(begin, max_tokens=14, temperature=0).text,
        )


# %% [markdown]
# **Predict.** We go down from 8.5 bits to 1.1. At which format will the story become worse than the original? At
# which will it be nonsense? Write down two names: Q6_K, Q5_K, Q4_K, MXFP4, Q3_K, Q2_K, Q2_0, TQ2_0, Q1_0.

# %%
ladder = ["Q6_K", "Q5_K", "Q4_K", "MXFP4", "Q3_K", "Q2_K", "Q2_0", "TQ2_0", "Q1_0"]
found = {k: judge(squeezed(lambda name, k=k: k)) for k in ladder}
for k, (kl, perplexity, story) in found.items():
    print(
        f"{k:6} {size[k] if k in size else quants.FORMATS[k].bits_per_weight:5.2f} bits  KL {kl:7.4f}  perplexity {perplexity:8.2f}  {story}"
    )

# %%
plots.points(
    ladder,
    [quants.FORMATS[k].bits_per_weight for k in ladder],
    [found[k][0] for k in ladder],
    xlabel="bits for each weight",
    ylabel="KL divergence",
    log="y",
)

# %% [markdown]
# The greedy text stays the same for long, down to three bits. KL shows the damage from the first step on, a factor of
# four to five for each bit: about the *square* of the error. That is what to measure when two formats are compared. In the
# end the model forgets who the story is about, then how to end a sentence.
#
# Large models suffer less: they have more weights than they need. A model of 70 billion weights is usable at two bits,
# where ours of four million is not.
#
# ## Part 5. Which matrices matter
#
# **Predict.** Put only *one kind* of matrix into two bits, and leave the rest. Which one hurts most? There are
# `token_embd` (which is also the output), the four of attention, and the three of the feed-forward part.

# %%
parts = [
    "token_embd",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
]
alone = {p: judge(squeezed(lambda name, p=p: "Q2_K" if p in name else None))[0] for p in parts}
weights_in = {p: sum(x.size for n, x in W.items() if p in n) for p in parts}
plots.bars(
    parts,
    {
        "KL": [alone[p] for p in parts],
        "KL for a million weights": [alone[p] / weights_in[p] * 1e6 for p in parts],
    },
    title="One kind of matrix in Q2_K",
)

# %% [markdown]
# For its size the value matrix is the most sensitive, by far: what attention brings along goes through it unchanged,
# and it is small. So the mixtures that people download, such as `Q4_K_M`, give `attn_v` more bits, and it costs next to
# nothing. They raise half of `ffn_down` too, a larger matrix; in our model that buys less for its bits. The package makes such files too: `tinyllm quantize model-f16.gguf out.gguf Q4_K_M`.
#
# ### Exercise 5: spend a budget
#
# You have Q2_K for all, and may raise *two* kinds of `parts` to Q6_K. You want the least KL for the fewest bits: rank
# kinds by KL saved for each *bit* added, from `alone` and `weights_in`, and return the best two.


# %% tags=["exercise"]
def best_two(alone, weights_in):
    """Names of the two kinds whose raise from Q2_K to Q6_K saves the most KL for each bit."""
    raise NotImplementedError


# %% tags=["check"]
with check("a budget"):
    assert sorted(best_two({"a": 1.0, "b": 0.5, "c": 0.1}, {"a": 100, "b": 10, "c": 1})) == [
        "b",
        "c",
    ]
    two = set(best_two(alone, weights_in))
    assert "attn_v" in two, f"{two}: the picture shows a better one"

# %% [markdown]
# ## Part 6. Importance
#
# All columns of a matrix are not alike, either: column `i` is multiplied by activation `i`, and some activations are
# always large. An error there weighs more. So let the model read a text, note the mean square of each activation, and
# choose scales that make the *weighted* error small. This is what an "imatrix" is.

# %%
seen = []


def watch(name, x):
    if name == "blk.3.attn_heads":
        seen.append(np.array(x))


original.logits(ids, tap=watch)
x = np.concatenate(seen)
importance = (x**2).mean(0)
plots.histogram(
    {"columns": np.sqrt(importance)},
    xlabel="typical size of an activation",
    title="The 256 columns of blk.3.attn_output",
)

# %% [markdown]
# ### Exercise 6: a weighted scale
#
# Change your `best_scales` so that each column has a weight: minimise `(importance * (x - y)**2).sum()`.


# %% tags=["exercise"]
def weighted_scales(x, importance):
    """Blocks [n, 32], importance [n, 32] -> scales float32 [n], the best of the 41 from 0.8 to 1.2."""
    raise NotImplementedError


# %%
def q4(x, scales):
    """Blocks of 32 on the grid of these scales, from -8 to 7."""
    return scales[:, None] * np.clip(np.rint(x / scales[:, None]), -8, 7)


# %% tags=["check"]
with check("importance"):
    o = W["blk.3.attn_output.weight"]
    blocks = o.reshape(-1, 32)
    h = np.tile(importance, len(o)).reshape(-1, 32)
    flat = weighted_scales(blocks, np.ones_like(h))
    weighed = weighted_scales(blocks, h)
    loss = {
        k: (h * (blocks - q4(blocks, s)) ** 2).sum()
        for k, s in (("flat", flat), ("weighed", weighed))
    }
    assert loss["weighed"] < loss["flat"], "the weighted error did not become smaller"
    out = x @ o.T
    for k, s in (("flat", flat), ("weighed", weighed)):
        off = np.linalg.norm(x @ q4(blocks, s).reshape(o.shape).T - out) / np.linalg.norm(out)
        print(f"{k:8} error of the products {off:.4f}")

# %% [markdown]
# Here it gains a few hundredths of the error, for nothing: the file is no larger. In large models a few columns are a hundred times
# as large as the others, and at two or three bits importance then decides between sense and nonsense.
#
# The package does it for a whole model: `tinyllm imatrix model-f16.gguf text.txt` reads a text and writes the importance of all columns into
# `imatrix.gguf`, and `tinyllm quantize --imatrix imatrix.gguf model-f16.gguf out.gguf Q3_K_M` makes use of it.

# %%
original.close()
file.close()

# %% [markdown]
# ## To think about
#
# 1. Why groups along a *row* and not along a column? (What does a dot product add up, and what may stand outside of the
#    sum?)
# 2. A perplexity that falls by 0.01 after quantising is luck, not quality. How would you find out how large luck is?
# 3. You may train a little after quantising. Which of the numbers, codes or scales, would you train, and why?
