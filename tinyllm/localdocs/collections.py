"""LocalDocs: the collections of one store, and what can be done with them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import system
from ..errors import ArgumentError, StateError, TinyLLMError
from ..hub.locks import locked
from ..loading import load
from ..model import Model
from .embedding import Embedder
from .quoting import nearest_sentences
from .reading import Reader
from .search import Filter, Hit, search
from .store import Store
from .updating import Report, embed, shown, update
from .vectors import Vectors, nbytes

if TYPE_CHECKING:
    from .answering import Answer

EMBEDDING_MODEL = "all-MiniLM-L6-v2.gguf2.f16.gguf"
"""The model of GPT4All's list that embeds, where no other is given."""


@dataclass(frozen=True)
class Collection:
    """A collection as ``LocalDocs.list`` tells of it."""

    name: str
    folders: list[str]
    n_documents: int
    n_chunks: int
    n_unreadable: int
    n_pending: int
    """Texts that have no vectors yet, which searches miss; an ``update`` computes them."""


class LocalDocs:
    """Collections of folders, kept in one SQLite file; any thread may use it, and any process may read.

    Parameters
    ----------
    path : str or Path, optional
        The file; it is made if it is not there. Default: ``localdocs.sqlite`` in the user's data folder.
    model : str, Path or Model, optional
        What embeds: whatever ``tinyllm.load`` takes. Default: the model that the store was made with, at first
        all-MiniLM-L6-v2 of GPT4All's list. It is loaded when it is first needed.
    n_threads : int, optional
        Default: the physical cores.

    Raises
    ------
    StateError
        The file is no store, is damaged, or was written by a later version.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from tinyllm.localdocs import LocalDocs
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "tea.md").write_text("# Tea\\nGreen tea wants 70 degrees.")
    ...     with LocalDocs(f"{folder}/store.sqlite", "tinyllm/data/bundled.gguf") as docs:
    ...         docs.add("kitchen", folder).added
    ...         docs.search("how hot for green tea?")[0].place
    1
    'tea.md, lines 1 to 2'
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | Model | None = None,
        n_threads: int | None = None,
    ) -> None:
        place = system.data_folder() / "localdocs.sqlite" if path is None else system.expanded(path)
        self.path = place
        self._store = Store(place)
        self._given, self._n_threads = model, n_threads
        self._embedder: Embedder | None = None
        self._vectors: Vectors | None = None
        self._lock = threading.RLock()

    def close(self) -> None:
        """Close the file, and the model if it was loaded here."""
        with self._lock:
            self._store.close()
            if self._embedder is not None and not isinstance(self._given, Model):
                self._embedder.model.close()
            self._embedder = self._vectors = None

    def __enter__(self) -> LocalDocs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tinyllm.localdocs.LocalDocs {self.path}>"

    # ---- the model that embeds

    @property
    def embedder(self) -> Embedder:
        """The embedding model, loaded now if need be.

        Raises
        ------
        ArgumentError
            It is another than the one that the store's vectors are from.
        """
        with self._lock:
            self._forget_another()
            if self._embedder is None:
                self._embedder = self._checked(self._load())
            return self._embedder

    def _forget_another(self) -> None:
        """Let a model go that the store's vectors are no longer from: a process has embedded all again."""
        old = self._embedder
        if old is not None and self._store.setting("model") not in (None, old.identity):
            self._embedder = self._vectors = None
            if not isinstance(self._given, Model):
                old.model.close()

    def _load(self) -> Embedder:
        if isinstance(self._given, Model):
            return Embedder(self._given)
        kept = self._store.setting("model_path")
        name = self._given or kept or EMBEDDING_MODEL
        try:
            return Embedder(load(os.fspath(name), n_threads=self._n_threads))
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, TinyLLMError) and self._given:
                raise
            raise StateError(
                f"the embedding model {os.fspath(name)!r} is not to be had ({error}); give another with model=,"
                " or --model on the command line"
            ) from error

    def _checked(self, embedder: Embedder) -> Embedder:
        known = self._store.setting("model")
        if known not in (None, embedder.identity) and self._store.one("SELECT 1 FROM vectors"):
            name = self._store.setting("model_name")
            raise ArgumentError(
                f"{self.path} has vectors of {name} ({str(known)[:12]}), and {embedder.name}"
                f" ({embedder.identity[:12]}) was given; leave the model out, or embed all again with reembed()"
                " (tinyllm localdocs reembed)"
            )
        self._keep(embedder)
        return embedder

    def _keep(self, embedder: Embedder) -> None:
        path = str(Path(embedder.model.path).resolve())
        wanted = {"model": embedder.identity, "model_name": embedder.name, "model_path": path}
        if any(self._store.setting(k) != v for k, v in wanted.items()):
            with self._store.writing():
                self._store.keep(**wanted)

    def reembed(self) -> int:
        """Compute all vectors again, with the given model; how many there are."""
        with self._writing():
            embedder = self._embedder or self._load()
            with self._store.writing() as db:
                db.execute("DELETE FROM vectors")
                removals = int(self._store.setting("removals") or 0) + 1
                self._store.keep(removals=removals, model=embedder.identity, pending=1)
            self._embedder, self._vectors = self._checked(embedder), None
            return embed(self._store, embedder)

    # ---- collections

    def add(self, name: str, *folders: str | os.PathLike[str]) -> Report:
        """Make a collection of folders, or add folders to it, and read them.

        Files of the known kinds are read, those in hidden folders and behind links are not. What cannot be
        read is listed with its reason.

        Returns
        -------
        Report

        Raises
        ------
        ArgumentError
            A folder does not exist, or the name is empty.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[^\s/\\][^\n/\\]{0,99}", name):
            raise ArgumentError(f"{name!r:.60} is no name of a collection; expected a word")
        if name == "-":
            raise ArgumentError("'-' is no name of a collection: it means all; expected a word")
        paths = [absolute(f) for f in folders]
        self.embedder  # noqa: B018 (another model is refused before anything is stored)
        with self._writing():
            with self._store.writing() as db:
                db.execute("INSERT OR IGNORE INTO collections (name) VALUES (?)", (name,))
                number = self._store.collection(name)
                db.executemany(
                    "INSERT OR IGNORE INTO folders VALUES (?, ?)", [(number, p) for p in paths]
                )
            return self._update(number)

    def update(self, *names: str) -> dict[str, Report]:
        """Read what has changed in the folders of these collections; of all, where none is named.

        A file is looked into when its size or its times are others than before, and read when its bytes are.
        """
        with self._lock:
            numbers = {n: self._store.collection(n) for n in names or [c.name for c in self.list()]}
            with self._writing():
                return {name: self._update(number) for name, number in numbers.items()}

    def _update(self, number: int) -> Report:
        with Reader() as reader:
            report = update(self._store, number, reader)
        if self._store.waits():  # an older version, which keeps no "pending", may have been killed
            report.embedded = embed(self._store, self.embedder)
        elif self._store.setting("pending") != "0":
            self._store.keep(pending=0)
        self._store.collect_garbage()
        return report

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Wait for other threads and processes that write; readers go on meanwhile."""
        with self._lock, locked(self.path.with_name(self.path.name + ".lock")):
            yield

    def watch(self, *names: str, seconds: float = 2.0) -> Iterator[dict[str, Report]]:
        """Look for changes again and again, and tell of each update that found one; it never ends by itself."""
        if not seconds > 0:
            raise ArgumentError(f"seconds={seconds!r:.40}; expected more than 0")
        while True:
            reports = self.update(*names)
            if any(r.anything for r in reports.values()):
                yield reports
            time.sleep(seconds)

    def remove(self, name: str) -> None:
        """Forget a collection; its folders stay as they are."""
        with self._writing():
            with self._store.writing() as db:
                number = self._store.collection(name)
                rows = self._store.rows("SELECT id FROM documents WHERE collection = ?", number)
                self._store.forget([i for (i,) in rows])
                db.execute("DELETE FROM collections WHERE id = ?", (number,))
            self._store.collect_garbage()

    def list(self) -> list[Collection]:
        """All collections, by name."""
        with self._lock:
            return [
                self._collection(*row)
                for row in self._store.rows("SELECT id, name FROM collections ORDER BY name")
            ]

    def collection(self, name: str) -> Collection:
        """One collection; ArgumentError for a name that is unknown."""
        with self._lock:
            return self._collection(self._store.collection(name), name)

    def _collection(self, number: int, name: str) -> Collection:
        one = self._store.one
        folders = self._store.rows(
            "SELECT path FROM folders WHERE collection = ? ORDER BY path", number
        )
        return Collection(
            name,
            [shown(p) for (p,) in folders],
            one("SELECT count(*) FROM documents WHERE collection = ? AND reason IS NULL", number),
            one(
                "SELECT count(*) FROM chunks WHERE document IN (SELECT id FROM documents WHERE collection = ?)",
                number,
            ),
            one(
                "SELECT count(*) FROM documents WHERE collection = ? AND reason IS NOT NULL", number
            ),
            self._store.pending(number)[0],
        )

    def unreadable(self, name: str) -> Sequence[tuple[str, str]]:
        """Files of a collection that could not be read, and why."""
        with self._lock:
            number = self._store.collection(name)
            return self._store.rows(
                "SELECT file, reason FROM documents WHERE collection = ? AND reason IS NOT NULL ORDER BY file",
                number,
            )

    def pending(self, *names: str) -> tuple[int, int]:
        """How many texts of these collections, or of all, have no vectors yet, and how many texts there are.

        (0, 0) where all have theirs. Texts wait while another process adds them, or since one was killed: a
        search then misses what is near by meaning, until an ``update`` has ended.
        """
        with self._lock, self._reading():
            numbers = [self._store.collection(n) for n in names]
            both = [*map(self._store.pending, numbers)] if names else [self._store.pending()]
        return sum(n for n, _ in both), sum(total for _, total in both)

    @property
    def search_bytes(self) -> int:
        """How much memory the first search takes, for all vectors; those after it share it."""
        with self._lock:
            n = self._store.one("SELECT count(*) FROM vectors")
            per_row = int(self._store.setting("row_bytes") or 0)
            return nbytes(n, per_row // 34 * 32)

    def check(self) -> Sequence[str]:
        """What is inconsistent in the store; nothing where all is well. Vectors may wait: see ``pending``."""
        with self._writing():
            return self._store.problems()

    # ---- asking

    def search(
        self,
        query: str,
        k: int = 5,
        collections: str | Sequence[str] | None = None,
        file: str | None = None,
        since: str | None = None,
        until: str | None = None,
        reranker: Model | None = None,
    ) -> Sequence[Hit]:
        """The chunks that fit a query best, by their words and by their meaning.

        Parameters
        ----------
        query : str
            A question, or words.
        k : int
            How many hits.
        collections : str or sequence of str, optional
            Only in these; default: in all. A sequence without a name is refused.
        file : str, optional
            Only in files whose name fits this pattern, with ``*`` and ``?``, in capitals or not: the last part
            of the name, or the whole name within the folder where the pattern has a slash.
        since, until : str, optional
            Only in documents of these dates, "2026-01-31" or "2026"; a file without a date has that of its last
            change.
        reranker : Model, optional
            A model with a ranking head (``Model.rank``), which reads the best 30 and puts them in order.

        Returns
        -------
        list of Hit
            Best first.

        Raises
        ------
        ArgumentError
            There is no such collection, or an argument is not as described above.
        """
        if not isinstance(query, str) or not query.strip():
            raise ArgumentError(f"query={query!r:.40}; expected a text")
        if not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k={k!r:.40}; expected a whole number of at least 1")
        if reranker is not None and not hasattr(reranker, "rank"):
            raise ArgumentError(f"reranker={reranker!r:.60}; expected a model, from tinyllm.load")
        chosen = Filter(collections, file, since, until)
        with self._lock:
            chosen.sql(self._store)  # mistakes are told before a model is loaded
        embedder = self.embedder
        with self._lock, self._reading():
            self._vectors = self._vectors or Vectors(self._store, embedder.width, self._n_threads)
            return search(self._store, self._vectors, embedder, query, k, chosen, reranker)

    def quote(
        self, question: str, k: int = 3, nearest: float | None = None, **where: Any
    ) -> Sequence[Hit]:
        """The sentences of the documents that are nearest to a question: an answer without a model that chats.

        Parameters
        ----------
        question : str
            What is asked.
        k : int
            How many sentences.
        nearest : float, optional
            The nearness that a chunk must have whose sentences count; default: that of ``ask``, 0.45.
        **where
            ``collections``, ``file``, ``since``, ``until`` and ``reranker``, as ``search`` has them.

        Returns
        -------
        list of Hit
            Nearest first: ``text`` is a sentence, the lines are its own, ``score`` is ``similarity + words``.
            None where no chunk is near enough.
        """
        from .answering import EXCERPTS, NEAREST, near

        if not isinstance(k, int) or k < 1:
            raise ArgumentError(f"k={k!r:.40}; expected a whole number of at least 1")
        if nearest is not None and not isinstance(nearest, int | float):
            raise ArgumentError(f"nearest={nearest!r:.40}; expected a number such as 0.45")
        hits = near(
            self.search(question, EXCERPTS, **where), NEAREST if nearest is None else nearest
        )
        return self._sentences(question, hits, k)

    def _sentences(self, question: str, hits: Sequence[Hit], k: int = 3) -> Sequence[Hit]:
        """The k sentences of some hits that are nearest to a question, as ``quote`` has them."""
        with self._lock, self._reading():
            return nearest_sentences(self._store, self.embedder, question, hits, k)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One view of the store, whatever others write meanwhile."""
        self._store.db.execute("BEGIN")
        try:
            yield
        finally:
            self._store.db.execute("ROLLBACK")

    def ask(self, question: str, model: Model, **options: Any) -> Answer:
        """Let a model answer a question from the documents.

        Parameters
        ----------
        question : str
            What is asked.
        model : Model
            A model that chats.
        **options
            ``k``, ``collections``, ``file``, ``since``, ``until`` and ``reranker`` as ``search`` has them;
            ``nearest``: the nearness that an excerpt must have (default 0.45); all else as ``Model.chat``.

        Returns
        -------
        Answer
            An iterator of pieces of text; ``references`` says what they rest on, ``quotes`` what stands there.
        """
        from .answering import ask

        return ask(self, question, model, **options)


def absolute(folder: str | os.PathLike[str]) -> bytes:
    """A folder's whole path."""
    path = os.path.realpath(system.expanded(folder))
    if not os.path.isdir(path):
        is_file = "; it is a file: give the folder that it is in" * os.path.exists(path)
        raise ArgumentError(f"there is no folder {os.fspath(folder)!r:.200}{is_file}")
    return os.fsencode(path)
