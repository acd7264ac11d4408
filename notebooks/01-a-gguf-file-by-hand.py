# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1. A GGUF file by hand
#
# A language model comes as one file. In this notebook you open that file with nothing but NumPy, read every kind of
# byte in it, and let it tell a story. In the end some 100 lines of your own do what `tinyllm.load` does, and you
# compare the two number by number.
#
# You need Python and a little NumPy: arrays, slices, the matrix product `@`. No model is downloaded: the package
# carries a small one. **Time: 45 minutes** to read and do; the cells themselves run in a few seconds.
#
# The form is always the same. You see a picture, you *predict* (write your guess down, really), you run the cell,
# and each part ends with an exercise whose check says "Right" or "Not yet". Solutions are in the folder `solutions`.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("tinyllm") is None:  # on Colab, or in a new environment
    SOURCE = ".."  # the folder of the sources, a wheel that you uploaded, or git+https://...
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, "matplotlib"], check=True)

# %%
import struct

import numpy as np

import tinyllm
from tinyllm import plots
from tinyllm.course import check
from tinyllm.loading import BUNDLED

data = BUNDLED.read_bytes()
print(f"{BUNDLED.name}: {len(data):,} bytes")

# %% [markdown]
# ## The whole file in one picture
#
# Before any detail, here is what lies where. The package's own reader tells us the borders; by the end of part 3 you
# will have found all of them yourself.

# %%
with tinyllm.gguf.open(BUNDLED) as file:
    first = min(t.offset for t in file.tensors.values())
    table = (
        data.index(b"token_embd.weight") - 8
    )  # the first tensor's entry begins with its name's length
    sizes = {}
    for name, t in file.tensors.items():
        kind = name.split(".")[-2] if name.startswith("blk") else name.removesuffix(".weight")
        sizes[kind] = sizes.get(kind, 0) + t.nbytes

plots.spans(
    {
        "the file": [
            ("header, settings, words", table),
            ("", first - table),
            ("weights", len(data) - first),
        ],
        "before the weights": [
            ("", 24),
            ("settings and words", table - 24),
            ("table", first - table),
        ],
        "the weights": sorted(sizes.items(), key=lambda part: -part[1])[:8],
    },
    title="A GGUF file: each strip is drawn to its own scale",
)

# %% [markdown]
# Three things stand one after the other:
#
# 1. **Metadata**: named values. How many layers, how many heads, and all the words that the model knows.
# 2. **The table of tensors**: for each matrix its name, its shape, how its numbers are packed, and where it begins.
# 3. **The weights**, one matrix behind the other, packed.
#
# There is no program in the file. What the numbers *mean* is not said: whoever reads it must know the architecture,
# whose name, here `llama`, is one of the values.
#
# **Predict.** The model has 4.2 million weights, in 4.5 million bytes of the file. How many bytes does a weight take,
# and can it be a Python float (8 bytes), a float32 (4) or a half-precision float (2)?

# %%
with tinyllm.gguf.open(BUNDLED) as file:
    n_weights = sum(int(np.prod(t.shape)) for t in file.tensors.values())
print(f"{n_weights:,} weights;", f"{8 * (len(data) - first) / n_weights:.2f} bits for each weight")

# %% [markdown]
# Eight and a half bits: none of the three. Part 4 shows where the half comes from.

# %% [markdown]
# ## Part 1. The first 24 bytes
#
# Let us look at raw bytes, 16 a line, in hexadecimal, and at the right the letters that they would be.


# %%
def dump(at, n):
    """Print n bytes from position `at`, 16 a line."""
    for start in range(at, at + n, 16):
        row = data[start : start + 16]
        letters = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        print(f"{start:6d}  {row.hex(' '):<47}  {letters}")


dump(0, 96)

# %% [markdown]
# You can read some of it: `GGUF`, then a version, then two counts, then the first name. Numbers stand with their
# *lowest* byte first ("little-endian"): `03 00 00 00` is 3, and `00 01 00 00` would be 256.
#
# Python's `struct` reads them. In its little language `<` means lowest byte first, `4s` four letters, `I` an unsigned
# integer of 4 bytes and `Q` one of 8.
#
# **Predict** from the dump: which version is it? How many tensors are there, and how many metadata keys? Count in
# hexadecimal.

# %%
magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data, 0)
print(magic, "version", version, "-", n_tensors, "tensors,", n_keys, "keys")
assert magic == b"GGUF"

# %% [markdown]
# ### Exercise 1: a string
#
# Texts are everywhere in the file, and they are always stored in the same way: 8 bytes with the length, then so many
# bytes of UTF-8. The first one begins at byte 24. Write a function that reads one.


# %% tags=["exercise"]
def read_string(data, at):
    """The text whose length stands at byte `at`, and the position behind it."""
    raise NotImplementedError


# %% tags=["check"]
with check("a string"):
    assert read_string(b"\x03\0\0\0\0\0\0\0abc", 0) == ("abc", 11), (
        "3 letters after 8 bytes: up to 11"
    )
    assert read_string(data, 24)[0] == "general.architecture", "at byte 24 stands the first key"
    assert read_string("…\x02\0\0\0\0\0\0\0é".encode(), 3) == ("é", 13), (
        "the length counts bytes: decode them"
    )

# %% [markdown]
# ## Part 2. Metadata
#
# A key is a string, then comes a number that says which type its value has, then the value. There are thirteen types.
# Eleven are numbers that `struct` knows by a letter; the other two are strings (8) and arrays (9). An array says the
# type of its elements, and how many there are, and then has them one by one.

# %%
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9


class Reader:
    """Walks through bytes: each call reads one thing and moves on."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def number(self, letter):
        (value,) = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize("<" + letter)
        return value

    def string(self):
        n = self.number("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(n)]
        return self.number(NUMBERS[kind])


reader = Reader(data, 24)
metadata = {}
for _ in range(n_keys):
    key = reader.string()
    metadata[key] = reader.value(reader.number("I"))

for key, value in metadata.items():
    shown = f"{len(value)} values, {value[:5]}" if isinstance(value, list) else repr(value)[:60]
    print(f"{key:42} {shown}")

# %% [markdown]
# That is the whole of it: twenty-five lines read the settings of any GGUF file, of whatever size. Look through the
# list and find
#
# * how many layers (`block_count`), how wide a vector is (`embedding_length`), how many heads;
# * the words: `tokenizer.ggml.tokens`, 4096 of them;
# * the form of a conversation: `tokenizer.chat_template`, a little program in the language Jinja.
#
# **Predict.** Which key takes most of the bytes? Guess its share before you run the next cell.


# %%
def stored(value):
    """Bytes that a value takes, roughly."""
    if isinstance(value, list):
        return sum(map(stored, value))
    return 8 + len(value.encode()) if isinstance(value, str) else 4


weight = sorted(((stored(v), k) for k, v in metadata.items()), reverse=True)[:4]
plots.bars(
    [k for _, k in weight],
    {"bytes": [n for n, _ in weight]},
    xlabel="bytes",
    title="The largest values",
)

# %% [markdown]
# The words and the rules that join them take nearly everything. In a large model with 128,000 words this part has
# several megabytes, and it is why a careless reader needs ten seconds to open a file before it has seen a weight.
#
# A reader must not *trust* it, either. A damaged file may say that a string has 2⁶⁰ bytes. Ours would stop with an
# obscure error, if we are lucky; `tinyllm.gguf` checks every number before it believes it, and names the byte.

# %%
bad = bytearray(data[:200_000])
bad[24:32] = (2**60).to_bytes(8, "little")
BAD = BUNDLED.with_name("bad.gguf").name
try:
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, BAD)
        with open(path, "wb") as f:
            f.write(bad)
        tinyllm.gguf.open(path)
except tinyllm.errors.GGUFError as error:
    print(str(error).replace(folder, "."))

# %% [markdown]
# ## Part 3. The table of tensors
#
# Behind the metadata, where our reader now stands, each tensor has one entry: its name, how many dimensions, the
# dimensions, a type, and where its bytes begin. Two surprises:
#
# * Dimensions are written with the *fastest* one first, so that NumPy's shape is the reverse.
# * The position counts from where the weights begin, and that is the next multiple of `general.alignment`, or of 32
#   where the key is missing.

# %%
TYPES = {0: "F32", 1: "F16", 8: "Q8_0"}
tensors = {}
for _ in range(n_tensors):
    name = reader.string()
    shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
    tensors[name] = (shape, TYPES[reader.number("I")], reader.number("Q"))

alignment = metadata.get("general.alignment", 32)
start = -(-reader.at // alignment) * alignment  # rounded up
print(f"the table ends at {reader.at}, the weights begin at {start}")
for name in list(tensors)[:11]:
    print(f"{name:28} {tensors[name]}")

# %% [markdown]
# Eleven names, and you have seen all there are: the other layers repeat the nine that begin with `blk.0`. Each
# layer has four matrices for attention (q, k, v, output), three for its feed-forward half (gate, up, down), and two
# vectors of scales (norm).
#
# **Predict.** Where does the model keep the matrix that turns a vector back into words, which other files call
# `output.weight`? Look at the list of all names.

# %%
print([n for n in tensors if not n.startswith("blk")])

# %% [markdown]
# It keeps none: the matrix of word vectors, `token_embd`, serves both ways in. In goes row 17 for word 17, and out
# comes word 17 if the vector looks like row 17. That saves a million of the four million weights.
#
# ### Exercise 2: where it ends
#
# Two neighbouring tensors leave gaps between them only for alignment. Write a function that gives a tensor's size in
# bytes: F32 takes 4 bytes for each number; Q8_0 takes 34 bytes for each 32 numbers.


# %% tags=["exercise"]
def n_bytes(shape, kind):
    """How many bytes a tensor of this shape and type takes."""
    raise NotImplementedError


# %% tags=["check"]
with check("where it ends"):
    assert n_bytes((256,), "F32") == 1024, "256 numbers of 4 bytes"
    assert n_bytes((128, 256), "Q8_0") == 34816, "32,768 numbers are 1024 blocks of 34 bytes"
    ends = sorted((at, at + n_bytes(shape, kind)) for shape, kind, at in tensors.values())
    assert all(0 <= b[0] - a[1] < alignment for a, b in zip(ends, ends[1:], strict=False)), (
        "gaps or overlaps"
    )
    assert start + ends[-1][1] <= len(data), "the last tensor ends behind the file"

# %% [markdown]
# ## Part 4. A block of Q8_0
#
# The vectors are plain float32. The matrices are *quantised*: 32 neighbouring weights share one scale, and each is
# a whole number from -127 to 127 times that scale. Here are the 34 bytes of one block.

# %%
plots.spans(
    {"a block of Q8_0": [("scale", 2), *[(f"c{i}", 1) for i in range(32)]]},
    title="32 weights, 34 bytes",
)

# %% [markdown]
# The scale is a half-precision float, 2 bytes; each code is a signed byte. So 34 bytes for 32 weights: 8.5 bits for
# each. That is the half bit we wondered about.

# %%
at = start + tensors["blk.0.attn_q.weight"][2]
dump(at, 34)
scale = np.frombuffer(data, "<f2", 1, at)[0]
codes = np.frombuffer(data, "i1", 32, at + 2)
print("\nscale", scale)
print("codes", codes)

# %% [markdown]
# **Predict.** What is the largest weight of this block, about? (No calculator: the largest code has nearly always
# the size 127. Why?)

# %%
weights = scale.astype(np.float32) * codes
print(weights.round(4))
print("largest:", np.abs(weights).max(), "of code", codes[np.abs(codes).argmax()])

# %% [markdown]
# The scale was *chosen* so that the largest weight of the block gets the code 127. So the largest is about 127 times
# the scale, and small weights beside a large one get few different codes. Notebook 3 is about nothing else.
#
# ### Exercise 3: a matrix
#
# NumPy can read a whole matrix at once: a *structured type* says what a block is, and the array's items are blocks.
# Turn the blocks into weights, with no loop.

# %%
Q8_0 = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
assert Q8_0.itemsize == 34


# %% tags=["exercise"]
def decode_q8_0(blocks, shape):
    """Blocks [n] of the type Q8_0 -> float32 of the shape `shape`."""
    raise NotImplementedError


# %% tags=["check"]
with check("a matrix"):
    two = np.zeros(2, Q8_0)
    two["scale"], two["codes"][:, 3] = [0.5, 2], [[4], [-1]][0] + [-1]
    out = decode_q8_0(two, (2, 32))
    assert out.shape == (2, 32), f"the shape is {out.shape}"
    assert out.dtype == np.float32, (
        "make floats of the scales first: a half times an int8 stays a half"
    )
    assert (out[0, 3], out[1, 3]) == (2.0, -2.0), "each block has a scale of its own"

# %% [markdown]
# From here on the notebook uses this version of its own, so that you can go on whatever became of the exercise.


# %%
def tensor(name):
    """A tensor of the file as float32."""
    shape, kind, at = tensors[name]
    n = int(np.prod(shape))
    if kind == "F32":
        return np.frombuffer(data, "<f4", n, start + at).reshape(shape)
    blocks = np.frombuffer(data, Q8_0, n // 32, start + at)
    return (blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]).reshape(shape)


W = {name.removesuffix(".weight"): tensor(name) for name in tensors}

with tinyllm.gguf.open(BUNDLED) as file:
    assert all(np.array_equal(tensor(n), file.tensors[n].dequantize()) for n in tensors)
print(len(W), "tensors, each equal to the package's, bit by bit")

# %% [markdown]
# ## Part 5. From ids to letters
#
# The model does not know letters. It knows 4096 *tokens*, pieces of text, by their numbers. The list in the file
# spells them in a strange alphabet, because some tokens are bytes that no alphabet shows: `Ġ` is a space, `Ċ` the
# end of a line. The rule is GPT-2's: the 188 visible bytes stand for themselves, and the others for the characters
# from 256 on, in order.

# %%
words = metadata["tokenizer.ggml.tokens"]
print(words[260:280])
visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
hidden = [b for b in range(256) if b not in visible]
BYTE = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def text_of(ids):
    """The text that tokens stand for; control tokens, of the type 3, are silent."""
    types = metadata["tokenizer.ggml.token_type"]
    return bytes(BYTE[c] for i in ids if types[i] != 3 for c in words[i]).decode("utf-8", "replace")


BOS = metadata["tokenizer.ggml.bos_token_id"]
prompt = [BOS] + [words.index(w) for w in ("Once", "Ġupon", "Ġa", "Ġtime")]
print(prompt, repr(text_of(prompt)))

# %% [markdown]
# Here each word happened to be a token. How a text is cut in general is the subject of notebook 2.

# %% [markdown]
# ## Part 6. The model, in forty lines
#
# ```
# ids ─ embedding ─ x ─┬─ norm ─ attention ─(+)─┬─ norm ─ feed-forward ─(+)─ norm ─ logits
#                      └────────────────────┘   └───────────────────────┘
#                         four times, with weights of its own each time
# ```
#
# A token becomes a vector of 256 numbers. Every layer *adds* something to it, twice: once from other positions
# (attention), once from itself (feed-forward). In the end the vector is compared with the vector of every word.
# Notebook 4 looks at each step. Here we only want to see how little there is.
#
# In the shapes, T is the number of tokens and E = 256.


# %%
def setting(name):
    return metadata["llama." + name]


N_LAYER, E = setting("block_count"), setting("embedding_length")
H, KV = setting("attention.head_count"), setting("attention.head_count_kv")  # of queries; of keys
D = E // H  # numbers of a head


def norm(x, w):
    """Scale each row to length √E, then each column by a weight: [T, E] -> [T, E]."""
    return (
        x
        / np.sqrt((x * x).mean(-1, keepdims=True) + setting("attention.layer_norm_rms_epsilon"))
        * w
    )


def turn(x):
    """Turn pairs of numbers by an angle that grows with the position: [T, heads, D] -> the same shape."""
    angle = np.arange(len(x))[:, None] * setting("rope.freq_base") ** (-np.arange(0, D, 2) / D)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return np.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape).astype(np.float32)


def attention(x, layer):
    """What each position takes from the positions up to it: [T, E] -> [T, E]."""
    T = len(x)
    q, k, v = (x @ W[f"blk.{layer}.attn_{name}"].T for name in "qkv")
    q, k, v = turn(q.reshape(T, H, D)), turn(k.reshape(T, KV, D)), v.reshape(T, KV, D)
    k, v = (np.repeat(z, H // KV, 1) for z in (k, v))  # two heads of queries share one of keys
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(D)
    scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf  # nobody looks ahead
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", p, v).reshape(T, E) @ W[f"blk.{layer}.attn_output"].T


def feed_forward(x, layer):
    """What each position makes of itself: [T, E] -> [T, E]."""
    gate, up, down = (W[f"blk.{layer}.ffn_{name}"] for name in ("gate", "up", "down"))
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def logits_of(ids):
    """A number for each token of the vocabulary, how well it would come next; of the last position."""
    x = W["token_embd"][ids]
    for layer in range(N_LAYER):
        x = x + attention(norm(x, W[f"blk.{layer}.attn_norm"]), layer)
        x = x + feed_forward(norm(x, W[f"blk.{layer}.ffn_norm"]), layer)
    return norm(x[-1:], W["output_norm"])[0] @ W["token_embd"].T


# %% [markdown]
# **Predict.** After "Once upon a time", which five tokens does a model of children's stories find likeliest? Then run.

# %%
logits = logits_of(prompt)
p = np.exp(logits - logits.max())
p /= p.sum()
best = np.argsort(-p)[:8]
plots.bars(
    [repr(text_of([i])) for i in best],
    {"p": p[best]},
    xlabel="probability",
    title="Once upon a time ...",
)

# %% [markdown]
# ## Part 7. A story
#
# To write, take the likeliest token, put it behind the others, and ask again.

# %%
ids = list(prompt)
for _ in range(40):
    ids.append(int(logits_of(ids).argmax()))
print(text_of(ids))

# %% [markdown]
# No library has seen this model so far. Now the package, twice: on its plain NumPy backend, which computes in
# floats as we do, and on its fast one, which multiplies whole numbers. (`kv_type` says how it keeps keys and values
# of earlier tokens; left out, as half-precision floats, which alters the fourth digit. Notebook 5 weighs that.)
#
# **Predict.** Will the numbers be equal to the last bit? In which digit will they differ, if not?

# %%
for device in ("reference", "cpu"):
    with tinyllm.load(device=device, kv_type="f32") as model:
        theirs = model.logits(prompt)[-1]
        story = model.generate(prompt, max_tokens=40, temperature=0)
        off = np.abs(theirs - logits).max() / logits.std()
        print(
            f"{device:10} largest difference {off:.1e} of a standard deviation; the text: {story.text == text_of(ids[5:])}"
        )
        assert off < (1e-4 if device == "reference" else 0.1)

# %% [markdown]
# Against the NumPy backend only roundings differ, in the sixth digit: sums are taken in another order. The fast
# backend also rounds the *activations* to whole numbers, which costs about a hundredth of a standard deviation and is
# the subject of notebook 7. It may, rarely, pick another word where two are nearly equally likely.
#
# ### Exercise 4: the likeliest path is not the only one
#
# Write a story in which, at each step, the *second* likeliest token is taken where it is at least a third as
# probable as the first, and the likeliest otherwise. Return the new ids only.


# %% tags=["exercise"]
def second_story(prompt, n):
    """n ids that follow the prompt, chosen by the rule above."""
    raise NotImplementedError


# %% tags=["check"]
with check("the second path"):
    new = second_story(prompt, 6)
    assert len(new) == 6, f"{len(new)} ids"
    seen = list(prompt)
    for i in new:
        z = logits_of(seen)
        one, two = np.argsort(-z)[:2]
        want = two if z[two] - z[one] >= np.log(1 / 3) else one
        assert i == want, f"after {text_of(seen)!r}: {text_of([i])!r}, expected {text_of([want])!r}"
        seen.append(int(i))

# %% [markdown]
# ## How many lines was that?
#
# The reader of metadata, the table, the blocks, the alphabet and the model: count the cells without pictures and
# prints, and you come to about a hundred. What do the other 40,000 lines of the package do?
#
# * **Other files.** 35 packings of weights (notebook 3), more than a hundred architectures, five kinds of
#   tokenizers (notebook 2), damaged files.
# * **Speed.** Our `logits_of` reads the whole text anew for each token (notebook 5 ends that), turns 8.5 bits into
#   32 before it multiplies (notebook 7), and uses none of your processor's special instructions (notebook 7, again).
# * **Use.** Sampling (notebook 6), conversations, servers (notebook 12), looking inside (notebooks 10 and 11).
#
# ## To think about
#
# 1. Attention is the only step in which positions meet. Which line of the code would you change to let a token see
#    the *future*, and what would a model be good for that was trained so?
# 2. Turn off `turn` (return x). The model still writes. What does it no longer know?
# 3. The alignment of 32 wastes bytes. Whom does it serve?
