"""The clients of OpenAI and Anthropic, as they come from PyPI, against the server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from spelled import HERMES

import tinyllm

pytest.importorskip("fastapi", reason="the server needs the extra [server]")
openai = pytest.importorskip("openai", minversion="1.50")
anthropic = pytest.importorskip("anthropic")

from tinyllm.server import Settings, create_app  # noqa: E402

HELLO = [{"role": "user", "content": "Tell me a story."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}


@pytest.fixture(scope="module")
def url(model: tinyllm.Model, serve: Callable[[Any], str]) -> str:
    """The address of a server of the bundled model, which asks for a key and shows tools.

    $TINYLLM_SERVER_URL names one that runs already with this key and template, such as replicas.
    """
    if given := os.environ.get("TINYLLM_SERVER_URL"):
        return given
    return serve(create_app({"tales": model}, Settings(api_keys=("secret",), template=HERMES)))


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as found:
        yield found


def asking(**fields):
    return {"model": "tales", "messages": HELLO, "max_tokens": 12, "seed": 3, **fields}


def test_a_chat_and_its_stream(client):
    answer = client.chat.completions.create(**asking())
    chunks = list(
        client.chat.completions.create(
            **asking(), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content != ""
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens  # more of them are cached now
    assert answer.usage.completion_tokens == 12


def test_a_stream_of_the_asynchronous_client(client, url):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as c:
            stream = await c.chat.completions.create(**asking(), stream=True)
            return "".join([e.choices[0].delta.content or "" async for e in stream])

    expected = client.chat.completions.create(**asking()).choices[0].message.content
    assert asyncio.run(talk()) == expected


def test_log_probabilities(client):
    answer = client.chat.completions.create(**asking(logprobs=True, top_logprobs=2))
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    assert all(len(e.top_logprobs) == 2 and e.logprob <= 0 for e in entries)


class City(BaseModel):
    name: str
    capital: bool


def test_parse_gives_an_object(client):
    fields = {**asking(), "max_tokens": 200}
    message = client.chat.completions.parse(**fields, response_format=City).choices[0].message
    assert isinstance(message.parsed, City)


def test_a_loop_with_a_tool(client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    fields = asking(tools=[tool], max_tokens=100)
    choice = client.chat.completions.create(**fields, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    asked = [*HELLO, choice.message.to_dict(), result]
    last = client.chat.completions.create(**{**fields, "messages": asked}, tool_choice="none")
    assert last.choices[0].finish_reason in ("stop", "length")
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(**fields, tool_choice=named) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.name == "weather"


def test_one_call_where_calls_are_not_parallel(client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    fields = asking(tools=[tool], max_tokens=300, tool_choice="required", parallel_tool_calls=False)
    for seed in range(4):
        choice = client.chat.completions.create(**{**fields, "seed": seed}).choices[0]
        assert len(choice.message.tool_calls) == 1
        assert choice.finish_reason == "tool_calls"


def test_completions(client, model):
    how = {"temperature": 0, "max_tokens": 6}
    answer = client.completions.create(
        model="tales", prompt="Once upon", echo=True, logprobs=1, **how
    )
    expected = model.generate("Once upon", **how, logprobs=1, echo=True)
    choice = answer.choices[0]
    assert choice.text == "Once upon" + expected.text
    told = [None, *(t.logprob for t in [*expected.prompt_logprobs, *expected.logprobs])]
    assert choice.logprobs.token_logprobs == told
    scored = client.completions.create(
        model="tales", prompt=[expected.prompt_ids], echo=True, logprobs=1, max_tokens=0
    )
    assert scored.choices[0].logprobs.token_logprobs == told[: len(expected.prompt_ids)]
    stream = client.completions.create(model="tales", prompt="Once upon", stream=True, **how)
    assert "".join(c.choices[0].text for c in stream) == expected.text
    many = client.completions.create(
        model="tales", prompt=["One", "Two"], n=2, seed=1, max_tokens=4
    )
    assert [c.index for c in many.choices] == [0, 1, 2, 3]


def test_embeddings(client, model):
    expected = model.embed(["One", "Two"])
    for form in (openai.omit, "float", "base64"):
        found = client.embeddings.create(model="tales", input=["One", "Two"], encoding_format=form)
        rows = [e.embedding for e in found.data]
        if form == "base64":
            continue
        np.testing.assert_array_equal(np.array(rows, np.float32), expected)
    short = client.embeddings.create(model="tales", input="One", dimensions=8).data[0].embedding
    assert np.isclose(np.linalg.norm(short), 1)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tales"]
    assert client.models.retrieve("bundled.gguf").id == "tales"


def test_errors_are_the_clients_own(client, url):
    with pytest.raises(openai.NotFoundError, match="'gpt-4o'"):
        client.chat.completions.create(**asking(model="gpt-4o"))
    with pytest.raises(openai.BadRequestError, match="supplied: nonsense"):
        client.chat.completions.create(**asking(), extra_body={"nonsense": 1})
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_responses(client):
    fields = {"model": "tales", "input": "Tell me a story.", "extra_body": {"seed": 3}}
    answer = client.responses.create(**fields, max_output_tokens=12)
    chat = client.chat.completions.create(**asking()).choices[0].message.content
    assert answer.output_text == chat
    assert answer.status == "incomplete"
    with client.responses.stream(**fields, max_output_tokens=12) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == chat
    order = [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert list(dict.fromkeys(kinds)) == order
    parsed = client.responses.parse(**fields, text_format=City).output_parsed
    assert isinstance(parsed, City)


def test_responses_call_functions(client):
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    fields = {"model": "tales", "tools": [tool], "extra_body": {"seed": 3}}
    answer = client.responses.create(**fields, input="Weather?", tool_choice="required")
    (call,) = [item for item in answer.output if item.type == "function_call"][:1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    asked = [{"role": "user", "content": "Weather?"}, *answer.output, result]
    more = client.responses.create(**fields, input=asked, tool_choice="none", max_output_tokens=8)
    assert more.status in ("completed", "incomplete")
    with client.responses.stream(**fields, input="Weather?", tool_choice="required") as stream:
        kinds = [event.type for event in stream]
    assert "response.function_call_arguments.done" in kinds
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tales", input="x", previous_response_id="resp_1")


@pytest.mark.skipif(not hasattr(openai.OpenAI, "decisions"), reason="an older openai")
def test_decisions(client):
    found = client.decisions.create(
        model="tales",
        input="I was charged twice.",
        questions=[
            {"type": "predicate", "instructions": "It is a complaint.", "name": "angry"},
            {
                "type": "choice",
                "instructions": "Whose is it?",
                "choices": [{"value": "billing"}, {"value": "shipping"}],
            },
        ],
    )
    angry, team = found.answers
    assert (angry.type, angry.name) == ("predicate", "angry")
    assert 0 < angry.probability < 1
    assert team.choice in ("billing", "shipping")
    assert found.usage.total_tokens > 0


def test_anthropics_messages(claude):
    fields = {"model": "tales", "max_tokens": 12, "messages": HELLO, "extra_body": {"seed": 3}}
    answer = claude.messages.create(**fields)
    assert answer.stop_reason == "max_tokens"
    assert answer.content[0].text
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == answer.content[0].text
    assert final.usage.output_tokens == answer.usage.output_tokens == 12
    counted = claude.messages.count_tokens(model="tales", messages=HELLO).input_tokens
    assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_anthropics_tools(claude):
    tool = {"name": "weather", "description": "The weather.", "input_schema": WEATHER}
    fields = {"model": "tales", "max_tokens": 100, "tools": [tool], "extra_body": {"seed": 3}}
    asked = [{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}]
    answer = claude.messages.create(**fields, messages=asked, tool_choice={"type": "any"})
    assert answer.stop_reason == "tool_use"
    call = next(block for block in answer.content if block.type == "tool_use")
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    asked += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    more = claude.messages.create(**fields, messages=asked, tool_choice={"type": "none"})
    assert more.stop_reason in ("end_turn", "max_tokens")
    named = {"type": "tool", "name": "weather"}
    with claude.messages.stream(**fields, messages=asked[:1], tool_choice=named) as stream:
        blocks = stream.get_final_message().content
    assert any(b.type == "tool_use" and b.input["city"] in ("Paris", "Rome") for b in blocks)


def test_anthropics_stops_and_errors(claude):
    fields = {"model": "tales", "messages": HELLO, "extra_body": {"seed": 3}}
    answer = claude.messages.create(**fields, max_tokens=50, stop_sequences=["e"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "e")
    with pytest.raises(anthropic.NotFoundError, match="'claude'"):
        claude.messages.create(**{**fields, "model": "claude"}, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(**fields, max_tokens=0)


def calling(client, url, protocol, **fields):
    """The parts of a first call's arguments in a stream; what else was said; why it ended; and the whole call.

    The whole one is that of the answer without a stream.
    """
    tool = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    if protocol == "chat":
        asked = {**asking(tools=[tool], tool_choice="required", max_tokens=100), **fields}
        whole = client.chat.completions.create(**asked).choices[0].message.tool_calls
        chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
        parts = [c for chunk in chunks for c in chunk.delta.tool_calls or () if c.index == 0]
        assert all(p.id is None and p.function.name is None for p in parts[1:])
        assert (parts[0].type, parts[0].function.name) == ("function", "weather")
        said = "".join(chunk.delta.content or "" for chunk in chunks)
        if whole:
            assert parts[0].id == whole[0].id
        found = whole[0].function.arguments if whole else None
        return [p.function.arguments for p in parts], said, chunks[-1].finish_reason, found
    if protocol == "responses":
        asked = {
            "model": "tales", "input": "Tell me a story.", "extra_body": {"seed": 3},
            "tools": [{"type": "function", "name": "weather", "parameters": WEATHER}],
            "tool_choice": "required", "max_output_tokens": fields.get("max_tokens", 100),
        }  # fmt: skip
        whole = [o for o in client.responses.create(**asked).output if o.type == "function_call"]
        events = list(client.responses.create(**asked, stream=True))
        parts = [
            e.delta for e in events
            if e.type == "response.function_call_arguments.delta" and e.output_index == 0
        ]  # fmt: skip
        said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        item = next(e.item for e in events if e.type == "response.output_item.done")
        assert item.arguments == "".join(parts)
        assert events[-1].response.output[0] == item
        return parts, said, item.status, whole[0].arguments if whole else None
    tool = {"name": "weather", "input_schema": WEATHER}
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as claude:
        asked = {
            "model": "tales", "messages": HELLO, "tools": [tool], "tool_choice": {"type": "any"},
            "max_tokens": fields.get("max_tokens", 100), "extra_body": {"seed": 3},
        }  # fmt: skip
        whole = [b for b in claude.messages.create(**asked).content if b.type == "tool_use"]
        events = list(claude.messages.create(**asked, stream=True))
    begun = next(e.content_block for e in events if e.type == "content_block_start")
    assert begun.name == "weather"
    deltas = [e.delta for e in events if e.type == "content_block_delta" and e.index == 0]
    changes = [e.delta for e in events if e.type == "content_block_delta"]
    said = "".join(d.text for d in changes if d.type == "text_delta")
    stop = next(e.delta.stop_reason for e in events if e.type == "message_delta")
    found = json.dumps(whole[0].input) if whole else None
    return [d.partial_json for d in deltas], said, stop, found


@pytest.mark.parametrize("protocol", ["chat", "responses", "messages"])
def test_a_stream_tells_a_call_as_it_is_written(client, url, protocol):
    parts, said, ended, whole = calling(client, url, protocol)
    assert json.loads("".join(parts)) == json.loads(whole)
    assert not said.strip()
    assert ended in ("tool_calls", "completed", "tool_use")


@pytest.mark.parametrize("protocol", ["chat", "responses", "messages"])
def test_a_stream_tells_a_call_that_is_cut_off_once(client, url, protocol):
    parts, said, ended, whole = calling(client, url, protocol, max_tokens=34)
    told, full = "".join(parts), "".join(calling(client, url, protocol)[0])
    assert full.startswith(told)
    assert 0 < len(told) < len(full)
    assert whole is None
    assert not said.strip()  # not as a text besides
    assert ended in ("length", "incomplete", "max_tokens")
