# %% [markdown]
# # Solutions: tokens

# %%
# the longest tokens
def longest(tokenizer, n):
    """Sorting is stable: of equal lengths the smaller id stays first."""
    return sorted(range(tokenizer.n_vocab), key=lambda i: -len(tokenizer.token_bytes(i)))[:n]


# %%
# merging
def merge(word, rank):
    """Join the pair that stands first in the list, the leftmost of equals, until there is none."""
    parts = list(word)
    while True:
        found = [
            (rank[p], i) for i, p in enumerate(zip(parts, parts[1:], strict=False)) if p in rank
        ]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# %%
# a tokenizer
def encode(text):
    """Words, then bytes in the alphabet, then merges, then ids."""
    ids = []
    for word in WORDS.findall(text):
        spelled = "".join(ALPHABET[b] for b in word.encode())
        ids += [vocabulary_ids[piece] for piece in steps_of(spelled)[-1]]
    return ids


# %%
# fertility
def fertility(text, tokenizer):
    """Nothing is added around the text: add_special=False."""
    return len(tokenizer.encode(text, add_special=False)) / len(text.split())


# %%
# a safe turn
def safe_turn(text, tokenizer):
    """The signals are ids; the text between them is only text."""
    signal = tokenizer.special_tokens
    inside = tokenizer.encode(text, add_special=False, parse_special=False)
    return [
        signal["<|begin|>"],
        signal["<|user|>"],
        *inside,
        signal["<|end|>"],
        signal["<|assistant|>"],
    ]


# %%
# a stream
def stream(ids, tokenizer):
    """The decoder keeps the bytes of an unfinished character until the rest has come."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if text := decoder.decode(tokenizer.token_bytes(i)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
