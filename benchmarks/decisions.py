"""How often ``Model.decide`` is right on labelled questions, and how well its probabilities are calibrated.

    python benchmarks/decisions.py model.gguf [--json FILE]

The set is small and made here: statements about the world, and short texts to be sorted and rated. Chance is
what guessing would get; ECE the mean distance between how sure the model is and how often it is right, over
five equal bins of confidence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm

TRUE = [
    "Paris is the capital of France.",
    "Fish live in water.",
    "Fire is hot.",
    "Two and two are four.",
    "Birds have wings.",
    "The Earth goes around the sun.",
    "Ice is frozen water.",
    "A week has seven days.",
    "Dogs are animals.",
    "The sky is blue by day.",
    "Gold is a metal.",
    "Shakespeare wrote plays.",
    "Bread is made of flour.",
    "Rome is in Italy.",
    "A triangle has three sides.",
]
FALSE = [
    "Paris is the capital of Japan.",
    "Fish live in trees.",
    "Fire is cold.",
    "Two and two are seven.",
    "Birds have wheels.",
    "The sun goes around the Earth.",
    "Ice is made of stone.",
    "A week has twelve days.",
    "Dogs are plants.",
    "The sky is green by day.",
    "Gold is a vegetable.",
    "Shakespeare was a painter of cars.",
    "Bread is made of glass.",
    "Rome is in China.",
    "A triangle has nine sides.",
]
TOPICS = ["sports", "food", "weather", "music", "money"]
SORTED = {
    "sports": ["The striker scored twice in the final.", "She won the marathon in under three hours.",
               "The match was decided by penalties.", "Their goalkeeper was injured at training."],
    "food": ["Fry the onions until they are golden.", "The soup needs more salt and pepper.",
             "We baked an apple pie for dessert.", "He ordered noodles with vegetables."],
    "weather": ["Heavy rain is expected on Monday.", "The storm brought snow to the hills.",
                "It was sunny with a light wind.", "Fog will clear by noon."],
    "music": ["The violin concerto lasted an hour.", "Her new album has twelve songs.",
              "The choir sang in four voices.", "He tuned his guitar before the show."],
    "money": ["The bank raised its interest rate.", "She paid the invoice last week.",
              "Shares fell after the report.", "He saved half of his salary."],
}  # fmt: skip
LEVELS = ["very bad", "bad", "middling", "good", "very good"]
RATED = [("The worst film that I have ever seen.", 0), ("I want my money back, it is broken.", 0),
         ("It was rather boring.", 1), ("Not as good as I had hoped.", 1), ("It does its job, no more.", 2),
         ("An average meal at an average price.", 2), ("I liked it, and would come again.", 3),
         ("A nice book with a few long chapters.", 3), ("Simply perfect, the best day of the year!", 4),
         ("Outstanding in every way.", 4)]  # fmt: skip


def statements(model: tinyllm.Model) -> dict[str, Any]:
    """Predicates that are true or false."""
    asked = [*((s, True) for s in TRUE), *((s, False) for s in FALSE)]
    questions = [{"type": "predicate", "instructions": s} for s, _ in asked]
    p = np.array([a["probability"] for a in model.decide("General knowledge.", questions).answers])
    right = np.array([r for _, r in asked])
    sure = np.maximum(p, 1 - p)
    return {**calibrated((p > 0.5) == right, sure), "chance": 0.5, "auc": auc(p[right], p[~right])}


def topics(model: tinyllm.Model) -> dict[str, Any]:
    """Sentences to be sorted."""
    question = {"type": "choice", "instructions": "What is the sentence about?", "choices": TOPICS}
    hits, sure = [], []
    for topic, sentences in SORTED.items():
        for sentence in sentences:
            answer = model.decide(sentence, [question]).answers[0]
            hits.append(answer["choice"] == topic)
            sure.append(max(o["probability"] for o in answer["probabilities"]))
    return {**calibrated(np.array(hits), np.array(sure)), "chance": 1 / len(TOPICS)}


def ratings(model: tinyllm.Model) -> dict[str, Any]:
    """Opinions to be rated."""
    question = {
        "type": "score",
        "instructions": "How good does the writer find it?",
        "levels": LEVELS,
    }
    scores = [model.decide(text, [question]).answers[0]["score"] for text, _ in RATED]
    wanted = [level for _, level in RATED]
    return {"n": len(RATED), "rank correlation": rank_correlation(scores, wanted)}


def calibrated(hits: np.ndarray, sure: np.ndarray) -> dict[str, Any]:
    """Accuracy, and how far confidence is from it."""
    bins = np.minimum((sure * 5).astype(int), 4)
    gaps = [
        abs(hits[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins)
    ]
    return {
        "n": len(hits),
        "right": float(hits.mean()),
        "sure": float(sure.mean()),
        "ece": float(sum(gaps)),
    }


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """How often a true statement is likelier than a false one."""
    return float((above[:, None] > below[None]).mean())


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, equal values sharing their mean rank."""

    def ranks(x: Any) -> np.ndarray:
        x = np.asarray(x, float)
        return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; default: the bundled model")
    parser.add_argument("--json", help="a file for the numbers")
    options = parser.parse_args()
    with tinyllm.load(options.model) as model:
        report = {
            "benchmark": "decisions",
            "machine": common.machine(),
            "model": Path(model.path).name,
            "statements": statements(model),
            "topics": topics(model),
            "ratings": ratings(model),
        }
    print(
        json.dumps({k: report[k] for k in ("model", "statements", "topics", "ratings")}, indent=1)
    )
    if options.json:
        common.write_json(options.json, report)


if __name__ == "__main__":
    main()
