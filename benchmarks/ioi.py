"""Which heads move a name? What each adds to the right name's logit, taken apart in three ways.

    python benchmarks/ioi.py llama-model.gguf [--json FILE]

"When Mary and John went to the store, John gave a drink to" asks for Mary: each head adds something to the
logit of one name less the other's, here the mean over prompts. The three ways are our own ``Model.attribute``,
TransformerLens' ``ActivationCache`` on our driver, and that of its PyTorch model of the dequantised weights.
Needs torch and transformer_lens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tinyllm

NAMES = [(" Mary", " John"), (" Sarah", " Tom"), (" Anna", " Peter"), (" Emma", " James")]
PLACES = [("store", "drink"), ("park", "book")]
FIRST = 10


def in_torch(torch: Any, m: tinyllm.Model) -> Any:
    """A llama of transformers with a file's dequantised weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c, file = m.config, m._file.tensors
    config = LlamaConfig(
        vocab_size=m.network.n_vocab, hidden_size=c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head[0], num_key_value_heads=c.n_head_kv[0],
        intermediate_size=file["blk.0.ffn_down.weight"].shape[1], rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": m.metadata["llama.rope.freq_base"]},
        max_position_embeddings=c.n_ctx_train, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    heads = {"q": c.n_head[0], "k": c.n_head_kv[0]}
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    head = file.get("output.weight") or file["token_embd.weight"]
    found = {
        "model.embed_tokens.weight": file["token_embd.weight"].dequantize(),
        "model.norm.weight": file["output_norm.weight"].dequantize(),
        "lm_head.weight": head.dequantize(),
    }
    for i in range(c.n_layer):
        for name, own in names.items():
            x = file[f"blk.{i}.{own}.weight"].dequantize()
            if own in ("attn_q", "attn_k"):  # llama's files have the rotated pairs side by side
                n = heads[own[-1]]
                x = x.reshape(n, len(x) // n // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
            found[f"model.layers.{i}.{name}.weight"] = x
    with torch.no_grad():
        made = LlamaForCausalLM(config).eval()
        made.load_state_dict({n: torch.tensor(np.array(x)) for n, x in found.items()})
    return made


def prompts() -> list[tuple[str, str, str]]:
    """Prompts, each with the name that it asks for and the other."""
    found = []
    for pair in NAMES:
        for place, thing in PLACES:
            for giver in (0, 1):
                a, b = pair
                text = f"When{a} and{b} went to the {place},{pair[giver]} gave a {thing} to"
                found.append((text, pair[1 - giver], pair[giver]))
    return found


def by_lens(torch: Any, bridge: Any, ids: list[int], pair: tuple[int, int]) -> np.ndarray:
    """What each head adds to the difference of two logits, by TransformerLens [L, H]."""
    _, cache = bridge.run_with_cache(torch.tensor([ids]))
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    found = cache.logit_attrs(
        heads, torch.tensor([pair[0]]), incorrect_tokens=torch.tensor([pair[1]]), pos_slice=-1
    )
    return np.asarray(found[:, 0].detach().numpy().reshape(bridge.cfg.n_layers, -1))


def measure(m: tinyllm.Model) -> dict[str, Any]:
    import torch
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from tinyllm.research.bridge import Bridge

    made = in_torch(torch, m)
    reference = build_bridge_from_module(made, "LlamaForCausalLM", hf_config=made.config)
    reference.enable_compatibility_mode(
        center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    ways: dict[str, list[np.ndarray]] = {"tinyllm": [], "on our driver": [], "on torch": []}
    right = 0
    for text, name, other in prompts():
        ids, pair = m.prompt_ids(text), (m._token(name), m._token(other))
        logits = m.logits(ids)[-1]
        right += bool(logits[pair[0]] > logits[pair[1]])
        ways["tinyllm"].append(m.attribute(ids, *pair, by="heads").values)
        ways["on our driver"].append(by_lens(torch, Bridge(m), ids, pair))
        with torch.no_grad():
            ways["on torch"].append(by_lens(torch, reference, ids, pair))
    means = {way: np.mean(each, 0) for way, each in ways.items()}
    truth = means["on torch"]
    rows = {}
    for way, x in means.items():
        order = np.argsort(-np.abs(x).ravel())[:FIRST]
        rows[way] = {
            "first": [[int(i) // x.shape[1], int(i) % x.shape[1]] for i in order],
            "values": x.ravel()[order].round(5).tolist(),
            "largest_difference_from_torch": float(np.abs(x - truth).max()),
        }
    same = all(r["first"] == rows["on torch"]["first"] for r in rows.values())
    return {"prompts": len(prompts()), "right": right, "same_first_ten": same, "ways": rows}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("model")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    with tinyllm.load(args.model, compute="exact", kv_type="f32") as m:
        found = measure(m)
    for way, row in found["ways"].items():
        heads = " ".join(f"{layer}.{head}" for layer, head in row["first"])
        print(f"{way:<14} {heads}   {row['largest_difference_from_torch']:.2g}")
    print(f"the first {FIRST} are {'the same' if found['same_first_ten'] else 'NOT the same'}; "
          f"right about {found['right']} of {found['prompts']} prompts")  # fmt: skip
    if args.json:
        common.write_json(
            args.json, {"machine": common.machine(), "model": Path(args.model).name, **found}
        )


if __name__ == "__main__":
    main()
