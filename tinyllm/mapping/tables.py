"""Tables whose rows have a text and a key: Parquet, lines of JSON or of text; and tables of results."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # it cuts what is deep or long
from typing import Any, BinaryIO

import numpy as np

from ..errors import ArgumentError
from ..files import decode
from .tasks import Kind

Key = str | int
PARQUET, JSONL, TEXT = (".parquet",), (".jsonl", ".ndjson"), (".txt",)
LONE = re.compile("[\ud800-\udfff]")  # what JSON can spell, and no tokenizer nor Parquet takes
ROWS = 8192  # that a group of a Parquet file has


def pyarrow() -> Any:
    """The module; ArgumentError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ArgumentError(
            "Parquet needs pyarrow: pip install 'tinyllm[parquet]', or use .jsonl"
        ) from None
    return pyarrow


def arrow_types() -> dict[Kind, Any]:
    """Arrow's types of the kinds of columns."""
    pa = pyarrow()
    return {
        "text": pa.string(), "integer": pa.int64(), "number": pa.float64(),
        "vector": pa.list_(pa.float32()),
    }  # fmt: skip


def kind_of(path: str, allowed: Iterable[str]) -> str:
    """The ending of a table's name; ArgumentError for another one."""
    ending = Path(path).suffix.lower()
    if ending not in (known := tuple(allowed)):
        raise ArgumentError(f"{path}: expected a name that ends in {', '.join(known)}")
    return ending


@dataclass(frozen=True)
class Table:
    """Rows to work on: ``text`` and ``key`` name the columns of a row's text and of its key.

    In plain text each line is a row, and its number, from 1, is its key.
    """

    path: str
    text: str = "text"
    key: str = "id"

    def __post_init__(self) -> None:
        kind_of(self.path, (*PARQUET, *JSONL, *TEXT))

    def __iter__(self) -> Iterator[tuple[Key, str]]:
        """Each row's key and text; ArgumentError, naming the place, for a row without them."""
        ending = Path(self.path).suffix.lower()
        rows = self._parquet() if ending in PARQUET else self._lines(ending in JSONL)
        first: Key | None = None
        for place, key, text in rows:
            for name, value in ((self.text, text), (self.key, key)):
                if isinstance(value, str) and LONE.search(value):
                    raise ArgumentError(
                        f"{self.path}: {place}: {name!r} holds half a surrogate pair; remove it"
                    )
            good = (
                isinstance(text, str) and isinstance(key, str | int) and not isinstance(key, bool)
            )
            if not good or (isinstance(key, int) and not -(1 << 63) <= key < 1 << 63):
                wrong, found, name = (
                    ("text", text, self.text)
                    if not isinstance(text, str)
                    else ("key", key, self.key)
                )
                wanted = (
                    "a text" if wrong == "text" else "a text or a whole number of 64 bits, signed"
                )
                raise ArgumentError(
                    f"{self.path}: {place}: {name!r} is {brief(found)}; a row's {wrong} must be {wanted}"
                )
            first = key if first is None else first
            if type(first) is not type(key):
                raise ArgumentError(
                    f"{self.path}: {place}: {self.key!r} is {brief(key)}, and before it {brief(first)}; "
                    "keys must be all texts or all numbers"
                )
            yield key, text

    def _lines(self, json_lines: bool) -> Iterator[tuple[str, Any, Any]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"line {number}"
                if not json_lines:
                    ended = line.removesuffix(b"\n").removesuffix(b"\r")
                    yield place, number, decode(ended, f"{self.path}: {place}")
                elif line.strip():
                    yield place, *self._fields(line, place)

    def _fields(self, line: bytes, place: str) -> tuple[Any, Any]:
        text = decode(line, f"{self.path}: {place}")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # the first also for thousands of digits
            said = getattr(error, "msg", str(error).partition(";")[0])
            raise ArgumentError(f"{self.path}: {place} is no JSON: {said}") from None
        if not isinstance(row, dict):
            raise ArgumentError(f"{self.path}: {place}: expected an object, found {brief(row)}")
        self._check_names(row, place)
        return row[self.key], row[self.text]

    def _parquet(self) -> Iterator[tuple[str, Any, Any]]:
        pa = pyarrow()
        damaged = (pa.ArrowException, OSError, UnicodeDecodeError)
        with open(self.path, "rb") as opened:  # a missing file is told as for the other kinds
            try:
                file = pa.parquet.ParquetFile(opened)
                names = file.schema_arrow.names
            except damaged as error:
                said = " ".join(str(error).split())
                raise ArgumentError(f"{self.path} is no Parquet file: {said}") from None
            self._check_names(names, "its schema")
            number = 0
            try:
                for batch in file.iter_batches(ROWS, columns=[self.key, self.text]):
                    keys, texts = (batch.column(n).to_pylist() for n in (self.key, self.text))
                    for key, text in zip(keys, texts, strict=True):
                        number += 1
                        yield f"row {number}", key, text
            except damaged as error:
                raise ArgumentError(
                    f"{self.path} is damaged behind row {number}: {' '.join(str(error).split())}"
                ) from None

    def _check_names(self, names: Iterable[str], place: str) -> None:
        """ArgumentError unless both columns are there, once."""
        known = list(names)
        for name, option in ((self.text, "--text"), (self.key, "--id")):
            if name not in known:
                raise ArgumentError(
                    f"{self.path}: {place} has no {name!r} but {', '.join(map(repr, known))}; "
                    f"{option} names another"
                )
            if (n := known.count(name)) > 1:
                raise ArgumentError(
                    f"{self.path}: {place} has {n} columns {name!r}; rename all but one"
                )

    def key_kind(self) -> Kind:
        """What the keys are: as the first row's, or as a table without rows declares them."""
        is_number = Path(self.path).suffix.lower() in TEXT
        if (first := next(iter(self), None)) is not None:
            is_number = isinstance(first[0], int)
        elif Path(self.path).suffix.lower() in PARQUET:
            pa = pyarrow()
            is_number = pa.types.is_integer(pa.parquet.read_schema(self.path).field(self.key).type)
        return "integer" if is_number else "text"


class Rows:
    """The rows of a table as they are when this is made: whoever iterates gets these, or an error.

    Parameters
    ----------
    table : Table
        It is read once now, and again by every iteration.

    Attributes
    ----------
    identity : dict
        The number of rows, and a digest of their keys and texts, whatever file holds them.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._marks = array("Q")
        digest = hashlib.blake2b(digest_size=16)
        for row in table:
            data = json.dumps(row).encode()
            digest.update(data)
            self._marks.append(mark(data))
        self.identity: dict[str, Any] = {"rows": len(self._marks), "digest": digest.hexdigest()}

    def __iter__(self) -> Iterator[tuple[Key, str]]:
        """Each row's key and text; ArgumentError at the first that is another than it was."""
        n = 0
        for row in self.table:
            if n == len(self._marks) or mark(json.dumps(row).encode()) != self._marks[n]:
                break
            yield row
            n += 1
        else:
            if n == len(self._marks):
                return
        raise ArgumentError(
            f"{self.table.path} has changed since this run began, at its row {n + 1}; "
            "what was finished is kept: give it the rows back that it had, and the same command goes on"
        )


def mark(data: bytes) -> int:
    """64 bits that other data does not have, but by chance."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@contextmanager
def writing(
    file: BinaryIO, path: str, key: str, key_kind: Kind, columns: Mapping[str, Kind]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds a row to a table, in the form that the ending of ``path`` says."""
    if kind_of(path, (*PARQUET, *JSONL)) in JSONL:
        yield lambda row: _write_line(file, row)
        return
    pa = pyarrow()
    types = arrow_types()
    schema = pa.schema([(key, types[key_kind]), *((n, types[k]) for n, k in columns.items())])
    rows: list[dict[str, Any]] = []
    with pa.parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            table = pa.Table.from_pylist(rows, schema)
            writer.write_table(table, row_group_size=ROWS)
            rows.clear()

        def add(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == ROWS:
                flush()

        yield add
        if rows:
            flush()


def _write_line(file: BinaryIO, row: Mapping[str, Any]) -> None:
    text = json.dumps(row, ensure_ascii=False, default=_numbers)
    file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def _numbers(vector: np.ndarray) -> list[float]:
    """A vector's numbers as the shortest decimals that read back as these float32."""
    return [float(x) for x in vector.astype(str)]
