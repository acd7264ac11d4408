"""Tools in conversations: calls that were made before, and answers that end within a call."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llguidance")

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_RESULTS = (
    "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER = {"role": "user", "content": "How is the weather?"}
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CALLED = {
    CHAT: {"messages": [USER, {"role": "assistant", "tool_calls": CALLS}, USER]},
    RESPONSES: {
        "input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, USER]
    },
    MESSAGES: {
        "messages": [
            USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            USER,
        ]
    },
}  # fmt: skip
RETURNED = {
    CHAT: {"messages": [USER, {"role": "tool", "tool_call_id": "c", "content": "Sunny."}]},
    RESPONSES: {
        "input": [USER, {"type": "function_call_output", "call_id": "c", "output": "Sunny."}, USER]
    },
    MESSAGES: {
        "messages": [
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": "Sunny."},
                {"type": "text", "text": "So?"},
            ]}
        ]
    },
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "string", "minLength": 60}},
    "required": ["n"],
}
FUNCTION = {"name": "f", "parameters": SCHEMA}
QUICK = {"name": "g", "parameters": {"type": "object", "properties": {}}}


def asked(path: str, body: dict[str, Any], n: int = 2) -> dict[str, Any]:
    return {**body, "max_output_tokens" if path == RESPONSES else "max_tokens": n}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    ("template", "bodies", "what"), [(PLAIN, CALLED, "calls"), (NO_RESULTS, RETURNED, "results")]
)
def test_calls_and_results_that_the_template_leaves_out_are_refused(
    make_app: Any, template: str, bodies: Any, what: str, path: str
) -> None:
    app = make_app(template=template)
    answer = app.post(path, asked(path, bodies[path]))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    field = "input" if path == RESPONSES else "messages"
    assert error.get("param", field) == field
    assert error["message"].startswith(
        f"{field} has {what} of tools, and the chat template shows none; "
    )


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(("template", "bodies"), [(HERMES, CALLED), (PLAIN, RETURNED)])
def test_calls_and_results_that_the_template_shows_are_read(
    make_app: Any, template: str, bodies: Any, path: str
) -> None:
    answer = make_app(template=template).post(path, asked(path, bodies[path]))
    assert answer.status_code == 200, answer.text


def chat(n: int, *functions: Any, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [USER], "max_tokens": n, "temperature": 0, "tool_choice": "required",
        "tools": [{"type": "function", "function": f} for f in functions], **fields,
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 14, 30])
def test_a_call_that_was_cut_off_is_no_text(make_app: Any, n: int) -> None:
    app = make_app(template=HERMES)
    body = chat(n, FUNCTION)
    (choice,) = app.post(CHAT, body).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": "", "refusal": None}
    chunks = [e["choices"][0] for e in app.events(CHAT, body) if e != "[DONE]"]
    assert chunks[-1]["finish_reason"] == "length"
    assert not any(c["delta"].get("content") for c in chunks)

    said = {"name": "f", "input_schema": SCHEMA}
    body = {"messages": [USER], "max_tokens": n, "tools": [said], "tool_choice": {"type": "any"}}
    told = app.post(MESSAGES, body).json()
    assert (told["stop_reason"], told["content"]) == ("max_tokens", [])

    tools = [{"type": "function", **FUNCTION}]
    body = {"input": "a", "max_output_tokens": max(n, 1), "tools": tools, "tool_choice": "required"}
    told = app.post(RESPONSES, body).json()
    assert (told["status"], told["output"]) == ("incomplete", [])


def test_whole_calls_before_the_cut_are_kept(make_app: Any) -> None:
    """The template's grammar goes on with calls until the answer is cut off."""
    app = make_app(template=HERMES)
    body = chat(200, QUICK, logit_bias={"0": -100})
    (choice,) = app.post(CHAT, {**body, "ignore_eos": True}).json()["choices"]
    message = choice["message"]
    assert {c["function"]["name"] for c in message["tool_calls"]} == {"g"}
    assert (choice["finish_reason"], message["content"]) == ("length", None)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_tool_is_called_once(make_app: Any, seed: int) -> None:
    app = make_app(template=HERMES)
    named = {"type": "function", "function": {"name": "g"}}
    body = chat(200, QUICK, FUNCTION, tool_choice=named, seed=seed, temperature=1)
    (choice,) = app.post(CHAT, body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["g"]
    events = app.events(CHAT, body)
    deltas = [c for e in events[:-1] for c in e["choices"][0]["delta"].get("tool_calls", ())]
    assert [d["function"]["name"] for d in deltas if "id" in d] == ["g"]
    tools = [{"name": "g", "input_schema": QUICK["parameters"]}]
    body = {
        "messages": [USER],
        "max_tokens": 200,
        "tools": tools,
        "tool_choice": {"type": "tool", "name": "g"},
    }
    told = app.post(MESSAGES, {**body, "seed": seed}).json()
    assert (told["stop_reason"], len(told["content"])) == ("tool_use", 1)


def test_an_item_that_was_cut_off_is_incomplete(app: Any) -> None:
    body = {"input": "Tell me a story.", "max_output_tokens": 3}
    told = app.post(RESPONSES, body).json()
    assert told["status"] == told["output"][0]["status"] == "incomplete"
    events = app.events(RESPONSES, body)
    done = [e["item"]["status"] for e in events if e["type"] == "response.output_item.done"]
    assert done == ["incomplete"]


def test_a_scored_text_writes_nothing(app: Any) -> None:
    body = {"prompt": "Once upon a time", "echo": True, "logprobs": 1, "max_tokens": 0}
    used = app.post("/v1/completions", body).json()["usage"]
    assert (used["completion_tokens"], used["total_tokens"]) == (0, used["prompt_tokens"])


def test_a_grammar_without_texts_is_told_so(app: Any) -> None:
    body = {"messages": [USER], "max_tokens": 3, "grammar": "root ::= root"}
    answer = app.post(CHAT, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "grammar"
    assert error["message"].startswith("grammar: no text keeps to it")
