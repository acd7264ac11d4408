"""Where the text of a kernel is found, and the syntax of its functions."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any


def source_of(function: Callable[..., Any]) -> str:
    """The text of the file in which a function stands: in a folder, a zip or a notebook.

    Raises
    ------
    OSError
        Only its bytecode is here.
    """
    return _text(function.__code__.co_filename, *_origin(function))


def _origin(function: Callable[..., Any]) -> tuple[Any, str]:
    """Loader and name of the module in which a function was defined."""
    return function.__globals__.get("__loader__"), function.__globals__.get("__name__", "")


def _text(path: str, loader: Any, module: str) -> str:
    text: str | None = ""
    try:
        if hasattr(loader, "get_source"):  # not by the path: it may now hold another version
            text = loader.get_source(module)
    except ImportError:  # Python's prompt has the loader of something else
        pass
    if text == "":
        try:
            text = Path(path).read_text("utf-8")
        except OSError:  # a notebook's cell
            text = "".join(linecache.getlines(path))
    if not text:
        raise OSError(f"the source of {module} is missing; only its bytecode is here")
    return text


def definition(function: Callable[..., Any]) -> ast.FunctionDef:
    """The syntax of a function; OSError as of ``source_of``."""
    code = function.__code__
    found = _definitions(code.co_filename, *_origin(function)).get(code.co_firstlineno)
    if found is None:
        raise OSError(f"the source of {function.__name__} is not in {code.co_filename}")
    return found


@lru_cache
def _definitions(path: str, loader: Any, module: str) -> dict[int, ast.FunctionDef]:
    """The functions of a file, by their first lines."""
    tree = ast.parse(_text(path, loader, module))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return {min([n.lineno, *(d.lineno for d in n.decorator_list)]): n for n in found}
