"""A process that is killed leaves a whole store, and the next one goes on where it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killing.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_a_whole_store(n: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(n), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] >= n // 6  # the others had ended by themselves
    assert found["problems"] == []
    assert found["embedded twice"] == 0
    assert found["equal"]
