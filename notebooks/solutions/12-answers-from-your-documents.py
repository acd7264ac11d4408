# %% [markdown]
# # Solutions: answers from your own documents

# %%
# pieces
def pieces(text, size=3, step=2):
    """Stop with the piece that reaches the end."""
    parts, found = sentences(text), []
    for n in range(0, len(parts), step):
        found.append((n, "".join(parts[n : n + size]).strip()))
        if n + size >= len(parts):
            break
    return found


# %%
# BM25
def bm25(question):
    """Words that a document lacks add nothing."""
    scores = np.zeros(N)
    for i, c in enumerate(counts):
        length = sum(c.values())
        for w in words(question):
            scores[i] += (
                rarity(w) * c[w] * 2.2 / (c[w] + 1.2 * (0.25 + 0.75 * length / mean_length))
            )
    return scores


# %%
# late interaction
def late(question):
    """The nearest word of the document for each word of the question."""
    q = vectors_of(question)
    weight = np.array([rarity(w) for w in words(question)])
    return np.array([weight @ (q @ vectors_of(d).T).max(1) for d in DOCS])


# %%
# mean reciprocal rank
def reciprocal(search):
    """One over the place, on average."""
    return float(np.mean([1 / r for r in ranks(search)]))


# %%
# I don't know
def careful(question):
    """The border is a choice: measure what it costs."""
    if by_late(question).max() / sum(rarity(w) for w in words(question)) < 0.6:
        return None
    return answer(question)


# %%
# a client
def texts_of(lines):
    """Stop at [DONE]; the last chunk may have no choices."""
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return
        for choice in json.loads(data)["choices"]:
            if text := choice["delta"].get("content"):
                yield text
