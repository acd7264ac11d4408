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
# # 4. One token through the model
#
# You type "Once upon a time", and a moment later the machine is sure that a comma comes next. What happened in between?
# Some forty steps, and in this notebook you look at the numbers after each of them: as pictures, in a real model, with
# its real quantised weights.
#
# You can do so because every activation in `tinyllm` has a name, and a *tap* sees it as it is made, and may even put
# another in its place. **Time: 50 minutes.** You need matrices and vectors; notebook 1 has the same model as forty
# lines of code.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import numpy as np

import tinyllm
from tinyllm import plots
from tinyllm.course import check

# floats throughout, so that what we compute by hand agrees to many digits
model = tinyllm.load(device="reference", kv_type="f32")
config, tokenizer = model.config, model.tokenizer
text = "Lily had a red ball. Tom had a big"
ids = tokenizer.encode(text)
tokens = [tokenizer.token_bytes(i).decode() or "BOS" for i in ids]
print(tokens)

# %% [markdown]
# ## The whole way in one picture
#
# The model is a stack of four layers. Through it runs a vector of 256 numbers for each token, the **residual stream**.
# Each layer reads it twice and *adds* to it twice: the result of attention, then the result of the feed-forward part.
# Nothing is ever overwritten. Here is how large what is added is, beside the stream itself.

# %%
acts = {}


def keep(name, x):
    acts[name] = np.array(x)


keep.attn_probs = True  # ask for the attention probabilities, too
logits = model.logits(ids, tap=keep)


def size(name):
    """Mean length of the tokens' vectors, without the first token, which is odd."""
    return np.linalg.norm(acts[name][1:], axis=1).mean()


layers = range(config.n_layer)
names = ["embd", *[f"blk.{i}.{part}" for i in layers for part in ("attn_out", "ffn_out", "out")]]
plots.bars(
    names,
    {"length of the vector": [size(n) for n in names]},
    title="The stream (out) and what is added to it",
)

# %% [markdown]
# The package can also print the program that it runs. Read it beside the picture: `x` is the stream.

# %%
from tinyllm.models.explain import explain  # on the command line: tinyllm explain model.gguf

with tinyllm.gguf.open(model.path) as file:
    print(*explain(file.metadata, file.tensors), sep="\n")

# %% [markdown]
# **Predict.** Of the names that the tap has seen, how many belong to one layer? Count them in the program, then check.

# %%
print(len(acts), "arrays;", [n.removeprefix("blk.0.") for n in acts if n.startswith("blk.0.")])

# %% [markdown]
# ## Part 1. A token becomes a vector
#
# Token 988 takes row 988 of a table. That is all.

# %%
with tinyllm.gguf.open(model.path) as file:
    W = {n.removesuffix(".weight"): t.dequantize() for n, t in file.tensors.items()}
assert np.array_equal(acts["embd"], W["token_embd"][ids])
plots.heat(
    acts["embd"][:, :64], rows=tokens, title="64 of the 256 numbers of each token", signed=True
)

# %% [markdown]
# Nobody can read these stripes. But two vectors can be compared: the cosine of the angle between them is 1 if they point
# the same way and 0 if they have nothing in common.
#
# **Predict.** Which words are nearest to " Lily"? To " big"? To " red"?


# %%
def nearest_by_loop(word, n):
    """The n words whose vectors point most like the word's, slowly."""
    E = W["token_embd"]
    mine = E[tokenizer.encode(word, add_special=False)[0]]
    cosines = [(float(e @ mine / np.sqrt((e @ e) * (mine @ mine))), i) for i, e in enumerate(E)]
    return [i for _, i in sorted(cosines, reverse=True)[1 : n + 1]]


for word in (" Lily", " big", " red", " ran"):
    print(
        word,
        "->",
        [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in nearest_by_loop(word, 6)],
    )

# %% [markdown]
# Names lie beside names, sizes beside sizes. Nobody told the model what a name is: words that occur in the same
# surroundings were pulled together.
#
# ### Exercise 1: all at once
#
# Compute the cosines of one vector with every row of a table, with no loop.


# %% tags=["exercise"]
def cosines(table, v):
    """Cosine of each row of table [n, E] with v [E] -> [n]."""
    raise NotImplementedError


# %% tags=["check"]
with check("cosines"):
    a = np.array([[1.0, 0], [0, 2], [3, 3]])
    assert np.allclose(cosines(a, np.array([5.0, 0])), [1, 0, np.sqrt(0.5)]), (
        "lengths must not matter"
    )
    c = cosines(W["token_embd"], W["token_embd"][988])
    assert list(np.argsort(-c)[1:4]) == nearest_by_loop(tokenizer.decode([988]), 3)

# %% [markdown]
# ## Part 2. The norm
#
# Before a layer reads the stream, it brings each vector to one size: divide by the root of the mean square, then
# multiply each of the 256 columns by a learnt number. So it does not matter how much has been added already.

# %%
plots.bars(
    tokens,
    {
        "the stream behind layer 2": np.linalg.norm(acts["blk.2.out"], axis=1),
        "after the norm": np.linalg.norm(acts["blk.3.attn_norm"], axis=1),
    },
    xlabel="length of the vector",
)

# %% [markdown]
# The first token is far longer than the others before the norm, and like all of them after it. Keep it in mind.
#
# ### Exercise 2: the norm
#
# `eps` is added under the root, so that a vector of zeros divides by something.


# %% tags=["exercise"]
def rms_norm(x, weight, eps):
    """x [T, E] -> [T, E]."""
    raise NotImplementedError


# %% tags=["check"]
with check("the norm"):
    got = rms_norm(acts["embd"], W["blk.0.attn_norm"], config.norm_eps)
    want = acts["blk.0.attn_norm"]
    assert got.shape == want.shape, f"the shape is {got.shape}"
    assert np.allclose(got, want, atol=1e-4), (
        f"off by {np.abs(got - want).max():.2g}: the *mean* square, of each row?"
    )

# %% [markdown]
# ## Part 3. Questions, keys and values
#
# Attention asks, for each token: what of the earlier tokens do I need? Three matrices make from each vector a
# *query* (what I look for), a *key* (what I am), and a *value* (what I bring along). Four heads do so side by side,
# with 64 numbers each. Where a query and a key point the same way, the value is taken.
#
# A vector says nothing about its *position*. So queries and keys are turned: pairs of numbers are points in a plane,
# and the point turns by an angle that grows with the position, fast for the first pair, slowly for the last.

# %%
D = config.head_dim
speed = config.rope_freq_base ** (-np.arange(0, D, 2) / D)  # radians for each position
where = np.arange(64)
plots.lines(
    {f"pair {i}": (where, np.cos(where * speed[i])) for i in (0, 4, 8, 16)},
    xlabel="position",
    ylabel="cosine of the angle",
    title="How pairs turn",
)

# %% [markdown]
# **Predict.** Turn a query at position 30 and a key at position 25, and take their product. Then move both ten
# positions on. Does the product change?


# %%
def turned(x, position):
    """x [D] turned to a position: pairs (0, 1), (2, 3), ..."""
    c, s = np.cos(position * speed), np.sin(position * speed)
    a, b = x[0::2], x[1::2]
    return np.stack([a * c - b * s, a * s + b * c], -1).reshape(-1)


rng = np.random.default_rng(0)
q, k = rng.normal(size=D), rng.normal(size=D)
for start in (0, 10, 100):
    print(start, turned(q, start + 5) @ turned(k, start))

# %% [markdown]
# The product depends on the *distance* alone: two hands of a clock that both turn keep the angle between them. So
# what the model learns about "the word before" holds anywhere in a text.
#
# ### Exercise 3: queries by hand
#
# Compute the queries of layer 0: multiply `acts["blk.0.attn_norm"]` by the matrix, cut the result into heads of 64, turn
# each head to its token's position. The tap's `blk.0.q` is what should come out, [T, 256].


# %% tags=["exercise"]
def queries(h, w):
    """h [T, E], w [E, E] as the file has it (a row an output) -> turned queries [T, E]."""
    raise NotImplementedError


# %% tags=["check"]
with check("queries"):
    got = queries(acts["blk.0.attn_norm"], W["blk.0.attn_q"])
    want = acts["blk.0.q"]
    assert got.shape == want.shape, f"the shape is {got.shape}"
    assert np.allclose(got[0], want[0], atol=1e-3), (
        "position 0 is not turned: is the product right? x @ w.T"
    )
    assert np.allclose(got, want, atol=1e-3), (
        "later positions differ: each head is turned by itself"
    )

# %% [markdown]
# ## Part 4. Attention
#
# Products of queries and keys, divided by √64, become probabilities: for each token (a row of the picture) how much it
# takes from each earlier one (a column). Above the diagonal is the future, which nobody sees.
#
# **Predict.** There are four heads in a layer. In layer 0, which earlier word does the last token, " big", look at?

# %%
plots.heat(
    {f"head {h}": acts["blk.0.attn_probs"][h] for h in range(4)},
    rows=tokens,
    columns=tokens,
    title="Layer 0",
)

# %%
plots.heat(
    {f"head {h}": acts["blk.2.attn_probs"][h] for h in range(4)},
    rows=tokens,
    columns=tokens,
    title="Layer 2",
)

# %% [markdown]
# Early heads look around near the diagonal: at the word itself and the ones before it. Later heads are often bright in
# the first column. A head must spend its whole 100 %; one that finds nothing of interest parks them on the first token,
# which is why that one has such an odd, long vector. It is called an *attention sink*.
#
# ### Exercise 4: who does what
#
# For each head of each layer compute (a) its mean probability on the *previous* token and (b) on the *first* one,
# over rows 2 and later. Return two arrays [layers, heads].


# %% tags=["exercise"]
def habits(acts, n_layer):
    """(mean probability on the previous token, on the first token), each [n_layer, heads]."""
    raise NotImplementedError


# %% tags=["check"]
with check("habits of heads"):
    previous, sink = habits(acts, config.n_layer)
    assert previous.shape == sink.shape == (config.n_layer, 4), (
        f"shapes {previous.shape}, {sink.shape}"
    )
    p = acts["blk.1.attn_probs"][3]
    assert np.isclose(sink[1, 3], np.mean([p[t, 0] for t in range(2, len(p))])), (
        "the first token, rows from 2 on"
    )
    assert np.isclose(previous[1, 3], np.mean([p[t, t - 1] for t in range(2, len(p))])), (
        "the token before"
    )

# %% [markdown]
# Here is what comes out, so that you see it even if your own is not ready.


# %%
def on(layer, column):
    """Mean probability of each head on the column that `column(t)` names."""
    p = acts[f"blk.{layer}.attn_probs"]
    return [np.mean([p[h, t, column(t)] for t in range(2, len(ids))]) for h in range(4)]


plots.heat(
    {
        "on the token before": np.array([on(i, lambda t: t - 1) for i in layers]),
        "on the first token": np.array([on(i, lambda t: 0) for i in layers]),
    },
    rows=[f"layer {i}" for i in layers],
    columns=[f"head {h}" for h in range(4)],
    numbers=True,
)

# %% [markdown]
# The values, weighted so, go through a fourth matrix and are added to the stream.
#
# ## Part 5. The feed-forward part
#
# Attention moved information between tokens. Now each token is worked on alone: 256 numbers become 768, then 256 again.
# Two matrices make 768 numbers each, `up` and `gate`; the gate goes through the function *silu*, which lets positive
# numbers pass and all but stops negative ones; the product of both goes through `down`.

# %%
z = np.linspace(-6, 6, 61)
plots.lines({"silu": (z, z / (1 + np.exp(-z)))}, xlabel="gate", ylabel="what passes")

# %% [markdown]
# ### Exercise 5: by hand
#
# Compute the feed-forward part of one layer from `acts["blk.2.ffn_norm"]`. Return the 768 products, and the output.


# %% tags=["exercise"]
def feed_forward(h, gate, up, down):
    """h [T, E] -> (inner [T, F], output [T, E]); matrices have a row for each output."""
    raise NotImplementedError


# %% tags=["check"]
with check("feed-forward"):
    inner, out = feed_forward(
        acts["blk.2.ffn_norm"], *[W[f"blk.2.ffn_{n}"] for n in ("gate", "up", "down")]
    )
    assert inner.shape == (len(ids), 768), f"inner is {inner.shape}"
    assert np.allclose(out, acts["blk.2.ffn_out"], atol=1e-3), (
        f"off by {np.abs(out - acts['blk.2.ffn_out']).max():.2g}"
    )

# %% [markdown]
# **Predict.** Of the 768 inner numbers, does the output need all, or a few? How much of the output remains if only the
# largest tenth of them is kept?

# %%
h = acts["blk.2.ffn_norm"]
g = h @ W["blk.2.ffn_gate"].T
inner = g / (1 + np.exp(-g)) * (h @ W["blk.2.ffn_up"].T)
strength = np.abs(inner) * np.linalg.norm(W["blk.2.ffn_down"], axis=0)
kept = {}
for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
    border = np.quantile(strength, 1 - share, axis=1, keepdims=True)
    out = np.where(strength >= border, inner, 0) @ W["blk.2.ffn_down"].T
    kept[share] = np.linalg.norm(out - acts["blk.2.ffn_out"]) / np.linalg.norm(
        acts["blk.2.ffn_out"]
    )
plots.lines(
    {"error": (list(kept), list(kept.values()))},
    xlabel="share of inner numbers kept",
    ylabel="relative error of the output",
    log="x",
)

# %% [markdown]
# ## Part 6. From the stream to a word
#
# After the last layer the vector is normed once more and compared with every row of the table of words: 4096
# products, the *logits*. The largest is the likeliest word; `exp`, and division by the sum, makes probabilities.

# %%
last = rms = acts["blk.3.out"][-1]
mine = rms / np.sqrt((rms**2).mean() + config.norm_eps) * W["output_norm"] @ W["token_embd"].T
assert np.allclose(mine, logits[-1], atol=1e-3)
p = np.exp(logits[-1] - logits[-1].max())
p /= p.sum()
best = np.argsort(-p)[:10]
plots.bars(
    [repr(tokenizer.decode([int(i)])) for i in best],
    {"p": p[best]},
    xlabel="probability",
    title=text + " ...",
)

# %% [markdown]
# **When did it know?** Nothing stops us from norming and comparing the stream *earlier*, behind each layer. (This is
# called the logit lens; notebook 10 has more of it.)
#
# **Predict.** Behind which layer does the final answer first stand on place one?

# %%
final = int(best[0])
for name in ["embd", *[f"blk.{i}.out" for i in layers]]:
    x = acts[name][-1]
    z = x / np.sqrt((x**2).mean() + config.norm_eps) * W["output_norm"] @ W["token_embd"].T
    top = [tokenizer.decode([int(i)]) for i in np.argsort(-z)[:5]]
    place = int((z > z[final]).sum()) + 1
    print(f"{name:10} the final answer on place {place:4d}; the first five: {top}")

# %% [markdown]
# At first the stream is just the word itself, and the nearest words are its like. Layer by layer it becomes a guess.
#
# **Who said it?** The stream is a sum, and the comparison with a word's row is linear, up to the norm's one division.
# So the logit is a sum too: so much from the embedding, so much from each attention, each feed-forward.

# %%
parts = ["embd", *[f"blk.{i}.{part}" for i in layers for part in ("attn_out", "ffn_out")]]
divide = np.sqrt((last**2).mean() + config.norm_eps)
direction = W["output_norm"] * (W["token_embd"][final] - W["token_embd"][best[1]]) / divide
shares = [float(acts[n][-1] @ direction) for n in parts]
plots.bars(
    parts,
    {"share": shares},
    xlabel="logit",
    title=f"{tokenizer.decode([final])!r} against {tokenizer.decode([int(best[1])])!r}: who is for it, who against",
)

# %% [markdown]
# ### Exercise 6: the sum
#
# Check the claim: the shares of one word's logit, from all parts, add up to the logit. Write the function for any word.


# %% tags=["exercise"]
def shares_of(word, acts):
    """By part (the names in `parts`), what it adds to the logit of the id `word` at the last position."""
    raise NotImplementedError


# %% tags=["check"]
with check("shares"):
    for word in (final, 5, 1000):
        s = shares_of(word, acts)
        assert set(s) == set(parts), "a share for each part"
        assert np.isclose(sum(s.values()), logits[-1, word], atol=1e-2), (
            f"{sum(s.values()):.3f}, not {logits[-1, word]:.3f}"
        )

# %% [markdown]
# ## Part 7. Interfere
#
# A tap may *return* an array: then the model goes on with that. So you can ask what a part is good for by taking it
# away. **Predict.** The output of which of the eight parts does the model miss most?


# %%
def without(part):
    """KL divergence, mean over positions, when a part's output is zero."""
    z = model.logits(ids, tap=lambda name, x: np.zeros_like(x) if name == part else None)
    a, b = (
        v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (logits - logits.max(), z - z.max())
    )
    return float((np.exp(a) * (a - b)).sum(-1).mean())


plots.bars(
    parts[1:], {"KL": [without(n) for n in parts[1:]]}, xlabel="KL divergence from the whole model"
)

# %% [markdown]
# The first feed-forward part is missed by far the most. It turns bare words into what the later layers have learnt to
# read; without it they read gibberish. The other parts each do a little, and partly stand in for one another.
#
# ### Exercise 7: a head less
#
# `blk.I.attn_heads` [T, 256] holds the four heads' results, side by side, 64 columns each. Write a tap that silences one.


# %% tags=["exercise"]
def silence(layer, head):
    """A function tap(name, x) for model.logits."""
    raise NotImplementedError


# %% tags=["check"]
with check("a head less"):
    tap = silence(1, 2)
    x = np.ones((3, 256), np.float32)
    assert tap("blk.0.attn_heads", x) is None, "other layers go on as they are: return None"
    y = tap("blk.1.attn_heads", x)
    assert (y[:, 128:192] == 0).all(), "head 2 has the columns 128 to 191"
    assert y.sum() == 3 * 192, "the other heads stay"
    assert x.sum() == 3 * 256, "change a copy: the array may be shown read-only"
    assert not np.allclose(model.logits(ids, tap=tap), logits), "the model did not notice"

# %%
model.close()

# %% [markdown]
# ## To think about
#
# 1. The stream is never overwritten. What could a layer do to make something in it disappear?
# 2. The picture of "who is for it" leaves out *indirect* effects: layer 0 may have prepared what layer 3 says. How would you
#    measure those? (Part 7 is a beginning.)
# 3. On the fast CPU backend the same names exist, but activations are rounded to 8 bits before each product. Run this
#    notebook with `device="cpu"`: which assertions fail, and by how much?
