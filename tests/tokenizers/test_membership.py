"""Looking many strings up at once finds what a set finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import gguf, tokenizers
from tinyllm.errors import GGUFError
from tinyllm.gguf import StringArray
from tinyllm.tokenizers import merges as reading
from tinyllm.tokenizers.membership import Known, Strings, all_differ

T = "tokenizer.ggml."
# few letters and lengths around those of one and two numbers: much that is nearly equal
WORD = st.text("ab", min_size=1, max_size=20).map(str.encode)


def strings(words: list[bytes]) -> Strings:
    stored = StringArray.of(words)
    return Strings(stored.memory, stored.starts(), stored.ends)


@given(known=st.lists(WORD, min_size=1, max_size=60), asked=st.lists(WORD, max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_same_as_sets(known: list[bytes], asked: list[bytes]) -> None:
    some = [w for w in asked if w in known]
    collection = Known(strings(known))
    assert collection.has_all(strings(some))
    assert collection.has_all(strings(asked)) == (set(asked) <= set(known))
    assert all_differ(strings(asked)) == (len(set(asked)) == len(asked))


@pytest.mark.parametrize("n", [8, 15, 16, 17])
def test_the_beginning_of_a_long_string_is_another(n: int) -> None:
    known = Known(strings([b"ab" * 12, b"c"]))
    assert not known.has_all(strings([(b"ab" * 12)[:n]]))
    assert known.has_all(strings([b"ab" * 12]))


def test_strings_that_share_a_place_are_found() -> None:
    words = [f"{i:x}".encode() * (1 + i % 3) for i in range(1, 300_000)]
    known = Known(strings(words))
    assert known.has_all(strings(words[::-1]))
    assert not known.has_all(strings([*words, b"no such word"]))
    assert all_differ(strings(list(set(words))))
    assert not all_differ(strings([*words, words[0]]))


TOKENS = ["a", "b", *("ab" * n for n in (1, 2, 8, 10, 12)), "x", "y", "xy"]
SOUND = ["a b", "ab ab", f"{'ab' * 8} {'ab' * 2}", "x y"]
WRONG = {
    "a c": "merge 4, 'a c', is of or to no token",
    "b a": "merge 4, 'b a', is of or to no token",
    f"{'ab' * 12} {'ab' * 12}": "is of or to no token",
    "ab": "merge 4, 'ab', is not two tokens with a space",
    "a b": "a merge stands twice",
    " b": "merge 4, ' b', is of or to no token",
    "a ": "merge 4, 'a ', is of or to no token",
    "x  y": "is of or to no token",
    "": "is not two tokens with a space",
    "a\0 b": "is of or to no token",
}


def metadata(merges: list[str], stored: bool) -> dict[str, object]:
    keep = StringArray.of if stored else list
    return {
        T + "model": "gpt2",
        T + "pre": "gpt-2",
        T + "tokens": keep(TOKENS),
        T + "merges": keep(merges),
    }


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_refused_in_the_same_words(wrong: str, stored: bool) -> None:
    with pytest.raises(GGUFError, match=f"tokenizer.ggml.merges: .*{WRONG[wrong]}"):
        tokenizers.load(metadata([*SOUND, wrong], stored))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("merges", [SOUND, [], ["x y", "a b"]])
def test_sound_merges_are_read(
    merges: list[str], stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stored:  # not one by one
        monkeypatch.setattr(reading, "_check_singly", None)
    tokenizer = tokenizers.load(metadata(merges, stored))
    joined = "a b" in merges
    assert tokenizer.encode("ab", add_special=False) == ([2] if joined else [0, 1])


@pytest.mark.parametrize("name", ["deepseek-coder", "falcon", "gpt-2", "llama-bpe", "qwen2"])
def test_real_vocabularies_are_read_together(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_check_singly", None)
    with gguf.open(data / "tokenizers" / f"ggml-vocab-{name}.gguf") as file:
        assert tokenizers.load(file.metadata).encode("Hello")
