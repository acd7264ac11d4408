"""Who is inside of a chat session: threads, executors, asyncio tasks, handlers that stream."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import importlib.util
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tinyllm.sdk import GPT4All
from tinyllm.sdk.session import _places

STORY = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temp": 0}
ONE, TWO = "Once upon a time", "Then the dog"
OVERTAKEN = "ended by a later message of its chat session"


@pytest.fixture
def model(models: Path) -> Iterator[GPT4All]:
    with GPT4All("stories260K", model_path=models, allow_download=False) as model:
        yield model


@pytest.fixture
def private(models: Path) -> Iterator[GPT4All]:
    with GPT4All(
        "stories260K", model_path=models, allow_download=False, private_sessions=True
    ) as model:
        yield model


@pytest.fixture(scope="module")
def turns(llm: GPT4All) -> list[str]:
    """The answers to ONE and then TWO, in a session of one thread."""
    with llm.chat_session(chat_template=STORY):
        return [llm.generate(ONE, **GREEDY), llm.generate(TWO, **GREEDY)]


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a thread of its own, or what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def contents(model: GPT4All) -> list[str]:
    return [m["content"] for m in model.current_chat_session or []]


# ---- one session a model, seen from every thread


def asks_in_a_thread(model: GPT4All, text: str) -> str:
    return in_thread(lambda: model.generate(text, **GREEDY))


def asks_in_an_executor_of_asyncio(model: GPT4All, text: str) -> str:
    async def ask() -> str:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: model.generate(text, **GREEDY))

    return asyncio.run(ask())


def asks_by_to_thread(model: GPT4All, text: str) -> str:
    return asyncio.run(asyncio.to_thread(model.generate, text, **GREEDY))


def asks_in_a_child_task(model: GPT4All, text: str) -> str:
    async def ask() -> str:
        return model.generate(text, **GREEDY)

    async def main() -> str:
        return await asyncio.create_task(ask())

    return asyncio.run(main())


def streams_in_a_thread(model: GPT4All, text: str) -> str:
    return in_thread(lambda: "".join(model.generate(text, streaming=True, **GREEDY)))


def streams_piece_by_piece_in_an_executor(model: GPT4All, text: str) -> str:
    stream = model.generate(text, streaming=True, **GREEDY)
    pieces = []
    with ThreadPoolExecutor(3) as pool:
        while (piece := pool.submit(next, stream, None).result(60)) is not None:
            pieces.append(piece)
    return "".join(pieces)


WAYS = [
    asks_in_a_thread,
    asks_in_an_executor_of_asyncio,
    asks_by_to_thread,
    asks_in_a_child_task,
    streams_in_a_thread,
    streams_piece_by_piece_in_an_executor,
]


@pytest.mark.parametrize("ask", WAYS, ids=lambda way: way.__name__)
def test_a_session_is_seen_wherever_the_question_is_asked(
    ask: Callable[[GPT4All, str], str], model: GPT4All, turns: list[str]
) -> None:
    with model.chat_session(chat_template=STORY):
        assert [ask(model, ONE), ask(model, TWO)] == turns
        assert contents(model) == [ONE, turns[0], TWO, turns[1]]
    assert model.current_chat_session is None


def test_a_session_that_a_loader_thread_opens_is_used_elsewhere(
    models: Path, turns: list[str]
) -> None:
    class Bot:
        """Opens a session when it is made, for as long as the program lives."""

        def __init__(self) -> None:
            self.model = GPT4All("stories260K", model_path=models, allow_download=False)
            self.session = self.model.chat_session(chat_template=STORY)
            self.session.__enter__()

    bot = in_thread(Bot)
    with bot.model:
        assert bot.model.generate(ONE, **GREEDY) == turns[0]
        assert asks_in_a_thread(bot.model, TWO) == turns[1]
        bot.session.__exit__(None, None, None)
        assert bot.model.current_chat_session is None
        assert in_thread(lambda: bot.model.current_chat_session) is None


def test_workers_of_one_session_answer_one_after_the_other(model: GPT4All) -> None:
    questions = [f"{ONE} {i}" for i in range(6)]
    with model.chat_session(chat_template=STORY), ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda q: model.generate(q, **GREEDY), questions))
        history = model.current_chat_session
        assert [m["role"] for m in history] == ["user", "assistant"] * 6
        pairs = zip(history[::2], history[1::2], strict=True)
        said = {question["content"]: answer["content"] for question, answer in pairs}
        assert said == dict(zip(questions, answers, strict=True))


def test_history_is_assigned_and_saved_from_another_thread(model: GPT4All, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with model.chat_session(chat_template=STORY):
        model.generate(ONE, **GREEDY)
        in_thread(lambda: model.save_session(path))
        in_thread(lambda: setattr(model, "current_chat_session", []))
        assert contents(model) == []
        in_thread(lambda: model.load_session(path))
        assert contents(model)[0] == ONE


# ---- apart where several are open


def test_asyncio_tasks_are_apart_and_end_in_any_order(model: GPT4All, turns: list[str]) -> None:
    async def converse(
        entered: asyncio.Event, may_leave: asyncio.Event, left: asyncio.Event
    ) -> tuple[Any, ...]:
        with model.chat_session(chat_template=STORY):
            entered.set()
            first = model.generate(ONE, **GREEDY)
            await may_leave.wait()
            second = await asyncio.to_thread(model.generate, TWO, **GREEDY)
            n = len(contents(model))
        left.set()
        return first, second, n, model.current_chat_session, model.generate(ONE, **GREEDY)

    async def main() -> list[Any]:
        events = [asyncio.Event() for _ in range(4)]
        one = asyncio.create_task(converse(events[0], events[1], events[2]))
        await events[0].wait()
        two = asyncio.create_task(converse(events[1], events[2], events[3]))
        return list(await asyncio.gather(one, two))

    plain = model.generate(ONE, **GREEDY)
    assert asyncio.run(main()) == [(*turns, 4, None, plain)] * 2
    assert model.current_chat_session is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_exactly_the_session_that_ends_is_ended(order: tuple[int, ...], model: GPT4All) -> None:
    plain = model.generate(ONE, **GREEDY)
    sessions = [model.chat_session(f"system {i}", STORY) for i in range(3)]
    for session in sessions:
        session.__enter__()
    left = [0, 1, 2]
    for i in order:
        assert contents(model) == [f"system {left[-1]}"]
        sessions[i].__exit__(None, None, None)
        left.remove(i)
    assert model.current_chat_session is None
    assert model.generate(ONE, **GREEDY) == plain


def test_a_session_may_end_in_another_thread(model: GPT4All) -> None:
    plain = model.generate(ONE, **GREEDY)
    session = model.chat_session(chat_template=STORY)
    session.__enter__()
    in_thread(lambda: session.__exit__(None, None, None))
    assert model.current_chat_session is None
    assert model.generate(ONE, **GREEDY) == plain
    with ExitStack() as stack:  # one task of a framework begins it, another ends it
        contextvars.Context().run(stack.enter_context, model.chat_session(chat_template=STORY))
        assert model.current_chat_session == []
    assert model.current_chat_session is None


def test_a_session_left_by_an_error_is_ended(model: GPT4All) -> None:
    def fail() -> None:
        with model.chat_session(chat_template=STORY):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_thread(fail)
    assert model.current_chat_session is None


def test_a_session_that_is_ended_early_or_forgotten_is_ended_once(model: GPT4All) -> None:
    with model.chat_session("outer", STORY):
        with model.chat_session("inner", STORY):
            model._history = None  # how programs of the second version end one
            assert contents(model) == ["outer"]
        assert contents(model) == ["outer"]
        model.chat_session("forgotten", STORY).__enter__()
        gc.collect()
        assert contents(model) == ["outer"]
    assert model.current_chat_session is None


def test_nothing_is_kept_of_sessions_that_have_ended(models: Path) -> None:
    with GPT4All("stories260K", model_path=models, allow_download=False) as model:
        with model.chat_session("a", STORY), model.chat_session("b", STORY):
            assert model._sessions._number in _places.get()
        assert model._sessions._number not in _places.get()


def test_of_several_sessions_a_thread_has_to_say_which(model: GPT4All) -> None:
    def open_one() -> Any:
        session = model.chat_session(chat_template=STORY)
        session.__enter__()
        return session

    sessions = [in_thread(open_one), in_thread(open_one)]
    for use in (lambda: model.generate(ONE, **GREEDY), lambda: model.current_chat_session):
        with pytest.raises(RuntimeError, match="2 chat sessions of this model are open"):
            use()
    sessions.pop().__exit__(None, None, None)
    assert model.current_chat_session == []


def test_a_nested_session_stands_for_the_outer_one(model: GPT4All) -> None:
    with model.chat_session("outer", STORY), model.chat_session("inner", STORY):
        assert in_thread(lambda: contents(model)) == ["inner"]


def test_two_models_have_sessions_of_their_own(model: GPT4All, llm: GPT4All) -> None:
    with model.chat_session("one", STORY):
        assert llm.current_chat_session is None
        with llm.chat_session("two", STORY):
            assert (contents(model), contents(llm)) == (["one"], ["two"])


def test_private_sessions_are_seen_only_where_they_are_opened(private: GPT4All) -> None:
    plain = private.generate(ONE, **GREEDY)
    with private.chat_session("Sys", STORY):
        assert in_thread(lambda: private.current_chat_session) is None
        assert in_thread(lambda: private.generate(ONE, **GREEDY)) == plain
        assert asyncio.run(asyncio.to_thread(contents, private)) == ["Sys"]
        carried = contextvars.copy_context()
        assert in_thread(lambda: carried.run(contents, private)) == ["Sys"]
    assert private.current_chat_session is None


# ---- a stream owns its session


def test_a_stream_may_be_read_after_its_session(model: GPT4All, turns: list[str]) -> None:
    def ask(text: str) -> Any:
        with model.chat_session(chat_template=STORY):
            return model.generate(text, streaming=True, **GREEDY)

    assert "".join(ask(ONE)) == turns[0]
    assert model.current_chat_session is None
    with model.chat_session(chat_template=STORY):
        history = model.current_chat_session
        stream = model.generate(ONE, streaming=True, **GREEDY)
        begun = next(stream)
    assert begun + "".join(stream) == turns[0]
    assert [m["content"] for m in history] == [ONE, turns[0]]


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_closing_or_forgetting_a_stream_ends_the_work(
    leave: str, model: GPT4All, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, steps = model.model.model.network, []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda *a: steps.append(1) or forward(*a))
    with model.chat_session(chat_template=STORY):
        stream = model.generate(ONE, streaming=True, max_tokens=500)
        begun = next(stream)
        n = len(steps)
        if leave == "close":
            stream.close()
        del stream
        gc.collect()
        assert len(steps) == n
        assert contents(model) == [ONE, begun]


def test_two_streams_of_one_session_begun_one_after_the_other(
    model: GPT4All, turns: list[str]
) -> None:
    with model.chat_session(chat_template=STORY):
        streams = [model.generate(text, streaming=True, **GREEDY) for text in (ONE, TWO)]
        assert contents(model) == []
    assert ["".join(stream) for stream in streams] == turns


def test_of_two_streams_read_in_turns_the_first_says_that_it_has_ended(model: GPT4All) -> None:
    with model.chat_session(chat_template=STORY):
        one, two = (model.generate(text, streaming=True, **GREEDY) for text in (ONE, TWO))
        begun = next(one)
        next(two)
        with pytest.raises(RuntimeError, match=OVERTAKEN):
            list(one)
        list(two)
        assert contents(model)[:3] == [ONE, begun, TWO]


def test_a_stream_is_ended_by_a_message_of_another_thread(model: GPT4All) -> None:
    with model.chat_session(chat_template=STORY):
        stream = model.generate(ONE, streaming=True, **GREEDY)
        next(stream)
        asks_in_a_thread(model, TWO)
        with pytest.raises(RuntimeError, match=OVERTAKEN):
            next(stream)


# ---- web frameworks


class Chat:
    """What handlers share: a model, on which each holds a session of its own."""

    def __init__(self, model: GPT4All) -> None:
        self.model = model

    def pieces(self, text: str) -> Iterator[str]:
        with self.model.chat_session(chat_template=STORY):
            return self.model.generate(text, streaming=True, **GREEDY)


async def in_threadpool(stream: Iterator[str]) -> AsyncIterator[str]:
    """How Starlette reads a plain iterator: each piece in whichever thread is free."""
    while (piece := await asyncio.to_thread(next, stream, None)) is not None:
        yield piece


def test_handlers_that_stream_from_a_thread_pool(model: GPT4All, turns: list[str]) -> None:
    async def handle() -> str:
        pieces = await asyncio.to_thread(Chat(model).pieces, ONE)
        return "".join([piece async for piece in in_threadpool(pieces)])

    async def main() -> list[str]:
        return await asyncio.gather(*(handle() for _ in range(3)))

    assert asyncio.run(main()) == [turns[0]] * 3
    assert model.current_chat_session is None


def test_fastapi_streams_an_answer(model: GPT4All, turns: list[str]) -> None:
    for package in ("fastapi", "httpx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import httpx
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app, chat = FastAPI(), Chat(model)

    @app.get("/threads")
    def in_a_thread(q: str):
        return StreamingResponse(chat.pieces(q))

    @app.get("/tasks")
    async def in_a_task(q: str):
        return StreamingResponse(chat.pieces(q))

    async def main() -> list[str]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            urls = ["/threads", "/tasks"] * 2
            answers = await asyncio.gather(*(client.get(u, params={"q": ONE}) for u in urls))
        return [answer.text for answer in answers]

    assert asyncio.run(main()) == [turns[0]] * 4


def test_flask_streams_an_answer(model: GPT4All, turns: list[str]) -> None:
    if importlib.util.find_spec("flask") is None:
        pytest.skip("flask is not installed")
    import flask

    app, chat = flask.Flask(__name__), Chat(model)
    app.get("/<q>")(lambda q: flask.Response(chat.pieces(q)))
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda _: app.test_client().get(f"/{ONE}").text, range(3)))
    assert texts == [turns[0]] * 3


def test_a_server_reads_each_answer_in_a_thread_of_its_own(
    model: GPT4All, turns: list[str]
) -> None:
    found: list[str] = []
    with model.chat_session(chat_template=STORY):  # opened once, for all requests
        for text in (ONE, TWO):
            stream = model.generate(text, streaming=True, **GREEDY)
            thread = threading.Thread(target=lambda s=stream: found.append("".join(s)))
            thread.start()
            thread.join()
    assert found == turns
