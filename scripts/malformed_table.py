#!/usr/bin/env python3
"""Write docs/malformed.md: what tinyllm, the gguf package and llama.cpp do with malformed files.

    python scripts/malformed_table.py                  # writes docs/malformed.md
    python scripts/malformed_table.py --check          # fails if tinyllm accepts, dies or takes too long

Each file is opened by each reader in a process of its own, which may take 10 seconds and 2 GiB.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gguf")]

import malformed  # noqa: E402  # the tables of cases lie with the tests
import malformed_models  # noqa: E402

SECONDS = 10  # processor time, so that a busy machine makes no difference
PATIENCE = 90  # seconds by the clock, for readers that wait for ever
BYTES = 2 << 30
Opener = Callable[[str], None]


def tinyllm_file() -> Opener:
    from tinyllm import gguf

    return lambda path: gguf.open(path).close()


def package_file() -> Opener:
    import gguf

    def open_file(path: str) -> None:
        gguf.GGUFReader(path)

    return open_file


def llama_cpp_file() -> Opener:
    """ggml's own parser, called as llama.cpp calls it before anything else."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama_cpp")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    parse = library.gguf_init_from_file
    parse.restype, parse.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Parameters]

    def open_file(path: str) -> None:
        if not parse(path.encode(), Parameters(no_alloc=True)):
            raise ValueError("refused")

    return open_file


class Parameters(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def tinyllm_model() -> Opener:
    with tempfile.TemporaryDirectory() as folder:  # everything is imported once, before the forks
        path = Path(folder) / "model.gguf"
        path.write_bytes(malformed_models.VALID["template"])
        malformed_models.use(str(path))
    return malformed_models.use


def llama_cpp_model() -> Opener:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # looking for a debugger takes longer than dying
    import llama_cpp

    def use(path: str) -> None:
        model = llama_cpp.Llama(path, n_ctx=32, n_threads=1, verbose=False)
        model.create_completion("ab a", max_tokens=3, temperature=0)
        if "tokenizer.chat_template" in model.metadata:
            hi = [{"role": "user", "content": "hi"}]
            model.create_chat_completion(hi, max_tokens=1, temperature=0)

    return use


FILE_READERS = {
    "tinyllm": tinyllm_file,
    "gguf": package_file,
    "llama.cpp": llama_cpp_file,
}
MODEL_READERS = {"tinyllm": tinyllm_model, "llama.cpp": llama_cpp_model}
OURS = ("GGUFError", "UnsupportedModel", "NumericError", "TemplateError", "DeviceError")


def outcome(opener: Opener, path: str) -> dict[str, object]:
    """Open the file in a forked process: what happened, in how much time and memory."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        attempt(opener, path, send)
    os.close(send)
    says = listen(receive, child)
    os.close(receive)
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime  # processor time: the machine may be busy
    return {"what": describe(says, status), "seconds": seconds, "kib": usage.ru_maxrss}


def attempt(opener: Opener, path: str, send: int) -> None:
    """In the child: silence the library, set the limits, open, report, end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    try:
        opener(path)
        says = "accepted"
    except BaseException as error:
        says = f"{type(error).__name__}: {error}".replace(path, "FILE")
    os.write(send, says.encode("utf-8", "backslashreplace")[:1000])
    os._exit(0)


def listen(receive: int, child: int) -> str:
    """What the child reports, or an empty text when it dies or takes too long."""
    ready, _, _ = select.select([receive], [], [], PATIENCE)
    if not ready:
        os.kill(child, signal.SIGKILL)
        return f"still waiting after {PATIENCE} s"
    return os.read(receive, 1000).decode(errors="replace")


def describe(says: str, status: int) -> str:
    if says:
        return says
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"still busy after {SECONDS} s"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"


def verdict(what: str) -> str:
    """One word for the table."""
    kind = what.partition(":")[0]
    if kind == "accepted":
        return "**accepted**"
    if kind.startswith(("killed", "still", "ended")):
        return f"**{kind}**"
    if kind == "MemoryError":
        return "**out of memory**"
    return "refused" if kind in (*OURS, "ValueError") else kind


def run(cases: list[malformed.Case], readers: dict[str, Callable[[], Opener]]) -> list[dict]:
    """Every case by every reader that is installed."""
    rows: list[dict] = [{"case": name, "bytes": len(raw)} for name, raw, _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.gguf" for i in range(len(cases))]
        for path, (_, raw, _) in zip(paths, cases, strict=True):
            path.write_bytes(raw)
        for reader, prepare in readers.items():
            opener = prepare()
            for row, path in zip(rows, paths, strict=True):
                row[reader] = outcome(opener, str(path))
    return rows


def installed(readers: dict[str, Callable[[], Opener]]) -> dict[str, Callable[[], Opener]]:
    names = {"tinyllm": "tinyllm", "gguf": "gguf", "llama.cpp": "llama_cpp"}
    return {r: f for r, f in readers.items() if importlib.util.find_spec(names[r])}


def page(rows: list[dict], readers: list[str]) -> Iterator[str]:
    """The summary and the table of one set of cases."""
    yield "| | refused | accepted | died, hung or ran out of memory | other exceptions |"
    yield "|---|---|---|---|---|"
    for reader in readers:
        words = Counter(classify(verdict(str(row[reader]["what"]))) for row in rows)
        counts = " | ".join(str(words[k]) for k in ("refused", "accepted", "died", "other"))
        yield f"| {reader} | {counts} |"
    yield ""
    yield f"| case | bytes | {' | '.join(readers)} | what tinyllm says |"
    yield "|---|---|" + "---|" * (len(readers) + 1)
    for row in rows:
        words = " | ".join(verdict(str(row[r]["what"])) for r in readers)
        says = str(row["tinyllm"]["what"]).partition(": ")[2].removeprefix("FILE, ")
        yield f"| {cell(row['case'], 50)} | {row['bytes']} | {words} | {cell(says, 150)} |"
    yield ""


def classify(word: str) -> str:
    if word in ("refused", "**accepted**"):
        return word.strip("*")
    return "died" if word.startswith("**") else "other"


def cell(text: str, n: int) -> str:
    text = text if len(text) <= n else text[: n - 3] + "..."
    return "`" + text.replace("|", "\\|").replace("`", "'").replace("\n", " ") + "`"


INTRODUCTION = """# Malformed files

A model file is a program from a stranger. Each of these files is wrong in one place; every one must be refused
with an error that says where, in less than a second and without taking the memory it claims to need. The
tables are made by `scripts/malformed_table.py`, which gives each file to each reader in a process of its own,
with 10 seconds and 2 GiB: tinyllm, the `gguf` package {gguf}, and llama.cpp as in llama-cpp-python {llama}.
"Accepted" means that the reader reported nothing.

## Files

{n_files} files that break the format. llama.cpp is asked through its parser, `gguf_init_from_file`. Some of the
files that others accept do no harm to a reader that looks no further; some are refused later.
"""
MODELS = """## Models

{n_models} files that keep to the format, but whose keys, tensors, vocabulary or template make no model. Each is
loaded, asked for three tokens and, where it has a chat template, for an answer. Shown in bold under tinyllm:
what is still to be refused.
"""

MUTANTS = """## Mutants

What `tests/fuzz` has tried beyond these files: damaged copies of good inputs, each of which may be accepted or
refused with one of our exceptions, within a second of the processor and 256 MiB. A finding is a kind of
failure, however many mutants met it; each became a test, and was mended. The long runs so far
(`tests/fuzz/results.json`):

| what is damaged | mutants | accepted | refused | findings |
|---|---|---|---|---|"""


def mutants() -> Iterator[str]:
    """The section on what the fuzzer has tried."""
    yield MUTANTS
    runs = json.loads((ROOT / "tests" / "fuzz" / "results.json").read_text("utf-8"))
    for what, run in runs.items():
        counts = [run.get(k, "") for k in ("mutants", "accepted", "refused", "findings")]
        yield f"| {what} | {' | '.join(map(str, counts))} |"
    yield ""


def bad(rows: list[dict]) -> list[str]:
    """Where tinyllm itself falls short of its promise."""
    base = min(row["tinyllm"]["kib"] for row in rows)
    return [
        f"{row['case']}: {row['tinyllm']}"
        for row in rows
        if verdict(str(row["tinyllm"]["what"])) != "refused"
        or row["tinyllm"]["seconds"] > 1
        or row["tinyllm"]["kib"] - base > 64 << 10
    ]


def tables(check: bool) -> tuple[list[dict], list[str]]:
    """Run everything: all rows, and the lines of the page."""
    files, models = list(malformed.cases()), list(malformed_models.cases())
    readers = {"tinyllm": tinyllm_file} if check else installed(FILE_READERS)
    users = {"tinyllm": tinyllm_model} if check else installed(MODEL_READERS)
    file_rows, model_rows = run(files, readers), run(models, users)
    if check:
        return file_rows + model_rows, []
    versions = {"gguf": version("gguf"), "llama": version("llama-cpp-python")}
    lines = [
        INTRODUCTION.format(n_files=len(files), **versions),
        *page(file_rows, list(readers)),
        MODELS.format(n_models=len(models)),
        *page(model_rows, list(users)),
        *mutants(),
    ]
    return file_rows + model_rows, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run tinyllm only; write nothing")
    parser.add_argument("--json", type=Path, help="also keep the raw results")
    args = parser.parse_args()
    rows, lines = tables(args.check)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if not args.check:
        (ROOT / "docs" / "malformed.md").write_text("\n".join(lines))
    for line in bad(rows):
        print(line, file=sys.stderr)
    return int(bool(bad(rows)))


if __name__ == "__main__":
    sys.exit(main())
