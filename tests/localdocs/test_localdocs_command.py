"""``tinyllm localdocs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllm.cli import commands as cli
from tinyllm.loading import BUNDLED
from tinyllm.localdocs import collections


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main(["localdocs", *words]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_a_collection_from_its_beginning_to_its_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.txt").write_bytes(b"\xff")
    out = said(capsys, "add", "home", str(folder), "--model", str(BUNDLED))
    assert out == (
        "home: 3 files added, 0 changed, 0 gone, 0 as before; 4 texts embedded\n"
        "not read: bad.txt: it is no text in UTF-8 (byte 0); convert it\n"
    )
    assert "home         3 documents, 4 chunks, 1 not read\n" in said(capsys, "list")
    out = said(capsys, "search", "home", "pole beans", "-k", "2")
    hits = out.split("\n\n")
    assert len(hits) == 2
    assert hits[0].startswith("garden/beans.txt, lines 1 to 3, score ")
    assert hits[0].endswith("\nBeans climb a pole.\nWater them at night.")
    assert hits[1].startswith(("tea.md, ", "rules.py, "))
    (found,) = json.loads(said(capsys, "search", "-", "pole", "-k", "1", "--json"))
    assert (found["file"], found["from"], found["to"]) == ("garden/beans.txt", 1, 3)
    assert said(capsys, "search", "home", "pole", "--file", "*.py").startswith("rules.py, ")
    out = said(capsys, "quote", "home", "which plants climb a pole?", "--nearest", "-1", "-k", "1")
    assert out == "Beans climb a pole.\nWater them at night.\n[1] garden/beans.txt, lines 1 to 3\n"
    (found,) = json.loads(
        said(capsys, "quote", "home", "pole", "--nearest", "0", "-k", "1", "--json")
    )
    assert (found["file"], found["from"], found["to"]) == ("garden/beans.txt", 1, 3)
    assert said(capsys, "quote", "home", "pole", "--nearest", "3") == "Not in the documents.\n"
    out = said(capsys, "ask", "home", "pole?", "-n", "5", "--nearest", "-1", "-k", "1")
    shown = "\n\nIn the documents:\n\nBeans climb a pole.\nWater them at night.\n"
    assert out.endswith(f"{shown}[1] garden/beans.txt, lines 1 to 3\n")
    found = json.loads(said(capsys, "ask", "home", "pole?", "--nearest", "3", "--json"))
    assert found == {"text": "Not in the documents.", "references": [], "quotes": []}
    (folder / "bad.txt").unlink()
    assert "0 changed, 1 gone" in said(capsys, "update")
    assert said(capsys, "unreadable", "home") == ""
    assert said(capsys, "check") == "the store is consistent\n"
    assert said(capsys, "reembed", "--model", str(BUNDLED)).startswith("4 texts embedded with ")
    assert said(capsys, "rm", "home") == ""
    assert json.loads(said(capsys, "list", "--json")) == []


def test_texts_without_vectors_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(folder.parent / "s.sqlite")

    def killed(*args: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(collections, "embed", killed)
        words = ["add", "home", str(folder), "--store", store, "-m", str(BUNDLED)]
        assert cli.main(["localdocs", *words]) != 0
    capsys.readouterr()
    line = f"4 of 4 texts have no vectors yet; run `tinyllm localdocs update --store {store}`\n"
    assert said(capsys, "list", "--store", store).count(line) == 1
    assert said(capsys, "check", "--store", store) == f"the store is consistent\n{line}"
    for action in ("search", "quote", "ask"):
        for name in ("home", "-"):
            words = [action, name, "pole", "--store", store]
            words += ["-m", str(BUNDLED)] * (action != "ask")
            assert cli.main(["localdocs", *words]) == 0
            assert f"({line[:-1]})\n" in capsys.readouterr().err
    assert "; 4 texts embedded" in said(capsys, "update", "--store", store, "-m", str(BUNDLED))
    assert cli.main(["localdocs", "search", "home", "pole", "--store", store]) == 0
    assert capsys.readouterr().err == ""


def test_what_was_passed_over_or_not_found_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.doc", "b.DOC", "c.odt", "d", *(f"e.{i:02}" for i in range(9))):
        (folder / name).write_text("x")
    (folder / "emoji.txt").write_text("pole \U0001f468\u200d\U0001f469 \u202e\x07")
    out = said(capsys, "add", "home", str(folder), "--model", str(BUNDLED))
    assert out.endswith(
        "passed over: 13 files of kinds that are not read (2 .doc, 1 without a suffix, 1 .00, 1 .01, 1 .02,"
        " 1 .03, 1 .04, 1 .05, 4 others)\n"
    )
    assert "pole \U0001f468\u200d\U0001f469   \n" in said(capsys, "search", "home", "pole")
    assert cli.main(["localdocs", "search", "home", "pole", "--until", "1971"]) == 0
    assert capsys.readouterr() == ("", "(nothing found)\n")


def test_only_add_makes_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "typo.sqlite"
    for words in (["list"], ["search", "-", "x"], ["update"], ["check"], ["rm", "home"]):
        err = said(capsys, *words, "--store", str(store), code=2)
        assert f"there is no store '{store}'; `tinyllm localdocs add` makes one" in err
        assert not store.exists()


def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in [
        (["add", "home"], "expected: tinyllm localdocs add NAME FOLDER ...; found 1 words"),
        (["search", "home", "two", "words"], "put a question between quotes"),
        (["search", "home", "x", "-m", "no.gguf"], "there is no collection 'home'"),
        (["search", "-", "x", "-m", "no.gguf"], "there are no collections; make one"),
        (["ask", "home", "x"], "there is no collection 'home'"),
        (["add", "-", str(folder), "-m", str(BUNDLED)], "it means all"),
        (["rm", "home"], "there is no collection 'home'; there are: none yet"),
        (["add", "home", str(folder / "no"), "-m", str(BUNDLED)], "there is no folder"),
    ]:
        err = said(capsys, *words, code=2)
        assert what in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["localdocs", "serch", "home", "x"])
    assert "did you mean 'search'?" in capsys.readouterr().err
