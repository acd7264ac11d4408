"""The store: one SQLite file of documents, their chunks, an index of words, and a vector for each text.

A chunk's vector is found by a digest of what was embedded, so that equal texts share one and a text that
moves keeps it. A document and its chunks change in one transaction: whoever reads sees it whole, whatever is
killed meanwhile.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, DeviceError, StateError

FORMAT = 1  # the file's; a later one is refused
APPLICATION = 0x746C6C64  # what SQLite's header names the file: "tlld"
TOKENIZER = "porter unicode61 remove_diacritics 2"  # how FTS5 finds words
WAIT = 60.0  # seconds for another process's transaction

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE collections (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE folders (
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    path BLOB NOT NULL,
    PRIMARY KEY (collection, path)
) WITHOUT ROWID;
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    collection INTEGER NOT NULL REFERENCES collections ON DELETE CASCADE,
    path BLOB NOT NULL,
    file TEXT NOT NULL,   -- its name within the folder, as it is shown
    size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
    seen INTEGER NOT NULL,   -- when it was read, in nanoseconds
    digest BLOB,
    title TEXT NOT NULL DEFAULT '', author TEXT NOT NULL DEFAULT '', date TEXT NOT NULL DEFAULT '',
    reason TEXT,   -- why it could not be read
    UNIQUE (collection, path)
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    number INTEGER NOT NULL,
    heading TEXT NOT NULL, text TEXT NOT NULL,
    page INTEGER, first_line INTEGER, last_line INTEGER,
    digest BLOB NOT NULL
);
CREATE INDEX chunks_of_documents ON chunks (document);
CREATE INDEX chunks_of_digests ON chunks (digest);
CREATE TABLE vectors (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL UNIQUE,
    codes BLOB NOT NULL
);
CREATE VIRTUAL TABLE words USING fts5(
    heading, text, content='chunks', content_rowid='id', tokenize='{TOKENIZER}'
);
CREATE TRIGGER chunk_comes AFTER INSERT ON chunks BEGIN
    INSERT INTO words (rowid, heading, text) VALUES (new.id, new.heading, new.text);
END;
CREATE TRIGGER chunk_goes AFTER DELETE ON chunks BEGIN
    INSERT INTO words (words, rowid, heading, text) VALUES ('delete', old.id, old.heading, old.text);
END;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {FORMAT};
COMMIT;
"""


class Store:
    """An open file. A connection serves one thread at a time; its owner sees to that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(
                path, timeout=WAIT, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"{path}: {error}") from error
        try:
            self._prepare()
        except BaseException:
            self.db.close()
            raise

    def _prepare(self) -> None:
        try:
            self.db.execute("PRAGMA foreign_keys = ON")
            self.db.create_function("fits", 2, fits, deterministic=True)
            if self._is_new():
                self.db.execute("PRAGMA journal_mode = WAL")
                self._create()
            application, version = self._pragma("application_id"), self._pragma("user_version")
        except sqlite3.DatabaseError as error:
            raise StateError(
                f"{self.path}: {error}; expected a file of tinyllm localdocs, or none"
            ) from error
        if application != APPLICATION:
            raise StateError(f"{self.path} is a database of another program; give another path")
        if version != FORMAT:
            raise StateError(
                f"{self.path} has format {version}, this version reads {FORMAT}; delete it and add the"
                " folders again, or use the version that wrote it"
            )
        self.db.execute(
            "PRAGMA synchronous = NORMAL"
        )  # with its log, a kill loses nothing of the whole

    def _pragma(self, name: str) -> Any:
        return self.one(f"PRAGMA {name}")

    def _is_new(self) -> bool:
        return self._pragma("user_version") == 0 and not self.one(
            "SELECT count(*) FROM sqlite_master"
        )

    def _create(self) -> None:
        try:
            self.db.executescript(SCHEMA)
        except sqlite3.OperationalError as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if "fts5" in str(error):
                raise DeviceError(
                    "this Python's SQLite lacks FTS5; use one built with it"
                ) from error
            if "already exists" not in str(error):  # else another process was faster
                raise

    def close(self) -> None:
        """Close the file; it can be used no more."""
        self.db.close()

    # ---- asking

    def one(self, sql: str, *values: Any) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self.db.execute(sql, values).fetchone()
        return None if row is None else row[0]

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows."""
        return self.db.execute(sql, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is stored when the block ends, or nothing."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def setting(self, name: str) -> str | None:
        """What was kept under a name."""
        found: str | None = self.one("SELECT value FROM settings WHERE name = ?", name)
        return found

    def keep(self, **values: str | int) -> None:
        """Keep values under their names; part of a transaction where one is open."""
        self.db.executemany(
            "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [(name, str(value)) for name, value in values.items()],
        )

    # ---- collections

    def collection(self, name: str) -> int:
        """A collection's number; ArgumentError for an unknown name."""
        found = self.one("SELECT id FROM collections WHERE name = ?", name)
        if found is None:
            known = ", ".join(
                repr(n) for (n,) in self.rows("SELECT name FROM collections ORDER BY name")
            )
            raise ArgumentError(
                f"there is no collection {name!r:.60}; there are: {known or 'none yet'}"
            )
        return int(found)

    def waits(self) -> bool:
        """Whether a text has no vector yet, by the chunks themselves."""
        texts = "SELECT 1 FROM chunks c WHERE NOT EXISTS"
        found = self.one(f"{texts} (SELECT 1 FROM vectors v WHERE v.digest = c.digest) LIMIT 1")
        return found is not None

    def pending(self, collection: int | None = None) -> tuple[int, int]:
        """How many texts of a collection, or of all, have no vectors yet, and how many there are."""
        texts = "SELECT count(DISTINCT c.digest) FROM chunks c"
        values = []
        if collection is not None:
            texts += " JOIN documents d ON d.id = c.document AND d.collection = ?"
            values.append(collection)
        without = " WHERE NOT EXISTS (SELECT 1 FROM vectors v WHERE v.digest = c.digest)"
        # counting takes seconds in a large store, and most are known to be whole
        n = 0 if self.setting("pending") == "0" else self.one(texts + without, *values)
        return n, self.one(texts, *values) if n else 0

    def forget(self, documents: list[int]) -> None:
        """Take documents out, with their chunks; part of a transaction."""
        self.db.executemany("DELETE FROM chunks WHERE document = ?", [(d,) for d in documents])
        self.db.executemany("DELETE FROM documents WHERE id = ?", [(d,) for d in documents])
        if documents:
            self.keep(garbage=1)

    def collect_garbage(self) -> None:
        """Take out the vectors that no chunk has any more."""
        if self.setting("garbage") != "1":
            return
        with self.writing() as db:
            gone = db.execute(
                "DELETE FROM vectors WHERE NOT EXISTS"
                " (SELECT 1 FROM chunks WHERE chunks.digest = vectors.digest)"
            ).rowcount
            if gone:
                self.keep(removals=int(self.setting("removals") or 0) + 1)
            self.keep(garbage=0)

    # ---- checking

    def problems(self) -> list[str]:
        """What is inconsistent; nothing in a store that is whole. Vectors may be missing, none may be wrong."""
        found = [str(row[0]) for row in self.rows("PRAGMA integrity_check") if row[0] != "ok"]
        found += [
            f"{row[0]} row {row[1]} refers to nothing"
            for row in self.rows("PRAGMA foreign_key_check")
        ]
        try:
            with self.writing() as db:
                db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        except sqlite3.DatabaseError as error:
            found.append(f"the index of words differs from the chunks: {error}")
        for sql, what in CHECKS.items():
            found += [f"{what}: {row[0]}" for row in self.rows(sql)]
        return found


def fits(name: str, pattern: str) -> bool:
    """Whether a file's name fits a pattern, in capitals or not.

    A pattern without a slash is for the last part of the name: ``*.md`` and ``tea.*`` fit "garden/tea.md".
    """
    name, pattern = plain(name), plain(pattern)
    return compiled(pattern).match(name if "/" in pattern else name.rpartition("/")[2]) is not None


def plain(name: str) -> str:
    """A name in small letters, with slashes, and its accents as one system or another writes them."""
    return unicodedata.normalize("NFC", name.casefold()).replace(os.sep, "/")


@lru_cache(16)
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression."""
    return re.compile(fnmatch.translate(pattern))


CHECKS = {
    "SELECT document FROM chunks GROUP BY document HAVING count(*) != max(number) + 1 OR min(number) != 0": (
        "a document with gaps among its chunks"
    ),
    "SELECT file FROM documents d WHERE reason IS NULL"
    " AND NOT EXISTS (SELECT 1 FROM chunks WHERE document = d.id)": (
        "a document that was read and has no chunks"
    ),
    "SELECT file FROM documents d WHERE reason IS NOT NULL"
    " AND EXISTS (SELECT 1 FROM chunks WHERE document = d.id)": (
        "a document that was not read and has chunks"
    ),
    "SELECT id FROM vectors WHERE length(codes) != (SELECT value FROM settings WHERE name = 'row_bytes')": (
        "a vector of another length than the others"
    ),
    "SELECT v.id FROM vectors v WHERE NOT EXISTS (SELECT 1 FROM chunks c WHERE c.digest = v.digest)"
    " AND coalesce((SELECT value FROM settings WHERE name = 'garbage'), '0') != '1'": (
        "a vector without a chunk"
    ),
}
