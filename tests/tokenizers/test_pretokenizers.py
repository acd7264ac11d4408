"""Every pre-tokenizer that llama.cpp names, against how llama.cpp splits."""

from __future__ import annotations

import gzip
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import regex
from samples import pair_vocabulary

from tinyllm import tokenizers
from tinyllm.errors import UnsupportedModel
from tinyllm.tokenizers.bpe import BPE
from tinyllm.tokenizers.pretokenizers import TABLE, PreTokenizer, pretokenizer
from tinyllm.tokenizers.unassigned import hide_new, is_unassigned

CASES = Path(__file__).resolve().parent.parent / "data" / "tokenizers_pre.json.gz"
BYTE_LEVEL = [name for name, recipe in TABLE.items() if recipe.byte_level]


@pytest.fixture(scope="module")
def cases() -> Any:
    return json.loads(gzip.decompress(CASES.read_bytes()))


@cache
def merges() -> dict[str, Any]:
    return pair_vocabulary("default")


@cache
def tokenizer() -> BPE:
    made = tokenizers.load(merges())
    assert isinstance(made, BPE)
    return made


def pairs(recipe: PreTokenizer, text: str) -> str:
    """Which bytes of the text merge: one digit per token of the pair vocabulary, its length."""
    tokenizer()._recipe = recipe
    tokenizer()._words.clear()
    ids = tokenizer().encode(text, add_special=False)
    text = unicodedata.normalize("NFC", text) if recipe.composed else text
    assert tokenizer().decode(ids) == text
    return "".join("1" if i < 256 else "2" for i in ids)


def test_all_names_are_known(cases: Any) -> None:
    assert len(TABLE) == 92  # as many as llama.cpp b11434 names
    assert set(cases["names"]) == set(BYTE_LEVEL)


def test_every_recipe_splits_as_llama_cpp(cases: Any) -> None:
    known: dict[PreTokenizer, list[str]] = {}
    for name, which in cases["names"].items():
        recipe = TABLE[name]
        if recipe not in known:
            known[recipe] = [pairs(recipe, text) for text in cases["texts"]]
        for i, text in enumerate(cases["texts"]):
            if recipe.composed and not unicodedata.is_normalized("NFC", text):
                continue
            assert known[recipe][i] == cases["outcomes"][i][which[i]], (name, ascii(text))


@pytest.mark.parametrize("name", TABLE)
def test_words_joined_are_the_text(name: str, cases: Any) -> None:
    for text in cases["texts"]:
        assert "".join(TABLE[name].split(text)) == text


def test_expressions_have_no_groups() -> None:
    for recipe in TABLE.values():
        for step in recipe.steps:
            assert callable(step) or regex.compile(step).groups == 0


def test_a_missing_name_means_the_default_and_an_unknown_one_is_an_error() -> None:
    assert pretokenizer("") is TABLE["default"]
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre.*'llama-7'"):
        pretokenizer("llama-7")
    metadata = merges() | {"tokenizer.ggml.pre": "no-such"}
    with pytest.raises(UnsupportedModel, match="no-such"):
        tokenizers.load(metadata)
    with pytest.warns(UserWarning, match="no-such"):
        lenient = tokenizers.load(metadata, strict=False)
    assert lenient.encode("It's 12345") == tokenizers.load(merges()).encode("It's 12345")
    del metadata["tokenizer.ggml.pre"]
    assert tokenizers.load(metadata).pre == "default"


@pytest.mark.parametrize("recipe", {r: n for n, r in TABLE.items()}.values())
def test_no_expression_is_quadratic(recipe: str) -> None:
    for unit in (" ", "a", "A", "1", "'", "\n", "\r\n ", "中", "aA", "1a", "\u0301"):
        for end in ("1", "x", "!"):
            text = unit * (5_000 // len(unit)) + end
            assert sum(map(len, TABLE[recipe].split(text))) == len(text)


def test_characters_newer_than_unicode_15_count_as_unassigned() -> None:
    new_letter, old_letter = "\u1c89", "\u1c88"
    assert is_unassigned(new_letter)
    assert not is_unassigned(old_letter)
    assert hide_new(f"a{new_letter}b") == "a\uffffb"
    assert hide_new(text := "plain é 中") is text
    assert TABLE["llama-bpe"].split(f"ab{new_letter}") == ["ab", new_letter]


def marked_vocabulary() -> dict[str, Any]:
    """A vocabulary of mmbert's kind: ``▁`` alone, before letters, and two merges across it."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "\n",
        "\n\n",
        "▁",
        "a",
        "b",
        "▁a",
        "▁ab",
        "ab",
        "▁▁",
    ]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "mmbert", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[1] * 9],
        "tokenizer.ggml.merges": ["▁ a", "▁a b", "a b", "▁ ▁"], "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "ids"),
    # llama.cpp b11434's of the same vocabulary
    [("ab", [10]), ("a b", [9, 6, 8]), ("  ab", [6, 10]), ("a\n\nb ab", [9, 5, 6, 8, 10])],
)
def test_marks_begin_words_and_lines(text: str, ids: list[int]) -> None:
    assert list(tokenizers.load(marked_vocabulary()).encode(text)) == ids


def test_flags_follow_the_recipe() -> None:
    assert tokenizers.load(pair_vocabulary("llama-bpe")).add_bos
    assert tokenizers.load(pair_vocabulary("roberta-bpe")).add_sep
    assert tokenizers.load(pair_vocabulary("glm4")).bos is None
    assert tokenizers.load(pair_vocabulary("qwen2")).bos == 11
    metadata = pair_vocabulary("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    assert not tokenizers.load(metadata).add_bos
