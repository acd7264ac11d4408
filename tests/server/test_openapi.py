"""What /openapi.json says is what the server answers, and /docs shows it without a network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")

from tinyllm.server import openai_chat, page  # noqa: E402

HELLO = [{"role": "user", "content": "Tell me a story."}]
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
MESSAGE = {"messages": HELLO, "max_tokens": 4}
TEMPLATE = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def api(app):
    return app.get("/openapi.json").json()


def check(api, method, path, answer):
    """Whether an answer has the shape that is promised for its status."""
    promised = api["paths"][path][method]["responses"]
    status = str(answer.status_code)
    told = promised.get(status) or promised[f"{status[0]}XX"]
    schema = told["content"]["application/json"]["schema"]
    whole = {**schema, "components": api["components"]}
    jsonschema.Draft202012Validator(whole).validate(answer.json())


def test_every_example_is_answered_as_described(app, make_app, api):
    ranks = make_app([Path(__file__).resolve().parent.parent / "data/models/rank-bert.gguf"])
    seen = 0
    for path, methods in api["paths"].items():
        for method, told in methods.items():
            body = told.get("requestBody")
            if path == "/metrics":
                continue
            who = ranks if path == "/v1/rerank" else app
            given = body["content"]["application/json"]["example"] if body else None
            answer = who.call(method.upper(), path.replace("{name}", "tales"), json=given)
            assert answer.status_code == 200, (path, answer.text)
            check(api, method, path, answer)
            seen += 1
    assert seen > 14


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, "n": 2}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"model": "other"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 999}]}),
        ("/v1/completions", {"logprobs": 2, "echo": True, "messages": None, "prompt": "One"}),
        ("/v1/responses", {"top_logprobs": 2, "messages": None, "input": "a", "max_tokens": None}),
        ("/v1/messages", {"stop_sequences": ["e"]}),
        ("/v1/messages", {"nonsense": 1}),
        ("/v1/messages/count_tokens", {"max_tokens": None, "system": "b"}),
        ("/tokenize", {"messages": None, "max_tokens": None, "content": "a", "with_pieces": True}),
        ("/tokenize", {"max_tokens": None}),
    ],
)
def test_answers_and_errors_have_their_shapes(app, api, path, fields):
    body = {k: v for k, v in {**MESSAGE, **fields}.items() if v is not None}
    check(api, "post", path, app.post(path, body))


def test_calls_have_their_shapes(make_app, api):
    pytest.importorskip("llguidance")
    app = make_app(template=TEMPLATE)
    chat = {**MESSAGE, "max_tokens": 80, "tools": [{"type": "function", "function": TOOL}]}
    claude = {
        **MESSAGE,
        "max_tokens": 80,
        "tools": [{"name": "f", "input_schema": TOOL["parameters"]}],
    }
    for path, body in (
        ("/v1/chat/completions", {**chat, "tool_choice": "required"}),
        ("/v1/messages", {**claude, "tool_choice": {"type": "any"}}),
        (
            "/v1/responses",
            {"input": "a", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"},
        ),
    ):
        answer = app.post(path, {**body, "temperature": 0})
        assert answer.status_code == 200, answer.text
        assert '"f"' in answer.text
        check(api, "post", path, answer)


def test_the_description_is_of_the_version_that_knows_streams(api):
    assert api["openapi"].startswith("3.2.")
    content = api["paths"]["/v1/messages"]["post"]["responses"]["200"]["content"]
    assert "itemSchema" in content["text/event-stream"]


def test_the_page_of_endpoints_needs_no_network(app):
    answer = app.get("/docs")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    names = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
    assert "/page/docs.mjs" in names
    for name in names:
        assert name.startswith("/"), name
        assert app.get(name).status_code == 200, name
    for name, data in page.files().items():
        if name.startswith("docs."):
            assert b"://" not in data, name


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"ignore_eos": 1}),
        ("/v1/chat/completions", {"stream": "yes"}),
        ("/v1/chat/completions", {"temperature": "1"}),
        ("/v1/chat/completions", {"n": 0}),
        ("/v1/chat/completions", {"repeat_penalty": 5e-324}),
        ("/v1/chat/completions", {"tools": [{"type": "function", "function": {}}]}),
        ("/v1/messages", {"max_tokens": 0}),
    ],
    ids=str,
)
def test_what_the_description_forbids_is_refused(app, api, path, fields):
    body = {**MESSAGE, **fields}
    schema = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": api["components"]}
    assert not jsonschema.Draft202012Validator(whole).is_valid(body)
    answer = app.post(path, body)
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.text


def test_a_choice_of_a_tool_where_there_is_none_is_named(app):
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = app.post("/v1/chat/completions", {**MESSAGE, "tool_choice": choice})
    assert "tool_choice='weather', but there are no tools" in answer.json()["error"]["message"]


def test_a_tools_fields_keep_their_order():
    """Templates write them out: another order would be another prompt."""
    sent = {
        "function": {"description": "Tells it.", "parameters": {}, "name": "time"},
        "type": "function",
    }
    told = openai_chat.FunctionTool.model_validate(sent).model_dump()
    assert json.dumps(told) == json.dumps(sent)


def test_who_has_no_key_may_read_what_is_answered(make_app):
    app = make_app(api_keys=("secret",))
    assert app.get("/docs").status_code == 200
    assert app.get("/openapi.json").status_code == 200
