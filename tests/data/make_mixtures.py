"""Make mixtures.json: which types llama.cpp gives to the tensors of four tiny models.

    python tests/data/make_mixtures.py

Needs llama-cpp-python. For each model: its metadata and the shapes of its tensors, where ``*``
stands for the number of each layer; for each mixture the type of each tensor, or one per layer.
Tensors that stayed F32 are left out.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

from tinyllm import gguf
from tinyllm.gguf.mixtures import MIXTURES

N_LAYER = 17
# n_head, n_head_kv, n_expert, tied embeddings, n_embd
MODELS = {
    "plain": (4, 4, 0, False, 256),
    "grouped": (8, 2, 0, True, 256),
    "experts": (4, 4, 8, False, 256),
    "narrow": (4, 4, 0, False, 96),
}


def shapes(n_head: int, n_head_kv: int, n_expert: int, tied: bool, n_embd: int) -> dict:
    n_kv, n_ff = n_embd // n_head * n_head_kv, 256
    out = {"token_embd.weight": (300, n_embd), "output_norm.weight": (n_embd,)}
    if not tied:
        out["output.weight"] = (300, n_embd)
    layer = {
        "attn_norm": (n_embd,),
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_embd),
        "ffn_norm": (n_embd,),
    }
    if n_expert:
        layer["ffn_gate_inp"] = (n_expert, n_embd)
        layer["ffn_gate_exps"] = layer["ffn_up_exps"] = (n_expert, n_ff, n_embd)
        layer["ffn_down_exps"] = (n_expert, n_embd, n_ff)
    else:
        layer["ffn_gate"] = layer["ffn_up"] = (n_ff, n_embd)
        layer["ffn_down"] = (n_embd, n_ff)
    return out | {f"blk.*.{name}.weight": shape for name, shape in layer.items()}


def metadata(n_head: int, n_head_kv: int, n_expert: int, tied: bool, n_embd: int) -> dict:
    out = {
        "general.architecture": "llama",
        "llama.block_count": N_LAYER,
        "llama.context_length": 64,
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": n_head,
        "llama.attention.head_count_kv": n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": n_embd // n_head,
        "llama.vocab_size": 300,
    }
    return out | (
        {"llama.expert_count": n_expert, "llama.expert_used_count": 2} if n_expert else {}
    )


def names(pattern: str) -> list[str]:
    return [pattern.replace("*", str(i)) for i in range(N_LAYER if "*" in pattern else 1)]


def quantise(source: Path, file_type: int, patterns: dict) -> dict[str, str | list[str]]:
    """Pattern -> type or types; empty if llama.cpp refuses, as it does NVFP4."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 1
    target = source.with_suffix(".out")
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code:
        return {}
    types: dict[str, str | list[str]] = {}
    with gguf.open(target) as file:
        for pattern in patterns:
            found = [file.tensors[name].type for name in names(pattern)]
            if set(found) != {"F32"}:
                types[pattern] = found[0] if len(set(found)) == 1 else found
    return types


def main() -> None:
    out = {}
    for name, model in MODELS.items():
        patterns = shapes(*model)
        tensors = {n: np.ones(s, np.float32) for p, s in patterns.items() for n in names(p)}
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.gguf"
            gguf.write(source, metadata(*model), tensors)
            types = {}
            for mixture, recipe in MIXTURES.items():
                found = quantise(source, recipe.file_type, patterns)
                if found:
                    types[mixture] = found
        out[name] = {"metadata": metadata(*model), "shapes": patterns, "types": types}
    Path(__file__).with_name("mixtures.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
