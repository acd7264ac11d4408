"""Mixed work on shared models from several threads, for a long time: memory stays flat, nothing hangs or mixes.

    python benchmarks/soak.py                              # 30 minutes; benchmarks/results/soak.json
    python benchmarks/soak.py --minutes 1 --output -       # a slice, its result on standard output

Four threads generate, stream, abandon streams, chat, embed, and make, save, restore and drop states of the
bundled model and of MiniLM (where the test data is; else nothing is embedded). Every call was made alone
before, and must give the same again: the same text, the same bits of a vector. A watchdog ends the run with
every thread's stack when one finishes nothing for ten minutes. Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import tinyllm  # noqa: E402
from tinyllm.system import cpu_name  # noqa: E402

DATA = Path(os.environ.get("TINYLLM_TESTDATA", ROOT.parent / "shared" / "data"))
EMBEDDER = DATA / "models" / "all-MiniLM-L6-v2.gguf2.f16.gguf"
STALL = 600.0  # seconds without a finished call: a machine may be busy with other things
GROWTH = (
    24 << 20
)  # bytes that the resident memory may grow from the second fifth of the run to the last
PROMPTS = (
    "Once upon a time",
    "The little dog",
    "One day, Lily",
    "Tom and his mom went",
    "It was raining",
)
MESSAGES = ("Hello!", "Tell me a story about a cat.", "What do you like?")
TEXTS = (
    "A first text.",
    "Dogs chase cats.",
    "The rain in Spain " * 12,
    "x",
    "Grüße aus Köln, 你好",
)

Call = Callable[[], Any]


# ---- the calls


def sampling(i: int) -> dict[str, Any]:
    """Greedy, or drawn with a seed, with and without penalties."""
    drawn = {"temperature": 0.9 * (i % 2), "seed": i, "repeat_penalty": 1 + i % 3 / 9}
    return {"max_tokens": 12 + 9 * (i % 4), **drawn}


def generating(model: tinyllm.Model, i: int) -> str:
    return str(model.generate(PROMPTS[i % len(PROMPTS)], **sampling(i)))


def in_a_batch(model: tinyllm.Model, i: int) -> list[str]:
    return [str(c) for c in model.generate(list(PROMPTS[: 2 + i % 3]), **sampling(i))]


def streaming(model: tinyllm.Model, i: int) -> str:
    pieces = model.generate(PROMPTS[i % len(PROMPTS)], stream=True, **sampling(i))
    return "".join(pieces)


def abandoning(model: tinyllm.Model, i: int) -> str:
    """A few pieces of an answer that would go on; every second one is closed, the others just dropped."""
    options = {**sampling(i), "max_tokens": -1, "overflow": "shift"}
    pieces = model.generate(PROMPTS[i % len(PROMPTS)], stream=True, **options)
    text = "".join(next(pieces) for _ in range(1 + i % 5))
    if i % 2:
        pieces.close()
    return text


def chatting(model: tinyllm.Model, i: int) -> list[str]:
    """Two turns in one state."""
    state, messages = model.new_state(256), []
    for turn in range(2):
        messages.append({"role": "user", "content": MESSAGES[(i + turn) % len(MESSAGES)]})
        answer = str(model.chat(messages, state=state, **sampling(i)))
        messages.append({"role": "assistant", "content": answer})
    return [m["content"] for m in messages]


def keeping(model: tinyllm.Model, i: int) -> str:
    """A state saved in the middle goes on in another; both are dropped."""
    with tempfile.TemporaryDirectory() as folder:
        state, other = model.new_state(128), model.new_state(160)
        first = model.generate(PROMPTS[i % len(PROMPTS)], state=state, **sampling(i))
        state.save(Path(folder) / "state.npz")
        other.restore(Path(folder) / "state.npz")
    return str(first) + str(model.generate(" and then", state=other, **sampling(i)))


def making_states(model: tinyllm.Model, i: int) -> list[int]:
    """States that are used by nobody, or for a token, and dropped."""
    states = [model.new_state(64 << (n % 4)) for n in range(i % 6 + 1)]
    return [int(np.argmax(model.logits([1, 2 + n], s)[-1])) for n, s in enumerate(states[::2])]


def embedding(model: tinyllm.Model, i: int) -> list[float]:
    texts = [TEXTS[(i + n) % len(TEXTS)] for n in range(1 + i % 3)]
    return model.embed(texts).ravel().tolist()


WRITING = (generating, in_a_batch, streaming, abandoning, chatting, keeping, making_states)
N_EACH = 12  # different arguments of each


@dataclass(frozen=True)
class Job:
    """One call and what it gives when nothing else runs."""

    name: str
    call: Call
    expected: Any


def jobs(writer: tinyllm.Model, embedder: tinyllm.Model | None) -> list[Job]:
    """Every call of the mix, made once alone."""
    kinds: list[tuple[Callable[[Any, int], Any], Any]] = [(kind, writer) for kind in WRITING]
    if embedder is not None:
        kinds.append((embedding, embedder))
    calls = [(k.__name__, lambda k=k, m=m, i=i: k(m, i)) for k, m in kinds for i in range(N_EACH)]
    return [Job(name, call, call()) for name, call in calls]


# ---- the run


@dataclass
class Soak:
    """What the threads have done, and when each last finished something."""

    jobs: list[Job]
    stop: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    beats: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, number: int, seed: int) -> None:
        """A thread's life: calls in random order until told to stop."""
        rng = random.Random(f"{seed} {number}")
        while not self.stop.is_set():
            job = rng.choice(self.jobs)
            fault = attempt(job)
            with self.lock:
                self.done[job.name] += 1
                self.beats[number] = time.monotonic()
                if fault:
                    self.faults.append(fault)

    def stalled(self) -> list[int]:
        """Threads that have finished nothing for too long."""
        with self.lock:
            return [n for n, at in self.beats.items() if time.monotonic() - at > STALL]


def attempt(job: Job) -> str:
    """Make the call; what is wrong with its result, or nothing."""
    try:
        got = job.call()
    except Exception as e:
        return f"{job.name}: {type(e).__name__}: {e}"
    return (
        "" if got == job.expected else f"{job.name}: {got!r:.200} instead of {job.expected!r:.200}"
    )


def resident() -> int:
    """Bytes of main memory that the process holds now."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # elsewhere: the most it ever held

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def soak(all_jobs: list[Job], seconds: float, n_threads: int, seed: int) -> dict[str, Any]:
    """Run the mix; the result as it is recorded."""
    run, start, cpu = Soak(all_jobs), time.monotonic(), time.process_time()
    run.beats = dict.fromkeys(range(n_threads), start)
    threads = [
        threading.Thread(target=run.work, args=(n, seed), daemon=True) for n in range(n_threads)
    ]
    for t in threads:
        t.start()
    memory = watch(run, start + seconds)
    stalled = len(run.stalled())
    if stalled:
        faulthandler.dump_traceback(all_threads=True)
    run.stop.set()
    for t in threads:
        t.join(STALL)
    hung = sum(t.is_alive() for t in threads)
    return {
        "minutes": round((time.monotonic() - start) / 60, 2),
        "threads": n_threads,
        "seed": seed,
        "calls": dict(sorted(run.done.items())),
        "wrong": run.faults[:20],
        "n_wrong": len(run.faults),
        "hung_threads": hung,
        "stalled_threads": stalled,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **flatness(memory),
    }


def watch(run: Soak, end: float) -> list[int]:
    """Resident bytes, second by second, until the end or until a thread hangs."""
    memory = []
    while time.monotonic() < end and not run.stalled():
        gc.collect()  # what is dropped in a cycle counts once collected
        memory.append(resident())
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))
    return memory


def flatness(memory: list[int]) -> dict[str, Any]:
    """How the memory went: medians of the fifths of the run, in MiB, and its growth after the first."""
    n = max(len(memory) // 5, 1)
    fifths = [statistics.median(memory[i * n : (i + 1) * n] or memory[-1:]) for i in range(5)]
    mib = [round(b / (1 << 20), 1) for b in fifths]
    growth = fifths[-1] - fifths[1]
    return {
        "resident_mib": mib,
        "growth_mib": round(growth / (1 << 20), 1),
        "flat": growth < GROWTH,
    }


# ---- what ran


def machine() -> dict[str, Any]:
    """The processor and the versions; nothing that names the machine."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "tinyllm": tinyllm.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit that is checked out, or nothing outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def good(result: dict[str, Any]) -> bool:
    bad = result["n_wrong"] or result["hung_threads"] or result["stalled_threads"]
    return result["flat"] and not bad


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "soak.json"))
    return parser.parse_args()


def main() -> int:
    args = arguments()
    embedder = tinyllm.load(EMBEDDER) if EMBEDDER.exists() else None
    if embedder is None:
        print("nothing is embedded: the test data has no MiniLM", file=sys.stderr)
    all_jobs = jobs(tinyllm.load(prefix_bytes=1 << 24), embedder)
    result = {**machine(), **soak(all_jobs, 60 * args.minutes, args.threads, args.seed)}
    out = io.StringIO()
    json.dump(result, out, indent=1, ensure_ascii=False)
    if args.output == "-":
        print(out.getvalue())
    else:
        Path(args.output).write_text(out.getvalue() + "\n", "utf-8")
    sys.stdout.flush()
    if result["hung_threads"]:
        os._exit(1)  # they would hold up the end
    return int(not good(result))


if __name__ == "__main__":
    sys.exit(main())
