"""Folders of documents, and stores whose vectors the bundled model computes: it is there, and quick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyllm
from tinyllm.localdocs import LocalDocs


@pytest.fixture(scope="session")
def bundled() -> Iterator[tinyllm.Model]:
    """The bundled model; it serves as an embedding model, too."""
    with tinyllm.load() as model:
        yield model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small documents."""
    place = tmp_path / "notes"
    (place / "garden").mkdir(parents=True)
    (place / "tea.md").write_text(
        "# Tea\n\nGreen tea wants 70 degrees.\n\n## Black\n\nBlack tea boils.\n"
    )
    (place / "garden" / "beans.txt").write_text("Beans climb a pole.\n\nWater them at night.\n")
    (place / "rules.py").write_text(
        'def water(plant):\n    """Give it a litre."""\n    plant.litres += 1\n'
    )
    return place


@pytest.fixture
def docs(tmp_path: Path, bundled: tinyllm.Model) -> Iterator[LocalDocs]:
    """An empty store."""
    with LocalDocs(tmp_path / "store.sqlite", bundled) as found:
        yield found
