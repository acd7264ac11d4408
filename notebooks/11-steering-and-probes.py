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
# # 11. Steering, probes, and what quantisation destroys
#
# "One day, Tim went to the park. Tim was very", and the model must say how Tim feels. Somewhere in its stream of 256 numbers there is a *mood*. In
# this notebook you find it, push it until the model says what you want, read other things out of the stream that no word shows, and see which of all
# this is still there when the weights have two bits.
#
# **Time: 50 minutes.** You should know the residual stream and taps (notebook 4), and what the formats are (notebook 3).

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

model = tinyllm.load(kv_type="f32")
tokenizer, LAYERS, E = model.tokenizer, model.config.n_layer, model.config.n_embd
STREAM = ["embd", *[f"blk.{i}.out" for i in range(LAYERS)]]  # before and behind each layer


def token(word):
    """The id of a word that is one token."""
    (i,) = tokenizer.encode(word, add_special=False)
    return i


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def read(ids, model=model):
    """(logits [T, n_vocab], the stream by name, [T, n_embd] each)."""
    cache = model.run_with_cache(ids, names=STREAM)
    return cache.logits, cache


# %%
NAMES = ["Lily", "Tom", "Ben", "Sue", "Mia", "Tim", "Max", "Anna"]
GOOD = [
    "{n} found a new toy. {n} smiled.",
    "{n} played with a friend all day.",
    "Mom gave {n} a hug.",
]
BAD = ["{n} lost a toy. {n} cried.", "{n} fell and got hurt.", "Mom was angry with {n}."]


def texts(beginnings, names):
    return [tokenizer.encode(f"{b} {{n}} was very".format(n=n)) for b in beginnings for n in names]


def mood(z):
    """How much likelier "happy" is than "sad": logits of the last position -> a number."""
    return float(z[token(" happy")] - z[token(" sad")])


plots.bars(
    [b.format(n="Lily") + " Lily was very ..." for b in GOOD + BAD],
    {"mood": [mood(model.logits(ids)[-1]) for ids in texts(GOOD + BAD, ["Lily"])]},
    xlabel="logit of happy minus logit of sad",
)

# %% [markdown]
# The last four tokens of all six texts are equal. The model has read what came before, and holds it against them. That is a mood, and it must be
# *in the stream* of the last position: nothing else goes to the logits.
#
# ## Part 1. A direction
#
# The stream has 256 numbers, and none of them is called "mood". But take many good texts and many bad ones: what they talk about averages out, and
# what is left between the two means is what the groups differ in. This is the **difference of means**, the simplest way to find a direction, and
# often the best.
#
# ### Exercise 1: a direction
#
# Write the difference of the two means.


# %% tags=["exercise"]
def direction(good, bad):
    """Arrays [m, n_embd] and [n, n_embd], a row for each text -> [n_embd], pointing to the good ones."""
    raise NotImplementedError


# %% tags=["check"]
with check("a direction"):
    a, b = np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 4.0]])
    assert direction(a, b).shape == (2,), "a number for each column"
    assert np.allclose(direction(a, b), [2.0, 0.0]), (
        "the mean of the good minus the mean of the bad"
    )

# %%
KNOWN, NEW = NAMES[:5], NAMES[5:]  # names that the direction is made from, and others to try it on


def last_rows(beginnings, names):
    """The stream of the last position of each text, by name, [n, n_embd]."""
    runs = [read(ids)[1] for ids in texts(beginnings, names)]
    return {name: np.array([run[name][-1] for run in runs]) for name in STREAM}


good, bad = last_rows(GOOD, KNOWN), last_rows(BAD, KNOWN)
V = {name: good[name].mean(0) - bad[name].mean(0) for name in STREAM}
print("length of the direction:", {n: round(float(np.linalg.norm(v)), 2) for n, v in V.items()})

# %% [markdown]
# Behind the embedding it has no length at all: there the last position is the word "very", whatever came before.
#
# **Predict.** Now take texts with names that the direction has never seen, and measure how far each lies along it. From which layer on can you tell
# the good ones from the bad?

# %%
new_good, new_bad = last_rows(GOOD, NEW), last_rows(BAD, NEW)


def along(x, v):
    """Where rows lie along v, in units of its length: 0 and 1 are one mean difference apart."""
    return x @ v / (v @ v)


middle = {n: (good[n].mean(0) + bad[n].mean(0)) / 2 for n in STREAM}
plots.heat(
    {
        title: np.array([along(x[n] - middle[n], V[n]) for n in STREAM[1:]])
        for title, x in (("good texts", new_good), ("bad texts", new_bad))
    },
    rows=STREAM[1:],
    columns=[f"{n}, text {i + 1}" for i in range(len(GOOD)) for n in NEW],
    signed=True,
    numbers=True,
    title="Where new texts lie along the direction",
)

# %% [markdown]
# ## Part 2. Steering
#
# If the direction *is* the mood, then adding it to the stream should change the mood, in any text. So take a text that says nothing about feelings.
#
# ### Exercise 2: a push
#
# Write a tap that adds `factor * v` to the activation `name`, at all positions, and leaves all else alone. (A tap gets (name, x), and what it returns
# takes the place of x; None leaves it.)


# %% tags=["exercise"]
def push(where, v, factor):
    """A tap that adds factor * v to the activation called `where`."""
    raise NotImplementedError


# %% tags=["check"]
with check("a push"):
    tap, x = push("blk.1.out", np.ones(3, np.float32), 2.0), np.zeros((4, 3), np.float32)
    assert tap("blk.2.out", x) is None, "other activations stay: return None"
    assert np.array_equal(tap("blk.1.out", x), np.full((4, 3), 2.0)), (
        "factor times v at each position"
    )
    assert (x == 0).all(), "x itself must stay as it is: return a new array"
    assert tap("blk.1.out", x).dtype == np.float32, "the stream is float32"


# %% [markdown]
# The package has this push as a context: `with model.steered({name: vector}, scale=factor)`. It also lasts while the model writes.

# %%
PLAIN = tokenizer.encode("One day, Tim went to the park. Tim was very")
FACTORS = [-4, -3, -2, -1, 0, 1, 2, 3, 4]


def steered(ids, where, v, factor, model=model):
    """Logits [T, n_vocab] of a text with factor * v added to the stream."""
    with model.steered({where: v}, scale=factor):
        return model.logits(ids)


def moods(where, v):
    return [mood(steered(PLAIN, where, v, f)[-1]) for f in FACTORS]


# %% [markdown]
# **Predict.** Which layer is the best place to push? Early, so that the model has time to think about it, or late, where it cannot be overruled?

# %%
curves = {n: moods(n, V[n]) for n in STREAM[1:]}
plots.lines(
    {n: (FACTORS, ys) for n, ys in curves.items()},
    xlabel="how many times the direction is added",
    ylabel="mood: happy minus sad",
)

# %% [markdown]
# All rise, and the later ones rise most: their directions are longer, and fewer layers come behind that could take it back. The last one is no test
# of thought at all: behind it there are only a norm and the table of words, so its direction points straight from "sad" to "happy".
#
# ### Exercise 3: a control
#
# Would *any* push do this? Make a direction at random: as long as v, and at a right angle to it. (Draw 256 normal numbers, take away what
# lies along v, stretch the rest.)


# %% tags=["exercise"]
def control(v, rng):
    """A random vector with the length of v, at a right angle to v."""
    raise NotImplementedError


# %% tags=["check"]
with check("a control"):
    rng = np.random.default_rng(0)
    v = V["blk.2.out"]
    r, s = control(v, rng), control(v, rng)
    assert r.shape == v.shape, f"the shape is {r.shape}"
    assert np.isclose(np.linalg.norm(r), np.linalg.norm(v), rtol=1e-4), "as long as v"
    assert abs(r @ v) < 1e-3 * (v @ v), "at a right angle to v"
    assert not np.allclose(r, s), "each draw is another"


# %%
def at_random(v, rng):
    """The answer of exercise 3."""
    r = rng.standard_normal(v.shape)
    r -= v * (r @ v) / (v @ v)
    return r * np.linalg.norm(v) / np.linalg.norm(r)


PLACE = "blk.2.out"
rng = np.random.default_rng(7)
randoms = {f"random {i}": (FACTORS, moods(PLACE, at_random(V[PLACE], rng))) for i in (1, 2, 3)}
plots.lines(
    {"the direction": (FACTORS, curves[PLACE]), **randoms},
    xlabel="how many times it is added",
    ylabel="mood: happy minus sad",
    title=PLACE,
)

# %% [markdown]
# A random push moves the mood a little, too. Only what stands clearly above such controls is a finding, and the direction does. Now let it write.

# %%
story = tokenizer.encode("One day, Tim went to the park. Tim was very")
for factor in (-3, 0, 3):
    for seed in (1, 2):
        with model.steered({PLACE: V[PLACE]}, scale=factor):
            said = model.generate(story, max_tokens=24, seed=seed, temperature=0.5)
        print(f"{factor:+d}  ... very{str(said)!r}")

# %% [markdown]
# ### What it costs
#
# A push says "happy" at *every* position, also where the story speaks of a tree. **Predict:** how does the perplexity of an ordinary story change with
# the factor? (Perplexity: as unsure as a choice among so many tokens.)

# %%
begin = tokenizer.encode("Once upon a time")
STORIES = [begin + model.generate(begin, max_tokens=150, seed=s).ids for s in range(20)]
ORDINARY = STORIES[5][:120]


def perplexity(z, ids):
    return float(np.exp(-log_softmax(z)[np.arange(len(ids) - 1), ids[1:]].mean()))


costs = {
    label: (
        FACTORS,
        [perplexity(steered(ORDINARY, PLACE, v, f), ORDINARY) for f in FACTORS],
    )
    for label, v in (("the direction", V[PLACE]), ("random", at_random(V[PLACE], rng)))
}
plots.lines(
    costs, xlabel="how many times it is added", ylabel="perplexity of an ordinary story", log="y"
)

# %% [markdown]
# The price is small at first and then rises steeply, and a random push of the same length costs about as much: it is not the mood that spoils the
# story, but *any* push. One length is seen and nearly free; eight would give one word for ever. Who shows only the mood, and not the price, has
# shown half.
#
# ## Part 3. A probe
#
# A difference of means finds what you can write pairs of texts for. A **probe** finds anything for which you have labels. Ours: *is this position
# inside of direct speech?* No word shows it: `ball` looks the same in both. The model needs it, since it has to know whether the next quotation mark
# opens or closes.
#
# The model has written twenty stories for us, and counting marks gives the labels.

# %%
QUOTE = [tokenizer.token_bytes(i).count(b'"') for i in range(tokenizer.n_vocab)]
INSIDE = [np.cumsum([QUOTE[i] for i in ids]) % 2 for ids in STORIES]
ROWS = [read(ids)[1] for ids in STORIES]
STORY = np.concatenate(
    [np.full(len(ids), k) for k, ids in enumerate(STORIES)]
)  # which story a row is of
LABEL = np.concatenate(INSIDE)
print(f"{len(LABEL)} positions of {len(STORIES)} stories, {LABEL.mean():.0%} inside of speech")

# %% [markdown]
# A **linear probe** is a vector w with which `x @ w` is near 1 inside and near 0 outside. With a penalty on the length of w, so that 256 numbers do
# not learn 3000 positions by heart, it has a closed form, **ridge regression**:
#
#     w = inverse(X.T @ X + penalty * I) @ X.T @ y
#
# ### Exercise 4: ridge regression
#
# Compute w. (`np.linalg.solve`, not an inverse.)


# %% tags=["exercise"]
def ridge(x, y, penalty):
    """x [n, d], y [n] -> w [d]."""
    raise NotImplementedError


# %% tags=["check"]
with check("ridge regression"):
    rng = np.random.default_rng(1)
    x, true = rng.standard_normal((200, 6)), np.array([1.0, -2, 0, 0.5, 3, 0])
    assert np.allclose(ridge(x, x @ true, 1e-9), true, atol=1e-6), (
        "without a penalty it finds the truth"
    )
    w = ridge(x, x @ true, 50.0)
    assert np.linalg.norm(w) < np.linalg.norm(true), "a penalty makes it shorter"
    assert np.allclose(x.T @ (x @ true - x @ w), 50 * w), "at the minimum the two forces are equal"

# %% [markdown]
# ### Exercise 5: a fair score
#
# Most positions are outside. A probe that always says "outside" is right most of the time and knows nothing. So take the mean of
# two shares: of the inside positions, how many does it find; of the outside ones, how many does it leave. Then guessing gives one half.


# %% tags=["exercise"]
def balanced(said, label):
    """Booleans [n] and labels 0 or 1 [n] -> a number; 0.5 for one who always says the same."""
    raise NotImplementedError


# %% tags=["check"]
with check("a fair score"):
    label = np.array([0] * 8 + [1] * 2)
    assert balanced(label == 1, label) == 1.0
    assert balanced(np.zeros(10, bool), label) == 0.5, "always outside"
    assert balanced(np.ones(10, bool), label) == 0.5, "always inside"
    assert balanced(np.array([0] * 8 + [1, 0], bool), label) == 0.75


# %%
class Probe:
    """Ridge regression on columns of equal size; the border lies half way between the two kinds."""

    def __init__(self, rows, label, penalty=100.0):
        self.mean, self.size = rows.mean(0), rows.std(0) + 1e-6
        x, y = (rows - self.mean) / self.size, label - label.mean()
        self.w = np.linalg.solve(x.T @ x + penalty * np.eye(E), x.T @ y)
        self.border = (x @ self.w)[label == 1].mean() / 2 + (x @ self.w)[label == 0].mean() / 2

    def scores(self, rows):
        """Above zero: inside of speech."""
        return (rows - self.mean) / self.size @ self.w - self.border

    def judge(self, rows, label):
        """The score of exercise 5."""
        said = self.scores(rows) > 0
        return float((said[label == 1].mean() + (~said[label == 0]).mean()) / 2)


def held_out(rows, label):
    """The mean over five folds; whole stories are held out."""
    folds = [STORY % 5 == fold for fold in range(5)]
    return np.mean([Probe(rows[~f], label[~f]).judge(rows[f], label[f]) for f in folds])


# %% [markdown]
# **Predict.** At "embd" a position knows its own word and nothing else. How well can the probe do there: 50 %, 60 %, 90 %? And behind which layer is it
# best?

# %%
stacked = {n: np.concatenate([r[n] for r in ROWS]) for n in STREAM}
shuffled = np.random.default_rng(2).permutation(LABEL)
plots.bars(
    STREAM,
    {
        "inside of speech": [held_out(stacked[n], LABEL) for n in STREAM],
        "labels shuffled": [held_out(stacked[n], shuffled) for n in STREAM],
    },
    xlabel="balanced score on stories that the probe has not seen",
)

# %% [markdown]
# At "embd" it is better than guessing: `said` stands outside, `you` inside. That is what a probe can do with words alone, and the fair question is
# what comes *on top* of it. The shuffled labels say that the method itself invents nothing.
#
# Whole stories were held out. Had we held out single positions, a probe could know a story by its names, and remember.
#
# What does it see? Here are its scores along a story that it has not seen.

# %%
BEST = max(STREAM, key=lambda n: held_out(stacked[n], LABEL))
SHOWN = max(range(len(STORIES)), key=lambda k: INSIDE[k].sum())  # the story with the most speech
probe = Probe(stacked[BEST][STORY != SHOWN], LABEL[STORY != SHOWN])
ids = STORIES[SHOWN]
start = max(0, int(np.argmax(INSIDE[SHOWN])) - 8)
cut = slice(start, start + 30)
plots.heat(
    np.array([probe.scores(ROWS[SHOWN][BEST][cut]), INSIDE[SHOWN][cut] - 0.5]),
    rows=["probe", "label"],
    columns=[tokenizer.decode([i]).replace("\n", "\\n") for i in ids[cut]],
    signed=True,
    numbers=False,
    title=f"Direct speech, read from {BEST}",
)

# %% [markdown]
# ## Part 4. To read is not to use
#
# The probe reads something. Does the model *use* it? If it does, then pushing the stream along the probe should change what the next quotation mark is:
# `."` or `,"` close, ` "` opens. We measure how likely a closing mark is, and push in the middle of speech and outside.

# %%
CLOSE = [
    i
    for i in range(tokenizer.n_vocab)
    if tokenizer.token_bytes(i)[-1:] == b'"' and tokenizer.token_bytes(i)[:1] != b" "
]
SPEECH = tokenizer.encode('Tim saw a dog. Tim said, "I like your dog')
SILENT = tokenizer.encode("Tim saw a dog. Tim said that he liked the dog")
stream = stacked[BEST]
means = stream[LABEL == 1].mean(0) - stream[LABEL == 0].mean(0)
as_long = np.linalg.norm(means)
by_probe = probe.w / probe.size  # in the units of the stream
ways = {
    "difference of means": means,
    "probe": by_probe * as_long / np.linalg.norm(by_probe),
    "random": at_random(means, rng),
}


def closing(ids, v, factor):
    return float(np.exp(log_softmax(steered(ids, BEST, v, factor)[-1])[CLOSE]).sum())


plots.lines(
    {
        f"{label}, {'in speech' if ids is SPEECH else 'outside'}": (
            FACTORS,
            [closing(ids, v, f) for f in FACTORS],
        )
        for label, v in ways.items()
        for ids in (SPEECH, SILENT)
    },
    xlabel="how many times it is added",
    ylabel="probability that a quotation mark closes",
)

# %% [markdown]
# The three vectors are equally long. The difference of means usually moves the model more than the probe does: a probe looks for whatever tells the
# groups apart with the fewest errors, and may use numbers that the layers behind never look at. *It can be read* is a sentence about the probe; *it is
# used* needs an intervention.
#
# ## Part 5. What quantisation destroys
#
# Notebook 3 measured how far the probabilities move. Now you can ask *what* goes. Here are four files with the weights of this model in ever fewer bits.

# %%
with gguf.open(model.path) as file:
    WEIGHTS = {n: t.dequantize() for n, t in file.tensors.items()}
    METADATA = file.exact_metadata


def squeezed(kind):
    """The model with all matrices in another format."""
    tensors = {
        n: gguf.RawTensor(kind, x.shape, quants.quantize(kind, x)) if x.ndim == 2 else x
        for n, x in WEIGHTS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        gguf.write(path, METADATA, tensors)
        return tinyllm.load(path, kv_type="f32")


KINDS = ["Q6_K", "Q4_K", "Q3_K", "Q2_K"]
MODELS = {k: squeezed(k) for k in KINDS}
SOME = STORIES[:6]
LONG = [i for ids in SOME for i in ids]

# %% [markdown]
# `tinyllm.compare` lets two models read the same text and says how far they are apart (from a shell: `tinyllm compare a.gguf b.gguf`). **Predict:**
# at two bits, how often do both still choose the same next token? And how many words do they write alike, both always taking the likeliest token?

# %%
FOUND = {k: tinyllm.compare(model, m, LONG, n_greedy=40) for k, m in MODELS.items()}
for k, found in FOUND.items():
    begins = found.parting.position - 16 if found.parting else "over 40"  # both go on from 16
    print(
        f"{k}: KL {found.kl[0]:.4f}, perplexity {found.perplexity_b[0]:.2f}"
        f" after {found.perplexity_a[0]:.2f}, the same next token {found.agreement:.0%},"
        f" written alike: {begins} tokens"
    )

# %% [markdown]
# **Along the layers.** It also says how far the stream is from the original's behind each layer, relative to its size. **Predict:** does the error grow
# from layer to layer, or does the model pull itself together?

# %%
plots.lines(
    {k: (range(1, LAYERS + 1), found.layers) for k, found in FOUND.items()},
    xlabel="layers so far",
    ylabel="relative error of the stream",
    log="y",
)

# %% [markdown]
# Four bits are worth more than a factor of ten. And there is hardly any growth: the error comes in with the table of words and in the first layer, and then it
# stays. Each layer adds an error of its own, but it also does what it has learnt to do, and that pulls a stream that is a little off back to where
# streams usually are.
#
# **Which tokens.** The KL divergence at each position, sorted by what the *next* word of the story is.
#
# ### Exercise 6: by kind
#
# Average values by their kind.


# %% tags=["exercise"]
def by_kind(values, kinds):
    """Numbers [n] and a list of n names -> dict of name to the mean of its values."""
    raise NotImplementedError


# %% tags=["check"]
with check("by kind"):
    got = by_kind(np.array([1.0, 2.0, 6.0, 5.0]), ["name", "mark", "name", "word"])
    assert got == {"name": 3.5, "mark": 2.0, "word": 5.0}

# %%
SMALL = "a an the to and in on of was it he she her his that with for is had they".split()


def kind_of(i):
    """What a token is, as far as one sees it."""
    said = tokenizer.decode([int(i)])
    word = said.strip()
    if not any(c.isalpha() for c in word):
        return "mark"
    if said[:1] != " ":
        return "part of a word"
    if word[0].isupper():
        return "name" if word.lower() not in SMALL else "small word"
    return "small word" if word in SMALL else "other word"


NEXT = np.concatenate([ids[1:] for ids in SOME])
KIND = np.array([kind_of(i) for i in NEXT])


def kl(z, truth):
    p, q = log_softmax(truth[:-1]), log_softmax(z[:-1])
    return (np.exp(p) * (p - q)).sum(-1)


TRUTH = [read(ids) for ids in SOME]
RUNS = {k: [read(ids, m) for ids in SOME] for k, m in MODELS.items()}
KL = {
    k: np.concatenate([kl(r[0], t[0]) for r, t in zip(RUNS[k], TRUTH, strict=True)]) for k in KINDS
}
which = sorted(set(KIND.tolist()))
print({w: int((KIND == w).sum()) for w in which})
plots.heat(
    np.array([[KL[k][KIND == w].mean() for w in which] for k in KINDS]),
    rows=KINDS,
    columns=which,
    numbers=True,
    title="KL divergence by what comes next",
)

# %% [markdown]
# At two bits a mark, which grammar decides, loses half as much as a word that carries the *story*. An average over all tokens hides that, and a
# test that counts right endings of sentences may not notice anything.
#
# **What can be read and steered.** The probe was made on the original. Does it still read direct speech in the squeezed models? Does the original's
# direction still steer them?

# %%
label = np.concatenate(INSIDE[: len(SOME)])
probe = Probe(stacked[BEST][STORY >= len(SOME)], LABEL[STORY >= len(SOME)])


def reads(runs):
    return probe.judge(np.concatenate([run[1][BEST] for run in runs]), label)


def steers(m):
    up, down = (mood(steered(PLAIN, PLACE, V[PLACE], f, m)[-1]) for f in (1, -1))
    return (up - down) / 2


whole = (reads(TRUTH), steers(model))
plots.bars(
    ["original", *KINDS],
    {
        "score of the probe": [whole[0], *[reads(RUNS[k]) for k in KINDS]],
        "mood moved by one push": [whole[1], *[steers(m) for m in MODELS.values()]],
    },
)

# %% [markdown]
# Both are hardly touched. A direction is held by many numbers, and the errors of rounding point everywhere: along one direction little of them adds
# up. What a model *has* outlives what it *says*: so a probe, or a push, that was found on the large file may be used on the small one. (Measure it.)
#
# ### Where it enters
#
# One more experiment: `compare` with `tensors="layers"` gives the broken model the original's weights back, those of one layer at a time, or the
# table of words, and says by how much the KL divergence falls. **Predict:** which of them costs most?

# %%
BROKEN = "Q2_K"
cost = tinyllm.compare(model, MODELS[BROKEN], LONG, tensors="layers", n_greedy=0).tensors
plots.bars(
    list(cost), {"KL": list(cost.values())}, xlabel=f"by how much the KL of {BROKEN} falls with it"
)

# %% [markdown]
# The bars add up to nearly the whole: here the errors of one part hardly hide or feed those of another. Somebody who has a few bits to spare gives them
# where a bar is long for the bytes behind it. That is why so many files keep the table of words, which is the head, too, in more bits than the rest.

# %%
for m in (model, *MODELS.values()):
    m.close()

# %% [markdown]
# ## To think about
#
# 1. Your direction was made from "was very". Would it be another one from "felt so"? How would you measure how equal the two are, and what would you
#    compare that number with?
# 2. A probe with a hidden layer scores higher than a linear one. What would it tell you about the model, and what about the probe?
# 3. The KL divergence of a format is a mean over a text. Which text would you choose for a model that has to write code, and which for one that answers
#    children?
