"""Which tensors does a quantisation cost most, and does putting them back recover what the table predicts?

    python benchmarks/recovery.py model.gguf Q2_K Q4_K_S Q8_0 --exact --text text.txt --other text2.txt

Each mixture is made from the model; ``compare`` puts the model's own tensor in the place of each of the
mixture's in turn, and predicts of the single runs what the five that cost most bring together. That is held
against what they do bring, on this text and on others that had no part in the choice: there the same share of
the KL should go. Beside it stands what the sum of the five single gains says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm
from tinyllm.models.network import Network
from tinyllm.research.compare import WINDOW, divergence, logits_of, with_tensors

WORST = 5


def kl_of(a: tinyllm.Model, net: Network, ids: list[int]) -> float:
    """The KL of a network from model a on a text."""
    return float(divergence(logits_of(a.network, ids), logits_of(net, ids)).mean())


def measure(
    a: tinyllm.Model, b: tinyllm.Model, ids: list[int], others: dict[str, list[int]]
) -> dict[str, Any]:
    """The KL of b, its worst tensors, and the KL without them, on the text and on others."""
    found = tinyllm.compare(a, b, ids, tensors=True, n_greedy=0)
    worst = found.worst(WORST)
    own = {name: a._file.tensors[name] for name in worst}
    mended = with_tensors(b, own)  # a network of its own: nothing that compare has computed
    total = sum(found.tensors[name] for name in worst)
    predicted = found.predicted[worst[-1]]
    fell = found.kl[0] - kl_of(a, mended, ids)
    return {
        "kl": found.kl,
        "tensors_that_differ": len(found.tensors),
        "worst": {name: [b._file.tensors[name].type, found.tensors[name]] for name in worst},
        "predicted": found.predicted,
        "together": found.together,
        "fell_by": fell,
        "of_predicted": fell / predicted,
        "of_the_sum": fell / total,
        "others": {
            name: held_out(a, b, mended, text, predicted / found.kl[0])
            for name, text in others.items()
        },
    }


def held_out(
    a: tinyllm.Model, b: tinyllm.Model, mended: Network, ids: list[int], share: float
) -> dict[str, Any]:
    """By how much the KL falls with the worst tensors back on another text, of which share was predicted."""
    before = kl_of(a, b.network, ids)
    fell = before - kl_of(a, mended, ids)
    return {
        "tokens": len(ids),
        "kl": before,
        "fell_by": fell,
        "of_predicted": fell / before / share,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("mixtures", nargs="+")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument(
        "--other", type=Path, nargs="+", default=[], help="texts that the table has not seen"
    )
    p.add_argument("--tokens", type=int, default=WINDOW)
    p.add_argument("--exact", action="store_true", help="activations stay float32")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if not 2 <= args.tokens <= WINDOW:
        p.error(f"--tokens {args.tokens}; expected 2 to {WINDOW}")
    rows: dict[str, Any] = {}
    how: Any = {"compute": "exact", "kv_type": "f32"} if args.exact else {}
    with tinyllm.load(args.model, **how) as a, tempfile.TemporaryDirectory() as folder:
        texts = {
            path.stem: a.prompt_ids(path.read_text()[: args.tokens * 16])[: args.tokens]
            for path in (args.text, *args.other)
        }
        ids = texts.pop(args.text.stem)
        for mixture in args.mixtures:
            made = Path(folder) / f"{mixture}.gguf"
            tinyllm.quantize(args.model, made, mixture, requantize=True)
            begin = time.perf_counter()
            with tinyllm.load(made, **how) as b:
                row = measure(a, b, ids, texts)
            rows[mixture] = {**row, "seconds": round(time.perf_counter() - begin, 1)}
            print(
                f"{mixture:<8} KL {row['kl'][0]:.5f}; the worst {WORST} back: {row['fell_by']:.5f} less, "
                f"{row['of_predicted']:.3f} of what was predicted, {row['of_the_sum']:.2f} of the sum",
                flush=True,
            )
            for name, (kind, gain) in row["worst"].items():
                both = (row[column][name] for column in ("predicted", "together"))
                print(f"    {name:<26} {kind:<6} {gain:.5f}", *(f"{x:9.5f}" for x in both))
            for name, other in row["others"].items():
                print(f"    {name}: KL {other['kl']:.5f}, {other['fell_by']:.5f} less; "
                      f"{other['of_predicted']:.2f} of what was predicted")  # fmt: skip
            if args.json:
                common.write_json(
                    args.json,
                    {"machine": common.machine(), "model": Path(args.model).name,
                     "text": args.text.name, "tokens": len(ids), "compute": "exact" if args.exact else "int8",
                     "mixtures": rows},
                )  # fmt: skip


if __name__ == "__main__":
    main()
