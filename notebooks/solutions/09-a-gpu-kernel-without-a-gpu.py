# %% [markdown]
# # Solutions: a GPU kernel without a GPU

# %%
# a tree
def tree_sum(group, x):
    """A barrier behind the writing, and one behind each step."""
    group.write(group.id, x)
    group.barrier()
    step = len(x) // 2
    while step:
        who = group.id[:step]
        total = group.read(who, who) + group.read(who + step, who)
        group.write(who, total, who)
        group.barrier()
        step //= 2
    return group.read(group.id[:1], group.id[:1])[0]


# %%
# planes
def planes_of(raw):
    """Codes of all blocks, then scales of all blocks."""
    blocks = raw.reshape(-1, 34)
    return np.concatenate([blocks[:, 2:].reshape(-1), blocks[:, :2].reshape(-1)])


# %%
# all threads at work
def shared_blocks():
    """Eight threads share a block; the sum of all threads is the row, as before."""
    text = KERNEL.replace(
        "int b = lane; b < n_blocks; b += 32", "int b = lane / 8; b < n_blocks; b += 4"
    )
    return text.replace(
        "int i = 0; i < 32; ++i) some", "int i = 4 * (lane % 8); i < 4 * (lane % 8) + 4; ++i) some"
    )


# %%
# the mistake
def corrected():
    """A barrier behind each step, outside of the if."""
    return SUM.replace("part[i + step];", "part[i + step];\n        BARRIER();")


# %%
# groups at once
def groups_at_once(threads, registers, local_bytes):
    """Whatever runs out first."""
    return min(32, 2048 // threads, 65536 // (threads * registers), 228 * 1024 // local_bytes)
