# %% [markdown]
# # Solutions: a GGUF file by hand

# %%
# a string
def read_string(data, at):
    """The length is a Q at `at`; the text follows it."""
    (n,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + n].decode("utf-8"), at + 8 + n


# %%
# where it ends
def n_bytes(shape, kind):
    """Numbers, times bytes for each."""
    n = int(np.prod(shape))
    return 4 * n if kind == "F32" else n // 32 * 34


# %%
# a matrix
def decode_q8_0(blocks, shape):
    """A column of scales [n, 1] times the codes [n, 32]."""
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]).reshape(shape)


# %%
# the second path
def second_story(prompt, n):
    """Differences of logits are logarithms of ratios of probabilities."""
    ids = list(prompt)
    for _ in range(n):
        z = logits_of(ids)
        one, two = np.argsort(-z)[:2]
        ids.append(int(two if z[two] - z[one] >= np.log(1 / 3) else one))
    return ids[len(prompt) :]
