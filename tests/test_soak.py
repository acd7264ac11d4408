"""A slice of the soak: mixed calls from four threads give what each gives alone, and memory stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"


def test_a_slice_of_the_soak() -> None:
    command = [sys.executable, SOAK, "--minutes", "0.5", "--output", "-"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    assert sum(result["calls"].values()) > 20
    assert (result["n_wrong"], result["hung_threads"], result["flat"]) == (0, 0, True)


@pytest.mark.slow
def test_64_clients_that_cancel_for_ten_minutes() -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra [server]")
    command = [sys.executable, SOAK.with_name("server_soak.py"), "--output", "-"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout)
    assert (result["wrong"], result["texts_left"], result["requests_left"]) == ([], 0, 0)
    assert result["flat"]
