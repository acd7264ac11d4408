"""Which tensors does a quantisation cost most, and does putting them back recover what the table predicts?

    python benchmarks/recovery.py model.gguf Q2_K Q4_K_S Q8_0 --exact --text text.txt --other text2.txt

Each mixture is made from the model; ``compare`` puts the model's own tensor in the place of each of the
mixture's in turn, then the five that cost most together. What that says of one text is held against another,
which had no part in it: there the same share of the KL should go. Beside it stands what the sum of the five
single gains says.
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
    one_by_one = {name: found.tensors[name] for name in worst}
    return {
        "kl": found.kl,
        "tensors_that_differ": len(found.tensors),
        "worst": {name: [b._file.tensors[name].type, one_by_one[name]] for name in worst},
        "together": found.together,
        **held_out(a, b, found.kl[0], one_by_one, found.together[worst[-1]], others),
    }


def held_out(
    a: tinyllm.Model,
    b: tinyllm.Model,
    kl: float,
    one_by_one: dict[str, float],
    together: float,
    others: dict[str, list[int]],
) -> dict[str, Any]:
    """By how much the KL falls with the worst tensors back, beside what a text's table predicts."""
    mended = with_tensors(b, {name: a._file.tensors[name] for name in one_by_one})
    rows = {}
    for name, ids in others.items():
        before = kl_of(a, b.network, ids)
        fell = before - kl_of(a, mended, ids)
        rows[name] = {
            "tokens": len(ids),
            "kl": before,
            "fell_by": fell,
            "of_predicted_by_the_sum": fell / before / (sum(one_by_one.values()) / kl),
            "of_predicted_together": fell / before / (together / kl),
        }
    total = sum(one_by_one.values())
    return {"sum": total, "together_of_sum": together / total, "others": rows}


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
            together = row["together"][list(row["worst"])[-1]]
            print(
                f"{mixture:<8} KL {row['kl'][0]:.5f}; the worst {WORST} back: {together:.5f} less, "
                f"{row['together_of_sum']:.2f} of the sum of one by one",
                flush=True,
            )
            for name, (kind, gain) in row["worst"].items():
                print(f"    {name:<26} {kind:<6} {gain:.5f}  {row['together'][name]:.5f}")
            for name, other in row["others"].items():
                print(f"    {name}: KL {other['kl']:.5f}, {other['fell_by']:.5f} less; "
                      f"{other['of_predicted_together']:.2f} of what was predicted")  # fmt: skip
            if args.json:
                common.write_json(
                    args.json,
                    {"machine": common.machine(), "model": Path(args.model).name,
                     "tokens": len(ids), "mixtures": rows},
                )  # fmt: skip


if __name__ == "__main__":
    main()
