"""Ray's processes of these tests run at the priority of the tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def niceness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers would else give way to whatever runs beside them: on a busy machine, for minutes."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
