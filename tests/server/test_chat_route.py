"""OpenAI's chat completions: answers, streams, fields, errors."""

from __future__ import annotations

import json

import pytest

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Tell me a story."}]


def asking(**fields):
    return {"messages": HELLO, "max_tokens": 12, "seed": 3, **fields}


def test_an_answer_is_that_of_chat(app, model):
    answer = app.post(URL, asking(model="tales")).json()
    how = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 3}
    expected = model.chat(HELLO, max_tokens=12, **how)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tales"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_ids)
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_stream_says_the_same(app):
    whole = app.post(URL, asking()).json()
    *chunks, last, done = app.events(URL, asking(stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert {c["id"] for c in chunks} == {last["id"]}
    assert all(c["usage"] is None for c in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


def test_choices_draw_from_seeds_of_their_own(app):
    answer = app.post(URL, asking(n=3, seed=5)).json()
    texts = [c["message"]["content"] for c in answer["choices"]]
    alone = [
        app.post(URL, asking(seed=5 + i)).json()["choices"][0]["message"]["content"]
        for i in range(3)
    ]
    assert texts == alone
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] > 12


def test_logprobs_name_every_token(app, model):
    fields = asking(logprobs=True, top_logprobs=3)
    whole = app.post(URL, fields).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert bytes(b for e in entries for b in e["bytes"]).decode() == whole["message"]["content"]
    assert all(len(e["top_logprobs"]) == 3 for e in entries)
    streamed = [
        e
        for c in app.events(URL, fields)[:-1]
        for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries


def test_an_answer_goes_on_behind_given_tokens(app):
    entries = app.post(URL, asking(logprobs=True, temperature=0)).json()["choices"][0]["logprobs"]
    ids = [e["id"] for e in entries["content"]]
    rest = app.post(
        URL, asking(logprobs=True, temperature=0, prefix_ids=ids[:3], max_tokens=9)
    ).json()
    assert [e["id"] for e in rest["choices"][0]["logprobs"]["content"]] == ids[3:]


def test_ignore_eos_writes_on(app):
    fields = asking(temperature=0, max_tokens=300)
    assert app.post(URL, fields).json()["choices"][0]["finish_reason"] == "stop"
    longer = app.post(URL, {**fields, "ignore_eos": True}).json()
    assert longer["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"messages": []}, 400, "messages"),
        ({"foo": 1}, 400, "Unrecognized request argument supplied: foo"),
        ({"messages": [{"role": "user", "content": "x", "bar": 1}]}, 400, "messages.0.bar"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"model": "other"}, 404, "'other'"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"n": 65}, 400, "at most 64"),
        ({"stop": ""}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "context"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, 400, "roles are"),
        ({"regex": "a", "grammar": "b"}, 400, "one of"),
        ({"json_schema": {"properties": {"a": {"const": "\ud800"}}}}, 400, "json_schema: "),
        ({"regex": "\ud800"}, 400, "regex: "),
        ({"grammar": 'root ::= "\ud800"'}, 400, "grammar: "),
    ],
)
def test_what_cannot_be_answered_is_refused(app, fields, status, said):
    body = json.dumps(asking(**fields)).encode()  # httpx refuses half a surrogate pair
    answer = app.call("POST", URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            URL,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type: images are not taken",
        ),
        (URL, {"messages": HELLO, "tool_choice": "x"}, "tool_choice: Input should be 'none'"),
        (URL, {"messages": HELLO, "stop": 5}, "stop: "),
        (
            "/v1/completions",
            {"prompt": [["a"]]},
            "prompt: expected a text, ids of tokens (whole numbers), or a list of either; found a list of ",
        ),
        (
            "/v1/responses",
            {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
            "input.0.call_id: Field required",
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1},
            "messages.0.content.0",
        ),
    ],
)
def test_a_refusal_names_the_place(app, path, body, said):
    answer = app.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(said)


def test_a_body_that_is_no_json_is_refused(app):
    answer = app.call(
        "POST", URL, content=b'{"messages": [', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "no JSON" in answer.json()["error"]["message"]


def test_a_wrong_method_gets_a_hint(app):
    answer = app.get(URL)
    assert answer.status_code == 405
    assert "POST" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "method_not_supported"
    assert app.post("/v1/models").status_code == 405
    assert app.get("/v1/nothing").status_code == 404
