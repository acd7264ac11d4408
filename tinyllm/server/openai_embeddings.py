"""Embeddings by OpenAI's protocol, and reranking by the one of Jina and Cohere."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field

from ..engine.embedding import BeforeStep
from ..errors import UnsupportedModel
from .errors import Refusal
from .extras import pool_of, with_texts
from .fields import Flag, Many, Positive, Strict, check_ids
from .openai_completions import Prompt
from .pool import Served
from .shapes import EmbeddingsShape, RerankShape, shaped
from .wording import fields_of

router = APIRouter()


class EmbeddingBody(Strict):
    """A request of ``/v1/embeddings``."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None


@router.post(
    "/v1/embeddings", **shaped(EmbeddingsShape, example={"input": ["One text", "Another"]})
)
@router.post("/embeddings", include_in_schema=False)
async def embeddings(body: EmbeddingBody, request: Request) -> dict[str, Any]:
    """Turn texts, or their tokens, into vectors of length 1."""
    given: Any = body.input
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    check_inputs(len(texts), request, "input")
    if "" in texts:
        raise Refusal(
            400, f"input.{texts.index('')}: an empty text; expected one that is not", param="input"
        )

    def work(served: Served, before_step: BeforeStep) -> dict[str, Any]:
        model, size = served.model, body.dimensions
        if size is not None and size > model.config.n_embd:
            raise Refusal(
                400,
                f"dimensions={size}; {served.name} has {model.config.n_embd}",
                param="dimensions",
            )
        ids = [model.tokenizer.encode(t) if isinstance(t, str) else t for t in texts]
        for sequence in ids:
            check_ids(sequence, model, "input")
        vectors = [cut(v, size) for v in model.embed_batch(ids, before_step=before_step)]
        plain = body.encoding_format != "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": v.tolist() if plain else packed(v)}
            for i, v in enumerate(vectors)
        ]
        n_tokens = sum(map(len, ids))
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": served.name, "usage": usage}

    return await with_texts(request, body.model, work, fields_of(body, prompt="input"))  # type: ignore[no-any-return]


def check_inputs(n: int, request: Request, param: str) -> None:
    """Refuse more texts than one request may have."""
    most = pool_of(request).settings.max_inputs
    if n > most:
        raise Refusal(400, f"{n} texts; at most {most} in one request", param=param)


def cut(vector: np.ndarray, size: int | None) -> np.ndarray:
    """The first ``size`` numbers of a vector, at length 1 again."""
    if size is None or size == len(vector):
        return vector
    short = vector[:size]
    return short / max(float(np.linalg.norm(short)), 1e-12)


def packed(vector: np.ndarray) -> str:
    """A vector as OpenAI packs it: float32, little-endian, in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


class Document(Strict):
    """A document to be ranked."""

    text: str


class RerankBody(Strict):
    """A request of ``/v1/rerank``."""

    model: str | None = None
    query: str
    documents: Annotated[Many[str | Document], Field(min_length=1)]
    top_n: Positive | None = None
    return_documents: Flag = False


@router.post(
    "/v1/rerank",
    **shaped(
        RerankShape, example={"query": "What is a cat?", "documents": ["An animal.", "A stone."]}
    ),
)
@router.post("/rerank", include_in_schema=False)
async def rerank(body: RerankBody, request: Request) -> dict[str, Any]:
    """Sort documents by how well they answer a query; a score is from 0 to 1."""
    check_inputs(len(body.documents), request, "documents")
    texts = [d if isinstance(d, str) else d.text for d in body.documents]

    def work(served: Served, before_step: BeforeStep) -> dict[str, Any]:
        model = served.model
        try:
            found = model.rank(body.query, texts, before_step).astype(np.float64)
        except UnsupportedModel:
            raise Refusal(
                400,
                f"{served.name} is no reranker; name one in model, served by its file: "
                "tinyllm serve MODEL RERANKER",
                param="model",
                code="model_not_supported",
            ) from None
        scores = 1 / (1 + np.exp(-found))
        results: list[dict[str, Any]] = []
        for i in np.argsort(-scores, kind="stable")[: body.top_n].tolist():
            results.append({"index": i, "relevance_score": float(scores[i])})
            if body.return_documents:
                results[-1]["document"] = {"text": texts[i]}
        n_tokens = sum(len(model.tokenizer.encode_pair(body.query, t)[0]) for t in texts)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "model": served.name, "results": results, "usage": usage}

    return await with_texts(request, body.model, work, fields_of(body, prompt="documents"))  # type: ignore[no-any-return]
