"""The three texts as documents: read, cleaned, one in twenty held out, turned into rows of ids."""

import gzip
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

KINDS = ("stories", "dialogues", "tales")
HELD_OUT_EVERY = 20
BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)
TITLE = re.compile(r"\n\n\n([A-Z][A-Z ,’-]+)\n\n")
PIECE_CHARS = 1800  # a piece of a tale, about 450 ids: fits one row
STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def read_documents(texts: Path) -> dict[str, list[str]]:
    """All documents of each kind, in the order of the files."""
    return {
        "stories": read_stories(texts / "tinystories.txt"),
        "dialogues": read_dialogues(texts / "sgd_train.txt.gz")
        + read_dialogues(texts / "sgd_dev.txt.gz"),
        "tales": read_tales(texts / "grimm.txt"),
    }


def read_stories(path: Path) -> list[str]:
    """Stories stand between end marks; the file breaks off inside the last one, which is left out."""
    stories = path.read_text("utf-8").split("<|endoftext|>")[:-1]
    return [story.strip().translate(STRAIGHT) for story in stories if story.strip()]


def read_dialogues(path: Path) -> list[str]:
    """Dialogues stand between empty lines; each line is `User: ...` or `Assistant: ...`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [text.strip().translate(STRAIGHT) for text in file.read().split("\n\n") if text]


def read_tales(path: Path) -> list[str]:
    """One tale per title in capitals; the wrapped lines of a paragraph become one line."""
    parts = TITLE.split("\n\n\n" + path.read_text("utf-8").strip())[1:]
    titles, bodies = parts[::2], parts[1::2]
    return [
        f"{title}\n{unwrap(body)}".translate(STRAIGHT)
        for title, body in zip(titles, bodies, strict=True)
    ]


def unwrap(body: str) -> str:
    paragraphs = re.split(r"\n\s*\n", body.strip())
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents: one in twenty, evenly spread."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [d for i, d in enumerate(documents, 1) if i % HELD_OUT_EVERY], held_out


def pieces(tale: str) -> list[str]:
    """Whole paragraphs of one tale, joined up to the length of a row."""
    parts = [""]
    for paragraph in tale.split("\n"):
        if len(parts[-1]) + len(paragraph) > PIECE_CHARS:
            parts.append("")
        parts[-1] += paragraph + "\n"
    return [part.strip() for part in parts if part.strip()]


def as_chat(dialogue: str) -> str:
    """The dialogue as the chat template renders it."""
    turns = (line.partition(": ") for line in dialogue.split("\n"))
    return "".join(f"<|{role.lower()}|>{content.strip()}{END}" for role, _, content in turns)


def marked(kind: str, documents: list[str]) -> list[str]:
    """The documents with their control tokens; a dialogue comes as chat and as plain text."""
    if kind == "tales":
        return [BEGIN + piece for tale in documents for piece in pieces(tale)]
    plain = [BEGIN + document + END for document in documents]
    if kind == "stories":
        return plain
    # Two of three as chat: that is what the file's template asks for.
    return [
        plain[i] if i % 3 == 0 else BEGIN + as_chat(document)
        for i, document in enumerate(documents)
    ]


def encode(tokenizer: Tokenizer, kind: str, documents: list[str]) -> list[np.ndarray]:
    batch = tokenizer.encode_batch(marked(kind, documents), add_special_tokens=False)
    return [np.array(item.ids, dtype=np.int64) for item in batch]


def rows(documents: list[np.ndarray], n: int, rng: random.Random) -> Iterator[np.ndarray]:
    """Endless rows of n ids, each starting with a document; every document once per epoch."""
    row: list[np.ndarray] = []
    while True:
        for i in rng.sample(range(len(documents)), len(documents)):
            row.append(documents[i])
            if sum(map(len, row)) >= n:
                yield np.concatenate(row)[:n]
                row = []


def batches(
    documents: dict[str, list[np.ndarray]],
    mixture: dict[str, float],
    n_batch: int,
    n: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Endless [n_batch, n] batches whose rows are drawn from the kinds by their shares."""
    rng = random.Random(seed)
    streams = {kind: rows(documents[kind], n, rng) for kind in mixture}
    kinds, shares = list(mixture), list(mixture.values())
    while True:
        yield np.stack([next(streams[k]) for k in rng.choices(kinds, shares, k=n_batch)])


def one_of(kind: str) -> dict[str, float]:
    """The mixture of one kind alone."""
    return {kind: 1.0}
