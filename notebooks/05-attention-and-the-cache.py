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
# # 5. Attention and the cache
#
# A model writes one token at a time. To choose the next one it needs all the tokens before it, and yet the thousandth
# token comes nearly as fast as the tenth. The reason is a piece of memory, the *cache of keys and values*. It is also
# why long conversations need gigabytes, why servers run out of memory, and why the first word of an answer takes so long.
#
# You will measure what the cache saves, compute how large it gets, build its pages, and squeeze it to a quarter.
# **Time: 55 minutes.** You should know what queries, keys and values are (notebook 4, part 3).

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import time

import numpy as np

import tinyllm
from tinyllm import plots
from tinyllm.course import check

model = tinyllm.load()
config, tokenizer = model.config, model.tokenizer
ids = tokenizer.encode("Once upon a time")
ids += model.generate(ids, max_tokens=400, seed=5, logit_bias={tokenizer.eos: -np.inf}).ids
print(len(ids), "tokens:", tokenizer.decode(ids[:40]), "...")

# %% [markdown]
# ## With and without
#
# Two ways to get the next token after n tokens. *Anew*: give the model all n. *With a cache*: give it only the last one,
# and a `state` in which the keys and values of the others are kept.
#
# **Predict** both curves before you run: time for one token against n, from 1 to 400.


# %%
def seconds(f):
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def anew(n):
    model.generate(ids[:n], max_tokens=1, temperature=0)


states = {}


def cached(n):
    state = states[n].fork()
    model.generate(ids[n - 1 : n], max_tokens=1, temperature=0, state=state)


lengths = [2, 50, 100, 200, 300, 400]
for n in lengths:
    states[n] = model.new_state()
    model.logits(ids[: n - 1], state=states[n])
curves = {
    "anew": (lengths, [1e3 * seconds(lambda n=n: anew(n)) for n in lengths]),
    "with a cache": (lengths, [1e3 * seconds(lambda n=n: cached(n)) for n in lengths]),
}
plots.lines(curves, xlabel="tokens so far", ylabel="ms for the next token", log="y")

# %% [markdown]
# Writing 400 tokens anew each time would read 1 + 2 + ... + 400 = 80,200 tokens. With the cache it reads 400.
#
# Why may one keep keys and values, and why not, say, the layers' outputs? Because nothing in a token's way through the
# model depends on *later* tokens: nobody looks ahead. What was computed for token 7 stays right for ever; and all that
# later tokens ever ask of it is its key and its value, in each layer.

# %% [markdown]
# ## Part 1. How large it gets
#
# For each token, each layer keeps a key and a value for each of its key heads. Here:

# %%
print(
    f"{config.n_layer} layers, {config.n_head_kv[0]} key heads of {config.head_dim} numbers, {config.n_head[0]} heads of queries"
)
per_token = config.n_layer * 2 * config.n_head_kv[0] * config.head_dim
print(per_token, "numbers for each token,", 2 * per_token, "bytes in half precision")

# %% [markdown]
# **Predict.** A model of the size of Llama 3 8B has 32 layers, 8 key heads of 128 numbers. How many bytes does one token
# take in half precision? How many gigabytes does a text of 128,000 tokens, a long book?
#
# ### Exercise 1: bytes
#
# `kind` is "f32" (4 bytes a number), "f16" (2) or "q8_0" (34 bytes for 32 numbers).


# %% tags=["exercise"]
def cache_bytes(n_tokens, n_layer, n_head_kv, head_dim, kind):
    """Bytes of keys and values, a whole number."""
    raise NotImplementedError


# %% tags=["check"]
with check("bytes of a cache"):
    assert cache_bytes(1, 4, 2, 64, "f16") == 2048, "keys *and* values"
    assert cache_bytes(1, 4, 2, 64, "q8_0") == 1088, "34 bytes for 32 numbers"
    assert cache_bytes(128_000, 32, 8, 128, "f16") == 16_777_216_000, (
        "16.8 GB: more than the weights in 8 bits"
    )

# %% [markdown]
# Why 8 key heads, when the model has 32 heads of queries? To save just this memory: groups of four query heads share a
# key head ("grouped-query attention"). Here are some shapes that real models have had, at 8192 tokens in f16.

# %%
shapes = {
    "7B, 2023: 32 layers, 32 key heads": (32, 32, 128),
    "8B, 2024: 32 layers, 8 key heads": (32, 8, 128),
    "0.5B: 24 layers, 2 key heads of 64": (24, 2, 64),
    "SmolLM2 135M: 30 layers, 3 of 64": (30, 3, 64),
    "the model here: 4 layers, 2 of 64": (4, 2, 64),
}
plots.bars(
    list(shapes),
    {"MB": [8192 * n * 2 * h * d * 2 / 1e6 for n, h, d in shapes.values()]},
    xlabel="MB of keys and values for 8192 tokens",
    log=True,
)

# %% [markdown]
# ## Part 2. Attention, block by block
#
# With one new token, attention is short. `q` [D] is its query; `K` and `V` [n, D] are what the cache has:
#
# ```
# s = K @ q / sqrt(D)         how well each key matches
# p = exp(s) / sum(exp(s))    as probabilities
# y = p @ V                   the weighted sum of values
# ```
#
# A kernel does not want to make the long arrays s and p. It walks over the cache in blocks (ours takes 256 positions
# each), keeping three things: the largest score so far `m`, the sum of exp(s - m) so far, and the weighted sum so far.
# When a block has a larger score, what was summed is scaled down. That is all of "flash attention".

# %%
rng = np.random.default_rng(1)
n, D = 400, 64
q, K, V = rng.normal(size=D), rng.normal(size=(n, D)), rng.normal(size=(n, D))
s = K @ q / np.sqrt(D)
p = np.exp(s - s.max())
want = p / p.sum() @ V
plots.lines(
    {"probability": (range(n), np.sort(p / p.sum())[::-1])},
    xlabel="positions, the most attended first",
    ylabel="p",
    log="y",
)

# %% [markdown]
# ### Exercise 2: flash
#
# Write it: go through K and V in blocks, never holding more than a block's scores.


# %% tags=["exercise"]
def flash(q, K, V, block=256):
    """The weighted sum [D], from blocks of the cache, first to last."""
    raise NotImplementedError


# %% tags=["check"]
with check("flash attention"):
    for block in (400, 256, 64, 1):
        got = flash(q, K, V, block)
        assert np.allclose(got, want), f"blocks of {block}: off by {np.abs(got - want).max():.2g}"
    assert np.isfinite(flash(100 * q, K, V, 64)).all(), (
        "exp overflows: subtract the largest score so far"
    )

# %% [markdown]
# Two things follow. The blocks may be given to several threads or processors, and joined in the end. And the *order* of
# joining decides the last bit of the result: a package that wants the same text on one thread and on eight must join
# in one fixed order, as `tinyllm` does (blocks of 256 from position 0, ascending).
#
# ## Part 3. Pages
#
# How much memory should a conversation get? Nobody knows how long it will be. If each gets room for the longest, a server
# is full after a few. So memory comes in **pages** of 256 positions, taken when they are first written.

# %%
grown = {}
for kind in ("f32", "f16", "q8_0"):
    with tinyllm.load(kv_type=kind) as m:
        state, sizes = m.new_state(), []
        for start in range(0, 400, 20):
            m.logits(ids[start : start + 20], state=state)
            sizes.append(state.nbytes / 1e6)
        grown[kind] = (range(20, 401, 20), sizes)
plots.lines(grown, xlabel="tokens", ylabel="MB", title="Memory of one conversation")

# %% [markdown]
# The step at 256 is the second page. And pages can be **shared**: a page is never changed once it is full, so two
# conversations with the same beginning may hold the same page.
#
# **Predict.** A state has read 300 tokens. You fork it ten times, and each fork reads one more token of its own. How
# many pages are there in all, at most?

# %%
state = model.new_state()
model.logits(ids[:300], state=state)
forks = [state.fork() for _ in range(10)]
for i, f in enumerate(forks):
    model.logits([ids[300 + i]], state=f)
pages = {id(page) for f in [state, *forks] for group in f.cache.pages for page in group}
print(len(pages), "pages; without sharing there would be", 2 * 11)

# %% [markdown]
# The first page, full, is shared by all. The second was half full: each fork copied it before it wrote ("copy on
# write"). Eleven second pages and one first one.
#
# ### Exercise 3: a table of pages
#
# Build it in small: a page is a Python list of at most `SIZE` tokens. `append` writes to the last page, after copying it
# if another table holds it, too; a full last page is followed by a new one.

# %%
SIZE = 4


class Page:
    """Tokens, and how many tables hold it."""

    made = 0

    def __init__(self, tokens=()):
        self.tokens, self.holders = list(tokens), 1
        Page.made += 1


# %% tags=["exercise"]
class Table:
    """A sequence of tokens in pages of SIZE, which forks share."""

    def __init__(self):
        self.pages = []

    def tokens(self):
        return [t for page in self.pages for t in page.tokens]

    def fork(self):
        """Another table with the same pages; each page has a holder more."""
        raise NotImplementedError

    def append(self, token):
        """Add one token."""
        raise NotImplementedError


# %% tags=["check"]
with check("a table of pages"):
    a = Table()
    for t in range(6):
        a.append(t)
    assert [p.tokens for p in a.pages] == [[0, 1, 2, 3], [4, 5]], [p.tokens for p in a.pages]
    made = Page.made
    b = a.fork()
    assert Page.made == made, "a fork copies nothing"
    b.append(99)
    assert a.tokens() == [0, 1, 2, 3, 4, 5], "the fork wrote into a's page"
    assert b.tokens() == [0, 1, 2, 3, 4, 5, 99], b.tokens()
    assert Page.made == made + 1, "one page is copied, the full one stays shared"
    a.append(7)
    assert Page.made == made + 1, "a holds its last page alone again: no copy is needed"

# %% [markdown]
# ## Part 4. What sharing is good for
#
# Which ending fits a story? Read the story **once**, fork it for each ending, and add up the log probabilities.

# %%
story = tokenizer.encode("Tom saw a big dog. He was scared. He ran to his")
endings = [" mom", " house", " friend", " dog", " ball", " spoon"]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


base = model.new_state()
model.logits(story[:-1], state=base)
score = {}
for ending in endings:
    branch, tail = base.fork(), tokenizer.encode(ending, add_special=False)
    rows = log_softmax(model.logits([story[-1], *tail[:-1]], state=branch))
    score[ending] = float(rows[np.arange(len(tail)), tail].sum())
plots.bars(
    endings, {"log probability": list(score.values())}, xlabel="log probability of the ending"
)

# %% [markdown]
# **Predict.** Read story and ending anew, without a state. Are the numbers equal to the last bit, or nearly?

# %%
for ending in endings[:3]:
    tail = tokenizer.encode(ending, add_special=False)
    rows = log_softmax(model.logits([*story, *tail[:-1]])[len(story) - 1 :])
    fresh = float(rows[np.arange(len(tail)), tail].sum())
    print(f"{ending!r:10} anew {fresh!r}, forked {score[ending]!r}")
    assert fresh == score[ending]

# %% [markdown]
# Equal to the last bit, whatever was read together and what apart. That is not a matter of course: most engines give
# slightly different numbers for one token and for many. It is worth some care, because only then does a cache change
# *nothing*.
#
# ### Exercise 4: the surprise of each word
#
# For a text compute each token's surprise (minus the log probability), given those before it, in **one** pass.


# %% tags=["exercise"]
def surprises(model, ids):
    """Surprise of ids[1], ids[2], ... -> float array [len(ids) - 1]."""
    raise NotImplementedError


# %% tags=["check"]
with check("surprise"):
    got = surprises(model, ids[:50])
    assert got.shape == (49,), f"the shape is {got.shape}"
    assert (got >= -1e-6).all(), "a log probability is never positive"
    one = -log_softmax(model.logits(ids[:10])[-1])[ids[10]]
    assert np.isclose(got[9], one, atol=1e-5), "row i of the logits is about token i + 1"

# %% [markdown]
# ## Part 5. Windows
#
# Must every layer see everything? Some models let most layers look back a fixed number of positions only, a *window*.
# The picture shows who sees whom. Above the diagonal is the future.


# %%
def seen(n, window):
    """Who (row) sees whom (column), written out slowly."""
    return np.array(
        [[j <= i and (not window or j > i - window) for j in range(n)] for i in range(n)]
    )


plots.heat(
    {"everything": seen(24, 0).astype(float), "a window of 6": seen(24, 6).astype(float)},
    numbers=False,
)

# %% [markdown]
# A layer with a window of 512 keeps 512 positions, however long the text. Pages that all such layers have left behind are
# given back. Information from further back still arrives: each layer carries it one window on, so four layers reach
# four windows back.
#
# ### Exercise 5: what windows save
#
# A model has `n_layer` layers, of which every `every`-th sees everything and the others a window. How many positions does
# the cache hold, summed over layers, after n tokens?


# %% tags=["exercise"]
def held(n, n_layer, window, every):
    """Positions that all layers together keep; layers every - 1, 2 * every - 1, ... see everything."""
    raise NotImplementedError


# %% tags=["check"]
with check("windows"):
    assert held(100, 6, 512, 6) == 600, "a short text: all layers hold all of it"
    assert held(10_000, 6, 512, 6) == 10_000 + 5 * 512, "one layer of six sees everything"
    assert held(10_000, 26, 512, 6) == 4 * 10_000 + 22 * 512, "layers 5, 11, 17 and 23 of 26"

# %% [markdown]
# ## Part 6. A smaller cache
#
# Keys and values can be quantised like weights: `kv_type="q8_0"` keeps 32 numbers in 34 bytes, a byte for each and
# two for the scale that they share.
#
# **Predict.** Which loses more, halves instead of floats, or 8 bits instead of halves? By what factor?

# %%
logits = {}
for kind in ("f32", "f16", "q8_0"):
    with tinyllm.load(device="reference", kv_type=kind) as m:
        logits[kind] = m.logits(ids[:200])
spread = logits["f32"].std()
off = {k: np.abs(logits[k] - logits["f32"]).mean(-1) / spread for k in ("f16", "q8_0")}
plots.lines(
    {k: (range(200), v + 1e-9) for k, v in off.items()},
    xlabel="position",
    ylabel="mean difference of logits / their spread",
    log="y",
)

# %%
a = log_softmax(logits["f32"])
for k in ("f16", "q8_0"):
    b = log_softmax(logits[k])
    kl = (np.exp(a) * (a - b)).sum(-1).mean()
    same = (logits[k].argmax(-1) == logits["f32"].argmax(-1)).mean()
    print(
        f"{k:5} KL {kl:.1e}, the same likeliest token at {same:.1%} of positions, {off[k].mean():.1e} of the spread"
    )

# %% [markdown]
# KL, the Kullback-Leibler divergence, is what a token costs more, in nats, if you believe the rounded probabilities. Eight
# bits lose some twenty times as much as halves, and still far less than weights do: in six bits (Q6_K) this model's come
# to 3e-4. It is nearly free. Four bits are not: keys have a few large columns.
#
# ## Part 7. Why decoding is still slow
#
# With the cache, one token costs one pass through the model. In that pass **every weight is read from memory once**, to be
# multiplied with a single vector. Read a prompt of 64 tokens, and each weight that is read serves 64 vectors.

# %%
counts = [1, 2, 4, 8, 16, 32, 64, 128]
fresh = model.new_state()
model.logits(ids[:1], state=fresh)
each = [seconds(lambda n=n: model.logits(ids[1 : 1 + n], state=fresh.fork())) for n in counts]
plots.lines(
    {
        "time of the step": (counts, [1e3 * t for t in each]),
        "time for one token": (counts, [1e3 * t / n for t, n in zip(each, counts, strict=True)]),
    },
    xlabel="tokens in one step",
    ylabel="ms",
    log="xy",
)

# %% [markdown]
# Eight tokens take hardly longer than one. So a machine that writes for one user is idle most of the time, waiting for
# memory; a server lets several conversations share a step; and speculation guesses a few tokens ahead and has them
# checked in one. Notebook 8 turns this into numbers: what your machine's memory allows, in tokens a second.
#
# ### Exercise 6: side by side
#
# `model.generate` takes a list of prompts, too. Measure how many tokens a second come out for 1 and for 8 prompts. Return
# both. (A clock is never asserted upon here: the check looks at the form only. But look at the numbers!)


# %% tags=["exercise"]
def throughput(model, n_prompts, n_tokens=24):
    """Tokens a second of n_prompts texts written side by side."""
    raise NotImplementedError


# %% tags=["check"]
with check("side by side"):
    one, eight = throughput(model, 1), throughput(model, 8)
    assert min(one, eight) > 0, "tokens divided by seconds"
    print(f"{one:.0f} tokens/s alone, {eight:.0f} tokens/s for eight side by side")

# %%
model.close()

# %% [markdown]
# ## To think about
#
# 1. A conversation grows beyond the context. You could drop its oldest tokens, but the keys of the others have been
#    *turned* to their positions. What must be done to them? (`State.shift` does it.)
# 2. Two users' prompts begin with the same 2000 tokens of instructions. Draw the pages of both.
# 3. Recurrent models (Mamba, RWKV) keep a state of fixed size instead of a cache. What can such a state not do that a table
#    of pages can?
