# %% [markdown]
# # Solutions: one token through the model

# %%
# cosines
def cosines(table, v):
    """Products, divided by both lengths."""
    return table @ v / (np.linalg.norm(table, axis=1) * np.linalg.norm(v))


# %%
# the norm
def rms_norm(x, weight, eps):
    """The mean is over a row's columns."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


# %%
# queries
def queries(h, w):
    """Each head of each token, turned to the token's position."""
    q = (h @ w.T).reshape(len(h), -1, D)
    return np.stack([[turned(x, t) for x in heads] for t, heads in enumerate(q)]).reshape(
        len(h), -1
    )


# %%
# habits of heads
def habits(acts, n_layer):
    """The diagonal below the main one, and the first column, without the rows 0 and 1."""
    p = np.stack([acts[f"blk.{i}.attn_probs"] for i in range(n_layer)])
    previous = np.diagonal(p, -1, 2, 3)[..., 1:].mean(-1)
    return previous, p[:, :, 2:, 0].mean(-1)


# %%
# feed-forward
def feed_forward(h, gate, up, down):
    """The gate goes through silu."""
    g = h @ gate.T
    inner = g / (1 + np.exp(-g)) * (h @ up.T)
    return inner, inner @ down.T


# %%
# shares
def shares_of(word, acts):
    """The norm's division is the same for all parts: that of the whole stream."""
    x = acts["blk.3.out"][-1]
    direction = W["output_norm"] * W["token_embd"][word] / np.sqrt((x**2).mean() + config.norm_eps)
    return {n: float(acts[n][-1] @ direction) for n in parts}


# %%
# a head less
def silence(layer, head):
    """A copy with 64 columns of zeros."""

    def tap(name, x):
        if name != f"blk.{layer}.attn_heads":
            return None
        x = np.array(x)
        x[:, 64 * head : 64 * head + 64] = 0
        return x

    return tap
