"""Every notebook runs from a clean kernel; each empty exercise fails its check, and its solution passes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
SECONDS = 300  # a cell that takes longer hangs

jupytext = pytest.importorskip("jupytext", reason="notebooks need jupytext")
nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat")
nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient")
pytest.importorskip("ipykernel", reason="notebooks need ipykernel")
pytest.importorskip("matplotlib", reason="notebooks need matplotlib")

each = pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)

# the answers and the check run on a copy of the notebook's names: nothing that follows can lean on a solution
ANSWERED = """
import linecache
_names = dict(globals())
for _code in ({solution!r}, {check!r}):
    _file = f"<answer {{hash(_code)}}>"  # kernels are translated from their source: it must be found
    linecache.cache[_file] = (len(_code), None, _code.splitlines(keepends=True), _file)
    exec(compile(_code, _file, "exec"), _names)
"""


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def solutions(path: Path) -> dict[str, str]:
    """The code that answers each exercise of a notebook, by the words of its check."""
    book = jupytext.read(FOLDER / "solutions" / path.name)
    codes = [c.source for c in book.cells if c.cell_type == "code"]
    return dict(re.match(r"# (.+)\n([\s\S]+)", code).groups() for code in codes)


def checks(book) -> dict[str, str]:
    """The checking cells of a notebook, by their words."""
    cells = [c.source for c in book.cells if "check" in tags(c)]
    return {re.match(r'with check\("(.+?)"\)', c)[1]: c for c in cells}


def with_answers(path: Path):
    """The notebook with each solution and its check once more behind the check of the empty exercise."""
    book, known = jupytext.read(path), solutions(path)
    cells = []
    for cell in book.cells:
        cells.append(cell)
        if "check" in tags(cell):
            what = re.match(r'with check\("(.+?)"\)', cell.source)[1]
            code = ANSWERED.format(solution=known[what], check=cell.source)
            cells.append(nbformat.v4.new_code_cell(code, metadata={"tags": ["answered"]}))
    book.cells = cells
    return book


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def last(text: str) -> str:
    return text.strip().rpartition("\n")[2]


@each
def test_a_notebook_runs_and_its_checks_tell_right_from_wrong(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TINYLLM_COURSE_SECONDS", "0.02")  # measurements are tried, not waited for
    book = with_answers(path)
    client = nbclient.NotebookClient(book, timeout=SECONDS, kernel_name="python3")
    client.execute(cwd=str(FOLDER))
    empty = {c.source: printed(c) for c in book.cells if "check" in tags(c)}
    full = {c.source: printed(c) for c in book.cells if "answered" in tags(c)}
    assert len(empty) >= 3
    assert {k: v for k, v in empty.items() if not last(v).startswith("Not yet: ")} == {}
    assert [v for v in full.values() if not last(v).startswith("Right: ")] == []


@each
def test_the_pair_has_the_same_cells_and_no_outputs(path):
    source, pair = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), 4)
    assert [(c.cell_type, c.source) for c in pair.cells] == [
        (c.cell_type, c.source) for c in source.cells
    ], "run scripts/notebooks"
    assert [c for c in pair.cells if c.get("outputs")] == []
    assert [i for i, c in enumerate(pair.cells) if not c.source.strip()] == []
    marks = re.findall(r"^# %%", path.read_text("utf-8"), re.M)  # by which the site counts outputs
    assert len(marks) == len(pair.cells)


@each
def test_solutions_answer_the_exercises(path):
    book = jupytext.read(path)
    assert list(solutions(path)) == list(checks(book))
    assert sum("exercise" in tags(c) for c in book.cells) == len(checks(book))


@each
def test_the_list_names_it_with_a_lecture_and_a_sheet(path):
    text = (FOLDER / "README.md").read_text("utf-8")
    assert f"({path.stem}.ipynb)" in text
    _, course = text.split("## As a course")
    assert len(re.findall(rf"^\| {int(path.stem[:2])} \| .+ \| .+ \|$", course, re.M)) == 1


@each
def test_a_notebook_has_the_size_of_a_lesson(path):
    cells = jupytext.read(path).cells
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert 25 <= len(cells) <= 110
    assert words >= 900


def minutes(path: Path) -> float:
    """What notebooks/README.md says that a notebook takes: words, lines of code, guesses and exercises."""
    cells = jupytext.read(path).cells
    texts = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    shown = [c.source for c in cells if c.cell_type == "code" and not tags(c)]
    lines = sum(bool(line.strip()) for code in shown for line in code.splitlines())
    answers = [code.splitlines() for code in solutions(path).values()]
    written = [sum(bool(a.strip()) and '"""' not in a for a in lines) for lines in answers]
    exercises = sum(2 + n / 2 for n in written)
    return len(texts.split()) / 150 + lines / 20 + texts.count("**Predict") + exercises


@each
def test_a_notebook_takes_the_minutes_it_says(path):
    (said,) = re.findall(r"\*\*Time: (\d+) minutes", path.read_text("utf-8"))
    row = rf"^\| {int(path.stem[:2])} \| \[.+\]\(.+\) \| {said} \|"
    assert len(re.findall(row, (FOLDER / "README.md").read_text("utf-8"), re.M)) == 1
    assert abs(int(said) - minutes(path)) <= 5


@each
def test_a_notebook_has_at_most_400_lines_of_code(path):
    codes = [c.source for c in jupytext.read(path).cells if c.cell_type == "code"]
    assert sum(bool(line.strip()) for code in codes for line in code.splitlines()) <= 400


@pytest.mark.slow
@each
def test_a_notebook_runs_as_it_is(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.read(path.with_suffix(".ipynb"), 4)
    nbclient.NotebookClient(book, timeout=SECONDS, kernel_name="python3").execute(cwd=str(FOLDER))


def test_there_are_notebooks():
    assert SOURCES
