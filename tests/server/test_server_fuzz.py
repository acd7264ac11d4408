"""Mutated bodies, wrong lengths, broken connections: each is answered or refused, and no slot stays taken."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import shutil
import socket
import subprocess

import pytest

from tinyllm.server import create_app

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A story."}]
FEW = {"max_tokens": 3, "seed": 1}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
TOOL = {"name": "f", "description": "It does.", "parameters": SCHEMA}
ASKED = {"type": "predicate", "instructions": "It is so."}
OPTIONS = {
    **FEW, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["x", "yz"], "n": 2,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"5": 1, "7": -100},
}  # fmt: skip
BODIES = [
    ("/v1/chat/completions", {"model": "tales", "messages": HELLO, **OPTIONS, "stream": True}),
    (
        "/v1/chat/completions",
        {
            "messages": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "I"}]}],
            **FEW, "logprobs": True, "top_logprobs": 2, "continue_final_message": True,
            "stream_options": {"include_usage": True}, "stream": True,
        },
    ),
    ("/v1/chat/completions", {"messages": HELLO, **FEW, "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}}),
    ("/v1/chat/completions", {"messages": HELLO, **FEW, "regex": "[ab]+", "prefix_ids": [5, 6]}),
    ("/v1/chat/completions", {
        "messages": HELLO, **FEW, "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": "none", "parallel_tool_calls": False, "reasoning_effort": "none"}),
    ("/v1/completions", {"prompt": ["Once", "One"], **OPTIONS, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": [5, 6, 7], **FEW, "stream": True, "grammar": 'root ::= "a"'}),
    ("/v1/responses", {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "A"}]}],
        "instructions": "Be brief.", "max_output_tokens": 3, "stream": True, "top_logprobs": 1,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        "tools": [{"type": "function", **TOOL}], "tool_choice": "none"}),
    ("/v1/messages", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}], **FEW,
        "system": "Be brief.", "stop_sequences": ["x"], "stream": True, "top_k": 3,
        "tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "none"},
        "thinking": {"type": "enabled", "budget_tokens": 10}}),
    ("/v1/messages/count_tokens", {"messages": HELLO[1:], "system": "Be brief."}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}),
    ("/v1/embeddings", {"input": [[5, 6], [7]]}),
    ("/v1/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("/v1/decisions", {"input": "A text.", "questions": [
        ASKED, {"type": "choice", "instructions": "Which?", "choices": [
            {"value": "a"}, {"value": True, "description": "b"}]},
        {"type": "score", "instructions": "How?", "levels": [{"label": "a"}, {"label": "b"}]}]}),
    ("/v1/systemone", {"state": {"a": 1}, "questions": {
        "x": {"type": "noul", "instructions": "So?", "criteria": {"true": "yes"}},
        "y": {"type": "choice", "instructions": "Which?", "criteria": {"a": None, "b": "c"}}}}),
    ("/tokenize", {"content": "Once", "with_pieces": True, "add_special": True}),
    ("/tokenize", {"messages": HELLO}),
    ("/detokenize", {"tokens": [5, 6, 400]}),
    ("/apply-template", {"messages": HELLO, "chat_template_kwargs": {"a": 1}}),
]  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.5, 1e308, "", "a", "\0", "\ud800",
    "é" * 50, "word " * 700, [], [[]], {}, {"a": 1}, [None], [[[[]]]], "<|end|>", "{{ 1/0 }}", "[", "(a",
    {"type": "text", "text": "x"}, {"$ref": "#"}, [1, "a", None],
]  # fmt: skip


def places(value, at=()):
    """All places in a body, as keys from the outside in."""
    yield at
    if isinstance(value, (dict, list)):
        for key, kid in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(kid, (*at, key))


def mutated(body, draw):
    """A body in which one to three values are others, missing, or joined by a stranger."""
    body = json.loads(json.dumps(body))
    for _ in range(draw.randint(1, 3)):
        all_places = [p for p in places(body) if p]
        if not all_places:
            return body
        *way, key = draw.choice(all_places)
        inside = body
        for step in way:
            inside = inside[step]
        kind = draw.random()
        if kind < 0.15:
            del inside[key]
        elif kind < 0.25 and isinstance(inside, dict):
            inside[draw.choice(["nonsense", "n", "type", "model", "stop"])] = copy.deepcopy(
                draw.choice(ODD)
            )
        else:
            inside[key] = copy.deepcopy(draw.choice(ODD))
    return body


def raw(body, draw):
    """A body as bytes, cut or broken at times."""
    found = json.dumps(body).encode()
    kind = draw.random()
    if kind < 0.05:
        return found[: draw.randrange(len(found) + 1)]
    if kind < 0.1:
        at = draw.randrange(len(found) + 1)
        return found[:at] + bytes([draw.randrange(256)]) + found[at:]
    return found


def throw(app, n, seed):
    """Send mutated bodies, eight at a time; returns how many were answered with each status."""
    draw = random.Random(seed)
    counts: dict[int, int] = {}
    wrong = []

    async def one(client, path, data):
        answer = await client.post(path, content=data, headers={"content-type": "application/json"})
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        if answer.status_code >= 500 or '"server_error"' in answer.text:
            wrong.append((path, data[:2000], answer.text[:300]))

    async def all_of_them(client):
        for at in range(0, n, 8):
            todo = []
            for _ in range(min(8, n - at)):
                path, body = draw.choice(BODIES)
                todo.append(one(client, path, raw(mutated(body, draw), draw)))
            await asyncio.gather(*todo)

    app.run(all_of_them)
    assert not wrong, wrong[:3]
    served = app.app.pool.find(None)
    assert (served.n_texts, served.in_use) == (0, 0)
    assert "tinyllm_requests_running 1.0" in app.get("/metrics").text  # this one
    return counts


def test_every_body_is_answered_before_it_is_changed(app, make_app):
    pytest.importorskip("llguidance")
    for path, body in BODIES:
        if path != "/v1/rerank":
            answer = app.post(path, body)
            assert answer.status_code == 200, (path, answer.text)


def test_mutated_bodies_are_answered_or_refused(make_app):
    counts = throw(make_app(), 250, 1)
    assert counts[200] > 10
    assert counts[400] > 100


@pytest.mark.slow
def test_many_mutated_bodies_are_answered_or_refused(make_app):
    counts = throw(make_app(), 5000, 2)
    assert set(counts) <= {200, 400, 404, 413}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="schemathesis is not on the path")
def test_schemathesis_finds_answers_as_they_are_described(running, tmp_path):
    """It knows only the description: no 500, wrong bodies refused, answers of their shapes."""
    _, (host, port) = running
    where = f"http://{host}:{port}/openapi.json"
    # a body of the right shape may still be refused, such as one that names a tool and has none
    how = ("--exclude-checks", "positive_data_acceptance", "--continue-on-failure", "-n", "30")
    done = subprocess.run(
        ["schemathesis", "run", where, "--no-color", "--request-timeout", "300", *how],
        cwd=tmp_path, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:]


REQUEST = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{}"
)


@pytest.fixture(scope="module")
def running(model, serve):
    """An application that listens, and where."""
    app = create_app({"tales": model})
    host, _, port = serve(app).rpartition("//")[2].partition(":")
    return app, (host, int(port))


def settled(app):
    """Wait until no request holds the model."""
    served = app.pool.find(None)
    for _ in range(6000):
        if not served.in_use:
            return served.n_texts
        asyncio.run(asyncio.sleep(0.01))
    raise AssertionError("a request still holds the model")


def test_a_client_may_go_at_any_byte(running):
    app, address = running
    body = json.dumps({"messages": HELLO, "max_tokens": 200, "stream": True, "ignore_eos": True})
    text = REQUEST.format(len(body), body).encode()
    for at in range(0, len(text) + 1, 12):
        with socket.create_connection(address, timeout=60) as s:
            s.sendall(text[:at])
    for n_read in (1, 10, 100, 500, 1000, 3000):
        with socket.create_connection(address, timeout=60) as s:
            s.sendall(text)
            while n_read > 0 and (part := s.recv(n_read)):
                n_read -= len(part)
    assert settled(app) == 0


@pytest.mark.parametrize(
    "text",
    [
        REQUEST.format(5, '{"messages": []}'),
        REQUEST.format(-1, "{}"),
        REQUEST.format("x", "{}"),
        REQUEST.format(10**30, "{}"),
        REQUEST.format(0, ""),
        "GET / HTTP/9\r\n\r\n",
        "nonsense\r\n\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GET /page/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /page/%2e%2e/%2e%2e/app.py HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda text: text[-40:].encode("unicode_escape").decode(),
)
def test_broken_requests_are_refused(running, text):
    app, address = running
    with socket.create_connection(address, timeout=60) as s:
        s.sendall(text.encode())
        s.shutdown(socket.SHUT_WR)
        answer = b""
        while part := s.recv(65536):
            answer += part
    assert not answer or answer.split()[1] in (b"400", b"404", b"413"), answer
    assert settled(app) == 0
