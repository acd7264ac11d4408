# %% [markdown]
# # Solutions: steering, probes, and what quantisation destroys

# %%
# a direction
def direction(good, bad):
    """From the middle of the bad ones to the middle of the good ones."""
    return good.mean(0) - bad.mean(0)


# %%
# a push
def push(where, v, factor):
    """The sum is a new array, of the stream's type."""
    add = np.float32(factor) * v.astype(np.float32)

    def tap(name, x):
        return x + add if name == where else None

    return tap


# %%
# a control
def control(v, rng):
    """Normal numbers point everywhere alike; what lies along v goes."""
    r = rng.standard_normal(v.shape)
    r -= v * (r @ v) / (v @ v)
    return r * np.linalg.norm(v) / np.linalg.norm(r)


# %%
# ridge regression
def ridge(x, y, penalty):
    """The normal equations, with the penalty on their diagonal."""
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


# %%
# a fair score
def balanced(said, label):
    """Each kind counts alike, however rare it is."""
    return float((np.mean(said[label == 1]) + np.mean(~said[label == 0])) / 2)


# %%
# by kind
def by_kind(values, kinds):
    """A mask for each name."""
    kinds = np.array(kinds)
    return {k: float(values[kinds == k].mean()) for k in dict.fromkeys(kinds.tolist())}
