"""Routes beside chats: completions with a suffix, reranking, tokens, templates; and answers with reasoning."""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.loading import BUNDLED

HELLO = [{"role": "user", "content": "Tell me a story."}]
MODELS = Path(__file__).resolve().parent.parent / "data" / "models"


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    """A file of the bundled model, whose vocabulary has tokens for a gap in a text."""
    path = tmp_path_factory.mktemp("suffix") / "filler.gguf"
    with gguf.open(BUNDLED) as file:
        marks = {f"tokenizer.ggml.fim_{n}_token_id": i for n, i in GAP.items()}
        gguf.write(path, {**file.exact_metadata, **marks}, file.tensors)
    return path


GAP = {"pre": 10, "suf": 11, "mid": 12}


def test_a_suffix_asks_for_what_stands_before_it(make_app, filler):
    app = make_app([filler])
    with tinyllm.load(filler) as m:
        t = m.tokenizer
        ids = [
            *([t.bos] if t.add_bos else []),
            10, *t.encode_inside("Once upon"), 11, *t.encode_inside("the end."), 12,
        ]  # fmt: skip
        expected = m.generate(ids, max_tokens=5, temperature=0).text
    body = {"prompt": "Once upon", "suffix": "the end.", "max_tokens": 5, "temperature": 0}
    answer = app.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == len(ids)
    ids_given = app.post("/v1/completions", {**body, "prompt": [5, 6]})
    assert "the prompt is a text" in ids_given.json()["error"]["message"]
    echoed = app.post("/v1/completions", {**body, "echo": True})
    assert "do not go together" in echoed.json()["error"]["message"]


def test_a_vocabulary_without_gaps_refuses_a_suffix(app):
    answer = app.post("/v1/completions", {"prompt": "Once", "suffix": "end"})
    assert answer.status_code == 400
    assert "FIM" in answer.json()["error"]["message"]


def test_documents_are_sorted_by_relevance(make_app):
    path = MODELS / "rank-bert.gguf"
    app = make_app([path])
    documents = ["a cat", {"text": "a dog"}, "what is a cat? a cat"]
    body = {"query": "what is a cat?", "documents": documents, "return_documents": True}
    with tinyllm.load(path) as m:
        scores = 1 / (1 + np.exp(-m.rank("what is a cat?", ["a cat", "a dog", documents[2]])))
    answer = app.post("/v1/rerank", body).json()
    order = np.argsort(-scores, kind="stable").tolist()
    assert [r["index"] for r in answer["results"]] == order
    found = [r["relevance_score"] for r in answer["results"]]
    np.testing.assert_allclose(found, scores[order], rtol=1e-6)
    assert answer["results"][order.index(1)]["document"] == {"text": "a dog"}
    assert answer["usage"]["total_tokens"] > 0
    first = app.post("/rerank", {**body, "top_n": 1, "return_documents": False}).json()["results"]
    assert first == [{"index": order[0], "relevance_score": found[0]}]
    chat = app.post("/v1/chat/completions", {"messages": HELLO})
    assert chat.status_code == 404
    assert "writes none" in chat.json()["error"]["message"]


def test_a_model_that_writes_ranks_nothing(app):
    answer = app.post("/v1/rerank", {"query": "a", "documents": ["b"]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_supported", "model")
    assert "tinyllm serve MODEL RERANKER" in error["message"]


def test_texts_become_tokens_and_texts_again(app, model):
    t = model.tokenizer
    ids = t.encode("Once upon", add_special=False)
    assert app.post("/tokenize", {"content": "Once upon"}).json() == {"tokens": ids}
    with_ends = app.post("/tokenize", {"prompt": "Once upon"}).json()
    assert with_ends["tokens"] == t.encode("Once upon")
    assert (with_ends["count"], with_ends["max_model_len"]) == (len(with_ends["tokens"]), 512)
    pieces = app.post("/tokenize", {"content": "Once é", "with_pieces": True}).json()["tokens"]
    raw = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert raw.decode().strip() == "Once é"
    assert app.post("/detokenize", {"tokens": ids}).json()["content"] == "Once upon"
    both = app.post("/tokenize", {"content": "a", "prompt": "b"})
    assert both.status_code == 400


def test_a_vocabulary_is_told_to_who_reads_texts_token_by_token(app, model):
    told, t = app.get("/tokenizer_info").json(), model.tokenizer
    for name in ("bos", "eos"):
        spelled = {"prompt": told[f"{name}_token"], "add_special_tokens": False}
        assert app.post("/tokenize", spelled).json()["tokens"] == [getattr(t, name)]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        told["chat_template"]
    )
    text = template.render(messages=HELLO, add_generation_prompt=True)  # who has no names of tokens
    assert t.encode(text, add_special=False) == model.turn(HELLO).ids
    assert told["model_max_length"] == 512


def test_a_conversation_is_put_into_the_template(app, model):
    found = app.post("/apply-template", {"messages": HELLO}).json()
    assert found["tokens"] == model.turn(HELLO).ids
    assert found["prompt"].endswith("<|user|>Tell me a story.<|end|><|assistant|>")
    tokens = app.post("/tokenize", {"messages": HELLO, "add_generation_prompt": False}).json()
    assert found["tokens"][: tokens["count"]] == tokens["tokens"]
    assert tokens["count"] == len(found["tokens"]) - 1


def test_a_template_of_the_server_is_put_around_conversations(make_app):
    app = make_app(template="chatml")
    found = app.post("/apply-template", {"messages": HELLO}).json()
    assert "<|im_start|>user\nTell me a story.<|im_end|>" in found["prompt"]
    bare = {"messages": HELLO, "add_generation_prompt": False}
    tokens = app.post("/tokenize", bare).json()["tokens"]
    assert found["tokens"][: len(tokens)] == tokens


THINKS = """
{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{%- if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"""


def test_reasoning_is_told_apart(make_app):
    pytest.importorskip("llguidance")
    app = make_app(template=THINKS)
    body = {"messages": HELLO, "max_tokens": 100, "seed": 1}
    thought = {**body, "regex": "Hm[.]\n</think>\n\nTwo[.]"}
    answer = app.post("/v1/chat/completions", thought).json()
    message = answer["choices"][0]["message"]
    assert message["content"] == "Two."
    assert message["reasoning_content"].strip() == "Hm."
    n = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < n < answer["usage"]["completion_tokens"]
    deltas = [c["choices"][0]["delta"] for c in app.events("/v1/chat/completions", thought)[:-1]]
    assert "".join(d.get("reasoning_content", "") for d in deltas).strip() == "Hm."
    assert "".join(d.get("content", "") for d in deltas) == "Two."
    plain = {**body, "regex": "Two[.]"}
    for off in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        message = app.post("/v1/chat/completions", {**plain, **off}).json()["choices"][0]["message"]
        assert message["content"] == "Two."
        assert "reasoning_content" not in message
