"""An engine under load, in process: tokens per second of chats, and the pace of texts beside a long prompt.

    python benchmarks/engine_load.py [MODEL.gguf] [--clients 8] [--requests 24] [--tokens 64] [--shared 130]

The load is that of chats which share a system message of about ``--shared`` tokens; the engine begins with
nothing in its tree of beginnings. The pace: four texts are written; then a prompt of ``--long`` tokens is read.
Each gap between two tokens is divided by what is usual without the prompt when a text is as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm

SENTENCE = (
    "You are a helpful assistant that answers briefly and politely, and gives one short reason. "
)
QUESTIONS = ["What is the capital of France?", "Name three rivers in Germany.", "Why is the sky blue?",
             "Write a line about the sea.", "Who wrote Hamlet?", "What is 12 times 12?", "Describe a cat.",
             "Give a synonym for fast."]  # fmt: skip


def conversation(m: tinyllm.Model, i: int, shared: int) -> list[int]:
    """Tokens of the i-th chat."""
    system = SENTENCE * max(1, round(shared / len(m.tokenizer.encode(SENTENCE))))
    user = f"{QUESTIONS[i % len(QUESTIONS)]} ({i})"
    try:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return m.turn(messages).ids
    except tinyllm.errors.TemplateError:
        return m.prompt_ids(f"{system}\n{user}\n")


def load(m: tinyllm.Model, a: argparse.Namespace) -> dict[str, Any]:
    """Clients that each ask again as soon as they are answered."""
    bias = dict.fromkeys(m.tokenizer.eog, -1000.0)  # answers as long as asked
    prompts = [conversation(m, i, a.shared) for i in range(a.requests)]
    numbers, firsts, tokens, lock = iter(range(a.requests)), [], [], threading.Lock()

    def client(engine: tinyllm.Engine) -> None:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            begun, first = time.perf_counter(), 0.0
            request = engine.submit(prompts[i], a.tokens, temperature=0, logit_bias=bias)
            for _ in request:
                first = first or time.perf_counter() - begun
            with lock:
                firsts.append(first)
                tokens.append(len(request.result().ids))

    m.prefixes.trim(0)  # forget what the last round has read
    with tinyllm.Engine(m) as engine:
        engine.submit("warm", 2).result()
        threads = [threading.Thread(target=client, args=(engine,)) for _ in range(a.clients)]
        begun = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        seconds = time.perf_counter() - begun
    return {
        "clients": a.clients, "requests": a.requests, "tokens of an answer": a.tokens,
        "tokens of a prompt": len(prompts[0]), "tokens/s": sum(tokens) / seconds,
        "first token s, median": statistics.median(firsts), "first token s, last": max(firsts),
    }  # fmt: skip


def pace(m: tinyllm.Model, a: argparse.Namespace) -> dict[str, Any]:
    """Gaps between the tokens of four texts, alone and while a long prompt is read."""
    bias = dict.fromkeys(m.tokenizer.eog, -1000.0)
    long = (conversation(m, 0, a.long) * (1 + a.long // 100))[: a.long]
    times: list[list[float]] = [[] for _ in range(4)]
    m.prefixes.trim(0)  # forget what the last round has read
    with tinyllm.Engine(m) as engine:
        texts = [
            engine.submit(
                conversation(m, i, 30), 100_000, temperature=0, logit_bias=bias, overflow="shift"
            )
            for i in range(4)
        ]
        threads = [
            threading.Thread(
                target=lambda r=r, t=t: [t.append(time.perf_counter()) for _ in r], daemon=True
            )
            for r, t in zip(texts, times, strict=True)
        ]
        for t in threads:
            t.start()
        time.sleep(4)
        begun = time.perf_counter()
        engine.submit(long, 1, temperature=0).result()
        ended = time.perf_counter()
        time.sleep(2)
        for r in texts:
            r.cancel()
        for t in threads:
            t.join()

    def gaps(start: float, end: float) -> list[tuple[int, float]]:
        """(tokens before it, seconds) of each gap in a span of time, of all texts."""
        return [
            (i, y - x)
            for t in times
            for i, (x, y) in enumerate(pairwise(t))
            if start <= x and y <= end
        ]

    before, beside, after = gaps(begun - 2, begun), gaps(begun, ended), gaps(ended, ended + 2)
    # texts become longer meanwhile, and so do the steps that only write: a line says what is usual
    first, shorter = (statistics.median(column) for column in zip(*before, strict=True))
    last, longer = (statistics.median(column) for column in zip(*after, strict=True))

    def usual(i: int) -> float:
        return shorter + (longer - shorter) * (i - first) / (last - first)

    over = sorted(gap / usual(i) for i, gap in beside)
    alone = sorted(gap / usual(i) for i, gap in before + after)
    return {
        "tokens of the prompt": a.long, "its seconds": ended - begun,
        "usual gap ms, before": 1e3 * shorter, "usual gap ms, after": 1e3 * longer,
        "p99 over usual, without it": alone[int(0.99 * len(alone))],
        "median over usual": statistics.median(over), "p99 over usual": over[int(0.99 * len(over))],
        "gaps": len(beside),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; default: the bundled model")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--shared", type=int, default=130)
    parser.add_argument("--long", type=int, default=4000)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for the numbers")
    a = parser.parse_args()
    with tinyllm.load(a.model, n_threads=a.threads) as m:
        loads = [load(m, a) for _ in range(a.rounds)]
        report: dict[str, Any] = {"benchmark": "engine_load", "machine": common.machine()}
        report |= {"model": Path(m.path).name, "load": loads, "pace": pace(m, a)}
    print(json.dumps({"load": loads, "pace": report["pace"]}, indent=1))
    if a.json:
        common.write_json(a.json, report)


if __name__ == "__main__":
    main()
