"""Models that read a text with one stack of layers and write about it with another (T5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import unpacked

import tinyllm
from tinyllm import Engine, gguf
from tinyllm.errors import (
    ArgumentError,
    ContextOverflow,
    GGUFError,
    StateError,
    TinyLLMError,
    UnsupportedModel,
)
from tinyllm.kernels.devices import open_backend
from tinyllm.models.build import build
from tinyllm.models.stages import Stage

PIECES = ["<pad>", "</s>", "<unk>", "<start>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁the"]
PROMPTS = ["a cat sat on the mat", "the dog", "one two three four five six seven " * 8]


def with_vocabulary(name: str, path: Path) -> Path:
    """A golden file with a vocabulary of letters."""
    with gguf.open(unpacked(name)) as f:
        n = f.tensors["token_embd.weight"].shape[0]
        words = {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [*PIECES, *(f"<{i}>" for i in range(n - len(PIECES)))],
            "tokenizer.ggml.scores": np.linspace(0, -5, n).astype(np.float32),
            "tokenizer.ggml.token_type": np.array([3, 3, 2, 3, *[1] * (n - 4)], np.int32),
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.padding_token_id": 0,
        }
        tensors = {t: np.array(x.dequantize()) for t, x in f.tensors.items()}
        gguf.write(path, {**f.metadata, **words}, tensors)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_vocabulary("t5", tmp_path_factory.mktemp("t5") / "t5.gguf")


@pytest.fixture(scope="module")
def m(path: Path) -> Iterator[tinyllm.Model]:
    with tinyllm.load(path) as model:
        yield model


def by_hand(m: tinyllm.Model, prompt: str, n: int) -> list[int]:
    """The likeliest ids, each of a pass over all that was written."""
    ids = [3]
    for _ in range(n):
        state = m.new_state(source=prompt)
        ids.append(int(m.logits(ids, state)[-1].argmax()))
        if ids[-1] == 1:
            return ids[1:-1]
    return ids[1:]


def test_a_prompt_is_read_whole_and_its_end_is_part_of_it(m: tinyllm.Model) -> None:
    done = m.generate(PROMPTS[0], max_tokens=20, temperature=0)
    assert done.prompt_ids == m.tokenizer.encode(PROMPTS[0])
    assert done.prompt_ids[-1] == 1
    assert done.ids == by_hand(m, PROMPTS[0], 20)
    assert len(done.ids) > 3


def test_texts_are_the_same_alone_together_and_guessed_ahead(m: tinyllm.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "seed": 7, "logprobs": 2}
    alone = [m.generate(p, **options) for p in PROMPTS]
    assert len({a.text for a in alone}) == len(PROMPTS)
    together = m.generate(PROMPTS, **options)
    guessed = m.generate(PROMPTS, speculate="lookup", **options)
    drafted = [m.generate(p, speculate=m, **options) for p in PROMPTS]
    with Engine(m) as e:
        requests = [e.submit(p, **options) for p in PROMPTS]
        served = [r.result() for r in requests]
        counted = [r.usage.prompt_tokens for r in requests]
    with tinyllm.load(m.path, n_threads=1) as one:
        assert [a.logprobs for a in one.generate(PROMPTS, **options)] == [a.logprobs for a in alone]
    streamed = m.generate(PROMPTS[0], stream=True, **options)
    assert "".join(streamed) == alone[0].text
    for other in (together, guessed, drafted, served):
        assert [(o.ids, o.logprobs, o.prompt_ids) for o in other] == [
            (a.ids, a.logprobs, a.prompt_ids) for a in alone
        ]
    assert counted == [len(a.prompt_ids) for a in alone]


def test_a_request_that_is_set_aside_reads_its_source_anew(m: tinyllm.Model) -> None:
    want = [m.generate(p, max_tokens=60, temperature=0, logit_bias={1: -100.0}) for p in PROMPTS]
    with Engine(m, max_bytes=1 << 40) as e:
        requests = [
            e.submit(p, max_tokens=60, temperature=0, logit_bias={1: -100.0}) for p in PROMPTS
        ]
        for text in requests[0]:
            assert isinstance(text, str)
            e.max_bytes = 1  # all but one are set aside, and go on later
        assert [r.result().ids for r in requests] == [w.ids for w in want]


def test_forks_share_what_was_read(m: tinyllm.Model) -> None:
    state = m.new_state(source=PROMPTS[2])
    fork = state.fork()
    assert fork.source is state.source
    first, second = (m.logits([3, 10, 11], s) for s in (fork, state))
    assert np.array_equal(first, second)
    later = state.fork()
    assert np.array_equal(m.logits([12, 13], state), m.logits([12, 13], later))
    later.truncate(1)
    assert np.array_equal(m.logits([10, 11], later), first[1:])
    later.shift(0, 1)
    assert later.n_past == 2
    assert state.nbytes > state.cache.nbytes


def test_what_needs_one_stack_is_refused_in_one_line(m: tinyllm.Model, tmp_path: Path) -> None:
    state = m.new_state(source=[5, 6])
    for call, error, why in [
        (lambda: m.new_state(), ArgumentError, "t5 writes about a text that it has read before"),
        (lambda: m.logits([3]), ArgumentError, "use generate, whose prompt is that text"),
        (lambda: m.points(), ArgumentError, "use generate, whose prompt is that text"),
        (lambda: m.new_state(source=[]), ArgumentError, "source is empty"),
        (lambda: m.new_state(source=[5000]), ArgumentError, "expected 0 to 63"),
        (lambda: m.generate([5], state=state), ArgumentError, "leave state out"),
        (lambda: m.generate([5] * 600), ContextOverflow, "600 tokens; the context holds 512"),
        (lambda: state.save(tmp_path / "x.npz"), StateError, "keep the prompt, and read it anew"),
        (lambda: state.restore(tmp_path / "x.npz"), StateError, "keep the prompt"),
        (lambda: tinyllm.load().new_state(source=[5]), ArgumentError, "leave source out"),
        (lambda: tinyllm.imatrix(m.path, "abc " * 40), ArgumentError, "t5 writes about a text"),
        (lambda: m.chat([{"role": "user", "content": "a"}]), TinyLLMError, "no chat template"),
    ]:
        with pytest.raises(error) as e:
            call()
        assert why in str(e.value)
        assert "\n" not in str(e.value)


def test_ids_need_no_vocabulary() -> None:
    with tinyllm.load(unpacked("t5")) as bare:
        assert bare.logits([3], bare.new_state(source=[5, 6])).shape == (1, 64)


def test_embeddings_are_those_of_the_stack_that_reads(m: tinyllm.Model) -> None:
    assert m.network.reader is not None
    ids = m.tokenizer.encode(PROMPTS[0])
    want = m.network.reader.hidden([ids])[0].mean(0)
    assert np.allclose(m.embed(PROMPTS[0]), want / np.linalg.norm(want), atol=1e-6)


def test_files_without_a_start_and_several_devices_are_refused() -> None:
    be = open_backend("reference")
    with gguf.open(unpacked("t5")) as f:
        metadata, tensors = dict(f.metadata), dict(f.tensors)
        with pytest.raises(GGUFError, match="decoder_start_token_id: is 64; expected a token"):
            build(metadata | {"t5.decoder_start_token_id": 64}, tensors, be)
        with pytest.raises(UnsupportedModel, match="put all on one device"):
            build(metadata, tensors, lambda n: [Stage(be, range(1)), Stage(be, range(1, n))])
