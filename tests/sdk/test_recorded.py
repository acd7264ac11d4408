"""The answers of gpt4all 2.8.2, given again. docs/differences.md lists what is meant to differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.sdk import Embed4All, GPT4All

TEXTS = (
    "greedy_topk1 greedy_temp0 greedy_penalty_default greedy_penalty_1.5_last_8 max0 neg n_predict"
    " empty unicode"
).split()
GREEDY = {"max_tokens": 30, "top_k": 1}
HUNDREDS_OF_A = 7  # the text that llama.cpp and GPT4All read otherwise than Hugging Face


@pytest.mark.parametrize("case", TEXTS)
def test_text(case: str, llm: GPT4All, recorded: dict[str, Any]) -> None:
    want = recorded["generate"][case]
    assert llm.generate(want["prompt"], **want["kwargs"]) == want["text"]


def test_text_through_context_shifts(models: Path, recorded: dict[str, Any]) -> None:
    want = recorded["generate"]["context_shift"]
    with GPT4All("stories260K", model_path=models, allow_download=False, n_ctx=256) as small:
        assert small.generate(want["prompt"], **want["kwargs"]) == want["text"]


def test_callback_calls(llm: GPT4All, recorded: dict[str, Any]) -> None:
    want, calls = recorded["generate"]["callback"], []

    def note(token_id: int, text: str) -> bool:
        calls.append([token_id, text])
        return True

    assert llm.generate("Once upon a time", **GREEDY, callback=note) == want["text"]
    assert calls == want["calls"]


def test_streamed_pieces(llm: GPT4All, recorded: dict[str, Any]) -> None:
    pieces = list(llm.generate("Once upon a time", **GREEDY, streaming=True))
    assert pieces == recorded["generate"]["stream"]["pieces"]


Call = Callable[[Embed4All, list[str], str], Any]
EMBEDDED: dict[str, Call] = {
    "list": lambda e, texts, long: e.embed(texts, return_dict=True),
    "single": lambda e, texts, long: e.embed(texts[0], return_dict=True),
    "long_mean": lambda e, texts, long: e.embed(long, return_dict=True),
    "long_truncate": lambda e, texts, long: e.embed(
        long, long_text_mode="truncate", return_dict=True
    ),
    "list_with_empty": lambda e, texts, long: e.embed(["a", "", "b"], return_dict=True),
    "explicit_empty_prefix": lambda e, texts, long: e.embed(texts[0], prefix="", return_dict=True),
    "dim_384": lambda e, texts, long: e.embed("x", dimensionality=384, return_dict=True),
}


def cosines(a: Any, b: Any) -> np.ndarray:
    """Cosines between the rows of two lists of vectors -> [n]."""
    x, y = (np.atleast_2d(np.asarray(v, np.float64)) for v in (a, b))
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


@pytest.mark.parametrize("case", EMBEDDED)
def test_embedding(case: str, embedder: Embed4All, recorded: dict[str, Any]) -> None:
    want = recorded["embed"][case]["result"]
    texts, long = recorded["embed_texts"]["texts"], recorded["embed_texts"]["long"]
    got = EMBEDDED[case](embedder, texts, long)
    near = cosines(got["embeddings"], want["embeddings"]) >= 0.9999
    if case == "list":
        assert set(texts[HUNDREDS_OF_A]) == {"A"}
        assert list(np.flatnonzero(~near)) == [HUNDREDS_OF_A]
    else:
        assert near.all()
        assert got["n_prompt_tokens"] == want["n_prompt_tokens"]


def test_token_count_of_a_list(embedder: Embed4All, recorded: dict[str, Any]) -> None:
    texts = recorded["embed_texts"]["texts"]
    total = recorded["embed"]["list"]["result"]["n_prompt_tokens"]
    the_as = 150  # tokens, as GPT4All counts them
    texts = texts[:HUNDREDS_OF_A] + texts[HUNDREDS_OF_A + 1 :]
    assert embedder.embed(texts, return_dict=True)["n_prompt_tokens"] == total - the_as


def test_the_hundreds_of_a_are_hugging_faces(
    models: Path, embedder: Embed4All, recorded: dict[str, Any]
) -> None:
    reference = np.load(models / "all-MiniLM-L6-v2.npz")
    vectors = reference[next(k for k in reference.files if "emb" in k)]
    text = recorded["embed_texts"]["texts"][HUNDREDS_OF_A]
    assert cosines(vectors, [embedder.embed(text)]).max() >= 0.9999


REFUSED: dict[str, Call] = {
    "bad_prefix": lambda e, texts, long: e.embed("x", prefix="search_query"),
    "empty": lambda e, texts, long: e.embed(""),
    "empty_list": lambda e, texts, long: e.embed([]),
    "dim_64": lambda e, texts, long: e.embed("x", dimensionality=64),
    "dim_0": lambda e, texts, long: e.embed("x", dimensionality=0),
    "dim_500": lambda e, texts, long: e.embed("x", dimensionality=500),
    "bad_mode": lambda e, texts, long: e.embed("x", long_text_mode="foo"),
    "atlas_long_mean": lambda e, texts, long: e.embed(long * 8, atlas=True),
    "cancel": lambda e, texts, long: e.embed("x", cancel_cb=lambda sizes, backend: True),
}


@pytest.mark.parametrize("case", REFUSED)
def test_embedding_error(case: str, embedder: Embed4All, recorded: dict[str, Any]) -> None:
    name, message = recorded["embed"][case]["error"]
    texts, long = recorded["embed_texts"]["texts"], recorded["embed_texts"]["long"]
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the class is compared below)
        REFUSED[case](embedder, texts, long)
    assert (type(caught.value).__name__, str(caught.value)) == (name, message)


def test_cancel_callback_is_told_the_batches(embedder: Embed4All, recorded: dict[str, Any]) -> None:
    texts, calls = list(recorded["embed_texts"]["texts"]), []
    del texts[HUNDREDS_OF_A]
    embedder.embed(texts, cancel_cb=lambda sizes, backend: calls.append([sizes, backend]))
    [[sizes, backend]] = recorded["embed"]["cancel_cb_args"]
    assert calls == [[[sizes[0] - 150 - 2], backend]]
