"""What docs/engine.md shows is run, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine.md"


def test_the_page_of_the_engine_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        exec(compile(code, str(PAGE), "exec"), names)
    assert "Usage(prompt_tokens=" in capsys.readouterr().out
