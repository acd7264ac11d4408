"""Kill a process that updates a store again and again, and see that the store is whole.

    python killing.py FOLDER N SEED

Between two kills some files are added, changed, moved and removed. The process is a fork of this one, which has
loaded the model; it is killed after a random part of the time that an update takes. Prints JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tinyllm
from tinyllm.localdocs import LocalDocs, updating
from tinyllm.localdocs.embedding import Embedder

WORDS = (
    "tea bean pole water night green black leaf root stone river cloud sand light shadow".split()
)


def text(rng: random.Random) -> str:
    """A document of a few sections."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        parts.append(f"# {rng.choice(WORDS)} {rng.randint(0, 99)}\n")
        parts.append(" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 40))) + ".\n")
    return "\n".join(parts)


def disturb(folder: Path, rng: random.Random) -> None:
    """Add, change, move and remove some files."""
    files = sorted(folder.glob("*.md"))
    for _ in range(rng.randint(1, 6)):
        do = rng.random()
        if do < 0.45 or len(files) < 5:
            (folder / f"{rng.randint(0, 10**6)}.md").write_text(text(rng))
        elif do < 0.7:
            rng.choice(files).write_text(text(rng))
        elif do < 0.8:
            rng.choice(files).rename(folder / f"{rng.randint(0, 10**6)}.md")
        else:
            rng.choice(files).unlink()
        files = sorted(folder.glob("*.md"))


def dump(docs: LocalDocs) -> list[object]:
    """All that a store holds, without the numbers of its rows and the times of reading."""
    store = docs._store
    return [
        store.rows("SELECT name FROM collections ORDER BY name"),
        store.rows(
            "SELECT path, file, size, mtime, ctime, digest, title, author, date, reason FROM documents"
            " ORDER BY path"
        ),
        store.rows(
            "SELECT d.path, c.number, c.heading, c.text, c.first_line, c.last_line, c.digest, v.codes"
            " FROM chunks c JOIN documents d ON d.id = c.document LEFT JOIN vectors v"
            " ON v.digest = c.digest ORDER BY d.path, c.number"
        ),
        store.rows("SELECT digest, codes FROM vectors ORDER BY digest"),
    ]  # fmt: skip


def work(store: Path, folder: Path, model: tinyllm.Model, log: Path) -> None:
    """Update the store, and note the digests of all texts that are embedded."""
    plain = Embedder.documents

    def noting(self: Embedder, texts: list[str]) -> object:
        with log.open("a") as out:
            out.writelines(updating.digest_of(t).hex() + "\n" for t in texts)
        return plain(self, texts)

    Embedder.documents = noting  # type: ignore[assignment, method-assign]
    with LocalDocs(store, model) as docs:
        docs.add("all", folder)


def known(docs: LocalDocs) -> set[str]:
    return {d.hex() for (d,) in docs._store.rows("SELECT digest FROM vectors")}


def main(place: Path, n: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    folder, store, log = place / "texts", place / "store.sqlite", place / "log"
    folder.mkdir()
    for _ in range(30):
        disturb(folder, rng)
    updating.AT_ONCE, updating.EMBEDDED = 2, 4
    with tinyllm.load(n_threads=1) as model:
        began = time.perf_counter()
        with LocalDocs(place / "first.sqlite", model) as docs:
            docs.add("all", folder)
        whole = time.perf_counter() - began
        killed, twice, problems = 0, 0, []
        before: set[str] = set()
        longest = whole
        for _ in range(n):
            disturb(folder, rng)
            log.write_text("")
            child = os.fork()
            if not child:
                try:
                    work(store, folder, model, log)
                finally:
                    os._exit(0)
            time.sleep(rng.random() ** 2 * longest)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            twice += len(before & set(log.read_text().split()))
            with LocalDocs(store, model) as docs:
                problems += docs.check()
                before = known(docs)
        with LocalDocs(store, model) as docs:
            docs.add("all", folder)
            problems += docs.check()
            found = dump(docs)
        with LocalDocs(place / "undisturbed.sqlite", model) as docs:
            docs.add("all", folder)
            equal = dump(docs) == found
    return {
        "runs": n,
        "killed": killed,
        "embedded twice": twice,
        "problems": problems,
        "equal": equal,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
