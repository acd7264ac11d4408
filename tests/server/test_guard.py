"""What stands before the routes: origins, names, keys, sizes, the number of texts."""

from __future__ import annotations

import logging

import pytest

from tinyllm import cli

URL = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 2}
PAGE = "https://example.org"


def test_pages_of_other_origins_may_not_call(app, make_app):
    assert "access-control-allow-origin" not in app.get("/v1/models").headers
    refused = app.get("/v1/models", headers={"Origin": PAGE})
    assert refused.status_code == 403
    assert PAGE in refused.json()["error"]["message"]
    assert app.get("/v1/models", headers={"Origin": "http://localhost"}).status_code == 200
    allowed = make_app(origins=(PAGE,)).get("/v1/models", headers={"Origin": PAGE})
    assert allowed.headers["access-control-allow-origin"] == PAGE
    for_all = make_app(origins=("*",)).get("/v1/models", headers={"Origin": PAGE})
    assert for_all.headers["access-control-allow-origin"] == "*"


def test_a_browser_asks_first(make_app):
    app = make_app(origins=(PAGE,), api_keys=("secret",))
    asks = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, x-stainless-os",
    }
    answer = app.call("OPTIONS", URL, headers=asks)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "content-type, x-stainless-os"
    other = {**asks, "Origin": "https://other.example"}
    assert app.call("OPTIONS", URL, headers=other).status_code == 403


def test_the_server_answers_to_its_names_only(make_app):
    app = make_app(hosts=("localhost", "[::1]"))
    for host, status in (
        ("localhost:4891", 200),
        ("[::1]:4891", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ):
        assert app.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_a_key_is_asked_for(make_app):
    app = make_app(api_keys=("secret", "other"))
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic secret"}, 401),
        ({"Authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"X-Api-Key": "secret"}, 200),
        ({"X-Api-Key": "sécret".encode("latin-1")}, 401),
    ):
        answer = app.get("/v1/models", headers=headers)
        assert answer.status_code == status, headers
        if status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/", "/page/app.mjs"):
        assert app.get(path).status_code == 200, path
    claude = app.post("/v1/messages", BODY).json()
    assert claude["type"] == "error"
    assert claude["error"]["type"] == "authentication_error"


def test_a_body_may_be_so_large(make_app):
    app = make_app(max_body=1000)
    large = app.post(URL, {**BODY, "user": "x" * 1000})
    assert large.status_code == 413
    assert "1000 bytes" in large.json()["error"]["message"]

    async def parts():
        for _ in range(5):
            yield b" " * 300

    json = {"content-type": "application/json"}
    assert app.call("POST", URL, content=parts(), headers=json).status_code == 413
    assert app.post(URL, BODY).status_code == 200


@pytest.mark.parametrize(
    ("limit", "fields", "said"),
    [
        ({"max_messages": 2}, {"messages": BODY["messages"] * 3}, "3 messages; at most 2"),
        ({"max_choices": 2}, {"n": 3}, "at most 2"),
        ({"max_schema": 30}, {"json_schema": {"enum": ["x" * 30]}}, "bytes of JSON; at most 30"),
    ],
)
def test_what_is_too_much_for_one_request_is_refused(make_app, limit, fields, said):
    answer = make_app(**limit).post(URL, {**BODY, **fields})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_too_many_inputs_are_refused(make_app):
    app = make_app(max_inputs=2)
    for path, body in (
        ("/v1/embeddings", {"input": ["a", "b", "c"]}),
        ("/v1/rerank", {"query": "a", "documents": ["a", "b", "c"]}),
    ):
        answer = app.post(path, body)
        assert answer.status_code == 400
        assert "at most 2" in answer.json()["error"]["message"]


def test_when_too_many_texts_wait_a_client_is_told_to_come_again(make_app):
    app = make_app(slots=1, queue=2)
    served = app.app.pool.find(None)
    served.admit(3)
    full = app.post(URL, BODY)
    assert full.status_code == 429
    assert int(full.headers["retry-after"]) == 4  # seconds for three texts before it, and its own
    assert full.json()["error"]["code"] == "queue_full"
    served.n_texts -= 1
    assert app.post(URL, BODY).status_code == 200
    assert app.post(URL, {**BODY, "n": 2}).status_code == 429
    assert served.n_texts == 2
    served.n_texts = 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "It rains."}),
        ("/v1/rerank", {"query": "Rain?", "documents": ["It rains."]}),
        (
            "/v1/decisions",
            {
                "input": "It rains.",
                "questions": [{"type": "predicate", "instructions": "It is wet."}],
            },
        ),
    ],
)
def test_what_is_read_and_not_written_waits_like_texts(make_app, path, body):
    app = make_app(slots=1, queue=0)
    served = app.app.pool.find(None)
    served.admit(1)
    assert app.post(path, body).status_code == 429
    assert app.post("/tokenize", {"content": "It rains."}).status_code == 200
    served.n_texts = 0
    assert app.post(path, body).status_code != 429
    assert served.n_texts == 0


def test_the_log_has_no_prompts_unless_asked(make_app, caplog):
    with caplog.at_level(logging.INFO, "tinyllm.server"):
        make_app().post(URL, BODY)
        assert f"POST {URL} 200" in caplog.text
        assert "Tell me" not in caplog.text
        make_app(log_prompts=True).post(URL, BODY)
        assert "Tell me a story." in caplog.text


def test_metrics_count_what_was_done(make_app):
    app = make_app()
    app.post(URL, BODY)
    app.get("/v1/nothing")
    text = app.get("/metrics").text
    assert f'tinyllm_requests_total{{route="{URL}",status="200"}} 1.0' in text
    assert 'tinyllm_requests_total{route="other",status="404"} 1.0' in text
    assert 'tinyllm_generated_tokens_total{model="tales"} 2.0' in text
    assert 'tinyllm_texts{model="tales"} 0.0' in text


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"data": {"a": "b"}}, "Content-Type is 'application/x-www-form-urlencoded'; expected"),
        ({"content": b'{"input": "a"}'}, "Content-Type is None; expected 'application/json'"),
        ({}, "the body is missing, or no object"),
        ({"json": []}, "the body is missing, or no object"),
        ({"json": {"input": []}}, "input: expected a text, ids"),
        ({"json": {"input": 5}}, "or a list of either; found 5"),
        ({"json": {"documents": ["a"]}, "path": "/v1/rerank"}, "query: Field required"),
        ({"content": b"{}", "headers": {"content-type": "text/json"}}, "Content-Type is 'text/json'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_body_that_is_none_is_told_what_it_lacks(app, how, said):
    how = {"path": "/v1/embeddings", **how}
    answer = app.call("POST", how.pop("path"), **how)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--chat-template", "nope"), "expected a file, or one of"),
        (("--max-body", "0"), "--max-body 0; expected at least 0.001"),
        (("--slots", "0"), "--slots 0; expected at least 1"),
        (
            ("--device", "mars"),
            "no device answers to 'mars'; expected 'cpu', 'reference', or a GPU: ",
        ),
        (("--n-threads", "0"), "n_threads=0"),
        (("--n-ctx", "0"), "n_ctx=0"),
        ((__file__,), "not a GGUF file"),
    ],
    ids=str,
)
def test_what_no_server_can_be_is_refused_before_it_starts(words, said, capsys):
    assert cli.main(["serve", "--port", "0", *words]) in (1, 2)
    assert said in capsys.readouterr().err
