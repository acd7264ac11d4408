"""A disk that fills while something is saved: the old file stays, nothing half-written does, and work goes on.

A limit on the size of files stands for the full disk: writing fails in the middle, in the kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.cli import conversation
from tinyllm.sdk import GPT4All

resource = pytest.importorskip("resource")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond ``room`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_state(path: Path) -> None:
    model = tinyllm.load()
    state = model.new_state(64)
    model.generate("Once upon a time", max_tokens=8, state=state)
    state.save(path)


def save_session(path: Path) -> None:
    bundled = tinyllm.loading.BUNDLED
    with GPT4All(bundled.name, model_path=bundled.parent, allow_download=False) as llm:
        with llm.chat_session():
            llm.generate("Hello", max_tokens=4)
            llm.save_session(path)


def save_conversation(path: Path) -> None:
    conversation.save([{"role": "user", "content": "x" * 10_000}], path)


def save_model(path: Path) -> None:
    gguf.write(path, {"general.name": "x"}, {"w": np.ones(10_000, np.float32)})


@pytest.mark.parametrize("save", [save_state, save_session, save_conversation, save_model])
def test_what_was_saved_before_stays(save: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"older")
    with full_disk(1000), pytest.raises(OSError, match=r"File too large|No space"):
        save(path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    save(path)
    assert path.stat().st_size > 1000


CACHING = """
import resource, sys
import tinyllm
from tinyllm.kernels.cpu import elementwise, jit
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
assert jit.kernel(elementwise.concat)
"""


def compile_in(folder: Path, code: str = CACHING) -> None:
    env = {**os.environ, "TINYLLM_CACHE": str(folder)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def kernels(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*concat*") if p.stat().st_size > 100)


def test_kernels_are_compiled_without_room_for_their_cache(tmp_path: Path) -> None:
    compile_in(tmp_path)
    assert not kernels(tmp_path)


def test_a_damaged_cache_is_compiled_anew(tmp_path: Path) -> None:
    unlimited = "\n".join(line for line in CACHING.splitlines() if "setrlimit" not in line)
    compile_in(tmp_path, unlimited)
    cached = kernels(tmp_path)
    assert cached
    for path in cached:
        os.truncate(path, path.stat().st_size // 2)
    compile_in(tmp_path, unlimited)
    compile_in(tmp_path, unlimited)
    assert kernels(tmp_path) == cached


def test_a_download_continues_when_there_is_room_again(tmp_path: Path, served: Any) -> None:
    from tinyllm.hub.download import fetch

    path, content = tmp_path / "model.gguf", served.content
    with full_disk(len(content) // 2), pytest.raises(OSError, match=r"File too large|No space"):
        fetch(served.url, path, verbose=False)
    assert not path.exists()
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["model.gguf.part", "model.gguf.part.json"]
    fetch(served.url, path, verbose=False)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert served.starts[0] == 0
    assert 0 < served.starts[1] <= len(content) // 2
