"""Each kind of file is read with its structure, and hostile ones end in a reason."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written import bomb, docx, laughing, lying, pdf

from tinyllm.localdocs import LocalDocs, chunking, formats, reading
from tinyllm.localdocs.chunking import Chunk, Content, Section, chunks
from tinyllm.localdocs.formats import Unreadable
from tinyllm.localdocs.reading import Reader


def sections(data: str | bytes, suffix: str) -> list[tuple[str, str, int | None, int | None]]:
    raw = data if isinstance(data, bytes) else data.encode()
    with Reader() as reader:
        found = reader.read(raw, suffix).sections
    return [(" > ".join(s.headings), s.text, s.page, s.line) for s in found]


def refused(data: bytes, suffix: str, seconds: float = 30) -> str:
    with Reader(seconds) as reader, pytest.raises(Unreadable) as error:
        reader.read(data, suffix)
    return str(error.value)


# ---- kinds


def test_markdown_is_cut_at_headings_and_not_within_code() -> None:
    text = "intro\n\n# A\none\n\n```\n# no heading\n```\nB\n---\ntwo\n## C ##\nthree\n# D"
    assert sections(text, ".md") == [
        ("", "intro\n", None, 1),
        ("A", "# A\none\n\n```\n# no heading\n```", None, 3),
        ("A > B", "B\n---\ntwo", None, 9),
        ("A > C", "## C ##\nthree", None, 12),
        ("D", "# D", None, 14),
    ]


def test_restructured_text_is_cut_at_headings() -> None:
    text = "=====\nTitle\n=====\n\nOne.\n\nPart\n----\n\nTwo.\n"
    found = sections(text, ".rst")
    assert [(h, n) for h, _, _, n in found] == [("Title", 1), ("Title > Part", 7)]
    with Reader() as reader:
        assert reader.read(text.encode(), ".rst").title == "Title"


def test_source_code_is_cut_at_definitions() -> None:
    text = (
        "import os\n\nclass A:\n    def f(self):\n        return 1\n\nasync def g(x):\n    pass\n"
    )
    assert [(h, n) for h, _, _, n in sections(text, ".py")] == [
        ("", 1), ("class A", 3), ("class A > def f(self)", 4), ("async def g(x)", 7),
    ]  # fmt: skip
    assert [h for h, *_ in sections("pub fn add(a: u8) -> u8 {\n  a\n}\n", ".rs")] == [
        "pub fn add(a: u8) -> u8"
    ]


def test_a_web_page_loses_its_scripts_and_keeps_its_headings() -> None:
    page = (
        "<html><head><title>Shop</title><meta name=author content=Ada></head><body><nav>menu</nav>"
        "<script>steal()</script><h1>Prices</h1><p>Tea   costs\n<b>three</b> euros.</p><h2>Old</h2>"
        "<table><tr><td>a<td>b</table><pre>x\n y</pre></body></html>"
    )
    found = sections(page, ".html")
    assert [h for h, *_ in found] == ["Prices", "Prices > Old"]
    text = "\n".join(t for _, t, _, _ in found)
    assert "Tea costs three euros." in text
    assert "a | b" in text
    assert "steal" not in text
    assert "menu" not in text
    with Reader() as reader:
        content = reader.read(page.encode(), ".htm")
    assert (content.title, content.author) == ("Shop", "Ada")


def test_a_pdf_is_read_by_pages() -> None:
    with Reader() as reader:
        content = reader.read(pdf(["First page.", "Second page."], "Report"), ".pdf")
    assert [(s.text, s.page) for s in content.sections] == [("First page.", 1), ("Second page.", 2)]
    assert (content.title, content.author, content.date) == ("Report", "Ada", "2024-02-29")


def test_a_word_document_is_read_by_headings() -> None:
    with Reader() as reader:
        content = reader.read(docx(), ".docx")
    assert [s.headings for s in content.sections] == [("Contract",), ("Contract", "Price")]
    assert "twelve euros" in content.sections[1].text
    assert "apples | three" in content.sections[1].text
    assert (content.title, content.author) == ("Contract", "Grace")


def test_a_table_keeps_its_header_with_each_part() -> None:
    assert sections("name,age\nAda,36\nGrace,85\n", ".csv") == [
        ("name,age", "Ada,36\nGrace,85\n", None, 2)
    ]
    assert sections("name", ".csv") == [("", "name", None, 1)]


def test_a_notebook_is_read_by_cells() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Plan\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "printed"}]},
    ]
    found = sections(json.dumps({"cells": cells}), ".ipynb")
    assert found == [("Plan", "# Plan\ntext", 1, 1), ("Plan", "x = 1", 2, 1)]
    for cells in ("[]", "{}", '{"cells": 3}', '{"worksheets": [3]}', '{"worksheets": {}}'):
        assert "no notebook" in refused(cells.encode(), ".ipynb")
    assert "no notebook" in refused(b"[" * 100_000, ".ipynb")


def test_odd_cells_are_left_out() -> None:
    good = {"cell_type": "code", "source": ["x = 1"]}
    odd = [3, {}, {"cell_type": "code"}, {"cell_type": "code", "source": [None]}, {"source": 3}]
    found = sections(json.dumps({"cells": [*odd, good, {"source": "no kind"}]}), ".ipynb")
    assert [s for s in found if s[1]] == [("", "x = 1", 6, 1), ("", "no kind", 7, 1)]


def test_an_old_notebook_is_read() -> None:
    """Before format 4: cells in worksheets, "input" for code, headings as cells."""
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["Plan"]},
        {"cell_type": "heading", "level": 9, "source": "Deep"},
        {"cell_type": "code", "input": ["x = ", "1"], "outputs": []},
    ]
    sheets = [{"cells": cells[:2]}, {"cells": cells[2:]}]
    found = sections(json.dumps({"nbformat": 3, "worksheets": sheets}), ".ipynb")
    assert found == [("Plan", "## Plan", 1, 1), ("Deep", "# Deep", 2, 1), ("Deep", "x = 1", 3, 1)]


def test_half_a_surrogate_pair_in_a_heading_is_replaced(docs: LocalDocs, tmp_path: Path) -> None:
    """The heading stands above a cell that is one line of ASCII."""
    cells = [
        {"cell_type": "markdown", "source": "# \ud800"},
        {"cell_type": "code", "source": "x = 1"},
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert docs.add("in", tmp_path / "in").added == 1
    assert docs.search("x")[0].heading == "?"


@pytest.mark.parametrize("suffix", [".md", ".rst", ".py", ".csv", ".txt"])
def test_a_text_too_long_is_refused_before_it_is_taken_to_parts(suffix: str) -> None:
    """Each of its lines would be a heading, and take a hundred times its bytes."""
    data = b"# b\n" * (formats.TEXT // 4 + 1)
    tracemalloc.start()
    assert "longer than 16 M characters" in refused(data, suffix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data)


def test_encodings() -> None:
    assert sections("\ufeffä\r\nb", ".txt")[0][1] == "ä\nb"
    assert sections("ä".encode("utf-16"), ".txt")[0][1] == "ä"
    assert "byte 1" in refused("xä".encode("latin-1"), ".txt")
    assert "zero bytes" in refused(b"a\0b", ".txt")
    assert refused(b" \n ", ".md") == "it has no text"


def test_every_kind_is_known() -> None:
    kinds = ".txt .md .rst .html .pdf .docx .csv .json .ipynb .py .c .rs .go .js".split()
    assert set(kinds) <= set(formats.READERS)


# ---- chunks


def test_chunks_keep_to_sentences_overlap_and_know_their_lines() -> None:
    lines = [f"Sentence {i} says that {i} is a number. It ends here." for i in range(60)]
    found = list(chunks(Content([Section("\n".join(lines), ("H",), None, 11)])))
    assert len(found) > 3
    for chunk in found:
        assert len(chunk.text) <= chunking.SIZE
        assert chunk.text.endswith(".")
        whole = "\n".join(lines[chunk.first_line - 11 : chunk.last_line - 10])
        assert chunk.text in whole
    for one, other in itertools.pairwise(found):
        assert other.text[:20] in one.text
        assert other.first_line <= one.last_line


def test_a_text_without_spaces_is_cut_all_the_same() -> None:
    found = list(chunks(Content([Section("x" * 5000)])))
    assert [len(c.text) for c in found] == [800] * 6 + [200]


@given(st.text(alphabet=st.sampled_from("ab.。 \n\t"), max_size=4000))
def test_chunks_lose_nothing(text: str) -> None:
    found = list(chunks(Content([Section(text, (), None, 1)])))
    at = 0
    for chunk in found:
        assert 0 < len(chunk.text) <= chunking.SIZE
        start = text.find(chunk.text, max(0, at - chunking.OVERLAP - chunking.SIZE))
        assert start >= 0
    kept = "".join("".join(c.text.split()) for c in found)
    assert len(kept) >= len("".join(text.split()))


def test_the_embedded_text_says_what_it_is_of() -> None:
    assert chunking.embedded_text("Tea", Chunk("x", "Black")) == "Tea: Black\nx"
    assert chunking.embedded_text("Tea", Chunk("x", "Tea > Black")) == "Tea > Black\nx"
    assert chunking.embedded_text("", Chunk("x")) == "x"


# ---- hostile files


def endless_pdf() -> bytes:
    """Its pages lead back to their own list."""
    return pdf(["x"], kids="2 0 R 2 0 R 3 0 R")


def test_a_zip_bomb_is_refused_before_it_is_unpacked() -> None:
    data = bomb()
    assert len(data) < 16 << 20
    start = time.monotonic()
    assert "1075 MB" in refused(data, ".docx")
    assert time.monotonic() - start < 30
    assert refused(lying(data), ".docx")
    assert (
        refused(bomb(65 << 20), ".docx")
        == "it unpacks to 68 MB in one of its files; at most 67 are read"
    )


def test_a_billion_laughs_are_refused() -> None:
    assert refused(laughing(), ".docx")


def test_damaged_documents_end_in_a_reason() -> None:
    good = pdf(["Text."])
    for data, suffix in [
        (b"", ".pdf"), (b"%PDF-1.4\n", ".pdf"), (good[:200], ".pdf"), (endless_pdf(), ".pdf"),
        (b"PK\x03\x04", ".docx"), (docx()[:500], ".docx"), (b"<html></html>", ".html"),
    ]:  # fmt: skip
        assert refused(data, suffix), suffix


def test_a_reader_that_hangs_is_ended_and_the_next_file_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = docx()
    with Reader(seconds=0.001) as reader:
        with pytest.raises(Unreadable, match=r"took more than 0.001 seconds"):
            reader.read(data, ".docx")
        reader._seconds = 30
        assert reader.read(data, ".docx").title == "Contract"


@pytest.mark.slow
def test_what_takes_too_much_memory_is_refused() -> None:
    """A page of 200 MB of elements, read with 1 GiB."""
    assert refused(b"<p>" * ((reading.FILE - 10) // 3), ".html", seconds=60)


def test_a_missing_package_is_named_and_tried_again(
    docs: LocalDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.pdf").write_bytes(pdf(["Some text."]))
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    report = docs.add("x", tmp_path / "x")
    assert "pip install 'tinyllm[localdocs]'" in report.unreadable[0][1]
    monkeypatch.undo()
    assert docs.update()["x"].changed == 1
    assert docs.search("text")[0].place == "a.pdf, page 1, line 1"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="files that only Unix has")
def test_a_folder_of_hostile_files_is_read_in_bounded_time_and_memory(
    docs: LocalDocs, tmp_path: Path
) -> None:
    place = tmp_path / "bad"
    place.mkdir()
    with (place / "zeros.txt").open("wb") as f:
        f.truncate(2 << 30)
    with (place / "zeros.pdf").open("wb") as f:
        f.truncate(1 << 20)
    (place / "bomb.docx").write_bytes(bomb(1 << 27))
    (place / "lying.docx").write_bytes(lying(bomb(1 << 27)))
    (place / "laughs.docx").write_bytes(laughing())
    (place / "endless.pdf").write_bytes(endless_pdf())
    (place / "cut.pdf").write_bytes(pdf(["Text."])[:150])
    (place / "binary.md").write_bytes(bytes(range(256)) * 40)
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "deep.ipynb").write_bytes(b"[" * (1 << 20))
    (place / "nul.csv").write_bytes(b"\0" * 1000)
    (place / "empty.html").write_bytes(b"")
    (place / "wild.html").write_bytes(b"<div>" * 100_000)
    (place / "a\nb\x1b[31m.txt").write_text("A name with a newline.")
    (place / os.fsdecode(b"\xff\xfe.txt")).write_text("A name that is no UTF-8.")
    (place / "loop.txt").symlink_to("loop.txt")
    (place / "passwd.txt").symlink_to("/etc/passwd")
    (place / "up").symlink_to("..")
    os.mkfifo(place / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(place / "socket.txt"))
    (place / "folder.txt").mkdir()
    deep = place / "d"
    for _ in range(60):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "bottom.txt").write_text("It is far down.")
    (place / "line.json").write_text('{"x": "' + "y" * 100_000 + '"}')
    (place / "good.txt").write_text("One good file.")
    tracemalloc.start()
    report = docs.add("bad", place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 << 20
    reasons = dict(report.unreadable)
    assert report.added == 5
    assert len(reasons) == 18
    assert "2147 MB; at most 67 MB" in reasons["zeros.txt"]
    assert "it is a link" in reasons["loop.txt"]
    assert "it is a link" in reasons["up"]
    assert reasons["pipe.txt"] == reasons["socket.txt"] == "it is no regular file"
    assert "root:" not in " ".join(h.text for h in docs.search("root bin bash", k=50))
    assert docs.search("newline")[0].file == "a\\nb\\x1b[31m.txt"
    assert docs.search("no UTF-8")[0].file == "\\xff\\xfe.txt"
    assert docs.search("far down")[0].file.endswith("/d/bottom.txt")
    assert docs.check() == []
    again = docs.update()["bad"]
    assert not again.anything
    assert len(again.unreadable) == 18
    assert dict(docs.unreadable("bad")) == reasons


@pytest.mark.parametrize("suffix", [".md", ".rst", ".py", ".txt", ".csv"])
def test_lines_that_would_take_a_search_for_ever_take_none(suffix: str) -> None:
    """Spaces and marks by the hundred thousand, on which patterns could go back and forth."""
    hostile = (
        "# "
        + " " * 200_000
        + "x#\n"
        + "=" * 200_000
        + "\n"
        + "def " * 100_000
        + "\n\n"
        + " \n" * 100_000
    )
    with Reader() as reader:
        content = reader.read(f"{hostile}end".encode(), suffix)
    assert list(chunks(content))[-1].text.endswith("end")
