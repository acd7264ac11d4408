"""``import tinyllm`` is light, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tinyllm

HEAVY = {"cupy", "jinja2", "numba", "pyopencl", "requests"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import tinyllm",
        "import tinyllm.cli",
        "import tinyllm; tinyllm.gguf",
        "import tinyllm.sampling",
    ],
)
def test_import_is_light(statement):
    loaded = loaded_by(statement)
    assert "tinyllm" in loaded
    assert not loaded & HEAVY


def test_public_names_are_sorted_and_importable():
    assert list(tinyllm.__all__) == sorted(tinyllm.__all__)
    assert [name for name in tinyllm.__all__ if getattr(tinyllm, name, None) is None] == []
    assert dir(tinyllm) == sorted(tinyllm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        tinyllm.lod  # noqa: B018
