"""The GPU benchmark measures the right thing, and one failing part loses no other."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tinyllm.errors import DeviceError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LIMITS = [{"device": "opencl:0 Test", "copy_gb_s": 1.0}]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_measure")


def options(out: Path) -> argparse.Namespace:
    return argparse.Namespace(
        formats=["Q4_0", "Q6_K"], models=["llama-1b:Q4_0"], quick=False, only=None, matvec=None,
        device="opencl", out=out, name="report", seconds=1e6,
    )  # fmt: skip


def test_a_part_that_fails_is_noted_and_tried_again(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    broken = {"product Q4_0"}

    def measure(part: tuple[str, str], given: object, limit: float) -> Any:
        asked.append(" ".join(part).strip())
        if asked[-1] == "limits":
            return LIMITS, None
        return [{"rows": 1}], "an illegal memory access" if asked[-1] in broken else None

    monkeypatch.setattr(gpu, "measure", measure)
    gpu.run(options(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == {"product Q4_0": "an illegal memory access"}
    assert set(report["parts"]) == {" ".join(p).strip() for p in gpu.parts(options(tmp_path))}
    assert report["parts"]["product Q4_0"] == [{"rows": 1}]  # what it had measured by then
    broken.clear()
    asked.clear()
    assert gpu.run(options(tmp_path))["failed"] == {}
    assert asked == ["product Q4_0"]
    monkeypatch.setattr(gpu, "sources_hash", lambda: "changed")
    assert set(gpu.run(options(tmp_path))["parts"]) == set(report["parts"])
    assert len(asked) == 1 + len(gpu.parts(options(tmp_path)))


def test_a_process_that_dies_is_one_line(gpu: Any, tmp_path: Path) -> None:
    given = options(tmp_path)
    given.device = "cuda:99 none of this name"
    rows, reason = gpu.measure(("limits", ""), given, 60)
    assert rows == []
    assert "\n" not in reason
    assert gpu.measure(("limits", ""), given, 0.01) == ([], "took more than 0 seconds")


@pytest.mark.parametrize("limit", [60, 2])
def test_rows_before_the_end_of_a_part_are_kept(
    gpu: Any, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
        import sys, time
        print('{"what": "tg128"}', flush=True)
        sys.stdout.write('{"what": "cut')
        sys.stdout.flush()
        time.sleep(60 if LIMIT < 60 else 0)
        sys.exit("an illegal memory access")
    """
    (tmp_path / "gpu_measure.py").write_text(dedent(text).replace("LIMIT", str(limit)))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    rows, reason = gpu.measure(("model", "llama-8b:Q4_0"), options(tmp_path), limit)
    assert rows == [{"what": "tg128"}]
    assert reason == ("an illegal memory access" if limit == 60 else "took more than 2 seconds")


@pytest.fixture
def be(opencl: Any) -> Any:
    return opencl


@pytest.mark.device
def test_parts_give_rows(parts: Any, be: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "seconds", lambda be, run, repeats=5: run() or 1e-3)
    (limits,) = parts.limits(be, quick=True)
    assert limits["device"] == be.name
    for row in parts.products(be, "Q4_0", quick=True):
        assert row["right"]
        assert row["gb_s"] == pytest.approx(256 * 512 / 32 * 18 / 1e-3 / 1e9)
    assert [row["rows"] for row in parts.attention(be, 100, quick=True)] == [1, 20]
    assert [row["k"] for row in parts.picking(be, quick=True)] == [1, 64, 256] * 2
    assert parts.prefill(be, parts.model(be, "tiny", "Q4_0"), 32) == 32 / 1e-3


@pytest.mark.device
def test_a_model_is_measured_to_the_end_whatever_fails(
    parts: Any, be: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefill(be: Any, net: Any, n: int) -> float:
        raise DeviceError("too little memory\nfor this")

    monkeypatch.setattr(parts, "prefill", prefill)
    rows = list(parts.whole(be, "tiny", "Q4_0", quick=True))
    assert all(row["tokens_s"] > 0 for row in rows if "tg" in row["what"])
    assert [row["failed"] for row in rows if "pp" in row["what"]] == ["too little memory"] * 2
    said = [row["what"] for row in rows]
    assert said[:5] == ["load", "weights", "first 4 tokens", "tg8", "pp32"]
    assert {"tg x2", "tg x4", "tg8 drawn", "tg8@64", "all at the end"} < set(said)


def test_a_row_is_set_beside_the_limits(gpu: Any) -> None:
    limits = {"copy_gb_s": 4000.0, "half_tflop_s": 800.0}
    assert gpu.shares({"gb_s": 3000.0, "tflop_s": 80.0}, limits) == {
        "of copy": 0.75,
        "of half": 0.1,
    }
    assert gpu.shares({"gb_s": 3000.0}, {"copy_gb_s": 4000.0}) == {"of copy": 0.75}
    assert gpu.shares({"tokens_s": 1.0}, limits) == {}
