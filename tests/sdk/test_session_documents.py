"""``chat_session(localdocs=...)``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllm.loading import BUNDLED
from tinyllm.localdocs import LocalDocs, answering
from tinyllm.sdk import GPT4All


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalDocs]:
    """A collection in the user's own store."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(answering, "near", lambda hits, nearest: hits)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tea.md").write_text("# Tea\n\nGreen tea wants 70 degrees.\n")
    with LocalDocs(model=BUNDLED) as docs:
        docs.add("kitchen", tmp_path / "notes")
        yield docs


@pytest.mark.parametrize("by_name", [False, True])
def test_a_session_quotes_documents(kitchen: LocalDocs, by_name: bool) -> None:
    with GPT4All(str(BUNDLED), allow_download=False) as model:
        assert model.references == []
        with model.chat_session(localdocs="kitchen" if by_name else kitchen):
            answer = model.generate("How hot for green tea?", max_tokens=8, temp=0)
            asked = model.current_chat_session[-2]["content"]
            assert asked.endswith("Question: How hot for green tea?")
            assert "> Green tea wants 70 degrees." in asked
            assert [(r["file"], r["from"], r["to"]) for r in model.references] == [("tea.md", 1, 3)]
            streamed = "".join(
                model.generate("And again, green tea?", max_tokens=8, temp=0, streaming=True)
            )
            assert model.references
        with model.chat_session():
            assert model.generate(asked, max_tokens=8, temp=0) == answer
            assert model.references == []
        assert isinstance(streamed, str)


def test_without_a_near_document_the_message_stays(
    kitchen: LocalDocs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "near", lambda hits, nearest: [])
    with (
        GPT4All(str(BUNDLED), allow_download=False) as model,
        model.chat_session(localdocs=kitchen),
    ):
        model.generate("green tea", max_tokens=2)
        assert model.current_chat_session[-2]["content"] == "green tea"
        assert model.references == []


def test_a_wrong_collection_is_an_error_at_once(kitchen: LocalDocs) -> None:
    with GPT4All(str(BUNDLED), allow_download=False) as model:
        for wrong in ("cellar", 3):
            with (
                pytest.raises(ValueError, match=r"cellar|expected a LocalDocs"),
                model.chat_session(localdocs=wrong),
            ):
                pass
