"""The path from a file to text, embeddings and logits, on real trained weights."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
import tinyllm.loading
from tinyllm.cli.perplexity import perplexity
from tinyllm.errors import (
    ArgumentError,
    ContextOverflow,
    DeviceError,
    StateError,
    TinyLLMError,
)
from tinyllm.kernels.cpu.backend import CPUBackend

DEVICES = ["reference", "cpu"]
LILY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


@cache
def model(path: Path, device: str, **options: Any) -> tinyllm.Model:
    return tinyllm.load(path, device=device, **options)


@pytest.fixture(params=DEVICES)
def stories(request: pytest.FixtureRequest, stories260k: Path) -> tinyllm.Model:
    return model(stories260k, request.param)


@pytest.fixture(params=DEVICES)
def minilm(request: pytest.FixtureRequest, data: Path) -> tinyllm.Model:
    return model(data / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf", request.param)


@pytest.fixture(scope="session")
def recorded(data: Path) -> Any:
    return json.loads((data / "gpt4all-2.8.2.json").read_text())["generate"]


def test_greedy_text_is_the_known_one(stories: tinyllm.Model) -> None:
    assert str(stories.generate("Once upon a time", max_tokens=70, temperature=0)).startswith(LILY)


@pytest.mark.parametrize(
    "name", ["greedy_penalty_default", "greedy_penalty_1.5_last_8", "empty", "unicode"]
)
def test_penalties_follow_gpt4all(stories: tinyllm.Model, recorded: Any, name: str) -> None:
    case = recorded[name]
    options = {"repeat_penalty": 1.18, "repeat_last_n": 64} | case["kwargs"]
    del options["top_k"]
    assert stories.generate(case["prompt"], temperature=0, **options).text == case["text"]


@pytest.mark.parametrize("device", DEVICES)
def test_context_shift_equals_the_recorded_text(
    stories260k: Path, recorded: Any, device: str
) -> None:
    m = model(stories260k, device, n_ctx=256)
    done = m.generate("Once upon a time", max_tokens=400, temperature=0, overflow="shift")
    assert done.text == recorded["context_shift"]["text"]
    assert done.finish_reason == "length"


def test_embeddings_equal_hugging_face(minilm: tinyllm.Model, data: Path) -> None:
    texts = json.loads((data / "models" / "all-MiniLM-L6-v2.json").read_text())
    want = np.load(data / "models" / "all-MiniLM-L6-v2.npz")["emb"]
    for text, ids in zip(texts["texts"], texts["ids"], strict=True):
        assert minilm.tokenizer.encode(text) == ids
    got = minilm.embed(texts["texts"])
    assert ((got * want).sum(-1) >= 0.9999).all()
    assert np.allclose(np.linalg.norm(got, axis=-1), 1)


def test_a_text_alone_equals_the_text_in_a_batch(minilm: tinyllm.Model) -> None:
    texts = ["one", "a rather longer text than the first " * 8, "two words"]
    together = minilm.embed(texts)
    alone = np.stack([minilm.embed(t) for t in texts])
    bound = 0 if minilm.device == "cpu" else 1e-6
    assert np.abs(together - alone).max() <= bound


def test_chunks_and_single_tokens_equal_the_whole(stories: tinyllm.Model) -> None:
    ids = stories.tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    whole = stories.logits(ids)
    state = stories.new_state(64)
    parts = np.concatenate([stories.logits([i], state) for i in ids])
    assert np.abs(parts - whole).max() <= (0 if stories.device == "cpu" else 1e-5 * whole.std())


def test_an_identity_tap_changes_no_bit(stories: tinyllm.Model) -> None:
    ids, seen = stories.tokenizer.encode("Once upon a time"), []

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        seen.append(name)
        return x

    assert np.array_equal(stories.logits(ids, tap=tap), stories.logits(ids))
    assert {"embd", "blk.0.q", "blk.4.attn_out", "blk.2.ffn_out", "logits"} <= set(seen)


def test_a_tap_that_zeroes_one_head_changes_the_logits(stories: tinyllm.Model) -> None:
    ids = stories.tokenizer.encode("Once upon a time")

    def without_head_3(name: str, x: np.ndarray) -> np.ndarray | None:
        if name == "blk.2.attn_heads":
            x[:, 3 * 8 : 4 * 8] = 0
            return x
        return None

    assert np.abs(stories.logits(ids, tap=without_head_3) - stories.logits(ids)).max() > 0.01


def test_a_failing_tap_leaves_the_model_usable(stories: tinyllm.Model) -> None:
    ids, state = stories.tokenizer.encode("Once upon a time"), stories.new_state(64)

    def broken(name: str, x: np.ndarray) -> np.ndarray:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        stories.logits(ids, state, tap=broken)
    state.truncate(0)
    assert np.array_equal(stories.logits(ids, state), stories.logits(ids))


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(stories: tinyllm.Model) -> None:
    prompts = ["Once upon a time", "The dog", "Lily and Ben"]
    together = stories.generate(prompts, max_tokens=40, seed=7)
    alone = [stories.generate(p, max_tokens=40, seed=7) for p in prompts]
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert len({c.text for c in together}) == 3


def test_the_number_of_threads_changes_nothing(stories260k: Path) -> None:
    texts = [
        tinyllm.load(stories260k, n_threads=n).generate("Once", max_tokens=60, seed=3).ids
        for n in (1, 2)
    ]
    assert texts[0] == texts[1]


def test_threads_can_change_between_steps(stories260k: Path) -> None:
    m = tinyllm.load(stories260k, n_threads=1)
    first = m.generate("Once", max_tokens=20, seed=3).ids
    m.network.be.set_threads(2)
    assert m.generate("Once", max_tokens=20, seed=3).ids == first


def test_a_stream_is_the_text_in_pieces(stories: tinyllm.Model) -> None:
    whole = stories.generate("Once upon a time", max_tokens=30, temperature=0).text
    pieces = list(stories.generate("Once upon a time", max_tokens=30, temperature=0, stream=True))
    assert "".join(pieces) == whole
    assert len(pieces) > 15


def test_a_stream_has_the_whole_completion_at_its_end(stories: tinyllm.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "logprobs": 0}
    whole = stories.generate("Once upon a time", **options)
    pieces = stories.generate("Once upon a time", stream=True, **options)
    first = next(pieces)
    assert (pieces.completion.text, pieces.completion.finish_reason) == (first, "cancelled")
    assert first + "".join(pieces) == whole.text
    done = pieces.completion
    assert (done.text, done.ids, done.finish_reason) == (whole.text, whole.ids, "length")
    assert done.logprobs == whole.logprobs
    t = done.timings  # the prompt has been read before
    assert (t.n_prompt + t.n_reused, t.n_generated) == (len(whole.prompt_ids), 30)
    stopped = stories.generate("Once upon a time", stop="girl", stream=True, temperature=0)
    assert "".join(stopped) == ", there was a little "
    assert stopped.completion.finish_reason == "stop"


def test_a_closed_stream_stops(stories: tinyllm.Model) -> None:
    steps = []
    pieces = stories.generate(
        "Once", max_tokens=1000, stream=True, logits_processor=lambda ids, x: steps.append(len(ids))
    )
    next(pieces)
    done = len(steps)
    pieces.close()
    assert len(steps) == done
    assert list(pieces) == []
    assert pieces.completion.finish_reason == "cancelled"


def test_stop_strings_end_the_text_and_are_not_part_of_it(stories: tinyllm.Model) -> None:
    done = stories.generate("Once upon a time", temperature=0, stop=["girl named"])
    assert done.text == ", there was a little "
    assert done.finish_reason == "stop"


def test_logprobs_are_those_of_the_logits(stories: tinyllm.Model) -> None:
    done = stories.generate("Once upon", max_tokens=4, temperature=0, logprobs=3, echo=True)
    rows = stories.logits(done.prompt_ids + done.ids)
    rows = (
        rows
        - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - rows.max(-1, keepdims=True)
    )
    n = len(done.prompt_ids)
    for t, token in enumerate([*done.prompt_logprobs, *done.logprobs]):
        assert token.id == [*done.prompt_ids, *done.ids][t + 1]
        assert abs(token.logprob - rows[t, token.id]) < 1e-4
    assert len(done.prompt_logprobs) == n - 1
    assert len(done.logprobs[0].top) == 3


def test_a_conversation_goes_on_in_its_state(stories: tinyllm.Model) -> None:
    state = stories.new_state(200)
    first = stories.generate("Once upon a time", max_tokens=10, temperature=0, state=state)
    assert state.ids == first.prompt_ids + first.ids
    kept = state.reuse([*state.ids, *stories.tokenizer.encode(" and", add_special=False)])
    assert kept >= len(first.prompt_ids)


def test_a_saved_state_goes_on_to_the_bit(stories: tinyllm.Model, tmp_path: Path) -> None:
    state = stories.new_state(100)
    stories.generate("Once upon a time", max_tokens=10, temperature=0, state=state)
    state.save(tmp_path / "talk.npz")
    other = stories.new_state(120)
    other.restore(tmp_path / "talk.npz")
    ids = stories.tokenizer.encode(" Then", add_special=False)
    assert np.array_equal(stories.logits(ids, state), stories.logits(ids, other))


def test_a_damaged_state_is_refused(stories: tinyllm.Model, tmp_path: Path) -> None:
    state = stories.new_state(64)
    stories.logits([1, 2, 3], state)
    path = tmp_path / "talk.npz"
    state.save(path)
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", b"PK" + raw[2:40]):
        path.write_bytes(damaged)
        with pytest.raises(StateError):
            stories.new_state(64).restore(path)


def test_a_full_context_is_an_error_a_cut_or_a_shift(stories: tinyllm.Model) -> None:
    ids = [1] + [300] * 99
    small = tinyllm.load(stories.path, device=stories.device, n_ctx=64)
    with pytest.raises(ContextOverflow, match=r"100 tokens.*64"):
        small.generate(ids)
    cut = small.generate(ids, max_tokens=10, overflow="truncate", temperature=0)
    assert len(cut.ids) == 10
    assert small.generate(ids[:60], max_tokens=50, temperature=0).finish_reason == "context"
    assert len(small.generate(ids, max_tokens=90, overflow="shift", temperature=0).ids) == 90


def test_two_threads_on_one_model_do_not_mix(stories: tinyllm.Model) -> None:
    prompts = ["Once upon a time", "The dog"] * 3
    want = [stories.generate(p, max_tokens=30, seed=1).text for p in prompts]
    got = [""] * len(prompts)

    def work(i: int) -> None:
        got[i] = stories.generate(prompts[i], max_tokens=30, seed=1).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == want


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -2},
        {"temperature": -1},
        {"top_p": 2},
        {"stop": [""]},
        {"stream": True, "prompt": ["a", "b"]},
    ],
)
def test_wrong_arguments_are_named(stories: tinyllm.Model, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        stories.generate(**{"prompt": "Once", **options})


def test_an_encoder_writes_no_text(minilm: tinyllm.Model) -> None:
    with pytest.raises(ArgumentError, match="use embed"):
        minilm.generate("Once")


def test_a_control_token_can_be_a_stop_string(stories: tinyllm.Model) -> None:
    done = stories.generate("Once", stop="<s>", temperature=0, logit_bias={1: 1e9}, max_tokens=5)
    assert (done.finish_reason, done.text) == ("stop", "")


def test_a_closed_model_says_so(stories260k: Path) -> None:
    with tinyllm.load(stories260k, device="reference") as m:
        m.close()
        with pytest.raises(TinyLLMError, match="closed"):
            m.generate("Once")


def test_perplexity_equals_llama_cpp(stories260k: Path, data: Path) -> None:
    """llama.cpp gives 9.871934 on the same windows (float16 cache, logits of the second half)."""
    text = (data / "text" / "tinystories.txt").read_bytes()[:100_000].decode(errors="ignore")
    m = model(stories260k, "cpu")
    result = perplexity(m, m.tokenizer.encode(text, parse_special=False))
    assert (result.n_windows, result.n_scored) == (99, 99 * 255)
    assert abs(result.value / 9.871934 - 1) < 1e-3


def test_a_vocabulary_that_does_not_fit_is_refused(stories260k: Path, tmp_path: Path) -> None:
    with tinyllm.gguf.open(stories260k) as f:
        metadata = dict(f.metadata)
        tensors = {n: t.dequantize() for n, t in f.tensors.items()}
    embeddings = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = np.concatenate([embeddings, embeddings[:1]])
    tinyllm.gguf.write(tmp_path / "bad.gguf", metadata, tensors)
    with pytest.raises(tinyllm.errors.GGUFError, match=r"512 tokens.*513 rows"):
        tinyllm.load(tmp_path / "bad.gguf", device="reference")


def test_what_does_not_fit_into_memory_is_refused_with_sizes(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = tinyllm.load(stories260k, device="reference")
    with pytest.raises(DeviceError, match=r"n_ctx=1000000000 need .* GB; .* are free"):
        m.new_state(10**9)
    monkeypatch.setattr(type(m.network.be), "memory", lambda self: (10**6, 10**9))
    with pytest.raises(DeviceError, match=r"weights need 1\.\d MB; 1\.0 MB are free"):
        tinyllm.load(stories260k, device="reference")


def test_progress_counts_layers_as_they_are_loaded(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    seen: list[int] = []
    load_matrix = CPUBackend.load

    def counting(self: CPUBackend, source: Any, rows: Any = None) -> Any:
        names.append(source.name)
        return load_matrix(self, source, rows)

    def progress(layers: Any, total: int) -> Any:
        for layer in layers:
            seen.append(len(names))
            yield layer
        assert len(seen) == total

    monkeypatch.setattr(CPUBackend, "load", counting)
    monkeypatch.setattr(tinyllm.loading, "loading", progress)
    tinyllm.load(stories260k).close()
    assert len(seen) == len(set(seen)) > 1


def test_a_stream_may_be_closed_while_another_thread_reads_it() -> None:
    """As a server does when its client leaves: the reader gets the piece that was being written."""
    reading, going, got = threading.Event(), threading.Event(), []

    def tap(name: str, _: object) -> None:
        if name == "embd":
            reading.set()
            assert going.wait(60)

    with tinyllm.load(device="reference") as model:
        pieces = model.generate("Once", max_tokens=9, temperature=0, stream=True, tap=tap)
        reader = threading.Thread(target=lambda: got.append(next(pieces)))
        closer = threading.Thread(target=lambda: got.append(pieces.close()))
        reader.start()
        assert reading.wait(60)
        closer.start()
        closer.join(0.2)
        going.set()
        reader.join()
        closer.join()
        assert got == [" upon", None]
        assert list(pieces) == []


def test_a_closed_model_leaves_no_circles() -> None:
    """What the collector finds is what reference counting could not free."""
    with tinyllm.load() as warm:
        warm.generate("Once", max_tokens=2)
    gc.collect()
    gc.disable()
    try:
        model = tinyllm.load()
        model.generate("Once", max_tokens=2)
        watched = [weakref.ref(x) for x in (model.tokenizer, model.network, model.network.be)]
        model.close()
        del model
        assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()
