"""Documents quoted in chat completions, with GPT4All's ``references``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.cli import commands as cli
from tinyllm.loading import BUNDLED
from tinyllm.localdocs import LocalDocs
from tinyllm.localdocs.answering import QUESTION, Quoting

ROUTE = "/v1/chat/completions"
KEYS = {"file", "title", "author", "date", "text", "page", "from", "to"}


@pytest.fixture
def docs(tmp_path: Path) -> Iterator[LocalDocs]:
    """A store with one document."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tea.md").write_text("# Tea\n\nGreen tea wants 70 degrees.\n")
    with LocalDocs(tmp_path / "store.sqlite", BUNDLED) as found:
        found.add("kitchen", tmp_path / "notes")
        yield found


def body(question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": 6, "temperature": 0, **more}


def test_choices_have_references(
    docs: LocalDocs, make_app: Callable[..., Any], model: tinyllm.Model
) -> None:
    quoting = Quoting(docs, nearest=-1)
    app, asked = make_app(documents=quoting), body("How hot for green tea?")
    found = app.post(ROUTE, {**asked, "n": 2}).json()
    for choice in found["choices"]:
        (reference,) = choice["references"]
        assert reference.keys() == KEYS
        assert (reference["file"], reference["from"], reference["to"]) == ("tea.md", 1, 3)
    *chunks, done = app.events(ROUTE, asked)
    assert done == "[DONE]"
    told = [c["choices"][0]["references"] for c in chunks if "references" in c["choices"][0]]
    assert told == [found["choices"][0]["references"]]
    assert chunks[-1]["choices"][0]["finish_reason"]
    assert "references" in chunks[-1]["choices"][0]
    whole, _ = quoting.quote(asked["messages"], model)
    alone = model.chat(whole, max_tokens=6, temperature=0)
    assert found["choices"][0]["message"]["content"] == alone.message["content"]
    assert found["usage"]["prompt_tokens"] == len(alone.prompt_ids)


def test_a_question_that_no_document_is_near_to_is_answered_without(
    docs: LocalDocs, make_app: Callable[..., Any], app: Any
) -> None:
    found = make_app(documents=Quoting(docs, nearest=3)).post(ROUTE, body("Hello!")).json()
    without = app.post(ROUTE, body("Hello!")).json()
    assert found["choices"][0]["references"] == []
    assert "references" not in without["choices"][0]
    assert found["choices"][0]["message"] == without["choices"][0]["message"]


def test_an_answer_longer_than_the_context_is_no_error(
    docs: LocalDocs, make_app: Callable[..., Any], model: tinyllm.Model
) -> None:
    app = make_app(documents=Quoting(docs, nearest=-1))
    asked = body("How hot for green tea?", max_tokens=model.n_ctx, stop=[" ", ".", "e"])
    (choice,) = app.post(ROUTE, asked).json()["choices"]
    assert [r["file"] for r in choice["references"]] == ["tea.md"]
    long = body("tea " * (model.n_ctx * 3 // 8), max_tokens=model.n_ctx, stop=[" ", ".", "e"])
    assert app.post(ROUTE, long).json()["choices"][0]["references"] == []


def test_of_a_long_message_the_end_is_searched_for(
    docs: LocalDocs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(docs, "search", lambda text, *_: asked.append(text) or [])
    Quoting(docs).find("x" * 100_000 + " How hot?")
    assert len(asked[0]) == QUESTION
    assert asked[0].endswith("How hot?")


def test_serve_takes_collections(
    docs: LocalDocs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyllm.cli.serving import documents_of

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with LocalDocs(model=BUNDLED) as own:
        own.add("kitchen", tmp_path / "notes")
        own.add("cellar", tmp_path / "notes")
    assert documents_of(None) is None
    for given, wanted in ((["kitchen"], ["kitchen"]), (["kitchen", "-"], None)):
        found = documents_of(given)
        assert found is not None
        assert found.collections == wanted
        found.nearest = -1
        assert len(found.find("green tea")) == (1 if wanted else 2)
        found.docs.close()
    assert cli.main(["serve", "--localdocs", "attic", "--port", "0"]) == 2
