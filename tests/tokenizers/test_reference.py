"""Token for token like llama.cpp on real vocabularies, like Hugging Face on the real embedding model."""

from __future__ import annotations

import gzip
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import UNLIKE_WORDPIECE

from tinyllm import gguf, tokenizers

NAMES = (
    "baichuan", "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2",
    "gpt-neox", "llama-bpe", "llama-spm", "mpt", "nomic-bert-moe", "phi-3", "qwen2", "qwen35", "refact",
    "starcoder",
)  # fmt: skip
HERE = Path(__file__).resolve().parent.parent
COMPOSED = ("qwen2",)  # as Hugging Face's tokenizers do, and llama.cpp does not
GZIPPED = ("command-r", "gemma-4")


@pytest.fixture(scope="module")
def load(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabularies")

    @cache
    def load(name: str) -> tokenizers.Tokenizer:
        path = data / "tokenizers" / f"ggml-vocab-{name}.gguf"
        if name in GZIPPED:
            unpacked = folder / path.name
            unpacked.write_bytes(gzip.decompress(path.with_suffix(".gguf.gz").read_bytes()))
            path = unpacked
        return tokenizers.load(gguf.open(path).metadata)

    return load


def expected(data: Path, name: str) -> Any:
    return json.loads((data / "tokenizers" / "expected" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary(name: str, load: Any, data: Path) -> None:
    tokenizer, texts, want = load(name), expected(data, "texts"), expected(data, name)
    for i, text in enumerate(texts):
        if tokenizer.kind == "wpm" and UNLIKE_WORDPIECE.search(text):
            continue
        if name in COMPOSED and text != (composed := unicodedata.normalize("NFC", text)):
            assert tokenizer.encode(text) == tokenizer.encode(composed) != want["with_special"][i]
            continue
        assert tokenizer.encode(text) == want["with_special"][i], ascii(text)
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        assert plain == want["plain"][i], ascii(text)
        decoded = tokenizer.decode(plain)
        added = " " if tokenizer.add_space_prefix and plain else ""
        assert added + decoded == want["detok_plain"][i]
        assert tokenizer.decode_bytes(plain).decode("utf-8", "replace") == decoded


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("baichuan", "gpt-neox", "nomic-bert-moe")]
)
def test_llama_cpps_own_cases(name: str, load: Any, data: Path) -> None:
    base = data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=False):
        if load(name).kind == "wpm" and UNLIKE_WORDPIECE.search(text):
            continue
        assert load(name).encode(text, False, False) == [int(i) for i in line.split()], ascii(text)


def test_golden_models(data: Path) -> None:
    files = sorted((data / "golden" / "models").glob("*.gguf"))
    assert len(files) == 73
    for path in files:
        tokenizer = tokenizers.load(gguf.open(path).metadata)
        arrays = np.load(path.with_suffix(".npz"))
        for key in (k for k in arrays.files if k.startswith("text_ids_lcpp_")):
            text = str(arrays[key.replace("_ids_lcpp", "")])
            assert tokenizer.encode(text) == arrays[key].tolist(), (path.name, text)


def test_wordpiece_follows_hugging_face_on_overlong_words(data: Path) -> None:
    models = data / "models"
    tokenizer = tokenizers.load(gguf.open(models / "all-MiniLM-L6-v2.gguf2.f16.gguf").metadata)
    want = json.loads((models / "all-MiniLM-L6-v2.json").read_text("utf-8"))
    assert "A" * 300 in want["texts"]
    assert [tokenizer.encode(text) for text in want["texts"]] == want["ids"]


def test_wordpiece_follows_hugging_face_where_llama_cpp_does_not(data: Path) -> None:
    path = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    tokenizer = tokenizers.load(gguf.open(path).metadata)
    want = json.loads(gzip.decompress((HERE / "data" / "wordpiece.json.gz").read_bytes()))
    assert "नमस्ते दुनिया" in want["texts"]
    for text, ids in zip(want["texts"], want["ids"], strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, ascii(text)


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2", "gemma-4"])
def test_long_and_short_texts_come_back(name: str, load: Any, data: Path) -> None:
    tokenizer = load(name)
    english = (data / "text" / "grimm.txt").read_text("utf-8")[:100_000]
    for text in ("", " ", "  ", "a" * 300, "é" * 300, english):
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids, skip_special=True) == text
    assert tokenizer.encode("", add_special=False) == []


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama-bpe", ["<|end_of_text|>", "<|eot_id|>"]),
        ("gemma-4", ["<eos>", "<turn|>", "<|tool_response>"]),
        ("phi-3", ["</s>", "<|endoftext|>", "<|end|>"]),
        ("gpt-2", ["<|endoftext|>"]),
    ],
)
def test_ends_of_generation(name: str, ends: list[str], load: Any) -> None:
    assert {load(name).token_text(i) for i in load(name).eog} == set(ends)
