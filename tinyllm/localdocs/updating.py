"""Bringing a collection up to date with its folders: what is new, what has changed, what has gone."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ..engine.progress import bar
from .chunking import Chunk, Content, chunks, embedded_text
from .embedding import Embedder, pack, row_bytes
from .formats import READERS, Unreadable
from .reading import FILE, Missing, Reader, bytes_of, kind_of
from .store import Store

LEFT_OUT = {b"__pycache__", b"node_modules", b"site-packages"}
AT_ONCE = 32  # files of a transaction
EMBEDDED = 256  # texts of one; what a kill can cost
# nanoseconds: a file this young when it was read may have changed since without a change of its times
RACY = 2_000_000_000
LATEST = (1 << 63) - 1  # nanoseconds: the year 2262; an archive may give a file a later time


@dataclass
class Report:
    """What an update did.

    Attributes
    ----------
    added, changed, removed, unchanged : int
        Numbers of files.
    embedded : int
        Texts whose vectors were computed.
    unreadable : list of (str, str)
        Files and folders that could not be read, and why.
    passed_over : dict of str to int
        How many files are of kinds that are not read, by their suffixes; "" for those without one. Hidden
        files are not counted.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether the store is another than before."""
        return bool(self.added or self.changed or self.removed or self.embedded)


@dataclass(frozen=True)
class Found:
    """A file of a folder, as the system describes it.

    ``reason``: why it is not even looked at; ``closed``: nothing is known of it or of what is below it.
    """

    path: bytes
    file: str
    size: int = 0
    mtime: int = 0
    ctime: int = 0
    reason: str = ""
    closed: bool = False

    @property
    def stamp(self) -> tuple[int, int, int]:
        return self.size, self.mtime, self.ctime


@dataclass(frozen=True)
class Known:
    """A file as the store has it."""

    number: int
    stamp: tuple[int, int, int]
    seen: int
    digest: bytes | None
    reason: str | None
    date: str


def shown(path: bytes) -> str:
    """A file's name as it can be printed: on one line, whatever its bytes are."""
    text = os.fsdecode(path)
    return "".join(c if c.isprintable() else escaped(c) for c in text)


def escaped(c: str) -> str:
    """A character that cannot be printed, by its number."""
    if "\udc80" <= c <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape", "backslashreplace").decode("ascii")


def scan(folder: bytes, passed: Counter[str]) -> Iterator[Found]:
    """Files of the kinds that are read, in a folder and those within; hidden ones are passed over.

    Files of other kinds are counted in ``passed``, by their suffixes.
    Links are not followed, and said to be links: they may lead in circles, or out of the folder.
    """
    todo = [folder]
    while todo:
        here = todo.pop()
        try:
            with os.scandir(here) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            name = shown(os.path.relpath(here, folder))
            yield Found(here, name, reason=error.strerror or "not read", closed=True)
            continue
        for entry in inside:
            if entry.name.startswith(b".") or entry.name in LEFT_OUT:
                continue
            name = shown(os.path.relpath(entry.path, folder))
            try:
                if entry.is_symlink():
                    if kind_of(entry.path) in READERS or entry.is_dir():
                        yield Found(entry.path, name, reason="it is a link; add what it leads to")
                elif entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                elif kind_of(entry.path) in READERS:
                    yield described(entry.path, name, entry.stat(follow_symlinks=False))
                else:
                    passed[shown(os.fsencode(kind_of(entry.path)))] += 1
            except OSError as error:
                yield Found(entry.path, name, reason=error.strerror or "not read", closed=True)


def described(path: bytes, name: str, status: os.stat_result) -> Found:
    """A file that was found, unless it is none or too large."""
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "it is no regular file"
    elif status.st_size > FILE:
        reason = f"it has {status.st_size / 1e6:.0f} MB; at most {FILE / 1e6:.0f} MB are read"
    return Found(path, name, status.st_size, *times(status), reason)


def times(status: os.stat_result) -> tuple[int, int]:
    """When a file and its entry were changed, in nanoseconds, as far as the store's whole numbers go."""
    return min(status.st_mtime_ns, LATEST), min(status.st_ctime_ns, LATEST)


def found_in(folders: Sequence[bytes], report: Report) -> tuple[dict[bytes, Found], list[bytes]]:
    """The files of all folders, and places that could not be looked into: what is known below them stays."""
    files: dict[bytes, Found] = {}
    closed: list[bytes] = []
    passed = Counter[str]()
    for folder in folders:
        if not os.path.isdir(folder):
            closed.append(folder)
            report.unreadable.append(
                (shown(folder), "there is no such folder; its documents are kept")
            )
            continue
        for item in scan(folder, passed):
            if item.closed:
                closed.append(item.path)
                report.unreadable.append((item.file, item.reason))
            else:
                files.setdefault(item.path, item)
    report.passed_over = dict(sorted(passed.items(), key=lambda item: (-item[1], item[0])))
    return files, closed


def update(store: Store, collection: int, reader: Reader) -> Report:
    """Read what has changed in the collection's folders; vectors come later, by ``embed``."""
    report = Report()
    folders = [
        p
        for (p,) in store.rows(
            "SELECT path FROM folders WHERE collection = ? ORDER BY path", collection
        )
    ]
    files, closed = found_in(folders, report)
    sql = "SELECT path, id, size, mtime, ctime, seen, digest, reason, date FROM documents WHERE collection = ?"
    known = {
        path: Known(number, (size, mtime, ctime), seen, digest, reason, date)
        for path, number, size, mtime, ctime, seen, digest, reason, date in store.rows(
            sql, collection
        )
    }
    gone = [
        k.number for path, k in known.items()
        if path not in files and not any(path == c or path.startswith(c + os.fsencode(os.sep)) for c in closed)
    ]  # fmt: skip
    for at in range(0, len(gone), 1000):
        with store.writing():
            store.forget(gone[at : at + 1000])
    report.removed = len(gone)
    todo = []
    for path, item in files.items():
        old = known.get(path)
        if old is not None and old.stamp == item.stamp and old.seen - max(item.stamp[1:]) > RACY:
            report.unchanged += 1
            if old.reason is not None:
                report.unreadable.append((item.file, old.reason))
        else:
            todo.append(item)
    for at in bar(range(0, len(todo), AT_ONCE), "reading", f"{AT_ONCE} files"):
        done = [read(reader, item, known.get(item.path)) for item in todo[at : at + AT_ONCE]]
        with store.writing() as db:
            for one in done:
                keep(store, db, collection, one, known.get(one.item.path), report)
    report.unreadable.sort()
    return report


@dataclass(frozen=True)
class Read:
    """A file that was read: its content, or why there is none. ``content`` None: as it was before."""

    item: Found
    seen: int
    digest: bytes | None = None
    content: Content | None = None
    reason: str | None = None


def read(reader: Reader, item: Found, old: Known | None) -> Read:
    """Read a file, unless its bytes are those that are known."""
    seen = time.time_ns()
    if item.reason:
        return Read(item, seen, reason=item.reason)
    digest = None
    try:
        data, status = bytes_of(item.path)
        item = Found(item.path, item.file, len(data), *times(status))
        digest = hashlib.sha256(data).digest()
        if old is not None and old.digest == digest:
            return Read(item, seen, digest, reason=old.reason)
        return Read(item, seen, digest, reader.read(data, kind_of(item.path)))
    except Missing as error:
        return Read(item, 0, None, reason=str(error))
    except Unreadable as error:
        return Read(item, seen, digest, reason=str(error))


def keep(
    store: Store,
    db: sqlite3.Connection,
    collection: int,
    one: Read,
    old: Known | None,
    report: Report,
) -> None:
    """Store what was read of a file, in the place of what was known of it; part of a transaction."""
    item = one.item
    if one.reason is not None:
        report.unreadable.append((item.file, one.reason))
    stamp = (*item.stamp, one.seen)
    if (
        old is not None
        and old.digest == one.digest
        and one.content is None
        and old.reason == one.reason
    ):
        dated = day(item.mtime) if old.date == day(old.stamp[1]) else old.date
        sql = "UPDATE documents SET size = ?, mtime = ?, ctime = ?, seen = ?, date = ? WHERE id = ?"
        db.execute(sql, (*stamp, dated, old.number))
        report.unchanged += 1
        return
    if old is None:
        report.added += one.content is not None
    else:
        report.changed += 1
        store.forget([old.number])
    content = one.content
    if content is not None:
        store.keep(pending=1)
    about = (content.title, content.author, content.date) if content else ("", "", "")
    date = about[2] or day(item.mtime)
    number = db.execute(
        "INSERT INTO documents (collection, path, file, size, mtime, ctime, seen, digest, title, author,"
        " date, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (collection, item.path, item.file, *stamp, one.digest, *about[:2], date, one.reason),
    ).lastrowid
    if content is None:
        return
    title = about[0] or item.file
    rows = (
        (
            number,
            i,
            c.heading,
            c.text,
            c.page,
            c.first_line,
            c.last_line,
            digest_of(embedded_text(title, c)),
        )
        for i, c in enumerate(chunks(content))
    )
    db.executemany(
        "INSERT INTO chunks (document, number, heading, text, page, first_line, last_line, digest)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows,
    )  # fmt: skip


def day(mtime: int) -> str:
    """The date of a time in nanoseconds."""
    return datetime.fromtimestamp(max(mtime, 0) / 1e9, timezone.utc).date().isoformat()


def digest_of(text: str) -> bytes:
    """What finds the vector of an embedded text."""
    return hashlib.sha256(text.encode()).digest()[:16]


def embed(store: Store, embedder: Embedder) -> int:
    """Compute the vectors that are missing, some at a time; how many there were."""
    total = store.one(
        "SELECT count(DISTINCT digest) FROM chunks WHERE digest NOT IN (SELECT digest FROM vectors)"
    )
    n_done = 0
    if not total:
        return 0
    for texts in bar(missing(store), "embedding", f"{EMBEDDED} texts", -(-total // EMBEDDED)):
        codes = pack(embedder.documents(list(texts.values())))
        with store.writing() as db:
            store.keep(row_bytes=row_bytes(embedder.width))
            db.executemany(
                "INSERT INTO vectors (digest, codes) VALUES (?, ?)", zip(texts, codes, strict=True)
            )
        n_done += len(texts)
    store.keep(pending=0)
    return n_done


def missing(store: Store) -> Iterator[dict[bytes, str]]:
    """Texts without a vector, by their digests, in the order of the chunks."""
    last = 0
    while True:
        rows = store.rows(
            "SELECT c.id, c.digest, d.title, d.file, c.heading, c.text FROM chunks c"
            " JOIN documents d ON d.id = c.document WHERE c.id > ?"
            " AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.digest = c.digest) ORDER BY c.id LIMIT ?",
            last, EMBEDDED,
        )  # fmt: skip
        if not rows:
            return
        last = rows[-1][0]
        texts: dict[bytes, str] = {}
        for _, digest, title, file, heading, text in rows:
            texts.setdefault(digest, embedded_text(title or file, Chunk(text, heading)))
        yield texts
