# %% [markdown]
# # Solutions: rooflines

# %%
# bytes of a token
def bytes_of_token(tensors):
    """One row of a table that is no output is next to nothing."""
    apart = "output.weight" in tensors
    return sum(t.nbytes for n, t in tensors.items() if not (apart and n == "token_embd.weight"))


# %%
# a fit
def fit(sizes, tokens_per_second):
    """Seconds are a line over bytes: its slope is 1 / speed."""
    slope, fixed = np.polyfit(np.asarray(sizes, float), 1 / np.asarray(tokens_per_second, float), 1)
    return fixed, 1 / slope


# %%
# depth
def tokens_per_second(weights, speed, depth=0, n_layer=32, n_head_kv=8, head_dim=128):
    """Keys and values, two bytes each."""
    return speed / (weights + depth * n_layer * n_head_kv * head_dim * 2 * 2)


# %%
# a roof
def roof_of(t, n_bytes, n_macs, read, dot):
    """The smaller of what memory and what arithmetic allow."""
    return min(t * read / n_bytes, dot / n_macs)


# %%
# Amdahl
def whole_faster(share, factor):
    """What was left alone takes its time; the part takes a fraction."""
    return 1 / (1 - share + share / factor)


# %%
# what to buy
def will_do(memory, wanted):
    """Bytes of a token at depth 4096: weights and cache."""
    n_bytes = 4.9e9 + 4096 * 131072
    return [name for name, gb in memory.items() if 0.75 * gb * 1e9 / n_bytes >= wanted]
