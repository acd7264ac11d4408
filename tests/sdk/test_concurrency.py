"""Many threads, one model: nothing crashes, nothing mixes, what is abandoned stops."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllm.sdk import Embed4All, GPT4All

N_THREADS, N_CALLS = 8, 50
GREEDY: dict[str, Any] = {"max_tokens": 6, "temp": 0}
PROMPTS = [
    "Once upon a time",
    "The dog",
    "She went",
    "One day",
    "Lily",
    "A cat",
    "They saw",
    "He was",
]
STORY = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"


@pytest.fixture
def model(models: Path) -> Iterator[GPT4All]:
    """A model that a test may close."""
    with GPT4All(
        "stories260K", model_path=models, allow_download=False, private_sessions=True
    ) as model:
        yield model


def in_threads(work: Callable[[int], None], n: int = N_THREADS) -> None:
    """Run `work(i)` in n threads; raise the first error of any."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_generate_stream_and_embed_from_many_threads(model: GPT4All, embedder: Embed4All) -> None:
    texts = {p: model.generate(p, **GREEDY) for p in PROMPTS}
    vectors = {p: embedder.embed(p) for p in PROMPTS[:2]}

    def work(i: int) -> None:
        prompt = PROMPTS[i]
        for n in range(N_CALLS):
            kind = (i + n) % 5
            if kind < 2:
                assert model.generate(prompt, **GREEDY) == texts[prompt]
            elif kind == 2:
                assert "".join(model.generate(prompt, streaming=True, **GREEDY)) == texts[prompt]
            elif kind == 3:
                stream = model.generate(prompt, streaming=True, **GREEDY)
                assert texts[prompt].startswith(next(stream))
                del stream
            elif n % 10 < 5:
                assert embedder.embed(PROMPTS[i % 2]) == vectors[PROMPTS[i % 2]]
            else:
                with model.chat_session(chat_template=STORY):
                    model.generate(prompt, **GREEDY)
                    assert [m["content"] for m in model.current_chat_session][:1] == [prompt]

    in_threads(work)


def test_an_abandoned_stream_stops_at_once(model: GPT4All, monkeypatch: pytest.MonkeyPatch) -> None:
    net, steps = model.model.model.network, []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda *a: steps.append(1) or forward(*a))
    for leave in (lambda stream: stream.close(), lambda stream: None):
        stream = model.generate("Once upon a time", streaming=True, max_tokens=500)
        next(stream)
        before = len(steps)
        leave(stream)
        del stream
        gc.collect()
        assert len(steps) == before
    assert threading.active_count() < 50


def test_closing_in_the_middle_ends_every_answer(model: GPT4All) -> None:
    started, messages = threading.Barrier(N_THREADS + 1), []

    def work(i: int) -> None:
        stream = model.generate(PROMPTS[i], streaming=True, max_tokens=100_000, repeat_penalty=1.0)
        next(stream)
        started.wait(60)
        with pytest.raises(ValueError, match="closed LLModel") as caught:
            list(stream)
        messages.append(str(caught.value))

    closing = threading.Thread(target=lambda: (started.wait(60), model.close()))
    closing.start()
    in_threads(work)
    closing.join(60)
    assert messages == ["Attempted operation on a closed LLModel"] * N_THREADS


def test_close_and_generate_race_without_a_crash(models: Path) -> None:
    for _ in range(3):
        model = GPT4All("stories260K", model_path=models, allow_download=False)

        def work(i: int, model: GPT4All = model) -> None:
            if i == 0:
                model.close()
                return
            try:
                while True:
                    model.generate(PROMPTS[i], **GREEDY)
            except ValueError as error:
                assert str(error) == "Attempted operation on a closed LLModel"  # noqa: PT017

        in_threads(work, 4)


def test_ten_thousand_embeddings_leave_memory_as_it_was(embedder: Embed4All) -> None:
    resource = pytest.importorskip("resource")

    def peak() -> int:
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    batches = [[str(i) for i in range(start, start + 100)] for start in range(0, 10_000, 100)]
    for _ in range(2):
        embedder.embed(batches[-1])
    before = peak()
    for batch in batches:
        embedder.embed(batch)
    assert peak() - before < 20 * 1024  # kilobytes
