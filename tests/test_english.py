"""Docstrings are read alone, in a hover: they are sentences of their own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinyllm", "tests", "scripts", "benchmarks", "training")
NOT_YET = ("tinyllm/models",)
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
READ = [p for p in FILES if not p.relative_to(ROOT).as_posix().startswith(NOT_YET)]
LEANS = re.compile(
    r"(?:The same|Of|See|As ``|Likewise|Ditto)\b"
)  # beginnings that need another text
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def leaning(source: str) -> Iterator[str]:
    """First lines of the docstrings and comments that say nothing without the text beside them."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, WITH_DOCSTRING) else None
        if text is not None and LEANS.match(text.strip()):
            yield text.strip().partition("\n")[0]
    yield from re.findall(r"^ *# (?:the same|of|see|likewise|ditto)\b.*", source, re.M)


@pytest.mark.parametrize("path", READ, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_stand_alone(path):
    assert list(leaning(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    ["The same, as halves.", "Of n floats.", "See ``multiplier``.", "As ``choose``, faster."],
)
def test_a_docstring_that_leans_on_another_is_found(text):
    assert list(leaning(f'def f():\n    """{text}\n\n    More.\n    """\n')) == [text]


def test_a_sentence_is_not():
    source = '"""Ofen: an oven."""\n# off by one\ndef seek():\n    """Seen from the left."""\n'
    assert list(leaning(source)) == []
