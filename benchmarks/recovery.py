"""Which tensors does a quantisation cost most, and does putting them back recover what the table predicts?

    python benchmarks/recovery.py model.gguf Q2_K Q4_K_S Q8_0 --exact --text text.txt [--tokens 512]

Each mixture is made from the model; ``compare`` puts the model's own tensor in the place of each of the
mixture's in turn. Then the five that cost most are put back together: by how much the KL falls, and by how
much the sum of their single gains says.
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
from tinyllm.research.compare import WINDOW, divergence, logits_of, with_tensors

WORST = 5


def measure(a: tinyllm.Model, b: tinyllm.Model, ids: list[int]) -> dict[str, Any]:
    """The KL of b, its worst tensors, and the KL without them."""
    found = tinyllm.compare(a, b, ids, tensors=True, n_greedy=0)
    worst = found.worst(WORST)
    mended = with_tensors(b, {name: a._file.tensors[name] for name in worst})
    kl = float(divergence(logits_of(a.network, ids), logits_of(mended, ids)).mean())
    predicted, measured = sum(found.tensors[n] for n in worst), found.kl[0] - kl
    return {
        "kl": found.kl,
        "tensors_that_differ": len(found.tensors),
        "worst": {name: [b._file.tensors[name].type, found.tensors[name]] for name in worst},
        "kl_with_the_worst_back": kl,
        "predicted": predicted,
        "measured": measured,
        "measured_of_predicted": measured / predicted,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("mixtures", nargs="+")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=WINDOW)
    p.add_argument("--exact", action="store_true", help="activations stay float32")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if not 2 <= args.tokens <= WINDOW:
        p.error(f"--tokens {args.tokens}; expected 2 to {WINDOW}")
    rows: dict[str, Any] = {}
    how: Any = {"compute": "exact", "kv_type": "f32"} if args.exact else {}
    with tinyllm.load(args.model, **how) as a, tempfile.TemporaryDirectory() as folder:
        ids = a.prompt_ids(args.text.read_text()[: args.tokens * 16])[: args.tokens]
        for mixture in args.mixtures:
            made = Path(folder) / f"{mixture}.gguf"
            tinyllm.quantize(args.model, made, mixture, requantize=True)
            begin = time.perf_counter()
            with tinyllm.load(made, **how) as b:
                row = measure(a, b, ids)
            rows[mixture] = {**row, "seconds": round(time.perf_counter() - begin, 1)}
            print(
                f"{mixture:<8} KL {row['kl'][0]:.5f}; the worst {WORST} back: {row['measured']:.5f} less, "
                f"predicted {row['predicted']:.5f} ({row['measured_of_predicted']:.2f})",
                flush=True,
            )
            for name, (kind, gain) in row["worst"].items():
                print(f"    {name:<26} {kind:<6} {gain:.5f}")
            if args.json:
                common.write_json(
                    args.json,
                    {"machine": common.machine(), "model": Path(args.model).name,
                     "tokens": len(ids), "mixtures": rows},
                )  # fmt: skip


if __name__ == "__main__":
    main()
