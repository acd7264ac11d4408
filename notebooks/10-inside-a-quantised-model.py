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
# # 10. Inside a quantised model: who moves the name?
#
# "Once upon a time, there was a little girl named Lily. One day," and the model says: Lily. The name stands four words back. Something
# has carried it to the end of the text. *What?* There are sixteen attention heads and four feed-forward parts, and in this notebook you find
# those that do it, by the method that researchers use: **activation patching**. You do it on the quantised file itself, weights of 8 bits
# and all, which is what people really run.
#
# **Time: 35 minutes.** You should know the residual stream and taps (notebook 4).

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

model = tinyllm.load(kv_type="f32")
config, tokenizer = model.config, model.tokenizer
LAYERS, HEADS, D = config.n_layer, config.n_head[0], config.head_dim


def ids_of(name):
    return tokenizer.encode(f"Once upon a time, there was a little girl named{name}. One day,")


def token(word):
    """The id of a word that is one token."""
    (i,) = tokenizer.encode(word, add_special=False)
    return i


def read(ids):
    """(logits of the last position, activations by name)."""
    kept = ["embd", "out", "attn_heads", "attn_out", "attn_probs"]
    cache = model.run_with_cache(ids, names=kept)
    return cache.logits[-1], cache


CLEAN, OTHER = ids_of(" Lily"), ids_of(" Sue")
WORDS = [tokenizer.token_bytes(i).decode() or "BOS" for i in CLEAN]
PLACE = next(i for i, (a, b) in enumerate(zip(CLEAN, OTHER, strict=True)) if a != b)
z_clean, clean = read(CLEAN)
z_other, other = read(OTHER)


def difference(z):
    """How much likelier Lily is than Sue: logits of the last position -> a number."""
    return float(z[token(" Lily")] - z[token(" Sue")])


print("the texts differ at position", PLACE)
plots.bars(
    ["... named Lily. One day,", "... named Sue. One day,"],
    {"d": [difference(z_clean), difference(z_other)]},
    xlabel="logit of Lily minus logit of Sue",
)

# %% [markdown]
# Two texts that differ in **one token**. One number, the difference of two logits, tells which of the names the model will say. All that follows
# asks: *which activation, carried from the first text over into the second, turns this number?*
#
# ## Part 1. When does it know?
#
# First a look from outside. Behind each layer we read the last position's stream as if it were the end: through the last norm and the table of
# words. This is the **logit lens**, `model.lens`.

# %%
names = ["embd", *[f"blk.{i}.out" for i in range(LAYERS)]]
plots.bars(
    names,
    {
        "d": [difference(model.lens(clean[n][-1])) for n in names],
        "the other text": [difference(model.lens(other[n][-1])) for n in names],
    },
    xlabel="logit of Lily minus Sue, by the lens",
)

# %% [markdown]
# **Predict.** At "embd" the two texts give exactly the same number. Why? And which layers seem to bring the name to the end?
#
# ## Part 2. Patching
#
# The lens shows *when* the name is there. To know *what brings it*, interfere: run the second text (Sue), but put one activation of the first
# (Lily) into it. If the number moves all the way to Lily's, everything that matters went through that activation; if it stays, nothing did.
#
# ### Exercise 1: how much
#
# Turn a number d into a share: 0 where it is that of the other text, 1 where it is that of the clean one.


# %% tags=["exercise"]
def share_of(d, d_other, d_clean):
    """0 at d_other, 1 at d_clean, a straight line between."""
    raise NotImplementedError


# %% tags=["check"]
with check("a share"):
    assert share_of(-2.0, -2.0, 6.0) == 0
    assert share_of(6.0, -2.0, 6.0) == 1
    assert share_of(2.0, -2.0, 6.0) == 0.5, "half of the way"
    assert share_of(10.0, -2.0, 6.0) == 1.5, "it may go too far"


# %% [markdown]
# `model.patched(name, value, ...)` puts a value in the place of an activation as long as its `with` lasts, and `positions=` says where. (You could do
# it with a tap, as in notebook 4.)


# %%
def won_back(name, **part):
    """The share that a run of the other text wins back with (a part of) the clean activation of that name."""
    with model.patched(name, clean[name], **part):
        d = difference(model.logits(OTHER)[-1])
    return (d - difference(z_other)) / (difference(z_clean) - difference(z_other))


print("the embedding of the name:", round(won_back("embd", positions=PLACE), 3))

# %% [markdown]
# That had to be 1: the two texts differ there and nowhere else. Now the stream behind each layer, at each position.
#
# **Predict.** Draw the picture before you run it: rows are layers, columns are words, and a cell is bright if what is needed is *there*. Where is it
# in the beginning, and where in the end?

# %%
grid = np.array([[won_back(n, positions=t) for t in range(len(OTHER))] for n in names])
plots.heat(
    grid, rows=names, columns=WORDS, title="Share won back by patching the stream", numbers=True
)

# %% [markdown]
# Read it from the top down. At first all that matters sits at the name's own position, and in the end all of it is in the last one. In between it
# hardly moves: a few hundredths arrive early, and the last layer fetches the rest, over four words, in one step.
#
# Only attention moves anything between positions. So let us ask the heads.
#
# ## Part 3. The heads
#
# `blk.I.attn_heads` holds the results of all heads of a layer, side by side, 64 columns for each. We patch one head, at all positions.
# The package can do it (`heads=`), but first do it yourself.
#
# ### Exercise 2: patch a head
#
# Write a change (a function that edits x in place) that puts in the clean result of one head, at all positions, and leaves all else.


# %% tags=["exercise"]
def put_head(layer, head):
    """A function change(name, x)."""
    raise NotImplementedError


# %% tags=["check"]
with check("patching a head"):
    change = put_head(2, 1)
    x = np.zeros((len(OTHER), HEADS * D), np.float32)
    change("blk.1.attn_heads", x)
    assert (x == 0).all(), "another layer must stay as it is"
    change("blk.2.attn_heads", x)
    assert np.array_equal(x[:, D : 2 * D], clean["blk.2.attn_heads"][:, D : 2 * D]), (
        "head 1 has the columns 64 to 127"
    )
    assert (x[:, :D] == 0).all(), "head 0 must stay"
    assert (x[:, 2 * D :] == 0).all(), "heads 2 and 3 must stay"


# %% [markdown]
# **Predict.** Of sixteen heads, how many matter: one, a few, or all a little?

# %%
by_head = np.array(
    [[won_back(f"blk.{i}.attn_heads", heads=h) for h in range(HEADS)] for i in range(LAYERS)]
)
plots.heat(
    by_head,
    rows=[f"layer {i}" for i in range(LAYERS)],
    columns=[f"head {h}" for h in range(HEADS)],
    signed=True,
    title="Share won back by one head",
    numbers=True,
)

# %%
LAYER, HEAD = (int(v) for v in np.unravel_index(by_head.argmax(), by_head.shape))
print(f"the strongest: layer {LAYER}, head {HEAD}, {by_head.max():.0%}")
plots.heat(
    clean[f"blk.{LAYER}.attn_probs"][HEAD],
    rows=WORDS,
    columns=WORDS,
    title=f"Where head {HEAD} of layer {LAYER} looks",
)

# %% [markdown]
# Look at the last row: what the comma looks at, from which the next word is chosen. The bright cells say where the head fetches what it brings.
#
# ## Part 4. What does it write?
#
# A head's result is a vector of 64 numbers; a slice of the matrix `attn_output` turns it into 256, which are added to the stream. Seen through the table of
# words, that vector says *words*.
#
# ### Exercise 3: in words
#
# Compute what the head adds to the stream of the last position: `W[f"blk.{layer}.attn_output"]` is [256, 256], a row for each output; a head's 64
# numbers meet the columns 64 h to 64 h + 63. (The model itself multiplies 8-bit weights with activations rounded to 8 bits; your floats will differ a little.)


# %%
with tinyllm.gguf.open(model.path) as file:
    W = {n.removesuffix(".weight"): t.dequantize() for n, t in file.tensors.items()}


# %% tags=["exercise"]
def written(acts, layer, head):
    """What the head adds to the last position's stream, [n_embd]."""
    raise NotImplementedError


# %% tags=["check"]
with check("what a head writes"):
    parts = [written(clean, LAYER, h) for h in range(HEADS)]
    assert parts[0].shape == (config.n_embd,), f"the shape is {parts[0].shape}"
    assert np.allclose(sum(parts), clean[f"blk.{LAYER}.attn_out"][-1], atol=0.05), (
        "the heads' parts sum to attn_out"
    )

# %%
for label, acts in (("Lily", clean), ("Sue", other)):
    result = acts[f"blk.{LAYER}.attn_heads"][-1, HEAD * D : (HEAD + 1) * D]
    said = W[f"blk.{LAYER}.attn_output"][:, HEAD * D : (HEAD + 1) * D] @ result
    best = np.argsort(-(said * W["output_norm"] @ W["token_embd"].T))[:8]
    print(f"the text with {label}: the head says", [tokenizer.decode([int(i)]) for i in best])

# %% [markdown]
# ## Part 5. Is it needed?
#
# Winning back shows that a head *can* bring the name. Is it *needed*? Take it away from the clean text. Zero is a harsh way to do so: no text ever gives
# zeros. Fairer is the head's **mean over other texts**: then it still says "some name", but not which.
#
# ### Exercise 4: the mean
#
# From a list of activation dicts (one for each text) compute the mean of a head's result at each position: [T, 64].


# %% tags=["exercise"]
def mean_head(many, layer, head):
    """The mean over texts of equal length, [T, 64]."""
    raise NotImplementedError


# %% tags=["check"]
with check("the mean"):
    got = mean_head([clean, other], 1, 2)
    a, b = (z["blk.1.attn_heads"][:, 128:192] for z in (clean, other))
    assert got.shape == a.shape, f"the shape is {got.shape}"
    assert np.allclose(got, (a + b) / 2, atol=1e-6)

# %%
GIRLS = [
    n
    for n in (" Lily", " Sue", " Mia", " Anna", " Lucy", " Sara", " Jane", " Amy")
    if len(tokenizer.encode(n, add_special=False)) == 1
]
many = [read(ids_of(n))[1] for n in GIRLS]
print("names of one token:", GIRLS)


def taken(layer, head, how):
    """d of the clean text with a head at zero, or at its mean over the names."""
    key = f"blk.{layer}.attn_heads"
    value = 0 if how == "zero" else np.mean([a[key] for a in many], axis=0)
    with model.patched(key, value, heads=head):
        return difference(model.logits(CLEAN)[-1])


whole = difference(z_clean)
plots.heat(
    {
        how: np.array([[taken(i, h, how) - whole for h in range(HEADS)] for i in range(LAYERS)])
        for how in ("zero", "mean")
    },
    rows=[f"layer {i}" for i in range(LAYERS)],
    columns=[f"head {h}" for h in range(HEADS)],
    signed=True,
    numbers=True,
    title="How d changes without a head",
)

# %% [markdown]
# Compare the two panels. Where they differ much, zero has broken something that has nothing to do with *which* name it is. And compare with the picture
# of part 3: a head that can bring the name alone may be dispensable, because others bring it, too.
#
# Two questions, two experiments, and they are often confused. Patching a clean result *in* asks whether a head is **enough**; taking it *out* asks
# whether it is **needed**. A head that passes the first and fails the second has a double; one that fails the first and passes the second is a part
# of a chain, and brings nothing by itself.
#
# ## Part 6. Does it hold?
#
# One pair of names is an anecdote. **Predict:** will the same head be the strongest for other pairs?


# %%
def effect(a, b):
    """Share won back by each head, for a pair of names, [layers, heads]."""
    ids_a, ids_b, up, down = ids_of(a), ids_of(b), token(a), token(b)
    (za, acts), (zb, _) = read(ids_a), read(ids_b)
    span = (za[up] - za[down]) - (zb[up] - zb[down])
    out = np.zeros((LAYERS, HEADS))
    for i in range(LAYERS):
        for h in range(HEADS):
            with model.patched(f"blk.{i}.attn_heads", acts[f"blk.{i}.attn_heads"], heads=h):
                z = model.logits(ids_b)[-1]
            out[i, h] = ((z[up] - z[down]) - (zb[up] - zb[down])) / span
    return out


pairs = list(zip(GIRLS, GIRLS[1:] + GIRLS[:1], strict=True))[:4]
EFFECTS = {f"{a} / {b}": effect(a, b) for a, b in pairs}
plots.heat(
    EFFECTS,
    rows=[f"layer {i}" for i in range(LAYERS)],
    columns=[f"h{h}" for h in range(HEADS)],
    signed=True,
)

# %% [markdown]
# ### Exercise 5: agreement
#
# Say it with a number: the share of pairs whose strongest head is the same as that of the *mean* over all pairs.


# %% tags=["exercise"]
def agreement(effects):
    """effects: list of arrays [layers, heads] -> a share between 0 and 1."""
    raise NotImplementedError


# %% tags=["check"]
with check("agreement"):
    a, b = np.zeros((2, 2)), np.zeros((2, 2))
    a[0, 1], b[1, 1] = 1.0, 0.5
    assert agreement([a, a, a]) == 1.0
    assert agreement([a, a, b]) == 2 / 3, "the mean's strongest is that of a"
    print(f"here: {agreement(list(EFFECTS.values())):.0%}")

# %%
model.close()

# %% [markdown]
# ## To think about
#
# 1. Patching a head at *all* positions mixes two things: moving the name to the end, and moving it to somewhere in between. How would you tell them apart?
# 2. The parts of several heads do not sum to 1. When would they sum to more, when to less?
# 3. Everything here was done on 8-bit weights. Which of the pictures would change if the weights had 2 bits? (Notebook 11 shows how to measure it.)
