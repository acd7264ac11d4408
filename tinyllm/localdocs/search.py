"""Search by words and by meaning together."""

from __future__ import annotations

import math
import os
import re
import sqlite3
from collections.abc import Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..model import Model
from .embedding import Embedder, unpack
from .store import TOKENIZER, Store
from .vectors import Vectors

NEAREST = 60  # candidates of each kind
RECIPROCAL = (
    60  # a hit of rank r gets 1 / (RECIPROCAL + r); Cormack, Clarke and Buettcher, SIGIR 2009
)
RERANKED = 30  # candidates that a reranker reads
COMMON = 20_000  # a word in more chunks tells too little for what reading its list takes
MOST_WORDS = 32

UNSPACED = (
    re.compile(  # Thai to Burmese, Khmer, kana and Chinese characters: no spaces between words
        "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
        "\U00020000-\U0003ffff]"
    )
)
LEFT_OUT = frozenset(
    "a about after all also am an and any are as at be been before being but by can could did do"
    " does doing for from had has have having he her here hers him his how i if in into is it its"
    " just me more most my no nor not of on or our out over own she should so some such than that"
    " the their them then there these they this those through to too under until up very was we were"
    " what when where which while who whom whose why will with would you your tell say says give me".split()
)


@dataclass(frozen=True)
class Hit:
    """A chunk that was found.

    Attributes
    ----------
    file, collection : str
        The file's name within its folder, and the collection that holds it.
    text : str
        The chunk.
    title, heading, author, date : str
        The document's title, the headings above the chunk, who wrote it and when, "" where unknown.
    page, first_line, last_line : int or None
        Its place.
    score : float
        Larger is better: a sum of reciprocal ranks, or what the reranker said.
    similarity : float
        The cosine between the question and the chunk.
    words : float
        The share of the question's words that stand in the chunk or the headings above it, from 0 to 1; rare
        words weigh more, words such as "the" nothing. Of Chinese, Japanese and other scripts without spaces,
        pairs of characters count instead.
    path : str
        The whole path.
    """

    file: str
    collection: str
    text: str
    title: str
    heading: str
    author: str
    date: str
    page: int | None
    first_line: int | None
    last_line: int | None
    score: float
    similarity: float
    words: float
    path: str

    @property
    def nearness(self) -> float:
        """The similarity, up to twice as much where the chunk holds the question's words."""
        return self.similarity + max(self.similarity, 0.0) * self.words

    @property
    def place(self) -> str:
        """The file, with the page and the lines."""
        where = [self.file]
        if self.page is not None:
            where.append(f"page {self.page}")
        if self.first_line is not None:
            one = self.first_line == self.last_line
            where.append(
                f"line {self.first_line}" if one else f"lines {self.first_line} to {self.last_line}"
            )
        return ", ".join(where)

    def reference(self) -> dict[str, Any]:
        """GPT4All's form of a reference; it has -1 for a number that is not known."""
        known = (-1 if n is None else n for n in (self.page, self.first_line, self.last_line))
        page, first, last = known
        return {
            "file": self.file, "title": self.title, "author": self.author, "date": self.date,
            "text": self.text, "page": page, "from": first, "to": last,
        }  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """Which chunks count; all where nothing is given."""

    collections: str | Sequence[str] | None = None
    file: str | None = None  # a pattern with * and ?
    since: str | None = None  # dates, "2026-01-31" or their beginnings
    until: str | None = None

    def sql(self, store: Store) -> tuple[str, list[Any]]:
        """A condition on ``documents d``, and its values; "" for all.

        Raises
        ------
        ArgumentError
            What is given is of a wrong type, names no collection or is no date.
        """
        parts: list[str] = []
        values: list[Any] = []
        chosen = set(map(store.collection, named(self.collections)))
        if chosen and len(chosen) < store.one("SELECT count(*) FROM collections"):
            parts.append(f"d.collection IN ({', '.join('?' * len(chosen))})")
            values += sorted(chosen)
        for what, sql in (
            ("file", "fits(d.file, ?)"),
            ("since", "d.date >= ?"),
            ("until", "d.date <= ?"),
        ):
            if (value := getattr(self, what)) is not None:
                if what == "file" and not (isinstance(value, str) and value):
                    raise ArgumentError(f"file={value!r:.40}; expected a pattern such as '*.md'")
                if what != "file" and not is_date(value):
                    raise ArgumentError(
                        f"{what}={value!r:.40}; expected a date such as '2026-01-31', or '2026'"
                    )
                parts.append(sql)
                values.append(
                    value + "~" * (what == "until")
                )  # behind all days of a month or a year
        return " AND ".join(parts), values


def named(collections: object) -> Sequence[str]:
    """Names of collections; none where None is given, which means all."""
    if collections is None:
        return ()
    names = [collections] if isinstance(collections, str) else collections
    if isinstance(names, Sequence | Set) and names and all(isinstance(n, str) for n in names):
        return list(names)
    raise ArgumentError(
        f"collections={collections!r:.60}; expected a name or names; leave it out for all collections"
    )


def is_date(value: object) -> bool:
    """Whether this is a day, a month or a year that there is: "2026-01-31", "2026-01" or "2026"."""
    if not isinstance(value, str) or not re.fullmatch("[0-9]{4}(-[0-9]{2}){0,2}", value):
        return False
    try:
        date.fromisoformat((value + "-01-01")[:10])
    except ValueError:
        return False
    return True


def search(
    store: Store,
    vectors: Vectors,
    embedder: Embedder,
    query: str,
    k: int,
    chosen: Filter,
    reranker: Model | None = None,
) -> list[Hit]:
    """The best k chunks, best first."""
    where, values = chosen.sql(store)
    target = embedder.query(query)
    vectors.refresh()
    allowed = vectors.allowed(where, values) if where else None
    near, _ = vectors.best(target, NEAREST, allowed)
    counted = counts(store, query)
    worded = by_words(store, counted, where, values)
    found = candidates(store, near, worded, where, values)
    similarity = similarities(found, target)
    scores = reciprocal_ranks(found, similarity, worded)
    order = sorted(found, key=lambda c: (-scores[c], c))
    if reranker is not None:
        order = order[:RERANKED]
        said = reranker.rank(query, [found[c]["text"] for c in order])
        scores = {c: float(s) for c, s in zip(order, said, strict=True)}
        order.sort(key=lambda c: (-scores[c], c))
    order = order[:k]
    texts = {c: (found[c]["heading"], found[c]["text"]) for c in order}
    shares = shares_of_words(counted, texts, len(vectors))
    return [hit_of(found[c], scores[c], similarity[c], shares[c]) for c in order]


def counts(store: Store, query: str) -> dict[str, int]:
    """The words of a query, and how many chunks hold each, up to one more than ``COMMON``."""
    words = dict.fromkeys(w.lower() for w in re.findall(r"\w+", query))
    told = [w for w in words if w not in LEFT_OUT] or list(words)
    sql = "SELECT count(*) FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?)"
    return {word: store.one(sql, f'"{word}"', COMMON + 1) for word in told[:MOST_WORDS]}


def by_words(store: Store, counted: dict[str, int], where: str, values: Sequence[Any]) -> list[int]:
    """Chunks that hold counted words, best first by BM25; headings count twice."""
    rare: list[str] = []
    total = 0
    for word, n in sorted(counted.items(), key=lambda item: (item[1], item[0])):
        total += n
        if n and total <= COMMON:
            rare.append(f'"{word}"')
    if not rare:
        return []
    condition = f"AND {where}" if where else ""
    join = (
        "JOIN chunks c ON c.id = words.rowid JOIN documents d ON d.id = c.document" if where else ""
    )
    rows = store.rows(
        f"SELECT words.rowid FROM words {join} WHERE words MATCH ? {condition}"
        " ORDER BY bm25(words, 2.0, 1.0), words.rowid LIMIT ?",
        " OR ".join(rare), *values, NEAREST,
    )  # fmt: skip
    return [i for (i,) in rows]


def shares_of_words(
    counted: dict[str, int], texts: dict[int, tuple[str, str]], n: int
) -> dict[int, float]:
    """How much of a query's words each text holds, of 1; a word of few of the store's n texts weighs more.

    A text is (heading, text). Where a script has no spaces, a run of it counts by its pairs of characters.
    """
    weights = {
        word: math.log((max(n, found) + 1) / (found + 0.5))
        for word, found in counted.items()
        if found <= COMMON and word not in LEFT_OUT
    }
    whole = sum(weights.values())
    held = dict.fromkeys(texts, 0.0)
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE VIRTUAL TABLE words USING fts5(heading, text, tokenize='{TOKENIZER}')")
        db.executemany("INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)",
                       ((i, *text) for i, text in texts.items()))  # fmt: skip
        for word, weight in weights.items():
            if UNSPACED.search(word):
                pairs = {word[i : i + 2] for i in range(max(1, len(word) - 1))}
                for i, text in texts.items():
                    lower = " ".join(text).lower()
                    held[i] += weight * sum(pair in lower for pair in pairs) / len(pairs)
            elif counted[word]:
                sql = "SELECT rowid FROM words WHERE words MATCH ?"
                for (i,) in db.execute(sql, (f'"{word}"',)):
                    held[i] += weight
    return {i: min(1.0, h / whole) if whole else 0.0 for i, h in held.items()}


COLUMNS = (
    "c.id, c.text, c.heading, c.page, c.first_line, c.last_line, d.file, d.title, d.author, d.date, d.path,"
    " s.name AS collection, v.codes"
)
ABOUT = "JOIN documents d ON d.id = c.document JOIN collections s ON s.id = d.collection"
NEAR = f"vectors v JOIN chunks c ON c.digest = v.digest {ABOUT}"
WORDED = f"chunks c {ABOUT} LEFT JOIN vectors v ON v.digest = c.digest"


def candidates(
    store: Store, near: np.ndarray, worded: list[int], where: str, values: Sequence[Any]
) -> dict[int, dict[str, Any]]:
    """The rows of chunks by their numbers: those of near vectors, and those with the words.

    Of chunks with one text, and so one vector, the first ``NEAREST`` count: some repeat a line for ever.
    """
    condition = f" AND {where}" if where else ""
    found: dict[int, dict[str, Any]] = {}
    asked = [(NEAR, "v.id", int(i)) for i in near] + [(WORDED, "c.id", i) for i in worded]
    for tables, column, number in asked:
        cursor = store.db.execute(
            f"SELECT {COLUMNS} FROM {tables} WHERE {column} = ?{condition} ORDER BY c.id LIMIT {NEAREST}",
            [number, *values],
        )
        names = [name for name, *_ in cursor.description]
        found |= {row[0]: dict(zip(names, row, strict=True)) for row in cursor}
    return found


def similarities(found: dict[int, dict[str, Any]], target: np.ndarray) -> dict[int, float]:
    """Cosines, with the query's numbers as they are; 0 for a chunk that is not embedded yet."""
    embedded = [c for c, row in found.items() if row["codes"] is not None]
    similarity = dict.fromkeys(found, 0.0)
    if embedded:
        rows = unpack([found[c]["codes"] for c in embedded], len(target))
        products = np.einsum("ij,j->i", rows.astype(np.float64), target.astype(np.float64))
        similarity |= dict(zip(embedded, map(float, products), strict=True))
    return similarity


def reciprocal_ranks(
    found: dict[int, dict[str, Any]], similarity: dict[int, float], worded: list[int]
) -> dict[int, float]:
    """Scores: what the rank by meaning and the rank by words give, added up."""
    scores = dict.fromkeys(found, 0.0)
    near = sorted(
        (c for c in found if found[c]["codes"] is not None), key=lambda c: (-similarity[c], c)
    )
    for order in (near, [c for c in worded if c in found]):
        for rank, c in enumerate(order, 1):
            scores[c] += 1 / (RECIPROCAL + rank)
    return scores


def hit_of(row: dict[str, Any], score: float, similarity: float, words: float) -> Hit:
    """A row as a hit."""
    return Hit(
        row["file"], row["collection"], row["text"], row["title"], row["heading"], row["author"],
        row["date"], row["page"], row["first_line"], row["last_line"], score, similarity, words,
        os.fsdecode(row["path"]),
    )  # fmt: skip
