# %% [markdown]
# # Solutions: sampling

# %%
# a draw
def draw(p, u):
    """The first place where the sum passes u."""
    return int(np.searchsorted(np.cumsum(p), u, side="right"))


# %%
# top-p and min-p
def top_p(logits, p):
    """One more than those whose sum stays below p."""
    e = np.exp(logits - logits[0])
    return int((np.cumsum(e / e.sum()) < p).sum()) + 1


def min_p(logits, share):
    """A share of probabilities is a difference of logits; a little room for rounding."""
    return int((logits >= logits[0] + np.log(share) - 1e-12).sum())


# %%
# penalties
def penalise(logits, recent, repeat=1.0, presence=0.0, frequency=0.0):
    """Each distinct token once; frequency counts how often it came."""
    z = np.array(logits)
    for i in set(recent):
        z[i] = z[i] / repeat if z[i] > 0 else z[i] * repeat
        z[i] -= presence + frequency * list(recent).count(i)
    return z


# %%
# another branch
def what_if(done, k, n):
    """`top` lists the likeliest first."""
    other = next(i for i in done.logprobs[k].top if i != done.ids[k])
    new = [*done.ids[:k], other]
    return new + model.generate([*done.prompt_ids, *new], max_tokens=n, temperature=0).ids


# %%
# times
def allowed(text):
    """A beginning of dd:dd is what some time begins with."""
    times = [f"{h:02d}:{m:02d}" for h in range(24) for m in range(60)]
    begun = {t[: n + 1].encode() for t in times if t.startswith(text) for n in range(len(text), 5)}
    pieces = (tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab))
    return np.array([piece != b"" and text.encode() + piece in begun for piece in pieces])


# %%
# a decision
def decide(prompt, neutral, answers):
    """How much the prompt moved each answer, as probabilities."""
    z = np.array([log_probability(prompt, a) - log_probability(neutral, a) for a in answers])
    e = np.exp(z - z.max())
    return dict(zip(answers, (e / e.sum()).tolist(), strict=True))
