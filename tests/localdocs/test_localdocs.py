"""Collections: adding, changing, forgetting, searching; several processes at once."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm.errors import ArgumentError, StateError
from tinyllm.localdocs import LocalDocs, collections, embedding, store, updating, vectors
from tinyllm.localdocs.answering import NEAREST as NEAR
from tinyllm.localdocs.search import NEAREST, Filter, Hit


def names(docs: LocalDocs, query: str, **options: object) -> list[str]:
    return [hit.file for hit in docs.search(query, **options)]


def test_a_folder_is_read_and_searched_by_words(docs: LocalDocs, folder: Path) -> None:
    report = docs.add("home", folder)
    assert (report.added, report.changed, report.removed, report.unreadable) == (3, 0, 0, [])
    assert report.embedded == 4
    hit = docs.search("Which bean climbs up a pole?")[0]
    assert (hit.file, hit.collection, hit.first_line, hit.last_line) == (
        "garden/beans.txt",
        "home",
        1,
        3,
    )
    assert hit.text == "Beans climb a pole.\n\nWater them at night."
    assert hit.path == str(folder / "garden" / "beans.txt")
    black = docs.search("black")[0]
    assert (black.title, black.heading, black.place) == (
        "Tea",
        "Tea > Black",
        "tea.md, lines 5 to 7",
    )
    assert docs.search("litre")[0].heading == "def water(plant)"
    assert docs.check() == []


def test_a_hit_becomes_a_reference_of_gpt4all(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    found = docs.search("black")[0].reference()
    date = found.pop("date")
    assert len(date) == 10
    assert found == {
        "file": "tea.md", "title": "Tea", "author": "", "text": "## Black\n\nBlack tea boils.", "page": -1,
        "from": 5, "to": 7,
    }  # fmt: skip


def test_meaning_finds_what_shares_no_word(data: Path, tmp_path: Path) -> None:
    for name, text in {
        "pets.txt": "A puppy needs to go outside every few hours, and barks when it is lonely.",
        "law.txt": "The tenant pays for repairs up to a hundred euros a year.",
        "sea.txt": "Ships carry grain and iron ore across the Atlantic.",
    }.items():
        (tmp_path / name).write_text(text)
    model = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    with LocalDocs(tmp_path / "store.sqlite", model) as docs:
        docs.add("all", tmp_path)
        assert names(docs, "keeping a young dog")[0] == "pets.txt"
        assert names(docs, "who covers damage in a rented flat")[0] == "law.txt"
        best = docs.search("freight vessels crossing the ocean")[0]
        assert best.file == "sea.txt"
        assert 0.3 < best.similarity < 1
        assert best.nearness == best.similarity >= NEAR
        assert best.words == 0


def test_a_question_of_something_else_has_nothing_near(data: Path, tmp_path: Path) -> None:
    """Words alone are not enough, nor is a faint likeness; both together are."""
    (tmp_path / "tea.txt").write_text("Green tea wants water of 70 degrees. Mint has no caffeine.")
    (tmp_path / "fence.txt").write_text("The fence of the garden was painted by our aunt in May.")
    model = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    with LocalDocs(tmp_path / "store.sqlite", model) as docs:
        docs.add("all", tmp_path)
        for query, near in [
            ("Which herb is free of caffeine?", ["tea.txt"]),
            ("How many degrees does the water need?", ["tea.txt"]),
            ("Who painted the garden fence?", ["fence.txt"]),
            ("Who painted the Mona Lisa?", []),
            ("How often should a cello be restrung?", []),
            ("Hello!", []),
        ]:
            hits = docs.search(query)
            assert [h.file for h in hits if h.nearness >= NEAR] == near, query
            assert all(h.nearness == h.similarity + max(h.similarity, 0) * h.words for h in hits)


def test_words_of_a_script_without_spaces_count_by_pairs(docs: LocalDocs, folder: Path) -> None:
    (folder / "山.txt").write_text("富士山是日本最高的山。", "utf-8")
    docs.add("notes", folder)
    found = {h.file: h for h in docs.search("日本最高的山是什么")}
    assert 0.4 < found["山.txt"].words < 1
    assert all(h.words == 0 for name, h in found.items() if name != "山.txt")


def test_nearness_does_not_fall_as_words_match() -> None:
    for similarity in (-0.2, 0.0, 0.3):
        near = [
            Hit("f", "c", "", "", "", "", "", None, None, None, 0.0, similarity, w, "").nearness
            for w in (0.0, 0.5, 1.0)
        ]
        assert near == sorted(near)


def test_a_hit_says_which_share_of_the_words_it_has(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)

    def words(query: str) -> dict[str, float]:
        return {h.file: h.words for h in docs.search(query)}

    assert words("a pole")["garden/beans.txt"] == 1
    assert words("poles and climbing")["garden/beans.txt"] == 1  # by their stems
    a_word_that_is_nowhere_weighs_most = words("pole tungsten")["garden/beans.txt"]
    assert 0 < a_word_that_is_nowhere_weighs_most < 0.5
    assert words("tea water")["rules.py"] == pytest.approx(words("tea water")["garden/beans.txt"])
    assert set(words("where are you?").values()) == {0}
    assert docs.search("Black")[0].words == 1


# ---- changes


def test_only_what_changed_is_read_and_embedded(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    (folder / "tea.md").write_text(
        "# Tea\n\nGreen tea wants 80 degrees.\n\n## Black\n\nBlack tea boils.\n"
    )
    (folder / "rules.py").unlink()
    (folder / "new.txt").write_text("Nothing else.")
    report = docs.update()["home"]
    assert (report.added, report.changed, report.removed, report.unchanged) == (1, 1, 1, 1)
    assert report.embedded == 2  # the section on black tea stands elsewhere, and is what it was
    assert "80 degrees" in docs.search("degrees")[0].text
    assert "rules.py" not in names(docs, "litre")
    assert not docs.update()["home"].anything
    assert docs.check() == []


def test_a_change_within_the_clock_s_tick_is_seen(docs: LocalDocs, folder: Path) -> None:
    """The size and the time of change are the ones known, as on a coarse file system."""
    docs.add("home", folder)
    path = folder / "garden" / "beans.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("night", "noons"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert docs.update()["home"].changed == 1


def test_a_file_of_a_far_future_is_read(docs: LocalDocs, folder: Path) -> None:
    """An archive may give a file a time whose nanoseconds no 64 bits hold."""
    try:
        os.utime(folder / "tea.md", (10**10, 10**10))
    except OSError:
        pytest.skip("the file system has no such times")
    assert docs.add("home", folder).added == 3
    assert docs.search("tea", since="2200")[0].file == "tea.md"
    assert docs.update()["home"].unchanged == 3


def test_a_touched_or_moved_file_is_not_embedded_again(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    os.utime(folder / "tea.md", (1, 1))
    assert docs.update()["home"].unchanged == 3
    assert docs.search("tea", until="1970")[0].file == "tea.md"
    (folder / "garden" / "beans.txt").rename(folder / "beans.txt")
    report = docs.update()["home"]
    assert (report.added, report.removed) == (1, 1)
    assert report.embedded == 1  # its name is part of what is embedded, as it has no title
    (folder / "tea.md").rename(folder / "garden" / "tea.md")
    assert docs.update()["home"].embedded == 0


def test_vectors_that_nothing_needs_are_taken_out(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    docs.add("twice", folder)
    docs.remove("home")
    assert docs._store.one("SELECT count(*) FROM vectors") == 4
    docs.remove("twice")
    assert docs._store.one("SELECT count(*) FROM vectors") == 0
    assert docs.list() == []
    assert docs.check() == []


def test_a_missing_folder_keeps_its_documents(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    folder.rename(folder.with_name("away"))
    report = docs.update()["home"]
    assert report.removed == 0
    assert "no such folder" in report.unreadable[0][1]
    assert names(docs, "pole")[0] == "garden/beans.txt"
    folder.with_name("away").rename(folder)
    assert not docs.update()["home"].anything


def test_a_watcher_tells_of_changes(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    changes = docs.watch("home", seconds=0.01)
    (folder / "late.txt").write_text("It came late.")
    assert next(changes)["home"].added == 1
    (folder / "late.txt").unlink()
    assert next(changes)["home"].removed == 1


# ---- searching


def test_filters(docs: LocalDocs, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "tea.txt").write_text("Tea again.")
    os.utime(other / "tea.txt", (86400 * 366, 86400 * 366))  # 1971-01-02
    docs.add("home", folder)
    docs.add("old", other)
    assert set(names(docs, "tea", k=9, collections="home")) == {
        "tea.md",
        "garden/beans.txt",
        "rules.py",
    }
    assert names(docs, "tea", collections=["old"]) == ["tea.txt"]
    for pattern in ("garden/*", "beans.txt", "Garden/BEANS.*", "be?ns*"):
        assert set(names(docs, "tea", file=pattern)) == {"garden/beans.txt"}
    assert names(docs, "tea", file="garden*") == []
    assert names(docs, "tea", until="1971") == ["tea.txt"]
    assert names(docs, "tea", until="1971-01-02", since="1971-01") == ["tea.txt"]
    assert names(docs, "tea", until="1971-01-01") == []
    assert "tea.txt" not in names(docs, "tea", k=9, since="1972")


def test_a_reranker_decides_the_order(docs: LocalDocs, folder: Path) -> None:
    class Shortest:
        def rank(self, query: str, texts: list[str]) -> np.ndarray:
            return np.array([-len(t) for t in texts], np.float32)

    docs.add("home", folder)
    hits = docs.search("tea", k=4, reranker=Shortest())  # type: ignore[arg-type]
    assert [h.score for h in hits] == sorted((-len(h.text) for h in hits), reverse=True)


def test_search_is_the_same_for_any_threads_and_any_segments(
    docs: LocalDocs, folder: Path, bundled: tinyllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Text number {i} of beans and {i * i} poles.")
    docs.add("home", folder)
    whole = docs.search("text of beans", k=30)
    monkeypatch.setattr(vectors, "SEGMENT", 7)
    with LocalDocs(docs.path, bundled, n_threads=1) as other:
        assert other.search("text of beans", k=30) == whole


def test_the_search_is_exact(
    docs: LocalDocs, bundled: tinyllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What 8 bits find is what floats find, but for ties within their rounding."""
    monkeypatch.setattr(vectors, "SEGMENT", 300)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with docs._store.writing() as db:
        docs._store.keep(row_bytes=embedding.row_bytes(64))
        many = ((str(i).encode(), codes) for i, codes in enumerate(embedding.pack(rows)))
        db.executemany("INSERT INTO vectors (digest, codes) VALUES (?, ?)", many)
    search = vectors.Vectors(docs._store, 64)
    search.refresh()
    found = 0
    for query in rows[:50]:
        ids, values = search.best(query, 10)
        assert list(values) == sorted(values, reverse=True)
        true = np.argsort(-(rows @ query))[:10] + 1
        found += len(set(true) & set(ids.tolist()))
    assert found >= 0.97 * 500
    ids, _ = search.best(rows[0], 10, np.array([5, 6, 2000]))
    assert set(ids.tolist()) == {5, 6}


def test_words_in_too_many_chunks_are_left_out(
    docs: LocalDocs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllm.localdocs import search

    def by_words(query: str) -> list[int]:
        return search.by_words(docs._store, search.counts(docs._store, query), "", [])

    docs.add("home", folder)
    assert len(by_words("tea pole")) == 3
    monkeypatch.setattr(search, "COMMON", 1)
    assert len(by_words("tea pole")) == 1
    assert by_words("tea") == []


def test_a_text_that_is_repeated_for_ever_floods_no_search(docs: LocalDocs, folder: Path) -> None:
    (folder / "flood.md").write_text("# b\n" * 3000)
    docs.add("home", folder)
    assert docs.search("tea", k=4000)[0].file == "tea.md"
    assert len(docs.search("tea", k=4000)) == 4 + NEAREST
    assert names(docs, "tea", k=4000, file="*.py") == ["rules.py"]


def test_an_odd_query_is_no_syntax(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    for query in ['"', "NEAR(", "tea* OR -", "a:b {c}", "%", "\x00tea", "’", "the of"]:
        assert docs.search(query)
    with pytest.raises(ArgumentError, match="expected a text"):
        docs.search("  ")
    with pytest.raises(ArgumentError, match="k=0"):
        docs.search("tea", 0)
    with pytest.raises(ArgumentError, match="expected a date"):
        docs.search("tea", since="yesterday")
    with pytest.raises(ArgumentError, match="there is no collection 'no'; there are: 'home'"):
        docs.search("tea", collections="no")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"since": "2026-13-45"}, "since='2026-13-45'; expected a date such as '2026-01-31'"),
        ({"until": "2026-02-30"}, "until='2026-02-30'; expected a date"),
        ({"since": 2026}, "since=2026; expected a date"),
        ({"file": ["*.md"]}, r"file=\['\*.md'\]; expected a pattern such as '\*.md'"),
        ({"collections": []}, r"collections=\[\]; expected a name or names; leave it out for all"),
        ({"collections": 3}, "collections=3; expected a name or names"),
        ({"collections": [3]}, r"collections=\[3\]; expected a name or names"),
        ({"reranker": "a"}, "reranker='a'; expected a model"),
        ({"k": "a"}, "k='a'; expected a whole number"),
    ],
)
def test_a_wrong_filter_is_refused(docs: LocalDocs, given: dict[str, Any], what: str) -> None:
    with pytest.raises(ArgumentError, match=what):
        docs.search("tea", **given)


def test_an_unknown_collection_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with (
        LocalDocs(tmp_path / "store.sqlite", tmp_path / "no.gguf") as docs,
        pytest.raises(ArgumentError, match="there is no collection 'notes'"),
    ):
        docs.search("tea", collections="notes")


def test_texts_without_vectors_are_counted(
    docs: LocalDocs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert docs.pending() == (0, 0)
    with monkeypatch.context() as m:
        m.setattr(collections, "embed", killed)
        with pytest.raises(KeyboardInterrupt):
            docs.add("home", folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("Tea again.")
    with LocalDocs(docs.path, docs.embedder.model) as other:  # as another process sees it
        assert other.pending() == other.pending("home") == (4, 4)
        assert [c.n_pending for c in other.list()] == [4]
        assert other.check() == []
    assert docs.add("other", tmp_path / "other").embedded == 5
    assert docs.pending() == docs.pending("home", "other") == (0, 0)
    assert [c.n_pending for c in docs.list()] == [0, 0]
    with monkeypatch.context() as m:
        m.setattr(collections, "embed", killed)
        with pytest.raises(KeyboardInterrupt):
            docs.reembed()
    assert docs.pending("other") == (1, 1)
    assert docs.pending() == (5, 5)
    assert docs.update("other")["other"].embedded == 5


def killed(*args: object) -> int:
    raise KeyboardInterrupt


def test_an_empty_store_finds_nothing(docs: LocalDocs) -> None:
    assert docs.search("tea") == []
    assert docs.search_bytes == 0


def test_memory_is_known_before_a_search(
    docs: LocalDocs, folder: Path, bundled: tinyllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs.add("home", folder)
    width = bundled.config.n_embd
    assert docs.search_bytes == 4 * (2 * (width // 32 * 34) + 16 + 256)
    monkeypatch.setattr(vectors, "nbytes", lambda n, width: n << 50)
    with pytest.raises(StateError, match=r"the vectors of 4 texts take 4,503,599,627 MB more"):
        docs.search("tea")


# ---- the file


def test_several_read_while_one_writes(
    docs: LocalDocs, folder: Path, bundled: tinyllm.Model
) -> None:
    docs.add("home", folder)
    stop, wrong = threading.Event(), []

    def read() -> None:
        with LocalDocs(docs.path, bundled) as mine:
            while not stop.is_set():
                hits = mine.search("number pole", k=3)
                if not hits or any(not h.text for h in hits):
                    wrong.append(hits)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for r in readers:
        r.start()
    for i in range(12):
        (folder / "n.txt").write_text(f"It is number {i}.")
        docs.update()
    stop.set()
    for r in readers:
        r.join()
    assert wrong == []
    with LocalDocs(docs.path, bundled) as other:
        assert "number 11" in other.search("number", k=1)[0].text


def test_a_reader_sees_what_came_and_what_went(
    docs: LocalDocs, folder: Path, bundled: tinyllm.Model
) -> None:
    docs.add("home", folder)
    with LocalDocs(docs.path, bundled) as other:
        assert names(other, "pole")[0] == "garden/beans.txt"
        (folder / "more.txt").write_text("A pole for a pole vault by a pole.")
        docs.update()
        assert names(other, "pole")[0] == "more.txt"
        (folder / "more.txt").unlink()
        docs.update()
        assert names(other, "pole")[0] == "garden/beans.txt"
        assert len(other.search("pole", k=9)) == 4


def test_another_embedding_model_is_refused_or_embeds_all_again(
    docs: LocalDocs, folder: Path, data: Path, bundled: tinyllm.Model
) -> None:
    docs.add("home", folder)
    other = data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
    with LocalDocs(docs.path, other) as changed:
        for use in (lambda: changed.search("tea"), lambda: changed.add("more", folder)):
            with pytest.raises(ArgumentError, match=r"and all-MiniLM-L6-v2 .* was given"):
                use()
        assert [c.name for c in changed.list()] == ["home"]
        assert changed.reembed() == 4
        assert changed.search("tea")[0].file == "tea.md"
        assert changed.check() == []
    with LocalDocs(docs.path) as again:  # the store knows the model's file
        assert again.search("tea")[0].file == "tea.md"
        assert again.embedder.width == 384
    with LocalDocs(docs.path, bundled) as old, pytest.raises(ArgumentError, match="reembed"):
        old.search("tea")


def test_a_process_notices_that_another_has_embedded_all_again(
    docs: LocalDocs, folder: Path, data: Path, bundled: tinyllm.Model
) -> None:
    """It neither compares vectors of two models nor stores them side by side."""
    docs.add("home", folder)
    docs.search("tea")
    with LocalDocs(docs.path) as reader:
        reader.search("tea")
        with LocalDocs(docs.path, data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf") as changed:
            changed.reembed()
        assert reader.search("tea")[0].file == "tea.md"  # with the model that the store names
    (folder / "new.md").write_text("# New")
    for use in (lambda: docs.search("tea"), docs.update):
        with pytest.raises(ArgumentError, match="reembed"):
            use()
    assert docs.check() == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("no database, but long enough to be looked into" * 100)
    with pytest.raises(StateError, match="expected a file of tinyllm localdocs"):
        LocalDocs(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(StateError, match="another program"):
        LocalDocs(other)
    with pytest.raises(StateError, match="folder"):
        LocalDocs(tmp_path / "text.sqlite" / "folder" / "x.sqlite")


def test_a_later_format_is_refused(docs: LocalDocs) -> None:
    docs._store.db.execute(f"PRAGMA user_version = {store.FORMAT + 1}")
    with pytest.raises(StateError, match=f"has format {store.FORMAT + 1}"):
        LocalDocs(docs.path)


def test_the_checker_finds_what_is_wrong(docs: LocalDocs, folder: Path) -> None:
    docs.add("home", folder)
    db = docs._store.db
    db.execute("DROP TRIGGER chunk_goes")
    db.execute("DELETE FROM chunks WHERE number = 1")
    db.execute("DELETE FROM chunks WHERE text LIKE '%pole%'")
    db.execute("UPDATE vectors SET codes = x'00' WHERE id = 1")
    db.execute("INSERT INTO vectors (digest, codes) VALUES (x'00', x'00')")
    found = "\n".join(docs.check())
    for what in (
        "differs from the chunks",
        "has no chunks",
        "another length",
        "a vector without a chunk",
    ):
        assert what in found


def test_names_and_folders_are_checked(docs: LocalDocs, tmp_path: Path) -> None:
    for name in ("", " x", "a/b", "a\nb"):
        with pytest.raises(ArgumentError, match="no name of a collection"):
            docs.add(name, tmp_path)
    with pytest.raises(ArgumentError, match="'-' is no name of a collection: it means all"):
        docs.add("-", tmp_path)
    with pytest.raises(ArgumentError, match="there is no folder"):
        docs.add("x", tmp_path / "no")
    (tmp_path / "one.txt").write_text("A text.")
    with pytest.raises(ArgumentError, match="it is a file: give the folder that it is in"):
        docs.add("x", tmp_path / "one.txt")
    assert docs.list() == []


def test_an_embedding_model_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with (
        LocalDocs(tmp_path / "s.sqlite") as docs,
        pytest.raises(StateError, match=r"all-MiniLM.*give another"),
    ):
        docs.add("x", tmp_path)


def test_the_store_is_in_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled: tinyllm.Model
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    with LocalDocs(model=bundled) as docs:
        assert docs.path == tmp_path / "share" / "tinyllm" / "localdocs.sqlite"
        assert docs.path.exists()


def test_a_filter_without_conditions_is_none(docs: LocalDocs) -> None:
    assert Filter().sql(docs._store) == ("", [])


def test_names_are_shown_on_one_line() -> None:
    assert updating.shown(b"a\nb\xff\xc3\xa4") == "a\\nb\\xff\u00e4"


def test_files_of_no_known_kind_and_hidden_ones_are_passed_over(
    docs: LocalDocs, folder: Path
) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("secret")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("secret")
    shutil.copytree(folder / "garden", folder / "node_modules")
    (folder / "garden" / "LICENSE").write_text("Anybody may.")
    (folder / "garden" / "b.PNG").write_bytes(b"\x89PNG")
    report = docs.add("home", folder)
    assert report.added == 3
    assert report.passed_over == {".png": 2, "": 1}
