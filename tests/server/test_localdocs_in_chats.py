"""Documents quoted in chat completions, with GPT4All's ``references``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import App

import tinyllm
from tinyllm.cli import commands as cli
from tinyllm.loading import BUNDLED
from tinyllm.localdocs import LocalDocs
from tinyllm.localdocs.answering import Quoting
from tinyllm.server import Settings, create_app

ROUTE = "/v1/chat/completions"


@pytest.fixture
def docs(tmp_path: Path) -> Iterator[LocalDocs]:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tea.md").write_text("# Tea\n\nGreen tea wants 70 degrees.\n")
    with LocalDocs(tmp_path / "store.sqlite", BUNDLED) as found:
        found.add("kitchen", tmp_path / "notes")
        yield found


def body(question: str, **more: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 6,
        "temperature": 0,
        **more,
    }


def test_choices_have_references(docs: LocalDocs) -> None:
    app = App(create_app({"tales": None}, Settings(documents=Quoting(docs, nearest=-1))))
    try:
        found = app.post(ROUTE, body("How hot for green tea?", n=2)).json()
        for choice in found["choices"]:
            (reference,) = choice["references"]
            assert reference.keys() == {
                "file",
                "title",
                "author",
                "date",
                "text",
                "page",
                "from",
                "to",
            }
            assert (reference["file"], reference["from"], reference["to"]) == ("tea.md", 1, 3)
        events = app.events(ROUTE, body("How hot for green tea?"))
        last = next(
            e["choices"][0] for e in events if e != "[DONE]" and e["choices"][0]["finish_reason"]
        )
        assert last["references"] == found["choices"][0]["references"]
        assert [e for e in events if e != "[DONE]" and "references" in e["choices"][0]] != events[
            :1
        ]
        with tinyllm.load() as model:
            whole, _ = Quoting(docs, nearest=-1).quote(
                body("How hot for green tea?")["messages"], model
            )  # type: ignore[arg-type]
            alone = model.chat(whole, max_tokens=6, temperature=0)
        assert found["choices"][0]["message"]["content"] == alone.message["content"]
        assert found["usage"]["prompt_tokens"] == len(alone.prompt_ids)
    finally:
        app.close()


def test_a_question_that_no_document_is_near_to_is_answered_without(docs: LocalDocs) -> None:
    app = App(create_app({"tales": None}, Settings(documents=Quoting(docs, nearest=2.0))))
    plain = App(create_app({"tales": None}))
    try:
        found = app.post(ROUTE, body("Hello!")).json()
        without = plain.post(ROUTE, body("Hello!")).json()
        assert found["choices"][0]["references"] == []
        assert "references" not in without["choices"][0]
        assert found["choices"][0]["message"] == without["choices"][0]["message"]
    finally:
        app.close()
        plain.close()


def test_serve_takes_collections(
    docs: LocalDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllm.cli.serving import documents_of

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with LocalDocs(model=BUNDLED) as own:
        own.add("kitchen", tmp_path / "notes")
    assert documents_of(None) is None
    found = documents_of(["kitchen"])
    assert found is not None
    assert found.find("green tea") == [] or found.find("green tea")[0].file == "tea.md"
    assert list(found.collections) == ["kitchen"]
    found.docs.close()
    assert cli.main(["serve", "--localdocs", "cellar", "--port", "0"]) == 2
