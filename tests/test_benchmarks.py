"""The benchmarks run and write what they promise; nothing here depends on how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "tinyllm" / "data" / "bundled.gguf"
SMALL = "-p 8 -n 4 -t 1 --rounds 2 --sequences 2 --engines tinyllm --reference --busy 1".split()


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file that compare.py writes, and what it prints."""
    out = tmp_path_factory.mktemp("results") / "compare.json"
    done = run("compare.py", str(BUNDLED), *SMALL, "--json", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def result(compared: tuple[Path, str]) -> dict[str, Any]:
    """The results of the one model."""
    [model] = json.loads(compared[0].read_text())["models"]
    return model


def test_compare_says_what_was_measured(compared: tuple[Path, str]) -> None:
    text = compared[0].read_text()
    report = json.loads(text)
    assert report["machine"]["cores"] > 0
    assert report["machine"]["packages"]["numba"]
    settings = {"prompt": 8, "tokens": 4, "threads": 1, "rounds": 2, "sequences": 2}
    assert report["settings"] == settings | {"depth": None, "busy": [1]}
    assert str(ROOT) not in text


def test_compare_measures_both_ways_in_every_round(
    compared: tuple[Path, str], result: dict[str, Any]
) -> None:
    for way in ("generate", "step"):
        for test in ("pp8", "tg4"):
            s = result["tokens_per_s"]["tinyllm"][way][test]
            assert len(s["all"]) == 2
            assert 0 < s["min"] <= s["median"] <= s["max"]
            assert f"{s['median']:.1f}" in compared[1]
    assert result["sequences"]["count"] == 2
    assert len(result["sequences"]["to_one"]["all"]) == 2


def test_compare_decodes_beside_busy_processes(
    compared: tuple[Path, str], result: dict[str, Any]
) -> None:
    busy = result["busy"]["1"]
    rates, alone = busy["tokens_per_s"]["tinyllm"], result["tokens_per_s"]["tinyllm"]["generate"]
    assert len(rates["all"]) == 2
    first = rates["all"][0] / alone["tg4"]["all"][0]
    assert busy["to_alone"]["tinyllm"]["all"][0] == pytest.approx(first, rel=1e-4)
    assert busy["ratios"] == {}
    assert "busy processes beside it" in compared[1]


def test_neighbours_compute_and_are_gone_afterwards() -> None:
    """None is left behind when a measurement fails."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common

    def measure() -> None:
        with common.neighbours(2) as started:
            processes.extend(started)
            assert [p.poll() for p in started] == [None, None]
            raise ValueError("a measurement failed")

    processes: list[Any] = []
    with pytest.raises(ValueError, match="failed"):
        measure()
    assert len(processes) == 2
    assert all(p.returncode is not None for p in processes)


def test_compare_refuses_less_than_one_neighbour() -> None:
    done = run("compare.py", str(BUNDLED), "--busy", "1,0")
    assert done.returncode == 2
    assert "at least 1" in done.stderr


def test_compare_knows_memory_and_bandwidth(result: dict[str, Any]) -> None:
    assert result["file_bytes"] == BUNDLED.stat().st_size
    assert result["engines"]["tinyllm"]["peak_rss_bytes"] > result["file_bytes"]
    rates = result["tokens_per_s"]["tinyllm"]["step"]["tg4"]["all"]
    read = [result["weights_gb_per_token"] * rate for rate in rates]
    want = [r / b for r, b in zip(read, result["read_gb_per_s"]["all"], strict=True)]
    assert result["fraction_of_bandwidth"]["step"]["all"] == pytest.approx(want, rel=0.01)


def test_compare_holds_logits_against_the_reference(result: dict[str, Any]) -> None:
    [error] = result["logits"]
    assert (error["engine"], error["compared_with"]) == ("tinyllm", "reference")
    assert 0 < error["rms_error"] < error["max_error"] < 0.1
    assert error["same_argmax"]


def test_compare_names_the_engines_it_knows() -> None:
    done = run("compare.py", str(BUNDLED), "--engines", "tinyllm,nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "llamacpp" in done.stderr


def test_report_draws_what_was_compared(compared: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib")
    folder = compared[0].parent
    done = run("report.py", str(folder))
    assert done.returncode == 0, done.stderr
    page = (folder / "README.md").read_text()
    for name in ("prefill", "decode"):
        assert f"{name}.svg" in page
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert not (folder / "roofline.svg").exists()  # nothing about kernels was measured
    assert "| tinyllm | step" in page.replace("  ", "")
