# %% [markdown]
# # Solutions: quantisation

# %%
# unpacking Q4_0
def unpack_q4_0(raw):
    """Low halves are weights 0 to 15, high halves 16 to 31."""
    d = raw[:, :2].copy().view("<f2").astype(np.float32)
    q = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1)
    return d * (q.astype(np.float32) - 8)


# %%
# a better scale
def best_scales(x):
    """All 41 scales of all blocks at once: [41, n, 1]."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    scales = np.linspace(0.8, 1.2, 41, dtype=np.float32)[:, None, None] * largest / -8
    y = scales * np.clip(np.rint(x / scales), -8, 7)
    best = ((x - y) ** 2).sum(-1).argmin(0)
    return scales[best, np.arange(len(x)), 0]


# %%
# bits
def bits_of(kind):
    """The type's size, and that of its fields of codes."""
    f = quants.FORMATS[kind]
    codes = sum(f.dtype[n].itemsize for n in f.dtype.names if n in ("qs", "ql", "qh", "hmask"))
    return 8 * f.dtype.itemsize / f.block_size, codes / f.dtype.itemsize


# %%
# a code book
def nearest(x, table):
    """How many borders between neighbours lie below x."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, x)


# %%
# a budget
def best_two(alone, weights_in):
    """The bits added for each weight are the same for all kinds: divide by the number of weights."""
    return sorted(alone, key=lambda p: -alone[p] / weights_in[p])[:2]


# %%
# importance
def weighted_scales(x, importance):
    """As before, with each square weighed."""
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    best, scale = np.full(len(x), np.inf), np.empty(len(x), np.float32)
    for share in np.linspace(0.8, 1.2, 41, dtype=np.float32):
        s = share * largest[:, 0] / -8
        e = (importance * (x - s[:, None] * np.clip(np.rint(x / s[:, None]), -8, 7)) ** 2).sum(1)
        better = e < best
        best[better], scale[better] = e[better], s[better]
    return scale
