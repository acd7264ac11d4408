"""What families of embedding models were trained to read before a text, and how short vectors may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """What a family of embedding models was trained with."""

    document: str
    query: str
    others: tuple[str, ...] = ()
    recommended: tuple[int, ...] = ()  # Matryoshka dimensions; none: only the full one

    @property
    def prefixes(self) -> tuple[str, ...]:
        return (self.document, self.query, *self.others)


NOMIC = ("search_document", "search_query", ("clustering", "classification"))
SPECS: dict[Spec, str] = {
    Spec("", ""): "all-MiniLM-L6-v1 all-MiniLM-L12-v1 all-MiniLM-L6-v2 all-MiniLM-L12-v2",
    Spec(*NOMIC): (
        "nomic-embed-text-v1 nomic-embed-text-v1-ablated nomic-embed-text-v1-unsupervised"
    ),
    Spec(*NOMIC, (768, 512, 384, 256, 128)): "nomic-embed-text-v1.5",
    Spec(
        "Represent this document for retrieval",
        "Represent this query for retrieving relevant documents",
    ): "llm-embedder",
    Spec("", "Represent this sentence for searching relevant passages"): (
        "bge-small-en bge-base-en bge-large-en bge-small-en-v1.5 bge-base-en-v1.5 bge-large-en-v1.5"
    ),
    Spec("passage", "query"): (
        "e5-small e5-base e5-large e5-small-unsupervised e5-base-unsupervised e5-large-unsupervised"
        " e5-small-v2 e5-base-v2 e5-large-v2"
    ),
    Spec("", "Instruct: Given a query, retrieve relevant passages that answer the query\nQuery"): (
        "e5-mistral-7b-instruct multilingual-e5-small multilingual-e5-base multilingual-e5-large"
        " multilingual-e5-large-instruct"
    ),
}
SPEC_OF = {name: spec for spec, names in SPECS.items() for name in names.split()}
