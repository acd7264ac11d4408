"""The benchmarks run and write what they promise; nothing here depends on how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "tinyllm" / "data" / "bundled.gguf"


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_compare_writes_rates_ratios_and_errors(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    small = ["-p", "8", "-n", "4", "-t", "1", "--rounds", "2", "--sequences", "2"]
    done = run(
        "compare.py",
        str(BUNDLED),
        "--engines",
        "tinyllm",
        "--reference",
        *small,
        "--json",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert str(ROOT) not in out.read_text()
    assert report["machine"]["cores"] > 0
    assert report["settings"] == {
        "prompt": 8, "tokens": 4, "depth": None, "threads": 1, "rounds": 2, "sequences": 2,
    }  # fmt: skip
    [model] = report["models"]
    assert model["file_bytes"] == BUNDLED.stat().st_size
    for way in ("generate", "step"):
        for test in ("pp8", "tg4"):
            s = model["tokens_per_s"]["tinyllm"][way][test]
            assert len(s["all"]) == 2
            assert 0 < s["min"] <= s["median"] <= s["max"]
            assert f"{s['median']:.1f}" in done.stdout
    assert model["sequences"]["count"] == 2
    assert model["engines"]["tinyllm"]["peak_rss_bytes"] > 0
    [error] = model["logits"]
    assert (error["engine"], error["compared_with"]) == ("tinyllm", "reference")
    assert 0 < error["rms_error"] < error["max_error"] < 0.1
    assert error["same_argmax"]


def test_compare_names_the_engines_it_knows() -> None:
    done = run("compare.py", str(BUNDLED), "--engines", "tinyllm,nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "llamacpp" in done.stderr
