"""Sentences of documents as answers, each with its lines."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.localdocs import LocalDocs
from tinyllm.localdocs.quoting import sentences


def cut(text: str) -> list[str]:
    return [text[a:b] for a, b in sentences(text)]


LONG = "The kettle stands on the black stove until the water in it boils."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("Short.", ["Short."]),
        (f"{LONG} {LONG}", [LONG, LONG]),
        (f"# Tea\n\n{LONG}\n{LONG}", [f"# Tea\n\n{LONG}", LONG]),
        (f"{LONG[:-1]} for T. S. Eliot. {LONG}", [f"{LONG[:-1]} for T. S. Eliot.", LONG]),
        (f"{LONG} and more. {LONG}", [f"{LONG} and more.", LONG]),
        (f"{LONG} No.", [f"{LONG} No."]),
        ("x" * 3000, ["x" * 3000]),
        ("水" * 70 + "。茶" * 4, ["水" * 70 + "。", "茶。", "茶。", "茶。茶"]),
        ("绿茶要七十度。红茶呢？\n热！", ["绿茶要七十度。", "红茶呢？", "热！"]),
        ("真的吗？！等等。。。好吧！！」他说", ["真的吗？！", "等等。。。", "好吧！！」他说"]),
        ("「熱い。」と言った。（はい！）", ["「熱い。」", "と言った。", "（はい！）"]),
        (f"# 茶\n\n{LONG}\n水。", [f"# 茶\n\n{LONG}", "水。"]),
    ],
)
def test_a_text_is_cut_into_sentences(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


def test_a_question_is_answered_by_sentences(docs: LocalDocs, tmp_path: Path) -> None:
    place = tmp_path / "tea"
    place.mkdir()
    (place / "tea.txt").write_text(
        "The first cup of the morning is a matter of taste and of the hour.\n"
        "Mint tea is drunk in the evening, because it has no caffeine at all.\n\n"
        "Whoever drinks black tea at night lies awake, and reads until it is day.\n"
    )
    docs.add("tea", place)
    found = docs.quote("Which tea has no caffeine?", k=2, nearest=-1)
    assert [h.place for h in found] == ["tea.txt, line 2", "tea.txt, line 4"]
    assert found[0].text.startswith("Mint tea")
    assert found[0].score == found[0].similarity + found[0].words > found[1].score
    assert found[0].reference()["from"] == 2
    assert docs.quote("Which tea has no caffeine?", nearest=3) == []
    assert docs.quote("caffeine", nearest=-1, file="*.md") == []
    with pytest.raises(ArgumentError, match="k=0"):
        docs.quote("tea", k=0)
    with pytest.raises(ArgumentError, match="nearest='a'"):
        docs.quote("tea", nearest="a")  # type: ignore[arg-type]


def test_a_sentence_of_two_chunks_is_quoted_once(docs: LocalDocs, tmp_path: Path) -> None:
    place = tmp_path / "long"
    place.mkdir()
    lines = [f"Line {i} of the poem is about a stone in a river by the sea." for i in range(60)]
    (place / "poem.txt").write_text("\n".join(lines))
    docs.add("long", place)
    found = docs.quote("stone in a river", k=100, nearest=-1)
    assert len(found) > 10
    seen: set[int] = set()
    for h in found:
        assert h.first_line is not None
        assert h.last_line is not None
        assert h.text == "\n".join(lines[h.first_line - 1 : h.last_line])
        its = set(range(h.first_line, h.last_line + 1))
        assert not its & seen
        seen |= its


def test_a_quote_has_the_same_bits_for_any_threads(
    docs: LocalDocs, folder: Path, tmp_path: Path
) -> None:
    docs.add("home", folder)
    with tinyllm.load(n_threads=1) as one, LocalDocs(docs.path, one) as other:
        for question in ("pole", "how hot is green tea?"):
            assert docs.quote(question, nearest=-1) == other.quote(question, nearest=-1)
