"""The steps of TransformerLens' main demo on a GGUF file, beside its own PyTorch model of that file's weights.

    python benchmarks/main_demo.py llama-model.gguf [--json FILE]

Each step is written once, with TransformerLens' own tools, and run on both models: a loss, a cache of all
hooks, a head that is ablated, the residual stream patched place by place, the heads of induction, and the
parts of a logit. Said is how far the results are apart, in standard deviations of PyTorch's.
Needs torch and transformer_lens.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import ioi
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm

TEXT = (
    "Natural language processing tasks, such as question answering, machine translation, reading "
    "comprehension, and summarization, are typically approached with supervised learning."
)
CLEAN = "After John and Mary went to the store, Mary gave a bottle of milk to"
CORRUPTED = "After John and Mary went to the store, John gave a bottle of milk to"
RIGHT, WRONG = " John", " Mary"
# queries and keys: rotated pairs of a head's values are side by side in llama's files
TURNED = "hook_q", "hook_k", "hook_rot_q", "hook_rot_k"
TWICE = 4, 20  # rows of random tokens, which each row has twice
BOUND = 1e-3  # standard deviations


def a_loss(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The loss of a text, token by token and in all."""
    each = lens(given["text"], return_type="loss", loss_per_token=True)
    return {"loss of each token": each, "loss": lens(given["text"], return_type="loss")}


def a_cache(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The logits, and all that both models have under one name."""
    logits, cache = lens.run_with_cache(given["text"])
    return {"logits": logits, **cache}


def an_ablated_head(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The loss without the values of a head, for each head of values of five layers or so."""
    from transformer_lens import utilities as utils

    def without(value: Any, hook: Any, head: int) -> Any:
        value[:, :, head, :] = 0.0
        return value

    layers = range(0, lens.cfg.n_layers, max(lens.cfg.n_layers // 4, 1))
    losses = [
        lens.run_with_hooks(
            given["text"],
            return_type="loss",
            fwd_hooks=[(utils.get_act_name("v", layer), partial(without, head=head))],
        )
        for layer in layers
        for head in range(given["heads of values"])
    ]
    return {"losses without one head": torch.stack(losses)}


def difference(logits: Any, pair: tuple[int, int]) -> Any:
    return logits[0, -1, pair[0]] - logits[0, -1, pair[1]]


def patched_streams(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The clean residual stream put into the corrupted run, in ten of the layers, position by position.

    Positions before the first that differs are left out: their streams are the same.
    """
    from transformer_lens import utilities as utils

    def patch(stream: Any, hook: Any, position: int, clean: Any) -> Any:
        stream[:, position, :] = clean[hook.name][:, position, :]
        return stream

    clean, cache = lens.run_with_cache(given["clean"])
    corrupted = lens(given["corrupted"])
    first = int((given["clean"] != given["corrupted"])[0].nonzero()[0])
    low, high = (difference(x, given["pair"]) for x in (corrupted, clean))
    values = torch.stack([
        difference(
            lens.run_with_hooks(
                given["corrupted"],
                fwd_hooks=[
                    (utils.get_act_name("resid_pre", layer), partial(patch, position=i, clean=cache))
                ],
            ),
            given["pair"],
        )
        for layer in range(0, lens.cfg.n_layers, max(lens.cfg.n_layers // 10, 1))
        for i in range(first, given["clean"].shape[1])
    ])  # fmt: skip
    return {"restored by a patch": (values - low) / (high - low)}


def heads_of_induction(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """How much each head looks at what came after the token's first appearance [layers, heads]."""
    scores = torch.zeros(lens.cfg.n_layers, lens.cfg.n_heads)

    def look(pattern: Any, hook: Any) -> None:
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - TWICE[1])
        scores[hook.layer(), :] = stripe.mean(-1).mean(0)

    lens.run_with_hooks(
        given["twice"],
        return_type=None,
        fwd_hooks=[(lambda name: name.endswith("pattern"), look)],
    )
    return {"induction": scores}


def parts_of_a_logit(torch: Any, lens: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What layers, halves and heads add to the right name's logit less the wrong one's."""
    _, cache = lens.run_with_cache(given["clean"])
    names = {"tokens": given["names"][:1], "incorrect_tokens": given["names"][1:]}
    parts = {
        "the stream after each layer": cache.accumulated_resid(
            layer=-1, incl_mid=True, pos_slice=-1
        ),
        "parts of layers": cache.decompose_resid(layer=-1, pos_slice=-1),
        "heads": cache.stack_head_results(layer=-1, pos_slice=-1),
    }
    return {what: cache.logit_attrs(x, pos_slice=-1, **names) for what, x in parts.items()}


STEPS = a_loss, a_cache, an_ablated_head, patched_streams, heads_of_induction, parts_of_a_logit


def in_lens(torch: Any, m: tinyllm.Model) -> Any:
    """TransformerLens' PyTorch model of a file, the norms' weights folded as in our bridge."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    made = ioi.in_torch(torch, m)
    bridge = build_bridge_from_module(made, "LlamaForCausalLM", hf_config=made.config)
    bridge.enable_compatibility_mode(
        center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return bridge


def as_in_torch(name: str, x: Any) -> Any:
    """Our values [.., D] in the order of PyTorch's model, which has rotated pairs half a head apart."""
    if not name.endswith(TURNED):
        return x
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def apart(a: Any, b: Any) -> float:
    """The largest difference from b, in b's standard deviations; of one number, in its size."""
    seen = b.isfinite()  # masked scores are not
    if not (a.isfinite() == seen).all():
        return float("inf")
    size = b[seen].std() if b.numel() > 1 else b.abs()
    difference = float((a - b)[seen].abs().max() / size)
    return difference if difference >= 0 else float("inf")  # NaN is no agreement


def compared(torch: Any, m: tinyllm.Model, steps: Any = STEPS) -> dict[str, dict[str, Any]]:
    """Each step's seconds on both models, and its results' differences; those of hooks are a kind's largest."""
    from tinyllm.research.bridge import Bridge

    ours = Bridge(m)
    theirs = in_lens(torch, m)
    rng = np.random.default_rng(0)
    once = torch.from_numpy(rng.integers(1000, m.network.n_vocab, TWICE))
    given = {
        "text": ours.to_tokens(TEXT),
        "clean": ours.to_tokens(CLEAN),
        "corrupted": ours.to_tokens(CORRUPTED),
        "pair": (ours.to_single_token(RIGHT), ours.to_single_token(WRONG)),
        "names": torch.tensor([ours.to_single_token(x) for x in (RIGHT, WRONG)]),
        "twice": torch.cat([once, once], 1),
        "heads of values": m.config.n_head_kv[0],
    }
    found = {}
    for step in steps:
        results, seconds = [], []
        for lens in (ours, theirs):
            start = time.perf_counter()
            with torch.no_grad():
                results.append(step(torch, lens, given))
            seconds.append(round(time.perf_counter() - start, 1))
        differences: dict[str, float] = {}
        unlike = set()
        for name in results[0].keys() & results[1].keys():
            a, b = as_in_torch(name, results[0][name]), results[1][name]
            if name.startswith("blocks."):
                name = name.split(".", 2)[2]
            if a.shape == b.shape:
                differences[name] = max(differences.get(name, 0.0), apart(a, b))
            else:
                unlike.add(name)
        found[step.__name__] = {
            "seconds": dict(zip(("tinyllm", "torch"), seconds, strict=True)),
            "differences": dict(sorted(differences.items())),
            "not compared: another shape": sorted(unlike),
        }
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    import torch

    with tinyllm.load(args.model, compute="exact", kv_type="f32") as m:
        found = compared(torch, m)
    for step, row in found.items():
        seconds = ", ".join(f"{who} {s} s" for who, s in row["seconds"].items())
        print(f"{step.replace('_', ' ')} ({seconds})")
        for name, value in row["differences"].items():
            print(f"    {name:<32} {value:.2g}{'' if value <= BOUND else '   TOO FAR'}")
        for name in row["not compared: another shape"]:
            print(f"    {name:<32} has another shape")
    if args.json:
        common.write_json(
            args.json, {"machine": common.machine(), "model": Path(args.model).name, "steps": found}
        )


if __name__ == "__main__":
    main()
