"""``tinyllm localdocs``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyllm.cli import commands as cli
from tinyllm.loading import BUNDLED


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


def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in [
        (["add", "home"], "expected: tinyllm localdocs add NAME FOLDER ...; found 1 words"),
        (["search", "home", "two", "words"], "put a question between quotes"),
        (["rm", "home"], "there is no collection 'home'; there are: none yet"),
        (["add", "home", str(folder / "no"), "-m", str(BUNDLED)], "there is no folder"),
    ]:
        err = said(capsys, *words, code=2)
        assert what in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["localdocs", "serch", "home", "x"])
    assert "did you mean 'search'?" in capsys.readouterr().err
