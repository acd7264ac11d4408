"""The GPU benchmark measures the right thing, and one failing part loses no other."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

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
            return LIMITS
        return "an illegal memory access" if asked[-1] in broken else [{"rows": 1}]

    monkeypatch.setattr(gpu, "measure", measure)
    gpu.run(options(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == {"product Q4_0": "an illegal memory access"}
    assert {"limits", "product Q6_K", "model llama-1b:Q4_0"} < set(report["parts"])
    broken.clear()
    asked.clear()
    assert gpu.run(options(tmp_path))["failed"] == {}
    assert asked == ["product Q4_0"]
    monkeypatch.setattr(gpu, "sources_hash", lambda: "changed")
    assert set(gpu.run(options(tmp_path))["parts"]) == set(report["parts"]) | {"product Q4_0"}
    assert len(asked) == 1 + len(gpu.parts(options(tmp_path)))


def test_a_process_that_dies_is_one_line(gpu: Any, tmp_path: Path) -> None:
    given = options(tmp_path)
    given.device = "cuda:99 none of this name"
    reason = gpu.measure(("limits", ""), given, 60)
    assert isinstance(reason, str)
    assert "\n" not in reason
    assert "took more than" in gpu.measure(("limits", ""), given, 0.01)


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
    assert [row["sequences"] for row in parts.attention(be, 100, quick=True)] == [1]
    assert parts.prefill(be, parts.model(be, "tiny", "Q4_0"), 32) == 32 / 1e-3
