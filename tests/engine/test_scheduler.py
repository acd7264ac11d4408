"""Requests side by side: each text as it is alone, whatever comes, goes, fails or waits beside it."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from afresh import afresh

import tinyllm
from tinyllm import Completion, Engine, Model
from tinyllm.engine.deciding import shares
from tinyllm.engine.embedding import embed
from tinyllm.engine.generate import Run
from tinyllm.engine.pace import FIRST_ROWS, MIXED, SLOWER, Pace
from tinyllm.engine.request import Request
from tinyllm.engine.scheduler import ROOM
from tinyllm.errors import (
    ArgumentError,
    ContextOverflow,
    DeviceError,
    QueueFull,
    StateError,
    TinyLLMError,
)
from tinyllm.models.memory import cache_bytes

WORDS = "Once upon a time there was a little dog and a big red ball in the park with Lily".split()
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def m(stories260k: Path) -> Iterator[Model]:
    with tinyllm.load(stories260k) as model:
        yield model


def less_e(ids: list[int], logits: np.ndarray) -> None:
    logits[len(ids) % 50] -= 3


def requests(n: int) -> list[tuple[Any, dict[str, Any]]]:
    """Random requests: (prompt or messages, options)."""
    r, out = random.Random(1), []
    for i in range(n):
        text = " ".join(r.choices(WORDS, k=r.choice([2, 5, 40, 120])))
        options: dict[str, Any] = {
            "max_tokens": r.choice([0, 3, 20, 60]),
            "temperature": r.choice([0, 0.8, 1.2]),
            "seed": i,
        }
        for name, value in (
            ("logprobs", 2),
            ("echo", True),
            ("repeat_penalty", 1.3),
            ("frequency_penalty", 0.4),
            ("min_p", 0.05),
            ("logits_processor", less_e),
            ("stop", ["the", "."]),
        ):
            if r.random() < 0.25:
                options[name] = value
        prompt: Any = [{"role": "user", "content": text}] if r.random() < 0.3 else text
        if not isinstance(prompt, str):
            options["template"] = TEMPLATE
        out.append((prompt, options))
    return out


def alone(m: Model, prompt: Any, options: dict[str, Any]) -> Completion:
    return (m.generate if isinstance(prompt, str) else m.chat)(prompt, **options)


def written(c: Completion) -> tuple[object, ...]:
    """What must be equal to the bit."""
    return c.text, c.ids, c.logprobs, c.prompt_logprobs, c.finish_reason


def test_64_requests_from_threads_and_tasks_are_as_alone(m: Model) -> None:
    asked = requests(64)
    with afresh(m):
        expected = [alone(m, *a) for a in asked]
    each = cache_bytes(m.network.decoder.caches, 512, m.network.kv_type)
    got: dict[int, Request] = {}
    with Engine(m, max_bytes=3 * each, max_rows=24) as e:

        def thread(k: int) -> None:
            r = random.Random(k)
            for i in range(k, 48, 8):
                time.sleep(r.random() / 50)
                got[i] = e.submit(asked[i][0], **asked[i][1])
                if i % 3 == 0:
                    assert "".join(got[i]) == expected[i].text

        async def task(i: int) -> None:
            await asyncio.sleep(random.Random(i).random() / 10)
            got[i] = r = e.submit(asked[i][0], **asked[i][1])
            if i % 2:
                assert "".join([piece async for piece in r]) == expected[i].text
            assert written(await r) == written(expected[i])

        async def tasks() -> None:
            await asyncio.gather(*(task(i) for i in range(48, 64)))

        endless = [e.submit("Once", max_tokens=-1, overflow="shift", seed=i) for i in range(2)]
        late = [e.submit("Once", max_tokens=400, seed=5, deadline=d) for d in (0, 0.05)]
        threads = [threading.Thread(target=thread, args=(k,)) for k in range(8)]
        for t in threads:
            t.start()
        endless[0].cancel()
        next(iter(endless[1]))
        endless[1].cancel()
        asyncio.run(tasks())
        for t in threads:
            t.join()
        for i, c in enumerate(expected):
            assert written(got[i].result(20)) == written(c), i
        assert [r.result().finish_reason for r in endless] == ["cancelled"] * 2
        assert late[0].result().finish_reason == "deadline"
        whole = m.generate("Once", max_tokens=400, seed=5).text
        assert whole.startswith(late[1].result().text)


@pytest.mark.parametrize("options", [{}, {"logprobs": 3, "echo": True, "repeat_penalty": 1.2}])
def test_a_request_that_is_set_aside_goes_on_with_the_same_bits(
    m: Model, options: dict[str, Any]
) -> None:
    options = {"max_tokens": 60, "temperature": 0.9, **options}
    prompts = [" ".join(WORDS[i:] * 8) for i in range(4)]
    with afresh(m):
        expected = [m.generate(p, seed=i, **options) for i, p in enumerate(prompts)]
    with Engine(m, max_rows=16) as e:
        whole = e.max_bytes
        rs = [e.submit(p, seed=i, **options) for i, p in enumerate(prompts)]
        for _ in range(6):
            e.max_bytes = 1
            time.sleep(0.01)
            e.max_bytes = whole
            time.sleep(0.01)
        for r, c in zip(rs, expected, strict=True):
            assert written(r.result(20)) == written(c)


def test_setting_aside_frees_the_state_and_reads_it_again(m: Model) -> None:
    options = {"max_tokens": 200, "temperature": 0.0, "logprobs": 1}
    with afresh(m):
        expected = [m.generate(p, **options) for p in WORDS[:3]]
    counts: list[int] = []

    def fewer(ids: list[int], logits: np.ndarray) -> None:
        counts.append(len(e._running))
        if len(ids) == 40:
            e.max_bytes = 1
        if len(ids) == 80:
            e.max_bytes = 1 << 40

    first = m.generate(WORDS[4], logits_processor=less_nothing, **options)
    with Engine(m) as e:
        r0 = e.submit(WORDS[4], logits_processor=fewer, **options)
        rs = [e.submit(p, **options) for p in WORDS[:3]]
        assert written(r0.result(20)) == written(first)
        assert [written(r.result(20)) for r in rs] == [written(c) for c in expected]
    assert 1 in counts[30:80]
    assert max(counts) > 1


def test_what_was_set_aside_is_found_again_rather_than_read(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, found = Run.resume, []

    def resumed(run: Run, state: Any, ids: list[int]) -> None:
        found.append((state.n_past, len(ids)))
        resume(run, state, ids)

    def fewer(ids: list[int], logits: np.ndarray) -> None:
        e.max_bytes = 1 if 100 <= len(ids) < 110 else 1 << 40

    monkeypatch.setattr(Run, "resume", resumed)
    options = {"max_tokens": 150, "temperature": 0.9, "logprobs": 1}
    with afresh(m):
        expected = [m.generate(w, seed=1, **options) for w in WORDS[:3]]  # type: ignore[arg-type]
    with Engine(m) as e:
        rs = [e.submit(w, seed=1, **options) for w in WORDS[:2]]
        rs.append(e.submit(WORDS[2], seed=1, logits_processor=fewer, **options))
        assert [written(r.result(20)) for r in rs] == [written(c) for c in expected]
    assert found
    assert all(n > 90 and rest == 1 for n, rest in found)


def test_a_request_takes_memory_as_it_writes(m: Model) -> None:
    caches, kv = m.network.decoder.caches, m.network.kv_type
    together: list[int] = []

    def counted(ids: list[int], logits: np.ndarray) -> None:
        together.append(len(e._running))

    with Engine(m, max_bytes=4 * cache_bytes(caches, 1 + ROOM, kv)) as e:
        options: Any = {"logits_processor": counted, "overflow": "shift", "temperature": 0}
        rs = [e.submit([5], max_tokens=20, **options) for _ in range(4)]
        for r in rs:
            r.result(20)
    assert max(together) == 4


def test_memory_is_asked_for_what_guesses_take_and_what_a_state_will(m: Model) -> None:
    caches, kv, gate = m.network.decoder.caches, m.network.kv_type, threading.Event()
    state, room = m.new_state(1024), cache_bytes(caches, min(1 + ROOM, m.n_ctx), kv)
    together: list[int] = []

    def counted(ids: list[int], logits: np.ndarray) -> None:
        gate.wait(300)
        together.append(len(e._running))

    for options, most in (({}, 4), ({"speculate": "lookup"}, 4), ({"speculate": m}, 1)):
        gate.clear()
        together.clear()
        with Engine(m, max_bytes=room * 7 // 4, prefix_bytes=0) as e:
            fields: Any = {"logits_processor": counted, "temperature": 0, "overflow": "shift"}
            rs = [e.submit([5], max_tokens=5, **fields, **options) for _ in range(4)]
            gate.set()
            for r in rs:
                r.result(300)
        assert max(together) == most
    with Engine(m) as e:
        e.submit("Once", state=state, max_tokens=3).result()
        held = e.submit([5], state=state, max_tokens=3)
        held.result()
        expected = cache_bytes(caches, len(state.ids) + 1 + ROOM, kv)
        assert e._needs(held) == max(expected, state.nbytes)


def less_nothing(ids: list[int], logits: np.ndarray) -> None:
    """A processor that changes nothing."""


def test_an_error_in_a_processor_ends_that_request_alone(m: Model) -> None:
    def bad(ids: list[int], logits: np.ndarray) -> None:
        if len(ids) > 10:
            raise ZeroDivisionError("mine")

    with Engine(m) as e:
        r = e.submit("Once upon a time", logits_processor=bad, seed=1)
        other = e.submit("The dog", max_tokens=50, seed=2)
        with pytest.raises(ZeroDivisionError, match="mine"):
            r.result()
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(r)
        assert r.done
        assert written(other.result()) == written(m.generate("The dog", max_tokens=50, seed=2))


def test_a_failed_step_is_the_error_of_its_requests_and_the_engine_goes_on(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, fail = m.network.forward, [True]

    def once(*args: Any) -> Any:
        if fail and fail.pop():
            raise OSError("the device is gone")
        return forward(*args)

    monkeypatch.setattr(m.network, "forward", once)
    with Engine(m) as e:
        with pytest.raises(OSError, match="gone"):
            e.submit("Once", seed=1).result()
        assert e.submit("Once", max_tokens=4, seed=1).result().ids


def test_memory_that_runs_out_in_a_step_sets_a_request_aside(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, failures = m.network.forward, []

    def scarce(segments: Any, *args: Any) -> Any:
        if len(segments) > 2:
            failures.append(len(segments))
            for s, _, _ in segments:
                s.spoil()
            raise tinyllm.errors.DeviceError("no memory")
        return forward(segments, *args)

    with afresh(m):
        expected = [m.generate(w, max_tokens=40, seed=3) for w in WORDS[:5]]
    monkeypatch.setattr(m.network, "forward", scarce)
    with Engine(m) as e:
        rs = [e.submit(w, max_tokens=40, seed=3) for w in WORDS[:5]]
        assert [r.result(20).ids for r in rs] == [c.ids for c in expected]
    assert failures


def test_a_full_queue_refuses_and_close_ends_all(m: Model) -> None:
    gate = threading.Event()

    def waits(ids: list[int], logits: np.ndarray) -> None:
        gate.wait(10)

    with Engine(m, max_rows=1, max_queue=2) as e:
        running = e.submit("Once", logits_processor=waits, max_tokens=-1, overflow="shift")
        while not e._running:
            time.sleep(0.001)
        waiting = [e.submit("Once", logprobs=1), e.submit("Once")]
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            e.submit("Once")
        with pytest.raises(TimeoutError):
            waiting[0].result(0.01)
        assert not waiting[0].done
        threading.Timer(0.05, gate.set).start()
    assert [r.result().finish_reason for r in (running, *waiting)] == ["cancelled"] * 3
    assert waiting[0].result().logprobs == []
    assert not e._thread.is_alive()
    with pytest.raises(TinyLLMError, match="closed"):
        e.submit("Once")


def test_usage_counts_tokens(m: Model) -> None:
    with Engine(m) as e:
        r = e.submit([1, 2, 3], max_tokens=5, temperature=0)
        r.result()
    assert (r.usage.prompt_tokens, r.usage.completion_tokens, r.usage.cached_tokens) == (3, 5, 0)


def test_usage_counts_reasoning_and_the_time_to_the_first_token(m: Model) -> None:
    asked: Any = [{"role": "user", "content": "Once"}]
    options: Any = {"max_tokens": 40, "temperature": 0, "template": TEMPLATE + "<think>\n"}
    with Engine(m) as e:
        begun = time.monotonic()
        r = e.submit(asked, regex="(no+t )sure\n</think>\n\nYes( yes)+", **options)
        message = r.result().message
        assert 0 < r.usage.first_token_s < time.monotonic() - begun  # type: ignore[operator]
        assert message is not None
        assert message["reasoning"].endswith("t sure")
        assert message["content"].startswith("Yes")
        n = len(m.tokenizer.encode(message["reasoning"], add_special=False))
        assert n <= r.usage.reasoning_tokens < r.usage.completion_tokens
        open_ended = e.submit(asked, **options)
        open_ended.result()
        assert open_ended.usage.reasoning_tokens == open_ended.usage.completion_tokens
        plain = e.submit("Once", max_tokens=3)
        plain.result()
        assert plain.usage.reasoning_tokens == 0


def test_a_state_serves_one_request_at_a_time(m: Model, tmp_path: Path) -> None:
    state, gate = m.new_state(256), threading.Event()
    with Engine(m) as e:
        r = e.submit(
            "Once", state=state, max_tokens=2, logits_processor=lambda i, x: gate.wait(10) and None
        )
        with pytest.raises(StateError, match="in use"):
            e.submit("x", state=state)
        for _ in range(2):  # while it may be waiting, and while it is written
            for use in (
                lambda: m.generate("x", state=state),
                lambda: m.logits([5], state),
                lambda: state.reuse([5, 6]),
                lambda: state.truncate(0),
                lambda: state.append([5]),
                lambda: state.shift(0, 1),
                lambda: state.restore(tmp_path / "saved.npz"),
            ):
                with pytest.raises(StateError, match="in use"):
                    use()
            while r.job is None:
                time.sleep(0.001)
        gate.set()
        r.result()
    state.truncate(1)
    state.append([5])
    assert m.generate("x", state=state, max_tokens=2).ids


def test_a_request_that_no_queue_takes_leaves_its_state_free(m: Model) -> None:
    state, gate = m.new_state(256), threading.Event()
    with Engine(m, max_queue=1, max_texts=1) as e:
        first = e.submit("x", max_tokens=2, logits_processor=lambda i, x: gate.wait(300) and None)
        while e._waiting or first.job is None:
            time.sleep(0.001)
        e.submit("y", max_tokens=1)
        with pytest.raises(QueueFull) as told:
            e.submit("z", state=state)
        state.append([5])
        gate.set()
    with pytest.raises(TinyLLMError, match="closed"):
        e.submit("z", state=state)
    state.append([5])
    assert told


def test_a_text_that_has_a_state_keeps_it_until_it_ends(m: Model) -> None:
    expected, state = m.generate("Once", seed=1, max_tokens=20).text, m.new_state(256)
    stream = m.generate("Once", seed=1, max_tokens=20, stream=True, state=state)
    first = next(stream)
    with pytest.raises(StateError, match="let that end, close it, or use a fork"):
        m.generate(" more", state=state)
    with Engine(m) as e, pytest.raises(StateError, match="in use"):
        e.submit(" more", state=state).result(20)
    assert m.generate(" more", state=state.fork(), max_tokens=3).ids
    assert first + "".join(stream) == expected
    for piece in m.generate(" more", state=state, stream=True):
        assert piece
        break
    unbegun = m.generate(" more", state=state, stream=True, max_tokens=3)
    unbegun.close()
    with pytest.raises(ZeroDivisionError) as kept:  # its frames hold what the call made
        m.generate(" more", state=state, logits_processor=divides)
    assert m.generate(" more", state=state, max_tokens=3).ids
    assert kept.tb is not None


def test_threads_that_use_one_state_at_once_are_told(m: Model) -> None:
    state, together = m.new_state(512), threading.Barrier(4)
    outcomes: list[object] = []

    def writes() -> None:
        together.wait()
        try:
            outcomes.append(m.generate("Once", seed=1, max_tokens=50, state=state).text)
        except StateError as e:
            outcomes.append(e)

    threads = [threading.Thread(target=writes) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    texts = [t for t in outcomes if isinstance(t, str)]
    assert texts[0] == m.generate("Once", seed=1, max_tokens=50).text
    assert len(state.ids) >= 50 * len(texts)  # who came later read behind it


def divides(ids: list[int], logits: np.ndarray) -> None:
    """A processor with an error."""
    raise ZeroDivisionError


def test_a_state_continues_a_conversation(m: Model) -> None:
    here, there = m.new_state(256), m.new_state(256)
    with Engine(m) as e:
        for text in ("Once upon a time", " Then"):
            options = {"max_tokens": 30, "seed": 4}
            expected = m.generate(text, state=there, **options)
            r = e.submit(text, state=here, **options)
            assert written(r.result()) == written(expected)
            assert here.ids == there.ids
    assert here.n_past == there.n_past


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tap": print}, ArgumentError, "use Model.generate"),
        ({"stream": True}, ArgumentError, "iterate"),
        ({"deadline": -1}, ArgumentError, "seconds"),
        ({"temperature": -1}, ArgumentError, "temperature"),
        ({"prompt": ["a", "b"]}, ArgumentError, "each by itself"),
        ({"prompt": [1] * 9999}, ContextOverflow, "9999"),
        ({"prompt": [1 << 20]}, ArgumentError, "token ids"),
        ({"logit_bias": {99999: 1.0}}, ArgumentError, "99999"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(
    m: Model, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with Engine(m) as e, pytest.raises(error, match=words):
        e.submit(**{"prompt": "Once", **options}).result()


@pytest.mark.parametrize("name", ["max_rows", "max_bytes", "max_queue"])
def test_limits_are_whole_numbers(m: Model, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        Engine(m, **{name: 0})


def test_prompts_are_read_in_few_rows_beside_texts(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[tuple[bool, int]]] = []
    note = Pace.note

    def noted(self: Any, work: list[tuple[Run, int]], seconds: float) -> None:
        rows.append([(run.n_generated > 1, n) for run, n in work])
        note(self, work, 0.001 + 0.0001 * sum(n for _, n in work if n > 1))

    monkeypatch.setattr(Pace, "note", noted)
    with Engine(m) as e:
        texts = [
            e.submit("Once", max_tokens=300, seed=i, logit_bias={2: -np.inf}) for i in range(4)
        ]
        for _ in range(20):
            next(iter(texts[-1]))
        long = e.submit([5] * 400, max_tokens=100)
        for r in (*texts, long):
            r.result(20)
    mixed = [s for s in rows if any(w for w, _ in s) and any(n > 1 for _, n in s)]
    assert len(mixed) > 20
    assert max(n for s in mixed for w, n in s if not w) <= (SLOWER - 1) / 0.1


def timed(pace: Pace, n: int, seconds: float) -> None:
    """Note a step of a text and n rows of a prompt."""
    text, prompt = Run.__new__(Run), Run.__new__(Run)
    text.reading, prompt.reading = False, True
    text.n_drafted = prompt.n_drafted = 0
    pace.note([(text, 1), (prompt, n)] if n else [(text, 1)], seconds)


def test_what_each_row_adds_is_told_apart_from_what_any_number_adds() -> None:
    pace = Pace()
    timed(pace, 0, 0.010)
    for i in range(200):
        n = (2, 3, 4)[i % 3]
        timed(pace, n, 0.010 + 0.008 + 0.0005 * n)
    assert pace.reading.of(20) == pytest.approx(0.018, rel=0.1)


def read_beside(pace: Pace, step: float, row: float, fixed: float, slow: float) -> list[float]:
    """Seconds of 2,000 steps of these costs; two of a hundred take ``slow`` times as long."""
    chance, seconds = random.Random(1), []
    for _ in range(2000):
        n = pace.rows()
        usual = step + (fixed + row * n if n else 0)
        seconds.append(usual * (slow if chance.random() < 0.02 else chance.uniform(1, 1.05)))
        timed(pace, n, seconds[-1])
    return seconds


@pytest.mark.parametrize("slow", [1.0, 1.3])
@pytest.mark.parametrize("fixed", [0.0, 0.005])
@pytest.mark.parametrize("row", [0.0002, 0.001, 0.004])
def test_rows_beside_texts_keep_steps_within_what_is_allowed(
    row: float, fixed: float, slow: float
) -> None:
    pace = Pace()
    assert pace.rows() == FIRST_ROWS
    timed(pace, 0, 0.5)  # what is done once does not count for long
    for _ in range(20):
        timed(pace, 0, 0.010)
    assert pace.writing.seconds < 0.012
    seconds = sorted(read_beside(pace, 0.010, row, fixed, slow)[200:])
    assert seconds[int(0.99 * len(seconds))] < 3 * 0.010
    assert seconds[len(seconds) // 2] > 0.017  # and prompts are read as fast as that allows


def test_prompts_are_read_where_other_work_makes_every_step_late() -> None:
    pace = Pace()
    for i in range(400):
        timed(pace, 0, 0.010 if i % 8 else 0.060)
    assert pace.late > SLOWER
    for n in (8, *[3] * 10):
        timed(pace, n, 0.010 + 0.001 * n)
    assert pace.rows() >= 4


def test_now_and_then_a_step_only_writes() -> None:
    pace = Pace()
    timed(pace, 0, 0.010)
    for i in range(MIXED):
        assert pace.rows(), i
        timed(pace, 8, 0.02)
    assert pace.rows() == 0
    timed(pace, 0, 0.010)
    assert pace.rows()


@pytest.mark.parametrize("prefix_bytes", [1 << 28, 0])
def test_requests_that_share_a_beginning_wait_until_one_has_read_it(
    m: Model, prefix_bytes: int
) -> None:
    r = random.Random(0)
    shared = [r.randrange(3, 300) for _ in range(200)]
    prompts = [shared + [r.randrange(3, 300) for _ in range(5)] for _ in range(6)]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.9, "logprobs": 2, "seed": 3}
    with afresh(m):
        expected = [m.generate(p, **options) for p in prompts]
    gate = threading.Event()

    def waits(ids: list[int], logits: np.ndarray) -> None:
        gate.wait(10)

    with Engine(m, prefix_bytes=prefix_bytes) as e:
        first = e.submit([5, 6, 7], max_tokens=1, logits_processor=waits)
        rs = [e.submit(p, **options) for p in prompts]
        gate.set()
        assert [written(x.result(20)) for x in (*rs,)] == [written(c) for c in expected]
        first.result(20)
        cached = [x.usage.cached_tokens for x in rs]
    assert cached == [0] + [200 if prefix_bytes else 0] * 5


def test_an_engine_is_a_public_name() -> None:
    assert tinyllm.Engine is Engine


def test_a_refused_request_leaves_the_state_to_the_one_that_waits(m: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "template": TEMPLATE}

    def written_with(other: bool) -> tuple[object, ...]:
        state = m.new_state(256)
        m.generate("Once upon a time", state=state, max_tokens=5, temperature=0)
        told = [{"role": "user", "content": m.tokenizer.decode(state.ids) + " and"}]
        with Engine(m, max_texts=1) as e:
            e.submit("Lily", max_tokens=100, temperature=0)
            r = e.submit(told, state=state, **options)
            if other:
                with pytest.raises(StateError, match="in use"):
                    e.submit([{"role": "user", "content": "Lily"}], state=state, **options)
            return written(r.result(20)), tuple(state.ids)

    assert written_with(True) == written_with(False)


def test_a_state_that_cannot_go_on_is_refused_and_ends_no_other_text(
    m: Model, stories260k: Path
) -> None:
    with tinyllm.load(stories260k) as other, Engine(m) as e:
        r = e.submit("Once upon a time", max_tokens=100, temperature=0)
        with pytest.raises(StateError, match="another model"):
            e.submit("Lily", max_tokens=3, state=other.new_state(64))
        assert r.result(20).finish_reason == "length"


def test_an_engine_that_is_closed_lets_go_of_states(m: Model) -> None:
    state = m.new_state(512)
    with Engine(m) as e:
        r = e.submit("Once", max_tokens=400, state=state)
        next(iter(r))
    assert r.result().finish_reason == "cancelled"
    assert m.generate(" Lily", state=state, max_tokens=2).ids


def test_a_text_that_no_memory_keeps_is_set_aside_all_the_same(
    m: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork_first(state: Any, n: int, n_ctx: int) -> None:
        raise DeviceError("no memory")

    def fewer(ids: list[int], logits: np.ndarray) -> None:
        e.max_bytes = 1 if 20 <= len(ids) < 25 else 1 << 40

    options: Any = {"max_tokens": 40, "temperature": 0}
    expected = [m.generate(w, **options) for w in WORDS[:3]]
    monkeypatch.setattr(type(m.new_state(8)), "fork_first", fork_first)
    with Engine(m) as e:
        rs = [e.submit(WORDS[0], logits_processor=fewer, **options)]
        rs += [e.submit(w, **options) for w in WORDS[1:3]]
        assert [written(r.result(20)) for r in rs] == [written(c) for c in expected]


def test_contexts_that_rotate_otherwise_change_no_text(data: Path) -> None:
    """LongRoPE turns contexts beyond the original length, here 16, by another table."""
    with tinyllm.load(data / "golden" / "models" / "phi3-longrope-long.gguf", "cpu") as m:
        prompts = [[5, 9, 12, 3, 7, 20, 31], [4, 5, 6] * 10, [8, 9]]
        options: Any = {"max_tokens": 8, "temperature": 0, "logprobs": 1}
        expected = [m.generate(p, **options) for p in prompts]
        together = m.generate(prompts, **options)
        assert [written(c) for c in together] == [written(c) for c in expected]
        with Engine(m) as e:
            rs = [e.submit(p, **options) for p in prompts]
            assert [written(r.result(20)) for r in rs] == [written(c) for c in expected]


def test_decisions_rotate_what_is_read_once_as_what_follows(data: Path) -> None:
    with tinyllm.load(data / "golden" / "models" / "phi3-longrope-long.gguf", "cpu") as m:
        text = [4, 5, 6, 7] * 5
        state = m.network.new_state(len(text))
        p = np.exp(m.logits(text, state=state)[-1].astype(np.float64))
        (found,), *_ = shares(m.network, [text], [[[1], [2]]], 64, m.prefixes)
        np.testing.assert_allclose(found, p[[1, 2]] / p[[1, 2]].sum(), rtol=1e-5)
        # the beginning has 10 tokens, and a context of its own would rotate by the other table
        (found, _), *_ = shares(
            m.network, [text, text[:10] + [9] * 9], [[[1], [2]]] * 2, 64, m.prefixes
        )
        np.testing.assert_allclose(found, p[[1, 2]] / p[[1, 2]].sum(), rtol=1e-4)


def test_embeddings_and_activations_rotate_as_they_do_alone(data: Path) -> None:
    texts = [[5, 9, 12, 3, 7, 20, 31], [4, 5, 6] * 10, [8, 9]]
    with tinyllm.load(data / "golden" / "models" / "phi3-longrope-long.gguf", "cpu") as m:
        for ids, x in zip(texts, embed(m.network, texts, "mean", True), strict=True):
            assert np.array_equal(x, embed(m.network, [ids], "mean", True)[0])
        for ids, kept in zip(texts, m.run_with_cache(texts, ["out"]), strict=True):
            alone = m.run_with_cache(ids, ["out"])
            assert np.array_equal(kept["blk.1.out"], alone["blk.1.out"])
