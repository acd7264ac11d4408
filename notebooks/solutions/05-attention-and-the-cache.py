# %% [markdown]
# # Solutions: attention and the cache

# %%
# bytes of a cache
def cache_bytes(n_tokens, n_layer, n_head_kv, head_dim, kind):
    """Numbers, times bytes for 32 of them."""
    numbers = n_tokens * n_layer * 2 * n_head_kv * head_dim
    return numbers * {"f32": 128, "f16": 64, "q8_0": 34}[kind] // 32


# %%
# flash attention
def flash(q, K, V, block=256):
    """m is the largest score so far; what was summed before a larger one came is scaled down."""
    m, total, y = -np.inf, 0.0, np.zeros(V.shape[1])
    for start in range(0, len(K), block):
        s = K[start : start + block] @ q / np.sqrt(len(q))
        larger = max(m, s.max())
        p, down = np.exp(s - larger), np.exp(m - larger)
        total, y, m = total * down + p.sum(), y * down + p @ V[start : start + block], larger
    return y / total


# %%
# a table of pages
class Table:
    """A page that has another holder is copied before it is written."""

    def __init__(self):
        self.pages = []

    def tokens(self):
        return [t for page in self.pages for t in page.tokens]

    def fork(self):
        other = Table()
        other.pages = list(self.pages)
        for page in self.pages:
            page.holders += 1
        return other

    def append(self, token):
        if not self.pages or len(self.pages[-1].tokens) == SIZE:
            self.pages.append(Page())
        last = self.pages[-1]
        if last.holders > 1:
            last.holders -= 1
            last = self.pages[-1] = Page(last.tokens)
        last.tokens.append(token)


# %%
# surprise
def surprises(model, ids):
    """Row i of the logits is about token i + 1."""
    rows = log_softmax(model.logits(ids[:-1]))
    return -rows[np.arange(len(ids) - 1), ids[1:]]


# %%
# windows
def held(n, n_layer, window, every):
    """Layers that see everything hold n, the others at most a window."""
    full = n_layer // every
    return full * n + (n_layer - full) * min(n, window)


# %%
# side by side
def throughput(model, n_prompts, n_tokens=24):
    """A batch shares each reading of the weights."""
    prompts = ["Once upon a time"] * n_prompts
    start = time.perf_counter()
    done = model.generate(
        prompts, max_tokens=n_tokens, seed=1, logit_bias={model.tokenizer.eos: -np.inf}
    )
    return sum(len(d.ids) for d in done) / (time.perf_counter() - start)
