"""Models that the SDK's tests share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyllm.sdk import Embed4All, GPT4All


@pytest.fixture(scope="session")
def models(data: Path) -> Path:
    """The folder of real models."""
    return data / "models"


@pytest.fixture(scope="session")
def recorded(data: Path) -> dict[str, Any]:
    """What gpt4all 2.8.2 answered."""
    return json.loads((data / "gpt4all-2.8.2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def llm(models: Path) -> Iterator[GPT4All]:
    """A model that tells stories; it has no chat template."""
    with GPT4All("stories260K", model_path=models, allow_download=False) as llm:
        yield llm


@pytest.fixture(scope="session")
def embedder(models: Path) -> Iterator[Embed4All]:
    with Embed4All(model_path=models, allow_download=False) as embedder:
        yield embedder
