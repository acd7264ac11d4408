"""Ctrl-C at random moments of one kind of work, again and again; then the same work must still be right.

    python interrupting.py load|compile|prefill|decode|stream|batch MODEL ROUNDS SECONDS

Prints how many interrupts ended the work, and the greedy text of the model afterwards.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import tinyllm
from tinyllm.kernels.cpu import elementwise, jit

PROMPT = "Once upon a time"
LONG = [1] + [300] * 200
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


def press(after: float, enough: threading.Event) -> None:
    """Ctrl-C after so many seconds, and every second until it was heard: inside of a finaliser it is not."""
    time.sleep(after)
    while not enough.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        enough.wait(1)


def interrupted(work: Callable[[], object], after: float) -> bool:
    """Repeat the work until Ctrl-C ends it."""
    enough = threading.Event()
    presses = threading.Thread(target=press, args=(after, enough))
    try:
        presses.start()
        while True:
            work()
    except KeyboardInterrupt:
        return True
    finally:
        calm(enough, presses)


def calm(enough: threading.Event, presses: threading.Thread) -> None:
    """Wait until nobody presses any more."""
    while presses.is_alive():
        try:
            enough.set()
            presses.join()
        except KeyboardInterrupt:
            pass


def kinds(path: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What can be interrupted."""
    model = tinyllm.load(path)
    yield "load", lambda: tinyllm.load(path).close()
    numbers = iter(range(10**9))
    yield "compile", lambda: jit.kernel(elementwise.concat, name=f"probe_{next(numbers)}")
    yield "prefill", lambda: model.logits(LONG)
    yield "decode", lambda: model.generate(PROMPT, **GREEDY)
    yield "stream", lambda: list(model.generate(PROMPT, stream=True, **GREEDY))
    yield "batch", lambda: model.generate([PROMPT, "The dog", "x"], **GREEDY)


def main() -> None:
    kind, path, rounds, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    model = tinyllm.load(path)
    logits = np.array(model.logits(LONG))
    text = str(model.generate(PROMPT, **GREEDY))
    work, rng = dict(kinds(path))[kind], random.Random(kind)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "compile":
            os.environ["TINYLLM_CACHE"] = folder
            jit.cache_folder.cache_clear()
        hits = sum(interrupted(work, rng.uniform(0, seconds)) for _ in range(rounds))
    for m in (model, tinyllm.load(path)):
        assert np.array_equal(m.logits(LONG), logits)
        assert str(m.generate(PROMPT, **GREEDY)) == text
    sys.stdout.write(f"{hits}\n{text}")


if __name__ == "__main__":
    main()
