"""`tinyllm lab`: what it prints and draws."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyllm.cli.commands import main
from tinyllm.kernels import lab

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
QUICK = ["-t", "1", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "LARGE", 64)


def test_kernels_are_ranked_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["lab", *(str(EXAMPLES / n) for n in ("simd_words.py", "plain_numba.py")), *QUICK])
        == 0
    )
    out = capsys.readouterr().out
    assert "simd_words.py: lanes, matvec Q8_0: right, error" in out
    assert re.search(r"^\| (lanes|tinyllm) +\| 1 token ", out, re.M)
    assert "; limits: read GB/s " in out
    rows = re.findall(r"^\| (\w+) +\| 1 token ", out, re.M)
    assert sorted(rows) == ["lanes", "loops", "tinyllm"]  # one table


def test_kernels_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for path in files:
        path.write_text((EXAMPLES / "simd_words.py").read_text("utf-8"), "utf-8")
    assert main(["lab", *map(str, files), *QUICK, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["kernels"]:
        makers = {t["maker"] for t in found["times"]}
        assert makers == {"lanes of a.py", "lanes of b.py", "tinyllm"}


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_that_are_none_are_refused(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "no_such_file.py", "--seconds", seconds]) == 2
    assert f"{seconds} seconds for each time; expected a number" in capsys.readouterr().err


def test_a_wrong_kernel_is_not_timed_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        (EXAMPLES / "simd_words.py").read_text("utf-8").replace("64 * c, j)", "64 * c, 0)")
    )
    assert main(["lab", str(path), *QUICK]) == 1
    printed = capsys.readouterr()
    assert "mine.py: lanes, matvec Q8_0: WRONG: 16 x 256, 1 token: row 0, output" in printed.out
    assert "GB/s" not in printed.out
    assert "a kernel is wrong" in printed.err


def test_json_and_a_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    argv = ["lab", str(EXAMPLES / "simd_words.py"), *QUICK, "--json", "--plot", str(path)]
    assert main(argv) == 0
    (found,) = json.loads(capsys.readouterr().out)["kernels"]
    assert (found["operation"], found["kind"], found["wrong"]) == ("matvec", "Q8_0", "")
    assert {t["maker"] for t in found["times"]} == {"lanes", "tinyllm"}
    assert "<svg" in path.read_text("utf-8")


class Stub:
    """llama.cpp's products, by NumPy."""

    def __init__(self, where: Path, n_threads: int) -> None:
        assert n_threads == 1

    def multiply(self, source: Any, x: np.ndarray, seconds: float) -> tuple[np.ndarray, float]:
        return x @ source.values().T, 1e-4


def test_llamacpp_stands_beside_them_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab.llamacpp, "folder", lambda: Path("lib"))
    monkeypatch.setattr(lab.llamacpp, "Products", Stub)
    assert main(["lab", str(EXAMPLES / "simd_words.py"), *QUICK, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["kernels"]
    times = {t["maker"]: t for t in found["times"]}
    assert times.keys() == {"lanes", "tinyllm", "llama.cpp"}
    assert times["llama.cpp"]["nbytes"] == times["tinyllm"]["nbytes"] == 64 * 2048 * 34 // 32


def test_a_kernel_for_another_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", str(EXAMPLES / "warp.cu")]) == 2
    assert "is cuda, which does not run on cpu; give --device" in capsys.readouterr().err


def test_the_page_names_every_operation_and_example() -> None:
    page = (ROOT / "docs" / "lab.md").read_text("utf-8")
    from tinyllm.kernels.outside import OPERATIONS

    names = {n for o in OPERATIONS.values() for n in (*o.cpu, *o.gpu)} | set(OPERATIONS)
    assert [n for n in sorted(names) if f"`{n}`" not in page] == []
    assert [
        p.name for p in EXAMPLES.iterdir() if p.is_file() and f"examples/{p.name}" not in page
    ] == []
