"""Answers from documents: questions and their hits, and how fast texts are embedded, found and checked.

    python benchmarks/documents.py questions --model MINILM --wiki wiki.test.raw --chat SmolLM2-135M.gguf
    python benchmarks/documents.py recall --model MINILM --wiki wiki.test.raw
    python benchmarks/documents.py speed --model MINILM --wiki wiki.test.raw --gpt4all PYTHON
    python benchmarks/documents.py unchanged --model MINILM
    python benchmarks/documents.py million --model MINILM --wiki wiki.test.raw

MINILM is all-MiniLM-L6-v2.gguf2.f16.gguf. Each part writes its numbers below its name into --json
(benchmarks/results/documents.json). ``speed`` lets the two engines take turns in processes of their own; PYTHON
is that of an environment with gpt4all 2.8.2.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from questions import (
    HELD_OUT,
    QUESTIONS,
    REWORDED,
    REWORDED_HELD_OUT,
    UNRELATED,
    UNRELATED_HELD_OUT,
)

import tinyllm
from tinyllm.localdocs import LocalDocs
from tinyllm.localdocs.answering import NEAREST
from tinyllm.localdocs.chunking import Chunk, Content, Section, chunks, embedded_text
from tinyllm.localdocs.embedding import pack, row_bytes, unpack
from tinyllm.localdocs.search import NEAREST as CANDIDATES
from tinyllm.localdocs.vectors import Vectors

ROOT = Path(__file__).resolve().parent.parent


def articles(raw: Path) -> dict[str, str]:
    """The articles of a WikiText file by their titles, as Markdown."""
    text = re.sub(r" @(.)@ ", r"\1", raw.read_text("utf-8"))
    found: dict[str, str] = {}
    heads = list(re.finditer(r"(?m)^ = ([^=\n]*[^=\s][^=\n]*) = $\n \n", text))
    for m, end in zip(heads, [*(h.start() for h in heads[1:]), len(text)], strict=True):
        body = re.sub(
            r"(?m)^ (=(?: =)+) (.*?) =(?: =)+ $",
            lambda h: "#" * (h[1].count("=")) + " " + h[2],
            text[m.end() : end],
        )
        found[m[1]] = f"# {m[1]}\n\n{body}"
    return found


def write_articles(raw: Path, folder: Path) -> int:
    """One file for each article."""
    found = articles(raw)
    for title, text in found.items():
        (folder / f"{re.sub('[^A-Za-z0-9 .-]', '', title)}.md").write_text(text, "utf-8")
    return len(found)


def texts_of(raw: Path, n: int) -> list[str]:
    """n texts as they are embedded: chunks of the articles, again and again with another number before them."""
    base = [
        embedded_text(title, c)
        for title, text in articles(raw).items()
        for c in chunks(Content([Section(text)]))
    ]
    random.Random(0).shuffle(base)
    return [f"{i // len(base)} {base[i % len(base)]}" for i in range(n)]


def questions(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Hits and answers of the questions, how near they are, and the search beside one in float32."""
    with LocalDocs(folder / "store.sqlite", o.model) as docs, tinyllm.load(o.chat) as chat:
        n_articles, n_files = both(o, folder, docs)
        return {
            "files": n_files, "articles": n_articles, "recall of 10": recall(docs),
            "questions": answered(docs, chat, QUESTIONS), "held out": answered(docs, chat, HELD_OUT),
            "near": nearness(docs), "nearest": NEAREST,
        }  # fmt: skip


def recalled(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The search beside one in float32 alone."""
    with LocalDocs(folder / "store.sqlite", o.model) as docs:
        both(o, folder, docs)
        return {"texts": docs._store.one("SELECT count(*) FROM vectors"), **recall(docs)}


def both(o: argparse.Namespace, folder: Path, docs: LocalDocs) -> tuple[int, list[int]]:
    """Read the documentation and the articles -> how many articles there are, and files of each."""
    wiki = folder / "wiki"
    wiki.mkdir()
    n_articles = write_articles(o.wiki, wiki)
    return n_articles, [docs.add("docs", ROOT / "docs").added, docs.add("wiki", wiki).added]


def answered(
    docs: LocalDocs, chat: tinyllm.Model, asked: list[tuple[str, str, str]]
) -> dict[str, Any]:
    """How many questions find their file, and how many get a right answer."""
    rows, first3, first1, right, shown, quoted = [], 0, 0, 0, 0, [0, 0, 0]
    for question, files, words in asked:
        hits = docs.search(question, 3)
        found = [bool(re.match(f"(.*/)?({files})", h.file)) for h in hits]
        first3, first1 = first3 + any(found), first1 + found[0]
        answer = docs.ask(question, chat, max_tokens=60, temperature=0)
        good = bool(re.search(words, answer.text, re.IGNORECASE))
        right += good
        quotes = [h.text for h in answer.quotes]
        shown += good or bool(re.search(words, "\n".join(quotes), re.IGNORECASE))
        for n in range(3):
            quoted[n] += bool(re.search(words, "\n".join(quotes[: n + 1]), re.IGNORECASE))
        rows.append([question, [h.place for h in hits], answer.text, good, quotes])
        said = answer.text[:150].replace("\n", " ")
        print(any(found), good, question, "|", hits[0].place, "|", said, file=sys.stderr)
    return {"n": len(asked), "right file first": first1, "right file among three": first3,
            "right answers": right, "right among 1, 2, 3 quoted sentences": quoted,
            "right in the answer or its quotes": shown, "rows": rows}  # fmt: skip


def nearness(docs: LocalDocs) -> dict[str, Any]:
    """How many questions of each kind have a hit that is near, by nearness and by similarity alone.

    "elsewhere" asks each collection what only the other one answers.
    """
    about_wiki = [q for q, *_ in [*QUESTIONS[:21], *HELD_OUT[:22]]]
    about_docs = [q for q, *_ in [*QUESTIONS[21:], *HELD_OUT[22:]]]
    kinds: dict[str, list[tuple[str, str | tuple[()]]]] = {
        "asked": [(q, ()) for q, *_ in QUESTIONS],
        "asked, held out": [(q, ()) for q, *_ in HELD_OUT],
        "reworded": [(q, ()) for q, _ in REWORDED],
        "reworded, held out": [(q, ()) for q, _ in REWORDED_HELD_OUT],
        "unrelated": [(q, ()) for q in UNRELATED],
        "unrelated, held out": [(q, ()) for q in UNRELATED_HELD_OUT],
        "elsewhere": [(q, "docs") for q in about_wiki] + [(q, "wiki") for q in about_docs],
    }
    found = {}
    for kind, asked in kinds.items():
        hits = [docs.search(q, 4, where or None) for q, where in asked]
        near = [max(h.nearness for h in some) for some in hits]
        similar = [max(h.similarity for h in some) for some in hits]
        found[kind] = {
            "n": len(asked), "near": sum(x >= NEAREST for x in near),
            "similarity of 0.3": sum(x >= 0.3 for x in similar),
            "least": round(min(near), 3), "most": round(max(near), 3),
        }  # fmt: skip
    return found


def recall(docs: LocalDocs) -> dict[str, float]:
    """How many of the ten nearest by float32 vectors are among ten that are found, in 8 bits and as ranked.

    The first comes of products with 8 bits on both sides; of those, search ranks the first 60 again, with the
    question's numbers as they are.
    """
    texts = [embedded_text(t or f, as_chunk(h, x)) for t, f, h, x in docs._store.rows(
        "SELECT d.title, d.file, c.heading, c.text FROM vectors v JOIN chunks c ON c.digest = v.digest"
        " JOIN documents d ON d.id = c.document GROUP BY v.id ORDER BY v.id"
    )]  # fmt: skip
    rows = docs._store.rows("SELECT id, codes FROM vectors ORDER BY id")
    ids = np.array([i for i, _ in rows])
    stored = unpack([codes for _, codes in rows], docs.embedder.width)
    exact = docs.embedder.documents(texts)
    search = Vectors(docs._store, docs.embedder.width)
    search.refresh()
    found = ranked = n = 0
    for question, *_ in [*QUESTIONS, *((u,) for u in UNRELATED)]:
        query = docs.embedder.query(question)
        best = set(ids[np.argsort(-(exact @ query))[:10]].tolist())
        found += len(best & set(search.best(query, 10)[0].tolist()))
        near = search.best(query, CANDIDATES)[0]
        again = near[np.argsort(-(stored[np.searchsorted(ids, near)] @ query))[:10]]
        ranked += len(best & set(again.tolist()))
        n += len(best)
    return {"in 8 bits": found / n, "as ranked": ranked / n}


def as_chunk(heading: str, text: str) -> Chunk:
    """What ``embedded_text`` takes."""
    return Chunk(text, heading)


GPT4ALL = """
import json, sys, time
from gpt4all import Embed4All
folder, name = sys.argv[1].rsplit("/", 1)
model = Embed4All(name, n_threads=int(sys.argv[2]), model_path=folder, allow_download=False)
print("ready", flush=True)
for line in sys.stdin:
    texts = json.loads(line)
    begin = time.perf_counter()
    model.embed(texts)
    print(time.perf_counter() - begin, flush=True)
"""


def speed(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Texts a second, ours as they go into the store, GPT4All's by Embed4All in lists of a hundred."""
    texts = texts_of(o.wiki, o.texts)
    command = [o.gpt4all, "-c", GPT4ALL, str(o.model), str(o.threads)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin
    assert other.stdout
    while "ready" not in other.stdout.readline():
        pass
    ratios, ours, theirs = [], [], []
    with LocalDocs(folder / "store.sqlite", o.model, o.threads) as docs:
        docs.embedder.documents(texts[:64])
        at, share = 0, -(-o.texts // o.rounds)
        for i in range(o.rounds):
            part = texts[at : at + share]
            at += share
            begin = time.perf_counter()
            for j in range(0, len(part), 256):
                pack(docs.embedder.documents(part[j : j + 256]))
            ours.append(len(part) / (time.perf_counter() - begin))
            few = part[: o.few]
            other.stdin.write(json.dumps(few) + "\n")
            other.stdin.flush()
            theirs.append(len(few) / float(other.stdout.readline()))
            ratios.append(ours[-1] / theirs[-1])
            print(f"round {i}: {ours[-1]:.1f} and {theirs[-1]:.1f} texts/s", file=sys.stderr)
    other.stdin.close()
    other.wait()
    return {
        "texts": o.texts, "characters": round(statistics.mean(map(len, texts))),
        "threads": o.threads, "texts/s": common.spread(ours),
        "gpt4all texts/s": common.spread(theirs), "ratio": common.spread(ratios),
    }  # fmt: skip


def unchanged(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of an update of 10,000 files that are as before."""
    place = folder / "files"
    for i in range(100):
        (place / str(i)).mkdir(parents=True)
        for j in range(100):
            (place / str(i) / f"{j}.md").write_text(f"# Numbers\n\n{j % 10}")
    with LocalDocs(folder / "store.sqlite", o.model) as docs:
        docs.add("all", place)
        time.sleep(2.5)  # a younger file is read again
        docs.update()
        seconds = []
        for _ in range(o.rounds):
            begin = time.perf_counter()
            report = docs.update()["all"]
            seconds.append(time.perf_counter() - begin)
            assert report.unchanged == 10_000
            assert not report.anything
    return {"files": 10_000, "seconds": common.spread(seconds)}


def million(o: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a search among a million chunks: random vectors, words of the articles.

    With --store the store is kept, and taken as it is the next time.
    """
    path = o.store or folder / "store.sqlite"
    is_there = path.exists()
    with LocalDocs(path, o.model) as docs:
        if not is_there:
            fill(docs, o.texts, o.words, " ".join(articles(o.wiki).values()).split())
        docs.embedder.query("loaded before memory is looked at")
        said, before = docs.search_bytes, resident()
        begin = time.perf_counter()
        docs.search("a first search")
        first, grew = time.perf_counter() - begin, resident() - before
        asked = [q for q, *_ in QUESTIONS] + UNRELATED
        seconds = []
        for i in range(o.rounds * len(asked)):
            begin = time.perf_counter()
            docs.search(asked[i % len(asked)])
            seconds.append(time.perf_counter() - begin)
        width = docs.embedder.width
    seconds.sort()
    return {
        "chunks": o.texts, "words of a chunk": o.words, "width": width,
        "store MB": round(path.stat().st_size / 1e6),
        "memory said MB": round(said / 1e6), "memory taken MB": round(grew / 1e6),
        "first search s": round(first, 2), "median ms": round(1e3 * statistics.median(seconds), 1),
        "least ms": round(1e3 * seconds[0], 1),
        "95th of 100 ms": round(1e3 * seconds[int(0.95 * len(seconds))], 1), "searches": len(seconds),
    }  # fmt: skip


def fill(docs: LocalDocs, n: int, share: int, words: list[str]) -> None:
    """n chunks of ``share`` neighbouring words each, with random vectors, in documents of 10,000."""
    rng = np.random.default_rng(0)
    width, store = docs.embedder.width, docs._store
    with store.writing() as db:
        store.keep(row_bytes=row_bytes(width))
        db.execute("INSERT INTO collections (name) VALUES ('all')")
    begin = time.perf_counter()
    for start in range(0, n, 10_000):
        rows = rng.standard_normal((10_000, width), np.float32)
        codes = pack(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        starts = rng.integers(len(words) - share, size=10_000)
        with store.writing() as db:
            document = db.execute(
                "INSERT INTO documents (collection, path, file, size, mtime, ctime, seen)"
                " VALUES (1, ?, ?, 0, 0, 0, 0)",
                (str(start).encode(), f"{start}.txt"),
            ).lastrowid
            db.executemany(
                "INSERT INTO chunks (document, number, heading, text, digest) VALUES (?, ?, '', ?, ?)",
                (
                    (document, i, " ".join(words[at : at + share]), str(start + i).encode())
                    for i, at in enumerate(starts)
                ),
            )
            db.executemany(
                "INSERT INTO vectors (digest, codes) VALUES (?, ?)",
                ((str(start + i).encode(), c) for i, c in enumerate(codes)),
            )
        if start % 100_000 == 0:
            print(f"{start:,} chunks, {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def without_rows(found: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a result."""
    inner = {k: without_rows(v) if isinstance(v, dict) else v for k, v in found.items()}
    return {k: v for k, v in inner.items() if k != "rows"}


PARTS = {
    "questions": questions,
    "recall": recalled,
    "speed": speed,
    "unchanged": unchanged,
    "million": million,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=tuple(PARTS))
    add("--model", type=common.existing, required=True, help="a BERT in GGUF")
    add("--chat", type=common.existing, help="a model that chats")
    add("--wiki", type=common.existing, help="WikiText-2, raw")
    add("--gpt4all", default=sys.executable, help="a Python with gpt4all")
    add("--texts", type=int, default=0, help="how many; default: 10,000, or a million")
    add("--words", type=int, default=40, help="million: of a chunk")
    add("--few", type=int, default=50, help="texts of a round for GPT4All")
    add("--rounds", type=int, default=5)
    add("-t", "--threads", type=int, default=2)
    add("--folder", type=Path, help="for temporary files")
    add("--store", type=Path, help="million: a file to keep")
    add("--json", type=Path, default=ROOT / "benchmarks" / "results" / "documents.json")
    o = parser.parse_args()
    o.texts = o.texts or (1_000_000 if o.part == "million" else 10_000)
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        found = PARTS[o.part](o, Path(folder))
    print(json.dumps(without_rows(found), indent=1, ensure_ascii=False))
    kept = json.loads(o.json.read_text("utf-8")) if o.json.exists() else {}
    kept[o.part] = {"machine": common.machine(), **found}
    o.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
