"""Makes tests/data/tokenizers*: small vocabularies of every family, and llama.cpp's answers.

Needs llama-cpp-python and the golden models of the test data. Run from the repository's root::

    PYTHONPATH=. python tests/tokenizers/make_data.py ../shared/data
"""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from samples import HAND_MADE, pair_vocabulary, random_texts

from tinyllm import gguf
from tinyllm.tokenizers.pretokenizers import TABLE

OUT = Path(__file__).resolve().parent.parent / "data"
SILENT = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(SILENT, None)
GOLDEN = {"spm": "llama-mha", "bpe": "gpt2", "wpm": "bert-minilm", "rwkv": "rwkv6"}


class LlamaCpp:
    """llama.cpp's tokenizer for one vocabulary."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "vocabulary.gguf")
            gguf.write(path, metadata, {})
            self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise SystemExit("llama.cpp does not load the vocabulary")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids with or without what the file puts around the text, and control tokens read or not."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), special, special)
        return list(ids[:n])

    def eog(self, n_vocab: int) -> list[int]:
        return [i for i in range(n_vocab) if llama_cpp.llama_vocab_is_eog(self._vocab, i)]

    def piece(self, i: int) -> list[int]:
        out = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self._vocab, i, out, len(out), 0, False)
        return list(out.raw[:n])


def from_golden(data: Path, name: str) -> dict[str, Any]:
    metadata = gguf.open(data / "golden" / "models" / f"{name}.gguf").metadata
    keys = [k for k in metadata if k.startswith("tokenizer.ggml.") or k == "general.architecture"]
    return {k: metadata[k] for k in keys}


def spelled_like_gemma() -> dict[str, Any]:
    """Plain text merged by rank, ``▁`` for spaces, byte tokens, newlines as tokens."""
    words = "▁the ▁there ing ▁it ▁12 ▁▁ ▁▁▁▁ \n\n \n\n\n é▁ 中文".split(" ")
    merges, pieces = [], []
    for word in words:
        for n in range(2, len(word) + 1):
            merges.append(f"{word[: n - 1]} {word[n - 1]}")
            pieces.append(word[:n])
    letters = sorted({c for word in words for c in word} | set("abcdefghijklmnopqrstuvwxyz.,'"))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<table>"]
    tokens = special + [f"<0x{b:02X}>" for b in range(256)]
    types = [3, 3, 3, 2, 3, 3, 4] + [6] * 256
    plain = list(dict.fromkeys(letters + pieces))
    return vocabulary("gemma4", tokens + plain, types + [1] * len(plain)) | {
        "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
    }


def unigram() -> dict[str, Any]:
    """A few words with probabilities, a user-defined token and a small character map."""
    words = "▁ e t a o i n s h r d l u c m f w g y p b v k 0 1 2 . , ' ! é 中 文 fi ▁the ▁a he in ing ▁to ▁of"
    words += " th er re on at en nd ti es or te ed is it al ar st ▁hello ▁world ▁f aa aaa"
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *words.split(" "), "<x y>", "[unused1]", "<mask>"]
    types = [3, 3, 3, 2] + [1] * (len(tokens) - 7) + [4, 5, 3]
    scores = [0.0] * 4 + [-2.0 - 0.37 * (i % 19) - 0.011 * i for i in range(4, len(tokens))]
    rules = {
        "ﬁ": "fi",
        "\n": " ",
        "\t": " ",
        "\u3000": " ",
        "\u200b": "",
        "e\u0301": "é",
        "Ａ": "A",
        "…": "...",
    }
    return vocabulary("t5", tokens, types) | {
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.precompiled_charsmap": charsmap(rules),
    }


def vocabulary(model: str, tokens: list[str], types: list[int]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }


def charsmap(rules: Mapping[str, str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """SentencePiece's compiled form of replacements: a double array, then the texts."""
    texts, offsets = b"", {}
    for key, value in rules.items():
        offsets[key.encode()] = len(texts)
        texts += value.encode() + b"\0"
    units, used = {0: 0}, {0}

    def place(node: int, prefix: bytes) -> None:
        following = {
            k[len(prefix)] for k in offsets if len(k) > len(prefix) and k.startswith(prefix)
        }
        labels = sorted(following | ({0} if prefix in offsets else set()))
        base = next(b for b in range(1, 1 << 20) if not used & {b ^ c for c in labels})
        used.update(base ^ c for c in labels)
        units[node] |= (base ^ node) << 10
        for c in labels:
            units[base ^ c] = c
        if 0 in labels:
            units[node] |= 0x100
            units[base] = offsets[prefix] | 0x80000000
        for c in sorted(following):
            place(base ^ c, prefix + bytes((c,)))

    place(0, b"")
    trie = np.zeros((max(units) | 0xFF) + 1, "<u4")
    trie[list(units)] = list(units.values())
    blob = np.array([trie.nbytes], "<u4").tobytes() + trie.tobytes() + texts
    return np.frombuffer(blob, np.uint8)


def save(path: Path, value: object) -> None:
    text = json.dumps(value, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_families(data: Path) -> None:
    made = {family: from_golden(data, name) for family, name in GOLDEN.items()}
    made |= {"gemma4": spelled_like_gemma(), "unigram": unigram()}
    texts = HAND_MADE[1:-1] + random_texts(60, seed=1)
    cases: dict[str, Any] = {"texts": texts}
    (OUT / "tokenizers").mkdir(exist_ok=True)
    for family, metadata in made.items():
        path = OUT / "tokenizers" / f"{family}.gguf"
        gguf.write(path, metadata, {})
        oracle = LlamaCpp(metadata)
        n_vocab = len(metadata["tokenizer.ggml.tokens"])
        cases[family] = {
            "special": [oracle.encode(t, True) for t in texts],
            "plain": [oracle.encode(t, False) for t in texts],
            "pieces": [oracle.piece(i) for i in range(n_vocab)],
            "eog": oracle.eog(n_vocab),
        }
        save(OUT / "tokenizers.json.gz", cases)


def lengths(ids: Iterable[int]) -> str:
    """Whether each token of the pair vocabulary is one byte or two."""
    return "".join("1" if i < 256 else "2" for i in ids)


def make_pretokenizers() -> None:
    """For each name and text, how llama.cpp pairs the bytes; equal outcomes are stored once."""
    texts = HAND_MADE + random_texts(160, seed=2)
    outcomes: list[list[str]] = [[] for _ in texts]
    names: dict[str, list[int]] = {}
    for name in (n for n, recipe in TABLE.items() if recipe.byte_level):
        oracle = LlamaCpp(pair_vocabulary(name))
        found = [lengths(oracle.encode(text, False)) for text in texts]
        for known, outcome in zip(outcomes, found, strict=True):
            if outcome not in known:
                known.append(outcome)
        names[name] = [k.index(f) for k, f in zip(outcomes, found, strict=True)]
    save(OUT / "tokenizers_pre.json.gz", {"texts": texts, "outcomes": outcomes, "names": names})


if __name__ == "__main__":
    make_families(Path(sys.argv[1]))
    if len(sys.argv) < 3:
        make_pretokenizers()
