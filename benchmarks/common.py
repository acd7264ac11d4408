"""What every benchmark shares: facts of the machine, medians with their range, JSON files, helper processes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PACKAGES = ("numpy", "numba", "llvmlite", "llama-cpp-python", "gpt4all", "torch", "transformers")
SIMD = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
SPINNING = 0.02  # an idle process that uses more of a core is reported


# ---- facts


def machine() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the computer or its folders."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cpu_features": cpu_features(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def cpu_name() -> str:
    """The processor's name, as its maker writes it."""
    lines = cpuinfo("model name")
    return lines[0] if lines else platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those vector extensions that matter for products of small integers."""
    found = set(" ".join(cpuinfo("flags")[:1] + cpuinfo("Features")[:1]).split())
    return [name for name in SIMD if name in found]


def cpuinfo(key: str) -> list[str]:
    """All values of one key that Linux tells; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [v.strip() for k, _, v in (line.partition(":") for line in lines) if k.strip() == key]


def packages() -> dict[str, str]:
    """Versions of what takes part, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit; "+" marks changes in the package that it does not hold."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "tinyllm")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def git(*args: str) -> str:
    """What git answers; empty where this is no checkout."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    ``ru_maxrss`` would begin with the parent's peak, which the kernel keeps across fork and exec.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_once(path: Path) -> None:
    """A file into the system's cache, so that the first engine to load it does not wait for the disk."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


# ---- numbers


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median and range of repeated measurements, and the measurements in the order they were made."""
    values = [round(v, 6) for v in values]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours over theirs, round by round: what slows a whole round cancels."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def show(s: dict[str, Any], digits: int = 1) -> str:
    """A median with its range."""
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def warnings(idle: dict[str, float]) -> list[str]:
    """Who was not idle while others were measured."""
    return [
        f"- WARNING: {name} kept {share:.0%} of a core busy while others were measured"
        for name, share in idle.items()
        if share > SPINNING
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its columns aligned."""
    grid = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in grid
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def write_json(path: str | Path, report: dict[str, Any]) -> None:
    """A file that a person can read and git can compare."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


# ---- helper processes


class Worker:
    """A process that lives as long as the comparison and does one request at a time, idle in between.

    Requests and answers are lines of JSON; see ``serve`` for the other end.
    """

    def __init__(self, python: str, script: Path, *args: str) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.name = args[0] if args else script.stem
        self.waited = [0.0, 0.0]  # seconds of CPU, of wall clock
        self.process = subprocess.Popen(
            [python, str(script), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, op: str, **args: Any) -> Any:
        """The answer to one request.

        Raises
        ------
        RuntimeError
            The process failed, and how; its traceback is on stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **args}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                f"{self.name} ended (exit status {self.process.wait()}) during {op!r}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def measure(self, **args: Any) -> Any:
        """One measurement; how busy the process was while it waited is added up."""
        self.waited = [a + b for a, b in zip(self.waited, self.ask("idle"), strict=True)]
        return self.ask("measure", **args)

    @property
    def idle_share(self) -> float:
        """Share of a core that the process used while others were measured."""
        return self.waited[0] / max(self.waited[1], 1e-3)

    def close(self) -> None:
        """End the process, gently first."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def neighbours(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """While inside, n processes do nothing but compute; each wants a core for itself."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def serve(target: Any) -> None:
    """Answer requests with the methods of ``target`` until the pipe closes.

    ``idle`` is answered with the CPU and wall-clock seconds since the last answer: a process that spins while
    others are measured spoils their numbers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints must not land between the answers
    last = clocks()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "idle":
            answer = {"result": [now - then for now, then in zip(clocks(), last, strict=True)]}
        else:
            answer = call(target, **request)
        last = clocks()
        print(json.dumps(answer), file=answers, flush=True)


def clocks() -> tuple[float, float]:
    """CPU seconds of this process, and wall clock."""
    return time.process_time(), time.perf_counter()


def call(target: Any, op: str, **args: Any) -> dict[str, Any]:
    """A method's result, or its error; the traceback goes to stderr."""
    try:
        return {"result": getattr(target, op)(**args)}
    except Exception as e:
        traceback.print_exc()
        return {"error": f"{type(e).__name__}: {e}"}


def each_model(
    report: dict[str, Any],
    o: argparse.Namespace,
    compare: Callable[[Path, argparse.Namespace], dict[str, Any]],
    as_text: Callable[[dict[str, Any]], str],
) -> None:
    """Compare on every file, print, and write what there is after each."""
    report["models"] = []
    for model in o.models:
        print(model.name, file=sys.stderr, flush=True)
        report["models"].append(compare(model, o))
        print(as_text(report["models"][-1]), flush=True)
        if o.json:
            write_json(o.json, report)


# ---- command line


def counts(text: str) -> list[int]:
    """Numbers of at least 1 on the command line."""
    found = [int(n) for n in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return found


def names(text: str) -> list[str]:
    """The elements of a list on the command line."""
    return text.split(",")


def existing(text: str) -> Path:
    """The path of a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def add_peers(parser: argparse.ArgumentParser) -> None:
    """``--python`` and ``--json``, of every comparison."""
    said = "ENGINE=python of its environment"
    parser.add_argument("--python", type=pair, action="append", default=[], help=said)
    parser.add_argument("--json", type=Path, help="file for the results")


def pair(text: str) -> tuple[str, str]:
    """ENGINE=PYTHON."""
    engine, _, python = text.partition("=")
    if not python:
        raise argparse.ArgumentTypeError(f"{text!r}; expected ENGINE=PYTHON")
    return engine, python
