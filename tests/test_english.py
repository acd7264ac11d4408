"""Docstrings are read alone, in a hover: they are sentences of their own."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tinyllm", "tests", "scripts", "benchmarks", "training")
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
LEANS = re.compile(r"(?:The same|Of|See|As ``|Likewise|Ditto)\b")  # these need another text
LEANING_COMMENT = re.compile(r"# (?:the same|of|see|likewise|ditto)\b.*")
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def leaning(source: str) -> Iterator[str]:
    """First lines of the docstrings and comments that say nothing without the text beside them."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, WITH_DOCSTRING) else None
        if text is not None and LEANS.match(text.strip()):
            yield text.strip().partition("\n")[0]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and LEANING_COMMENT.match(token.string):
            yield token.string


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
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
