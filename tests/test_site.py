"""The site builds without a network, its links lead somewhere, and its reference has every public name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

import tinyllm
from tinyllm import gguf, localdocs, research, sdk

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {p: p.read_text("utf-8") for p in sorted((ROOT / "docs" / "api").glob("*.md"))}
EXAMPLES = "\n".join(
    c for t in REFERENCE.values() for c in re.findall(r"```python\n(.*?)```", t, re.S)
)
NAMED = [n for t in REFERENCE.values() for n in re.findall(r"^::: (\S+)", t, re.M)]
PLAIN = {
    "Completion",
    "State",
    "SamplingParams",
    "GGMLType",
    "StringArray",
}  # made by others: no example of each
# what readers of a class need not call
INNER = {
    "listen",
    "since",
    "ended",
    "can_be_set_aside",
    "set_aside",
    "show",
    "finish",
    "check_unchanged",
    "located",
    "spoil",
    "check_whole",
    "can_go_on",
    "fork_first",
    "reuse",
}


class Links(HTMLParser):
    """Where a page leads, what it loads, and the anchors on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := at.get(k))}
        if tag == "a" and (href := at.get("href")):
            self.links.append(href)
        if tag in ("script", "img") and (src := at.get("src")):
            self.loaded.append(src)
        if tag == "link" and at.get("rel") in ("stylesheet", "icon") and (href := at.get("href")):
            self.loaded.append(href)


def broken(site: Path) -> list[str]:
    """Links within the site that lead nowhere, and what pages load from elsewhere."""
    pages = {p: Links(p.read_text("utf-8")) for p in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"[a-z][a-z+]*:|//", link):
                if link in page.loaded and not link.startswith("data:"):
                    found.append(f"{path.name} loads {link}")
                continue
            target, _, anchor = link.partition("#")
            place = path.parent / unquote(target) if target else path
            place = (site / target.lstrip("/")) if target.startswith("/") else place.resolve()
            place = place / "index.html" if place.is_dir() else place
            if not place.exists():
                found.append(f"{path.name}: {link}")
            elif anchor and place in pages and unquote(anchor) not in pages[place].anchors:
                found.append(f"{path.name}: no anchor {link}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, its notebooks not run."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material")
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    pytest.importorskip(
        "mkdocstrings_handlers.python", reason="the site needs mkdocstrings[python]"
    )
    place = tmp_path_factory.mktemp("site").resolve()
    command = ["bash", str(ROOT / "scripts" / "site"), "--quick", "-d", str(place)]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert broken(site) == []


def test_every_page_and_notebook_is_there(site: Path) -> None:
    pages = [
        p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")
    ]
    pages += [Path("notebooks") / f"{p.stem}.html" for p in (ROOT / "notebooks").glob("[0-9]*.py")]
    assert [p for p in pages if not (site / p).exists()] == []
    menu = (site / "index.html").read_text("utf-8")
    assert [
        p for p in pages if p.name != "index.html" and f'href="{p.as_posix()}"' not in menu
    ] == []


def test_pages_show_what_their_sources_mean(site: Path) -> None:
    card, errors, model = (
        (site / name).read_text("utf-8")
        for name in ("model-card.html", "api/errors.html", "api/model.html")
    )
    assert "<code>&lt;|begin|&gt;</code>" in card  # a bar in a table's code, escaped for GitHub
    assert re.search(r"<pre>(<span></span>)?<code>TinyLLMError\n├── GGUFError ", errors)
    assert not re.search(r"–\s*<div[^>]*>\s*</div>", model)  # a dash, and no word after it


def test_what_a_cell_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    pages = import_module("site_pages")
    printed = [{"output_type": "stream", "name": "stdout", "text": t} for t in ("a", "b\n", "\n")]
    figure = {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "<F>"}}
    warning = {"output_type": "stream", "name": "stderr", "text": "w"}
    assert pages.shown([*printed, warning, figure, printed[2]]) == [
        ("text", "ab\n\n"), ("png", "AAAA"),
    ]  # fmt: skip


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="b.html">b</a><a href="#y">y</a><a href="#x">x</a><a href="https://x.org">e</a>'
        '<script src="https://x.org/s.js"></script>', "utf-8",
    )  # fmt: skip
    assert broken(tmp_path) == [
        "a.html: b.html", "a.html: no anchor #y", "a.html loads https://x.org/s.js",
    ]  # fmt: skip


def public() -> dict[str, object]:
    """The names that users import."""
    found = {}
    for module in (tinyllm, sdk, localdocs, gguf, research):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{module.__name__}.{name}"] = thing
    found |= {
        f"tinyllm.tokenizers.{n}": getattr(tinyllm.tokenizers, n) for n in ("Tokenizer", "load")
    }
    return found


@pytest.mark.parametrize("name", public())
def test_a_public_name_is_in_the_reference(name: str) -> None:
    thing = public()[name]
    places = {f"{thing.__module__}.{thing.__qualname__}", name, thing.__module__}
    assert places & set(NAMED), (
        f"docs/api has no line '::: {thing.__module__}.{thing.__qualname__}'"
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_name_of_the_reference_says_what_it_is_and_shows_its_use(name: str) -> None:
    module, _, last = name.rpartition(".")
    try:
        thing = import_module(name)
    except ModuleNotFoundError:
        thing = getattr(import_module(module), last)
    assert inspect.getdoc(thing)
    members = {last: thing}
    if inspect.isclass(thing) or inspect.ismodule(thing):
        own = vars(thing).items()
        members = {
            n: v.fget if isinstance(v, property) else v
            for n, v in own
            if not n.startswith("_")
            and n not in INNER
            and (isinstance(v, property) or inspect.isfunction(v) or inspect.isclass(v))
            and getattr(v.fget if isinstance(v, property) else v, "__module__", "")
            == thing_module(thing)
        }
    assert [n for n, v in members.items() if not inspect.getdoc(v)] == []
    if last in PLAIN or last == "errors":
        return
    shown = [
        n
        for n, v in members.items()
        if re.search(rf"\b{n}\b", EXAMPLES) or ">>>" in (inspect.getdoc(v) or "")
    ]
    assert [n for n in members if n not in shown] == [], "show each in an example of docs/api"


def thing_module(thing: object) -> str:
    return thing.__name__ if inspect.ismodule(thing) else thing.__module__
