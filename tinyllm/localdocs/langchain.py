"""LangChain's retriever over collections; it needs langchain-core, which is the user's."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from .collections import LocalDocs


class LocalDocsRetriever(BaseRetriever):
    """Finds documents for LangChain's chains.

    Parameters
    ----------
    docs : LocalDocs
        Where it looks.
    k : int
        How many documents it returns.
    options : dict
        What else ``LocalDocs.search`` takes: ``collections``, ``file``, ``since``, ``until``, ``reranker``.
    """

    docs: Any
    k: int = 4
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        docs: LocalDocs = self.docs
        hits = docs.search(query, **{"k": self.k, **self.options, **kwargs})
        return [
            Document(
                hit.text,
                metadata={
                    **{k: v for k, v in hit.reference().items() if k != "text"},
                    "source": hit.path, "collection": hit.collection, "heading": hit.heading,
                    "score": hit.score, "similarity": hit.similarity, "nearness": hit.nearness,
                },
            )
            for hit in hits
        ]  # fmt: skip
