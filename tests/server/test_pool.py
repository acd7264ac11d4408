"""Several models in one server: names, loading, letting go, shares of the memory."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

import tinyllm
from tinyllm.errors import ArgumentError
from tinyllm.loading import BUNDLED
from tinyllm.server import Settings
from tinyllm.server import pool as pools
from tinyllm.server.errors import Refusal

SIZE = os.stat(BUNDLED).st_size


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of a model."""
    found = [tmp_path / f"{name}.gguf" for name in "abc"]
    for path in found:
        shutil.copy(BUNDLED, path)
    return found


def loaded(app):
    return [served.name for served in app.app.pool if served.loaded]


def ask(app, name):
    return app.post("/v1/completions", {"model": name, "prompt": "One", "max_tokens": 1})


def test_a_model_has_several_names(app):
    for name in ("tales", "bundled.gguf", "bundled", "TALES", None):
        assert ask(app, name).json()["model"] == "tales"
    unknown = ask(app, "gpt")
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert app.get("/v1/models/bundled.gguf").json()["id"] == "tales"
    assert app.get("/v1/models/gpt").status_code == 404


def test_a_path_is_a_name_that_is_not_told(make_app, files):
    app = make_app([str(files[0]), files[1]])
    for name in (str(files[0]), "a.gguf", "a"):
        assert app.app.pool.find(name).name == "a"
    told = app.get("/v1/models").json()["data"]
    assert [m["meta"]["aliases"] for m in told] == [["a.gguf"], ["b.gguf"]]


def test_a_model_answers_to_the_name_that_gpt4all_shows(make_app, tmp_path):
    file = tmp_path / "Meta-Llama-3-8B-Instruct.Q4_0.gguf"
    shutil.copy(BUNDLED, file)
    app = make_app([file])
    for name in ("Llama 3 8B Instruct", file.name, file.stem):
        assert app.get(f"/v1/models/{name}").json()["id"] == file.stem
    body = {
        "model": "Llama 3 8B Instruct",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3, "seed": 1, "stop": ["x"], "logprobs": True, "frequency_penalty": 0.1,
    }  # fmt: skip
    answer = app.post("/v1/chat/completions", body).json()
    assert answer["id"] != "placeholder"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_longest_unused_model_is_let_go(make_app, files):
    app = make_app(files, memory=int(2.5 * SIZE))
    assert loaded(app) == []
    for name, expected in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
        answer = ask(app, name)
        assert answer.status_code == 200, answer.text
        assert "".join(loaded(app)) == expected
    states = {m["id"]: m["meta"]["state"] for m in app.get("/v1/models").json()["data"]}
    assert states == {"a": "unloaded", "b": "loaded", "c": "loaded"}


def test_a_model_in_use_is_not_let_go(make_app, files):
    app = make_app(files, memory=int(1.5 * SIZE))
    ask(app, "a")
    pool = app.app.pool
    held = app.loop.run_until_complete(pool.hold("a"))
    full = ask(app, "b")
    assert full.status_code == 503
    assert "in use" in full.json()["error"]["message"]
    assert "retry-after" in full.headers
    pool.release(held)
    assert ask(app, "b").status_code == 200
    assert loaded(app) == ["b"]


def test_models_share_what_is_free(make_app, files, monkeypatch):
    free = 1 << 30
    monkeypatch.setattr(pools, "available_bytes", lambda: free)
    monkeypatch.setattr("tinyllm.kernels.backend.system.available_bytes", lambda: free)
    app = make_app(files)
    for n, name in enumerate("abc", 1):
        ask(app, name)
        engines = [served.engine for served in app.app.pool if served.loaded]
        held = sum(e.nbytes for e in engines)
        assert len(engines) == n
        for engine in engines:
            assert engine.max_bytes == pytest.approx((free + held) / n / 2, rel=0.01)
            assert engine.prefix_bytes == pytest.approx((free + held) / n / 4, rel=0.01)
    limited = make_app(files, memory=3 * SIZE)
    ask(limited, "a")
    ask(limited, "b")
    assert [s.engine.max_bytes for s in limited.app.pool if s.loaded] == [SIZE // 4] * 2


def test_an_engine_forgets_what_it_may_no_longer_keep(model):
    with tinyllm.Engine(model) as engine:
        engine.submit("Once upon a time", max_tokens=20).result()
        engine.submit("One", max_tokens=1).result()
        assert engine.nbytes > 0
        engine.prefix_bytes = 0
        engine.submit("One", max_tokens=1).result()
        with engine._changed:
            assert engine._changed.wait_for(lambda: not engine._prefixes.nbytes, 60)


def test_a_model_that_cannot_be_loaded_says_why(make_app, tmp_path, files):
    broken, vanished = tmp_path / "broken.gguf", files[0]
    broken.write_bytes(b"GGUF")
    app = make_app([broken, vanished])
    answer = ask(app, "broken")
    assert answer.status_code == 503
    assert "broken cannot be loaded" in answer.json()["error"]["message"]
    told = app.get("/v1/models/broken").json()["meta"]
    assert told["state"] == "failed"
    assert "broken.gguf" in told["error"]
    assert str(tmp_path) not in answer.text + told["error"]
    assert app.get("/health").json() == {"status": "failed"}  # anyone may ask
    vanished.unlink()
    answer = ask(app, "a")
    assert answer.status_code == 503
    assert "a.gguf" in answer.text
    assert str(tmp_path) not in answer.text
    shutil.copy(BUNDLED, vanished)
    assert ask(app, "a").status_code == 200
    assert app.get("/health").json() == {"status": "ok"}


def test_a_request_waits_for_its_model_so_long(make_app, files):
    app = make_app(files, load_s=0)
    answer = ask(app, "a")
    assert answer.status_code == 503
    assert "being loaded" in answer.json()["error"]["message"]

    async def wait() -> None:
        await asyncio.wait([app.app.pool._task(app.app.pool.find("a"))])

    app.loop.run_until_complete(wait())
    assert ask(app, "a").status_code == 200


def test_there_must_be_a_model():
    with pytest.raises(ArgumentError, match="no model"):
        pools.Pool({}, Settings())
    with pytest.raises(Refusal, match="there is no model"):
        pools.Pool({"a": None}, Settings()).find("b")
