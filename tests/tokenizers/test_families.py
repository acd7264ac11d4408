"""Every family of vocabularies, on small files that stand in the repository, against llama.cpp's answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import UNLIKE_WORDPIECE

from tinyllm import gguf, tokenizers
from tinyllm.errors import ArgumentError

DATA = Path(__file__).resolve().parent.parent / "data"
FAMILIES = ("spm", "bpe", "gemma4", "wpm", "unigram", "rwkv")
BYTE_EXACT = ("spm", "bpe", "gemma4", "rwkv")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / "tokenizers.json.gz").read_bytes()))


def load(family: str) -> tokenizers.Tokenizer:
    return tokenizers.load(gguf.open(DATA / "tokenizers" / f"{family}.gguf").metadata)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_llama_cpp(family: str, cases: dict[str, Any]) -> None:
    tokenizer, case = load(family), cases[family]
    for text, special, plain in zip(cases["texts"], case["special"], case["plain"], strict=True):
        if family == "wpm" and UNLIKE_WORDPIECE.search(text):
            continue
        assert tokenizer.encode(text) == special, ascii(text)
        assert tokenizer.encode(text, add_special=False, parse_special=False) == plain, ascii(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_ends_equal_llama_cpp(family: str, cases: dict[str, Any]) -> None:
    tokenizer = load(family)
    assert sorted(tokenizer.eog) == cases[family]["eog"]
    assert [list(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)] == cases[family][
        "pieces"
    ]


@pytest.mark.parametrize("family", BYTE_EXACT)
def test_decode_gives_the_text_back(family: str, cases: dict[str, Any]) -> None:
    tokenizer = load(family)
    for text in (*cases["texts"], "", " ", "  x", "x ", "a" * 300, "word " * 4_000):
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(plain) == text
        assert tokenizer.decode_bytes(np.array(plain)) == text.encode()
        if family != "rwkv":  # whose greedy match finds control tokens in any text
            around = tokenizer.encode(text, parse_special=False)
            assert tokenizer.decode(around, skip_special=True) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_plain_integers(family: str) -> None:
    ids = load(family).encode("Hello, 中 world")
    assert ids
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_lists_serve_as_metadata(family: str) -> None:
    lazy = gguf.open(DATA / "tokenizers" / f"{family}.gguf").metadata
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in lazy.items()}
    text = "Hello there, it is 12"
    assert tokenizers.load(plain).encode(text) == tokenizers.load(lazy).encode(text)


def test_streamed_pieces_keep_the_space_that_decode_drops() -> None:
    tokenizer = load("spm")
    ids = tokenizer.encode("the end", add_special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" the end"
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(tokenizer.encode(" the")) == "<s> the"
    assert tokenizer.decode(tokenizer.encode(" the"), skip_special=True) == " the"


def test_control_tokens_are_text_unless_parsed() -> None:
    tokenizer = load("spm")
    assert tokenizer.encode("</s>", add_special=False) == [tokenizer.eos]
    assert tokenizer.eos not in tokenizer.encode("</s>", parse_special=False)
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_text(2) == "</s>"
    assert tokenizer.is_control(2)
    assert not tokenizer.is_control(300)


def test_user_defined_tokens_are_always_parsed() -> None:
    tokenizer = load("gemma4")
    table = tokenizer.token_id("<table>")
    assert tokenizer.encode("<table>", add_special=False, parse_special=False) == [table]
    assert tokenizer.token_bytes(6) == b"<table>"
    assert "<table>" not in tokenizer.special_tokens


def test_roles_and_questions() -> None:
    tokenizer = load("spm")
    assert (tokenizer.kind, tokenizer.pre, tokenizer.n_vocab) == ("spm", "default", 512)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (1, 2, 0)
    assert (tokenizer.sep, tokenizer.mask, tokenizer.eot) == (None, None, None)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, False, True)
    assert tokenizer.special_tokens.items() >= {"<s>": 1, "</s>": 2}.items()
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.is_byte(tokenizer.token_id("<0x0A>"))
    assert not tokenizer.is_byte(1)
    assert "spm" in repr(tokenizer)


@pytest.mark.parametrize("i", [-1, 512, 2**40])
def test_an_id_beyond_the_vocabulary_is_refused(i: int) -> None:
    tokenizer = load("spm")
    for ask in (
        tokenizer.token_bytes,
        tokenizer.token_text,
        tokenizer.is_control,
        tokenizer.is_byte,
    ):
        with pytest.raises(ArgumentError, match="0 to 511"):
            ask(i)
    with pytest.raises(ArgumentError, match=str(i)):
        tokenizer.decode([5, i])


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff", b"bytes", None, 3])
def test_only_text_is_encoded(text: Any) -> None:
    with pytest.raises(ArgumentError, match="text"):
        load("bpe").encode(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["a", " ", "é", "\n", "th"])
def test_long_texts_without_a_break_take_no_quadratic_time(family: str, unit: str) -> None:
    tokenizer = load(family)
    text = unit * (30_000 // len(unit))  # moments if every step is linear, minutes if not
    ids = tokenizer.encode(text)
    if family in BYTE_EXACT:
        assert tokenizer.decode(ids, skip_special=True) == text
    else:
        assert ids
