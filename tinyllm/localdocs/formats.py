"""What is read of a file of each kind: its sections, title, author and date. No function opens a file."""

from __future__ import annotations

import codecs
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from .chunking import Content, Section

UNPACKED = 256 << 20  # bytes of an archive's files, all together
PART = 64 << 20  # bytes of one of them
TEXT = 16 << 20  # characters of a document's text
PARTS = 10_000  # files of an archive
PAGES = 20_000

SOURCES = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .cu .cl .java .kt .scala .js .mjs .cjs .ts .tsx .jsx .go .rs .rb .php"
    " .cs .swift .m .mm .lua .pl .r .jl .sh .bash .zsh .ps1 .sql .hs .ml .ex .exs .erl .clj .lisp .el .vim .zig"
    " .nim .dart .f90 .f95 .asm .s .proto .graphql .css .scss .toml .yaml .yml .ini .cfg .xml .tex .cmake"
).split()


class Unreadable(Exception):
    """A file of which no text can be had; the message is the reason."""


def text_of(data: bytes, most: int = TEXT) -> str:
    """The text of a file, of at most so many characters: UTF-8, or UTF-16 with its mark."""
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data[: 1 << 20]:
        raise Unreadable("it holds zero bytes: no text")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is no text in UTF-8 (byte {error.start}); convert it") from None
    check_length(len(text), most)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def plain(data: bytes) -> Content:
    """A text without marks of structure."""
    return Content([Section(text_of(data), line=1)])


# ---- texts with headings

LONG = 400  # characters from which a line is no heading, and not searched for the marks of one
FENCE = re.compile(r" {0,3}(```+|~~~+)")
ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
RST = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*$")


def sectioned(
    lines: list[str], headings: dict[int, tuple[int, str]], page: int | None = None
) -> list[Section]:
    """Sections of a text whose headings, by the number of their line, have a level and a name."""
    found, path = [], dict[int, str]()
    starts = sorted({0, *headings})
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        if start in headings:
            level, name = headings[start]
            path = {k: v for k, v in path.items() if k < level} | {level: name}
        text = "\n".join(lines[start:stop])
        if text.strip():
            found.append(Section(text, tuple(path.values()), page, start + 1))
    return found


def markdown_headings(lines: list[str]) -> dict[int, tuple[int, str]]:
    """Headings of Markdown outside of fenced code, by line."""
    found: dict[int, tuple[int, str]] = {}
    fence = ""
    for i, line in enumerate(lines):
        if len(line) > LONG:
            continue
        if mark := FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
        elif fence:
            continue
        elif m := ATX.match(line):
            found[i] = len(m[1]), m[2] or ""
        elif i and (m := SETEXT.match(line)) and lines[i - 1].strip() and i - 1 not in found:
            if not lines[i - 1].lstrip().startswith(("-", "*", ">", "|", "#")):
                found[i - 1] = 1 if m[1][0] == "=" else 2, lines[i - 1].strip()
    return found


def first_title(headings: dict[int, tuple[int, str]]) -> str:
    """The first heading, if it is of the highest level among all."""
    if not headings:
        return ""
    level, name = headings[min(headings)]
    return name if level == min(n for n, _ in headings.values()) else ""


def markdown(data: bytes) -> Content:
    """Markdown, by its headings."""
    lines = text_of(data).split("\n")
    headings = markdown_headings(lines)
    return Content(sectioned(lines, headings), first_title(headings))


def restructured(data: bytes) -> Content:
    """reStructuredText: a line of punctuation below a line, perhaps above it too, makes a heading."""
    lines = text_of(data).split("\n")
    headings: dict[int, tuple[int, str]] = {}
    levels: list[tuple[str, bool]] = []
    for i in range(1, len(lines)):
        if max(len(lines[i - 1]), len(lines[i])) > LONG:
            continue
        name, mark = lines[i - 1].rstrip(), RST.match(lines[i])
        if mark and name and not RST.match(name) and len(lines[i].rstrip()) >= len(name.strip()):
            over = i > 1 and lines[i - 2].rstrip() == lines[i].rstrip()
            kind = mark[1], over
            if kind not in levels:
                levels.append(kind)
            headings[i - 1 - over] = levels.index(kind) + 1, name.strip()
    return Content(sectioned(lines, headings), first_title(headings))


DEFINES = re.compile(
    r"( {0,4}|\t)(?:export |default |pub(?:\([a-z]+\))? |public |private |protected |static |final |abstract "
    r"|async |inline |const |unsafe |extern )*(?:def|class|function|func|fn|struct|enum|trait|impl|interface"
    r"|type|module|namespace|procedure|sub|CREATE TABLE|message|service)\b[^=\n]*"
)


def source_code(data: bytes) -> Content:
    """A program, cut where definitions begin."""
    lines = text_of(data).split("\n")
    headings = {
        i: (1 + bool(m[1]), line.strip().rstrip("{:").strip()[:120])
        for i, line in enumerate(lines)
        if len(line) <= LONG and (m := DEFINES.match(line))
    }
    return Content(sectioned(lines, headings))


def table(data: bytes) -> Content:
    """Comma-separated values: the first line, which names the columns, stands above all others."""
    head, _, rest = text_of(data).partition("\n")
    if not rest.strip():
        return Content([Section(head, line=1)])
    return Content([Section(rest, (head,), line=2)])


def json_text(data: bytes) -> Content:
    """JSON as it is written; it is not interpreted."""
    return plain(data)


def notebook(data: bytes) -> Content:
    """A notebook's cells; a cell's number is its page. What cells printed is left out, and so are odd cells."""
    try:
        found = json.loads(text_of(data, len(data)))  # pictures are left out
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no notebook ({type(error).__name__})") from None
    sections: list[Section] = []
    path: tuple[str, ...] = ()
    title = ""
    for number, cell in enumerate(cells_of(found), 1):
        kind, source = kind_and_source(cell)
        lines = source.split("\n")
        if kind != "markdown":
            sections.append(Section(source, path, number, 1))
            continue
        headings = markdown_headings(lines)
        title = title or first_title(headings)
        own = sectioned(lines, headings, number)
        sections += [Section(s.text, s.headings or path, number, s.line) for s in own]
        path = own[-1].headings or path if own else path
    return Content(sections, title)


def cells_of(found: object) -> list[Any]:
    """The cells of a notebook; before format 4 they stood in worksheets."""
    sheets: Any = [found]
    if isinstance(found, dict) and "cells" not in found:
        sheets = found.get("worksheets")
    if not isinstance(sheets, list):
        sheets = [None]
    lists: list[Any] = [s.get("cells") if isinstance(s, dict) else None for s in sheets]
    if not all(isinstance(cells, list) for cells in lists):
        raise Unreadable('it is no notebook: it has no list of "cells"')
    return [cell for cells in lists for cell in cells]


def kind_and_source(cell: Any) -> tuple[str, str]:
    """What a cell is, and its text; an odd cell has none."""
    if not isinstance(cell, dict):
        return "", ""
    source = cell.get("source", cell.get("input"))  # "input": code, before format 4
    lines = [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return "", ""
    text = "".join(lines)
    if cell.get("cell_type") == "heading":  # before format 4
        level = cell.get("level")
        return (
            "markdown",
            f"{'#' * level if isinstance(level, int) and 0 < level < 7 else '#'} {text}",
        )
    return str(cell.get("cell_type")), text


# ---- HTML

HEADING_TAGS = {f"h{i}": i for i in range(1, 7)}
LEFT_OUT = ("script", "style", "noscript", "template", "svg", "nav", "iframe", "object", "head")
BLOCKS = {
    "p", "li", "dt", "dd", "pre", "blockquote", "tr", "figcaption", "div", "section", "article", "table", "ul",
    "ol", "br", "hr", "main", "header", "footer", "body", "details", "summary", "td", "th",
}  # fmt: skip


def html(data: bytes) -> Content:
    """A web page: its headings, and the text between them."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(data)
    title = " ".join(t.text().split()) if (t := tree.css_first("title")) else ""
    author = tree.css_first('meta[name="author"]')
    date = tree.css_first('meta[name="date"], meta[property="article:published_time"]')
    named = [((n.attributes or {}).get("content") or "") if n else "" for n in (author, date)]
    tree.strip_tags(list(LEFT_OUT))
    lines: list[str] = [""]
    headings: dict[int, tuple[int, str]] = {}
    if tree.body is not None:
        for node in tree.body.traverse(include_text=True):
            tag = node.tag
            if tag == "-text":
                text = node.text(deep=False) or ""
                kept = (
                    text
                    if (node.parent and node.parent.tag == "pre")
                    else re.sub(r"\s+", " ", text)
                )
                first, *more = kept.split("\n")
                lines[-1] += first
                lines += more
            elif tag in HEADING_TAGS:
                lines += ["", ""]
                headings[len(lines) - 1] = HEADING_TAGS[tag], " ".join(node.text().split())
            elif tag in ("td", "th"):
                lines[-1] += " | " if lines[-1].strip() else ""
            elif tag in BLOCKS:
                lines += ["", ""] if tag in ("p", "pre", "table") else [""]
    lines = [line.strip() for line in lines]
    found = [
        Section(re.sub(r"\n{3,}", "\n\n", s.text), s.headings) for s in sectioned(lines, headings)
    ]
    return Content(found, title or first_title(headings), *named)


# ---- archives and pages


def check_archive(data: bytes) -> None:
    """Refuse an archive that unpacks to more than a document has."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [info.file_size for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Unreadable(f"it is no .docx: {error}") from None
    for what, n, most in [
        ("MB", sum(sizes) / 1e6, UNPACKED / 1e6),
        ("MB in one of its files", max(sizes, default=0) / 1e6, PART / 1e6),
        ("files", len(sizes), PARTS),
    ]:
        if n > most:
            raise Unreadable(f"it unpacks to {n:.0f} {what}; at most {most:.0f} are read")


def docx(data: bytes) -> Content:
    """A Word document: its headings, paragraphs and tables; lines are paragraphs."""
    import docx as word
    from docx.table import Table

    check_archive(data)
    document = word.Document(io.BytesIO(data))
    lines: list[str] = []
    headings: dict[int, tuple[int, str]] = {}
    for part in document.iter_inner_content():
        if isinstance(part, Table):
            for row in part.rows:
                lines.append(" | ".join(" ".join(cell.text.split()) for cell in row.cells))
            continue
        name = (part.style.name or "") if part.style is not None else ""
        if (m := re.fullmatch(r"Heading (\d)", name)) or name == "Title":
            headings[len(lines)] = int(m[1]) if m else 0, part.text
        lines.append(part.text)
        check_length(sum(map(len, lines[-1:])))
    about = document.core_properties
    when = about.modified or about.created
    title = about.title or first_title(headings)
    found = [Section(s.text.replace("\n", "\n\n"), s.headings) for s in sectioned(lines, headings)]
    return Content(found, title, about.author or "", when.date().isoformat() if when else "")


def pdf(data: bytes) -> Content:
    """A PDF's pages."""
    import logging

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Unreadable("it is encrypted")
    sections, length = [], 0
    for number, page in enumerate(reader.pages, 1):
        if number > PAGES:
            raise Unreadable(f"it has more than {PAGES} pages")
        text = page.extract_text()
        length += len(text)
        check_length(length)
        sections.append(Section(text, (), number, 1))
    if not any(s.text.strip() for s in sections):
        raise Unreadable("its pages have no text: pictures of pages, perhaps")
    about = reader.metadata
    try:
        when = about.modification_date or about.creation_date if about else None
    except ValueError:
        when = None
    title, author = (str(about.title or ""), str(about.author or "")) if about else ("", "")
    return Content(sections, title, author, when.date().isoformat() if when else "")


def check_length(n: int, most: int = TEXT) -> None:
    """Refuse a document whose text is too long."""
    if n > most:
        raise Unreadable(f"its text is longer than {most >> 20} M characters")


READERS: dict[str, Callable[[bytes], Content]] = {
    ".txt": plain, ".text": plain, ".log": plain, ".md": markdown, ".markdown": markdown,
    ".rst": restructured, ".html": html, ".htm": html, ".xhtml": html, ".pdf": pdf, ".docx": docx,
    ".csv": table, ".tsv": table, ".json": json_text, ".jsonl": json_text, ".ipynb": notebook,
    **dict.fromkeys(SOURCES, source_code),
}  # fmt: skip
APART = frozenset((".html", ".htm", ".xhtml", ".pdf", ".docx"))
"""Kinds that libraries read: in a process of their own, with little memory and little time."""


def read(data: bytes, suffix: str) -> Content:
    """The content of a file of a kind of ``READERS``.

    Raises
    ------
    Unreadable
        With the reason.
    """
    content = READERS[suffix](data)
    check_length(sum(len(s.text) for s in content.sections))
    if not any(s.text.strip() for s in content.sections):
        raise Unreadable("it has no text")
    return Content(
        list(map(cleaned, content.sections)),
        *map(one_line, (content.title, content.author, content.date)),
    )


def cleaned(section: Section) -> Section:
    """A section without lone surrogates and zero bytes, which no database keeps."""
    text = section.text
    if not (text.isprintable() and text.isascii()):
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    heads = tuple(one_line(h) for h in section.headings)
    return Section(text, heads, section.page, section.line)


def one_line(text: str) -> str:
    """A title or a name on one line, of a length that can be shown."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
    return " ".join(clean.split())[:300]


def as_json(content: Content) -> dict[str, Any]:
    """A content as it goes from process to process."""
    return {
        "about": [content.title, content.author, content.date],
        "sections": [[s.text, s.headings, s.page, s.line] for s in content.sections],
    }


def from_json(found: dict[str, Any]) -> Content:
    """The content that ``as_json`` told."""
    sections: Iterator[Section] = (Section(t, tuple(h), p, n) for t, h, p, n in found["sections"])
    return Content(list(sections), *found["about"])
