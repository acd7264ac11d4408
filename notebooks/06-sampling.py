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
# # 6. Sampling: from numbers to a choice
#
# A model does not write. It gives a number to each of its 4096 tokens, and somebody must pick one. That somebody is a
# hundred lines of code, and it decides whether a text is dull or wild, whether it repeats itself, whether it is valid JSON,
# and whether an answer can be trusted.
#
# You will write each rule yourself, see the other paths that a text might have taken, hold a text to a form, and
# make decisions with a probability beside them. **Time: 45 minutes.** You need to know what a probability is.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import importlib.util
import json

import numpy as np

import tinyllm
from tinyllm import plots, sampling
from tinyllm.course import check

model = tinyllm.load()
tokenizer = model.tokenizer


def logits_after(text):
    """float64 [n_vocab]: the numbers for the next token."""
    return model.logits(tokenizer.encode(text))[-1].astype(float)


def word(i):
    return repr(tokenizer.decode([int(i)]))


# %% [markdown]
# ## Two questions
#
# Here are the likeliest tokens after two beginnings of a story.

# %%
sure, open_ = (
    logits_after("Once upon a time, there was a little girl named"),
    logits_after("The little dog"),
)
for title, z in (("... a little girl named", sure), ("The little dog ...", open_)):
    p = np.exp(z - z.max())
    p /= p.sum()
    best = np.argsort(-p)[:10]
    display(plots.bars([word(i) for i in best], {"p": p[best]}, xlabel="probability", title=title))

# %% [markdown]
# After the first there is hardly a choice, after the second there are many good ones, and behind them comes a long tail
# of bad ones, each very unlikely, but together? **Predict:** how probable is it, in the second case, that a token *outside*
# of the first forty is drawn?

# %%
p_open = np.exp(open_ - open_.max())
p_open /= p_open.sum()
tail = np.sort(p_open)[::-1].cumsum()
print(
    f"outside of the first 40: {1 - tail[39]:.1%}; in a text of 100 such words at least once: {1 - tail[39] ** 100:.0%}"
)

# %% [markdown]
# A rare mistake at each step is a certain one in a long text; and the model, which takes its own text for granted, goes on
# from there. All the rules below are ways to cut the tail.
#
# ## Part 1. Temperature
#
# The numbers are *logits*: probabilities are `exp(logit)`, divided by the sum. Divide all logits by a **temperature** first,
# and the differences grow (below 1) or shrink (above 1).


# %%
def softmax(z, temperature=1.0):
    e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


best = np.argsort(-open_)[:8]
plots.bars(
    [word(i) for i in best],
    {f"temperature {t}": softmax(open_, t)[best] for t in (0.5, 1.0, 2.0)},
    xlabel="probability",
    title="The little dog ...",
)

# %% [markdown]
# **Predict.** At temperature 2, what happens to the tail of the other four thousand tokens? Guess its share, then run.

# %%
for t in (0.1, 0.5, 1.0, 1.5, 2.0):
    print(
        f"temperature {t}: the likeliest {softmax(open_, t).max():6.1%}, outside of the first 40: {1 - np.sort(softmax(open_, t))[-40:].sum():6.1%}"
    )

# %% [markdown]
# Temperature cannot raise one good alternative without raising all bad ones. At 2 the tail wins by its sheer number.
#
# **A draw** takes a random number u between 0 and 1, and walks along the probabilities until their sum passes u.
#
# ### Exercise 1: draw
#
# Write it: with one random number, from probabilities in any order. The check draws many times and counts.


# %% tags=["exercise"]
def draw(p, u):
    """Index drawn from probabilities p [n] by u in [0, 1)."""
    raise NotImplementedError


# %% tags=["check"]
with check("a draw"):
    p = np.array([0.5, 0.2, 0.3])
    assert [draw(p, u) for u in (0.0, 0.49, 0.51, 0.69, 0.71, 0.999)] == [0, 0, 1, 1, 2, 2]
    assert draw(np.array([0.0, 1.0]), 0.0) == 1, "a probability of 0 is never drawn"
    counts = (
        np.bincount([draw(p, u) for u in np.random.default_rng(0).random(4000)], minlength=3) / 4000
    )
    assert np.abs(counts - p).max() < 0.03, f"frequencies {counts}"

# %% [markdown]
# The random numbers come from a generator with a **seed**. The same seed, the same numbers, the same text; in this package
# to the last letter, on any number of threads, alone or in a batch.

# %%
for seed in (1, 1, 2):
    print(seed, model.generate("The little dog", max_tokens=14, seed=seed).text)

# %% [markdown]
# ## Part 2. Cutting the tail
#
# Three rules say how many of the likeliest tokens remain:
#
# * **top-k**: the k likeliest. 40 of them, whether the model is sure or not.
# * **top-p**: the likeliest until their sum reaches p. Few where the model is sure, many where it is not.
# * **min-p**: all that are at least a share, 5 % say, as likely as the first one.
#
# **Predict.** For the two questions at the top: how many does each rule keep?

# %%
rules = {
    "top-k 40": lambda z: 40,
    "top-p 0.95": lambda z: sampling.top_p(z, 0.95),
    "min-p 0.05": lambda z: sampling.min_p(z, 0.05),
}
ordered = {"... girl named": np.sort(sure)[::-1], "The little dog ...": np.sort(open_)[::-1]}
plots.bars(
    list(rules),
    {k: [f(z) for f in rules.values()] for k, z in ordered.items()},
    xlabel="tokens that remain",
    log=True,
)

# %% [markdown]
# ### Exercise 2: top-p and min-p
#
# Write both, for logits sorted from the largest. Each returns how many remain, at least one.


# %% tags=["exercise"]
def top_p(logits, p):
    """How many of the sorted logits it takes until their probabilities sum to p."""
    raise NotImplementedError


def min_p(logits, share):
    """How many of the sorted logits are at least `share` times as probable as the first."""
    raise NotImplementedError


# %% tags=["check"]
with check("top-p and min-p"):
    z = np.log([0.5, 0.25, 0.15, 0.1])
    assert [top_p(z, p) for p in (0.4, 0.6, 0.8, 0.99)] == [1, 2, 3, 4], (
        "the token that passes p still counts"
    )
    assert [min_p(z, s) for s in (1.0, 0.45, 0.25, 0.1)] == [1, 2, 3, 4]
    for z in ordered.values():
        assert top_p(z, 0.9) == sampling.top_p(z, 0.9)
        assert min_p(z, 0.1) == sampling.min_p(z, 0.1)

# %% [markdown]
# Which settings are good? There are two things to want, and they pull against each other: texts that the model finds
# *likely* (few mistakes), and texts that *differ*. Here both are measured for some temperatures, with and without the rules.

# %%
curves = {}
for name, options in (
    ("all tokens", {"top_k": 0, "top_p": 1.0}),
    ("min-p 0.1", {"top_k": 0, "top_p": 1.0, "min_p": 0.1}),
):
    xs, ys = [], []
    for t in (0.3, 0.6, 1.0, 1.5):
        # the prompts of a list would all draw from one seed: each text gets a call of its own
        texts = [
            model.generate("One day", max_tokens=40, temperature=t, seed=s, logprobs=0, **options)
            for s in range(6)
        ]
        words = [w for x in texts for w in x.text.split()]
        xs.append(len(set(words)) / len(words))
        ys.append(np.mean([token.logprob for x in texts for token in x.logprobs]))
    curves[name] = (xs, ys)
plots.lines(
    curves,
    xlabel="different words / words",
    ylabel="mean log probability of a token",
    title="Temperature 0.3, 0.6, 1.0, 1.5",
)

# %% [markdown]
# Further right is more varied, further up is fewer mistakes. At low temperatures the rule changes nothing, there is no
# tail. At high ones it keeps the text from falling apart.
#
# ## Part 3. Going in circles
#
# The likeliest text is not a good one. Take the likeliest token again and again, and the story ends in a circle; and the
# longer it turns, the surer the model is. **Predict** the end of the curve.

# %%
circle = model.generate("Once upon a time", max_tokens=260, temperature=0, logprobs=0)
print("...", circle.text[-300:])
plots.lines(
    {"p": (range(len(circle.ids)), np.exp([t.logprob for t in circle.logprobs]))},
    xlabel="token",
    ylabel="its probability",
)

# %% [markdown]
# **Penalties** lower the logit of each token that has come lately: `repeat_penalty` divides it (multiplies, where it is
# negative), `presence_penalty` subtracts a number once, `frequency_penalty` for each time.
#
# ### Exercise 3: penalise
#
# Write all three, in this order: divide or multiply, then subtract. Return new logits.


# %% tags=["exercise"]
def penalise(logits, recent, repeat=1.0, presence=0.0, frequency=0.0):
    """logits [n_vocab], recent ids -> new logits [n_vocab]."""
    raise NotImplementedError


# %% tags=["check"]
with check("penalties"):
    z = np.array([2.0, -2.0, 1.0, 0.5])
    assert np.allclose(penalise(z, [0, 1, 1], repeat=2.0), [1.0, -4.0, 1.0, 0.5]), (
        "each token once, however often it came"
    )
    assert np.allclose(penalise(z, [0, 1, 1], presence=0.5, frequency=0.25), [1.25, -3.0, 1.0, 0.5])
    assert z[0] == 2.0, "the given logits must stay"
    mine, theirs = penalise(open_, [5, 5, 900], 1.3, 0.2, 0.1), open_.astype(np.float32)
    sampling.penalise(theirs, [5, 5, 900], 1.3, 0.2, 0.1)
    assert np.allclose(mine, theirs, atol=1e-5)

# %%
for penalty in (1.0, 1.15, 2.0):
    text = model.generate(
        "Once upon a time", max_tokens=220, temperature=0, repeat_penalty=penalty
    ).text
    print(f"repeat_penalty {penalty}: ... {text[-160:]!r}\n")

# %% [markdown]
# A little penalty breaks the circle. A large one spoils the text in another way: what repeats in any good text are "the",
# commas and names.
#
# ## Part 4. The paths not taken
#
# `logprobs=5` reports, for each token, its log probability and the five likeliest. So a text becomes a tree; darker is
# likelier, the line is what was drawn.

# %%
done = model.generate("The little dog", max_tokens=9, seed=4, temperature=1.0, logprobs=5)
columns = [
    [(tokenizer.decode([i]), float(np.exp(v))) for i, v in token.top.items()]
    for token in done.logprobs
]
plots.tree(columns, [tokenizer.decode([t.id]) for t in done.logprobs], title="The little dog ...")

# %% [markdown]
# ### Exercise 4: what if
#
# Take another branch: keep the first `k` tokens of `done`, put the likeliest *other* token on place k, and go on greedily for
# n more. Return all new ids (k + 1 + n of them), without the prompt.


# %% tags=["exercise"]
def what_if(done, k, n):
    """Ids of another story that leaves `done` (a Completion with logprobs) at token k."""
    raise NotImplementedError


# %% tags=["check"]
with check("another branch"):
    other = what_if(done, 2, 5)
    assert len(other) == 8, f"{len(other)} ids, expected 2 + 1 + 5"
    assert list(other[:2]) == done.ids[:2], "the first two stay"
    assert other[2] == next(i for i in done.logprobs[2].top if i != done.ids[2]), (
        "the likeliest that was not taken"
    )
    again = model.generate([*done.prompt_ids, *other[:3]], max_tokens=5, temperature=0).ids
    assert list(other[3:]) == again, "greedy from there: temperature=0"

# %% [markdown]
# ## Part 5. Holding a text to a form
#
# A program that reads an answer needs a form: a number, a date, JSON. Asking nicely is not enough. But the form can be
# *enforced*: before each choice, forbid every token that would break it. The model still chooses among what is allowed.
#
# `logits_processor` is a function that sees the ids so far and the logits, and may change them. Here it lets only digits
# pass.

# %%
digits = np.array([tokenizer.token_bytes(i).isdigit() for i in range(tokenizer.n_vocab)])


def only_digits(ids, logits):
    logits[~digits] = -np.inf


print(
    model.generate(
        "The number of the house is ", max_tokens=4, seed=1, logits_processor=only_digits
    ).text
)

# %% [markdown]
# Held to the digits, the model has no way to stop, either. For more than that the allowed set must depend on what has been written. A small machine does it: a *state* for each
# point of the form, and for each state what may come.
#
# **Predict.** A time has the form `dd:dd`. A token may be `1`, but also `12`, or `:3`. Why is it not enough to
# list, for each place, the allowed *characters*?
#
# ### Exercise 5: times
#
# Write `allowed(text)`: a boolean array that says, for each token, whether `text` plus the token's bytes is a *beginning*
# of a text `dd:dd`, with hours 00 to 23 and minutes 00 to 59. At the end (5 characters) nothing more may come.


# %% tags=["exercise"]
def allowed(text):
    """text so far, a str -> bool [n_vocab]."""
    raise NotImplementedError


# %%
def draw_one(z, seed):
    """A token drawn from logits, for the check."""
    p = np.exp(z - z.max())
    return int(np.random.default_rng(seed).choice(len(p), p=p / p.sum()))


# %% tags=["check"]
with check("times"):
    names = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]

    def which(text):
        return {n for n, ok in zip(names, allowed(text), strict=True) if ok}

    assert {b"0", b"1", b"2"} <= which(""), "an hour begins with 0, 1 or 2"
    assert b"3" not in which(""), "no hour begins with 3"
    assert b"" not in which(""), "control tokens add no byte: forbid them"
    assert b":" in which("12"), "a colon after two digits"
    assert b"4" not in which("2"), "24 is no hour"
    assert which("12:30") == set(), "a time is complete"
    for seed in range(3):
        text = ""
        while len(text) < 5:
            ids = tokenizer.encode("It was ") + tokenizer.encode(text, add_special=False)
            z = model.logits(ids)[-1].copy()
            z[~allowed(text)] = -np.inf
            text += tokenizer.decode([draw_one(z, seed)])
        assert 0 <= int(text[:2]) < 24, text
        assert 0 <= int(text[3:]) < 60, text


# %% [markdown]
# The package has this for regular expressions, JSON schemas and grammars, with all masks computed by a library written for
# it (llguidance, the extra `[json]`). What is forced, such as braces and keys, is not even computed.

# %%
person = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
if importlib.util.find_spec("llguidance"):
    for seed in range(3):
        done = model.generate(
            "This is what we know about the girl: ", max_tokens=40, seed=seed, json_schema=person
        )
        print(
            done.finish_reason, json.loads(done.text) if done.finish_reason == "stop" else done.text
        )
    print(model.generate("It was ", seed=2, regex=r"([01][0-9]|2[0-3]):[0-5][0-9]").text)
else:
    print("pip install llguidance, and run this cell again")

# %% [markdown]
# The form is right by construction. What stands *in* it is the model's affair: a small model invents a name, and an age.
#
# ## Part 6. Decisions
#
# Often no text is wanted at all, but a choice among a few. Don't let the model write and then search its text: look at
# the probabilities of the answers. An answer's probability is the product over its tokens.


# %%
def log_probability(prompt, answer):
    """Log probability of the answer's tokens behind the prompt."""
    head = tokenizer.encode(prompt)
    tail = tokenizer.encode(answer, add_special=False)
    rows = model.logits([*head, *tail[:-1]])[len(head) - 1 :].astype(float)
    rows -= rows.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    return rows[np.arange(len(tail)), tail].sum()


stories = {
    "Tom lost his ball. Tom felt": (" happy", " sad"),
    "Lily got a new toy. Lily felt": (" happy", " sad"),
    "The dog ran away. Mia felt": (" happy", " sad"),
    "They ate cake and danced. They felt": (" happy", " sad"),
}
share = {}
for prompt, (good, bad) in stories.items():
    a, b = log_probability(prompt, good), log_probability(prompt, bad)
    share[prompt] = 1 / (1 + np.exp(b - a))
plots.bars(
    list(share), {"p(happy)": list(share.values())}, xlabel="probability of happy against sad"
)

# %% [markdown]
# **Predict.** Is 50 % the right border between happy and sad? What does the model say if there is *no* story at all, only
# "Tom felt"?

# %%
prior = log_probability("Tom felt", " happy") - log_probability("Tom felt", " sad")
print(f"without a story: p(happy) = {1 / (1 + np.exp(-prior)):.0%}")

# %% [markdown]
# A model prefers some answers before it has read anything. Subtract that: what counts is how much the *story* moved
# the odds.
#
# ### Exercise 6: decide
#
# Write `decide(prompt, neutral, answers)`: for each answer the log probability behind the prompt minus that behind the
# neutral prompt, and of these a softmax. Return a dict of answer to probability.


# %% tags=["exercise"]
def decide(prompt, neutral, answers):
    """{answer: probability}, corrected by what the model says to the neutral prompt."""
    raise NotImplementedError


# %% tags=["check"]
with check("a decision"):
    same = decide("Tom felt", "Tom felt", [" happy", " sad", " very tired"])
    assert all(np.isclose(v, 1 / 3) for v in same.values()), "no story, no opinion: a third each"
    got = decide("Tom lost his ball. Tom felt", "Tom felt", [" happy", " sad"])
    assert np.isclose(sum(got.values()), 1), "probabilities sum to 1"
    a = log_probability("Tom lost his ball. Tom felt", " sad") - log_probability("Tom felt", " sad")
    b = log_probability("Tom lost his ball. Tom felt", " happy") - log_probability(
        "Tom felt", " happy"
    )
    assert np.isclose(got[" sad"], 1 / (1 + np.exp(b - a)))

# %%
model.close()

# %% [markdown]
# ## To think about
#
# 1. Why is the *most probable* text of 100 tokens so often empty, or a circle? (What has a product of many numbers below 1
#    to do with it?)
# 2. Temperature 0 "takes the likeliest". Two computers may still give different texts at temperature 0. How?
# 3. Holding a text to a form changes the distribution: is a draw under a constraint the same as drawing freely until a text
#    happens to have the form? Find a small example where it is not.
