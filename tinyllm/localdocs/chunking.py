"""Sections of a document, and the chunks that they are cut into, each with its place."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SIZE = 800  # characters of a chunk at most: some 200 tokens, what small embedding models read best
OVERLAP = 120  # characters that a chunk may repeat of the one before
LONG_HEADING = 200

PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
SENTENCE = re.compile(r"(?<=[.!?;:。！？])\s+|\r?\n|(?<=[。！？])")
WORD = re.compile(r"\s+")


@dataclass(frozen=True)
class Section:
    """A stretch of text under one heading; ``line`` is its first line in the file, or on the page."""

    text: str
    headings: tuple[str, ...] = ()
    page: int | None = None
    line: int | None = None


@dataclass(frozen=True)
class Content:
    """A document as it was read."""

    sections: Sequence[Section]
    title: str = ""
    author: str = ""
    date: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: a stretch of its text, the headings above it, and where it stands."""

    text: str
    heading: str = ""
    page: int | None = None
    first_line: int | None = None
    last_line: int | None = None


@dataclass
class Cuts:
    """Where a text may be cut, the better places first; each list holds offsets in ascending order."""

    text: str
    places: list[array[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [
            array("q", (m.end() for m in pattern.finditer(self.text)))
            for pattern in (PARAGRAPH, SENTENCE, WORD)
        ]

    def before(self, start: int, limit: int) -> int:
        """The best place to end a chunk that begins at ``start``: in its second half, if there is one."""
        if len(self.text) <= limit:
            return len(self.text)
        for places in self.places:
            i = bisect_right(places, limit) - 1
            if i >= 0 and places[i] > start + SIZE // 2:
                return places[i]
        return limit

    def overlap(self, start: int, end: int) -> int:
        """Where the next chunk begins: at the last sentences before ``end`` that are short enough."""
        sentences = self.places[1]
        i = bisect_right(sentences, max(end - OVERLAP, start + 1))
        return sentences[i] if i < len(sentences) and sentences[i] < end else end


def chunks(content: Content) -> Iterator[Chunk]:
    """The chunks of a document, in order: none crosses a heading or a page, none is longer than SIZE.

    Neighbours overlap by whole sentences or lines, where these are short.
    """
    for section in content.sections:
        text, cuts = section.text, Cuts(section.text)
        heading = " > ".join(" ".join(h.split()) for h in section.headings)[:LONG_HEADING]
        start, counted, line = 0, 0, section.line
        while start < len(text):
            end = cuts.before(start, start + SIZE)
            piece = text[start:end]
            inner = piece.strip()
            if inner:
                first = last = None
                if line is not None:
                    at = start + piece.index(inner)
                    line += text.count("\n", counted, at)
                    counted, first = at, line
                    last = first + inner.count("\n")
                yield Chunk(inner, heading, section.page, first, last)
            if end >= len(text):
                break
            start = cuts.overlap(start, end)


def embedded_text(title: str, chunk: Chunk) -> str:
    """What is embedded of a chunk: a stretch alone may not say what it is about."""
    above = [part for part in (title, chunk.heading) if part]
    if len(above) == 2 and above[1].startswith(above[0]):
        del above[0]
    return "\n".join([": ".join(above), chunk.text]) if above else chunk.text
