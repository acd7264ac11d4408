"""What a refusal tells: the request's own field, what was found, what to do; and what OpenAI refuses, too."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
HELLO = [{"role": "user", "content": "Tell me a story."}]
LONG = [{"role": "user", "content": "word " * 600}]
WRONG = {"type": "objekt"}
HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> calls look like <tool_call>\n"
    '{"name": "f", "arguments": {}}\n</tool_call>{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def schema(form: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": form}}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def refusal(app: Any, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The error of a request, most of whose fields are right."""
    some: dict[str, Any] = {"max_tokens": 3, "messages": HELLO}
    body = {**(some if path in (CHAT, MESSAGES) else {}), **fields}
    answer = app.post(path, body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


CASES = [
    # by the names of the request, not of the engine
    (CHAT, {"messages": LONG}, "messages", "holds 512: shorten messages, or have the server started"),
    (RESPONSES, {"input": "word " * 600}, "input", 'shorten input, give truncation: "auto", or'),
    ("/v1/completions", {"prompt": "word " * 600}, "prompt", "shorten prompt, or"),
    ("/v1/embeddings", {"input": "word " * 600}, "input", "the model takes 1 to 512"),
    (CHAT, {"chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs", "has 'tools'; expected"),
    (CHAT, {"response_format": schema(5)}, "response_format.json_schema.schema", "JSON object; found 5"),
    (CHAT, {"response_format": schema(WRONG)}, "response_format.json_schema.schema", "objekt"),
    (CHAT, {"response_format": {"type": "json_object", "schema": WRONG}}, "response_format.schema", "objekt"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (CHAT, {"json_schema": WRONG}, "json_schema", "objekt"),
    (CHAT, {"regex": "(a"}, "regex", "unclosed group"),
    (CHAT, {"grammar": "root :"}, "grammar", "grammar"),
    (RESPONSES, {"input": "a", "text": {"format": {**schema(0)["json_schema"], "type": "json_schema"}}},
     "text.format.schema", "found 0"),
    (RESPONSES, {"input": "a", "text": {"format": {"type": "json_schema", "schema": WRONG}}},
     "text.format.schema", "objekt"),
    (CHAT, {"n": 65}, "n", "65 texts in one request; at most 64"),
    ("/v1/completions", {"prompt": ["a"] * 65}, "prompt", "65 texts in one request; at most 64"),
    (CHAT, {"logit_bias": {"999999": 1}}, "logit_bias", "has id 999999; expected ids below 4096"),
    (CHAT, {"prefix_ids": [999999]}, "prefix_ids", "has id 999999"),
    ("/v1/completions", {"prompt": [999999]}, "prompt", "has id 999999"),
    ("/detokenize", {"tokens": [999999]}, "tokens", "has id 999999"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "there are no tools"),
    (CHAT, {"tool_choice": 5}, "tool_choice", "'none', 'auto' or 'required' or a JSON object; found 5"),
    (CHAT, tool(), "tools", "the chat template shows none; leave them out"),
    (CHAT, tool(parameters=5), "tools.0.function.parameters", "JSON object; found 5"),
    (CHAT, {"regex": "a", "json_schema": {}}, "regex", "one of json_schema, regex"),
    (CHAT, tool(parameters={"type": "string"}), "tools.0.function.parameters", 'expected "object"'),
    (CHAT, tool(description=5), "tools.0.function.description", "found 5"),
    (CHAT, tool(name="f g h"), "tools.0.function.name", "{1,64}$'; found \"f g h\""),
    (CHAT, {"reasoning_effort": "banana"}, "reasoning_effort", "'high' or 'xhigh'; found \"banana\""),
    (RESPONSES, {"input": "a", "reasoning": {"effort": "banana"}}, "reasoning.effort", "found"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages.0.content.0.type", "images are not taken, only texts"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
     "input.0.content.0.type", "images are not taken"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0", "needs tool_call_id"),
    # nothing is kept
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "send all of the"),
    (RESPONSES, {"input": "x", "previous_response_id": "x"}, "previous_response_id", "send all of the"),
    (RESPONSES, {"input": "x", "conversation": "x"}, "conversation", "send all of the"),
    # lists, and one of several types
    (RESPONSES, {"input": [{"type": "web_search_call"}]}, "input.0.type", "'function_call_output'"),
    (RESPONSES, {"input": 5}, "input", "valid string or a valid list; found 5"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt", "found a list of numbers and texts"),
    ("/v1/completions", {"prompt": [1.0, 2.0]}, "prompt", "whole numbers"),
    ("/v1/embeddings", {"input": []}, "input", "a text, ids of tokens (whole numbers), or a list of"),
    ("/v1/decisions", {"input": "a", "questions": [{"type": "x"}]}, "questions.0.type", "'score'; found"),
    (CHAT, {"stop": 5}, "stop", "valid string or a valid list; found 5"),
    # as OpenAI has them
    (CHAT, {"logit_bias": {"5": 1000}}, "logit_bias.5", "less than or equal to 100; found 1000"),
    (CHAT, {"temperature": 1e308}, "temperature", "less than or equal to 100"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "found 0"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "without stream: true"),
    ("/v1/completions", {"prompt": "a", "stream_options": {}}, "stream_options", "without stream"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0", "needs content"),
    (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages.0", "needs content"),
    ("/v1/embeddings", {"input": ["a", ""]}, "input", "input.1: an empty text"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param", "said"), CASES, ids=str)
def test_a_refusal_names_the_field(app: Any, path: str, fields: Any, param: str, said: str) -> None:
    error = refusal(app, path, fields)
    assert error["param"] == param, error
    assert said in error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output_config": {"format": {"type": "json_schema", "schema": WRONG}}}, "config.format.schema"),
        ({"thinking": {"type": "enabled"}}, "thinking: budget_tokens is missing"),
        ({"container": "x"}, "container: code is not run here"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content.0.type: images are"),
        ({"messages": LONG}, "shorten messages"),
    ],
    ids=str,
)  # fmt: skip
def test_anthropics_protocol_names_the_field(app: Any, fields: Any, said: str) -> None:
    assert said in refusal(app, MESSAGES, fields)["message"]


@pytest.mark.parametrize(
    ("path", "tools", "param"),
    [
        (CHAT, lambda f: {"type": "function", "function": f}, "tools.1.function.parameters"),
        (RESPONSES, lambda f: {"type": "function", **f}, "tools.1.parameters"),
        (MESSAGES, lambda f: {"name": f["name"], "input_schema": f["parameters"]}, "tools.1.input_schema"),
    ],
    ids=["chat", "responses", "messages"],
)  # fmt: skip
def test_a_tool_with_a_wrong_schema_is_named(
    make_app: Any, path: str, tools: Any, param: str
) -> None:
    pytest.importorskip("llguidance")
    app = make_app(template=HERMES)
    good = tools({"name": "g", "parameters": {"type": "object"}})
    for wrong, said in (
        ({"properties": {"a": WRONG}}, "objekt"),
        (
            {"required": ["x"], "properties": {}},
            "required property 'x'",
        ),  # none but those are written
    ):
        more = {"input": "a"} if path == RESPONSES else {}
        error = refusal(
            app, path, {**more, "tools": [good, tools({"name": "f", "parameters": wrong})]}
        )
        assert error.get("param", param) == param
        assert error["message"].startswith(f"{param}: ")
        assert said in error["message"]


def test_tools_and_a_form_of_the_text_go_badly_together(make_app: Any) -> None:
    app = make_app(template=HERMES)
    for form, param in (
        ({"response_format": schema({})}, "response_format"),
        ({"json_schema": {}}, "json_schema"),
        ({"regex": "a"}, "regex"),
    ):
        error = refusal(app, CHAT, {**tool(), **form})
        assert error["param"] == param
        assert error["message"].startswith(f"{param} and tools are given")


def test_a_million_errors_are_told_as_one(app: Any) -> None:
    """Each would take memory and time of the loop that all answers share."""
    n = 50_000
    for body, said in (
        ({"messages": [1] * n}, "messages.0: "),
        ({"messages": [{"role": "user", "content": [1] * n}]}, "messages.0.content.0: "),
        ({str(i): 1 for i in range(n)}, "the body: 50000 fields; at most 256"),
        ({"messages": HELLO, "logit_bias": {str(i): "x" for i in range(n)}}, "50000 wrong entries"),
    ):
        answer = app.post(CHAT, body)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": [}', "Expecting value at character 14"),
        ('{"user": "é"}'.encode("latin-1"), "byte 10 is no UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", "4300 digits"),
        (b'{"stop": 5, "user": "\\ud800"}', "found"),
        (b'{"messages": [{"role": "\\ud800"}]}', "messages.0.role"),
        (
            b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
            "messages.0.content: character 1 is half",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature: "),
    ],
    ids=["nested", "broken", "latin", "digits", "wrong", "role", "content", "nan"],
)
def test_a_body_that_cannot_be_read_is_told_why(app: Any, data: bytes, said: str) -> None:
    answer = app.call("POST", CHAT, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_json_may_come_in_utf_16(app: Any) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 2}).encode("utf-16")
    kind = {"content-type": "application/json; charset=utf-16"}
    assert app.call("POST", CHAT, content=body, headers=kind).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1, "stop": ["e"]},  # LM Studio's and llama-server's word for no limit
        {"temperature": 5, "min_p": 0.5},
        {"messages": [{"role": "system", "content": "Tell a story."}]},
        {"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]},
        {"messages": [{"role": "user", "content": ""}]},
        {"logit_bias": {"5": -100}},
    ],
    ids=str,
)
def test_what_clients_of_local_servers_send_is_answered(app: Any, fields: Any) -> None:
    answer = app.post(CHAT, {"messages": HELLO, "max_tokens": 3, **fields})
    assert answer.status_code == 200, answer.text
