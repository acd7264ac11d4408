"""What goes wrong around a server of its own process: it is killed, its disk is full, its model's file goes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import tinyllm
from tinyllm.loading import BUNDLED

CHAT = "/v1/chat/completions"
ASKED = [
    f"Tell me of {what}." for what in ("a dog", "a cat", "the sea", "Lily", "a red ball", "rain")
]
Start = Callable[..., tuple[subprocess.Popen, str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(*arguments, **how): a server of its own process, and its address."""
    processes = []

    def begin(*arguments: str, **how: Any) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "tinyllm", "serve", "--port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)
        processes.append(process)
        assert process.stdout is not None
        found = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert found
        return process, found[0]

    yield begin
    for process in processes:
        with process:  # closes its pipe
            process.kill()


def body(i: int, **fields: Any) -> dict[str, Any]:
    """Request number i: its answer depends on nothing else."""
    said = {"messages": [{"role": "user", "content": ASKED[i % len(ASKED)]}]}
    return {**said, "max_tokens": 20 + i % 30, "seed": i, "ignore_eos": True, **fields}


def ask(url: str, i: int) -> str:
    answer = httpx.post(url + CHAT, json=body(i), timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def expected(i: int) -> str:
    """The text of request i, written by no server."""
    with tinyllm.load() as model:
        asked = body(i)
        how = {k: asked[k] for k in ("max_tokens", "seed")}
        bias = dict.fromkeys(model.tokenizer.eog, float("-inf"))
        shape = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return model.chat(asked["messages"], logit_bias=bias, **shape, **how).text


def test_a_server_that_was_killed_starts_again(start: Start) -> None:
    process, url = start("--quiet")
    text = ask(url, 1)
    with httpx.stream("POST", url + CHAT, json=body(2, stream=True), timeout=300) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        process.kill()
        with suppress(httpx.TransportError):
            list(pieces)
    assert process.wait(60) == -signal.SIGKILL
    port = url.rpartition(":")[2]
    again, same = start("--quiet", "--port", port)  # at once, at the port that the killed one had
    assert same == url
    assert ask(url, 1) == text
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="a full disk is one of Unix here")
def test_a_server_whose_disk_is_full_goes_on(start: Start, tmp_path: Path) -> None:
    """Its log, its cache and its folder for passing files have no room for a byte."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += (
        "sys.argv = ['tinyllm', *sys.argv[1:]]; runpy.run_module('tinyllm', run_name='__main__')"
    )
    environment = {**os.environ, "TINYLLM_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", limit, "serve", "--port", "0"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process:
            try:
                found = re.search(r"http://[\d.:]+", process.stdout.readline())
                assert found
                assert [ask(found[0], 1) for _ in range(2)] == [expected(1)] * 2
                process.send_signal(signal.SIGTERM)
                process.wait(60)
            finally:
                process.kill()
    assert not (tmp_path / "log").stat().st_size


def test_a_loaded_model_outlives_its_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    shutil.copy(BUNDLED, file)
    _, url = start(str(file), "--quiet")
    text = ask(url, 1)
    file.unlink()
    assert ask(url, 1) == text
    assert ask(url, 2) == expected(2)
    assert httpx.get(url + "/health", trust_env=False).json() == {"status": "ok"}
    listed = httpx.get(url + "/v1/models", trust_env=False).json()["data"][0]["meta"]
    assert (listed["state"], listed["size"]) == ("loaded", 0)
