"""``tinyllm map``: tables in and out, and runs that are killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import tinyllm
from tinyllm.cli.commands import main
from tinyllm.errors import ArgumentError
from tinyllm.mapping import job as jobs
from tinyllm.mapping.job import Job, Journal
from tinyllm.mapping.tables import Table

COLUMNS = {
    "size": "integer",
    "half": "number",
    "shout": "text",
    "vector": "vector",
    "error": "text",
}
Rows = Iterator[tuple[int, str]]


def shout(rows: Rows) -> Iterator[tuple[int, dict]]:
    """Work that needs no model, its results from the last to the first."""
    for number, text in reversed(list(rows)):
        vector = np.float32([len(text) / 3, -0.1, 1e-30])
        yield number, {"size": len(text), "half": len(text) / 2, "shout": text.upper(),
                       "vector": vector, "error": None}  # fmt: skip


def stops(rows: Rows) -> Iterator[tuple[int, dict]]:
    """The last row's result, and an error."""
    yield next(shout(rows))
    raise ZeroDivisionError


def write(path: Path, keys: list, text: str = "text", key: str = "id") -> str:
    """A table whose rows have texts of several lengths; its name."""
    rows = [{"other": 1, key: k, text: f"text {k} ü " * (i % 4 + 1)} for i, k in enumerate(keys)]
    if path.suffix == ".txt":
        path.write_text("".join(row[text] + "\n" for row in rows), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        parquet.write_table(table, path, row_group_size=3)
    return str(path)


def read(path: str | Path) -> list[dict]:
    if str(path).endswith(".parquet"):
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def job(source: Path | str, target: Path, **about: object) -> Job:
    return Job(Table(str(source)), str(target), COLUMNS, about)


# ---- tables


@pytest.mark.parametrize("into", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.parquet"])
@pytest.mark.parametrize("keys", [["a", "b", "ü", "d", "e"], [7, 5, 3, 1 << 62, -1], []], ids=str)
def test_each_row_of_a_table_has_its_key_and_result_in_order(
    tmp_path: Path, name: str, into: str, keys: list
) -> None:
    if name == "in.parquet" and not keys:
        pytest.skip("pyarrow makes no schema of no rows")
    source = write(tmp_path / name, keys)
    if into.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    assert job(source, tmp_path / into).run(shout) == 0
    found = read(tmp_path / into)
    expected = list(range(1, len(keys) + 1)) if name == "in.txt" else keys
    assert [row["id"] for row in found] == expected
    texts = [text for _, text in Table(source)]
    assert [row["shout"] for row in found] == [text.upper() for text in texts]
    for row, text in zip(found, texts, strict=True):
        assert (np.float32(row["vector"]) == np.float32([len(text) / 3, -0.1, 1e-30])).all()
        assert list(row) == ["id", *COLUMNS]


@pytest.mark.parametrize(
    ("keys", "expected"), [("int32", "int64"), ("uint64", "int64"), ("string", "string")]
)
def test_an_empty_table_has_keys_of_the_kind_that_its_input_declares(
    tmp_path: Path, keys: str, expected: str
) -> None:
    pa, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    schema = pa.schema([("id", pa.type_for_alias(keys)), ("text", pa.string())])
    parquet.write_table(schema.empty_table(), tmp_path / "in.parquet")
    assert job(tmp_path / "in.parquet", tmp_path / "out.parquet").run(shout) == 0
    assert str(parquet.read_schema(tmp_path / "out.parquet").field("id").type) == expected


def test_other_columns_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a", "b"], text="body", key="name")
    table = Table(source, "body", "name")
    Job(table, str(tmp_path / "out.jsonl"), COLUMNS, {}).run(shout)
    assert [row["name"] for row in read(tmp_path / "out.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            '{"id": 1, "text": "a"}\n{"id": "b", "text": "a"}',
            "line 2: 'id' is 'b', and before it 1",
        ),
        (
            '{"id": 1, "text": "a"}\n{"id": 2}',
            "line 2 has no 'text' but 'id'; --text names another",
        ),
        ('{"text": "a"}', "line 1 has no 'id' but 'text'; --id names another"),
        ('{"id": 1.5, "text": "a"}', "'id' is 1.5; a row's key must be a text or a whole number"),
        ('{"id": true, "text": "a"}', "'id' is True; a row's key must be"),
        ('{"id": 9223372036854775808, "text": "a"}', "a row's key must be"),
        ('{"id": 1, "text": null}', "'text' is None; a row's text must be a text"),
        ('{"id": 1, "text": "a\\ud800"}', "line 1: 'text' holds half a surrogate pair"),
        ('{"id": "\\udfff", "text": "a"}', "line 1: 'id' holds half a surrogate pair"),
        ('{"id": 1, "text": "a"}\n\nnonsense', "line 3 is no JSON: Expecting value"),
        ("[1]", "line 1: expected an object, found [1]"),
        ("[" * 100_000, "line 1 is no JSON: maximum recursion depth exceeded"),
        (f'{{"id": {"9" * 9999}, "text": "a"}}', "line 1 is no JSON: Exceeds the limit"),
        ("[" * 500 + "]" * 500, "line 1: expected an object, found [[[[[["),
    ],
)
def test_a_row_without_key_or_text_is_named_before_any_work(
    tmp_path: Path, lines: str, error: str
) -> None:
    (tmp_path / "in.jsonl").write_text(lines)
    with pytest.raises(ArgumentError) as found:
        job(tmp_path / "in.jsonl", tmp_path / "out.jsonl").run(lambda rows: pytest.fail("worked"))
    assert error in str(found.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(ArgumentError, match="line 2: expected a text in UTF-8"):
        list(Table(str(tmp_path / "in.txt")))


def test_parquet_without_the_columns_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", ["a"], text="body")
    with pytest.raises(ArgumentError, match="has no 'text' but 'other', 'id', 'body'; --text"):
        list(Table(source))
    pa = pytest.importorskip("pyarrow")
    twice = pa.table([["a"], ["b"], ["c"]], names=["id", "text", "text"])
    pytest.importorskip("pyarrow.parquet").write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ArgumentError, match="its schema has 2 columns 'text'; rename all but one"):
        list(Table(str(tmp_path / "twice.parquet")))
    (tmp_path / "bad.parquet").write_bytes(b"no table at all")
    with pytest.raises(ArgumentError, match="is no Parquet file"):
        list(Table(str(tmp_path / "bad.parquet")))


@pytest.mark.parametrize("byte", [0, 7, 255])
def test_parquet_whose_pages_are_damaged_is_named(byte: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", ["Once upon a time", "The cat"])
    data = bytearray(Path(source).read_bytes())
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # where the description begins
    data[4:end] = bytes([byte]) * (end - 4)
    Path(source).write_bytes(data)
    with pytest.raises(ArgumentError, match=r"in\.parquet is damaged behind row 0: "):
        list(Table(source))


@pytest.mark.parametrize("byte", [0, 7, 255])
def test_parquet_whose_description_is_damaged_is_named(byte: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", ["Once upon a time", "The cat"])
    data = bytearray(Path(source).read_bytes())
    size = int.from_bytes(data[-8:-4], "little")
    data[-8 - size : -8] = bytes([byte]) * size
    Path(source).write_bytes(data)
    with pytest.raises(ArgumentError, match=r"in\.parquet is no Parquet file: "):
        list(Table(source))


def test_parquet_whose_text_is_no_utf8_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", ["Zebra", "The cat"])
    data = Path(source).read_bytes().replace(b"Zebra", b"Zeb\xff\xfe")
    Path(source).write_bytes(data)
    with pytest.raises(ArgumentError, match=r"in\.parquet is damaged behind row 0: .*utf-8"):
        list(Table(source))


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ArgumentError, match=r"pip install 'tinyllm\[parquet\]', or use .jsonl"):
        job("in.txt", tmp_path / "out.parquet")
    with pytest.raises(ArgumentError, match=r"pip install 'tinyllm\[parquet\]'"):
        list(Table(str(tmp_path / "in.parquet")))


# ---- kills


@pytest.fixture
def whole(tmp_path: Path) -> tuple[str, bytes, bytes]:
    """A table, the journal of its finished job before the output is written, and the output."""
    source = write(tmp_path / "in.jsonl", ["a", "b", "c", "d"])
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "end", lambda journal, n_bytes: kept.append(journal.file.name))
        job(source, tmp_path / "whole.jsonl").run(shout)
    return source, Path(kept[0]).read_bytes(), (tmp_path / "whole.jsonl").read_bytes()


def test_a_journal_cut_anywhere_goes_on_and_no_finished_row_is_worked_on_again(
    tmp_path: Path, whole: tuple[str, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # several hundred take seconds
    source, journal, output = whole
    target = tmp_path / "out.jsonl"
    for n in range(len(journal) + 1):
        Path(f"{target}.job").write_bytes(journal[:n])
        worked = []

        def work(rows: Rows, worked: list = worked) -> Iterator[tuple[int, dict]]:
            rows = list(rows)
            worked += rows
            return shout(iter(rows))

        assert job(source, target).run(work) == 0
        assert target.read_bytes() == output
        assert len(worked) == 4 - max(0, journal[:n].count(b"\n") - 1)
        target.unlink()


@pytest.mark.parametrize(
    "tail", [b"\0" * 40, b"[2, {}", b'{"a": 1}\n', b"\xff\xfe\n", b"[99, {}]\n"]
)
def test_what_is_no_row_at_a_journals_end_is_dropped(
    tmp_path: Path, whole: tuple[str, bytes, bytes], tail: bytes
) -> None:
    source, journal, output = whole
    lines = journal.splitlines(keepends=True)
    Path(tmp_path / "out.jsonl.job").write_bytes(b"".join(lines[:2]) + tail)
    job(source, tmp_path / "out.jsonl").run(shout)
    assert (tmp_path / "out.jsonl").read_bytes() == output


def test_a_damaged_byte_costs_its_line_and_is_told(
    tmp_path: Path, whole: tuple[str, bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # several hundred take seconds
    source, journal, output = whole
    target, begin = tmp_path / "out.jsonl", journal.index(b"\n") + 1
    path = f"{target}.job"
    for place in range(begin, len(journal) - 1, 3):
        damaged = bytearray(journal)
        damaged[place] ^= 1
        Path(path).write_bytes(damaged)
        told: list[str] = []
        assert job(source, target).run(shout, tell=told.append) == 0
        assert target.read_bytes() == output
        n_left = 2 if journal[place] == ord("\n") else 3  # one line, or the two that it parted
        assert told == [
            f"damaged lines of {path}, left out: 1",
            f"rows that {path} has already: {n_left} of 4",
        ]
        target.unlink()


def test_a_kill_between_the_output_and_the_end_changes_nothing(
    tmp_path: Path, whole: tuple[str, bytes, bytes]
) -> None:
    source, journal, output = whole
    (tmp_path / "out.jsonl").write_bytes(output)
    (tmp_path / "out.jsonl.job").write_bytes(journal)
    (tmp_path / "out.jsonl.123-0.part").write_bytes(b"half")
    assert job(source, tmp_path / "out.jsonl").run(lambda rows: pytest.fail("worked")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == output
    assert not (tmp_path / "out.jsonl.123-0.part").exists()
    about, ended = (tmp_path / "out.jsonl.job").read_bytes().splitlines(keepends=True)
    assert about == journal.splitlines(keepends=True)[0]
    assert json.loads(ended) == {"written": len(output)}
    assert job(source, tmp_path / "out.jsonl").run(lambda rows: pytest.fail("worked")) is None


def test_an_output_that_is_not_the_jobs_is_named_and_left(
    tmp_path: Path, whole: tuple[str, bytes, bytes]
) -> None:
    source, journal, output = whole
    target = tmp_path / "out.jsonl"
    job(source, target).run(shout)
    target.write_bytes(output[:-9])
    with pytest.raises(ArgumentError, match=f"has {len(output) - 9} bytes, and had {len(output)}"):
        job(source, target).run(shout)
    assert target.read_bytes() == output[:-9]
    Path(f"{target}.job").write_bytes(b"".join(journal.splitlines(keepends=True)[:3]))
    with pytest.raises(ArgumentError, match="exists, and 2 rows of its job are not done; move it"):
        job(source, target).run(shout)
    target.unlink()
    job(source, target).run(shout)
    assert target.read_bytes() == output


def test_a_result_that_comes_twice_counts_once(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a", "b"])

    def twice(rows: Rows) -> Iterator[tuple[int, dict]]:
        rows = list(rows)
        yield from shout(iter(rows))
        yield from ((n, {**r, "shout": "other"}) for n, r in shout(iter(rows)))

    told = []
    job(source, tmp_path / "out.jsonl").run(twice, lambda n, total: told.append((n, total)))
    assert [row["shout"][:4] for row in read(tmp_path / "out.jsonl")] == ["TEXT", "TEXT"]
    assert told == [(0, 2), (1, 2), (2, 2), (2, 2), (2, 2)]


def test_work_that_leaves_rows_out_is_an_error_and_keeps_the_others(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a", "b"])
    with pytest.raises(tinyllm.errors.TinyLLMError, match="rows without a result: 1"):
        job(source, tmp_path / "out.jsonl").run(lambda rows: list(shout(rows))[:1])
    assert not (tmp_path / "out.jsonl").exists()
    assert job(source, tmp_path / "out.jsonl").run(shout) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda source: write(Path(source), ["a", "x"]),
            "job: limit was 1, now 2, the rows have changed; give",
        ),
        (lambda source: write(Path(source), ["a", "b", "c"]), "the rows have changed; give"),
        (lambda source: None, "job: limit was 1, now 2; give what it was begun with, or remove it"),
    ],
)
def test_another_job_is_refused(tmp_path: Path, change: Callable, error: str) -> None:
    source = write(tmp_path / "in.jsonl", ["a", "b"])
    with pytest.raises(ZeroDivisionError):
        job(source, tmp_path / "out.jsonl", options={"limit": 1}).run(stops)
    change(source)
    with pytest.raises(ArgumentError) as found:
        job(source, tmp_path / "out.jsonl", options={"limit": 2}).run(shout)
    assert error in str(found.value)


def test_work_that_fails_before_the_first_row_leaves_nothing(tmp_path: Path) -> None:
    """And whoever waited for the lock meanwhile works on a journal that is there."""
    source, target = write(tmp_path / "in.txt", [1, 2, 3]), tmp_path / "out.jsonl"
    for error in (OSError, KeyboardInterrupt):

        def ends(rows: Rows, error: type = error) -> Iterator[tuple[int, dict]]:
            raise error
            yield

        with pytest.raises(error):
            job(source, target).run(ends)
        assert os.listdir(tmp_path) == ["in.txt"]
    others: list[threading.Thread] = []
    told: list[str] = []
    waits = threading.Event()

    def fails(rows: Rows) -> Iterator[tuple[int, dict]]:
        others.append(
            threading.Thread(
                target=job(source, target).run,
                args=[shout],
                kwargs={"tell": lambda line: (told.append(line), waits.set())},
            )
        )
        others[0].start()
        assert waits.wait(60)
        raise OSError("no way")
        yield

    with pytest.raises(OSError, match="no way"):
        job(source, target, model="another").run(fails)
    others[0].join()
    assert told == [f"another process works on {target}; this one waits"]
    assert [row["size"] for row in read(target)] == [len(text) for _, text in Table(source)]


def test_a_key_that_occurs_twice_is_two_rows(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", ["a", "a"]), tmp_path / "out.jsonl"
    job(source, target).run(shout)
    assert [row["id"] for row in read(target)] == ["a", "a"]


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ArgumentError, match="exists; remove it"):
        job(source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    for mine in ("mine\n", "mine", "[]\n", '[["a", 1]]\n', "[" * 100_000 + "\n"):
        (tmp_path / "out.jsonl.job").write_text(mine)
        with pytest.raises(ArgumentError, match="is no journal of tinyllm"):
            job(source, tmp_path / "out.jsonl").run(shout)
        assert (tmp_path / "out.jsonl.job").read_text() == mine


@pytest.mark.parametrize("n_lines", [0, 1])
def test_a_journal_without_a_row_says_nothing_of_a_file_that_is_there(
    tmp_path: Path, whole: tuple[str, bytes, bytes], n_lines: int
) -> None:
    """A kill has left it, before the first row or in the middle of its first line."""
    source, journal, output = whole
    target = tmp_path / "out.jsonl"
    target.write_text("mine")
    Path(f"{target}.job").write_bytes(b"".join(journal.splitlines(keepends=True)[:n_lines]))
    with pytest.raises(ArgumentError, match="exists; remove it, or give another name"):
        job(source, target).run(lambda rows: pytest.fail("worked"))
    assert target.read_text() == "mine"
    target.unlink()
    assert job(source, target).run(shout) == 0
    assert target.read_bytes() == output


def test_a_kill_at_the_journals_end_leaves_the_rows_or_the_size(
    tmp_path: Path, whole: tuple[str, bytes, bytes]
) -> None:
    source, journal, output = whole
    target = tmp_path / "out.jsonl"
    begin = journal.index(b"\n") + 1
    ended = json.dumps({"written": len(output)}).encode() + b"\n"
    target.write_bytes(output)
    Path(f"{target}.job").write_bytes(journal[:begin] + ended + journal[begin + len(ended) :])
    assert job(source, target).run(lambda rows: pytest.fail("worked")) is None


@pytest.mark.parametrize("while_working", [True, False])
@pytest.mark.parametrize(
    "keys", [["x", "b", "c"], ["a", "b", "x"], ["a", "b"], ["a", "b", "c", "d"], []], ids=str
)
def test_rows_that_change_meanwhile_are_refused_and_what_is_finished_stays(
    tmp_path: Path, keys: list, while_working: bool
) -> None:
    source, target = write(tmp_path / "in.jsonl", ["a", "b", "c"]), tmp_path / "out.jsonl"
    before = Path(source).read_bytes()

    def changes(rows: Rows) -> Iterator[tuple[int, dict]]:
        if while_working:
            write(Path(source), keys)
        yield from shout(rows)
        write(Path(source), keys)

    with pytest.raises(ArgumentError, match=r"in\.jsonl has changed since this run began, at its"):
        job(source, target).run(changes)
    assert not target.exists()
    if not while_working:
        with pytest.raises(ArgumentError, match="the rows have changed"):
            job(source, target).run(shout)
        Path(source).write_bytes(before)
        assert job(source, target).run(lambda rows: pytest.fail("worked")) == 0
        assert [row["id"] for row in read(target)] == ["a", "b", "c"]


def test_a_disk_without_room_is_named_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    source, target = write(tmp_path / "in.txt", list(range(9))), tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes in a file
    try:
        found = main(["map", "embed", source, str(target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == 1
    noted, told = capsys.readouterr().err.splitlines()
    assert noted == f"(stopped; what is done is in {target}.job, and the same command goes on)"
    assert "File too large" in told
    assert f"{target}.job" in told
    run("embed", source, target)
    assert len(read(target)) == 9


def test_a_name_with_a_star_takes_no_part_of_another_table(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out.jsonl.5-0.part").write_text("another's")
    job(source, tmp_path / "o[su]*t.jsonl").run(shout)
    assert (tmp_path / "out.jsonl.5-0.part").exists()


def test_a_key_named_like_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="the key's column is named 'size'"):
        Job(Table("in.jsonl", key="size"), str(tmp_path / "out.jsonl"), COLUMNS, {})


def test_a_model_is_known_by_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a" * (2 * jobs.END + 5))
    before = jobs.file_identity(path)
    path.write_bytes(b"a" * (2 * jobs.END + 4) + b"b")
    after = jobs.file_identity(path)
    assert before["bytes"] == after["bytes"]
    assert before["digest"] != after["digest"]


# ---- the command


def run(*argv: str) -> None:
    assert main(["map", *map(str, argv)]) == 0


def test_the_command_embeds(tmp_path: Path) -> None:
    source = write(tmp_path / "in.txt", list("abc"))
    run("embed", source, tmp_path / "out.jsonl", "--pooling", "last")
    texts = [text for _, text in Table(source)]
    with tinyllm.load() as model:
        expected = model.embed(texts, "last")
    assert (
        np.float32([row["embedding"] for row in read(tmp_path / "out.jsonl")]) == expected
    ).all()


def test_the_command_tells_of_rows_with_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"n": 4, "body": "cat " * 9000}) + "\n")
    run("score", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--id", "n", "--text", "body")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["n"] == 4
    assert "tokens" in row["error"]
    assert (
        capsys.readouterr().err
        == "(rows that could not be worked on: 1; the column 'error' says why)\n"
    )
    run("score", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--id", "n", "--text", "body")
    assert "is whole already; remove it to make it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["embed", "a.txt", "b.jsonl", "--seed", "2"], "--seed has no meaning for embed"),
        (
            ["score", "a.txt", "b.jsonl", "--no-normalize"],
            "--no-normalize has no meaning for score",
        ),
        (["generate", "a.txt", "b.jsonl", "--pooling", "cls"], "--pooling has no meaning"),
        (["embed", "a.txt", "b.txt"], "b.txt: expected a name that ends in .parquet, .jsonl"),
        (["embed", "a.txt", "b.jsonl", "--text", "x"], "--text has no meaning for a.txt"),
        (["embed", "a.txt", "none/b.jsonl"], "none for b.jsonl; make it first"),
        (["embed", "a.csv", "b.jsonl"], "a.csv: expected a name that ends in .parquet, .jsonl"),
    ],
)
def test_a_wrong_command_is_one_line(
    argv: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["map", *argv]) == 2
    told = capsys.readouterr().err
    assert error in told
    assert told.count("\n") == 1


def test_the_command_tells_what_an_earlier_run_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write(tmp_path / "in.txt", list("abc")), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "end", lambda journal, n_bytes: None)
        run("score", source, target)
    journal = Path(f"{target}.job")
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    target.unlink()
    run("score", source, target)
    assert capsys.readouterr().err == f"(rows that {journal} has already: 2 of 3)\n"


def test_a_missing_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("none.jsonl", "none.parquet"):
        assert main(["map", "embed", str(tmp_path / name), str(tmp_path / "out.jsonl")]) == 1
        assert "none" in capsys.readouterr().err


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_process_killed_again_and_again_writes_each_row_once_and_the_bits_of_one_run(
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "in.jsonl", [f"k{i}" for i in range(150)])
    options = ["--max-tokens", "24", "--seed", "3"]
    run("generate", source, tmp_path / "whole.jsonl", *options)
    target, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.job"
    command = [sys.executable, "-m", "tinyllm", "map", "generate", source, str(target), *options]
    chance, kills = random.Random(1), 0
    while True:
        enough = lines_of(journal) + chance.randint(1, 60)
        process = subprocess.Popen(command)
        while process.poll() is None and (kills >= 3 or lines_of(journal) < enough):
            time.sleep(0.002)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [row["id"] for row in read(target)] == [f"k{i}" for i in range(150)]
