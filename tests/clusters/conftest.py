"""Ray's processes of these tests run at the priority of the tests, and may take their time to start."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers would else give way to whatever runs beside them, and a node end whose agents start late."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "600000")
