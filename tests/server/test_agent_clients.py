"""Programs and libraries that speak to the server through a client of their own, as they come from PyPI."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

import tinyllm

pytest.importorskip("fastapi", reason="the server needs the extra [server]")
pytest.importorskip("llguidance")
pytest.importorskip("openai", minversion="1.50")

from spelled import HERMES
from test_server_clients import HELLO

from tinyllm.server import Settings, create_app

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
ASKED = "What is the weather?"
CITIES = ("Paris", "Rome")


class Weather(BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool


@pytest.fixture(scope="module")
def url(model: tinyllm.Model, serve: Callable[[Any], str]) -> str:
    """The address of OpenAI's protocol on a server that asks for a key and shows tools."""
    return (
        serve(create_app({"tales": model}, Settings(api_keys=("secret",), template=HERMES))) + "/v1"
    )


@pytest.fixture
def lang(url: str) -> Any:
    """LangChain's model."""
    langchain = pytest.importorskip("langchain_openai")
    return langchain.ChatOpenAI(
        model="tales", base_url=url, api_key="secret", seed=3, max_tokens=120, max_retries=0
    )


def test_langchain_calls_tools(lang: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def weather(city: Literal["Paris", "Rome"]) -> str:
        """Tell the weather of a city."""
        return f"It is warm in {city}."

    bound = lang.bind_tools([weather], tool_choice="weather")
    said = bound.invoke([HumanMessage(ASKED)])
    call = said.tool_calls[0]
    assert call["name"] == "weather"
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content in [f"It is warm in {city}." for city in CITIES]
    last = lang.bind_tools([weather], tool_choice="none").invoke(
        [HumanMessage(ASKED), said, result]
    )
    assert last.content
    streamed = None
    for chunk in bound.stream([HumanMessage(ASKED)]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gives_an_object(lang: Any, method: str) -> None:
    found = lang.with_structured_output(Weather, method=method).invoke(ASKED)
    assert isinstance(found, Weather)


LITELLM = """
import json, sys
import litellm

where, asked, schema = json.loads(sys.argv[1])
fields = {**where, "model": "openai/tales", "max_tokens": 12, "seed": 3, "messages": asked}
whole = litellm.completion(**fields).choices[0].message.content
chunks = litellm.completion(**fields, stream=True)
tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
called = litellm.completion(**{**fields, "max_tokens": 120}, tools=tools, tool_choice="required")
vectors = litellm.embedding(model="openai/tales", input=["One"], encoding_format="float", **where)
print(json.dumps({
    "whole": whole,
    "streamed": "".join(c.choices[0].delta.content or "" for c in chunks),
    "called": called.choices[0].message.tool_calls[0].function.arguments,
    "vector": vectors.data[0]["embedding"],
}))
"""


def test_litellm_completes_streams_calls_and_embeds(url: str, model: tinyllm.Model) -> None:
    if find_spec("litellm") is None:
        pytest.skip("litellm is not here")
    where = {"api_base": url, "api_key": "secret"}
    told = json.dumps([where, HELLO, Weather.model_json_schema()])
    # a process of its own: it leaves an event loop open; and it asks the network for prices unless told
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LITELLM, told], env=environment,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == found["streamed"] != ""
    assert Weather.model_validate_json(found["called"])
    assert len(found["vector"]) == model.config.n_embd


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor_gives_an_object(url: str, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    from openai import OpenAI

    plain = OpenAI(base_url=url, api_key="secret", max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    found = client.chat.completions.create(
        model="tales", messages=HELLO, response_model=Weather, max_retries=0, max_tokens=120, seed=3
    )
    assert isinstance(found, Weather)


def test_pydantic_ais_agent_gives_a_text_and_objects(url: str) -> None:
    pytest.importorskip("pydantic_ai")
    import httpx
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def ask(output: Any) -> Any:
        async with httpx.AsyncClient() as client:
            where = OpenAIProvider(base_url=url, api_key="secret", http_client=client)
            settings: Any = {"max_tokens": 120, "seed": 3}
            agent = Agent(
                OpenAIChatModel("tales", provider=where), output_type=output, retries=0,
                model_settings=settings,
            )  # fmt: skip
            return (await agent.run(ASKED)).output

    assert asyncio.run(ask(str))
    for output in (Weather, NativeOutput(Weather)):  # by a call, and by the form of the answer
        assert isinstance(asyncio.run(ask(output)), Weather)


def test_llm_finds_the_server_in_its_list_of_models(url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "keys.json").write_text(json.dumps({"ours": "secret"}), "utf-8")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tales-here\n  model_name: tales\n  api_base: {url}\n  api_key_name: ours\n"
        "  supports_schema: true\n",
        "utf-8",
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}

    def say(*words: str) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "llm", "-m", "tales-here", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False,
            stdin=subprocess.DEVNULL,  # it waits for the end of any other that is no terminal
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    few = ("-o", "max_tokens", "12", "-o", "seed", "3")
    assert say("Tell me a story.", *few) == say("Tell me a story.", *few, "--no-stream") != ""
    schema = json.dumps(Weather.model_json_schema())
    text = say(ASKED, "--schema", schema, "-o", "max_tokens", "120", "-o", "seed", "3")
    assert Weather.model_validate_json(text)
