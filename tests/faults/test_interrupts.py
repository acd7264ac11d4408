"""Ctrl-C at every stage: it ends the work with KeyboardInterrupt, and what was loaded stays right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyllm
from tinyllm.loading import BUNDLED

HERE = Path(__file__).parent


def python(*argv: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def expected() -> str:
    """The text that an uninterrupted process writes."""
    return str(tinyllm.load().generate("Once upon a time", max_tokens=12, temperature=0))


@pytest.mark.parametrize(
    ("kind", "rounds", "seconds"),
    [
        ("load", 15, 0.1),
        ("compile", 5, 0.3),
        ("prefill", 15, 0.1),
        ("decode", 15, 0.1),
        ("stream", 15, 0.1),
        ("batch", 15, 0.1),
    ],
)
def test_work_ends_and_can_be_done_again(
    kind: str, rounds: int, seconds: float, expected: str
) -> None:
    run = python(HERE / "interrupting.py", kind, BUNDLED, rounds, seconds)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert out == f"{rounds}\n{expected}"
    assert "Error" not in err  # KeyboardInterrupt within a finaliser is all that may be told


DOWNLOADING = """
import sys
from tinyllm.hub.download import fetch
fetch(sys.argv[1], sys.argv[2], verbose=False)
"""


def test_a_download_continues_after_an_interrupt(tmp_path: Path, served: Any) -> None:
    path = tmp_path / "model.gguf"
    served.pause.set()
    run = python("-c", DOWNLOADING, served.url, path)
    assert served.half_way.wait(60)
    part = path.with_name("model.gguf.part")
    while not (part.exists() and part.stat().st_size):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [part.name, part.name + ".json"]
    kept = part.stat().st_size
    served.pause.clear()
    run = python("-c", DOWNLOADING, served.url, path)
    assert run.communicate(timeout=60)
    assert run.returncode == 0
    assert path.read_bytes() == served.content
    assert served.starts == [0, kept]
    assert list(tmp_path.iterdir()) == [path]
