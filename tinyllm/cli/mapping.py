"""``tinyllm map``: a model's work on the rows of a table."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .arguments import (
    MODEL_HELP,
    Arguments,
    Command,
    Parser,
    load_options,
    loading_of,
    locate,
    note,
    sampling_of,
    sampling_options,
)
from .arguments import load_model as load
from .terminal import has_terminal

TASKS = ("embed", "generate", "score")


def map_arguments(p: Parser) -> None:
    p.add_argument("task", metavar="TASK", choices=TASKS, help="embed, generate or score")
    p.add_argument("input", metavar="INPUT", help="rows: .parquet, .jsonl, or .txt with one a line")
    p.add_argument("output", metavar="OUTPUT", help="keys and results: .parquet or .jsonl")
    p.add_argument("-m", "--model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--text", default="text", metavar="NAME", help="column; default %(default)s")
    p.add_argument("--id", default="id", metavar="NAME", help="column of the key; default id")
    p.add_argument("--ray", metavar="ADDRESS",
                   help="work on a Ray cluster: auto, local, host:port; -t: CPUs of a worker")  # fmt: skip
    load_options(p)
    p.add_argument("--pooling", choices=("mean", "cls", "last"), help="embed: as the file says")
    p.add_argument("--no-normalize", dest="normalize", action="store_false",
                   help="embed: keep the vectors' lengths")  # fmt: skip
    p.add_argument(
        "-n", "--max-tokens", type=int, default=256, metavar="N", help="generate: of a row"
    )
    p.add_argument("--chat", action="store_true", help="generate: answer in the chat template")
    p.add_argument("--system", metavar="TEXT", help="generate: a system message; implies --chat")
    p.add_argument("--overflow", default="error", choices=("error", "shift", "truncate"),
                   help="generate: when the context is full")  # fmt: skip
    sampling_options(p)
    p.set_defaults(seed=0)


def map_(args: Arguments) -> None:
    from ..mapping import Embed, Generate, Score, Task
    from ..mapping.job import Job, file_identity
    from ..mapping.tables import TEXT, Table

    path = locate(args.model)
    tasks: dict[str, type[Task]] = {"embed": Embed, "generate": Generate, "score": Score}
    task = tasks[args.task]
    options = options_of(args)
    settings = {n: getattr(args, n) for n in ("device", "n_ctx", "kv_type", "compute")}
    loading = loading_of(args)
    about = {
        "task": args.task, "model": file_identity(path), "load": settings, "options": options,
        **identity_of_beside(loading),
    }  # fmt: skip
    if args.ray is not None:
        from ..ray.data import map_rows, ray

        ray()
    source = Table(args.input, args.text, args.id)
    if Path(args.input).suffix.lower() in TEXT and args.text != "text":
        raise ArgumentError(f"--text has no meaning for {args.input}: each line is a text")
    if not (folder := Path(args.output).absolute().parent).is_dir():
        raise ArgumentError(
            f"there is no folder {folder} for {Path(args.output).name}; make it first"
        )
    job = Job(source, args.output, task.columns, about)

    def work(rows: Iterable[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
        if args.ray is not None:
            name, cpus = None if args.model is None else str(args.model), args.n_threads
            there = {n: x for n, x in loading.items() if n != "n_threads"}  # a node has its own
            yield from map_rows(args.ray, args.task, rows, name, there, options, cpus, note)
            return
        with load(args) as model:
            yield from task(model, **options).run(rows)

    with progress(args.task) as done:
        try:
            n_errors = job.run(work, done, note)
        except (KeyboardInterrupt, OSError):  # the second: a full disk, say
            if Path(job.journal_path).exists():
                note(
                    f"stopped; what is done is in {job.journal_path}, and the same command goes on"
                )
            raise
    if n_errors is None:
        note(f"{args.output} is whole already; remove it to make it again")
    elif n_errors:
        note(f"rows that could not be worked on: {n_errors}; the column 'error' says why")


def identity_of_beside(load: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters and control vectors of a job, by what they hold; nothing where it has none."""
    from ..loading import beside_files

    chosen, vectors = beside_files(load["lora"], load["control"], load["control_layers"])
    if not (chosen or vectors):
        return {}
    return {
        "beside": {
            "lora": [[hash_of(path), scale] for path, scale in chosen],
            "control": [[hash_of(path), scale] for path, scale in vectors],
            "control_layers": load["control_layers"] and list(load["control_layers"]),
        }
    }


def hash_of(path: Path) -> str:
    """A hash of a file, or of a folder's files with their names."""
    from ..research.recording import hash_of_files

    if not path.is_dir():
        return hash_of_files([str(path)])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    whole = [(file.relative_to(path).as_posix(), hash_of_files([str(file)])) for file in files]
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def options_of(args: Arguments) -> dict[str, Any]:
    """What the task takes besides the model; ArgumentError for an option of another task."""
    own = {
        "embed": ["pooling", "normalize"],
        "generate": ["max_tokens", "chat", "system", "overflow", "stop", *sampling_of(args)],
        "score": [],
    }
    for action in COMMANDS["map"].parser("map")._actions:
        name = action.dest
        is_other = name not in own[args.task] and any(name in names for names in own.values())
        if is_other and getattr(args, name) != action.default:
            raise ArgumentError(f"{action.option_strings[-1]} has no meaning for {args.task}")
    return {name: getattr(args, name) for name in own[args.task]}


@contextmanager
def progress(what: str) -> Iterator[Any]:
    """A bar on a terminal: ``done(rows, of all)``."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="row", leave=False, disable=not has_terminal(sys.stderr)) as bar:

        def done(n: int, total: int) -> None:
            bar.total = total
            bar.update(n - bar.n)

        yield done


COMMANDS = {
    "map": Command(
        "Embed, continue or score the texts of a table; a run that was killed goes on where it stopped.",
        "tinyllm map embed texts.parquet vectors.parquet --model all-MiniLM-L6-v2.gguf2.f16.gguf",
        map_arguments, map_,
    ),
}  # fmt: skip
