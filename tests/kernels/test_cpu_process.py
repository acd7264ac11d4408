"""The cpu backend as a good citizen: its compiled cache, threads, forks and processes."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cpu import ONE, TWO, elsewhere, normal, product, stored

from tinyllm.errors import DeviceError
from tinyllm.kernels.cpu import emit, jit, source


def test_the_cache_is_used_by_the_next_process_and_numbas_own_is_left_alone(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "tinyllm", tmp_path / "numba"
    theirs.mkdir()
    first = elsewhere(mine, NUMBA_CACHE_DIR=str(theirs))
    again = elsewhere(mine, NUMBA_CACHE_DIR=str(theirs))
    assert "matvec_Q4_K_parts" in first[0].split()
    assert len(again[0].split()) == 1  # the instruction set; nothing compiled
    assert first[1] == again[1] == "False"  # numba, which takes long to import, was not
    assert first[2] == again[2]
    assert not list(theirs.iterdir())


def nothing_much(args: int, first: int, last: int, worker: int) -> None:
    """A kernel."""


def test_two_processes_fill_one_cache_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        outputs = list(both.map(elsewhere, [tmp_path] * 2))
    assert outputs[0][2] == outputs[1][2]
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".o"}
    assert len(elsewhere(tmp_path)[0].split()) == 1  # nothing is left to compile


def test_another_processor_version_or_kernel_has_another_cache(
    monkeypatch: Any, tmp_path: Path
) -> None:
    def name_after(change: Callable[[Any], None]) -> str:
        with monkeypatch.context() as m:
            change(m)
            return jit._fingerprint()

    sources = tmp_path / "cpu"
    shutil.copytree(
        Path(jit.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(jit, "__file__", str(sources / "jit.py"))
    triple, cpu, features = emit.target()
    names = [
        name_after(lambda m: None),
        name_after(lambda m: m.setattr(emit, "target", lambda: (triple, "another", features))),
        name_after(lambda m: m.setattr(emit, "target", lambda: (triple, cpu, features | {"new"}))),
        name_after(lambda m: m.setattr(jit.llvmlite, "__version__", "0.0.1")),
    ]
    with (sources / "formats.py").open("a") as f:
        f.write("# edited")
    names.append(name_after(lambda m: None))
    assert len(set(names)) == len(names)
    # a kernel made of what was imported and of the files of now would be neither's
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    with pytest.raises(DeviceError, match="start it again"):
        jit.kernel(nothing_much, "nothing_of_two_versions")


def test_an_edited_kernel_from_elsewhere_is_compiled_anew(monkeypatch: Any, tmp_path: Path) -> None:
    """Its source is not part of the cache's name, but of the file's."""
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    for value in (1, 2, 2):
        file = tmp_path / "mine.py"
        file.write_text(
            "from tinyllm.kernels.cpu.simd import set_i64\n"
            f"def mine(out, first, last, worker): set_i64(out, {value})\n"
        )
        names: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), names)
        jit._kernels.pop("mine", None)
        source._definitions.cache_clear()
        assert native(jit.kernel(names["mine"])) == value
    assert jit.compiled.count("mine") == 2


def native(kernel: jit.Kernel) -> int:
    """What a kernel writes to an integer."""
    out = ctypes.c_int64()
    kernel(0, 1, out=ctypes.addressof(out))
    return out.value


class Screen(io.StringIO):
    """A terminal, or what is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(("terminal", "spent"), [(True, 2.0), (True, 0.0), (False, 2.0)])
def test_a_long_compilation_is_counted_on_a_terminal(
    monkeypatch: Any, tmp_path: Path, terminal: bool, spent: float
) -> None:
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "_spent", spent)
    monkeypatch.setattr(jit, "compiled", [])
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal))
    for i in range(2):
        jit.kernel(nothing_much, f"nothing_{terminal}_{spent}_{i}")
    ONE.numpy(ONE.act(ONE.array(np.ones(4, np.float32)), "relu"))  # a program runs: the line ends
    lines = screen.getvalue().replace("\r", "\n").strip().split("\n")
    if terminal and spent:
        assert [line.rpartition(": ")[2].split()[0] for line in lines[:2]] == ["1", "2"]
        assert screen.getvalue().endswith(" s\n")
    else:
        assert lines == [""]


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
    w, x = TWO.load(stored("Q8_0", 160, 256)), normal(40, 256)
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
from test_cpu import TWO, normal, product, stored
w, x = TWO.load(stored("Q8_0", 160, 256)), normal(1, 256)
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
