"""The sentences of documents that are nearest to a question: answers in the documents' own words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .chunking import SENTENCE, Chunk, embedded_text
from .embedding import Embedder
from .search import Hit, counts, shares_of_words
from .store import Store

SHORT = 60  # characters: what has fewer, such as a heading, is one with what comes next
HEADING = re.compile(r"#{1,6} .*")
# a full stop of Chinese or Japanese ends a sentence however short it is: it stands in no abbreviation
WHOLE = re.compile(r"[。！？][。！？」』）】》”’]*$")
CLOSING = re.compile(r"[。！？」』）】》”’]*")  # what may stand behind one, and belongs to it
INITIAL = re.compile(r"(?:^|[\s(.])\w\.$")


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end: all of it but the spaces between them."""
    found: list[tuple[int, int]] = []
    for begin, end in pieces(text):
        if found:
            first, last = found[-1]
            short = last - first < SHORT or INITIAL.search(text, first, last)
            if (short and not ends(text, first, last)) or text[begin].islower():
                begin = found.pop()[0]
        found.append((begin, end))
    if len(found) > 1 and found[-1][1] - found[-1][0] < SHORT // 2 and not ends(text, *found[-1]):
        _, end = found.pop()
        found[-1] = found[-1][0], end
    return found


def ends(text: str, first: int, last: int) -> bool:
    """Whether a stretch of a text ends as a sentence of Chinese or Japanese does."""
    return WHOLE.search(text, first, last) is not None


def pieces(text: str) -> Iterator[tuple[int, int]]:
    """What stands between the places where a sentence may end."""
    at = 0
    for cut in [*(m.span() for m in SENTENCE.finditer(text)), (len(text), len(text))]:
        stop, after = cut
        if stop == after and (closing := CLOSING.match(text, stop)):
            stop = after = closing.end()
        inner = text[at:stop].strip()
        if inner:
            begin = text.index(inner, at)
            yield begin, begin + len(inner)
        at = max(at, after)


def parts_of(hit: Hit) -> Iterator[Hit]:
    """A hit for each sentence of one but headings alone, with its lines."""
    for begin, end in sentences(hit.text):
        if HEADING.fullmatch(hit.text, begin, end):
            continue
        first = last = None
        if hit.first_line is not None:
            first = hit.first_line + hit.text.count("\n", 0, begin)
            last = first + hit.text.count("\n", begin, end)
        yield replace(hit, text=hit.text[begin:end], first_line=first, last_line=last)


def nearest_sentences(
    store: Store, embedder: Embedder, question: str, hits: Sequence[Hit], k: int
) -> list[Hit]:
    """The k sentences of some hits that are nearest to a question, nearest first.

    Within chunks that are near, the question's words tell more than cosines do: the sum of both finds more
    answers than ``Hit.nearness``.
    """
    found = {(part.path, part.text): part for hit in hits for part in parts_of(hit)}
    parts = list(found.values())
    if not parts:
        return []
    texts = [embedded_text(p.title or p.file, Chunk(p.text, p.heading)) for p in parts]
    similarity = embedder.documents(texts) @ embedder.query(question)
    n = store.one("SELECT count(*) FROM vectors")
    both = {i: (p.heading, p.text) for i, p in enumerate(parts)}
    words = shares_of_words(counts(store, question), both, n)
    for i, part in enumerate(parts):
        near = float(similarity[i])
        parts[i] = replace(part, similarity=near, words=words[i], score=near + words[i])
    chosen: list[Hit] = []
    for part in sorted(parts, key=lambda p: -p.score):
        # chunks that overlap may cut the same lines differently
        if len(chosen) < k and not any(hold_alike(part, other) for other in chosen):
            chosen.append(part)
    return chosen


def hold_alike(a: Hit, b: Hit) -> bool:
    """Whether one of two parts of documents holds the other."""
    return a.path == b.path and (a.text in b.text or b.text in a.text)
