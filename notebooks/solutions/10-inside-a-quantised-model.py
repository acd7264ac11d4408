# %% [markdown]
# # Solutions: inside a quantised model

# %%
# a share
def share_of(d, d_other, d_clean):
    """How far on the way from the other text to the clean one."""
    return (d - d_other) / (d_clean - d_other)


# %%
# patching a head
def put_head(layer, head):
    """64 columns of one activation."""
    cut = slice(head * D, (head + 1) * D)

    def change(name, x):
        if name == f"blk.{layer}.attn_heads":
            x[:, cut] = clean[name][:, cut]

    return change


# %%
# what a head writes
def written(acts, layer, head):
    """A slice of columns of the output matrix times the head's numbers."""
    cut = slice(head * D, (head + 1) * D)
    return W[f"blk.{layer}.attn_output"][:, cut] @ acts[f"blk.{layer}.attn_heads"][-1, cut]


# %%
# the mean
def mean_head(many, layer, head):
    """Texts of one length have their words at the same positions."""
    return np.mean(
        [a[f"blk.{layer}.attn_heads"][:, head * D : (head + 1) * D] for a in many], axis=0
    )


# %%
# agreement
def agreement(effects):
    """argmax of each against argmax of the mean."""
    strongest = np.mean(effects, axis=0).argmax()
    return float(np.mean([e.argmax() == strongest for e in effects]))
