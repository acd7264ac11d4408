"""The cpu backend as a good citizen: its compiled cache, threads, forks and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cpu import ONE, TWO, Stored, elsewhere, normal, product

from tinyllm.kernels.cpu import jit


def test_the_cache_is_used_by_the_next_process_and_numbas_own_is_left_alone(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "tinyllm", tmp_path / "numba"
    theirs.mkdir()
    first = elsewhere(mine, NUMBA_CACHE_DIR=str(theirs))
    again = elsewhere(mine, NUMBA_CACHE_DIR=str(theirs))
    assert "matvec_Q4_K" in first[0].split()
    assert len(again[0].split()) == 1  # the instruction set; nothing compiled
    assert first[1] == again[1] == "False"  # numba, which takes long to import, was not
    assert first[2] == again[2]
    assert not list(theirs.iterdir())


def test_a_folder_that_cannot_be_written_is_passed_over(monkeypatch: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(jit, "_candidates", lambda: [blocked, tmp_path / "good"])
    jit.cache_folder.cache_clear()
    try:
        folder = jit.cache_folder()
        assert folder is not None
        assert folder.parent == tmp_path / "good"
    finally:
        jit.cache_folder.cache_clear()


def test_two_python_threads_at_once() -> None:
    w, x = TWO.load(Stored("Q8_0", 160, 256)), normal(40, 256)
    want = [product(TWO, w, x[i : i + 1]) for i in range(40)]
    wrong: list[int] = []

    def work(be: Any) -> None:
        for i in [*range(40)] * 5:
            if not np.array_equal(product(be, w, x[i : i + 1]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(be,)) for be in (TWO, TWO, ONE)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


FORKING = """
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import numpy as np
from test_cpu import TWO, Stored, normal, product
w, x = TWO.load(Stored("Q8_0", 160, 256)), normal(1, 256)
want = product(TWO, w, x)
pid = os.fork()
same = np.array_equal(product(TWO, w, x), want)
if pid == 0:
    os._exit(0 if same else 3)
sys.exit(os.waitpid(pid, 0)[1] or (0 if same else 4))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too() -> None:
    code = FORKING.format(tests=str(Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
