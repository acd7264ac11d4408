"""What mkdocs is told beside docs/: notebooks as pages, and links to files of the repository as their names.

With TINYLLM_SITE_EXECUTE=1 the notebooks are run, and their pages show what they print and draw.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
CELL = re.compile(r"^# %%(.*)\n", re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ROW, CODE = re.compile(r"^\|.*$", re.M), re.compile(r"`[^`]+`")
UNEXPLAINED = re.compile(r'\s*–\s*<div class="doc-md-description">\s*</div>')
MORE = "Pages"


def cells(text: str) -> Iterator[tuple[bool, str]]:
    """Whether it is prose, and the text, of each cell of a source in jupytext's percent form."""
    _, *parts = CELL.split(text)
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        prose = "[markdown]" in head
        yield prose, re.sub(r"^# ?", "", body, flags=re.M).strip() if prose else body.strip()


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook's page, and the figures on it by name."""
    parts, figures = [], {}
    results = outputs(path) if os.environ.get("TINYLLM_SITE_EXECUTE") else {}
    for i, (prose, body) in enumerate(cells(path.read_text("utf-8"))):
        parts.append(body if prose else f"```python\n{body}\n```")
        for j, (kind, value) in enumerate(results.get(i, [])):
            if kind == "text":
                parts.append(f'```{{.text .no-copy title="prints"}}\n{value.rstrip()}\n```')
            else:
                name = f"{path.stem}-{i}-{j}.png"
                figures[name] = base64.b64decode(value)
                parts.append(f"![figure]({name})")
    title, rest = parts[0].split("\n", 1)
    link = f"[The notebook to run]({path.stem}.ipynb){{download}}"
    return "\n\n".join([title, link, rest, *parts[1:]]) + "\n", figures


def outputs(path: Path) -> dict[int, list[tuple[str, str]]]:
    """What each cell of a notebook, run from a clean kernel, prints ("text") and draws ("png")."""
    import jupytext
    import nbclient

    book = jupytext.read(path)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(path.parent))
    return {i: shown(cell.get("outputs", [])) for i, cell in enumerate(book.cells)}


def shown(outs: list[Any]) -> list[tuple[str, str]]:
    """What one cell's outputs show; a text that was printed in several pieces is one."""
    found: list[tuple[str, str]] = []
    for out in outs:
        kind, value = "text", ""
        if out["output_type"] == "stream" and out["name"] == "stdout":
            value = out["text"]
        elif "image/png" in out.get("data", {}):
            kind, value = "png", out["data"]["image/png"]
        elif "text/plain" in out.get("data", {}):
            value = out["data"]["text/plain"]
        if kind == "text" and found and found[-1][0] == "text":
            value = found.pop()[1] + value
        if value.strip():
            found.append((kind, value))
    return found


def on_config(config: Any) -> Any:
    """Put the notebooks, and pages of docs/ that mkdocs.yml does not name, into the menu."""
    books = ["notebooks/index.md", *(f"notebooks/{p.stem}.md" for p in BOOKS)]
    named = str(config.nav)
    others = [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in named]
    for entry in config.nav:
        if "Notebooks" in entry:
            entry["Notebooks"] = books
        if MORE in entry:
            entry[MORE] += others
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks' pages, their figures, and the notebooks themselves."""

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    for path in BOOKS:
        text, figures = page(path)
        add(f"notebooks/{path.stem}.md", text)
        add(f"notebooks/{path.stem}.ipynb", path.with_suffix(".ipynb").read_text("utf-8"))
        for name, content in figures.items():
            add(f"notebooks/{name}", content)
    table = (ROOT / "notebooks" / "README.md").read_text("utf-8")
    add("notebooks/index.md", re.sub(r"\((\d\d-[\w-]+)\.ipynb\)", r"(\1.md)", table))
    add("training/loss.svg", (ROOT / "training" / "loss.svg").read_text("utf-8"))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links to files that the site does not have become the files' names."""
    folder = Path(page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path = os.path.normpath(folder / target.partition("#")[0])
        outside = path.removeprefix("../")
        if files.get_file_from_path(path):
            return match[0]
        if files.get_file_from_path(outside):
            up = "../" * len(folder.parts)
            return f"{image}[{text}]({up}{outside})"
        if outside == "notebooks/README.md":
            return f"[{text}]({'../' * len(folder.parts)}notebooks/index.md)"
        here = ROOT / outside if path != outside else ROOT / folder / target
        if here.exists() or (ROOT / "docs" / path).exists():
            return f"{text} (`{outside}` of the sources)"
        return match[0]  # mkdocs reports it

    return ROW.sub(bars, LINK.sub(named, markdown))


def bars(row: re.Match[str]) -> str:
    """GitHub wants a bar in a table's code escaped; here the backslash would be shown."""
    return CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0])


def on_page_content(html: str, **_: Any) -> str:
    """What is returned or raised without a word of explanation has no dash after it."""
    return UNEXPLAINED.sub("", html)
