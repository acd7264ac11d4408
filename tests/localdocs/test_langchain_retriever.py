"""The retriever, by LangChain's own tests of retrievers."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="needs langchain-core")
tests = pytest.importorskip("langchain_tests.integration_tests", reason="needs langchain-tests")

import tinyllm  # noqa: E402
from tinyllm.localdocs import LocalDocs  # noqa: E402
from tinyllm.localdocs.langchain import LocalDocsRetriever  # noqa: E402

pytestmark = pytest.mark.clients
opened: list[LocalDocs] = []


@pytest.fixture(scope="module", autouse=True)
def _documents(tmp_path_factory: pytest.TempPathFactory, bundled: tinyllm.Model) -> Iterator[None]:
    place: pathlib.Path = tmp_path_factory.mktemp("texts")
    for i in range(6):
        (place / f"{i}.txt").write_text(f"Document number {i} on tea.")
    with LocalDocs(place / "store.sqlite", bundled) as docs:
        docs.add("texts", place)
        opened[:] = [docs]
        yield


class TestRetriever(tests.RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> Any:
        return lambda **given: LocalDocsRetriever(docs=opened[0], **given)

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {}

    @property
    def retriever_query_example(self) -> str:
        return "tea"


def test_a_document_says_where_it_is_from() -> None:
    (found,) = LocalDocsRetriever(docs=opened[0], k=1, options={"file": "3*"}).invoke("tea")
    assert found.page_content == "Document number 3 on tea."
    assert found.metadata["source"].endswith("3.txt")
    assert (found.metadata["file"], found.metadata["from"]) == ("3.txt", 1)
