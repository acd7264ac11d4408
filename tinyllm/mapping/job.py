"""A table that is worked on row by row, with a journal: a run that was killed goes on where it stopped.

``OUTPUT.job`` has a line that says what is done, then a line for each row that is finished. When all are,
``OUTPUT`` is written whole, in the order of the input, and the rows' lines give way to one with its size.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from .. import __version__, system
from ..errors import ArgumentError, TinyLLMError
from ..files import naming, replacing
from .tables import JSONL, PARQUET, Rows, Table, kind_of, pyarrow, writing
from .tasks import ERROR, Kind, Result

Work = Callable[[Iterable[tuple[int, str]]], Iterable[tuple[int, Result]]]  # numbers and texts
END = 1 << 20  # bytes at each end of a model's file that identify it, with its size


@dataclass
class Journal:
    """The finished rows of a job, in a file that a kill at any moment leaves usable.

    Parameters
    ----------
    file : binary file
        Open to read and write; locked, so that one process at a time works on it.
    about : mapping
        What is done. A journal of something else is refused.
    n_rows : int
        Rows of the input.

    Attributes
    ----------
    n_done, n_damaged : int
        Rows that are finished; lines that are whole but not as they were written.
    """

    file: BinaryIO
    about: Mapping[str, Any]
    n_rows: int
    places: array[int] = field(init=False)  # by row: the byte where its line begins, or -1
    n_done: int = 0
    n_damaged: int = 0
    written: int | None = None  # bytes of the table, once it was whole

    def __post_init__(self) -> None:
        self.places = array("q", [-1]) * self.n_rows
        self.file.seek(0)
        header = self.file.readline()
        own = json.dumps(self.about).encode() + b"\n"
        if not header.endswith(b"\n") and own.startswith(header):  # new, or its first line was cut
            self.file.seek(0)
            self.file.truncate()
            header = own
            self.file.write(header)
        self.start = len(header)
        self._check(header)
        self._recover()

    def _check(self, header: bytes) -> None:
        """ArgumentError where the job that was begun differs."""
        try:
            before = json.loads(header)
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise ArgumentError(f"{self.file.name} is no journal of tinyllm; remove it")
        rows, own = before.pop("input", None), dict(self.about)
        is_other = rows != own.pop("input", None)
        changed = [f"{n} was {a}, now {b}" for n, a, b in differences(before, own)]
        changed += ["the rows have changed"] * is_other
        if changed:
            raise ArgumentError(
                f"{self.file.name} is of another job: {', '.join(changed)}; "
                "give what it was begun with, or remove it to begin anew"
            )

    def _recover(self) -> None:
        """Find the rows that are done; drop the last line where a kill has cut it."""
        self.file.seek(self.start)
        while line := self.file.readline():
            place = self.file.tell() - len(line)
            if not line.endswith(b"\n"):
                self.file.truncate(place)
            elif (n_bytes := written_of(line)) is not None:
                self.written = n_bytes
            elif 0 <= (number := number_of(line)) < self.n_rows:
                self._note(number, place)
            else:
                self.n_damaged += 1

    def _note(self, number: int, place: int) -> None:
        self.n_done += self.places[number] < 0
        self.places[number] = place

    def __contains__(self, number: int) -> bool:
        return self.places[number] >= 0

    def add(self, number: int, result: Result) -> bool:
        """Keep a row's result, unless the row has one; whether it was kept."""
        if number in self:
            return False
        line = summed(json.dumps([number, result], default=packed).encode())
        self._note(number, self.file.seek(0, os.SEEK_END))
        self.file.write(line)
        self.file.flush()  # a kill of this process no longer takes it
        return True

    def __getitem__(self, number: int) -> Result:
        self.file.seek(self.places[number])
        return unpacked(json.loads(self.file.readline())[1])

    def end(self, n_bytes: int) -> None:
        """Keep the first line, and the bytes of the table in the place of the rows.

        A kill on the way leaves the rows, or the bytes.
        """
        self.file.seek(self.start)
        self.file.write(json.dumps({"written": n_bytes}).encode() + b"\n")
        self.file.truncate()  # what is behind it


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], place: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Where two jobs differ but for their rows: an option's name or a place, and both values as JSON."""
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            inside = "" if name in ("options", "load") else f"{name}'s "  # as the caller gave them
            yield from differences(x, y, place + inside)
        elif x != y:
            yield f"{place}{name}", json.dumps(x), json.dumps(y)


def summed(array: bytes) -> bytes:
    """A JSON array as a line, with a checksum of what is before it as the last element."""
    return b"%b, %d]\n" % (array[:-1], crc32(array[:-1]))


def number_of(line: bytes) -> int:
    """The row that a line of a journal is of; -1 for a line that is not as it was written."""
    if not line.startswith(b"[") or line != summed(line.rpartition(b", ")[0] + b"]"):
        return -1
    number: int = json.loads(line)[0]
    return number


def written_of(line: bytes) -> int | None:
    """The bytes of the table that a journal's last line tells; None for another line."""
    try:
        match json.loads(line):
            case {"written": int(n_bytes)}:
                return n_bytes
    except (ValueError, RecursionError):
        pass
    return None


def packed(vector: np.ndarray) -> dict[str, str]:
    """A vector as JSON holds it to the bit."""
    return {"f32": base64.b64encode(vector.astype("<f4").tobytes()).decode()}


def unpacked(row: dict[str, Any]) -> Result:
    """The row of ``packed`` vectors."""
    return {
        n: np.frombuffer(base64.b64decode(v["f32"]), "<f4") if isinstance(v, dict) else v
        for n, v in row.items()
    }


@dataclass(frozen=True)
class Job:
    """A table to be made from another.

    Parameters
    ----------
    source : Table
        The rows.
    target : str
        The file to write, .parquet or .jsonl: each row's key and result, in the order of the rows.
    columns : mapping
        The results' columns, and their kinds.
    about : mapping
        What else the results depend on: task, model, options. It is compared with that of a job begun before.

    Raises
    ------
    ArgumentError
        There is such a file already, but no job that made it; or a column has the key's name.
    """

    source: Table
    target: str
    columns: Mapping[str, Kind]
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        if kind_of(self.target, (*PARQUET, *JSONL)) in PARQUET:
            pyarrow()
        if self.source.key in self.columns:
            raise ArgumentError(
                f"the key's column is named {self.source.key!r}, as one of the results' is; rename it"
            )
        with suppress(FileNotFoundError):
            if os.stat(self.target) and not os.path.exists(self.journal_path):
                raise ArgumentError(self._exists)

    @property
    def _exists(self) -> str:
        return f"{self.target} exists; remove it, or give another name"

    @property
    def journal_path(self) -> str:
        """Where finished rows are kept until all are."""
        return f"{self.target}.job"

    def run(
        self,
        work: Work,
        done: Callable[[int, int], object] = lambda n, total: None,
        tell: Callable[[str], object] = lambda line: None,
    ) -> int | None:
        """Work on the rows that are not finished, and write the table.

        Parameters
        ----------
        work : callable
            It gets numbers and texts of rows, and gives back numbers and results in any order.
        done : callable
            Told how many rows are finished, and how many there are.
        tell : callable
            Told in a line what an earlier run has left, and what of it is damaged.

        Returns
        -------
        int or None
            Rows that have an error; None where the table had been written before, and nothing was done.

        Raises
        ------
        ArgumentError
            The input, the model or an option is not the one that the job was begun with, or the input
            changes meanwhile. What was finished is kept.
        OSError
            A file cannot be written: the disk is full, say. The message names it; what was finished is kept.
        """
        rows = Rows(self.source)
        about = {
            "tinyllm": __version__, **self.about, "key": self.source.key, "input": rows.identity,
        }  # fmt: skip
        with self._journal_file(tell) as file:
            journal = Journal(file, about, rows.identity["rows"])
            if os.path.exists(self.target) and self._is_whole(journal):
                return None
            if journal.n_damaged:
                tell(f"damaged lines of {self.journal_path}, left out: {journal.n_damaged}")
            if journal.n_done:
                done_before = f"{journal.n_done} of {journal.n_rows}"
                tell(f"rows that {self.journal_path} has already: {done_before}")
            done(journal.n_done, journal.n_rows)
            left = ((i, text) for i, (_, text) in enumerate(rows) if i not in journal)
            for number, result in work(left) if journal.n_done < journal.n_rows else ():
                journal.add(number, result)
                done(journal.n_done, journal.n_rows)
            n_errors = self._write(journal, rows)
            journal.end(os.path.getsize(self.target))
            return n_errors

    def _is_whole(self, journal: Journal) -> bool:
        """Whether the table that is there is this job's; ArgumentError where it is another, or was changed."""
        n_bytes, wrong = os.path.getsize(self.target), ""
        if journal.written == n_bytes:
            return True
        if journal.written is None and journal.n_done == 0:
            raise ArgumentError(self._exists)
        if 0 < journal.n_done < journal.n_rows:
            wrong = f"exists, and {journal.n_rows - journal.n_done} rows of its job are not done"
        elif journal.n_done == 0:
            wrong = f"has {n_bytes} bytes, and had {journal.written} when it was whole"
        if wrong:
            raise ArgumentError(
                f"{self.target} {wrong}; move it away, and the same command makes it"
            )
        return False  # a kill came before the journal's end

    @contextmanager
    def _journal_file(self, tell: Callable[[str], object]) -> Iterator[BinaryIO]:
        """The journal's file, locked. One that holds nothing when an error ends the run is removed."""
        while True:
            file = open(self.journal_path, "r+b", opener=made)
            system.lock_file(
                file.fileno(),
                lambda: tell(f"another process works on {self.target}; this one waits"),
            )
            if is_at(file, self.journal_path):
                break
            file.close()  # whoever held the lock has removed it
        with naming(self.journal_path), file:
            is_new = file.seek(0, os.SEEK_END) == 0
            try:
                yield file
            except BaseException:
                file.seek(0)
                file.readline()
                if is_new and not file.readline():
                    with suppress(OSError):  # Windows keeps what is open
                        os.unlink(self.journal_path)
                raise

    def _write(self, journal: Journal, rows: Rows) -> int:
        """Write the table in the order of the input; how many rows have an error."""
        if missing := journal.n_rows - journal.n_done:
            raise TinyLLMError(f"rows without a result: {missing}; the same command goes on")
        n_errors, kind = 0, self.source.key_kind()
        for part in (
            Path(self.target).absolute().parent.glob(f"{escape(Path(self.target).name)}.*-*.part")
        ):
            part.unlink()  # what a kill has left of a table half written
        with replacing(self.target) as file:
            with writing(file, self.target, self.source.key, kind, self.columns) as add:
                for number, (key, _) in enumerate(rows):
                    result = journal[number]
                    n_errors += result[ERROR] is not None
                    add({self.source.key: key, **result})
            file.flush()
            os.fsync(file.fileno())  # the rows' other copy is dropped next
        return n_errors


def made(path: str, flags: int) -> int:
    """Open a file as ``flags`` say, and make it where there is none."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def is_at(file: BinaryIO, path: str) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def file_identity(path: str | Path) -> dict[str, Any]:
    """A model file's name, size and a digest of its two ends."""
    with open(path, "rb") as file:
        n = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(digest_size=16)
        for place in (0, max(0, n - END)):
            file.seek(place)
            digest.update(file.read(END))
    return {"file": Path(path).name, "bytes": n, "digest": digest.hexdigest()}
