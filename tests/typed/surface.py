"""The types of the public surface, for type checkers alone: this file is never run.

In the last function each line is a mistake that a checker must report: a ``type: ignore`` that hides nothing is
an error itself.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Literal

import numpy as np
from typing_extensions import assert_type

import tinyllm
from tinyllm import Completion, Model
from tinyllm.engine.completion import Pieces
from tinyllm.kernels.backend import Device
from tinyllm.models.config import Config
from tinyllm.models.state import State
from tinyllm.sampling import SamplingParams
from tinyllm.sdk import Embed4All, GPT4All


def one_prompt_gives_a_completion(model: Model, ids: tuple[int, ...]) -> None:
    assert_type(model.generate("a"), Completion)
    assert_type(model.generate("a", 8, seed=1, stop="b", overflow="shift"), Completion)
    assert_type(model.generate([1, 2], stream=False), Completion)
    assert_type(model.generate(ids), Completion)
    assert_type(model.generate("a", json_schema={"type": "object"}), Completion)
    assert_type(model.generate(["a"], regex="b", grammar=None), list[Completion])


def a_list_gives_a_list(model: Model) -> None:
    assert_type(model.generate(["a", "b"]), list[Completion])
    assert_type(model.generate([[1], [2]], temperature=0), list[Completion])


def a_stream_gives_pieces(model: Model, stream: bool) -> None:
    assert_type(model.generate("a", stream=True), Pieces)
    assert_type(model.generate("a", stream=stream), Completion | Pieces)
    pieces: Iterator[str] = model.generate("a", stream=True)
    assert_type(next(pieces), str)


def a_chat_gives_a_completion_or_pieces(model: Model, stream: bool) -> None:
    messages = [{"role": "user", "content": "a"}]
    assert_type(model.chat(messages), Completion)
    assert_type(model.chat(messages, tools=[], max_tokens=3, top_k=1), Completion)
    assert_type(model.chat(messages, tools=[], tool_choice="none"), Completion)
    assert_type(model.chat(messages, stream=True), Pieces)
    assert_type(model.chat(messages, stream=stream), Completion | Pieces)


def results_are_known(model: Model, done: Completion, state: State) -> None:
    assert_type(tinyllm.load(), Model)
    assert_type(model.config, Config)
    assert_type(model.config.n_embd, int)
    assert_type(model.arch, str)
    assert_type(model.new_state(), State)
    assert_type(model.logits([1], state), np.ndarray)
    assert_type(model.embed(["a"]), np.ndarray)
    assert_type(tinyllm.list_devices(), list[Device])
    assert_type(done.finish_reason, Literal["stop", "length", "context", "cancelled", "deadline"])
    assert_type(done.timings.generated_per_s, float)


def the_sdk_gives_texts(llm: GPT4All, streaming: bool) -> None:
    assert_type(llm.generate("a"), str)
    assert_type(llm.generate("a", max_tokens=4, temp=0, top_k=1, seed=2), str)
    assert_type(next(llm.generate("a", streaming=True)), str)
    assert_type(llm.generate("a", streaming=streaming), str | Generator[str, None, None])
    assert_type(llm.generate("a", logprobs=2), Completion)
    assert_type(llm.generate(["a"]), list[str])
    assert_type(llm.generate(["a"], logprobs=0), list[Completion])


def the_sdk_gives_vectors(embedder: Embed4All) -> None:
    assert_type(embedder.embed("a"), list[float])
    assert_type(embedder.embed(["a"]), list[list[float]])
    assert_type(embedder.embed("a", return_dict=True)["n_prompt_tokens"], int)


def mistakes_are_reported(model: Model, llm: GPT4All) -> None:
    model.generate(3.5)  # type: ignore
    model.generate("a", temprature=0)  # type: ignore
    model.generate("a", 8, 0.7)  # type: ignore
    model.generate("a", overflow="wrap")  # type: ignore
    model.generate(["a"], stream=True)  # type: ignore
    model.chat("Hello")  # type: ignore
    model.chat([], stop=1)  # type: ignore
    print(model.config.n_embed)  # type: ignore
    tinyllm.load(kv_type="f8")  # type: ignore
    SamplingParams(0.7, 40)  # type: ignore
    llm.generate("a", temperature=0)  # type: ignore
    llm.generate(["a"], streaming=True)  # type: ignore
