"""Measure the exported model: python evaluate.py --texts DIR [--against stories260K.gguf].

Bits per byte of held-out text, the longest passage that sampled continuations share with the training
text, and samples. Everything runs on tinyllm itself.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from corpus import END, KINDS, pieces, read_documents, split

import tinyllm
from tinyllm.chat.render import render

HERE = Path(__file__).parent
EXCERPT = 700  # characters of each document: they fit 512 ids of a vocabulary of 512 tokens too
N_SAMPLES, N_TOKENS = 20, 150
OPENING = "Once upon a time"
QUESTIONS = (
    "Hi, I want to find a restaurant in San Jose.",
    "I need to book a flight to New York next Monday.",
    "Can you play me some music?",
    "What will the weather be like in London tomorrow?",
    "I'm looking for a movie to watch tonight.",
)


def bits_per_byte(model: tinyllm.Model, excerpts: list[str]) -> float:
    """Bits that the model needs for the excerpts, each after BOS, over their UTF-8 bytes."""
    bits = sum(bits_of(model, text) for text in excerpts)
    return bits / sum(len(text.encode()) for text in excerpts)


def bits_of(model: tinyllm.Model, text: str) -> float:
    ids = model.tokenizer.encode(text, add_special=True, parse_special=False)
    logits = model.logits(ids).astype(np.float64)[:-1]
    top = logits.max(-1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float((normalizer - chosen).sum() / math.log(2))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, so that a changed comma hides no copy."""
    return re.findall(r"[a-z0-9']+", text.lower())


class TrainingWords:
    """Where in the training text each word stands; documents are separated by a bar."""

    def __init__(self, documents: Iterable[str]) -> None:
        numbers: dict[str, int] = {}
        stream = np.array(
            [
                numbers.setdefault(word, len(numbers))
                for document in documents
                for word in (*words(document), "|")
            ],
            dtype=np.int32,
        )
        self.n = len(stream)
        ends = np.cumsum(np.bincount(stream))
        places = np.split(np.argsort(stream, kind="stable"), ends[:-1])
        self.places = dict(zip(numbers, places, strict=True))

    def shared_passage(self, text: str) -> list[str]:
        """The longest run of words of the text that one document holds word for word.

        After each word, `run` says for every place of that word how many words up to it agree.
        """
        found, longest = words(text), []
        run = np.zeros(self.n, dtype=np.int32)
        before = nowhere = np.zeros(0, dtype=np.int64)
        for end, word in enumerate(found, 1):
            here = self.places.get(word, nowhere)
            lengths = run[here - 1] + 1  # place -1 is the last bar: its run stays 0
            run[before], run[here], before = 0, lengths, here
            longest = max(longest, found[end - lengths.max(initial=0) : end], key=len)
        return longest


def copied(texts: list[str], training: TrainingWords) -> dict[str, Any]:
    """The longest shared passage of each text, and the longest of all with its words."""
    passages = [training.shared_passage(text) for text in texts]
    longest = max(passages, key=len)
    return {
        "longest": len(longest),
        "passage": " ".join(longest),
        "each": sorted(map(len, passages)),
    }


def openings(held_out: list[str]) -> list[str]:
    """Half of the prompts are the usual opening, half the first eight words of held-out stories."""
    half = N_SAMPLES // 2
    return [OPENING] * half + [" ".join(story.split()[:8]) for story in held_out[:half]]


def continuations(model: tinyllm.Model, prompts: list[str]) -> list[str]:
    """One sampled text per prompt, the engine's default sampling, seeds counted from 0."""
    return [
        str(model.generate(prompt, max_tokens=N_TOKENS, seed=seed))
        for seed, prompt in enumerate(prompts)
    ]


def answers(model: tinyllm.Model) -> list[dict[str, str]]:
    return [{"user": text, "assistant": answer(model, text)} for text in QUESTIONS]


def answer(model: tinyllm.Model, text: str) -> str:
    """The reply to one turn; generate adds the begin token, so the template must not."""
    turn = {"role": "user", "content": text}
    prompt = render(model.metadata["tokenizer.chat_template"], [turn], eos_token=END)
    return str(model.generate(prompt, max_tokens=60, seed=0))


def compression(model: tinyllm.Model, held_out: dict[str, list[str]]) -> dict[str, float]:
    return {kind: round(bits_per_byte(model, held_out[kind]), 4) for kind in held_out}


def evaluate(model: tinyllm.Model, other: tinyllm.Model | None, texts: Path) -> dict[str, Any]:
    parts = {kind: split(documents) for kind, documents in read_documents(texts).items()}
    held_out = {kind: parts[kind][1] for kind in KINDS}
    held_out["tales"] = [piece for tale in held_out["tales"] for piece in pieces(tale)]
    excerpts = {kind: [d[:EXCERPT] for d in documents] for kind, documents in held_out.items()}
    training = TrainingWords(document for kind in KINDS for document in parts[kind][0])
    prompts = openings(held_out["stories"])
    samples, replies = continuations(model, prompts), answers(model)
    result = {"bits_per_byte": compression(model, excerpts)}
    if other is not None:
        result["bits_per_byte_of_the_other"] = compression(other, {"stories": excerpts["stories"]})
    return result | {
        "shared_with_training_text": copied(samples, training),
        "shared_by_held_out_stories": copied(excerpts["stories"][:N_SAMPLES], training),
        "continuations": [p + s for p, s in zip(prompts, samples, strict=True)],
        "answers": replies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="folder of the three texts")
    parser.add_argument("--model", type=Path, help="a GGUF file; the bundled model by default")
    parser.add_argument("--against", type=Path, help="another GGUF file, scored on the stories")
    parser.add_argument("--device", help="as for tinyllm.load")
    parser.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    args = parser.parse_args()
    model = tinyllm.load(args.model, device=args.device)
    other = tinyllm.load(args.against, device=args.device) if args.against else None
    result = evaluate(model, other, args.texts)
    args.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
