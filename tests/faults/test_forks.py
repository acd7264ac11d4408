"""Forked children of a process with a loaded model, and processes that start with an empty kernel cache."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tinyllm

PREPARED = """
import multiprocessing, os, sys, threading, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
import tinyllm
GREEDY = {"max_tokens": 12, "temperature": 0}
model = tinyllm.load()
text = str(model.generate("Once upon a time", **GREEDY))

def again(prompt):
    fresh = tinyllm.load()
    assert str(fresh.generate("Once upon a time", **GREEDY)) == text
    return str(model.generate(prompt, **GREEDY))
"""
POOL = """
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(again, ["Once upon a time"] * 4) == [text] * 4
assert again("Once upon a time") == text
"""
BUSY = """
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        model.generate("The dog", max_tokens=50, temperature=0)

busy = threading.Thread(target=keep_busy)
busy.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(int(again("Once upon a time") != text))
    assert os.waitpid(child, 0)[1] == 0
stop.set()
busy.join()
assert again("Once upon a time") == text
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(POOL, id="pool"),
        pytest.param(BUSY, id="while another thread generates"),
    ],
)
def test_a_forked_child_goes_on(code: str) -> None:
    command = [sys.executable, "-c", PREPARED + code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


FIRST_START = """
import tinyllm
print(tinyllm.load().generate("Once upon a time", max_tokens=12, temperature=0), end="")
"""


def start(folder: Path) -> str:
    env = {**os.environ, "TINYLLM_CACHE": str(folder)}
    command = [sys.executable, "-c", FIRST_START]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def compiled(folder: Path) -> dict[Path, int]:
    """The kernels in a cache, and when each was written; timings of them may be taken again."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.o")}


def test_two_processes_fill_one_cache_together(tmp_path: Path) -> None:
    expected = str(tinyllm.load().generate("Once upon a time", max_tokens=12, temperature=0))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, [tmp_path] * 2)) == [expected] * 2
    kept = compiled(tmp_path)
    assert len(kept) > 10
    assert start(tmp_path) == expected
    assert compiled(tmp_path) == kept
